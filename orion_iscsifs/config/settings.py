"""The settings themselves: typed, frozen, checked once, then passed explicitly.

The words are those of INTERFACE §5: an `-o` option, a TOML key and a URL query key are the same
word. `SessionConfig` is what the initiator needs, `CacheConfig` the cache, `FuseConfig` the file
system; `MountConfig` joins them.
"""

import enum
from typing import Final, Literal

import msgspec

CONNECTIONS_MAX: Final = 16
"""Of one session."""
LOG_BYTES_MIN: Final = 16 << 20
"""Of one persistent log."""


class Secret(str):
    """A string that never shows itself: repr() and format() give `***`; `reveal()` the text."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__

    def __format__(self, _spec: str) -> str:
        return "***"

    def reveal(self) -> str:
        return str.__str__(self)


def passphrase(key: Secret) -> bytes:
    """The bytes of a key file."""
    return key.reveal().encode(errors="surrogateescape")


class ChapAlgorithm(enum.IntEnum):
    """CHAP_A values (RFC 7143 §12.1.3 and IANA's PPP authentication algorithms)."""

    MD5 = 5
    SHA1 = 6
    SHA256 = 7
    SHA3_256 = 8


class DigestPreference(enum.StrEnum):
    """What to offer for HeaderDigest or DataDigest, first choice first (RFC 7143 §13.1)."""

    CRC32C = "crc32c"
    NONE = "none"
    PREFER_CRC32C = "prefer-crc32c"
    PREFER_NONE = "prefer-none"


class CacheMode(enum.StrEnum):
    NONE = "none"
    WRITETHROUGH = "writethrough"
    WRITEBACK = "writeback"
    LOG = "log"
    """Write-back, with a persistent log on a local disk."""


class Destage(enum.StrEnum):
    """In which order the persistent log goes to the target."""

    ORDERED = "ordered"
    """Flush by flush: the target is always in a state that the order of flushes allows."""
    FAST = "fast"
    """Flushes merged: faster, and the target needs the log to be whole."""


class PathPolicy(enum.StrEnum):
    """Which of several usable paths takes a request."""

    SERVICE_TIME = "service-time"
    QUEUE_LENGTH = "queue-length"
    ROUND_ROBIN = "round-robin"
    FAILOVER = "failover"


class ReserveMode(enum.StrEnum):
    """What to do about a persistent reservation (SPC-4 §5.13)."""

    AUTO = "auto"
    """Take one where the device supports it."""
    REQUIRE = "require"
    """No mount without one."""
    OFF = "off"


class ChapCredentials(msgspec.Struct, frozen=True, kw_only=True):
    """Name and secret of one direction (RFC 7143 §12.1.3)."""

    user: str
    secret: Secret


class AuthConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`initiator` proves who we are, `target` (mutual CHAP) who the target is."""

    initiator: ChapCredentials | None = None
    target: ChapCredentials | None = None
    algorithms: tuple[ChapAlgorithm, ...] = (ChapAlgorithm.MD5,)
    """In the order of preference."""


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """TLS to the portals. Names of PEM files, as absolute paths."""

    ca: str | None = None
    """Whom to trust; None: the system's authorities."""
    cert: str | None = None
    """Our own certificate and its chain, for a peer that wants one."""
    key: str | None = None
    """Its private key; None: the key is in the file `cert`."""


class SessionConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One session: who we are, what we offer, how long we wait. Times in seconds."""

    initiator_name: str
    auth: AuthConfig = AuthConfig()
    tls: TlsConfig | None = None
    """None: plain TCP (`iscsi://`)."""
    header_digest: DigestPreference = DigestPreference.PREFER_NONE
    data_digest: DigestPreference = DigestPreference.PREFER_NONE
    bind: str | None = None
    """Source address or interface of the connections; None: as the routes say."""
    connections: int = 1
    """TCP connections of the session (MC/S)."""
    erl: int = 0
    """The highest ErrorRecoveryLevel that is offered."""
    queue_depth: int | None = None
    """Commands in flight per LUN; None: by the target's command window."""
    replacement_timeout_s: float = 120.0
    """How long I/O is held while no path works; 0: fail at once; negative: for ever."""
    login_timeout_s: float = 15.0
    noop_interval_s: float = 5.0
    noop_timeout_s: float = 5.0
    command_timeout_s: float = 30.0

    # What we offer; the outcome is in `protocol.keys.Parameters`.
    initial_r2t: bool = False
    immediate_data: bool = True
    max_recv_data_segment_length_bytes: int = 1 << 20
    max_burst_length_bytes: int = 1 << 20
    first_burst_length_bytes: int = 1 << 18
    max_outstanding_r2t: int = 8


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The RAM block cache. Sizes in bytes, times in seconds."""

    mode: CacheMode = CacheMode.WRITEBACK
    size_bytes: int = 256 << 20
    dirty_max_bytes: int = 128 << 20
    dirty_age_s: float = 5.0
    readahead: Literal["auto", "off"] | int = "auto"
    """`auto`, `off`, or the largest window in bytes."""
    log_dir: str | None = None
    """Absolute; of the persistent logs, a folder in it for each LUN."""
    log_bytes: int = 1 << 30
    destage: Destage = Destage.ORDERED
    key_file: str | None = None
    """Absolute; where `key` comes from."""
    key: Secret | None = None
    """Seals what is on the local disk; bytes that are no UTF-8 are surrogates in it."""
    log_force: bool = False
    """Replay a log that is damaged, as far as it goes, or that may be out of date."""

    @property
    def passphrase(self) -> bytes | None:
        """What the key is made of; None: nothing is sealed."""
        return None if self.key is None else passphrase(self.key)

    @property
    def survives_the_process(self) -> bool:
        """Whether nothing that was acknowledged is lost with this process."""
        return self.mode is not CacheMode.WRITEBACK


class FuseConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the file system appears."""

    read_only: bool = False
    allow_other: bool = False
    uid: int | None = None
    gid: int | None = None
    mode: int = 0o600
    hide_control: bool = False


class MultipathConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Further paths to the same LUNs, and how to choose among them."""

    portals: tuple[str, ...] = ()
    """`host[:port]` of each further portal."""
    all_portals: bool = False
    """Every portal that discovery names is a path."""
    binds: tuple[str, ...] = ()
    """Source addresses or interfaces: with more than one, each makes a path of its own."""
    policy: PathPolicy = PathPolicy.SERVICE_TIME
    failback_s: float | None = 0.0
    """How long a better path has to hold before I/O goes back to it; None: only by hand."""

    @property
    def wanted(self) -> bool:
        """Whether more than one path is asked for."""
        return bool(self.portals) or self.all_portals or len(self.binds) > 1


class ReserveConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The guard against a second writer."""

    mode: ReserveMode = ReserveMode.AUTO
    preempt: bool = False
    """Take the reservation from whoever holds it."""


class MountConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one mount needs besides its source and its mount point."""

    session: SessionConfig
    multipath: MultipathConfig = MultipathConfig()
    reserve: ReserveConfig = ReserveConfig()
    cache: CacheConfig = CacheConfig()
    fuse: FuseConfig = FuseConfig()

    @property
    def survives_the_worker(self) -> bool:
        """Whether another process may go on with the mount when this one dies."""
        return self.fuse.read_only or self.cache.survives_the_process

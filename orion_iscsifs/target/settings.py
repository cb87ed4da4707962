"""What the target is told: names, units, credentials, what it offers. Frozen, checked once."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.config import Secret
from orion_iscsifs.target.faults import Faults
from orion_iscsifs.target.login_faults import LoginFaults


@dataclass(frozen=True, slots=True, kw_only=True)
class Chap:
    """`user` and `secret` are what an initiator must prove; the `mutual_` pair proves us to it."""

    user: str
    secret: Secret
    mutual_user: str | None = None
    mutual_secret: Secret | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the server offers and how much it takes on; lengths in bytes, times in seconds."""

    max_recv_data_segment_length: int = 1 << 18
    first_burst_length: int = 1 << 18
    max_burst_length: int = 1 << 20
    max_outstanding_r2t: int = 8
    initial_r2t: bool = False
    immediate_data: bool = True
    digests: bool = False
    """Insist on CRC32C for headers; otherwise, and for data, the initiator's wish decides."""
    command_window: int = 128
    transfer_bytes_max: int = 32 << 20
    """One command moves at most this much."""
    send_queue_bytes_max: int = 16 << 20
    """Above this no further command of the connection is read until the peer has read."""
    login_timeout_s: float = 15.0
    ping_interval_s: float = 30.0
    """An idle connection is pinged; silence for as long again closes it."""
    max_connections: int = 1
    """Connections of one session (MC/S)."""
    error_recovery_level: int = 0
    default_time2wait: int = 0
    default_time2retain: int = 20
    """How long tasks and sessions outlive their connections (RFC 7143 §7.5)."""
    task_reporting: tuple[str, ...] = ()
    """What of TaskReporting is agreed to (§13.23); empty: RFC3720."""
    iscsi_protocol_level: int | None = None
    """2: RFC 7144's task management functions; None: 1."""
    recovery_r2ts: bool = True
    """ErrorRecoveryLevel 1: ask again for lost Data-Out; otherwise fail the write (§7.8)."""
    sequence_timeout_s: float = 3.0
    """ErrorRecoveryLevel 1: a sequence of Data-Out that stands still so long is asked for again."""
    abort_wait_s: float = 3.0
    """Longest wait for what a task management function has to wait for (§4.2.3.3)."""
    write_buffer_bytes_max: int = 256 << 20
    """Of one session; a write beyond it is answered TASK SET FULL."""
    retained_bytes_max: int = 64 << 20
    """Of one session, answers kept to be sent again (ErrorRecoveryLevel 1 and 2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetConfig:
    """One target: its name, its logical units by number, who may use it, how it misbehaves."""

    iqn: str
    units: Mapping[int, BlockDevice]
    chap: Chap | None = None
    faults: Faults = field(default_factory=Faults)
    login_faults: LoginFaults = field(default_factory=LoginFaults)
    initiators: frozenset[str] | None = None
    """Names of the initiators that may log in; None: any."""
    lasting_reservations: bool = True
    """Persistent reservations last through `Running.restart` where the initiator wants that
    (APTPL). They are in memory: a target whose process is restarted must not promise it."""

    def admits(self, initiator_name: str) -> bool:
        return self.initiators is None or initiator_name in self.initiators

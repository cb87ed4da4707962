"""The vocabulary of INTERFACE §5: each option's name, how its text becomes a value, its help.

One word is an `-o` option, a TOML key and a URL query key, so there is one table. What INTERFACE
names but this version lacks is in `LATER`: an error that says so, never accepted and ignored.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from orion_iscsifs.config import values
from orion_iscsifs.config.settings import (
    CONNECTIONS_MAX,
    CacheMode,
    Destage,
    DigestPreference,
    PathPolicy,
    ReserveMode,
)
from orion_iscsifs.config.values import Parser, Value
from orion_iscsifs.errors import UsageError


@dataclass(frozen=True, slots=True)
class Option:
    """`shown` is what follows the name in the help ('' for a flag), `text` the line about it."""

    parse: Parser
    shown: str
    text: str


_DIGEST = values.choice(*DigestPreference)
_DIGEST_WORDS: Final = "CRC: crc32c, none, prefer-crc32c, prefer-none (prefer-none)"

OPTIONS: Final[Mapping[str, Option]] = {
    "ro": Option(values.flag, "", "read-only"),
    "rw": Option(values.flag, "", "read and write (default)"),
    "allow_other": Option(values.flag, "", "let other users in, as far as mode= does"),
    "uid": Option(values.numeric_id, "=N", "owner of the device files (default: you)"),
    "gid": Option(values.numeric_id, "=N", "their group (default: yours)"),
    "mode": Option(values.mode, "=OCTAL", "their permissions (0600)"),
    "hide_control": Option(values.flag, "", "no folder .orion in the mount"),
    "initiator_name": Option(
        values.nonempty,
        "=NAME",
        "who we are (as /etc/iscsi/initiatorname.iscsi says, else made once)",
    ),
    "chap_user": Option(values.nonempty, "=NAME", "log in with CHAP under this name"),
    "chap_secret": Option(values.nonempty, "=SECRET", "seen by others: use chap_secret_file"),
    "chap_secret_file": Option(values.nonempty, "=FILE", "its first line is the CHAP secret"),
    "mutual_user": Option(values.nonempty, "=NAME", "the target has to prove to be this one"),
    "mutual_secret": Option(values.nonempty, "=SECRET", "seen by others: use mutual_secret_file"),
    "mutual_secret_file": Option(values.nonempty, "=FILE", "its first line is the target's secret"),
    "chap_algs": Option(
        values.algorithms, "=A+B", "CHAP algorithms: sha3-256, sha256, sha1, md5 (md5)"
    ),
    "header_digest": Option(_DIGEST, "=WORD", f"header {_DIGEST_WORDS}"),
    "data_digest": Option(_DIGEST, "=WORD", f"data {_DIGEST_WORDS}"),
    "connections": Option(
        values.whole_number(1, CONNECTIONS_MAX), "=N", "TCP connections of the session (1)"
    ),
    "erl": Option(values.whole_number(0, 2), "=N", "highest ErrorRecoveryLevel offered: 0-2 (0)"),
    "tls_ca": Option(values.nonempty, "=FILE", "iscsis://: whom to trust (the system's CAs)"),
    "tls_cert": Option(values.nonempty, "=FILE", "iscsis://: our certificate, if one is wanted"),
    "tls_key": Option(values.nonempty, "=FILE", "iscsis://: its private key (as in tls_cert)"),
    "portals": Option(values.portals, "=H:P+H:P", "further portals: paths to the same LUNs"),
    "paths": Option(values.choice("all"), "=all", "every portal that discovery names is a path"),
    "bind": Option(
        values.binds, "=ADDR|IFACE+…", "source address or interface; several: one path each"
    ),
    "path_policy": Option(
        values.choice(*PathPolicy),
        "=WORD",
        "service-time, queue-length, round-robin, failover (service-time)",
    ),
    "failback": Option(
        values.failback, "=immediate|manual|S", "when I/O goes back to a better path (immediate)"
    ),
    "reserve": Option(
        values.choice(*ReserveMode),
        "=WORD",
        "guard against a second writer: auto, require, off (auto)",
    ),
    "preempt": Option(values.flag, "", "take the reservation from whoever holds it"),
    "queue_depth": Option(values.queue_depth, "=auto|N", "commands in flight per LUN (auto)"),
    "cache": Option(
        values.choice(*CacheMode),
        "=WORD",
        "none, writethrough, writeback, log: when a write is done (writeback)",
    ),
    "cache_size": Option(values.size_bytes, "=SIZE", "RAM block cache (256M)"),
    "dirty_max": Option(values.size_bytes, "=SIZE", "cap on unwritten bytes (half of cache_size)"),
    "dirty_age": Option(values.seconds, "=S", "longest time that a block stays unwritten (5)"),
    "log_dir": Option(values.nonempty, "=DIR", "cache=log: where the persistent logs live"),
    "log_size": Option(values.size_bytes, "=SIZE", "cache=log: of each LUN's log (1G)"),
    "cache_key_file": Option(
        values.nonempty, "=FILE", "what is on the local disk is sealed with the key in it"
    ),
    "destage": Option(
        values.choice(*Destage), "=WORD", "cache=log: ordered by flushes, or fast (ordered)"
    ),
    "readahead": Option(values.readahead, "=auto|off|SIZE", "largest readahead window (auto)"),
    "replacement_timeout": Option(
        values.seconds_or_never,
        "=S",
        "hold I/O so long while the target is away; 0: no, -1: for ever (120)",
    ),
    "login_timeout": Option(values.seconds, "=S", "for connecting and logging in (15)"),
    "noop_interval": Option(values.interval, "=S", "ping a silent target so often; 0: never (5)"),
    "noop_timeout": Option(values.seconds, "=S", "how long a ping may take (5)"),
    "command_timeout": Option(values.seconds, "=S", "how long a command may take (30)"),
    "config": Option(values.nonempty, "=FILE", "further settings, in TOML, of the same words"),
}

SECRET_WORDS: Final = frozenset({"chap_secret", "mutual_secret"})
"""Work, but whoever lists processes or reads fstab sees them: warned about."""

ALIASES: Final[Mapping[str, str]] = {
    "target_user": "mutual_user",  # libiscsi's words in a URL
    "target_password": "mutual_secret",
}

LATER: Final[Mapping[str, str]] = {
    "tier_dir": "the local read tier",
    "tier_size": "the local read tier",
    "tier_level": "the local read tier",
    "tier_reuse": "the local read tier",
    "luks_key_file": "LUKS volumes",
    "metrics_listen": "the metrics endpoint",
    "audit_log": "the audit log",
}

GENERIC: Final = frozenset(
    # What mount(8), fstab and mount.fuse3 add by themselves. Access times, suid and device files
    # do not exist here, so each of these is obeyed as it stands.
    [
        "defaults",
        "_netdev",
        "nofail",
        "noauto",
        "auto",
        "user",
        "nouser",
        "users",
        "owner",
        "group",
        "comment",
        "dev",
        "nodev",
        "suid",
        "nosuid",
        "exec",
        "noexec",
        "async",
        "atime",
        "noatime",
        "diratime",
        "nodiratime",
        "relatime",
        "norelatime",
        "strictatime",
        "nostrictatime",
        "lazytime",
        "nolazytime",
        "silent",
        "loud",
    ]
)


def is_generic(name: str) -> bool:
    """Whether mount(8) owns this word, so that it is accepted and ignored."""
    return name in GENERIC or name.startswith(("x-", "X-"))


def help_lines() -> Iterator[tuple[str, str]]:
    """`name=VALUE` and one line about it, for every option that should be used."""
    for name, option in OPTIONS.items():
        if name not in SECRET_WORDS:
            yield name + option.shown, option.text


def parse_value(name: str, text: str) -> tuple[str, Value]:
    """The option's own name (aliases resolved) and its value; `UsageError` for all else."""
    name = ALIASES.get(name, name)
    option = OPTIONS.get(name)
    if option is None:
        raise _unknown(name)
    try:
        return name, option.parse(text)
    except ValueError as error:
        shown = name if name in SECRET_WORDS or not text else f"{name}={text}"
        raise UsageError(f"option {_one_line(shown)}: {error}") from None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _unknown(name: str) -> UsageError:
    if name in LATER:
        return UsageError(
            f"option {name}: {LATER[name]}: not in this version", advice="leave the option out"
        )
    known = sorted({*OPTIONS, *LATER, *GENERIC} - SECRET_WORDS)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    advice = f"did you mean {near[0]}?" if near else "`orion-iscsifs mount --help` lists them"
    return UsageError(f"option {_one_line(name)}: unknown option", advice=advice)

"""The vocabulary of INTERFACE §5: each option's name, and how its text becomes a value.

One word is an `-o` option, a TOML key and a URL query key, so there is one table. What INTERFACE
names but this version lacks is in `LATER`: an error that says so, never accepted and ignored.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Final

from orion_iscsifs.config.settings import CacheMode, ChapAlgorithm, DigestPreference
from orion_iscsifs.errors import UsageError

Value = bool | int | float | str | tuple[ChapAlgorithm, ...] | None
Parser = Callable[[str], Value]
"""Raises ValueError with the words that follow "option x=y: "."""

SIZE_BYTES_MAX: Final = 1 << 50
QUEUE_DEPTH_MAX: Final = 4096
_SUFFIX_SHIFT: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_ALGORITHMS: Final = {
    "sha3-256": ChapAlgorithm.SHA3_256,
    "sha256": ChapAlgorithm.SHA256,
    "sha1": ChapAlgorithm.SHA1,
    "md5": ChapAlgorithm.MD5,
}


def size_bytes(text: str) -> int:
    """`64K`, `1.5G`, `4096`: a positive number of bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)", text.strip().upper(), re.ASCII)
    if match is None:
        raise ValueError("is no size: a number with K, M, G or T")
    size = int(float(match[1]) * (1 << _SUFFIX_SHIFT[match[2]]))
    if not 0 < size <= SIZE_BYTES_MAX:
        raise ValueError("is out of range for a size")
    return size


def _number(text: str, why: str) -> float:
    if re.fullmatch(r"-?[0-9]{1,9}(?:\.[0-9]{1,6})?", text.strip(), re.ASCII) is None:
        raise ValueError(why)
    return float(text)


def _seconds(text: str) -> float:
    value = _number(text, "is no number of seconds")
    if value <= 0:
        raise ValueError("must be more than 0 seconds")
    return value


def _seconds_or_never(text: str) -> float:
    value = _number(text, "is no number of seconds")
    if value < 0 and value != -1:
        raise ValueError("must be 0 or more seconds, or -1 for ever")
    return value


def _interval(text: str) -> float:
    value = _number(text, "is no number of seconds")
    if value < 0:
        raise ValueError("must be 0 (never) or more seconds")
    return value


def _flag(text: str) -> bool:
    if text.lower() in {"", "1", "true", "yes", "on"}:
        return True
    if text.lower() in {"0", "false", "no", "off"}:
        return False
    raise ValueError("takes no value")


def _text(text: str) -> str:
    if not text:
        raise ValueError("needs a value")
    return text


def _id(text: str) -> int:
    if re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) is None or int(text) > 0xFFFFFFFE:
        raise ValueError("is no numeric id")
    return int(text)


def _mode(text: str) -> int:
    if re.fullmatch(r"0?[0-7]{3}", text, re.ASCII) is None:
        raise ValueError("is no file mode: three octal digits, 0600 for one")
    return int(text, 8)


def _choice(*words: str) -> Parser:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"is unknown: {', '.join(words)}")
        return text

    return parse


def _cache(text: str) -> str:
    if text == "log":
        raise ValueError("is not in this version: none, writethrough, writeback")
    _choice(*CacheMode)(text)
    return text


def _only(value: str, why: str) -> Parser:
    def parse(text: str) -> int:
        if text.strip() != value:
            raise ValueError(why)
        return int(value)

    return parse


def _queue_depth(text: str) -> int | None:
    if text == "auto":
        return None
    if re.fullmatch(r"[0-9]{1,6}", text, re.ASCII) and 1 <= int(text) <= QUEUE_DEPTH_MAX:
        return int(text)
    raise ValueError(f"is neither auto nor a number from 1 to {QUEUE_DEPTH_MAX}")


def _readahead(text: str) -> str | int:
    return text if text in {"auto", "off"} else size_bytes(text)


def _algorithms(text: str) -> tuple[ChapAlgorithm, ...]:
    """`sha256+md5` or `sha256:md5`: a comma would end an `-o` option."""
    names = [name for name in re.split(r"[+:,\s]+", text.strip().lower()) if name]
    unknown = [name for name in names if name not in _ALGORITHMS]
    if unknown or not names:
        raise ValueError(f"is unknown: {', '.join(_ALGORITHMS)}, joined with '+'")
    return tuple(dict.fromkeys(_ALGORITHMS[name] for name in names))


_DIGEST = _choice(*DigestPreference)

OPTIONS: Final[Mapping[str, Parser]] = {
    "ro": _flag,
    "rw": _flag,
    "allow_other": _flag,
    "uid": _id,
    "gid": _id,
    "mode": _mode,
    "hide_control": _flag,
    "initiator_name": _text,
    "chap_user": _text,
    "chap_secret": _text,
    "chap_secret_file": _text,
    "mutual_user": _text,
    "mutual_secret": _text,
    "mutual_secret_file": _text,
    "chap_algs": _algorithms,
    "header_digest": _DIGEST,
    "data_digest": _DIGEST,
    "connections": _only("1", "is not in this version: a session has 1 connection"),
    "erl": _only("0", "is not in this version: ErrorRecoveryLevel is 0"),
    "queue_depth": _queue_depth,
    "cache": _cache,
    "cache_size": size_bytes,
    "dirty_max": size_bytes,
    "dirty_age": _seconds,
    "readahead": _readahead,
    "replacement_timeout": _seconds_or_never,
    "login_timeout": _seconds,
    "noop_interval": _interval,
    "noop_timeout": _seconds,
    "command_timeout": _seconds,
    "config": _text,
}

SECRET_WORDS: Final = frozenset({"chap_secret", "mutual_secret"})
"""Work, but whoever lists processes or reads fstab sees them: warned about."""

ALIASES: Final[Mapping[str, str]] = {
    "target_user": "mutual_user",  # libiscsi's words in a URL
    "target_password": "mutual_secret",
}

LATER: Final[Mapping[str, str]] = {
    "portals": "several paths",
    "paths": "several paths",
    "bind": "source addresses",
    "path_policy": "several paths",
    "failback": "several paths",
    "log_dir": "the persistent write log",
    "log_size": "the persistent write log",
    "destage": "the persistent write log",
    "tier_dir": "the local read tier",
    "tier_size": "the local read tier",
    "tier_level": "the local read tier",
    "tier_reuse": "the local read tier",
    "cache_key_file": "sealing of local data",
    "reserve": "persistent reservations",
    "preempt": "persistent reservations",
    "luks_key_file": "LUKS volumes",
    "tls_ca": "TLS",
    "tls_cert": "TLS",
    "tls_key": "TLS",
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


def parse_value(name: str, text: str) -> tuple[str, Value]:
    """The option's own name (aliases resolved) and its value; `UsageError` for all else."""
    name = ALIASES.get(name, name)
    parser = OPTIONS.get(name)
    if parser is None:
        raise _unknown(name)
    try:
        return name, parser(text)
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
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]}?" if near else "the manual lists the options"
    return UsageError(f"option {_one_line(name)}: unknown option", advice=advice)

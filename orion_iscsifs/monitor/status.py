"""The status document of INTERFACE §7. A number that nobody knows is null, never made up."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

VERSION: Final = 1

Status = dict[str, Any]

LUN_KEYS: Final = (
    "name",
    "lun",
    "target",
    "size_bytes",
    "block_size",
    "read_only",
    "cache",
    "dirty_bytes",
    "oldest_dirty_age_s",
    "log",
    "tier",
    "cache_hits",
    "cache_misses",
    "readahead_bytes",
    "readahead_hit_bytes",
    "readahead_waste_bytes",
    "readahead_window_bytes",
    "round_trip_us",
    "bandwidth_bytes_per_s",
    "reservation",
    "reads",
    "writes",
    "flushes",
    "errors",
)
SESSION_KEYS: Final = (
    "target",
    "isid",
    "tsih",
    "state",
    "error_recovery_level",
    "parameters",
    "connections",
    "counters",
    "last_error",
)
PATH_KEYS: Final = ("lun", "portal", "state", "alua", "in_flight", "latency_us")
_SEVERITY: Final = {"logged-in": 0, "recovering": 1, "failed": 2}


def mount_status(
    *,
    mountpoint: str,
    source: str,
    pid: int | None,
    state: str | None,
    stack: Mapping[str, Any],
    kernel: Mapping[str, object] | None = None,
    hardening: Mapping[str, object] | None = None,
    supervisor_pid: int | None = None,
    takeovers: int | None = None,
) -> Status:
    """One entry of `mounts`. `state` None: what the stack says. `source` is redacted."""
    sessions = [_complete(session, SESSION_KEYS) for session in stack.get("sessions", ())]
    return {
        "mountpoint": mountpoint,
        "source": source,
        "pid": pid,
        "supervisor_pid": supervisor_pid,
        "takeovers": takeovers,
        "state": state or stack.get("state") or _state(sessions),
        "luns": [_complete(lun, LUN_KEYS) for lun in stack.get("luns", ())],
        "sessions": sessions,
        "paths": [_complete(path, PATH_KEYS) for path in stack.get("paths", ())],
        "kernel": dict(kernel or {}),
        "hardening": dict(hardening or {}),
    }


def document(mounts: Sequence[Status]) -> Status:
    """What `status --json` prints and `.orion/status.json` holds."""
    return {"version": VERSION, "mounts": list(mounts)}


def dirty_bytes(mount: Mapping[str, Any]) -> int:
    """Un-written bytes of all LUNs, as far as known."""
    return sum(lun.get("dirty_bytes") or 0 for lun in mount.get("luns", ()))


def _complete(part: Mapping[str, Any], keys: Sequence[str]) -> Status:
    return {**dict.fromkeys(keys), **part}


def _state(sessions: Sequence[Mapping[str, Any]]) -> str:
    """`ok`, or `recovering`/`failed` if all sessions are, or `degraded` if only some are."""
    levels = [_SEVERITY.get(str(session["state"]), 1) for session in sessions]
    if not levels or max(levels) == 0:
        return "ok"
    if min(levels) == 0:
        return "degraded"
    return "failed" if min(levels) == 2 else "recovering"

"""What `status --json` shows of the data path (INTERFACE §7)."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Final

from orion_iscsifs.cache.writeback import WritebackCache
from orion_iscsifs.cache.writelog import WriteLog
from orion_iscsifs.config import CacheMode
from orion_iscsifs.initiator.connection import Connection
from orion_iscsifs.initiator.outage import State
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.multipath.paths import path_status
from orion_iscsifs.stack.unit import Unit
from orion_iscsifs.stack.ways import Ways

_SEVERITY: Final = {State.LOGGED_IN: 0, State.RECOVERING: 1, State.FAILED: 2, State.CLOSED: 2}
_STATES: Final = ("ok", "recovering", "failed")


def state(units: Iterable[Unit], sessions: Iterable[Session], ways: Iterable[Ways]) -> str:
    """Of the whole mount. What has several paths works as long as one of them does."""
    devices = [unit.paths.device for unit in units if unit.paths is not None]
    levels = [_SEVERITY[session.state] for session in sessions if not session.is_one_of_several]
    levels += [0 if device.has_path else 1 if device.is_held else 2 for device in devices]
    if levels and min(levels) > 0:
        return _STATES[min(levels)]
    lost = any(device.is_degraded for device in devices) or any(one.missing for one in ways)
    return "degraded" if lost or any(levels) else "ok"


def paths(unit: Unit, ways: Iterable[Ways]) -> list[dict[str, Any]]:
    """Of one LUN: the ways to its target that have never been open are failed paths, too."""
    if unit.paths is None:
        return [_only_path(unit)]
    missing = [
        path_status(name, "failed", last_error=error)
        for one in ways
        if one.target_name == unit.target_name
        for name, error in one.missing.items()
    ]
    return [{"lun": unit.path, **path} for path in (*unit.paths.status(), *missing)]


def _only_path(unit: Unit) -> dict[str, Any]:
    session = unit.disk.session
    up = session.state is State.LOGGED_IN and not unit.disk.is_refused
    name, state = str(session.portal), "active" if up else "failed"
    error = str(session.last_error) if session.last_error else None
    return {"lun": unit.path, **path_status(name, state, last_error=error)}


def lun(unit: Unit, mode: CacheMode) -> dict[str, Any]:
    geometry = unit.top.geometry
    statistics = unit.cache.statistics if unit.cache is not None else None
    return {
        "name": unit.path,
        "lun": unit.number,
        "target": unit.target_name,
        "size_bytes": geometry.size_bytes,
        "block_size": geometry.logical_block_bytes,
        "read_only": geometry.read_only,
        "cache": mode.value,
        "dirty_bytes": unit.dirty_bytes,
        "oldest_dirty_age_s": unit.oldest_dirty_age_s,
        "log": None if unit.log is None else log_status(unit.log),
        "tier": None,
        "cache_hits": statistics.hits if statistics else 0,
        "cache_misses": statistics.misses if statistics else 0,
        **_readahead(unit.cache),
        "reservation": unit.exclusive.status() if unit.exclusive is not None else None,
    }


def log_status(log: WriteLog) -> dict[str, Any]:
    block = log.store.superblock
    return {
        "dir": str(log.store.folder),
        "size_bytes": block.segments * block.segment_bytes,
        "used_bytes": log.store.used_bytes,
        "state": log.state,
        "sealed": block.sealing is not None,
    }


def _readahead(cache: WritebackCache | None) -> dict[str, Any]:
    if cache is None:
        return {}
    statistics, link = cache.statistics, cache.link
    round_trip_s = link.round_trip_s
    return {
        "readahead_bytes": statistics.readahead_bytes,
        "readahead_hit_bytes": statistics.readahead_hit_bytes,
        "readahead_waste_bytes": statistics.readahead_waste_bytes,
        "readahead_window_bytes": link.window_bytes,
        "round_trip_us": None if round_trip_s is None else round(round_trip_s * 1e6),
        "bandwidth_bytes_per_s": _rounded(link.bandwidth_bytes_per_s),
    }


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


def session(session: Session) -> dict[str, Any]:
    return {
        "target": session.nexus.target_name,
        "isid": session.nexus.isid.hex(),
        "tsih": session.tsih,
        "state": session.state.value,
        "error_recovery_level": session.parameters.error_recovery_level,
        "parameters": dataclasses.asdict(session.parameters),
        "connections": [_connection_status(one) for one in session.connections]
        or [_no_connection(session)],
        "counters": dataclasses.asdict(session.counters),
        "last_error": str(session.last_error) if session.last_error else None,
    }


def _connection_status(connection: Connection) -> dict[str, Any]:
    return {
        "cid": connection.cid,
        "portal": str(connection.portal),
        "local": connection.local,
        "state": connection.state.name.lower().replace("_", "-"),
        "header_digest": _digest(connection.parameters.header_digest),
        "data_digest": _digest(connection.parameters.data_digest),
        "in_flight": len(connection.tasks),
    }


def _no_connection(session: Session) -> dict[str, Any]:
    return {
        "cid": 0,
        "portal": str(session.portal),
        "local": None,
        "state": "failed",
        "header_digest": _digest(session.parameters.header_digest),
        "data_digest": _digest(session.parameters.data_digest),
        "in_flight": 0,
    }


def _digest(used: bool) -> str:
    return "CRC32C" if used else "None"

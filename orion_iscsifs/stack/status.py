"""What `status --json` shows of the data path (INTERFACE §7)."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from orion_iscsifs.config import CacheMode
from orion_iscsifs.initiator.connection import Connection
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.stack.unit import Unit


def state(sessions: Iterable[Session]) -> str:
    """Of the whole mount."""
    states = {session.state.value for session in sessions}
    return "failed" if "failed" in states else "recovering" if "recovering" in states else "ok"


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
        "dirty_bytes": statistics.dirty_bytes if statistics else 0,
        "oldest_dirty_age_s": unit.cache.oldest_dirty_age_s if unit.cache is not None else None,
        "log": None,
        "tier": None,
        "cache_hits": statistics.hits if statistics else 0,
        "cache_misses": statistics.misses if statistics else 0,
        "reservation": unit.exclusive.status() if unit.exclusive is not None else None,
    }


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

"""The whole data path of a mount, from the session at the bottom to the device files at the top.

    AlignedDevice         byte ranges → logical blocks
      WritebackCache      RAM block cache (not with cache=none)
        LunDevice         SCSI commands, one logical unit
          Session         iSCSI to one target

`open_stack` nests the lifetimes: when it ends, caches are flushed first, then sessions log out.
"""

import dataclasses
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.cache.writeback import WritebackCache
from orion_iscsifs.config import AuthConfig, CacheConfig, CacheMode, MountConfig
from orion_iscsifs.config.places import create_private, state_dir
from orion_iscsifs.errors import (
    DeviceError,
    LunNotFound,
    NotADisk,
    OrionError,
    TargetNotFound,
)
from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.initiator.connection import Connection
from orion_iscsifs.initiator.dial import Nexus, Portal
from orion_iscsifs.initiator.discovery import DiscoveredTarget, discover
from orion_iscsifs.initiator.identity import hold_isid
from orion_iscsifs.initiator.lun import LunDevice
from orion_iscsifs.initiator.probe import report_luns
from orion_iscsifs.initiator.reach import Attempts
from orion_iscsifs.initiator.session import Session, open_session
from orion_iscsifs.protocol.login import Credentials
from orion_iscsifs.url import Source

log = logging.getLogger(__name__)


@dataclass(slots=True)
class OpenLun:
    """One device file and the layers behind it, for `Stack.status`."""

    path: str
    number: int
    session: Session
    lun: LunDevice
    cache: WritebackCache | None
    top: BlockDevice


@dataclass(slots=True)
class Stack:
    """Every device of a mount."""

    cache_mode: CacheMode
    luns: list[OpenLun] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)

    @property
    def files(self) -> dict[str, BlockDevice]:
        """Relative path of each device file (INTERFACE §3) and its top layer."""
        return {lun.path: lun.top for lun in self.luns}

    def status(self) -> dict[str, Any]:
        """The parts of INTERFACE §7 that the data path knows."""
        states = {session.state.value for session in self.sessions}
        state = "failed" if "failed" in states else "recovering" if "recovering" in states else "ok"
        return {
            "state": state,
            "luns": [_lun_status(lun, self.cache_mode) for lun in self.luns],
            "sessions": [_session_status(session) for session in self.sessions],
        }


@asynccontextmanager
async def open_stack(source: Source, config: MountConfig) -> AsyncIterator[Stack]:
    """Log in and open every LUN that `source` names; flush and log out when the body ends.

    Raises an OrionError (connection, login, LUN) with nothing left open.
    """
    stack = Stack(config.cache.mode)
    _warn_of_weak_secrets(config.session.auth)
    async with AsyncExitStack() as lifetimes:
        asked = Portal(source.host, source.port)
        if source.target is not None:
            await _open_target(lifetimes, stack, asked, source.target, source.lun, "", config)
        else:
            for target in await _discover(asked, config):
                await _open_listed(lifetimes, stack, asked, target, config)
            if not stack.luns:
                raise LunNotFound(
                    f"{asked}: no target of the portal has a disk LUN",
                    advice="check which LUNs the targets show to this initiator name",
                )
        yield stack


def _warn_of_weak_secrets(auth: AuthConfig) -> None:
    for option, chap in (("chap_user", auth.initiator), ("mutual_user", auth.target)):
        if chap is None:
            continue
        if Credentials(user=chap.user, secret=chap.secret.reveal().encode()).is_weak:
            log.warning(
                "the secret of %s=%s is shorter than 96 bits: it can be guessed from one"
                " recorded login (RFC 7143 §9.2.1)",
                option,
                chap.user,
            )


async def _discover(asked: Portal, config: MountConfig) -> list[DiscoveredTarget]:
    """Every target of the portal."""
    with hold_isid(create_private(state_dir()), "discovery") as isid:
        targets = await discover(asked, config.session, isid)
    if not targets:
        raise TargetNotFound(
            f"{asked}: the portal lists no targets",
            advice="check the target's access rules for this initiator name",
        )
    return targets


async def _open_listed(
    lifetimes: AsyncExitStack,
    stack: Stack,
    asked: Portal,
    target: DiscoveredTarget,
    config: MountConfig,
) -> None:
    """One target that discovery found; one without a disk has no folder in the mount.

    Its portals are tried in turn (`initiator.portals` has the order, and why).
    """
    attempts = Attempts(target, asked, config.session)
    while (portal := await attempts.next()) is not None:
        try:
            async with AsyncExitStack() as attempt:
                prefix = f"{target.name}/"
                await _open_target(attempt, stack, portal, target.name, None, prefix, config)
                lifetimes.push_async_exit(attempt.pop_all())
                return
        except LunNotFound as error:
            log.warning("%s", error)
            return
        except OrionError as error:
            attempts.failed(portal, error)
            log.info("%s: %s", portal, error)
    raise attempts.verdict()


async def _open_target(
    lifetimes: AsyncExitStack,
    stack: Stack,
    portal: Portal,
    name: str,
    lun: int | None,
    prefix: str,
    config: MountConfig,
) -> None:
    isid = lifetimes.enter_context(hold_isid(create_private(state_dir()), name))
    nexus = Nexus(target_name=name, isid=isid, config=config.session)
    session = await lifetimes.enter_async_context(open_session(portal, nexus))
    devices = await _open_disks(session, lun, read_only=config.fuse.read_only)
    stack.sessions.append(session)
    for number, device in devices.items():
        layers = await _stack_layers(lifetimes, device, config.cache)
        path = f"{prefix}lun{number}"
        stack.luns.append(OpenLun(path, number, session, device, *layers))


async def _stack_layers(
    lifetimes: AsyncExitStack, lun: LunDevice, config: CacheConfig
) -> tuple[WritebackCache | None, BlockDevice]:
    """The layers on top of one LUN, bottom first."""
    if config.mode is CacheMode.NONE:
        return None, AlignedDevice(lun)
    cache = await lifetimes.enter_async_context(WritebackCache(lun, config))
    return cache, AlignedDevice(cache)


async def _open_disks(
    session: Session, lun: int | None, *, read_only: bool
) -> dict[int, LunDevice]:
    """The named LUN, or every disk of the target: controllers and the like are passed over."""
    if lun is not None:
        return {lun: await LunDevice.open(session, lun, read_only=read_only)}
    disks: dict[int, LunDevice] = {}
    for number in sorted(await report_luns(LogicalUnit(session, 0))):
        try:
            disks[number] = await LunDevice.open(session, number, read_only=read_only)
        except NotADisk as error:
            log.info("%s", error)
        except DeviceError as error:
            log.warning("LUN %d is left out: %s", number, error)
    if not disks:
        raise LunNotFound(
            f"{session.nexus.target_name}: the target has no disk LUN",
            advice="check which LUNs the target shows to this initiator name",
        )
    return disks


def _lun_status(lun: OpenLun, mode: CacheMode) -> dict[str, Any]:
    geometry = lun.lun.geometry
    statistics = lun.cache.statistics if lun.cache is not None else None
    return {
        "name": lun.path,
        "lun": lun.number,
        "target": lun.session.nexus.target_name,
        "size_bytes": geometry.size_bytes,
        "block_size": geometry.logical_block_bytes,
        "read_only": geometry.read_only,
        "cache": mode.value,
        "dirty_bytes": statistics.dirty_bytes if statistics else 0,
        "oldest_dirty_age_s": lun.cache.oldest_dirty_age_s if lun.cache is not None else None,
        "log": None,
        "tier": None,
        "cache_hits": statistics.hits if statistics else 0,
        "cache_misses": statistics.misses if statistics else 0,
        "reservation": None,
    }


def _session_status(session: Session) -> dict[str, Any]:
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

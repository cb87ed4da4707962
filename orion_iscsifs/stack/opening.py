"""Opening a mount: which targets and portals there are, and in which order they are tried."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from orion_iscsifs.config import AuthConfig, MountConfig
from orion_iscsifs.config.places import create_private, state_dir
from orion_iscsifs.errors import LunNotFound, OrionError, TargetNotFound
from orion_iscsifs.initiator.dial import Portal
from orion_iscsifs.initiator.discovery import DiscoveredTarget, discover
from orion_iscsifs.initiator.identity import hold_isid
from orion_iscsifs.initiator.reach import Attempts
from orion_iscsifs.protocol.login import Credentials
from orion_iscsifs.stack.lifetime import House, open_house
from orion_iscsifs.stack.mounted import Stack
from orion_iscsifs.stack.target import Target
from orion_iscsifs.url import Source, parse_portal

log = logging.getLogger(__name__)


@asynccontextmanager
async def open_stack(
    source: Source, config: MountConfig, mountpoint: str = ""
) -> AsyncIterator[Stack]:
    """Log in and open every LUN that `source` names; flush and log out when the body ends.

    `mountpoint` is what others are told who find a LUN in use. Raises BusyError for such a LUN.
    Raises an OrionError (connection, login, LUN) with nothing left open. A body that is cancelled
    is not flushed after: it had its chance.
    """
    _warn_of_weak_secrets(config.session.auth)
    stack = Stack(config, mountpoint)
    async with open_house() as house:
        targets = await _open_targets(source, config, stack, house)
        try:
            yield stack
        except Exception:
            await _close_quietly(targets)
            raise
        await _close(targets)


async def _close(targets: list[Target]) -> None:
    """Every one of them; the first error is raised."""
    errors: list[OrionError] = []
    for target in targets:
        try:
            await target.close()
        except OrionError as error:
            errors.append(error)
    if errors:
        raise errors[0]


async def _close_quietly(targets: list[Target]) -> None:
    """After an error of the body, which is the one to be raised."""
    try:
        await _close(targets)
    except OrionError as error:
        log.warning("%s", error)


async def _open_targets(
    source: Source, config: MountConfig, stack: Stack, house: House
) -> list[Target]:
    asked = Portal(source.host, source.port)
    if source.target is not None:
        target = Target(stack, house, source.target, lun=source.lun, prefix="", config=config)
        if not config.multipath.wanted:
            await target.open(asked)
        else:
            await target.open_ways(await _portals(source.target, asked, config))
        return [target]
    targets: list[Target] = []
    for found in await _discover(asked, config):
        target = Target(stack, house, found.name, lun=None, prefix=f"{found.name}/", config=config)
        if await _open_listed(target, found, asked, config):
            targets.append(target)
    if not targets:
        raise LunNotFound(
            f"{asked}: no target of the portal has a disk LUN",
            advice="check which LUNs the targets show to this initiator name",
        )
    return targets


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
    target: Target, found: DiscoveredTarget, asked: Portal, config: MountConfig
) -> bool:
    """One target that discovery found; False: it has no disk, and so no folder in the mount.

    Its portals are tried in turn (`initiator.portals` has the order, and why).
    """
    if config.multipath.wanted:
        return await _open_all_ways(target, found, asked, config)
    attempts = Attempts(found, asked, config.session)
    while (portal := await attempts.next()) is not None:
        try:
            await target.open(portal)
        except LunNotFound as error:
            log.warning("%s", error)
            return False
        except OrionError as error:
            attempts.failed(portal, error)
            log.info("%s: %s", portal, error)
        else:
            return True
    raise attempts.verdict()


# -- several paths ---------------------------------------------------------------------------------


async def _portals(target_name: str, asked: Portal, config: MountConfig) -> list[Portal]:
    """Of a target that is named: the portals that are named, or with `paths=all` all it has."""
    if not config.multipath.all_portals:
        return _named(asked, config)
    for found in await _discover(asked, config):
        if found.name == target_name:
            return list(found.portals)
    raise TargetNotFound(
        f"{asked}: the portal does not list {target_name}",
        advice="`orion-iscsifs discover` shows what it lists",
    )


def _named(asked: Portal, config: MountConfig) -> list[Portal]:
    """The portal of the source, and those of `portals=`."""
    further = (parse_portal(text) for text in config.multipath.portals)
    return list(dict.fromkeys([asked, *(Portal(one.host, one.port) for one in further)]))


async def _open_all_ways(
    target: Target, found: DiscoveredTarget, asked: Portal, config: MountConfig
) -> bool:
    """As `_open_listed`: of a target that discovery found."""
    every = config.multipath.all_portals
    try:
        await target.open_ways(list(found.portals) if every else _named(asked, config))
    except LunNotFound as error:
        log.warning("%s", error)
        return False
    return True

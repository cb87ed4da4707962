"""What is behind each discovered target: log in, list the LUNs, ask each what it is, log out.

For `discover --luns`. It disturbs nobody: it holds an ISID of its own for each target, only reads,
and every failure stays with the target or the LUN where it happened.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final, TypeVar

import msgspec
import trio

from orion_iscsifs.config import SessionConfig
from orion_iscsifs.errors import OrionError
from orion_iscsifs.initiator.commands import LogicalUnit
from orion_iscsifs.initiator.dial import Nexus, Portal
from orion_iscsifs.initiator.portals import DiscoveredTarget
from orion_iscsifs.initiator.probe import read_capacity, report_luns
from orion_iscsifs.initiator.reach import Attempts
from orion_iscsifs.initiator.session import Session, open_session
from orion_iscsifs.scsi import cdb, inquiry
from orion_iscsifs.scsi.inquiry import DeviceType, StandardInquiry

_TARGETS_AT_ONCE_MAX: Final = 8
_LUNS_AT_ONCE_MAX: Final = 8
_INQUIRY_BYTES: Final = 255
_KINDS: Final[Mapping[int, str]] = {
    DeviceType.DISK: "disk",
    DeviceType.SIMPLIFIED_DISK: "disk",
    DeviceType.TAPE: "tape",
    DeviceType.CD_DVD: "cd/dvd",
    DeviceType.MEDIUM_CHANGER: "medium changer",
    DeviceType.STORAGE_ARRAY_CONTROLLER: "controller",
    DeviceType.ENCLOSURE: "enclosure",
    DeviceType.HOST_MANAGED_ZONED: "zoned disk",
    DeviceType.WELL_KNOWN_LOGICAL_UNIT: "well-known unit",
}

_T = TypeVar("_T")
_R = TypeVar("_R")

HoldIsid = Callable[[str], AbstractContextManager[bytes]]
"""An ISID for a session to the target of this name, ours while the context lasts."""


@dataclass(slots=True)
class LunReport:
    """One LUN. What is not known is None; `error` says why."""

    number: int
    kind: str = "unknown"
    vendor: str = ""
    product: str = ""
    revision: str = ""
    size_bytes: int | None = None
    block_bytes: int | None = None
    error: OrionError | None = None


@dataclass(slots=True)
class TargetReport:
    """One target: the portal that took the login and its LUNs, or why there are none."""

    target: DiscoveredTarget
    portal: Portal | None = None
    luns: list[LunReport] = field(default_factory=list)
    error: OrionError | None = None


async def survey(
    targets: Iterable[DiscoveredTarget], dialled: Portal, config: SessionConfig, hold: HoldIsid
) -> list[TargetReport]:
    """A report for each target, in their order. Raises nothing that concerns one target."""
    # A target that goes away meanwhile is not waited for as a mount would wait.
    patience_s = config.login_timeout_s
    config = msgspec.structs.replace(config, replacement_timeout_s=patience_s)

    async def look(target: DiscoveredTarget) -> TargetReport:
        report = TargetReport(target)
        try:
            await _look(report, dialled, config, hold)
        except OrionError as error:
            report.error = error
        return report

    return await _each(targets, look, _TARGETS_AT_ONCE_MAX)


async def _look(
    report: TargetReport, dialled: Portal, config: SessionConfig, hold: HoldIsid
) -> None:
    name = report.target.name
    attempts = Attempts(report.target, dialled, config)
    with hold(name) as isid:
        nexus = Nexus(target_name=name, isid=isid, config=config)
        while (portal := await attempts.next()) is not None:
            try:
                async with open_session(portal, nexus) as session:
                    report.portal = portal
                    report.luns = await _luns(session)
            except OrionError as error:
                if report.portal is not None:
                    raise
                attempts.failed(portal, error)
            else:
                return
    raise attempts.verdict()


async def _luns(session: Session) -> list[LunReport]:
    numbers = sorted(set(await report_luns(LogicalUnit(session, 0))))

    async def look(number: int) -> LunReport:
        return await _lun(LogicalUnit(session, number))

    return await _each(numbers, look, _LUNS_AT_ONCE_MAX)


async def _lun(unit: LogicalUnit) -> LunReport:
    report = LunReport(unit.number)
    try:
        buffer = bytearray(_INQUIRY_BYTES)
        command = cdb.inquiry(None, _INQUIRY_BYTES)
        count = await unit.read("INQUIRY", command, memoryview(buffer))
        identity = inquiry.decode_inquiry(bytes(buffer[:count]))
        report.kind = _kind(identity)
        report.vendor, report.product = identity.vendor, identity.product
        report.revision = identity.revision
        if identity.is_disk:
            capacity = await read_capacity(unit)
            report.size_bytes = capacity.size_bytes
            report.block_bytes = capacity.block_bytes
    except OrionError as error:
        report.error = error
    return report


def _kind(identity: StandardInquiry) -> str:
    if identity.qualifier != inquiry.QUALIFIER_CONNECTED:
        return "absent"
    return _KINDS.get(identity.device_type, f"type {identity.device_type:#04x}")


async def _each(
    items: Iterable[_T], work: Callable[[_T], Awaitable[_R]], at_once_max: int
) -> list[_R]:
    """`work` for every item, so many at once; the results in the items' order."""
    limit = trio.CapacityLimiter(at_once_max)
    results: dict[int, _R] = {}

    async def run(place: int, item: _T) -> None:
        async with limit:
            results[place] = await work(item)

    async with trio.open_nursery() as nursery:
        for place, item in enumerate(items):
            nursery.start_soon(run, place, item)
    return [results[place] for place in sorted(results)]

"""What outlives a connection: targets, their sessions, and figures about both."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.protocol.login import LoginStatus, TargetLogin, status_error
from orion_iscsifs.scsi.sense import SenseData
from orion_iscsifs.target.access import STATE_CHANGED, Access
from orion_iscsifs.target.settings import Limits, TargetConfig
from orion_iscsifs.target.unit import LogicalUnit, Units

if TYPE_CHECKING:
    from orion_iscsifs.target.session import Session

_TSIH_MAX = 0xFFFF


@dataclass(slots=True)
class Stats:
    """Counts since the start; `commands` by SCSI operation code."""

    logins: int = 0
    refused_logins: int = 0
    discoveries: int = 0
    reinstatements: int = 0
    last_isid: bytes = b""
    last_initiator_name: str = ""
    commands: list[int] = field(default_factory=lambda: [0] * 256)
    late_data_out: int = 0
    """Data-Out PDUs of tasks that were gone."""
    rejects: int = 0
    protocol_errors: int = 0
    digest_errors: int = 0
    """PDUs with a damaged data segment that were rejected and recovered from."""
    joined: int = 0
    """Connections that joined a session, or took another's place in it."""
    lost_connections: int = 0
    timed_out_sessions: int = 0
    snacks: int = 0
    data_acks: int = 0
    reassigned: int = 0
    sequence_timeouts: int = 0
    ignored_events: int = 0
    """Async Messages that wanted an answer in time and got none."""
    last_error: str = ""


class Target:
    """One target node and its sessions, by initiator name, ISID and portal group (§4.4.3).

    `groups` are the tags of its portal groups; each has an access state in `access`.
    """

    def __init__(
        self, config: TargetConfig, limits: Limits, stats: Stats, groups: Iterable[int] = (1,)
    ) -> None:
        self.config = config
        self.limits = limits
        self.faults = config.faults
        self.units = Units(
            config.iqn,
            config.units,
            limits.transfer_bytes_max,
            lasting_reservations=config.lasting_reservations,
        )
        self.access = Access(groups, self._access_changed)
        self.sessions: dict[tuple[str, bytes, int], Session] = {}
        self.stats = stats

    @property
    def iqn(self) -> str:
        return self.config.iqn

    def session_with(self, tsih: int) -> "Session | None":
        return next((s for s in self.sessions.values() if s.tsih == tsih), None)

    async def make_way(self, session: "Session") -> None:
        """Session reinstatement (RFC 7143 §6.3.5): end an old session of the same nexus first.

        Its tasks and their last writes included. Only then the login is answered, so no write of
        the old session lands after the new one begins.
        """
        while (old := self.sessions.get(session.nexus)) is not None:
            self.stats.reinstatements += 1
            await old.end()

    def admit(self, session: "Session") -> None:
        """Make `session` the one of its nexus; nothing was awaited since `make_way`."""
        self.sessions[session.nexus] = session
        self.units.listeners.append(session.add_attention)
        self.stats.logins += 1
        self.stats.last_isid = session.isid
        self.stats.last_initiator_name = session.initiator_name

    def forget(self, session: "Session") -> None:
        """`session` is over."""
        if self.sessions.get(session.nexus) is session:
            del self.sessions[session.nexus]
            self.units.listeners.remove(session.add_attention)

    def announce(self, number: int, attention: SenseData, *, but: "Session | None" = None) -> None:
        """A unit attention for every session except `but`."""
        for session in self.sessions.values():
            if session is not but:
                session.add_attention(number, attention)

    def add_unit(self, number: int, device: BlockDevice, *, identity: str = "") -> LogicalUnit:
        """A LUN appears. `identity`: what its names derive from, else target and number."""
        return self.units.add(number, device, identity)

    async def remove_unit(self, number: int) -> BlockDevice:
        """A LUN vanishes. Returns its device once no command uses it any more.

        Commands that the device is carrying out end as they do; those that have not begun are
        answered LOGICAL UNIT NOT SUPPORTED.
        """
        unit = self.units.remove(number)
        for session in list(self.sessions.values()):
            session.execution.forsake(unit)
        # Nothing new begins on this unit: no command finds it any more.
        await unit.settle()
        return unit.device

    def lose_power(self) -> None:
        """Between a stop and a start: no session is left."""
        for unit in self.units.by_number.values():
            unit.reservations.lose_power()

    def _access_changed(self, but: "Session | None") -> None:
        for number in self.units.by_number:
            self.announce(number, STATE_CHANGED, but=but)


class Registry:
    """All targets of a server and the TSIHs in use."""

    def __init__(self, targets: list[Target]) -> None:
        self.targets = {target.iqn: target for target in targets}
        self._tsihs = count(1)

    def assign_tsih(self, login: TargetLogin) -> int:
        """The TSIH of a new session, or of the one that this connection may join."""
        if login.requested_tsih:
            return self._joined(login).tsih
        used = {s.tsih for target in self.targets.values() for s in target.sessions.values()}
        while True:
            number = next(self._tsihs) % _TSIH_MAX + 1
            if number not in used:
                return number

    def _joined(self, login: TargetLogin) -> "Session":
        session = self.session_to_join(login)
        tsih = f"TSIH {login.requested_tsih:#x}"
        if session is None:
            raise status_error(LoginStatus.SESSION_DOES_NOT_EXIST, f"no session has {tsih}")
        if session.refuses(login.cid):
            problem = f"{tsih} has all its connections"
            raise status_error(LoginStatus.TOO_MANY_CONNECTIONS, problem)
        return session

    def session_to_join(self, login: TargetLogin) -> "Session | None":
        """The session whose TSIH the login names: of the same initiator port (§11.12.6)."""
        target = self.targets.get(login.target_name or "")
        if target is None or not login.requested_tsih:
            return None
        session = target.session_with(login.requested_tsih)
        if session is None or session.over:
            return None
        mine = (session.initiator_name, session.isid) == (login.initiator_name, login.isid)
        return session if mine else None

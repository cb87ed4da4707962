"""A connection from its first byte to full feature phase (RFC 7143 §6.3)."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import trio

from orion_iscsifs.errors import LoginError, OrionError, ProtocolViolation
from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.chap import ChallengeRegister
from orion_iscsifs.protocol.keys import CRC32C, DISCOVERY, NONE, Parameters
from orion_iscsifs.protocol.login import (
    Credentials,
    LoginStatus,
    Offer,
    TargetAccess,
    TargetLogin,
    status_error,
)
from orion_iscsifs.protocol.pdu import LoginRequest, LoginResponse, Pdu
from orion_iscsifs.protocol.text import Pair, shown
from orion_iscsifs.target.channel import Channel
from orion_iscsifs.target.connection import Connection
from orion_iscsifs.target.login_faults import LoginAct, LoginFaults
from orion_iscsifs.target.login_script import ScriptedLogin
from orion_iscsifs.target.registry import Registry, Stats
from orion_iscsifs.target.session import Session
from orion_iscsifs.target.settings import Chap, Limits

_DISCOVERY: Final = b"SessionType=Discovery\0"
_TARGET_NAME: Final = b"TargetName="

Directory = Callable[[TargetLogin, str], Sequence[Pair] | None]
"""The answer to SendTargets with this value, for who logged in; None: not to be asked like this."""


def _offer(limits: Limits, *, discovery: bool) -> Offer:
    """Data digests follow the initiator's order of preference: libiscsi knows none of them.

    Header digests can be insisted on, though not in discovery, where nobody offers them.
    """
    insist = limits.digests and not discovery
    return Offer(
        header_digest=(CRC32C,) if insist else (NONE, CRC32C),
        data_digest=(NONE, CRC32C),
        initial_r2t=limits.initial_r2t,
        immediate_data=limits.immediate_data,
        max_recv_data_segment_length=limits.max_recv_data_segment_length,
        max_burst_length=limits.max_burst_length,
        first_burst_length=limits.first_burst_length,
        # One, where lost data may be asked for again and sequences are in order (§13.19).
        max_outstanding_r2t=1 if limits.error_recovery_level else limits.max_outstanding_r2t,
        max_connections=limits.max_connections,
        error_recovery_level=limits.error_recovery_level,
        default_time2wait=limits.default_time2wait,
        default_time2retain=limits.default_time2retain,
        task_reporting=limits.task_reporting,
        iscsi_protocol_level=limits.iscsi_protocol_level,
    )


def _access(chap: Chap | None) -> TargetAccess:
    if chap is None:
        return TargetAccess()
    outgoing = None
    if chap.mutual_user is not None and chap.mutual_secret is not None:
        outgoing = Credentials(user=chap.mutual_user, secret=chap.mutual_secret.reveal().encode())
    incoming = Credentials(user=chap.user, secret=chap.secret.reveal().encode())
    return TargetAccess(incoming=incoming, outgoing=outgoing)


class Door:
    """Lets initiators in: everything that logins have in common."""

    def __init__(
        self, registry: Registry, limits: Limits, stats: Stats, discovery_faults: LoginFaults
    ) -> None:
        self._registry = registry
        self._discovery_faults = discovery_faults
        self._challenges = ChallengeRegister()
        self._limits = limits
        self._stats = stats
        configs = [target.config for target in registry.targets.values()]
        self._accesses = {config.iqn: _access(config.chap) for config in configs}
        chaps = {config.chap for config in configs}
        # One set of credentials for all targets guards discovery too.
        self._discovery_access = _access(chaps.pop()) if len(chaps) == 1 else TargetAccess()

    async def log_in(
        self, connection: Connection, directory: Directory, *, portal_group_tag: int
    ) -> Channel | None:
        """The connection in its session, its last Login Response queued; None: there is none."""
        with trio.move_on_after(self._limits.login_timeout_s):
            try:
                requests = await connection.receive()
                login = self._begin(requests[0], portal_group_tag)
                response = await self._exchange(connection, login, requests)
            except OrionError as error:
                self._refused(error)
                return None
            first = requests[0]
            assert isinstance(first, LoginRequest)
            return await self._enter(connection, login, response, directory, first.exp_stat_sn)
        self._refused(LoginError(f"{connection.peer}: the login took too long"))
        return None

    def _begin(self, first: Pdu, portal_group_tag: int) -> ScriptedLogin:
        """What is offered depends on the session's type, which the first request names."""
        text = bytes(first.data)
        discovery = _DISCOVERY in text
        faults = self._discovery_faults if discovery else self._faults_of(text)
        due = faults.take()
        unguarded = any(fault.act is LoginAct.SKIP_AUTHENTICATION for fault in due)
        login = TargetLogin(
            offer=_offer(self._limits, discovery=discovery),
            lookup=lambda name: self._access(login, name, unguarded=unguarded),
            portal_group_tag=portal_group_tag,
            random_bytes=os.urandom,
            discovery_access=TargetAccess() if unguarded else self._discovery_access,
            assign_tsih=self._registry.assign_tsih,
            find_session=partial(self._find_session, portal_group_tag),
            challenges=self._challenges,
        )
        return ScriptedLogin(login, faults, due)

    def _faults_of(self, text: bytes) -> LoginFaults:
        """Those of the target that the first request names, if it does."""
        for item in text.split(b"\0"):
            if item.startswith(_TARGET_NAME):
                name = item.removeprefix(_TARGET_NAME).decode(errors="replace")
                target = self._registry.targets.get(name)
                if target is not None:
                    return target.config.login_faults
        return LoginFaults()

    def _access(self, login: TargetLogin, name: str, *, unguarded: bool) -> TargetAccess | None:
        target = self._registry.targets.get(name)
        if target is None:
            return None
        if not target.config.admits(login.initiator_name):
            problem = f"{shown(login.initiator_name)} may not use {name}"
            raise status_error(LoginStatus.AUTHORIZATION_FAILURE, problem)
        return TargetAccess() if unguarded else self._accesses[name]

    def _find_session(self, portal_group_tag: int, login: TargetLogin) -> Parameters:
        """What the session that a connection joins agreed on (RFC 7143 §6.3.1).

        It never leaves its portal group (§4.4.1).
        """
        target = self._registry.targets.get(login.target_name or "")
        tsih = login.requested_tsih
        session = None if target is None else target.session_with(tsih)
        names = (login.initiator_name, login.isid)
        if session is None or (session.initiator_name, session.isid) != names:
            problem = f"there is no session with TSIH {tsih:#x}"
            raise status_error(LoginStatus.SESSION_DOES_NOT_EXIST, problem)
        if session.portal_group_tag != portal_group_tag:
            problem = f"the session is in portal group {session.portal_group_tag}"
            problem += f", this is {portal_group_tag}"
            raise status_error(LoginStatus.CANT_INCLUDE_IN_SESSION, problem)
        return session.parameters

    def _refused(self, error: OrionError) -> None:
        self._stats.refused_logins += 1
        self._stats.last_error = str(error)

    async def _exchange(
        self, connection: Connection, scripted: ScriptedLogin, requests: list[Pdu]
    ) -> LoginResponse:
        """Requests and responses up to the last one, which is left to the caller."""
        login = scripted.login
        while True:
            for request in requests:
                if not isinstance(request, LoginRequest):
                    raise ProtocolViolation(request.name, "before the login ended", section="6.3")
                response = scripted.receive(request)
                if response is None:
                    if scripted.closing:
                        raise LoginError("the connection is closed on purpose")
                    continue
                if scripted.failure is None:
                    # Valid with Status-Class 0 only (RFC 7143 §11.13.4).
                    response.exp_cmd_sn = login.cmd_sn
                    response.max_cmd_sn = serial.add(login.cmd_sn, self._limits.command_window - 1)
                    response.stat_sn = connection.next_stat_sn()
                scripted.alter(response)
                if scripted.done:
                    return response
                connection.send(response)
                await connection.send_all()
                if scripted.failure is not None:
                    raise scripted.failure
            requests = await connection.receive()

    async def _enter(
        self,
        connection: Connection,
        scripted: ScriptedLogin,
        response: LoginResponse,
        directory: Directory,
        exp_stat_sn: int,
    ) -> Channel | None:
        """Full feature phase, in a new session or in one that exists.

        An older session of this nexus, or connection of this CID, has ended when the answer goes
        out. None: the session to join has ended meanwhile.
        """
        login = scripted.login
        connection.cid = login.cid
        text_answers = partial(directory, login)
        session = self._registry.session_to_join(login)
        if session is not None:
            channel = await session.join(connection, login, text_answers, exp_stat_sn)
            if channel is None:
                return None
            order = session.order
            response.exp_cmd_sn, response.max_cmd_sn = order.exp_cmd_sn, order.max_cmd_sn
        elif login.requested_tsih:
            return None
        else:
            session = await self._new_session(connection, login)
            if session is None:
                return None
            channel = session.add(connection, login, text_answers)
        connection.send(response)
        parameters = channel.parameters
        connection.enter_full_feature(
            header_digest=parameters.header_digest,
            data_digest=parameters.data_digest,
            segment_bytes_max=parameters.max_recv_data_segment_length,
            sink=channel.place,
            keep_damaged=parameters.error_recovery_level > 0,
        )
        return channel

    async def _new_session(self, connection: Connection, login: TargetLogin) -> Session | None:
        """None: the initiator, or the whole target, went away while an older session ended."""
        target = None
        if login.session_type != DISCOVERY:
            target = self._registry.targets[login.target_name or ""]
        session = Session(login, target, limits=self._limits, stats=self._stats)
        if target is None:
            self._stats.discoveries += 1
        else:
            await target.make_way(session)
            if connection.closed:
                return None
            target.admit(session)
        return session

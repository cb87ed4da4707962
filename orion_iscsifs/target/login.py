"""A connection from its first byte to full feature phase (RFC 7143 §6.3)."""

import os
from typing import Final

import trio

from orion_iscsifs.errors import LoginError, OrionError, ProtocolViolation
from orion_iscsifs.protocol import serial
from orion_iscsifs.protocol.keys import CRC32C, DISCOVERY, NONE
from orion_iscsifs.protocol.login import Credentials, Offer, TargetAccess, TargetLogin
from orion_iscsifs.protocol.pdu import LoginRequest, LoginResponse, Pdu
from orion_iscsifs.target.connection import Connection
from orion_iscsifs.target.registry import PORTAL_GROUP_TAG, Registry, Stats
from orion_iscsifs.target.session import Session
from orion_iscsifs.target.settings import Chap, Limits
from orion_iscsifs.target.texts import Directory

_DISCOVERY: Final = b"SessionType=Discovery\0"


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
        max_outstanding_r2t=limits.max_outstanding_r2t,
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

    def __init__(self, registry: Registry, limits: Limits, stats: Stats) -> None:
        self._registry = registry
        self._limits = limits
        self._stats = stats
        configs = [target.config for target in registry.targets.values()]
        self._accesses = {config.iqn: _access(config.chap) for config in configs}
        chaps = {config.chap for config in configs}
        # One set of credentials for all targets guards discovery too.
        self._discovery_access = _access(chaps.pop()) if len(chaps) == 1 else TargetAccess()

    async def log_in(self, connection: Connection, directory: Directory) -> Session | None:
        """The session, its last Login Response queued; None when there will be none."""
        with trio.move_on_after(self._limits.login_timeout_s):
            try:
                requests = await connection.receive()
                login = self._begin(requests[0])
                response = await self._exchange(connection, login, requests)
            except OrionError as error:
                self._refused(error)
                return None
            return await self._enter(connection, login, response, directory)
        self._refused(LoginError(f"{connection.peer}: the login took too long"))
        return None

    def _begin(self, first: Pdu) -> TargetLogin:
        """What is offered depends on the session's type, which the first request names."""
        return TargetLogin(
            offer=_offer(self._limits, discovery=_DISCOVERY in bytes(first.data)),
            lookup=self._accesses.get,
            portal_group_tag=PORTAL_GROUP_TAG,
            random_bytes=os.urandom,
            discovery_access=self._discovery_access,
            assign_tsih=self._registry.assign_tsih,
        )

    def _refused(self, error: OrionError) -> None:
        self._stats.refused_logins += 1
        self._stats.last_error = str(error)

    async def _exchange(
        self, connection: Connection, login: TargetLogin, requests: list[Pdu]
    ) -> LoginResponse:
        """Requests and responses up to the last one, which is left to the caller."""
        while True:
            for request in requests:
                if not isinstance(request, LoginRequest):
                    raise ProtocolViolation(request.name, "before the login ended", section="6.3")
                response = login.receive(request)
                if not login.failed:
                    # Valid with Status-Class 0 only (RFC 7143 §11.13.4).
                    response.exp_cmd_sn = login.cmd_sn
                    response.max_cmd_sn = serial.add(login.cmd_sn, self._limits.command_window - 1)
                    response.stat_sn = connection.next_stat_sn()
                if login.done:
                    return response
                connection.send(response)
                await connection.send_all()
                if login.failed:
                    raise login.failure or LoginError("the login was refused")
            requests = await connection.receive()

    async def _enter(
        self,
        connection: Connection,
        login: TargetLogin,
        response: LoginResponse,
        directory: Directory,
    ) -> Session:
        """Full feature phase. An older session of this nexus has ended when the answer goes out."""
        target = None
        if login.session_type != DISCOVERY:
            target = self._registry.targets[login.target_name or ""]
        connection.cid = login.cid
        session = Session(
            connection, login, target, limits=self._limits, directory=directory, stats=self._stats
        )
        if target is None:
            self._stats.discoveries += 1
        else:
            await target.admit(session)
        connection.send(response)
        parameters = login.parameters
        connection.enter_full_feature(
            header_digest=parameters.header_digest,
            data_digest=parameters.data_digest,
            segment_bytes_max=parameters.max_recv_data_segment_length,
            sink=session.place,
        )
        return session

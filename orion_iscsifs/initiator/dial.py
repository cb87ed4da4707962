"""From a portal's address to a connection in the full-feature phase."""

import os
import socket
from dataclasses import dataclass, field
from typing import Final

import trio

from orion_iscsifs.config import ChapCredentials, DigestPreference, SessionConfig
from orion_iscsifs.errors import (
    ConnectFailed,
    ConnectionLost,
    NotIscsi,
    ProtocolViolation,
)
from orion_iscsifs.initiator.wire import Wire
from orion_iscsifs.protocol.framing import Framer, encode
from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.login import Credentials, InitiatorLogin, Offer
from orion_iscsifs.protocol.pdu import LoginRequest, LoginResponse, Pdu

_LOGIN_SEGMENT_BYTES_MAX: Final = 8192
"""MaxRecvDataSegmentLength while the login phase lasts (RFC 7143 §13.12)."""

_DIGESTS: Final = {
    DigestPreference.CRC32C: ("CRC32C",),
    DigestPreference.NONE: ("None",),
    DigestPreference.PREFER_CRC32C: ("CRC32C", "None"),
    DigestPreference.PREFER_NONE: ("None", "CRC32C"),
}


@dataclass(frozen=True, slots=True)
class Portal:
    """Where a target listens. `group_tag` as SendTargets told it, if it did."""

    host: str
    port: int = 3260
    group_tag: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Nexus:
    """Who logs in where: all that stays the same at every login of one session."""

    target_name: str | None
    """None: a discovery session."""
    isid: bytes
    config: SessionConfig


@dataclass(slots=True)
class LoggedIn:
    """A connection that has just entered the full-feature phase."""

    wire: Wire
    parameters: Parameters
    tsih: int
    cmd_sn: int
    exp_stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    early: list[Pdu]
    """What the target sent right behind its last Login Response."""


async def connect(portal: Portal, timeout_s: float) -> socket.socket:
    """A connected non-blocking TCP socket; every address of the name is tried in parallel."""
    try:
        with trio.fail_after(timeout_s):
            stream = await trio.open_tcp_stream(portal.host, portal.port)
    except trio.TooSlowError:
        raise ConnectFailed(
            f"{portal}: no answer within {timeout_s:g} s",
            advice="check the address and that no firewall drops the packets",
        ) from None
    except socket.gaierror as error:
        raise ConnectFailed(
            f"{portal}: host name not found: {error.strerror}", advice="check the host name"
        ) from None
    except ValueError:
        # What the resolver's own encoding refuses (UnicodeError): an empty or overlong label.
        raise ConnectFailed(
            f"{portal}: this can't be a host name", advice="check the host name"
        ) from None
    except OSError as error:
        raise ConnectFailed(
            f"{portal}: {_reason(error)}", advice="check that the target runs and the port is right"
        ) from None
    sock = socket.socket(fileno=stream.socket.detach())
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _reason(error: OSError) -> str:
    """The errno in words; open_tcp_stream hides it below a message of its own."""
    cause = error.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    number = cause.errno if isinstance(cause, OSError) else error.errno
    return os.strerror(number).lower() if number else str(error)


async def dial(portal: Portal, nexus: Nexus, *, cmd_sn: int) -> LoggedIn:
    """Connect and log in. Raises TransportError, LoginError or ProtocolViolation."""
    sock = await connect(portal, nexus.config.login_timeout_s)
    framer = Framer(data_segment_length_max=_LOGIN_SEGMENT_BYTES_MAX)
    wire = Wire(sock, framer, str(portal))
    try:
        with trio.fail_after(nexus.config.login_timeout_s):
            return await _log_in(wire, nexus, cmd_sn)
    except trio.TooSlowError:
        wire.close()
        raise ConnectFailed(
            f"{portal}: connected, but the login did not end within"
            f" {nexus.config.login_timeout_s:g} s",
            advice="check that an iSCSI target answers at this port",
        ) from None
    except BaseException:
        wire.close()
        raise


async def _log_in(wire: Wire, nexus: Nexus, cmd_sn: int) -> LoggedIn:
    config = nexus.config
    login = InitiatorLogin(
        initiator_name=config.initiator_name,
        target_name=nexus.target_name,
        session_type="Discovery" if nexus.target_name is None else "Normal",
        offer=offer(config, discovery=nexus.target_name is None),
        isid=nexus.isid,
        cmd_sn=cmd_sn,
        initiator_task_tag=0,
        credentials=_credentials(config.auth.initiator),
        target_credentials=_credentials(config.auth.target),
        chap_algorithms=tuple(int(algorithm) for algorithm in config.auth.algorithms),
        random_bytes=os.urandom,
    )
    early = await _exchange(wire, login)
    parameters = login.parameters
    wire.framer.data_segment_length_max = parameters.max_recv_data_segment_length
    wire.framer.header_digest = parameters.header_digest
    wire.framer.data_digest = parameters.data_digest
    return LoggedIn(
        wire,
        parameters,
        login.tsih,
        cmd_sn,
        login.exp_stat_sn,
        login.exp_cmd_sn,
        login.max_cmd_sn,
        early,
    )


async def _exchange(wire: Wire, login: InitiatorLogin) -> list[Pdu]:
    """Requests and responses in turn until the login phase is over; what came behind it."""
    request: LoginRequest | None = login.start()
    answered = False
    pdus: list[Pdu] = []
    while request is not None:
        await wire.send(encode(request, header_digest=False, data_digest=False))
        try:
            pdus = await wire.receive()
            while not pdus:
                pdus = await wire.receive()
        except (ProtocolViolation, ConnectionLost) as error:
            if answered:
                raise
            raise _stranger(wire, error) from None
        response = pdus.pop(0)
        if not isinstance(response, LoginResponse):
            raise _misplaced(response)
        answered = True
        request = login.receive(response)
        if request is not None and pdus:
            raise _misplaced(pdus[0])
    return pdus


def _misplaced(pdu: Pdu) -> ProtocolViolation:
    return ProtocolViolation(
        pdu.name, "during the login phase, where one Login Response is due", section="6.3"
    )


def _stranger(wire: Wire, error: ProtocolViolation | ConnectionLost) -> NotIscsi:
    """The peer's first bytes are no Login Response: most likely another service."""
    what = (
        "the connection was closed before any answer"
        if isinstance(error, ConnectionLost)
        else "the answer is not iSCSI"
    )
    return NotIscsi(f"{wire.peer}: {what}", advice="check that the port is an iSCSI target's")


def offer(config: SessionConfig, *, discovery: bool) -> Offer:
    """What we propose for each key (RFC 7143 §13)."""
    return Offer(
        header_digest=("None",) if discovery else _DIGESTS[config.header_digest],
        data_digest=("None",) if discovery else _DIGESTS[config.data_digest],
        initial_r2t=config.initial_r2t,
        immediate_data=config.immediate_data,
        max_recv_data_segment_length=config.max_recv_data_segment_length_bytes,
        max_burst_length=config.max_burst_length_bytes,
        first_burst_length=config.first_burst_length_bytes,
        max_outstanding_r2t=config.max_outstanding_r2t,
    )


def _credentials(chap: ChapCredentials | None) -> Credentials | None:
    if chap is None:
        return None
    return Credentials(user=chap.user, secret=chap.secret.reveal().encode())

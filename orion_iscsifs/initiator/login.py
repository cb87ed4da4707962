"""One login over a connection that stands: the Login Phase on a `Wire` (RFC 7143 §6.3)."""

import logging
import os
from dataclasses import dataclass
from typing import Final

from orion_iscsifs.config import ChapCredentials, DigestPreference, SessionConfig
from orion_iscsifs.errors import ConnectionLost, NotIscsi, ProtocolViolation
from orion_iscsifs.initiator.addresses import Portal
from orion_iscsifs.initiator.wire import Wire
from orion_iscsifs.protocol.framing import encode
from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.login import ChallengeRegister, Credentials, InitiatorLogin, Offer
from orion_iscsifs.protocol.pdu import LoginRequest, LoginResponse, Pdu

log = logging.getLogger(__name__)

LOGIN_SEGMENT_BYTES_MAX: Final = 8192
"""MaxRecvDataSegmentLength while the login phase lasts (RFC 7143 §13.12)."""

_TLS_RECORDS: Final = (b"\x15\x03", b"\x16\x03")
"""How an alert and a handshake message begin: a TLS server's answer to what is not TLS."""

_CHALLENGES: Final = ChallengeRegister()
"""Of all connections of this process: a rogue target may play one off against another (§9.2.1)."""

_DIGESTS: Final = {
    DigestPreference.CRC32C: ("CRC32C",),
    DigestPreference.NONE: ("None",),
    DigestPreference.PREFER_CRC32C: ("CRC32C", "None"),
    DigestPreference.PREFER_NONE: ("None", "CRC32C"),
}


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
    cid: int
    portal: Portal
    """The portal that was reached in the end, after every redirection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which connection of which session a login is for."""

    cmd_sn: int
    cid: int
    tsih: int
    exp_stat_sn: int
    session: Parameters | None


async def log_in(wire: Wire, portal: Portal, nexus: Nexus, place: Place) -> LoggedIn:
    config = nexus.config
    login = InitiatorLogin(
        initiator_name=config.initiator_name,
        target_name=nexus.target_name,
        session_type="Discovery" if nexus.target_name is None else "Normal",
        offer=offer(config, discovery=nexus.target_name is None),
        isid=nexus.isid,
        tsih=place.tsih,
        cid=place.cid,
        cmd_sn=place.cmd_sn,
        initiator_task_tag=0,
        credentials=_credentials(config.auth.initiator),
        target_credentials=_credentials(config.auth.target),
        chap_algorithms=tuple(int(algorithm) for algorithm in config.auth.algorithms),
        random_bytes=os.urandom,
        exp_stat_sn=place.exp_stat_sn,
        session=place.session,
        expected_portal_group_tag=portal.group_tag,
        challenges=_CHALLENGES,
    )
    await _exchange(wire, login)
    parameters = login.parameters
    if login.portal_group_tag_mismatch:
        tag = parameters.target_portal_group_tag
        log.warning("%s: portal group %s, discovery said %s", portal, tag, portal.group_tag)
    wire.framer.data_segment_length_max = parameters.max_recv_data_segment_length
    wire.framer.header_digest = parameters.header_digest
    wire.framer.data_digest = parameters.data_digest
    wire.framer.keep_damaged = parameters.error_recovery_level >= 1
    wire.framer.one_at_a_time = False
    early = wire.framer.received(0)
    return LoggedIn(
        wire,
        parameters,
        login.tsih,
        place.cmd_sn,
        login.exp_stat_sn,
        login.exp_cmd_sn,
        login.max_cmd_sn,
        early,
        place.cid,
        portal,
    )


async def _exchange(wire: Wire, login: InitiatorLogin) -> None:
    """Requests and responses in turn until the login phase is over.

    What came behind it has digests as they were agreed on, so it is left uncut.
    """
    wire.framer.one_at_a_time = True
    request: LoginRequest | None = login.start()
    answered = False
    while request is not None:
        try:
            await wire.send(encode(request, header_digest=False, data_digest=False))
            if not answered and (await wire.first_bytes(2)) in _TLS_RECORDS:
                raise NotIscsi(f"{wire.peer}: the answer is TLS", advice="write iscsis:// for TLS")
            pdus = await wire.receive()
            while not pdus:
                pdus = await wire.receive()
        except (ProtocolViolation, ConnectionLost) as error:
            if answered:
                raise
            raise _stranger(wire, error) from None
        response = pdus[0]
        if not isinstance(response, LoginResponse):
            raise _misplaced(response)
        answered = True
        request = login.receive(response)
        if request is not None and (extra := wire.framer.received(0)):
            raise _misplaced(extra[0])


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
    return NotIscsi(f"{wire.peer}: {what}", advice=wire.advice_if_strange)


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
        max_connections=1 if discovery else config.connections,
        # MAX and MIN of both sides (§13.15, §13.16): we need no rest, and ask for much memory.
        default_time2wait=0,
        default_time2retain=60,
        error_recovery_level=0 if discovery else config.erl,
    )


def _credentials(chap: ChapCredentials | None) -> Credentials | None:
    if chap is None:
        return None
    return Credentials(user=chap.user, secret=chap.secret.reveal().encode())

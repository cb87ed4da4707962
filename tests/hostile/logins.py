"""Both sides of a login against a peer that speaks the protocol and breaks it where it hurts.

An honest peer computes what would be right; drawn bytes say what is done to it on the way. So a
fuzzer gets past CHAP without having to guess a hash.
"""

import itertools
from collections.abc import Callable
from typing import Final, TypeVar

from orion_iscsifs.errors import LoginError, ProtocolViolation, UsageError
from orion_iscsifs.protocol.keys import ANSWER_CONSTANTS, KEYS, LENGTH_MAX, Offer, Parameters
from orion_iscsifs.protocol.login import (
    Credentials,
    InitiatorLogin,
    SessionType,
    TargetAccess,
    TargetLogin,
)
from orion_iscsifs.protocol.login_stages import EXCHANGES_MAX, LOGIN_SEGMENT_BYTES_MAX
from orion_iscsifs.protocol.pdu import LoginRequest, LoginResponse
from orion_iscsifs.protocol.text import Pair, TextReader, encode_text
from tests.hostile.draw import Draw
from tests.hostile.wire import check_violation

_L = TypeVar("_L", LoginRequest, LoginResponse)

TARGET: Final = "iqn.2026-11.org.example:disk"
INITIATOR: Final = "iqn.2026-11.org.example:host"
_ISID: Final = bytes.fromhex("80cafe000001")
_INCOMING: Final = Credentials(user="alice", secret=b"correct horse battery")
_OUTGOING: Final = Credentials(user="storage", secret=b"another long secret")
_KEYS: Final = (
    *KEYS, "X-com.example.key", "CHAP_A ", "headerdigest", "", "K" * 64, "TargetAddress;"
)  # fmt: skip
_VALUES: Final = (
    *sorted(ANSWER_CONSTANTS),
    *("Yes", "No", "None", "CRC32C", "CRC32C,None", "CHAP", "CHAP,None", "Normal", "Discovery"),
    *("0", "1", "2", "5", "7", "5,7", "512", "8192", "65536", "16777215", "16777216", "0x200"),
    *("-1", "00", "0x", "0b", "0bAAAA", "0x" + "ab" * 16, "0x" + "00" * 1025, "9" * 20, "9" * 300),
    *("", "=", "a,b,,c", "\u00e9", TARGET, INITIATOR, "127.0.0.1:3260,1", "RFC3720,ResponseFence"),
)
_OFFERS: Final = (
    Offer(),
    Offer(header_digest=("CRC32C",), data_digest=("CRC32C", "None"), alias="other"),
    Offer(
        header_digest=("None", "CRC32C"),
        max_connections=4,
        initial_r2t=False,
        immediate_data=False,
        max_recv_data_segment_length=LENGTH_MAX,
        max_burst_length=512,
        first_burst_length=512,
        max_outstanding_r2t=65535,
        error_recovery_level=2,
        data_sequence_in_order=False,
        data_pdu_in_order=False,
    ),
)


def _counting(first: int) -> Callable[[int], bytes]:
    numbers = itertools.count(first)
    return lambda count: next(numbers).to_bytes(4, "big").rjust(count, b"\x5a")[-count:]


def _initiator(draw: Draw) -> InitiatorLogin:
    session_type: SessionType = "Discovery" if draw.chance(4) else "Normal"
    credentials = _INCOMING if draw.flag() else None
    joins = draw.chance(8)
    return InitiatorLogin(
        initiator_name=INITIATOR,
        target_name=None if session_type == "Discovery" else TARGET,
        session_type=session_type,
        offer=draw.choice(_OFFERS),
        isid=_ISID,
        tsih=7 if joins else 0,
        cmd_sn=1,
        initiator_task_tag=9,
        credentials=credentials,
        target_credentials=_OUTGOING if credentials is not None and draw.flag() else None,
        chap_algorithms=draw.choice(((5,), (7, 5), (8, 6, 7, 5))),
        random_bytes=_counting(1),
        session=Parameters(error_recovery_level=2) if joins else None,
    )


def _target(draw: Draw) -> TargetLogin:
    incoming = _INCOMING if draw.flag() else None
    access = TargetAccess(incoming=incoming, outgoing=_OUTGOING if draw.flag() else None)
    return TargetLogin(
        offer=draw.choice(_OFFERS),
        lookup=lambda name: access if name == TARGET else None,
        portal_group_tag=1,
        random_bytes=_counting(1 << 20),
        discovery_access=access,
    )


# -- the two properties ----------------------------------------------------------------------------


def initiator_login(data: bytes) -> None:
    """Whatever the target answers: a finished login with sane parameters, or a typed error."""
    draw = Draw(data)
    try:
        login = _initiator(draw)
    except UsageError:  # Credentials that contradict each other are the user's mistake.
        return
    honest: TargetLogin | None = _target(draw)
    request: LoginRequest | None = login.start()
    for exchange in itertools.count():
        assert exchange <= EXCHANGES_MAX, "a login without an end"
        assert request is not None
        check_pdu(request)
        response = LoginResponse(_ISID, 9, csg=request.csg)
        if honest is not None:
            response = honest.receive(request)
            honest = None if honest.done or honest.failed else honest
        try:
            request = login.receive(_mangle(draw, response))
        except (LoginError, ProtocolViolation) as error:
            check_refusal(error)
            return
        if request is None:
            assert login.done
            check_parameters(login.parameters)
            return


def target_login(data: bytes) -> None:
    """Whatever the initiator asks for: a response each time, and an end."""
    draw = Draw(data)
    login = _target(draw)
    honest: InitiatorLogin | None = _initiator(draw)
    assert honest is not None
    request: LoginRequest | None = honest.start()
    for exchange in itertools.count():
        assert exchange <= EXCHANGES_MAX, "a login without an end"
        mangled = _mangle(draw, request or LoginRequest(_ISID, 9, csg=1))
        response = login.receive(mangled)
        check_pdu(response)
        if login.failed:
            assert response.status_class in (1, 2, 3)
            assert login.failure is not None
            check_refusal(login.failure)
            return
        assert response.status_class == 0
        if login.done:
            assert response.transit
            check_parameters(login.parameters)
            return
        request = None
        if honest is not None:
            try:
                request = honest.receive(response)
            except (LoginError, ProtocolViolation):
                honest = None


# -- what is done to a PDU on its way --------------------------------------------------------------


def _mangle(draw: Draw, pdu: _L) -> _L:
    pdu = type(pdu).unpack(pdu.pack(0, len(pdu.data))) if not pdu.data else pdu
    for _ in range(draw.below(4)):
        _MANGLERS[draw.below(len(_MANGLERS))](draw, pdu)
    return pdu


def _pairs(pdu: LoginRequest | LoginResponse) -> list[Pair]:
    reader = TextReader(pdu.name)
    try:
        reader.feed(pdu.data)
        return reader.finish()
    except ProtocolViolation:
        return []


def _pair(draw: Draw) -> Pair:
    value = draw.choice(_VALUES)
    if draw.chance(8):
        value = draw.block().decode("utf-8", "replace")
    return draw.choice(_KEYS), value


def _insert(draw: Draw, pdu: LoginRequest | LoginResponse) -> None:
    found = _pairs(pdu)
    found.insert(draw.below(len(found) + 1), _pair(draw))
    pdu.data = encode_text(found)


def _replace(draw: Draw, pdu: LoginRequest | LoginResponse) -> None:
    found = _pairs(pdu)
    if found:
        index = draw.below(len(found))
        found[index] = (found[index][0], _pair(draw)[1])
    pdu.data = encode_text(found)


def _delete(draw: Draw, pdu: LoginRequest | LoginResponse) -> None:
    found = _pairs(pdu)
    if found:
        del found[draw.below(len(found))]
    pdu.data = encode_text(found)


def _list(draw: Draw, pdu: LoginRequest | LoginResponse) -> None:
    pdu.data = encode_text([_pair(draw) for _ in range(draw.below(8))])


def _bytes(draw: Draw, pdu: LoginRequest | LoginResponse) -> None:
    pdu.data = draw.block() * draw.choice((1, 1, 1, 150))


def _cut(draw: Draw, pdu: LoginRequest | LoginResponse) -> None:
    pdu.data = bytes(pdu.data)[: draw.below(1024)]


def _flags(draw: Draw, pdu: LoginRequest | LoginResponse) -> None:
    flags = draw.number()
    pdu.transit, pdu.continued = bool(flags & 0x80), bool(flags & 0x40)
    pdu.csg, pdu.nsg = flags >> 2 & 3, flags & 3


def _continue(_: Draw, pdu: LoginRequest | LoginResponse) -> None:
    pdu.transit, pdu.continued = False, True


def _empty(_: Draw, pdu: LoginRequest | LoginResponse) -> None:
    pdu.transit, pdu.data = False, b""


def _header(draw: Draw, pdu: LoginRequest | LoginResponse) -> None:
    if draw.flag():
        pdu.initiator_task_tag = draw.number(4)
    elif draw.flag():
        pdu.isid = draw.raw(6).ljust(6, b"\0")
    else:
        pdu.tsih = draw.number(2)


def _status(draw: Draw, pdu: LoginRequest | LoginResponse) -> None:
    if isinstance(pdu, LoginResponse):
        pdu.status_class, pdu.status_detail = draw.number(), draw.number()
        pdu.version_active = draw.below(2)
        pdu.stat_sn, pdu.exp_cmd_sn, pdu.max_cmd_sn = (draw.number(4) for _ in range(3))
    else:
        pdu.version_max, pdu.version_min = draw.below(3), draw.below(3)
        pdu.cid, pdu.cmd_sn = draw.number(2), draw.number(4)


_Mangler = Callable[[Draw, LoginRequest | LoginResponse], None]
_MANGLERS: Final[tuple[_Mangler, ...]] = (
    _insert, _replace, _delete, _list, _bytes, _cut, _flags, _continue, _empty, _header, _status
)  # fmt: skip


# -- what has to hold ------------------------------------------------------------------------------


def check_refusal(error: Exception) -> None:
    if isinstance(error, ProtocolViolation):
        check_violation(error)
    else:
        assert isinstance(error, LoginError)
        assert str(error).isprintable(), repr(str(error))
        assert len(error.line) < 9000


def check_pdu(pdu: LoginRequest | LoginResponse) -> None:
    """What we say keeps to the rules, whatever we were told."""
    assert len(pdu.data) <= LOGIN_SEGMENT_BYTES_MAX
    assert not (pdu.transit and pdu.continued)
    assert len(pdu.pack(0, len(pdu.data))) == 48


def check_parameters(parameters: Parameters) -> None:
    """A finished login never leaves a value behind that §13 forbids."""
    assert 512 <= parameters.max_recv_data_segment_length <= LENGTH_MAX
    assert 512 <= parameters.max_send_data_segment_length <= LENGTH_MAX
    assert 512 <= parameters.first_burst_length <= parameters.max_burst_length <= LENGTH_MAX
    assert 1 <= parameters.max_connections <= 65535
    assert 1 <= parameters.max_outstanding_r2t <= 65535
    assert 0 <= parameters.default_time2wait <= 3600
    assert 0 <= parameters.default_time2retain <= 3600
    assert 0 <= parameters.error_recovery_level <= 2
    assert all(text.isprintable() for text in (parameters.target_alias, parameters.initiator_alias))
    if parameters.target_portal_group_tag is not None:
        assert 0 <= parameters.target_portal_group_tag <= 0xFFFF

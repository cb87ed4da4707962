"""Both roles of a login, joined in memory through packed headers."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from orion_iscsifs.protocol.login import (
    ChallengeRegister,
    Credentials,
    InitiatorLogin,
    Offer,
    Parameters,
    SessionType,
    TargetAccess,
    TargetLogin,
)
from orion_iscsifs.protocol.pdu import LoginRequest, LoginResponse
from orion_iscsifs.protocol.text import Pair, TextReader, encode_text

IQN = "iqn.2026-11.example:disk"
INITIATOR = "iqn.2026-11.example:host"
ISID = bytes.fromhex("800102030405")
ITT = 0x1234
INCOMING = Credentials(user="alice", secret=b"correct horse battery")
OUTGOING = Credentials(user="storage", secret=b"another long secret")


def counting_bytes(seed: int = 1) -> Callable[[int], bytes]:
    """A `random_bytes` that never repeats itself."""
    numbers = itertools.count(seed * 1000)
    return lambda count: b"".join(next(numbers).to_bytes(2) for _ in range(count))[-count:]


def initiator(
    *,
    offer: Offer | None = None,
    target_name: str | None = IQN,
    session_type: SessionType = "Normal",
    credentials: Credentials | None = None,
    target_credentials: Credentials | None = None,
    algorithms: Sequence[int] = (5,),
    tsih: int = 0,
    session: Parameters | None = None,
    random_bytes: Callable[[int], bytes] | None = None,
    expected_portal_group_tag: int | None = None,
    challenges: ChallengeRegister | None = None,
) -> InitiatorLogin:
    return InitiatorLogin(
        initiator_name=INITIATOR,
        target_name=target_name,
        session_type=session_type,
        offer=offer or Offer(),
        isid=ISID,
        tsih=tsih,
        cid=3,
        cmd_sn=77,
        initiator_task_tag=ITT,
        credentials=credentials,
        target_credentials=target_credentials,
        chap_algorithms=algorithms,
        random_bytes=random_bytes or counting_bytes(1),
        session=session,
        expected_portal_group_tag=expected_portal_group_tag,
        challenges=challenges,
    )


def target(
    *,
    offer: Offer | None = None,
    access: TargetAccess | None = None,
    discovery_access: TargetAccess | None = None,
    assign_tsih: Callable[[TargetLogin], int] | None = None,
    random_bytes: Callable[[int], bytes] | None = None,
    find_session: Callable[[TargetLogin], Parameters] | None = None,
    challenges: ChallengeRegister | None = None,
) -> TargetLogin:
    granted = access or TargetAccess()
    return TargetLogin(
        offer=offer or Offer(),
        lookup=lambda name: granted if name == IQN else None,
        portal_group_tag=1,
        random_bytes=random_bytes or counting_bytes(2),
        discovery_access=discovery_access,
        assign_tsih=assign_tsih,
        find_session=find_session,
        challenges=challenges,
    )


@dataclass
class Trace:
    """The PDUs of a login, in order."""

    requests: list[LoginRequest] = field(default_factory=list)
    responses: list[LoginResponse] = field(default_factory=list)

    @property
    def sent(self) -> list[dict[str, str]]:
        return [dict(pairs(request)) for request in self.requests]

    @property
    def received(self) -> list[dict[str, str]]:
        return [dict(pairs(response)) for response in self.responses]


def pairs(pdu: LoginRequest | LoginResponse) -> list[Pair]:
    reader = TextReader(pdu.name)
    reader.feed(pdu.data)
    return reader.finish()


def join(left: InitiatorLogin, right: TargetLogin) -> Trace:
    """Runs the login to its end; headers cross as bytes. Raises what the initiator raises."""
    trace = Trace()
    request: LoginRequest | None = left.start()
    for stat_sn in itertools.count(0xFFFF_FFFE):
        assert request is not None
        arrived = LoginRequest.unpack(request.pack(0, len(request.data)))
        arrived.data = request.data
        trace.requests.append(arrived)
        response = right.receive(arrived)
        response.stat_sn, response.exp_cmd_sn = stat_sn & 0xFFFF_FFFF, arrived.cmd_sn
        response.max_cmd_sn = arrived.cmd_sn + 31
        answered = LoginResponse.unpack(response.pack(0, len(response.data)))
        answered.data = response.data
        trace.responses.append(answered)
        request = left.receive(answered)
        if request is None:
            break
    return trace


def request(
    text: Sequence[Pair] = (),
    *,
    csg: int = 0,
    nsg: int | None = None,
    continued: bool = False,
    isid: bytes = ISID,
    itt: int = ITT,
    tsih: int = 0,
    cid: int = 0,
    version_max: int = 0,
    version_min: int = 0,
) -> LoginRequest:
    """A Login Request by hand; `nsg` sets the T bit."""
    return LoginRequest(
        isid=isid,
        initiator_task_tag=itt,
        transit=nsg is not None,
        continued=continued,
        csg=csg,
        nsg=nsg or 0,
        version_max=version_max,
        version_min=version_min,
        tsih=tsih,
        cid=cid,
        data=encode_text(text),
    )


def response(
    text: Sequence[Pair] = (),
    *,
    csg: int = 0,
    nsg: int | None = None,
    continued: bool = False,
    isid: bytes = ISID,
    itt: int = ITT,
    tsih: int = 0,
    version_active: int = 0,
    status: int = 0,
    stat_sn: int = 0,
) -> LoginResponse:
    """A Login Response by hand; `nsg` sets the T bit, `status` is class and detail."""
    return LoginResponse(
        isid=isid,
        initiator_task_tag=itt,
        transit=nsg is not None,
        continued=continued,
        csg=csg,
        nsg=nsg or 0,
        version_active=version_active,
        tsih=tsih,
        stat_sn=stat_sn,
        status_class=status >> 8,
        status_detail=status & 0xFF,
        data=encode_text(text),
    )


NAMES: list[Pair] = [
    ("InitiatorName", INITIATOR),
    ("SessionType", "Normal"),
    ("TargetName", IQN),
]

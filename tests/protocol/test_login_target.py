"""The target against requests written by hand (RFC 7143 §§6.3, 11.12)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.errors import OrionError
from orion_iscsifs.protocol.login import (
    LoginStatus,
    Offer,
    TargetAccess,
    TargetLogin,
)
from orion_iscsifs.protocol.pdu import LoginRequest, LoginResponse
from orion_iscsifs.protocol.text import Pair
from tests.protocol.logins import (
    INCOMING,
    IQN,
    ISID,
    ITT,
    NAMES,
    OUTGOING,
    pairs,
    request,
    target,
)

NO_AUTH: Pair = ("AuthMethod", "None")
CHAP: Pair = ("AuthMethod", "CHAP")
GUARDED = TargetAccess(incoming=INCOMING, outgoing=OUTGOING)


def status(response: LoginResponse) -> int:
    return response.status_class << 8 | response.status_detail


def secured(access: TargetAccess | None = None) -> TargetLogin:
    """A target in the operational stage."""
    login = target(access=access)
    assert login.receive(request([*NAMES, NO_AUTH], nsg=1)).transit
    return login


def refused(login: TargetLogin, bad: LoginRequest, code: int, words: str) -> LoginResponse:
    response = login.receive(bad)
    assert status(response) == code
    assert login.failed
    assert not login.done
    assert words in str(login.failure)
    assert (response.transit, response.continued) == (False, False)
    assert response.initiator_task_tag == bad.initiator_task_tag
    return response


# -- the first request ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "code", "words"),
    [
        (request(NAMES, version_min=1), LoginStatus.UNSUPPORTED_VERSION, "version 1"),
        (request(NAMES, csg=2), LoginStatus.INITIATOR_ERROR, "CSG 2"),
        (request(NAMES, csg=3), LoginStatus.INITIATOR_ERROR, "CSG 3"),
        (request(NAMES, nsg=1, continued=True), LoginStatus.INITIATOR_ERROR, "C and T"),
        (request(NAMES[1:]), LoginStatus.MISSING_PARAMETER, "InitiatorName is missing"),
        (request(NAMES[:2]), LoginStatus.MISSING_PARAMETER, "TargetName is missing"),
        (request(NAMES[:1]), LoginStatus.MISSING_PARAMETER, "TargetName is missing"),
        (request(), LoginStatus.MISSING_PARAMETER, "InitiatorName is missing"),
        (
            request([NAMES[0], ("TargetName", "iqn.other")]),
            LoginStatus.NOT_FOUND,
            "no target 'iqn.other'",
        ),
        (
            request([NAMES[0], ("SessionType", "Party")]),
            LoginStatus.SESSION_TYPE_NOT_SUPPORTED,
            "SessionType='Party'",
        ),
        (
            request([("InitiatorName", "i" * 224), *NAMES[1:]]),
            LoginStatus.INITIATOR_ERROR,
            "InitiatorName is longer than 223 bytes",
        ),
        (request([*NAMES, NAMES[0]]), LoginStatus.INITIATOR_ERROR, "InitiatorName sent twice"),
        (
            request([*NAMES, ("TargetPortalGroupTag", "1")]),
            LoginStatus.INITIATOR_ERROR,
            "not for the initiator",
        ),
        (request([*NAMES, ("MaxConnections", "1")]), LoginStatus.INITIATOR_ERROR, "not allowed"),
    ],
)
def test_refused_at_once(bad: LoginRequest, code: int, words: str) -> None:
    refused(target(), bad, code, words)


def test_malformed_text() -> None:
    bad = request()
    bad.data = b"InitiatorName"
    refused(target(), bad, LoginStatus.INITIATOR_ERROR, "no null delimiter")


def test_a_version_range_that_includes_ours() -> None:
    response = target().receive(request(NAMES, version_max=3))
    assert (status(response), response.version_active, response.version_max) == (0, 0, 0)


@pytest.mark.parametrize("changes", [{"itt": 9}, {"isid": bytes(6)}, {"tsih": 5}, {"cid": 5}])
def test_a_login_keeps_its_identity(changes: dict[str, int]) -> None:
    """§§11.12.6, 11.12.7; checklist 31: one ITT."""
    login = target()
    login.receive(request(NAMES))
    bad = request([NO_AUTH], **changes)  # type: ignore[arg-type]
    refused(login, bad, LoginStatus.INITIATOR_ERROR, "another")


def test_a_login_keeps_its_version_and_stage() -> None:
    login = target()
    login.receive(request(NAMES))
    refused(login, request(version_max=1), LoginStatus.INITIATOR_ERROR, "another version")
    login = secured()
    refused(login, request(csg=0), LoginStatus.INITIATOR_ERROR, "CSG 0 in stage OPERATIONAL")


@pytest.mark.parametrize(("csg", "nsg"), [(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)])
def test_transitions_that_do_not_exist(csg: int, nsg: int) -> None:
    login = target() if csg == 0 else secured()
    text = [*NAMES, NO_AUTH] if csg == 0 else []
    bad = request(text, csg=csg, nsg=nsg)
    refused(login, bad, LoginStatus.INITIATOR_ERROR, "no transition")


# -- stages --------------------------------------------------------------------------------------


def test_the_group_tag_comes_first_and_once() -> None:
    """Checklist 32: in the first response with C=0 to a request with C=0."""
    login = target()
    first = request(continued=True)
    first.data = b"InitiatorName=iqn.2026-11.example:host\0Target"
    assert pairs(login.receive(first)) == []
    last = request()
    last.data = f"Name={IQN}\0".encode()
    assert pairs(login.receive(last)) == [("TargetPortalGroupTag", "1")]
    assert pairs(login.receive(request([NO_AUTH], nsg=1))) == [NO_AUTH]
    assert login.initiator_name == "iqn.2026-11.example:host"


def test_operational_stage_at_once() -> None:
    """§6.3.1: the initiator foregoes security."""
    login = target(offer=Offer(alias="A disk"))
    response = login.receive(request([*NAMES, ("MaxBurstLength", "512")], csg=1, nsg=3))
    assert (response.transit, response.nsg, response.tsih) == (True, 3, 1)
    assert dict(pairs(response)) == {
        "TargetPortalGroupTag": "1",
        "TargetAlias": "A disk",
        "MaxBurstLength": "512",
    }
    assert login.done
    assert login.parameters.max_burst_length == 512


def test_operational_stage_at_once_is_refused_where_security_is_needed() -> None:
    """§6.3.1: "a response of Authentication failure"."""
    bad = request(NAMES, csg=1, nsg=3)
    refused(
        target(access=GUARDED), bad, LoginStatus.AUTHENTICATION_FAILURE, "skips the security stage"
    )


def test_from_security_to_full_feature() -> None:
    """§6.3: allowed, and taken when the target can live with every default."""
    login = target()
    response = login.receive(request([*NAMES, NO_AUTH], nsg=3))
    assert (response.transit, response.nsg, response.tsih) == (True, 3, 1)
    assert login.done


def test_from_security_to_full_feature_with_something_to_say() -> None:
    """The target selects the next stage: operational, for it has keys to send."""
    login = target(offer=Offer(max_recv_data_segment_length=65536))
    response = login.receive(request([*NAMES, NO_AUTH], nsg=3))
    assert (response.transit, response.nsg, response.tsih) == (True, 1, 0)
    response = login.receive(request(csg=1, nsg=3))
    assert pairs(response) == [("MaxRecvDataSegmentLength", "65536")]
    assert login.done


def test_empty_requests_are_answered_empty() -> None:
    """Checklist 31: T=0 partial exchanges, at least six of them."""
    login = target()
    login.receive(request(NAMES))
    for _ in range(8):
        response = login.receive(request())
        assert (response.data, response.transit, status(response)) == (b"", False, 0)
    login.receive(request([NO_AUTH], nsg=1))
    for _ in range(8):
        assert login.receive(request(csg=1)).data == b""


def test_unknown_and_obsolete_keys() -> None:
    """Checklist 29 and 33."""
    login = target()
    response = login.receive(request([*NAMES, ("X-com.example", "1"), NO_AUTH], nsg=1))
    assert ("X-com.example", "NotUnderstood") in pairs(response)
    response = login.receive(
        request([("IFMarkInt", "2048"), ("IFMarker", "No"), ("FutureKey", "1")], csg=1, nsg=3)
    )
    assert dict(pairs(response)) == {
        "IFMarkInt": "Reject",
        "IFMarker": "Reject",
        "FutureKey": "NotUnderstood",
    }
    assert login.done


def test_an_initiator_that_never_answers() -> None:
    """§6.2: the target's proposal stays open, so the stage does; the login is bounded."""
    login = target(offer=Offer(default_time2wait=9))
    login.receive(request([*NAMES, NO_AUTH], nsg=1))
    while not login.failed:
        response = login.receive(request(csg=1, nsg=3))
        assert not response.transit
    assert "no end after 128 exchanges" in str(login.failure)


def test_not_understood_from_an_initiator() -> None:
    """Checklist 29, §6.2: for a key of the RFC it is a protocol error."""
    login = secured()
    bad = request([("MaxRecvDataSegmentLength", "NotUnderstood")], csg=1)
    refused(login, bad, LoginStatus.INITIATOR_ERROR, "NotUnderstood")


# -- authentication ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "method"),
    [
        (GUARDED, "None"),
        (GUARDED, "SRP,None"),
        (GUARDED, "Reject"),
        (TargetAccess(), "CHAP"),
        (TargetAccess(), "SRP"),
    ],
)
def test_methods_that_do_not_fit(access: TargetAccess, method: str) -> None:
    """§6.3.2, §12.1."""
    bad = request([*NAMES, ("AuthMethod", method)])
    refused(target(access=access), bad, LoginStatus.AUTHENTICATION_FAILURE, "AuthMethod=")


def test_the_first_method_that_fits() -> None:
    response = target(access=GUARDED).receive(request([*NAMES, ("AuthMethod", "SRP,CHAP,None")]))
    assert ("AuthMethod", "CHAP") in pairs(response)
    response = target().receive(request([*NAMES, ("AuthMethod", "CHAP,None")]))
    assert ("AuthMethod", "None") in pairs(response)


def test_no_method_at_all() -> None:
    login = target(access=GUARDED)
    bad = request(NAMES, nsg=1)
    refused(login, bad, LoginStatus.AUTHENTICATION_FAILURE, "no AuthMethod")
    login = target()
    bad = request([*NAMES, ("CHAP_A", "5")])
    refused(login, bad, LoginStatus.AUTHENTICATION_FAILURE, "no AuthMethod")
    # Without need for security, T alone will do (§6.3.1).
    response = target().receive(request(NAMES, nsg=1))
    assert (response.transit, pairs(response)) == (True, [("TargetPortalGroupTag", "1")])


def test_chap_a_together_with_auth_method() -> None:
    """§12.1: allowed to an initiator that takes the first step at once."""
    login = target(access=GUARDED)
    response = login.receive(request([*NAMES, CHAP, ("CHAP_A", "5")]))
    assert {"AuthMethod", "CHAP_A", "CHAP_I", "CHAP_C"} <= {key for key, _ in pairs(response)}


def test_the_stage_stays_until_chap_is_done() -> None:
    """T=1 from the start, as libiscsi sends it, does not skip anything."""
    login = target(access=GUARDED)
    assert not login.receive(request([*NAMES, CHAP], nsg=1)).transit
    assert not login.receive(request(nsg=1)).transit
    assert not login.receive(request([("CHAP_A", "5")], nsg=3)).transit
    refused(login, request(nsg=1), LoginStatus.MISSING_PARAMETER, "CHAP_N is missing")


def test_security_keys_after_the_end() -> None:
    login = target()
    login.receive(request([*NAMES, NO_AUTH]))
    refused(login, request([("CHAP_A", "5")]), LoginStatus.INITIATOR_ERROR, "after the end")


def test_a_login_that_ended_takes_no_more() -> None:
    login = target()
    login.receive(request())
    assert login.failed
    with pytest.raises(AssertionError):
        login.receive(request(NAMES))


# -- hostile initiators --------------------------------------------------------------------------

FIELD = st.integers(0, 3)
KEYS = ["InitiatorName", "TargetName", "SessionType", "AuthMethod", "CHAP_A", "CHAP_N", "CHAP_R"]
KEYS += [
    "CHAP_I",
    "CHAP_C",
    "HeaderDigest",
    "MaxBurstLength",
    "FirstBurstLength",
    "X-a",
    "OFMarker",
]
TEXT = st.lists(
    st.tuples(
        st.sampled_from(KEYS),
        st.sampled_from([IQN, "Normal", "None", "CHAP", "5", "0x01", "512", "Irrelevant", "é"]),
    ),
    max_size=6,
).map(lambda text: "".join(f"{key}={value}\0" for key, value in text).encode())
NAMES_TEXT = f"InitiatorName=iqn.x\0TargetName={IQN}\0".encode()
REQUESTS = st.builds(
    LoginRequest,
    isid=st.sampled_from([ISID, ISID, ISID, bytes(6)]),
    initiator_task_tag=st.sampled_from([ITT, ITT, ITT, 0]),
    transit=st.booleans(),
    continued=st.booleans(),
    csg=FIELD,
    nsg=FIELD,
    version_min=st.sampled_from([0, 0, 0, 1]),
    data=st.one_of(st.binary(max_size=60), TEXT, TEXT.map(lambda text: NAMES_TEXT + text)),
)


@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=6),
    access=st.sampled_from([TargetAccess(), GUARDED]),
)
def test_hostile_initiator(requests: list[LoginRequest], access: TargetAccess) -> None:
    """Every request gets a response; nobody logs in without the secret."""
    login = target(access=access)
    for item in requests:
        response = login.receive(item)
        assert response.initiator_task_tag == item.initiator_task_tag
        assert login.failed is (response.status_class != 0)
        if login.failed or login.done:
            break
    assert not (login.done and access is GUARDED and login.target_name is not None)
    if login.failed:
        assert isinstance(login.failure, OrionError)

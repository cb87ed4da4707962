"""Logins that the embedded target spoils on purpose, and what an initiator must make of each."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
import trio

from orion_iscsifs.config import Secret
from orion_iscsifs.errors import (
    AuthenticationFailed,
    LoginError,
    LoginRedirected,
    OrionError,
    ProtocolViolation,
    TargetUnavailable,
)
from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.login import Credentials
from orion_iscsifs.target import (
    Chap,
    LoginAct,
    LoginFault,
    LoginFaults,
    RamDevice,
    Running,
    When,
    serve,
)
from tests.target.client import IQN, OFFER, SIZE, config, dialled

MINE = Credentials(user="me", secret=b"secret-of-mine")
OTHER = Credentials(user="disk", secret=b"secret-of-disk")
CHAP = Chap(
    user="me",
    secret=Secret("secret-of-mine"),
    mutual_user="disk",
    mutual_secret=Secret("secret-of-disk"),
)
ELSEWHERE = "192.0.2.7:3260"


@asynccontextmanager
async def spoilt(*faults: LoginFault, chap: Chap | None = None) -> AsyncIterator[Running]:
    async with RamDevice(SIZE) as disk, serve([config(disk, chap=chap)]) as running:
        script(running).pending += faults
        yield running


def script(running: Running) -> LoginFaults:
    return running.targets[0].config.login_faults


async def log_in(running: Running, *, chap: bool = False) -> Parameters:
    """A whole login with the initiator's own machine, and a command behind it."""
    async with dialled(running) as client:
        mine, other = (MINE, OTHER) if chap else (None, None)
        await client.log_in(IQN, credentials=mine, target_credentials=other)
        await client.settle()
        assert client.login is not None
        return client.login.parameters


async def refusal(running: Running, *, chap: bool = False) -> OrionError:
    """What the login fails with. It must have failed at the initiator, and the next one works."""
    with pytest.raises((LoginError, ProtocolViolation)) as caught:
        await log_in(running, chap=chap)
    assert script(running).hits
    await log_in(running, chap=chap)
    assert isinstance(caught.value, OrionError)
    return caught.value


# -- redirections and refusals ---------------------------------------------------------------------


@pytest.mark.checklist(38, "11.13.5")
@pytest.mark.parametrize("when", [When.SECURITY, When.OPERATIONAL, When.LAST])
@pytest.mark.parametrize(("status", "permanent"), [(0x0101, False), (0x0102, True)])
@pytest.mark.parametrize("address", [ELSEWHERE, f"{ELSEWHERE},3"], ids=["plain", "with tag"])
async def test_a_redirection(when: When, status: int, permanent: bool, address: str) -> None:
    fault = LoginFault(act=LoginAct.STATUS, when=when, status=status, address=address)
    async with spoilt(fault, chap=CHAP) as running:
        error = await refusal(running, chap=True)
        assert isinstance(error, LoginRedirected)
        assert (error.portal, error.permanent) == (ELSEWHERE, permanent)


@pytest.mark.checklist(38, "11.13.5")
async def test_a_redirection_to_nowhere() -> None:
    async with spoilt(LoginFault(act=LoginAct.STATUS, status=0x0101)) as running:
        error = await refusal(running)
        assert isinstance(error, ProtocolViolation)
        assert error.section == "11.13.5"


@pytest.mark.checklist(39, "11.13.5")
@pytest.mark.parametrize(
    ("status", "retry"),
    [(0x0200, False), (0x0203, False), (0x02FF, False), (0x0300, True), (0x0301, True)],
)
async def test_refusals_so_many_times(status: int, retry: bool) -> None:
    async with spoilt(LoginFault(act=LoginAct.STATUS, status=status, logins=2)) as running:
        for _ in range(2):
            async with dialled(running) as client:
                with pytest.raises(LoginError) as caught:
                    await client.log_in(IQN)
                error = caught.value
                assert (error.status_class, error.status_detail) == (status >> 8, status & 0xFF)
                assert isinstance(error, TargetUnavailable) is retry
                assert await client.closed()
        await log_in(running)
        assert running.stats.refused_logins == 2


@pytest.mark.checklist(39, "11.13.5")
async def test_good_logins_may_come_first() -> None:
    async with spoilt(LoginFault(act=LoginAct.STATUS, status=0x0300, after_logins=1)) as running:
        await log_in(running)
        await refusal(running)


@pytest.mark.parametrize("responses", [0, 1])
async def test_silence(responses: int) -> None:
    async with spoilt(LoginFault(act=LoginAct.SILENCE, after_responses=responses)) as running:
        async with dialled(running) as client:
            with trio.move_on_after(0.2) as scope:
                await client.log_in(IQN)
            assert scope.cancelled_caught
        await log_in(running)


@pytest.mark.parametrize("responses", [0, 1])
async def test_the_connection_ends_within_the_login(responses: int) -> None:
    async with spoilt(LoginFault(act=LoginAct.CLOSE, after_responses=responses)) as running:
        async with dialled(running) as client:
            with pytest.raises(EOFError):
                await client.log_in(IQN)
        await log_in(running)


# -- text ------------------------------------------------------------------------------------------


@pytest.mark.checklist(31, "6.2.1")
@pytest.mark.parametrize("count", [2, 7, 30])
@pytest.mark.parametrize("when", [When.SECURITY, When.OPERATIONAL])
async def test_partial_answers(count: int, when: When) -> None:
    async with spoilt(LoginFault(act=LoginAct.PARTIAL, when=when, count=count)) as running:
        parameters = await log_in(running)
        assert script(running).hits == 1
        await log_in(running)
        assert parameters == await log_in(running)


@pytest.mark.checklist(27, "6.1")
@pytest.mark.checklist(28, "6.2")
@pytest.mark.parametrize("count", [3, 16, 100])
@pytest.mark.parametrize("when", [When.SECURITY, When.OPERATIONAL])
async def test_text_that_spans_responses(count: int, when: When) -> None:
    async with spoilt(LoginFault(act=LoginAct.SPLIT, when=when, count=count)) as running:
        parameters = await log_in(running)
        assert script(running).hits == 1
        assert parameters == await log_in(running)


@pytest.mark.checklist(28, "6.2")
async def test_text_that_spans_responses_with_chap() -> None:
    fault = LoginFault(act=LoginAct.SPLIT, when=When.SECURITY, after_responses=1, count=10)
    async with spoilt(fault, chap=CHAP) as running:
        await log_in(running, chap=True)
        assert script(running).hits == 1


@pytest.mark.checklist(29, "6.2")
@pytest.mark.parametrize("when", [When.SECURITY, When.OPERATIONAL])
@pytest.mark.parametrize("key", ["X-org.example.fancy", "Novelty"])
async def test_unknown_keys_are_answered(key: str, when: When) -> None:
    fault = LoginFault(act=LoginAct.ADD, when=when, key=key, value="1")
    async with spoilt(fault) as running:
        await log_in(running)
        assert script(running).replies == [(key, "NotUnderstood")]


@pytest.mark.checklist(33, "13.25")
@pytest.mark.parametrize("key", ["IFMarker", "OFMarkInt"])
async def test_obsolete_keys_are_rejected_and_nothing_worse(key: str) -> None:
    fault = LoginFault(act=LoginAct.ADD, when=When.OPERATIONAL, key=key, value="No")
    async with spoilt(fault) as running:
        await log_in(running)
        assert script(running).replies == [(key, "Reject")]


@pytest.mark.checklist(30, "6.2")
async def test_a_key_that_comes_twice() -> None:
    """In a response of its own, when it has been agreed on."""
    partial = LoginFault(act=LoginAct.PARTIAL, when=When.OPERATIONAL)
    again = LoginFault(
        act=LoginAct.ADD,
        when=When.OPERATIONAL,
        after_responses=1,
        key="MaxBurstLength",
        value="512",
    )
    async with spoilt(partial, again) as running:
        error = await refusal(running)
        assert isinstance(error, ProtocolViolation)
        assert "MaxBurstLength sent twice" in str(error)


@pytest.mark.checklist(29, "6.2")
async def test_an_rfc_key_that_the_target_does_not_know() -> None:
    fault = LoginFault(act=LoginAct.ANSWER, key="MaxBurstLength", value="NotUnderstood")
    async with spoilt(fault) as running:
        error = await refusal(running)
        assert isinstance(error, ProtocolViolation)
        assert "MaxBurstLength=NotUnderstood" in str(error)


@pytest.mark.checklist(30, "6.2")
@pytest.mark.parametrize("value", ["Reject", "Irrelevant"])
async def test_a_refused_key_keeps_its_default(value: str) -> None:
    fault = LoginFault(act=LoginAct.ANSWER, key="FirstBurstLength", value=value)
    other = LoginFault(act=LoginAct.ANSWER, key="MaxOutstandingR2T", value=value)
    async with spoilt(fault, other) as running:
        parameters = await log_in(running)
        assert script(running).hits == 2
        assert parameters.max_outstanding_r2t == 1
        assert parameters.first_burst_length == 65536
        usual = await log_in(running)
        assert usual.max_outstanding_r2t == OFFER.max_outstanding_r2t


@pytest.mark.checklist(30, "6.2")
@pytest.mark.parametrize(("key", "value"), [("HeaderDigest", "CRC32C"), ("InitialR2T", "Maybe")])
async def test_a_selected_value_that_was_not_offered(key: str, value: str) -> None:
    fault = LoginFault(act=LoginAct.SET, key=key, value=value)
    async with spoilt(fault) as running:
        error = await refusal(running)
        assert isinstance(error, ProtocolViolation)
        assert f"{key}='{value}'" in str(error)


@pytest.mark.checklist(27, "6.1")
@pytest.mark.parametrize("length", [256, 8192, 70000])
async def test_text_beyond_every_bound(length: int) -> None:
    """A value, then a data segment, then a PDU that is too long."""
    fault = LoginFault(act=LoginAct.SET, key="MaxBurstLength", value="1" * length)
    async with spoilt(fault) as running:
        error = await refusal(running)
        assert isinstance(error, ProtocolViolation)


@pytest.mark.checklist(32, "13.9")
async def test_the_portal_group_tag_may_be_missing_or_another() -> None:
    key = "TargetPortalGroupTag"
    omit = LoginFault(act=LoginAct.OMIT, key=key)
    other = LoginFault(act=LoginAct.SET, key=key, value="7", after_logins=1)
    zero = LoginFault(act=LoginAct.SET, key=key, value="0", after_logins=2)
    async with spoilt(omit, other, zero) as running:
        for tag in (None, 7, 0, 1):
            assert (await log_in(running)).target_portal_group_tag == tag
        assert script(running).hits == 3


# -- headers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "fields", "problem"),
    [
        (When.LAST, {"tsih": 0}, "TSIH 0"),
        pytest.param(
            When.ANY,
            {"isid": b"\x80wrong"},
            "another ISID",
            marks=pytest.mark.checklist(36, "11.13"),
        ),
        pytest.param(
            When.ANY,
            {"initiator_task_tag": 0x77},
            "another Initiator Task Tag",
            marks=pytest.mark.checklist(31, "6.3.3"),
        ),
        pytest.param(
            When.SECURITY,
            {"nsg": 3},
            "transition to NSG 3",
            marks=pytest.mark.checklist(31, "6.3.3"),
        ),
        (When.OPERATIONAL, {"csg": 0}, "CSG 0"),
        (When.ANY, {"version_active": 2}, "Version-active 2"),
        pytest.param(When.ANY, {"continued": True}, "C", marks=pytest.mark.checklist(28, "6.2")),
    ],
)
async def test_a_wrong_header(when: When, fields: Mapping[str, int | bytes], problem: str) -> None:
    fault = LoginFault(act=LoginAct.HEADER, when=when, fields=fields)
    async with spoilt(fault) as running:
        error = await refusal(running)
        assert isinstance(error, ProtocolViolation)
        assert problem in str(error)


# -- authentication --------------------------------------------------------------------------------


@pytest.mark.checklist(43, "9.2")
async def test_a_target_that_skips_authentication() -> None:
    async with spoilt(LoginFault(act=LoginAct.SKIP_AUTHENTICATION), chap=CHAP) as running:
        error = await refusal(running, chap=True)
        assert isinstance(error, AuthenticationFailed)
        assert "does not authenticate us" in str(error)


@pytest.mark.checklist(43, "9.2")
async def test_a_target_that_never_proves_itself() -> None:
    name, proof = (LoginFault(act=LoginAct.OMIT, key=key) for key in ("CHAP_N", "CHAP_R"))
    async with spoilt(name, proof, chap=CHAP) as running:
        error = await refusal(running, chap=True)
        assert isinstance(error, AuthenticationFailed)
        assert "did not prove its identity" in str(error)


@pytest.mark.checklist(42, "9.2.1")
async def test_our_own_response_comes_back() -> None:
    async with spoilt(LoginFault(act=LoginAct.REFLECT_RESPONSE), chap=CHAP) as running:
        assert isinstance(await refusal(running, chap=True), AuthenticationFailed)


@pytest.mark.checklist(42, "9.2.1")
async def test_our_own_challenge_comes_back() -> None:
    """With the target's proof computed for another challenge, no initiator may be content.

    That it is noticed at once, across connections, needs what a session's logins have in common:
    tests/protocol has it.
    """
    fault = LoginFault(act=LoginAct.REFLECT_CHALLENGE, after_logins=1)
    async with spoilt(fault, chap=CHAP) as running:
        await log_in(running, chap=True)
        seen = script(running).challenge
        assert seen.startswith("0x")
        assert isinstance(await refusal(running, chap=True), AuthenticationFailed)
        assert script(running).challenge != seen


@pytest.mark.checklist(40, "12.1.3")
@pytest.mark.parametrize("value", ["6", "9", "5,7", "five"])
async def test_an_algorithm_that_was_not_offered(value: str) -> None:
    """The offer is SHA-256 and MD5 (7, 5); 6 is SHA-1."""
    async with spoilt(LoginFault(act=LoginAct.SET, key="CHAP_A", value=value), chap=CHAP) as target:
        error = await refusal(target, chap=True)
        assert isinstance(error, ProtocolViolation)
        assert error.section == "12.1.3"


@pytest.mark.checklist(41, "12.1.3")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("CHAP_C", "0x" + "00" * 1025),
        ("CHAP_C", "0xzz"),
        ("CHAP_C", ""),
        ("CHAP_I", "256"),
        ("CHAP_I", "-1"),
        ("CHAP_R", "0x00"),
    ],
)
async def test_chap_values_out_of_bounds(key: str, value: str) -> None:
    async with spoilt(LoginFault(act=LoginAct.SET, key=key, value=value), chap=CHAP) as running:
        assert isinstance(await refusal(running, chap=True), ProtocolViolation)


# -- discovery -------------------------------------------------------------------------------------


@pytest.mark.checklist(35, "4.3")
@pytest.mark.checklist(38, "11.13.5")
async def test_discovery_has_a_script_of_its_own() -> None:
    async with spoilt() as running:
        running.discovery_faults.add(
            LoginFault(act=LoginAct.STATUS, status=0x0101, address=ELSEWHERE)
        )
        await log_in(running)
        async with dialled(running) as client:
            with pytest.raises(LoginRedirected):
                await client.log_in(None, session_type="Discovery")
        async with dialled(running) as client:
            await client.log_in(None, session_type="Discovery")
        assert running.discovery_faults.hits == 1


async def test_a_script_can_be_called_off() -> None:
    async with spoilt(LoginFault(act=LoginAct.CLOSE, logins=None)) as running:
        for _ in range(2):
            async with dialled(running) as client:
                with pytest.raises(EOFError):
                    await client.log_in(IQN)
        script(running).clear()
        await log_in(running)


async def test_faults_of_one_target_only() -> None:
    """A name that no target has, and a request without one, meet no script."""
    async with spoilt(LoginFault(act=LoginAct.CLOSE, logins=None)) as running:
        async with dialled(running) as stranger:
            with pytest.raises(LoginError):
                await stranger.log_in(IQN + "x")
        assert script(running).hits == 0

"""The stage table: every state with every event (RFC 7143 §6.3)."""

import itertools

import pytest

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol.login_stages import CODE, NEXT_STAGE, LoginEvent, Stage, begin, transit

LEGAL = {
    (Stage.START, LoginEvent.BEGIN_SECURITY): Stage.SECURITY,
    (Stage.START, LoginEvent.BEGIN_OPERATIONAL): Stage.OPERATIONAL,
    (Stage.SECURITY, LoginEvent.SECURITY_DONE): Stage.OPERATIONAL,
    (Stage.SECURITY, LoginEvent.LOGIN_DONE): Stage.FULL_FEATURE,
    (Stage.OPERATIONAL, LoginEvent.LOGIN_DONE): Stage.FULL_FEATURE,
}
NSG_EVENT = {1: LoginEvent.SECURITY_DONE, 3: LoginEvent.LOGIN_DONE}


@pytest.mark.parametrize(("stage", "event"), list(itertools.product(Stage, LoginEvent)))
def test_table(stage: Stage, event: LoginEvent) -> None:
    assert NEXT_STAGE[stage].get(event) is LEGAL.get((stage, event))


@pytest.mark.parametrize(("stage", "nsg"), list(itertools.product(Stage, range(4))))
def test_transit(stage: Stage, nsg: int) -> None:
    event = NSG_EVENT.get(nsg)
    following = None if event is None else LEGAL.get((stage, event))
    if following is None:
        with pytest.raises(ProtocolViolation, match=rf"{stage.name} to NSG {nsg}.*§6\.3"):
            transit(stage, nsg, "Login Request")
    else:
        assert transit(stage, nsg, "Login Request") is following


@pytest.mark.parametrize("csg", range(4))
def test_begin(csg: int) -> None:
    if csg > 1:
        with pytest.raises(ProtocolViolation, match=rf"CSG {csg}.*§11\.12\.3"):
            begin(csg, "Login Request")
    else:
        assert CODE[begin(csg, "Login Request")] == csg

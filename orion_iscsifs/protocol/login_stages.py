"""The stages of the Login Phase, for both roles (RFC 7143 §6.3)."""

import enum
from collections.abc import Mapping
from typing import Final

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol.pdu import LoginStage

EXCHANGES_MAX: Final = 128
"""Login PDUs of one side, continuations included; RFC 7143 §6.2 asks for at least six."""

LOGIN_SEGMENT_BYTES_MAX: Final = 8192
"""Data segments during login: the default MaxRecvDataSegmentLength (RFC 7143 §6.3)."""


class Stage(enum.Enum):
    START = enum.auto()
    SECURITY = enum.auto()
    OPERATIONAL = enum.auto()
    FULL_FEATURE = enum.auto()


class LoginEvent(enum.Enum):
    BEGIN_SECURITY = enum.auto()
    BEGIN_OPERATIONAL = enum.auto()
    SECURITY_DONE = enum.auto()
    LOGIN_DONE = enum.auto()


NEXT_STAGE: Final[Mapping[Stage, Mapping[LoginEvent, Stage]]] = {
    Stage.START: {
        LoginEvent.BEGIN_SECURITY: Stage.SECURITY,
        LoginEvent.BEGIN_OPERATIONAL: Stage.OPERATIONAL,
    },
    Stage.SECURITY: {
        LoginEvent.SECURITY_DONE: Stage.OPERATIONAL,
        # Every operational parameter keeps its default.
        LoginEvent.LOGIN_DONE: Stage.FULL_FEATURE,
    },
    Stage.OPERATIONAL: {LoginEvent.LOGIN_DONE: Stage.FULL_FEATURE},
    # No way back: a second login needs a new connection.
    Stage.FULL_FEATURE: {},
}

_BEGIN: Final[Mapping[int, LoginEvent]] = {
    LoginStage.SECURITY: LoginEvent.BEGIN_SECURITY,
    LoginStage.OPERATIONAL: LoginEvent.BEGIN_OPERATIONAL,
}
_TRANSIT: Final[Mapping[int, LoginEvent]] = {
    LoginStage.OPERATIONAL: LoginEvent.SECURITY_DONE,
    LoginStage.FULL_FEATURE: LoginEvent.LOGIN_DONE,
}
CODE: Final[Mapping[Stage, LoginStage]] = {
    Stage.SECURITY: LoginStage.SECURITY,
    Stage.OPERATIONAL: LoginStage.OPERATIONAL,
    Stage.FULL_FEATURE: LoginStage.FULL_FEATURE,
}
"""The CSG of each stage."""


def begin(csg: int, pdu: str) -> Stage:
    """The stage that a first Login Request opens."""
    event = _BEGIN.get(csg)
    if event is None:
        raise ProtocolViolation(pdu, f"CSG {csg} can't begin a login", section="11.12.3")
    return NEXT_STAGE[Stage.START][event]


def transit(stage: Stage, nsg: int, pdu: str) -> Stage:
    """The stage that T=1 with this NSG leads to."""
    event = _TRANSIT.get(nsg)
    following = None if event is None else NEXT_STAGE[stage].get(event)
    if following is None:
        problem = f"no transition from {stage.name} to NSG {nsg}"
        raise ProtocolViolation(pdu, problem, section="6.3")
    return following

"""The Login Phase, both roles: see `login_initiator` and `login_target` (RFC 7143 §6.3)."""

from orion_iscsifs.protocol.chap import ChallengeRegister, ChapAlgorithm, Credentials
from orion_iscsifs.protocol.keys import Offer, Parameters
from orion_iscsifs.protocol.login_initiator import InitiatorLogin, SessionType
from orion_iscsifs.protocol.login_status import LoginStatus, status_error
from orion_iscsifs.protocol.login_target import TargetAccess, TargetLogin

__all__ = [
    "ChallengeRegister",
    "ChapAlgorithm",
    "Credentials",
    "InitiatorLogin",
    "LoginStatus",
    "Offer",
    "Parameters",
    "SessionType",
    "TargetAccess",
    "TargetLogin",
    "status_error",
]

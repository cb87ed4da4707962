"""The target's side of a login, without I/O (RFC 7143 §§6.3, 11.12, 11.13).

Each Login Request goes into `TargetLogin.receive`, which always gives a Login Response: a refusal
is a response with a Status-Class, after which `failed` is True. The caller fills StatSN, ExpCmdSN
and MaxCmdSN into every response, and decides about the session in `assign_tsih`.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from orion_iscsifs.errors import (
    AuthenticationFailed,
    LoginError,
    LoginRedirected,
    OrionError,
    ProtocolViolation,
)
from orion_iscsifs.protocol.chap import ChallengeRegister, ChapAlgorithm, Credentials
from orion_iscsifs.protocol.keys import DISCOVERY, NONE, NORMAL, Offer, Parameters, Role
from orion_iscsifs.protocol.login_chap import ChapTarget, RandomBytes
from orion_iscsifs.protocol.login_stages import CODE, Stage, begin, transit
from orion_iscsifs.protocol.login_status import LoginStatus, status_error
from orion_iscsifs.protocol.login_text import Received, TextChannel
from orion_iscsifs.protocol.negotiation import Negotiator
from orion_iscsifs.protocol.pdu import LoginRequest, LoginResponse, LoginStage
from orion_iscsifs.protocol.text import Pair, encode_text, printable, shown

_PDU: Final = LoginRequest.name
_NAME_BYTES_MAX: Final = 223
"""Of an iSCSI name (RFC 7143 §4.2.7.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetAccess:
    """What one target asks of an initiator: `incoming` is what the initiator must prove."""

    incoming: Credentials | None = None
    outgoing: Credentials | None = None
    """What this target proves when asked (mutual CHAP)."""
    algorithms: tuple[int, ...] = tuple(ChapAlgorithm)
    alias: str = ""


class _Auth(enum.Enum):
    """What the next Login Request of the security stage should bring."""

    METHOD = enum.auto()
    ALGORITHM = enum.auto()
    RESPONSE = enum.auto()
    DONE = enum.auto()


class TargetLogin:
    """One login. After `done` or `failed` it takes no more requests.

    `lookup` gives the access rules of a target by name, None if there is no such target; it may
    raise LoginError (its status goes to the initiator), LoginRedirected included.
    `assign_tsih`, called when everything is agreed on, gives the session's TSIH; it too may raise
    LoginError, for a session that does not exist, for one. `discovery_access` guards discovery.
    `find_session`, called with the names known, gives the parameters of the session that a login
    with a TSIH wants to join; it may raise LoginError as well. `challenges` is to be shared by all
    logins of this target.
    """

    def __init__(
        self,
        *,
        offer: Offer,
        lookup: Callable[[str], TargetAccess | None],
        portal_group_tag: int,
        random_bytes: RandomBytes,
        discovery_access: TargetAccess | None = None,
        assign_tsih: "Callable[[TargetLogin], int] | None" = None,
        find_session: "Callable[[TargetLogin], Parameters] | None" = None,
        challenges: ChallengeRegister | None = None,
    ) -> None:
        self._find_session = find_session
        self._challenges = challenges
        self.assign_tsih = assign_tsih
        self.done = False
        self.failed = False
        self.failure: OrionError | None = None
        """Why the login was refused, for the target's log."""
        self.parameters = Parameters()
        self.initiator_name = ""
        self.target_name: str | None = None
        self.session_type = NORMAL
        self.isid = b""
        self.requested_tsih = 0
        self.tsih = 0
        self.cid = 0
        self.cmd_sn = 0
        """Of the first request: ExpCmdSN of a new session (§11.12.8)."""
        self.access = TargetAccess() if discovery_access is None else discovery_access
        self._offer = offer
        self._lookup = lookup
        self._portal_group_tag = portal_group_tag
        self._random_bytes = random_bytes
        self._initiator_alias = ""
        self._first: LoginRequest | None = None
        self._stage = Stage.START
        self._auth = _Auth.METHOD
        self._chap: ChapTarget | None = None
        self._text = TextChannel(Role.INITIATOR)
        self._negotiator: Negotiator | None = None

    def receive(self, request: LoginRequest) -> LoginResponse:
        """The response, refusals included; `request.data` holds the text."""
        assert not self.done
        assert not self.failed
        try:
            return self._respond(request)
        except (LoginError, ProtocolViolation) as error:
            self.failed = True
            self.failure = error
            return _refusal(request, error)

    def _respond(self, request: LoginRequest) -> LoginResponse:
        self._text.check(request)
        if self._first is None:
            self._open(request)
        else:
            self._check_same_login(self._first, request)
        if not self._text.sending:
            received = self._text.take(request, self._stage)
            if received is None:
                return self._response(request)
            self._text.load(self._process(request, received))
        return self._next_response(request)

    def _open(self, request: LoginRequest) -> None:
        if request.version_min != 0:
            message = f"{_PDU}: version {request.version_min} or later is wanted"
            raise status_error(LoginStatus.UNSUPPORTED_VERSION, message)
        self._stage = begin(request.csg, _PDU)
        self._first = request
        self.isid, self.cid, self.cmd_sn = request.isid, request.cid, request.cmd_sn
        self.requested_tsih = request.tsih

    def _check_same_login(self, first: LoginRequest, request: LoginRequest) -> None:
        if request.initiator_task_tag != first.initiator_task_tag:
            raise ProtocolViolation(_PDU, "another Initiator Task Tag", section="6.3")
        if (request.isid, request.tsih, request.cid) != (first.isid, first.tsih, first.cid):
            raise ProtocolViolation(_PDU, "another ISID, TSIH or CID", section="11.12.6")
        versions = (first.version_max, first.version_min)
        if (request.version_max, request.version_min) != versions:
            raise ProtocolViolation(_PDU, "another version", section="11.12.4")
        if request.csg != CODE[self._stage]:
            problem = f"CSG {request.csg} in stage {self._stage.name}"
            raise ProtocolViolation(_PDU, problem, section="6.3")

    # -- text --------------------------------------------------------------------------------

    def _process(self, request: LoginRequest, received: Received) -> list[Pair]:
        pairs: list[Pair] = []
        if self._negotiator is None:
            pairs += self._identify(received)
        self._initiator_alias = printable(
            received.declared.get("InitiatorAlias", self._initiator_alias)
        )
        if self._stage is Stage.SECURITY:
            pairs += self._authenticate(received.security, last=request.transit)
        else:
            pairs += self._negotiate(received, last=request.transit)
        return [*pairs, *received.not_understood()]

    def _identify(self, received: Received) -> list[Pair]:
        """The first complete text of a login: who wants what (RFC 7143 §6.3)."""
        declared = received.declared
        self.initiator_name = _name("InitiatorName", declared)
        self.session_type = declared.get("SessionType", NORMAL)
        if self.session_type not in (NORMAL, DISCOVERY):
            message = f"{_PDU}: SessionType={shown(self.session_type)}"
            raise status_error(LoginStatus.SESSION_TYPE_NOT_SUPPORTED, message)
        if self.session_type == NORMAL:
            self.target_name = _name("TargetName", declared)
            access = self._lookup(self.target_name)
            if access is None:
                raise status_error(LoginStatus.NOT_FOUND, f"no target {shown(self.target_name)}")
            self.access = access
        if self.access.incoming is not None:
            self._demand_chap(self.access.incoming)
        self._negotiator = Negotiator(
            Role.TARGET,
            self._offer,
            pdu=_PDU,
            discovery=self.session_type == DISCOVERY,
            leading=self.requested_tsih == 0,
            base=self._session(),
        )
        alias = self.access.alias or self._offer.alias
        pairs = [("TargetPortalGroupTag", str(self._portal_group_tag))]
        if alias and self.session_type == NORMAL:
            pairs.append(("TargetAlias", alias))
        return pairs

    def _session(self) -> Parameters | None:
        if self.requested_tsih == 0 or self._find_session is None:
            return None
        return self._find_session(self)

    def _demand_chap(self, incoming: Credentials) -> None:
        if self._stage is not Stage.SECURITY:
            raise self._unauthenticated("the initiator skips the security stage")
        access = self.access
        self._chap = ChapTarget(
            incoming, access.outgoing, access.algorithms, self._random_bytes, self._challenges
        )

    def _unauthenticated(self, message: str) -> LoginError:
        return status_error(LoginStatus.AUTHENTICATION_FAILURE, f"login: {message}")

    def _authenticate(self, keys: dict[str, str], *, last: bool) -> list[Pair]:
        pairs: list[Pair] = []
        if self._auth is _Auth.METHOD and (keys or last):
            pairs += self._choose_method(keys)
        match self._auth:
            case _Auth.ALGORITHM if keys:
                assert self._chap is not None
                pairs += self._chap.challenge(keys)
                self._auth = _Auth.RESPONSE
            # An empty request that wants to leave the stage lacks its CHAP_R (§9.2).
            case _Auth.RESPONSE if keys or last:
                assert self._chap is not None
                pairs += self._chap.verify(keys)
                self._auth = _Auth.DONE
            case _Auth.DONE if keys:
                problem = f"{next(iter(keys))} after the end of authentication"
                raise ProtocolViolation(_PDU, problem, section="12.1")
        return pairs

    def _choose_method(self, keys: dict[str, str]) -> list[Pair]:
        """AuthMethod: takes it out of `keys`."""
        wanted = NONE if self._chap is None else "CHAP"
        offered = keys.pop("AuthMethod", None)
        if offered is None and (keys or self._chap is not None):
            raise self._unauthenticated("the initiator proposes no AuthMethod")
        if offered is not None and wanted not in offered.split(","):
            raise self._unauthenticated(f"AuthMethod={shown(offered)} lacks {wanted}")
        self._auth = _Auth.DONE if self._chap is None else _Auth.ALGORITHM
        return [] if offered is None else [("AuthMethod", wanted)]

    def _negotiate(self, received: Received, *, last: bool) -> list[Pair]:
        assert self._negotiator is not None
        answers = self._negotiator.receive(received.operational)
        pairs = [(answer.key, answer.value) for answer in answers]
        # The initiator has said all it wants to say: now for what it left out.
        return [*pairs, *self._negotiator.propose_needed()] if last else pairs

    # -- responses ---------------------------------------------------------------------------

    def _response(self, request: LoginRequest) -> LoginResponse:
        return LoginResponse(
            isid=request.isid,
            initiator_task_tag=request.initiator_task_tag,
            csg=request.csg,
            tsih=request.tsih,
        )

    def _next_response(self, request: LoginRequest) -> LoginResponse:
        response = self._response(request)
        response.data, response.continued = self._text.next_segment()
        if request.transit and not response.continued:
            self._transit(request, response)
        return response

    def _transit(self, request: LoginRequest, response: LoginResponse) -> None:
        """Agrees to leave the stage if nothing is open in it."""
        negotiator = self._negotiator
        assert negotiator is not None
        following = transit(self._stage, request.nsg, _PDU)
        if self._stage is Stage.SECURITY and self._auth is not _Auth.DONE:
            return
        if self._stage is Stage.OPERATIONAL and negotiator.unanswered:
            return
        if self._stage is Stage.SECURITY and negotiator.needs():
            # From security straight to full feature would leave us with defaults that won't do.
            following = transit(self._stage, LoginStage.OPERATIONAL, _PDU)
        if following is Stage.FULL_FEATURE:
            self._finish()
            response.tsih = self.tsih
        self._stage = following
        response.transit, response.nsg = True, CODE[following]

    def _finish(self) -> None:
        assert self._negotiator is not None
        agreed = self._negotiator.conclude()
        self.parameters = replace(
            agreed,
            target_portal_group_tag=self._portal_group_tag,
            target_alias=self.access.alias or self._offer.alias,
            # A connection that joins a session need not repeat what the session knows.
            initiator_alias=self._initiator_alias or agreed.initiator_alias,
        )
        if self.assign_tsih is None:
            self.tsih = self.requested_tsih or 1
        else:
            self.tsih = self.assign_tsih(self)
        self.done = True


def _name(key: str, declared: dict[str, str]) -> str:
    name = declared.get(key, "")
    if not name:
        raise status_error(LoginStatus.MISSING_PARAMETER, f"{_PDU}: {key} is missing")
    if len(name.encode()) > _NAME_BYTES_MAX:
        problem = f"{key} is longer than {_NAME_BYTES_MAX} bytes"
        raise ProtocolViolation(_PDU, problem, section="4.2.7.1")
    return name


def _refusal(request: LoginRequest, error: LoginError | ProtocolViolation) -> LoginResponse:
    status: int = LoginStatus.INITIATOR_ERROR
    if isinstance(error, LoginError) and error.status_class is not None:
        status = error.status_class << 8 | (error.status_detail or 0)
    elif isinstance(error, AuthenticationFailed):
        status = LoginStatus.AUTHENTICATION_FAILURE
    data: Sequence[Pair] = ()
    if isinstance(error, LoginRedirected):
        data = [("TargetAddress", error.portal)]
    return LoginResponse(
        isid=request.isid,
        initiator_task_tag=request.initiator_task_tag,
        tsih=request.tsih,
        status_class=status >> 8,
        status_detail=status & 0xFF,
        data=encode_text(data),
    )

"""The initiator's side of a login, without I/O (RFC 7143 §§6.3, 11.12, 11.13).

`start()` gives the first Login Request; each Login Response goes into `receive()`, which gives
the next request or None when the login is complete. The stages: security (always, with AuthMethod
None or CHAP), then operational. Names and every other key are sent once: some targets refuse a
login that repeats them. CHAP_A has a PDU of its own, as LIO wants it.
"""

import enum
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal

from orion_iscsifs.errors import AuthenticationFailed, ProtocolViolation, UsageError
from orion_iscsifs.protocol.chap import ChallengeRegister, Credentials, same
from orion_iscsifs.protocol.keys import NONE, NORMAL, Offer, Parameters, Role
from orion_iscsifs.protocol.login_chap import ChapInitiator, RandomBytes
from orion_iscsifs.protocol.login_stages import CODE, Stage, begin, transit
from orion_iscsifs.protocol.login_status import refusal
from orion_iscsifs.protocol.login_text import Received, TextChannel
from orion_iscsifs.protocol.negotiation import Negotiator
from orion_iscsifs.protocol.pdu import LoginRequest, LoginResponse, LoginStage
from orion_iscsifs.protocol.text import Pair, parse_binary_number, printable, shown

SessionType = Literal["Normal", "Discovery"]
_PDU: Final = LoginResponse.name


class _Auth(enum.Enum):
    """What the next Login Response of the security stage answers."""

    METHOD = enum.auto()
    ALGORITHM = enum.auto()
    RESPONSE = enum.auto()
    DONE = enum.auto()


class InitiatorLogin:
    """One login. An exception from `receive` ends it: the connection must be closed.

    `tsih` 0 opens a session (or reinstates the one with this ISID); otherwise the connection joins
    the session whose parameters are `session`. With `credentials` the target has to authenticate
    us, with `target_credentials` we authenticate the target too; a target that does not is
    refused. `chap_algorithms` are offered as given, in the order of preference. `challenges` is
    to be shared by all logins of this process. `expected_portal_group_tag` is what discovery told.
    """

    def __init__(
        self,
        *,
        initiator_name: str,
        target_name: str | None,
        session_type: SessionType,
        offer: Offer,
        isid: bytes,
        tsih: int = 0,
        cid: int = 0,
        cmd_sn: int,
        initiator_task_tag: int,
        credentials: Credentials | None,
        target_credentials: Credentials | None,
        chap_algorithms: Sequence[int],
        random_bytes: RandomBytes,
        exp_stat_sn: int = 0,
        session: Parameters | None = None,
        expected_portal_group_tag: int | None = None,
        challenges: ChallengeRegister | None = None,
    ) -> None:
        assert target_name is not None or session_type != NORMAL
        discovery = session_type != NORMAL
        if discovery:
            # Some targets pick CRC32C in discovery if it is offered, and then fail.
            offer = replace(offer, header_digest=(NONE,), data_digest=(NONE,))
        self.done = False
        self.parameters = Parameters()
        self.tsih = tsih
        self.exp_stat_sn = exp_stat_sn
        self.exp_cmd_sn = cmd_sn
        self.max_cmd_sn = cmd_sn
        self._names = (initiator_name, target_name, session_type)
        self._offer = offer
        self._request = LoginRequest(
            isid=isid, initiator_task_tag=initiator_task_tag, tsih=tsih, cid=cid, cmd_sn=cmd_sn
        )
        self._chap = _chap(
            credentials, target_credentials, chap_algorithms, random_bytes, challenges
        )
        self._auth = _Auth.METHOD
        self._stage = Stage.START
        self._wanted: LoginStage | None = None
        self._asked: LoginStage | None = None
        self._text = TextChannel(Role.TARGET, joining=tsih != 0)
        self._negotiator = Negotiator(
            Role.INITIATOR,
            offer,
            pdu=_PDU,
            discovery=discovery,
            leading=tsih == 0,
            base=session,
        )
        self.portal_group_tag_missing = False
        """The first complete response of a normal session lacks it: §13.9 says it must not."""
        self._expected_portal_group_tag = expected_portal_group_tag
        self._portal_group_tag: int | None = None
        self._target_alias = ""
        self._heard = False

    @property
    def portal_group_tag_mismatch(self) -> bool:
        """The login went to another portal group than discovery said (§6.3.1): worth a word in
        the log, since an administrator may just have changed it. Never a reason to refuse."""
        tags = (self._expected_portal_group_tag, self._portal_group_tag)
        return None not in tags and tags[0] != tags[1]

    def start(self) -> LoginRequest:
        """The first Login Request."""
        self._stage = begin(LoginStage.SECURITY, LoginRequest.name)
        initiator_name, target_name, session_type = self._names
        pairs: list[Pair] = [("InitiatorName", initiator_name)]
        if self.tsih == 0:
            # For the leading connection only (§13.21); there some targets insist on it.
            pairs.append(("SessionType", session_type))
        if target_name is not None:
            pairs.append(("TargetName", target_name))
        if self._offer.alias and self.tsih == 0:
            pairs.append(("InitiatorAlias", self._offer.alias))
        if self._chap is None:
            return self._send([*pairs, ("AuthMethod", NONE)], LoginStage.OPERATIONAL)
        return self._send([*pairs, ("AuthMethod", "CHAP")], None)

    def receive(self, response: LoginResponse) -> LoginRequest | None:
        """The next request, or None: the login is complete. `response.data` holds the text.

        Raises LoginError (its kinds say what the user can do) or ProtocolViolation.
        """
        assert self._stage is not Stage.START
        assert not self.done
        if response.status_class != 0:
            raise refusal(response, self._names[1], auth_advice=self._auth_advice())
        self._check(response)
        self.exp_stat_sn = (response.stat_sn + 1) & 0xFFFF_FFFF
        self.exp_cmd_sn, self.max_cmd_sn = response.exp_cmd_sn, response.max_cmd_sn
        if self._text.sending:
            return self._next_request()
        received = self._text.take(response, self._stage)
        if received is None:
            return self._send([], None)
        self._note_declarations(received)
        if self._stage is Stage.SECURITY:
            return self._secure(response, received)
        return self._operate(response, received)

    # -- stages ------------------------------------------------------------------------------

    def _secure(self, response: LoginResponse, received: Received) -> LoginRequest | None:
        answers = self._authenticate(received.security, last=response.transit)
        if response.transit:
            return self._transit(response)
        # Free to leave the stage once nothing of the exchange is open on our side.
        free = self._chap is None or self._auth in (_Auth.RESPONSE, _Auth.DONE)
        wanted = LoginStage.OPERATIONAL if free else None
        return self._send([*answers, *received.not_understood()], wanted)

    def _authenticate(self, keys: dict[str, str], *, last: bool) -> list[Pair]:
        if not keys and not last:
            return []  # A partial response: the target wants another request first.
        match self._auth:
            case _Auth.METHOD:
                return self._take_method(keys)
            case _Auth.ALGORITHM:
                assert self._chap is not None
                self._auth = _Auth.RESPONSE
                return self._chap.answer(keys)
            case _Auth.RESPONSE:
                assert self._chap is not None
                self._chap.verify(keys)
                self._auth = _Auth.DONE
            case _Auth.DONE if keys:
                problem = f"{next(iter(keys))} after the end of authentication"
                raise ProtocolViolation(_PDU, problem, section="12.1")
        return []

    def _take_method(self, keys: dict[str, str]) -> list[Pair]:
        method = keys.pop("AuthMethod", None)
        if keys:
            problem = f"{next(iter(keys))} before its turn"
            raise ProtocolViolation(_PDU, problem, section="12.1")
        if self._chap is not None:
            if method != "CHAP":
                raise _not_chap(method)
            self._auth = _Auth.ALGORITHM
            return self._chap.propose()
        # A target that skips security may leave AuthMethod out (RFC 7143 §6.3.1).
        if method not in (None, NONE):
            raise AuthenticationFailed(
                "login: the target demands authentication",
                advice="set chap_user= and chap_secret_file=",
            )
        self._auth = _Auth.DONE
        return []

    def _operate(self, response: LoginResponse, received: Received) -> LoginRequest | None:
        answers = self._negotiator.receive(received.operational)
        if not response.transit:
            pairs = [(answer.key, answer.value) for answer in answers]
            return self._send([*pairs, *received.not_understood()], LoginStage.FULL_FEATURE)
        open_keys = [answer.key for answer in answers if answer.required]
        if open_keys:
            problem = f"T is 1 although {open_keys[0]} needs an answer"
            raise ProtocolViolation(_PDU, problem, section="11.13.6")
        return self._transit(response)

    def _transit(self, response: LoginResponse) -> LoginRequest | None:
        self._stage = transit(self._stage, response.nsg, _PDU)
        if self._stage is Stage.OPERATIONAL:
            return self._send(self._negotiator.propose(), LoginStage.FULL_FEATURE)
        self._finish(response)
        return None

    def _finish(self, response: LoginResponse) -> None:
        if response.tsih == 0:
            raise ProtocolViolation(_PDU, "TSIH 0 at the end of login", section="11.13.3")
        if self.tsih not in (0, response.tsih):
            raise ProtocolViolation(_PDU, "TSIH of another session", section="11.13.3")
        agreed = self._negotiator.conclude()
        self.parameters = replace(
            agreed,
            target_portal_group_tag=self._portal_group_tag,
            # A connection that joins a session need not repeat what the session knows.
            target_alias=self._target_alias or agreed.target_alias,
            initiator_alias=self._offer.alias or agreed.initiator_alias,
        )
        self.tsih = response.tsih
        self.done = True

    # -- PDUs --------------------------------------------------------------------------------

    def _auth_advice(self) -> str:
        """What the user can do about Status 0201 at this point of the login."""
        if self._chap is None:
            return "the target demands authentication: set chap_user= and chap_secret_file="
        if self._auth in (_Auth.METHOD, _Auth.ALGORITHM):
            return "the target does not want CHAP, or not with these chap_algs="
        if self._chap.mutual:
            return "check chap_user and its secret, and whether the target has an outgoing secret"
        return "check chap_user and its secret, and whether the target demands mutual CHAP"

    def _send(self, pairs: Sequence[Pair], wanted: LoginStage | None) -> LoginRequest:
        self._text.load(pairs)
        self._wanted = wanted
        return self._next_request()

    def _next_request(self) -> LoginRequest:
        data, continued = self._text.next_segment()
        self._asked = None if continued else self._wanted
        return replace(
            self._request,
            transit=self._asked is not None,
            continued=continued,
            csg=CODE[self._stage],
            nsg=self._asked or 0,
            exp_stat_sn=self.exp_stat_sn,
            data=data,
        )

    def _check(self, response: LoginResponse) -> None:
        """The header of a response with Status-Class 0."""
        self._text.check(response)
        if response.initiator_task_tag != self._request.initiator_task_tag:
            raise ProtocolViolation(_PDU, "another Initiator Task Tag", section="6.3")
        if response.isid != self._request.isid:
            raise ProtocolViolation(_PDU, "another ISID", section="11.13")
        if response.version_active != 0:
            problem = f"Version-active {response.version_active} was not offered"
            raise ProtocolViolation(_PDU, problem, section="11.13.2")
        if response.csg != CODE[self._stage]:
            problem = f"CSG {response.csg} in stage {self._stage.name}"
            raise ProtocolViolation(_PDU, problem, section="6.3")
        if response.transit and (self._asked is None or response.nsg > self._asked):
            problem = f"transition to NSG {response.nsg}, which was not proposed"
            raise ProtocolViolation(_PDU, problem, section="11.13.6")

    def _note_declarations(self, received: Received) -> None:
        self._target_alias = printable(received.declared.get("TargetAlias", self._target_alias))
        text = received.declared.get("TargetPortalGroupTag")
        if not self._heard and self._names[2] == NORMAL:
            self.portal_group_tag_missing = text is None
        self._heard = True
        if text is None:
            return
        number = parse_binary_number(text)
        if number is None or number > 0xFFFF:
            problem = f"TargetPortalGroupTag={shown(text)} has not 16 bits"
            raise ProtocolViolation(_PDU, problem, section="13.9")
        self._portal_group_tag = number


def _chap(
    credentials: Credentials | None,
    target_credentials: Credentials | None,
    algorithms: Sequence[int],
    random_bytes: RandomBytes,
    challenges: ChallengeRegister | None,
) -> ChapInitiator | None:
    if credentials is None:
        if target_credentials is not None:
            raise UsageError(
                "mutual CHAP without CHAP", advice="set chap_user= and chap_secret_file= too"
            )
        return None
    if not algorithms:
        raise UsageError("CHAP without an algorithm", advice="leave chap_algs= out for md5")
    if target_credentials is not None and same(credentials.secret, target_credentials.secret):
        raise UsageError(
            "mutual CHAP with the same secret in both directions",
            advice="the two directions need different secrets (RFC 7143 §9.2.1)",
        )
    return ChapInitiator(credentials, target_credentials, algorithms, random_bytes, challenges)


def _not_chap(method: str | None) -> AuthenticationFailed:
    return AuthenticationFailed(
        f"login: the target does not authenticate us (AuthMethod={shown(method or '')})",
        advice="enable CHAP at the target, or leave chap_user= out",
    )

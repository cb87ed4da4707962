"""A login that does what `login_faults` say.

Each login takes the faults that are due and runs inside a `ScriptedLogin`, which stands between the
connection and the `TargetLogin` that does the real work: it changes requests before that sees them
and responses before they leave. Without a fault it only passes both on. Pure, like what it wraps.

Text that has to reach the initiator with T=0 (`PARTIAL`, `SPLIT`, `ADD`) is made by handing the
request on with T=0: the real login then stays in its stage, and the two sides agree on where they
are however strange the way there was.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from orion_iscsifs.errors import LoginError, OrionError
from orion_iscsifs.protocol.keys import NONE
from orion_iscsifs.protocol.login import TargetLogin
from orion_iscsifs.protocol.pdu import LoginRequest, LoginResponse, LoginStage
from orion_iscsifs.protocol.pdu.base import Buffer
from orion_iscsifs.protocol.text import Pair, encode_text, split_text
from orion_iscsifs.target.login_faults import LoginAct, LoginFault, LoginFaults, When

_KEY_ACTS: Final = frozenset(
    {LoginAct.SET, LoginAct.OMIT, LoginAct.REFLECT_RESPONSE, LoginAct.REFLECT_CHALLENGE}
)
"""They act on every response that has their key; the others once a login."""

_CUTS: Final = frozenset({LoginAct.PARTIAL, LoginAct.SPLIT})

_ELSEWHERE: Final = frozenset({LoginAct.HEADER, LoginAct.ANSWER, LoginAct.SKIP_AUTHENTICATION})
"""They do not act on the text of a response."""


@dataclass(slots=True)
class _Active:
    """One fault in one login."""

    fault: LoginFault
    left: int
    """Responses that still go out before it acts."""
    acted: bool = False

    def ready(self, csg: int, *, last: bool) -> bool:
        """Whether it acts on the next response, if that is of stage `csg`."""
        return self.left == 0 and self._concerns(csg, last=last)

    def due(self, response: LoginResponse, *, last: bool) -> bool:
        """Count this response; True when the fault acts on it."""
        if not self._concerns(response.csg, last=last):
            return False
        if self.left > 0:
            self.left -= 1
            return False
        return True

    def _concerns(self, csg: int, *, last: bool) -> bool:
        if self.acted and self.fault.act not in _KEY_ACTS:
            return False
        match self.fault.when:
            case When.ANY:
                return True
            case When.LAST:
                return last
            case When.SECURITY:
                return csg == LoginStage.SECURITY
            case When.OPERATIONAL:
                return csg == LoginStage.OPERATIONAL


class ScriptedLogin:
    """A `TargetLogin` and the faults that it meets.

    `closing`: the connection should be closed without an answer. Requests whose text spans PDUs
    pass unchanged.
    """

    def __init__(self, login: TargetLogin, faults: LoginFaults, due: Sequence[LoginFault]) -> None:
        self.login = login
        self.closing = False
        self._faults = faults
        self._active = [_Active(fault, fault.after_responses) for fault in due]
        self._failure: OrionError | None = None
        self._silent = False
        self._unsent: list[bytes] = []
        """Text to go out first: segments that the C bit joins if `_split`, else whole pairs."""
        self._split = False
        self._added: set[str] = set()
        self._chap_response = ""

    @property
    def done(self) -> bool:
        return self.login.done and self.failure is None and not (self._silent or self.closing)

    @property
    def failure(self) -> OrionError | None:
        return self._failure or self.login.failure

    def receive(self, request: LoginRequest) -> LoginResponse | None:
        """The response; None when there is none: look at `closing`."""
        if self._silent:
            return None
        challenge = self._faults.challenge
        request = self._spoilt_request(request)
        if self._unsent and (self._split or len(self._unsent) > 1 or request.data):
            return self._go_on(request)
        response = self.login.receive(request)
        if self.login.failed:
            return response
        response.data = b"".join((*self._unsent, bytes(response.data)))
        self._unsent.clear()
        return self._spoilt_response(request, response, challenge)

    def alter(self, response: LoginResponse) -> None:
        """Change the header, numbers included, of a response that is otherwise complete."""
        for active in self._active:
            fault = active.fault
            if fault.act is LoginAct.HEADER and active.due(response, last=self.login.done):
                self._hit(active)
                for name, value in fault.fields.items():
                    setattr(response, name, value)

    # -- requests ----------------------------------------------------------------------------

    def _spoilt_request(self, request: LoginRequest) -> LoginRequest:
        """What the real login gets to see."""
        if request.continued or not request.data:
            return self._held(request)
        pairs = _pairs(request.data)
        sent = dict(pairs)
        self._chap_response = sent.get("CHAP_R", self._chap_response)
        self._faults.challenge = sent.get("CHAP_C", self._faults.challenge)
        self._faults.replies += [pair for pair in pairs if pair[0] in self._added]
        kept = [pair for pair in pairs if pair[0] not in self._added | self._answered()]
        for active in self._of(LoginAct.SKIP_AUTHENTICATION):
            if "AuthMethod" in sent:
                self._hit(active)
                kept = [(key, NONE if key == "AuthMethod" else value) for key, value in kept]
        for active in self._of(LoginAct.ANSWER):
            active.acted = active.fault.key in sent
        return self._held(request if kept == pairs else replace(request, data=encode_text(kept)))

    def _held(self, request: LoginRequest) -> LoginRequest:
        """With T=0 if a fault wants to answer with T=0."""
        for active in self._active:
            act = active.fault.act
            cuts = act in _CUTS and len(request.data) > 0
            if (cuts or act is LoginAct.ADD) and active.ready(request.csg, last=False):
                return replace(request, transit=False, nsg=0)
        return request

    def _answered(self) -> set[str]:
        return {active.fault.key for active in self._of(LoginAct.ANSWER)}

    def _of(self, act: LoginAct) -> list[_Active]:
        return [active for active in self._active if active.fault.act is act and not active.acted]

    # -- responses ---------------------------------------------------------------------------

    def _go_on(self, request: LoginRequest) -> LoginResponse:
        """The next piece of a text that was cut."""
        if request.data:
            if self._split:
                return self._refuse(request, "text where an empty request was due (RFC 7143 §6.2)")
            response = self.login.receive(replace(request, transit=False, nsg=0))
            if self.login.failed:
                return response
            self._unsent[-1] += bytes(response.data)
        return self._piece(request)

    def _piece(self, request: LoginRequest) -> LoginResponse:
        response = LoginResponse(
            isid=request.isid,
            initiator_task_tag=request.initiator_task_tag,
            csg=request.csg,
            tsih=request.tsih,
            data=self._unsent.pop(0),
        )
        response.continued = self._split and bool(self._unsent)
        self._split = response.continued
        return response

    def _spoilt_response(
        self, request: LoginRequest, response: LoginResponse, challenge: str
    ) -> LoginResponse | None:
        response = self._with_answers(response)
        last = self.login.done
        # All of them count the response; what cuts its text comes when the text is complete.
        due = [
            a for a in self._active if a.fault.act not in _ELSEWHERE and a.due(response, last=last)
        ]
        for active in sorted(due, key=lambda active: active.fault.act in _CUTS):
            fault = active.fault
            match fault.act:
                case LoginAct.STATUS:
                    self._hit(active)
                    return self._refuse(request, "scripted", fault.status, fault.address)
                case LoginAct.SILENCE | LoginAct.CLOSE:
                    self._hit(active)
                    self._silent = True
                    self.closing = fault.act is LoginAct.CLOSE
                    return None
                case LoginAct.PARTIAL | LoginAct.SPLIT if request.data:
                    self._hit(active)
                    self._cut(fault, bytes(response.data))
                    return self._piece(request)
                case LoginAct.ADD:
                    self._hit(active)
                    self._added.add(fault.key)
                    response.data = bytes(response.data) + encode_text([(fault.key, fault.value)])
                case _:
                    self._change(active, response, challenge)
        return response

    def _change(self, active: _Active, response: LoginResponse, challenge: str) -> None:
        """The acts on a key that the response has."""
        fault = active.fault
        key, value = {
            LoginAct.REFLECT_RESPONSE: ("CHAP_R", self._chap_response),
            LoginAct.REFLECT_CHALLENGE: ("CHAP_C", challenge),
        }.get(fault.act, (fault.key, fault.value))
        pairs = _pairs(response.data)
        if key not in dict(pairs):
            return
        self._hit(active)
        if fault.act is LoginAct.OMIT:
            pairs = [pair for pair in pairs if pair[0] != key]
        else:
            pairs = [(name, value if name == key else old) for name, old in pairs]
        response.data = encode_text(pairs)

    def _with_answers(self, response: LoginResponse) -> LoginResponse:
        """What `ANSWER` has kept from the real login."""
        for active in self._active:
            fault = active.fault
            if fault.act is LoginAct.ANSWER and active.acted and active.left == 0:
                active.left = -1
                self._faults.hits += 1
                response.data = bytes(response.data) + encode_text([(fault.key, fault.value)])
        return response

    def _cut(self, fault: LoginFault, text: bytes) -> None:
        self._split = fault.act is LoginAct.SPLIT
        if self._split:
            self._unsent = split_text(text, fault.count)
            return
        pairs = _pairs(text)
        size = max(1, -(-len(pairs) // fault.count))
        pieces = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        # Fewer pairs than pieces: the first ones stay empty, which is legal too.
        pieces = [[]] * (fault.count - len(pieces)) + pieces
        self._unsent = [encode_text(piece) for piece in pieces]

    def _refuse(
        self, request: LoginRequest, problem: str, status: int = 0x0200, address: str = ""
    ) -> LoginResponse:
        self._failure = LoginError(
            f"login: {problem}", status_class=status >> 8, status_detail=status & 0xFF
        )
        return LoginResponse(
            isid=request.isid,
            initiator_task_tag=request.initiator_task_tag,
            tsih=request.tsih,
            status_class=status >> 8,
            status_detail=status & 0xFF,
            data=encode_text([("TargetAddress", address)] if address else []),
        )

    def _hit(self, active: _Active) -> None:
        active.acted = True
        self._faults.hits += 1


def _pairs(text: Buffer) -> list[Pair]:
    # Text that is not UTF-8 is the real login's to refuse.
    items = [
        item.partition("=") for item in bytes(text).decode(errors="replace").split("\0") if item
    ]
    return [(key, value) for key, _, value in items]

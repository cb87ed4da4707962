"""Text exchanges in the full feature phase, both roles, without I/O (RFC 7143 §§6.4, 11.10, 11.11).

The initiator's side, one object for one exchange:

    exchange = TextExchange(initiator_task_tag=tag, parameters=connection_parameters)
    request = exchange.start([("SendTargets", "All")])   # or a declaration, or nothing at all
    while request is not None:
        # fill cmd_sn and exp_stat_sn in, send; receive the Text Response with this ITT
        request = exchange.receive(response)
    exchange.pairs        # everything the target said, in order
    exchange.parameters   # the new Parameters, or the old ones where `exchange.failure` is set

A Reject PDU instead of a response goes into `rejected()`. `start` again, at any time, abandons
what has been said and begins anew: its TTT 0xffffffff makes the target forget too. An empty
`start([])` is the answer to an Async Message that asks for a negotiation (event 4, §11.9.1).

The target's side, one object for one connection: `TextResponder`. Each Text Request goes into
`receive`, which gives the response; the caller fills the sequence numbers in.

A negotiation is atomic (§7.12): `parameters` changes once, when it has succeeded. Between our
request and that moment the target may still send by the old values, so a receiver that declares
less than before keeps its larger buffers until then.

There are two ways for an exchange to go wrong. A broken sequence of PDUs (tags, F and C bits,
text that is none) is a ProtocolViolation that `receive` raises: nothing that follows can be
trusted. Keys that break a rule only void this negotiation: the initiator resets it and notes the
`failure`; `TextResponder.receive` raises, and the caller answers with a Reject PDU.
"""

from collections.abc import Callable, Sequence
from typing import Final

from orion_iscsifs.errors import NegotiationFailed, OrionError, ProtocolViolation
from orion_iscsifs.protocol.keys import REJECT, Parameters, Role
from orion_iscsifs.protocol.login_stages import EXCHANGES_MAX
from orion_iscsifs.protocol.pdu import NO_TAG, TextRequest, TextResponse
from orion_iscsifs.protocol.text import (
    TEXT_BYTES_MAX,
    Pair,
    TextReader,
    encode_text,
    split_text,
)
from orion_iscsifs.protocol.text_terms import SEND_TARGETS, TextTerms

_BYTES_PER_EXCHANGE_MIN: Final = 256
"""A long answer may take as many exchanges as if every response held this much."""

Directory = Callable[[str], Sequence[Pair] | None]
"""Answers SendTargets: `All`, a target's name, or empty for the session's own target. None is a
question that this session does not answer (Appendix C: `All` in a normal session)."""


class TextExchange:
    """The initiator's side of one text exchange.

    `text_bytes_max` bounds what the target may send in all; `parameters` are those of the
    connection that carries the exchange.
    """

    def __init__(
        self,
        *,
        initiator_task_tag: int,
        parameters: Parameters,
        immediate: bool = False,
        text_bytes_max: int = TEXT_BYTES_MAX,
    ) -> None:
        assert initiator_task_tag != NO_TAG
        self.parameters = parameters
        self.pairs: list[Pair] = []
        """What the target has said, answers included, in order."""
        self.done = False
        self.failure: OrionError | None = None
        self._base = parameters
        self._tag = initiator_task_tag
        self._immediate = immediate
        self._bytes_max = text_bytes_max
        self._exchanges_max = EXCHANGES_MAX + text_bytes_max // _BYTES_PER_EXCHANGE_MIN
        self._begin()

    def _begin(self) -> None:
        self.parameters, self.pairs = self._base, []
        self.done, self.failure = False, None
        self._terms = TextTerms(Role.INITIATOR, TextResponse.name)
        self._reader = TextReader(TextResponse.name, self._bytes_max)
        self._received_bytes = 0
        self._exchanges = 0
        self._unsent: list[bytes] = []
        self._asked_final = False

    def start(self, pairs: Sequence[Pair]) -> TextRequest:
        """The first request of an exchange; whatever was going on before is forgotten."""
        self._begin()
        self._terms.declare(pairs)
        return self._send(pairs, NO_TAG, 0)

    def receive(self, response: TextResponse) -> TextRequest | None:
        """The next request, or None: the exchange is over. Raises ProtocolViolation."""
        assert not self.done
        self._check(response)
        if self.failure is not None:
            self._end_reset(response)
            return None
        if self._unsent:
            return self._next_request(response.target_transfer_tag, response.lun)
        self._reader.feed(response.data)
        # Some targets cut a long answer anywhere and do not set the C bit.
        if response.continued or not (response.final or self._reader.is_whole):
            return self._send([], response.target_transfer_tag, response.lun)
        pairs = self._reader.finish()
        try:
            answers = self._terms.take(pairs)
        except ProtocolViolation as violation:
            return self._void(violation, response)
        self.pairs += pairs
        if not response.final:
            return self._send(answers, response.target_transfer_tag, response.lun)
        self._finish(answers)
        return None

    def rejected(self, reason: int) -> None:
        """The target answered with a Reject PDU: it has reset the negotiation (§6.4)."""
        assert not self.done
        self.done = True
        self.failure = NegotiationFailed(
            f"the target rejected a {TextRequest.name} (reason {reason:#04x})"
        )

    def _finish(self, answers: Sequence[Pair]) -> None:
        open_keys = [key for key, value in answers if value == REJECT]
        if open_keys:
            problem = f"F is 1 although {open_keys[0]} needs an answer"
            self.failure = ProtocolViolation(TextResponse.name, problem, section="11.11.1")
        else:
            self.parameters = self._terms.conclude(self._base)
        self.done = True

    def _void(self, violation: ProtocolViolation, response: TextResponse) -> TextRequest | None:
        """§6.4: the initiator MUST reset the negotiation."""
        self.failure = violation
        self.done = response.final
        return None if response.final else self._send([], NO_TAG, 0)

    def _end_reset(self, response: TextResponse) -> None:
        """The answer to an empty request: over, whatever the target would still like to say."""
        if not response.final:
            raise self._violation("no end after a reset of the negotiation", "11.10.4")
        self.done = True

    def _check(self, response: TextResponse) -> None:
        if response.initiator_task_tag != self._tag:
            raise self._violation("another Initiator Task Tag", "11.11.3")
        if response.continued and response.final:
            raise self._violation("C and F are both 1", "11.11.2")
        if response.final and not self._asked_final:
            raise self._violation("F is 1 in answer to F=0", "11.11.1")
        if not response.final and response.target_transfer_tag == NO_TAG:
            raise self._violation("F=0 without a Target Transfer Tag", "11.11.4")
        if self._unsent and (response.data or response.continued):
            raise self._violation("our text is not complete, yet this is no empty answer", "6.2")
        self._exchanges += 1
        if self._exchanges > self._exchanges_max:
            raise self._violation(f"no end after {self._exchanges_max} exchanges", "6.2")
        self._received_bytes += len(response.data)
        if self._received_bytes > self._bytes_max:
            raise self._violation(f"more than {self._bytes_max} bytes of text", "6.1")

    def _send(self, pairs: Sequence[Pair], tag: int, lun: int) -> TextRequest:
        self._unsent = split_text(encode_text(pairs), self._base.max_send_data_segment_length)
        return self._next_request(tag, lun)

    def _next_request(self, tag: int, lun: int) -> TextRequest:
        data = self._unsent.pop(0)
        # We always want to finish; the target says when (§6.4).
        self._asked_final = not self._unsent
        return TextRequest(
            initiator_task_tag=self._tag,
            final=self._asked_final,
            continued=not self._asked_final,
            lun=lun,
            target_transfer_tag=tag,
            immediate=self._immediate,
            data=data,
        )

    def _violation(self, problem: str, section: str) -> ProtocolViolation:
        return ProtocolViolation(TextResponse.name, problem, section=section)


class TextResponder:
    """The target's side of the text exchanges of one connection, one at a time (§11.10).

    `parameters` are the connection's and follow each exchange that succeeds. A ProtocolViolation
    from `receive` has reset the negotiation: the caller sends a Reject PDU ("protocol error").
    """

    def __init__(
        self,
        directory: Directory,
        parameters: Parameters,
        *,
        text_bytes_max: int = TEXT_BYTES_MAX,
    ) -> None:
        self.parameters = parameters
        self._directory = directory
        self._bytes_max = text_bytes_max
        self._wanted: Sequence[Pair] = ()
        self._bookmark = 0
        self._reset(NO_TAG)

    def propose(self, pairs: Sequence[Pair]) -> None:
        """What to declare in the next exchange; an Async Message (event 4) asks for one."""
        self._wanted = tuple(pairs)

    def _reset(self, task_tag: int) -> None:
        self._task_tag = task_tag
        self._immediate = False
        # Another bookmark for each exchange: a stale one is found out.
        self._bookmark = (self._bookmark + 1) % NO_TAG
        self._terms = TextTerms(Role.TARGET, TextRequest.name)
        self._reader = TextReader(TextRequest.name, self._bytes_max)
        self._unsent: list[bytes] = []
        self._exchanges = 0
        self._declared: Sequence[Pair] | None = None
        """This side's own pairs, None before its first answer of this exchange."""

    def receive(self, request: TextRequest) -> TextResponse:
        """The response. Raises ProtocolViolation: the exchange is void, nothing has changed."""
        try:
            return self._respond(request)
        except ProtocolViolation:
            self._reset(NO_TAG)
            raise

    def _respond(self, request: TextRequest) -> TextResponse:
        if request.target_transfer_tag == NO_TAG:
            self._reset(request.initiator_task_tag)
            self._immediate = request.immediate
        self._check(request)
        if not self._unsent:
            self._reader.feed(request.data)
            if request.continued:
                return self._response(request, b"", final=False, continued=False)
            self._unsent = self._answer(self._reader.finish())
        return self._next_response(request)

    def _check(self, request: TextRequest) -> None:
        known = request.target_transfer_tag in (NO_TAG, self._bookmark)
        if not known or request.initiator_task_tag != self._task_tag or self._task_tag == NO_TAG:
            raise self._violation("an unknown Target Transfer Tag", "11.10.4")
        if request.immediate is not self._immediate:
            raise self._violation("another I bit within one exchange", "11.10.3")
        if request.continued and request.final:
            raise self._violation("C and F are both 1", "11.10.2")
        if self._unsent and (request.data or request.continued):
            raise self._violation("our text is not complete, yet this is no empty request", "6.2")
        self._exchanges += not self._unsent
        if self._exchanges > EXCHANGES_MAX:
            raise self._violation(f"no end after {EXCHANGES_MAX} exchanges", "6.2")

    def _answer(self, pairs: Sequence[Pair]) -> list[bytes]:
        """Everything that one complete text of the initiator is answered with."""
        answers: list[Pair] = []
        for key, value in pairs:
            answers += self._terms.take([(key, value)])
            if key == SEND_TARGETS:
                answers += self._list_targets(value)
        if self._declared is None:
            # No other key may stand in an answer to SendTargets (Appendix C).
            listing = any(key == SEND_TARGETS for key, _ in pairs)
            self._declared = () if listing else self._wanted
            self._terms.declare(self._declared)
            answers += self._declared
        return split_text(encode_text(answers), self.parameters.max_send_data_segment_length)

    def _list_targets(self, wanted: str) -> list[Pair]:
        found = self._directory(wanted)
        if found is None:
            return [(SEND_TARGETS, REJECT)]
        assert all(key in ("TargetName", "TargetAddress") for key, _ in found)
        return list(found)

    def _next_response(self, request: TextRequest) -> TextResponse:
        data = self._unsent.pop(0)
        more = bool(self._unsent)
        # F=1 only answers F=1: the initiator may have more to say (§11.11.1).
        final = request.final and not more
        response = self._response(request, data, final=final, continued=more)
        if final:
            self._conclude()
        return response

    def _conclude(self) -> None:
        if self._wanted is self._declared:
            self._wanted = ()
        self.parameters = self._terms.conclude(self.parameters)
        self._reset(NO_TAG)

    def _response(
        self, request: TextRequest, data: bytes, *, final: bool, continued: bool
    ) -> TextResponse:
        return TextResponse(
            initiator_task_tag=request.initiator_task_tag,
            final=final,
            continued=continued,
            lun=request.lun,
            target_transfer_tag=NO_TAG if final else self._bookmark,
            data=data,
        )

    def _violation(self, problem: str, section: str) -> ProtocolViolation:
        return ProtocolViolation(TextRequest.name, problem, section=section)

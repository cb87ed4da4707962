"""Text Requests in full feature phase: SendTargets and nothing else (RFC 7143 §11.10, App. C).

Pure. A long answer is cut into segments; the initiator fetches each with an empty request.
"""

from collections.abc import Callable, Sequence
from typing import Final

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol.keys import KEYS, NOT_UNDERSTOOD, REJECT
from orion_iscsifs.protocol.pdu import NO_TAG, TextRequest, TextResponse
from orion_iscsifs.protocol.text import Pair, TextReader, encode_text, split_text

_OUR_TAG: Final = 1
"""One exchange at a time, so one Target Transfer Tag will do."""

Directory = Callable[[str], Sequence[Pair]]
"""Answers SendTargets: `All`, a target's name, or empty for the session's own target."""


class TextExchange:
    """The text negotiation of one connection; a new request without a tag begins it anew."""

    def __init__(self, directory: Directory, segment_bytes_max: int) -> None:
        self._directory = directory
        self._segment_bytes_max = segment_bytes_max
        self._reader = TextReader(TextRequest.name)
        self._segments: list[bytes] = []

    def receive(self, request: TextRequest) -> TextResponse:
        """Raises ProtocolViolation for text that is none."""
        if request.target_transfer_tag == NO_TAG:
            self._reader = TextReader(TextRequest.name)
            self._segments = []
        elif request.target_transfer_tag != _OUR_TAG:
            raise ProtocolViolation(request.name, "an unknown Target Transfer Tag", section="11.10")
        self._reader.feed(request.data)
        if request.continued:
            return self._response(request, b"", final=False, continued=False)
        pairs = self._reader.finish()
        if pairs or not self._segments:
            text = encode_text([answer for pair in pairs for answer in self._answer(*pair)])
            self._segments = split_text(text, self._segment_bytes_max)
        segment = self._segments.pop(0)
        more = bool(self._segments)
        # F=1 only answers F=1: the initiator may have more to ask (§11.11.1).
        return self._response(request, segment, final=request.final and not more, continued=more)

    def _answer(self, key: str, value: str) -> Sequence[Pair]:
        if key == "SendTargets":
            return self._directory(value)
        return [(key, REJECT if key in KEYS else NOT_UNDERSTOOD)]

    def _response(
        self, request: TextRequest, data: bytes, *, final: bool, continued: bool
    ) -> TextResponse:
        return TextResponse(
            initiator_task_tag=request.initiator_task_tag,
            final=final,
            continued=continued,
            lun=request.lun,
            target_transfer_tag=NO_TAG if final else _OUR_TAG,
            data=data,
        )

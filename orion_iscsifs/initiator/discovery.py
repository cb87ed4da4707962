"""SendTargets discovery: which targets a portal knows (RFC 7143 §4.3, §11.10, Appendix C).

A discovery session is a login, one text exchange, and a logout. `TextExchange` knows the rules of
the text; this file moves its PDUs and what may come between them. Requests wait for the command
window; a list may take many responses, and each has `command_timeout` to come. The size of the
list, its pairs and its PDUs are bounded. Which addresses are used is `portals.py`'s matter.
"""

import logging
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

import trio

from orion_iscsifs.config import SessionConfig
from orion_iscsifs.errors import (
    ConnectFailed,
    ConnectionLost,
    OrionError,
    ProtocolViolation,
    TransportError,
)
from orion_iscsifs.initiator.dial import LoggedIn, Nexus, Portal, dial
from orion_iscsifs.initiator.portals import (
    DiscoveredTarget,
    LeftOut,
    Rule,
    parse_address,
    parse_targets,
)
from orion_iscsifs.protocol.framing import encode
from orion_iscsifs.protocol.keys import ANSWER_CONSTANTS
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    AsyncMessage,
    LogoutRequest,
    LogoutResponse,
    NopIn,
    NopOut,
    Pdu,
    Reject,
    TextRequest,
    TextResponse,
)
from orion_iscsifs.protocol.pdu.service import AsyncEvent, RejectReason
from orion_iscsifs.protocol.sequence import CommandWindow, StatusCounter
from orion_iscsifs.protocol.text import Pair
from orion_iscsifs.protocol.text_negotiation import TextExchange

__all__ = [
    "DiscoveredTarget",
    "DiscoveryRefused",
    "LeftOut",
    "Rule",
    "discover",
    "parse_address",
    "parse_targets",
]

log = logging.getLogger(__name__)

_FIRST_CMD_SN: Final = 1
_ANSWER_BYTES_MAX: Final = 4 << 20
"""Bound for a whole list of targets: some 30,000 of them."""
_ANSWER_PAIRS_MAX: Final = 1 << 18
_ANSWER_TIMEOUTS_MAX: Final = 10
"""So many times `command_timeout` for the whole list, however it trickles in."""
_STRAY_PDUS_MAX: Final = 64
"""Pings, async messages and the like before each answer."""
_LOGOUT_TIMEOUT_S: Final = 2.0
_REPETITIONS_MAX: Final = 2
_PASSING_REJECTS: Final = frozenset(
    {RejectReason.NEGOTIATION_RESET, RejectReason.LONG_OPERATION_REJECT}
)
"""The request may be made anew (§11.17.1): the target forgot the exchange, or had no room."""
_EVENTS_THAT_END: Final = frozenset(
    {
        AsyncEvent.TARGET_REQUESTS_LOGOUT,
        AsyncEvent.TARGET_DROPS_CONNECTION,
        AsyncEvent.TARGET_DROPS_ALL_CONNECTIONS,
    }
)


class DiscoveryRefused(OrionError):
    """The portal took the login, but does not answer SendTargets."""

    def __init__(self, portal: Portal, why: str) -> None:
        advice = "name the target in the URL: iscsi://HOST/IQN"
        super().__init__(f"{portal}: the target refused SendTargets: {why}", advice=advice)


async def discover(portal: Portal, config: SessionConfig, isid: bytes) -> list[DiscoveredTarget]:
    """Ask the portal for all targets; logs out in order, whatever the answer was.

    Raises TransportError, LoginError, ProtocolViolation, DiscoveryRefused.
    """
    nexus = Nexus(target_name=None, isid=isid, config=config)
    logged_in = await dial(portal, nexus, cmd_sn=_FIRST_CMD_SN)
    reached = logged_in.wire.local.rpartition(":")[0].strip("[]")
    session = _DiscoverySession(logged_in, portal, config.command_timeout_s or float("inf"))
    try:
        try:
            pairs = await session.send_targets()
        finally:
            # The answer is there or never comes: how the connection ends does not matter.
            with trio.move_on_after(_LOGOUT_TIMEOUT_S), suppress(OrionError):
                await session.logout()
    finally:
        logged_in.wire.close()
    targets = parse_targets(pairs, portal, reached)
    _log_left_out(targets)
    return targets


def _log_left_out(targets: Iterable[DiscoveredTarget]) -> None:
    for target in targets:
        for address in target.left_out:
            log.info("%s: address %.80a is not used: %s", target.name, address.text, address.rule)


class _Rejected(Exception):
    """A Reject PDU came instead of the Text Response."""

    def __init__(self, reason: int) -> None:
        super().__init__(reason)
        self.reason = reason


class _Ended(TransportError):
    """The target asked for the end of the session: it is still logged out in order (§11.9.1)."""


class _DiscoverySession:
    """The few PDUs of a discovery session, one request at a time."""

    def __init__(self, logged_in: LoggedIn, portal: Portal, silence_s: float) -> None:
        self._wire = logged_in.wire
        self._parameters = logged_in.parameters
        self._portal = portal
        self._silence_s = silence_s
        self._status = StatusCounter(logged_in.exp_stat_sn)
        self._window = CommandWindow(logged_in.cmd_sn, logged_in.exp_cmd_sn, logged_in.max_cmd_sn)
        self._tag = 0
        self._usable = True
        self._strays_left = _STRAY_PDUS_MAX
        self._received = logged_in.early

    async def send_targets(self) -> list[Pair]:
        """All pairs of the answer, however many PDUs it takes (§11.11)."""
        whole_s = _ANSWER_TIMEOUTS_MAX * self._silence_s
        try:
            with trio.fail_after(whole_s):
                return await self._until_told()
        except trio.TooSlowError:
            self._usable = False
            raise ConnectFailed(
                f"{self._portal}: no answer to SendTargets",
                advice="try again, with a longer command_timeout if the list is long",
            ) from None
        except (ProtocolViolation, ConnectionLost):
            self._usable = False
            raise

    async def _until_told(self) -> list[Pair]:
        for repetitions_left in range(_REPETITIONS_MAX, -1, -1):
            try:
                return await self._ask_once()
            except _Rejected as rejected:
                if rejected.reason not in _PASSING_REJECTS or not repetitions_left:
                    why = f"Reject, reason {rejected.reason:#04x}{_named(rejected.reason)}"
                    raise DiscoveryRefused(self._portal, why) from None
        raise AssertionError("unreachable: the last round returns or raises")

    async def _ask_once(self) -> list[Pair]:
        self._tag += 1
        exchange = TextExchange(
            initiator_task_tag=self._tag,
            parameters=self._parameters,
            text_bytes_max=_ANSWER_BYTES_MAX,
        )
        request: TextRequest | None = exchange.start([("SendTargets", "All")])
        pairs_left = _ANSWER_PAIRS_MAX
        while request is not None:
            response = await self._ask(request)
            pairs_left -= bytes(response.data).count(b"\0")
            if pairs_left < 0:
                raise ProtocolViolation(
                    response.name, f"more than {_ANSWER_PAIRS_MAX} key=value pairs", section="C"
                )
            request = exchange.receive(response)
        if exchange.failure is not None:
            raise exchange.failure
        for key, value in exchange.pairs:
            if key == "SendTargets" and value in ANSWER_CONSTANTS:
                raise DiscoveryRefused(self._portal, f"SendTargets={value}")
        return exchange.pairs

    async def _ask(self, request: TextRequest) -> TextResponse:
        """Send one request, wait for its response. Raises _Rejected, ProtocolViolation, …"""
        with trio.fail_after(self._silence_s):
            while not self._window.free:
                self._take_stray(await self._next())
            request.cmd_sn = self._window.take()
            await self._send(request)
            self._strays_left = _STRAY_PDUS_MAX
            while True:
                pdu = await self._next()
                if isinstance(pdu, TextResponse):
                    self._window.update(pdu.exp_cmd_sn, pdu.max_cmd_sn)
                    if self._status.advance(pdu.stat_sn, pdu.name):
                        return pdu
                elif isinstance(pdu, Reject):
                    self._take_reject(pdu, request.cmd_sn)
                else:
                    self._take_stray(pdu)

    def _take_reject(self, pdu: Reject, cmd_sn: int) -> None:
        self._window.update(pdu.exp_cmd_sn, pdu.max_cmd_sn)
        if not self._status.advance(pdu.stat_sn, pdu.name):
            return
        if pdu.exp_cmd_sn == cmd_sn:
            # It was not counted: the next request fills the gap it would leave (§7.3).
            self._window.cmd_sn = cmd_sn
        raise _Rejected(pdu.reason)

    def _take_stray(self, pdu: Pdu) -> None:
        """What may come at any time, and is no answer."""
        self._strays_left -= 1
        if self._strays_left < 0:
            problem = f"{_STRAY_PDUS_MAX} PDUs, and no answer to SendTargets among them"
            raise ProtocolViolation(pdu.name, problem, section="11.11")
        if isinstance(pdu, NopIn):
            self._window.update(pdu.exp_cmd_sn, pdu.max_cmd_sn)
            return
        if isinstance(pdu, AsyncMessage):
            self._window.update(pdu.exp_cmd_sn, pdu.max_cmd_sn)
            fresh = self._status.advance(pdu.stat_sn, pdu.name)
            if fresh and pdu.async_event in _EVENTS_THAT_END:
                raise _Ended(f"{self._portal}: the target ends the discovery session")
            return
        raise ProtocolViolation(pdu.name, "where the answer to SendTargets was due", section="4.3")

    async def logout(self) -> None:
        """Close the session (§11.14), unless the connection can't be trusted any more."""
        if not self._usable:
            return
        self._tag += 1
        await self._send(LogoutRequest(self._tag, cmd_sn=self._window.cmd_sn))
        for _ in range(_STRAY_PDUS_MAX):
            if isinstance(await self._next(), LogoutResponse):
                return

    async def _send(self, pdu: TextRequest | LogoutRequest | NopOut) -> None:
        pdu.exp_stat_sn = self._status.exp_stat_sn
        framer = self._wire.framer
        await self._wire.send(
            encode(pdu, header_digest=framer.header_digest, data_digest=framer.data_digest)
        )

    async def _next(self) -> Pdu:
        """The next PDU; a ping is answered on the way (§11.18)."""
        # The wire does not yield while bytes are there: a flood must not outrun the time-outs.
        await trio.lowlevel.checkpoint()
        while not self._received:
            self._received = await self._wire.receive()
        pdu = self._received.pop(0)
        if isinstance(pdu, NopIn) and pdu.target_transfer_tag != NO_TAG:
            await self._send(
                NopOut(NO_TAG, pdu.target_transfer_tag, pdu.lun, cmd_sn=self._window.cmd_sn)
            )
        return pdu


def _named(reason: int) -> str:
    try:
        return f" ({RejectReason(reason).name.replace('_', ' ').lower()})"
    except ValueError:
        return ""

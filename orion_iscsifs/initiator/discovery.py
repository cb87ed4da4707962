"""SendTargets discovery: which targets a portal knows (RFC 7143 §4.3 and Appendix C)."""

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import trio

from orion_iscsifs.config import SessionConfig
from orion_iscsifs.errors import ConnectFailed, OrionError, ProtocolViolation
from orion_iscsifs.initiator.dial import LoggedIn, Nexus, Portal, dial
from orion_iscsifs.protocol.framing import encode
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    LogoutRequest,
    LogoutResponse,
    NopIn,
    NopOut,
    Pdu,
    TextRequest,
    TextResponse,
)
from orion_iscsifs.protocol.sequence import StatusCounter
from orion_iscsifs.protocol.text import TextReader, encode_text

log = logging.getLogger(__name__)

_FIRST_CMD_SN: Final = 1
_ANSWER_BYTES_MAX: Final = 16 << 20
"""Bound for a whole list of targets: some 100,000 of them."""
_LOGOUT_TIMEOUT_S: Final = 2.0
_UNSPECIFIED: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 (compared with, not bound to)


@dataclass(frozen=True, slots=True)
class DiscoveredTarget:
    """One TargetName with its addresses, in the portal's order."""

    name: str
    portals: tuple[Portal, ...]


async def discover(portal: Portal, config: SessionConfig, isid: bytes) -> list[DiscoveredTarget]:
    """Ask the portal for all targets. Raises TransportError, LoginError, ProtocolViolation."""
    nexus = Nexus(target_name=None, isid=isid, config=config)
    logged_in = await dial(portal, nexus, cmd_sn=_FIRST_CMD_SN)
    exchange = _Exchange(logged_in)
    try:
        with trio.fail_after(config.command_timeout_s or float("inf")):
            text = await exchange.send_targets()
        # The answer is there: how the connection ends does not matter any more.
        with trio.move_on_after(_LOGOUT_TIMEOUT_S), suppress(OrionError):
            await exchange.logout()
    except trio.TooSlowError:
        raise ConnectFailed(f"{portal}: no answer to SendTargets") from None
    finally:
        logged_in.wire.close()
    return parse_targets(text, portal)


class _Exchange:
    """The few PDUs of a discovery session, one request at a time."""

    def __init__(self, logged_in: LoggedIn) -> None:
        self._wire = logged_in.wire
        self._status = StatusCounter(logged_in.exp_stat_sn)
        self._cmd_sn = logged_in.cmd_sn
        self._tag = 1
        self._received = logged_in.early

    async def send_targets(self) -> list[tuple[str, str]]:
        """All key=value pairs of the answer, however many PDUs it takes (§11.11)."""
        reader = TextReader(TextResponse.name, _ANSWER_BYTES_MAX)
        data, ttt = encode_text([("SendTargets", "All")]), NO_TAG
        while True:
            response = await self._ask(data, ttt)
            reader.feed(response.data)
            if response.final:
                return reader.finish()
            if response.target_transfer_tag == NO_TAG:
                raise ProtocolViolation(
                    response.name, "F=0 without a Target Transfer Tag", section="11.11.3"
                )
            data, ttt = b"", response.target_transfer_tag

    async def _ask(self, data: bytes, ttt: int) -> TextResponse:
        request = TextRequest(
            self._tag,
            target_transfer_tag=ttt,
            cmd_sn=self._cmd_sn,
            exp_stat_sn=self._status.exp_stat_sn,
            data=data,
        )
        self._cmd_sn += 1
        await self._send(request)
        response = await self._answer()
        if not isinstance(response, TextResponse) or response.initiator_task_tag != self._tag:
            raise ProtocolViolation(
                response.name, "where the answer to SendTargets was due", section="11.11"
            )
        self._status.advance(response.stat_sn, response.name)
        return response

    async def logout(self) -> None:
        self._tag += 1
        await self._send(
            LogoutRequest(self._tag, cmd_sn=self._cmd_sn, exp_stat_sn=self._status.exp_stat_sn)
        )
        while not isinstance(await self._answer(), LogoutResponse):
            pass

    async def _send(self, pdu: Pdu) -> None:
        await self._wire.send(encode(pdu, header_digest=False, data_digest=False))

    async def _answer(self) -> Pdu:
        """The next PDU that is not a ping; pings are answered (§11.18)."""
        while True:
            while not self._received:
                self._received = await self._wire.receive()
            pdu = self._received.pop(0)
            if not isinstance(pdu, NopIn):
                return pdu
            if pdu.target_transfer_tag != NO_TAG:
                answer = NopOut(NO_TAG, pdu.target_transfer_tag, pdu.lun, cmd_sn=self._cmd_sn)
                answer.exp_stat_sn = self._status.exp_stat_sn
                await self._send(answer)


def parse_targets(pairs: list[tuple[str, str]], asked: Portal) -> list[DiscoveredTarget]:
    """TargetName, each followed by its TargetAddress lines (RFC 7143 Appendix C).

    A target without an address is at the portal that was asked. An address that is none, or that
    names no host (a target bound to 0.0.0.0), is left out; so is one that is listed twice.
    """
    found: dict[str, list[Portal]] = {}
    portals: list[Portal] | None = None
    for key, value in pairs:
        if key == "TargetName":
            portals = found.setdefault(value, [])
        elif key == "TargetAddress":
            if portals is None:
                raise ProtocolViolation(
                    "Text Response", "TargetAddress before any TargetName", section="C"
                )
            _add_address(portals, value)
    return [DiscoveredTarget(name, tuple(found[name]) or (asked,)) for name in found]


def _add_address(portals: list[Portal], text: str) -> None:
    try:
        portal = parse_address(text)
    except ProtocolViolation as error:
        log.warning("%s", error)
        return
    if portal not in portals and portal.host not in _UNSPECIFIED:
        portals.append(portal)


def parse_address(text: str) -> Portal:
    """`host[:port][,portal-group-tag]` (RFC 7143 §13.8); raises ProtocolViolation."""
    address, _, tag = text.partition(",")
    host, separator, port = address.rpartition(":")
    if not separator or "]" in port:
        host, port = address, "3260"
    host = host.removeprefix("[").removesuffix("]")
    try:
        portal = Portal(host, int(port), int(tag) if tag else None)
    except ValueError:
        portal = Portal("", 0)
    if not host or not 0 < portal.port < 1 << 16:
        raise ProtocolViolation(
            "Text Response", f"TargetAddress {text[:80]!r} is no address", section="13.8"
        )
    return portal

"""Asynchronous Messages, and what they announce (RFC 7143 §11.9)."""

from typing import TYPE_CHECKING

import trio

from orion_iscsifs.protocol.pdu import AsyncEvent, AsyncMessage

if TYPE_CHECKING:
    from orion_iscsifs.target.channel import Channel


def send(
    channel: "Channel",
    event: int,
    parameters: tuple[int, int, int] = (0, 0, 0),
    *,
    vcode: int = 0,
    lun: int = 0,
    data: bytes = b"",
) -> None:
    """Say it, and no more."""
    channel.send_status(AsyncMessage(event, vcode, *parameters, lun=lun, data=data))
    channel.flush()


def act_out(
    channel: "Channel", event: int, parameters: tuple[int, int, int] = (0, 0, 0), *, vcode: int = 0
) -> None:
    """Say it and do it: a logout that does not come in time, a drop, a negotiation.

    Parameter3 is how long the initiator has, in seconds (events 1 and 4).
    """
    session = channel.session
    if event == AsyncEvent.TARGET_DROPS_CONNECTION:
        parameters = (channel.cid, *parameters[1:])
    send(channel, event, parameters, vcode=vcode)
    wait_s, retain_s = parameters[1:]
    match event:
        case AsyncEvent.TARGET_REQUESTS_LOGOUT:
            channel.ask_for_logout()
            session.later(_drop_unless_logged_out, channel, retain_s)
        case AsyncEvent.TARGET_DROPS_CONNECTION:
            channel.times_s = (wait_s, retain_s)
            session.later(_drop, [channel])
        case AsyncEvent.TARGET_DROPS_ALL_CONNECTIONS:
            for other in session.channels.values():
                other.times_s = (wait_s, retain_s)
            session.later(_drop, list(session.channels.values()))
        case AsyncEvent.TARGET_REQUESTS_NEGOTIATION:
            if retain_s:
                session.later(_ask_again_for_text, channel, retain_s, channel.text_requests)


async def _drop(channels: "list[Channel]") -> None:
    for channel in channels:
        await channel.connection.drain()
        channel.drop()


async def _drop_unless_logged_out(channel: "Channel", delay_s: float) -> None:
    """The deadline of event 1 has passed: event 2, then the drop."""
    await trio.sleep(delay_s)
    if channel.live and not channel.logged_out:
        channel.session.stats.ignored_events += 1
        act_out(channel, AsyncEvent.TARGET_DROPS_CONNECTION, (0, *channel.times_s))


async def _ask_again_for_text(channel: "Channel", delay_s: float, before: int) -> None:
    """The deadline of event 4 has passed without a Text Request: once more."""
    await trio.sleep(delay_s)
    if channel.live and channel.text_requests == before:
        channel.session.stats.ignored_events += 1
        send(channel, AsyncEvent.TARGET_REQUESTS_NEGOTIATION, (0, 0, int(delay_s)))

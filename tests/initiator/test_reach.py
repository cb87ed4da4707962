"""The portals of one target, tried in turn: dead ones cost little, and no login is in parallel."""

import socket
from collections.abc import Iterator

import pytest
import trio

from orion_iscsifs.errors import (
    AuthenticationFailed,
    ConnectFailed,
    DeviceError,
    OrionError,
    TargetNotFound,
)
from orion_iscsifs.initiator.addresses import Portal
from orion_iscsifs.initiator.portals import DiscoveredTarget
from orion_iscsifs.initiator.reach import Attempts
from tests.initiator.peer import CONFIG

NAME = "iqn.2026-11.org.example:disk"


@pytest.fixture
def listening() -> Iterator[Portal]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Portal("127.0.0.1", listener.getsockname()[1])


def closed() -> Portal:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return Portal("127.0.0.1", listener.getsockname()[1])


def attempts(dialled: Portal, *listed: Portal) -> Attempts:
    return Attempts(DiscoveredTarget(NAME, listed), dialled, CONFIG)


async def test_the_dialled_portal_first_and_nobody_else_is_bothered() -> None:
    dialled = closed()
    assert await attempts(dialled, closed()).next() == dialled


async def test_dead_portals_are_passed_over(listening: Portal) -> None:
    dialled, dead = closed(), closed()
    tries = attempts(dialled, dead, listening)
    assert await tries.next() == dialled
    tries.failed(dialled, TargetNotFound("not here"))
    assert await tries.next() == listening
    tries.failed(listening, ConnectFailed("gone"))
    assert await tries.next() is None
    assert isinstance(tries.verdict(), TargetNotFound), "what a target said comes first"


async def test_silent_portals_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pain 22: ten of them cost what one costs."""
    monkeypatch.setattr("orion_iscsifs.initiator.reach._LOOK_TIMEOUT_S", 0.3)

    async def silence(_portal: Portal, _bind: str | None) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr("orion_iscsifs.initiator.reach.resolve", silence)
    dialled = Portal("192.0.2.1")
    tries = attempts(dialled, *(Portal(f"192.0.2.{n}") for n in range(2, 12)))
    await tries.next()
    tries.failed(dialled, ConnectFailed("192.0.2.1:3260: refused"))
    with trio.fail_after(1.5):
        assert await tries.next() is None
    line = tries.verdict().line
    assert line.startswith(f"{NAME}: none of its portals can be reached: 192.0.2.1:3260: refused")
    assert "192.0.2.2:3260: no answer within 0.3 s" in line
    assert "and 7 more" in line


@pytest.mark.parametrize("error", [AuthenticationFailed("wrong secret"), DeviceError("no disk")])
async def test_what_no_other_portal_can_help_ends_it(error: OrionError) -> None:
    dialled = closed()
    tries = attempts(dialled)
    await tries.next()
    with pytest.raises(type(error)):
        tries.failed(dialled, error)

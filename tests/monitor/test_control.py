"""The control socket: progress, refusals, odd clients, dead daemons."""

import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from orion_iscsifs.errors import MountError, OrionError
from orion_iscsifs.monitor.control import (
    ControlClient,
    DaemonSilent,
    Message,
    Operation,
    Send,
    clients,
    serve,
    socket_path,
)


async def counts(send: Send) -> Message:
    for number in range(3):
        await send({"number": number})
    return {"sum": 3}


async def refuses(_send: Send) -> Message:
    raise OrionError("flush: the target has gone", advice="bring it back")


async def breaks(_send: Send) -> Message:
    raise ZeroDivisionError("a bug")


async def hangs(_send: Send) -> Message:
    await trio.sleep_forever()
    return {}


OPERATIONS: dict[str, Operation] = {
    "counts": counts,
    "refuses": refuses,
    "breaks": breaks,
    "hangs": hangs,
}


@asynccontextmanager
async def daemon(path: Path) -> AsyncIterator[ControlClient]:
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, path, OPERATIONS)
        yield ControlClient(path)
        nursery.cancel_scope.cancel()


async def test_requests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / ("long" * 40)  # longer than a socket's name may be
    folder.mkdir()
    path = socket_path(folder, "/mnt/" + "x" * 300)
    async with daemon(path) as client:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

        def ask() -> None:
            assert client.is_alive()
            assert client.pid() == os.getpid()
            assert list(client.request("counts")) == [
                {"number": 0},
                {"number": 1},
                {"number": 2},
                {"ok": True, "sum": 3},
            ]
            assert client.ask("counts")["sum"] == 3
            with pytest.raises(MountError, match=r"the target has gone \(bring it back\)"):
                client.ask("refuses")
            with pytest.raises(MountError, match="ZeroDivisionError"):
                client.ask("breaks")
            with pytest.raises(MountError, match="unknown request"):
                client.ask("nothing")
            with pytest.raises(MountError, match="in time"):
                client.ask("hangs", timeout_s=0.1)
            assert [found.path for found in clients(folder)] == [path]

        await trio.to_thread.run_sync(ask)
    assert not path.exists()
    assert "control command breaks" in caplog.text


@pytest.mark.parametrize(
    "sent", [b"", b"\n", b"[]\n", b"{}\n", b'{"op": []}\n', b"x" * 9000, b"[" * 4095 + b"\n"]
)
async def test_odd_clients_do_not_end_it(tmp_path: Path, sent: bytes) -> None:
    async with daemon(tmp_path / "x.sock") as client:

        def odd() -> bytes:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(client.path))
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                answer = b""
                try:
                    while chunk := connection.recv(4096):
                        answer += chunk
                except ConnectionResetError:
                    pass  # it did not read all that was sent
                return answer

        answer = await trio.to_thread.run_sync(odd)
        if answer:
            assert json.loads(answer) == {"ok": False, "error": "control: unknown request"}
        assert (await trio.to_thread.run_sync(client.ask, "counts"))["ok"]


async def test_a_client_that_goes_away(tmp_path: Path) -> None:
    async with daemon(tmp_path / "x.sock") as client:

        def leave() -> None:
            for _ in client.request("counts"):
                return

        await trio.to_thread.run_sync(leave)
        assert (await trio.to_thread.run_sync(client.ask, "counts"))["ok"]


async def test_a_later_daemons_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    async with trio.open_nursery() as later:
        async with daemon(path):
            await later.start(serve, path, OPERATIONS)
        # The first has ended and found a socket that is not its own.
        assert (await trio.to_thread.run_sync(ControlClient(path).ask, "counts"))["ok"]
        later.cancel_scope.cancel()


def test_dead_sockets_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    assert clients(tmp_path) == []
    assert not path.exists()
    with pytest.raises(MountError, match="no connection to the daemon"):
        ControlClient(path).ask("counts")
    assert clients(tmp_path / "nothing") == []


def test_the_socket_of_a_daemon_that_hangs_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "hangs.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(path))  # its queue is full now
            assert ControlClient(path).is_alive()
            assert [client.path for client in clients(tmp_path)] == [path]
            with pytest.raises(DaemonSilent, match="does not answer"):
                ControlClient(path).ask("status", timeout_s=0.1)
        assert path.exists()

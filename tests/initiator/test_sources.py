"""`bind=`: where connections start."""

import socket

import pytest
import trio

from orion_iscsifs.errors import ConnectFailed
from orion_iscsifs.initiator.addresses import Portal, resolve
from orion_iscsifs.initiator.sources import Source


def listener(family: socket.AddressFamily, host: str) -> socket.socket:
    return socket.create_server((host, 0), family=family)


async def connected_from(host: str, family: socket.AddressFamily, bind: str) -> str:
    """Our end's address on a connection to a listener at `host`."""
    with listener(family, host) as server:
        portal = Portal(host, server.getsockname()[1])
        with trio.fail_after(5):
            sock = await (await resolve(portal, bind)).connect()
        with sock:
            return str(sock.getsockname()[0])


@pytest.mark.parametrize("bind", ["127.0.0.2", "127.0.0.77"])
async def test_an_address(bind: str) -> None:
    assert await connected_from("127.0.0.1", socket.AF_INET, bind) == bind


async def test_an_ipv6_address() -> None:
    assert await connected_from("::1", socket.AF_INET6, "::1") == "::1"


async def test_an_interface() -> None:
    assert await connected_from("127.0.0.1", socket.AF_INET, "lo") == "127.0.0.1"


@pytest.mark.parametrize(
    ("bind", "problem"),
    [
        ("192.0.2.1", "bind=192.0.2.1: is no address of this host"),
        ("2001:db8::1", "bind=2001:db8::1: is no address of this host"),
        ("nothing0", "neither an address nor an interface of this host"),
        ("a-name-that-is-too-long-for-an-interface", "neither an address nor an interface"),
    ],
)
async def test_what_is_not_ours(bind: str, problem: str) -> None:
    with pytest.raises(ConnectFailed) as refused:
        await resolve(Portal("127.0.0.1", 1), bind)
    assert problem in str(refused.value)
    assert "ip address" in refused.value.advice


async def test_an_address_of_the_other_family() -> None:
    with pytest.raises(ConnectFailed, match="no address of the same family as bind=127"):
        await resolve(Portal("::1", 1), "127.0.0.1")


def test_an_interface_suits_both_families() -> None:
    source = Source.parse("lo")
    assert source.suits(socket.AF_INET)
    assert source.suits(socket.AF_INET6)
    assert not Source.parse("127.0.0.1").suits(socket.AF_INET6)

"""TLS below a login: good certificates, every kind of bad one, and who else may answer."""

import socket
import ssl
from collections.abc import Awaitable, Callable

import pytest
import trio

from orion_iscsifs.config import TlsConfig
from orion_iscsifs.errors import CertificateRefused, ConnectFailed, NotIscsi, TlsError
from orion_iscsifs.initiator.dial import Portal, dial
from tests.initiator.tls_front import (
    Certificates,
    log_in,
    make_certificates,
    nexus,
    server_context,
    tls_front,
    trusting,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.mark.parametrize(
    ("host", "as_host"),
    [("127.0.0.1", None), ("127.0.0.1", "localhost"), ("::1", None)],
)
async def test_the_name_or_the_address_is_in_the_certificate(
    made: Certificates, host: str, as_host: str | None
) -> None:
    await log_in(server_context(made.server), trusting(made), host=host, as_host=as_host)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_client_certificate(made: Certificates, version: ssl.TLSVersion) -> None:
    server = server_context(made.server, clients=made.ours.ca)
    server.minimum_version = server.maximum_version = version
    both = trusting(made, cert=made.client.cert, key=made.client.key)
    await log_in(server, both)
    with pytest.raises(CertificateRefused, match=r"certificate|TLS handshake") as caught:
        await log_in(server, trusting(made))
    assert "tls_cert=" in caught.value.line


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_client_certificate_that_the_target_does_not_trust(
    made: Certificates, version: ssl.TLSVersion
) -> None:
    server = server_context(made.server, clients=made.ours.ca)
    server.minimum_version = server.maximum_version = version
    stranger = made.theirs.issue(client=True)
    tls = trusting(made, cert=stranger.cert, key=stranger.key)
    with pytest.raises(CertificateRefused, match="does not know the authority of our certificate"):
        await log_in(server, tls)


async def test_a_client_certificate_that_has_expired(made: Certificates) -> None:
    server = server_context(made.server, clients=made.ours.ca)
    old = made.ours.issue(client=True, days=(-2, -1))
    with pytest.raises(CertificateRefused, match="our certificate has expired"):
        await log_in(server, trusting(made, cert=old.cert, key=old.key))


@pytest.mark.parametrize(
    ("names", "days", "self_signed", "words"),
    [
        (["127.0.0.1"], (-2, -1), False, "has expired (renew it"),
        (["127.0.0.1"], (1, 2), False, "is not valid yet (check the clocks"),
        (["127.0.0.1"], (-1, 1), True, "is self-signed and not trusted"),
        (["192.0.2.1", "other.example"], (-1, 1), False, "is not for this address (use the host"),
        ([], (-1, 1), False, "is not for this address"),
    ],
)
async def test_a_certificate_that_is_refused(
    made: Certificates,
    names: list[str],
    days: tuple[float, float],
    self_signed: bool,
    words: str,
) -> None:
    pair = made.ours.issue(*names, days=days, self_signed=self_signed)
    with pytest.raises(CertificateRefused) as caught:
        await log_in(server_context(pair), trusting(made))
    assert words in caught.value.line
    assert not caught.value.retry_may_help


async def test_a_certificate_for_another_name(made: Certificates) -> None:
    pair = made.ours.issue("other.example", "127.0.0.1")
    with pytest.raises(CertificateRefused, match=r"localhost.*is for another host name"):
        await log_in(server_context(pair), trusting(made), as_host="localhost")


async def test_a_certificate_of_a_client_is_none_for_a_server(made: Certificates) -> None:
    with pytest.raises(CertificateRefused, match="is not meant for servers"):
        await log_in(server_context(made.client), trusting(made))


@pytest.mark.parametrize("ca", ["theirs", "system"])
async def test_an_unknown_authority(made: Certificates, ca: str) -> None:
    tls = TlsConfig(ca=str(made.theirs.ca) if ca == "theirs" else None)
    with pytest.raises(CertificateRefused, match="signed by an unknown authority") as caught:
        await log_in(server_context(made.server), tls)
    assert "tls_ca=FILE" in caught.value.line


async def test_the_servers_own_certificate_can_be_trusted(made: Certificates) -> None:
    for self_signed in (True, False):
        pair = made.theirs.issue("127.0.0.1", self_signed=self_signed)
        await log_in(server_context(pair), TlsConfig(ca=str(pair.cert)))


async def test_old_tls_is_refused(made: Certificates) -> None:
    server = server_context(made.server)
    server.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        server.minimum_version = server.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(TlsError, match=r"older than 1\.2"):
        await log_in(server, trusting(made))


async def test_a_file_that_went_bad_under_a_running_mount(made: Certificates) -> None:
    with pytest.raises(CertificateRefused, match="tls_ca=/nonexistent: can't be read: No such"):
        await dial(Portal("127.0.0.1", 1), nexus(TlsConfig(ca="/nonexistent")), cmd_sn=1)


# -- who answers ----------------------------------------------------------------------------------


async def dial_server(
    answer: Callable[[trio.SocketStream], Awaitable[None]], tls: TlsConfig | None, limit_s: float
) -> None:
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, answer, listeners)
        portal = Portal("127.0.0.1", listeners[0].socket.getsockname()[1])
        try:
            await dial(portal, nexus(tls, limit_s), cmd_sn=1)
        except (ConnectFailed, TlsError, NotIscsi) as error:
            failure = error
        nursery.cancel_scope.cancel()
    assert failure is not None
    raise failure


async def test_no_tls_at_the_port(made: Certificates) -> None:
    async def plain(stream: trio.SocketStream) -> None:
        await stream.receive_some(4096)
        await stream.send_all(b"\x3f\x80" + bytes(46))

    with pytest.raises(TlsError, match="the answer is not TLS") as caught:
        await dial_server(plain, trusting(made), 5)
    assert "iscsi://" in caught.value.line


async def test_a_port_that_hangs_up(made: Certificates) -> None:
    async def hang_up(stream: trio.SocketStream) -> None:
        await stream.aclose()

    with pytest.raises(TlsError, match="closed during the TLS handshake: is this a TLS port"):
        await dial_server(hang_up, trusting(made), 5)


async def test_a_port_that_says_nothing(made: Certificates) -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    with pytest.raises(ConnectFailed, match=r"TLS handshake did not end within 0\.1 s"):
        await dial_server(silent, trusting(made), 0.1)


async def test_tls_where_plain_iscsi_was_asked_for(made: Certificates) -> None:
    """OpenSSL hangs up on what is not TLS; others send an alert first."""
    with pytest.raises(NotIscsi, match="closed before any answer") as caught:
        await log_in(server_context(made.server), None)
    assert "iscsis://" in caught.value.line

    async def alert(stream: trio.SocketStream) -> None:
        await stream.receive_some(4096)
        await stream.send_all(bytes.fromhex("15030300020246"))

    with pytest.raises(NotIscsi, match="the answer is TLS") as caught:
        await dial_server(alert, None, 5)
    assert "iscsis://" in caught.value.line


async def test_a_tls_server_without_a_target_behind_it(made: Certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        dead = Portal("127.0.0.1", nobody.getsockname()[1])
    failure: NotIscsi | None = None
    async with tls_front(dead, server_context(made.server), "127.0.0.1") as portal:
        try:
            await dial(portal, nexus(trusting(made)), cmd_sn=1)
        except NotIscsi as error:
            failure = error
    assert failure is not None
    assert "closed before any answer (check what the TLS server forwards to" in failure.line

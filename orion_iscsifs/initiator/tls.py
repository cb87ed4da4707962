"""PDUs over TLS: `Wire`'s interface on a non-blocking `ssl.SSLSocket`.

Theory of operation
-------------------
Both directions share one TLS state, so either may need the socket in the other direction: a read
can owe the peer an answer (a key update) while the socket is full, a write can be held up by
something that has to be read first. OpenSSL says which; `wait_readable` and `send` then wait for
that. trio lets one task wait for one direction of a descriptor, and the other task may be waiting
for just that, so these rare waits use a second descriptor of the same socket (`_twin`).

A write that OpenSSL could not finish must be tried again with the same bytes. `send_nowait` gives
the piece back as the first of what is left, and knows it again by its identity.

Readable bytes may sit decrypted inside OpenSSL where no poll sees them. `receive_nowait` answers
None only after OpenSSL itself has asked for more from the socket, so nothing is left there then.
"""

import contextlib
import socket
import ssl
from collections.abc import Mapping
from typing import Final

import trio

from orion_iscsifs.config.settings import TlsConfig
from orion_iscsifs.config.tls import client_context
from orion_iscsifs.errors import (
    CertificateRefused,
    ConnectionLost,
    OrionError,
    TlsError,
    TransportError,
    UsageError,
)
from orion_iscsifs.initiator.wire import Buffer, Wire
from orion_iscsifs.protocol.framing import Framer
from orion_iscsifs.protocol.pdu import Pdu

_RECORD_BYTES: Final = 16384
"""A full TLS record: small pieces are joined up to this, since each record costs 29 bytes."""
_PIECE_BYTES_MAX: Final = 4 * _RECORD_BYTES
"""For one call of OpenSSL."""
_CALL_BYTES_MAX: Final = 1 << 20
"""For one `send_nowait`: encrypting takes time that other tasks want as well."""


def context(config: TlsConfig) -> ssl.SSLContext:
    """For one login; the files were right when the mount began. Raises CertificateRefused."""
    try:
        return client_context(config)
    except UsageError as error:
        raise CertificateRefused(str(error), advice=error.advice) from None


def _secured(sock: socket.socket, peer: str, tls: ssl.SSLContext, host: str) -> ssl.SSLSocket:
    """`sock` with TLS, not a byte of it exchanged yet; raises TlsError, and closes it then."""
    # An IPv6 zone is ours alone and in no certificate, nor is the dot that ends a full name.
    name = host.partition("%")[0].rstrip(".")
    try:
        # Both are looked at again in there, where a failure would leave the socket open.
        name.encode("idna")
        sock.getpeername()
        return tls.wrap_socket(sock, do_handshake_on_connect=False, server_hostname=name)
    except ValueError as error:
        sock.close()
        raise TlsError(f"{peer}: this host name can't be in a certificate: {error}") from None
    except OSError as error:
        sock.close()
        raise handshake_error(peer, error) from None


class TlsWire(Wire):
    """A `Wire` whose bytes are encrypted. `handshake` comes first.

    Takes `sock` over. The peer's certificate has to be for `host`.
    """

    advice_if_strange = (
        "check what the TLS server forwards to, and whether it wants tls_cert= and tls_key="
    )
    _sock: ssl.SSLSocket

    def __init__(
        self, sock: socket.socket, framer: Framer, peer: str, tls: ssl.SSLContext, host: str
    ) -> None:
        super().__init__(_secured(sock, peer, tls, host), framer, peer)
        self._failure: TransportError | None = None
        self._heard = False
        self._unfinished: Buffer | None = None
        self._read_wants_write = False
        self._write_wants_read = False
        self._twin: socket.socket | None = None

    async def handshake(self) -> None:
        """Raises TlsError."""
        while True:
            try:
                self._sock.do_handshake()
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self._sock)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self._sock)
            except OSError as error:
                raise handshake_error(self.peer, error) from None
            else:
                return

    # -- receiving ---------------------------------------------------------------------------

    async def first_bytes(self, _count: int) -> bytes:
        """Nothing: what can be seen on the socket is encrypted."""
        return b""

    def receive_nowait(self) -> list[Pdu] | None:
        if self._failure is not None:
            raise self._failure
        received = 0
        for buffer in self.framer.buffers():
            count = self._fill(buffer)
            received += count
            if count < len(buffer):
                break
        if received:
            self._heard = True
            return self.framer.received(received)
        if self._failure is not None:
            raise self._failure
        return None

    def _fill(self, buffer: memoryview) -> int:
        """As many bytes as there are, record by record; how the connection ended is kept."""
        filled = 0
        while filled < len(buffer):
            try:
                count = self._sock.recv_into(buffer[filled:])
            except ssl.SSLWantReadError:
                self._read_wants_write = False
                break
            except ssl.SSLWantWriteError:
                self._read_wants_write = True
                break
            except OSError as error:
                self._failure = self._ended(error)
                break
            if count == 0:
                self._failure = ConnectionLost(f"{self.peer}: the target closed the connection")
                break
            filled += count
        return filled

    async def wait_readable(self) -> None:
        if self._read_wants_write:
            await trio.lowlevel.wait_writable(self._second())
        else:
            await trio.lowlevel.wait_readable(self._sock)

    # -- sending -----------------------------------------------------------------------------

    def send_nowait(self, pieces: list[Buffer]) -> list[Buffer]:
        sent = 0
        while pieces and sent < _CALL_BYTES_MAX:
            piece, pieces = self._next_piece(pieces)
            try:
                count = self._sock.send(piece)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as want:
                self._write_wants_read = isinstance(want, ssl.SSLWantReadError)
                self._unfinished = piece
                return [piece, *pieces]
            except OSError as error:
                raise self._explained(self._ended(error)) from None
            self._unfinished = None
            sent += count
            if count < len(piece):
                pieces = [memoryview(piece)[count:], *pieces]
        self._write_wants_read = False
        return pieces

    def _next_piece(self, pieces: list[Buffer]) -> tuple[Buffer, list[Buffer]]:
        """What to encrypt with one call, and what is left after that."""
        first = pieces[0]
        if first is self._unfinished:
            return first, pieces[1:]
        if len(first) > _PIECE_BYTES_MAX:
            whole = memoryview(first)
            return whole[:_PIECE_BYTES_MAX], [whole[_PIECE_BYTES_MAX:], *pieces[1:]]
        count, length = 1, len(first)
        while count < len(pieces) and length + len(pieces[count]) <= _RECORD_BYTES:
            length += len(pieces[count])
            count += 1
        return (first if count == 1 else b"".join(pieces[:count])), pieces[count:]

    async def send(self, pieces: list[Buffer]) -> None:
        while pieces := self.send_nowait(pieces):
            if self._write_wants_read:
                await trio.lowlevel.wait_readable(self._second())
            else:
                await trio.lowlevel.wait_writable(self._sock)

    # -- the end -----------------------------------------------------------------------------

    def shutdown(self) -> None:
        # Not SSLSocket's own: after that, what was received is read without decryption.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._sock.unwrap()  # says goodbye; the peer's answer is not waited for
        self._sock.close()
        if self._twin is not None:
            self._twin.close()

    def _second(self) -> socket.socket:
        if self._twin is None:
            self._twin = socket.socket(fileno=socket.dup(self._sock.fileno()))
        return self._twin

    def _explained(self, ended: TransportError) -> TransportError:
        """Nothing more can be sent. The peer may have said why before it closed the connection.

        With TLS 1.3 our side of the handshake is over before the peer judges our certificate.
        """
        if self._heard or isinstance(ended, TlsError):
            return ended
        self._fill(memoryview(bytearray(1)))
        self._failure = self._failure if isinstance(self._failure, TlsError) else ended
        return self._failure

    def _ended(self, error: OSError) -> TransportError:
        if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return ConnectionLost(f"{self.peer}: the target closed the connection")
        if isinstance(error, ssl.SSLError):
            return _tls_error(self.peer, error)
        return self._lost(error)


# -- what went wrong, in words --------------------------------------------------------------------

_PLAIN: Final = "write iscsi:// if the target has no TLS, or check the port"

# X509_V_ERR_* of OpenSSL: what is wrong with the target's certificate, and what to do.
_UNTRUSTED: Final = "name the authority that signed it with tls_ca=FILE"
_VERDICTS: Final[Mapping[int, tuple[str, str]]] = {
    9: ("is not valid yet", "check the clocks of both hosts"),
    10: ("has expired", "renew it at the target, or check this host's clock"),
    18: ("is self-signed and not trusted", "if it is the right one, name it with tls_ca=FILE"),
    19: ("leads to an authority that is not trusted", _UNTRUSTED),
    20: ("is signed by an unknown authority", _UNTRUSTED),
    21: ("is signed by an unknown authority", _UNTRUSTED),
    23: ("has been revoked", "renew it at the target"),
    26: ("is not meant for servers", "the target needs one with the usage serverAuth"),
    62: ("is for another host name", "use the name that the certificate has"),
    64: ("is not for this address", "use the host name that the certificate has"),
    66: ("has too short a key", "renew it at the target"),
    67: ("is signed with too short a key", "renew it at the target"),
    68: ("is signed with a hash that is too weak", "renew it at the target"),
}
_VERDICT_OTHERWISE: Final = "see the TLS server's configuration"

# Alerts of the peer (RFC 8446 §6.2), by the tail of OpenSSL's name, whose head differs by version.
_OURS: Final = "check tls_cert= and tls_key=, and which authorities the target trusts"
_CERTIFICATE_ALERTS: Final[Mapping[str, tuple[str, str]]] = {
    "CERTIFICATE_REQUIRED": ("the target demands a client certificate", "set tls_cert=, tls_key="),
    "HANDSHAKE_FAILURE": (
        "the target refused the TLS handshake",
        "it may demand a client certificate: set tls_cert= and tls_key=",
    ),
    "BAD_CERTIFICATE": ("the target refused our certificate", _OURS),
    "UNSUPPORTED_CERTIFICATE": ("the target does not support our certificate's kind", _OURS),
    "CERTIFICATE_REVOKED": ("our certificate has been revoked", _OURS),
    "CERTIFICATE_EXPIRED": ("our certificate has expired", "renew tls_cert="),
    "CERTIFICATE_UNKNOWN": ("the target refused our certificate", _OURS),
    "UNKNOWN_CA": ("the target does not know the authority of our certificate", _OURS),
    "ACCESS_DENIED": ("the target does not let our certificate in", _OURS),
    "DECRYPT_ERROR": ("the target could not verify our certificate", _OURS),
}
_OTHER_ALERTS: Final[Mapping[str, tuple[str, str]]] = {
    "PROTOCOL_VERSION": ("the target's TLS is older than 1.2", "enable TLS 1.2 or 1.3 there"),
    "INSUFFICIENT_SECURITY": ("the target wants stronger ciphers", _VERDICT_OTHERWISE),
    "UNRECOGNIZED_NAME": ("the TLS server does not serve this host name", "check the host name"),
}
_OLD: Final = frozenset({"UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE"})
_NOT_TLS: Final = frozenset(
    {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG"}
    | {"UNEXPECTED_MESSAGE", "INVALID_SESSION_ID"}
)


def handshake_error(peer: str, error: OSError) -> OrionError:
    """What ended the handshake."""
    if isinstance(error, ssl.SSLCertVerificationError):
        otherwise = (f"is refused: {error.verify_message}", _VERDICT_OTHERWISE)
        what, advice = _VERDICTS.get(error.verify_code, otherwise)
        return CertificateRefused(f"{peer}: the target's TLS certificate {what}", advice=advice)
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return _tls_error(peer, error)
    return TlsError(
        f"{peer}: the connection was closed during the TLS handshake: is this a TLS port?",
        advice=_PLAIN,
    )


def _tls_error(peer: str, error: ssl.SSLError) -> TlsError:
    """An alert of the peer, or nonsense from it."""
    reason = error.reason or ""
    alert = reason.partition("ALERT_")[2] if "ALERT_" in reason else reason.partition("TLSV1_")[2]
    if alert in _CERTIFICATE_ALERTS:
        what, advice = _CERTIFICATE_ALERTS[alert]
        return CertificateRefused(f"{peer}: {what}", advice=advice)
    if reason in _OLD:
        alert = "PROTOCOL_VERSION"
    if alert in _OTHER_ALERTS:
        what, advice = _OTHER_ALERTS[alert]
        return TlsError(f"{peer}: {what}", advice=advice)
    if reason in _NOT_TLS:
        return TlsError(f"{peer}: the answer is not TLS", advice=_PLAIN)
    words = reason.lower().replace("_", " ") or str(error)
    return TlsError(f"{peer}: TLS failed: {words}", advice=_VERDICT_OTHERWISE)

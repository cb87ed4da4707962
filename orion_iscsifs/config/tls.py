"""A `TlsConfig` becomes an SSL context; what is wrong with its files is said in one line.

The context is made when the settings are read, so that a mistake is found before anything connects,
and again for a login after the files have changed: certificates are renewed under running mounts.
"""

import ssl
import stat
from functools import lru_cache
from pathlib import Path
from typing import Final

from orion_iscsifs.config.settings import TlsConfig
from orion_iscsifs.errors import UsageError

_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"
_TRUSTED: Final = b"-----BEGIN TRUSTED CERTIFICATE-----"
_KEY_END: Final = b"PRIVATE KEY-----"
_FILE_BYTES_MAX: Final = 4 << 20


def client_context(tls: TlsConfig) -> ssl.SSLContext:
    """TLS 1.2 or later, the peer's certificate and name checked. Raises UsageError."""
    stamps = tuple(_stamp(path) for path in (tls.ca, tls.cert, tls.key))
    return _context(tls, stamps)


def key_warnings(tls: TlsConfig) -> list[str]:
    """What the user should know about the file with our private key."""
    path = tls.key or tls.cert
    if path is None or not stat.S_IMODE(Path(path).stat().st_mode) & stat.S_IROTH:
        return []
    option = "tls_key" if tls.key else "tls_cert"
    return [f"{option} {path}: every user can read the private key (chmod 600 {path})"]


@lru_cache(maxsize=4)
def _context(tls: TlsConfig, _stamps: tuple[object, ...]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the peer's certificate and name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    if tls.ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _trust(context, tls.ca)
    if tls.cert is not None:
        _identify(context, tls.cert, tls.key)
    return context


def _trust(context: ssl.SSLContext, path: str) -> None:
    content = _read("tls_ca", path)
    if _CERTIFICATE not in content and _TRUSTED not in content:
        raise _bad("tls_ca", path, "holds no certificate in PEM form", "it begins with -----BEGIN")
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise _bad("tls_ca", path, _words(error), "is the file complete?") from None
    # What the user names is trusted, be it a root, an intermediate or the server's own certificate.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN


def _identify(context: ssl.SSLContext, cert: str, key: str | None) -> None:
    if _CERTIFICATE not in _read("tls_cert", cert):
        raise _bad(
            "tls_cert", cert, "holds no certificate in PEM form", "tls_key= is the option for a key"
        )
    option, path = ("tls_cert", cert) if key is None else ("tls_key", key)
    if _KEY_END not in _read(option, path):
        advice = "add tls_key=FILE" if key is None else "is it the certificate's file?"
        raise _bad(option, path, "holds no private key in PEM form", advice)

    def passphrase() -> str:
        raise _bad(
            option,
            path,
            "the private key is encrypted, and nobody could be asked for its passphrase",
            f"openssl pkey -in {path} -out NEWFILE (chmod 600 NEWFILE)",
        )

    try:
        context.load_cert_chain(cert, key, passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise _bad(
                option, path, f"is not the key of the certificate in {cert}", "name the right pair"
            ) from None
        what = f"certificate and key can't be used: {_words(error)}"
        raise _bad("tls_cert", cert, what, "are both files complete?") from None


def _read(option: str, path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(_FILE_BYTES_MAX)
    except OSError as error:
        why = error.strerror or "can't be read"
        raise UsageError(f"option {option}={path}: can't be read: {why}") from None


def _stamp(path: str | None) -> tuple[int, int] | None:
    """Changes whenever the file is replaced or written; a file that is missing is found later."""
    try:
        status = Path(path).stat() if path is not None else None
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_ino) if status is not None else None


def _words(error: ssl.SSLError) -> str:
    return (error.reason or "no PEM file").lower().replace("_", " ")


def _bad(option: str, path: str, what: str, advice: str) -> UsageError:
    return UsageError(f"option {option}={path}: {what}", advice=advice)

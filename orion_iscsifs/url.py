"""Source URLs (INTERFACE §2), parsed without looking anything up.

    iscsi://[user[%secret]@]host[:port][/iqn[/lun]][?key=value&…]

This is libiscsi's syntax; `iscsis://` is the same over TLS. The first `%` of the part before the
last `@` ends the user's name, so a `%` in a name can't be written; in every part after that, `%41`
is an `A`. `target_user` and `target_password`, libiscsi's words for mutual CHAP, are understood as
well.
"""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote

from orion_iscsifs.errors import UsageError

DEFAULT_PORT: Final = 3260
LUN_MAX: Final = 16383
"""Highest LUN of the flat space addressing method (SAM-5 §4.7.7.3)."""
TARGET_NAME_BYTES_MAX: Final = 223
"""RFC 7143 §4.2.7.1."""

_SCHEMES: Final = frozenset({"iscsi", "iscsis"})
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_TARGET_NAME = re.compile(r"(?:iqn|eui|naa)\.[^\s/]+", re.IGNORECASE)
_HOST_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
_ZONE = re.compile(r"[A-Za-z0-9_.:@-]{1,32}")
_NUMBER = re.compile(r"[0-9]{1,6}")
_SECRET_KEYS: Final = frozenset({"target_password"})
_FORM: Final = "write iscsi://host[:port][/iqn[/lun]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What to mount. `secret` never shows in `repr()`; `redacted()` is what may be shown."""

    host: str
    """A name or an address; an IPv6 address without its brackets."""
    port: int = DEFAULT_PORT
    target: str | None = None
    """The iSCSI name; None: every target that discovery lists."""
    lun: int | None = None
    """None: every disk LUN."""
    tls: bool = False
    """`iscsis://`: nothing goes over the network in the clear."""
    user: str | None = None
    secret: str | None = field(default=None, repr=False)
    query: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Options as in INTERFACE §5; a key without `=` has the value ''."""

    @property
    def portal(self) -> str:
        """`host:port`, an IPv6 address in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def redacted(self) -> str:
        """The URL without its secret and its options, and without the default port."""
        text = "iscsis://" if self.tls else "iscsi://"
        if self.user is not None:
            text += f"{self.user}@"
        # RFC 6874: the '%' before an IPv6 zone is written as %25.
        text += self.portal.replace("%", "%25").removesuffix(f":{DEFAULT_PORT}")
        if self.target is None:
            return text + "/"
        name = self.target.replace("%", "%25")
        return f"{text}/{name}" + ("" if self.lun is None else f"/{self.lun}")

    def __str__(self) -> str:
        return self.redacted()

    @property
    def has_secret(self) -> bool:
        """Whether the URL itself carries a secret, of either direction."""
        return self.secret is not None or bool(_SECRET_KEYS & self.query.keys())


def redact(text: str) -> str:
    """Any text that may be a source URL, with what may be a secret taken out."""
    text = re.sub(r"(?<=://)([^/%@]*)%.*@", r"\1@", text)
    return re.sub(r"((?:secret|password)=)[^&,\s]*", r"\1***", text, flags=re.IGNORECASE)


def parse(text: str) -> Source:
    """The `Source` that `text` names. Raises `UsageError`, whose text never shows a secret."""
    match = _SCHEME.fullmatch(text.strip())
    if match is None:
        raise _bad(text, "this is not a URL", _FORM)
    scheme = match[1].lower()
    if scheme not in _SCHEMES:
        raise _bad(text, f"unknown scheme {scheme!r}", _FORM)
    rest, _, query = match[2].partition("?")
    authority, _, path = rest.partition("/")
    user_part, at, address = authority.rpartition("@")
    user, secret = _user(text, user_part) if at else (None, None)
    host, port = _address(text, address)
    target, lun = _path(text, path)
    return Source(
        host=host,
        port=port,
        target=target,
        lun=lun,
        tls=scheme == "iscsis",
        user=user,
        secret=secret,
        query=_query(text, query),
    )


def parse_portal(text: str) -> Source:
    """A portal: `host`, `host:port` or a URL without a target."""
    source = parse(text if "://" in text else f"iscsi://{text}")
    if source.target is not None:
        raise _bad(text, "a portal has no target name", "write host[:port]")
    return source


def _bad(text: str, why: str, advice: str) -> UsageError:
    return UsageError(f"source {redact(text)!r}: {why}", advice=advice)


def _user(text: str, part: str) -> tuple[str, str | None]:
    user, percent, secret = part.partition("%")
    if not user:
        raise _bad(text, "the user's name before '@' is empty", "write user%secret@host")
    if percent and not secret:
        raise _bad(text, "the secret between '%' and '@' is empty", "use chap_secret_file=")
    return user, _decode(text, secret) if percent else None


def _address(text: str, address: str) -> tuple[str, int]:
    if address.startswith("["):
        host, bracket, port = address[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise _bad(text, "the brackets of the IPv6 address do not match", "[2001:db8::1]:3260")
        return _ipv6(text, host), _port(text, port[1:]) if port else DEFAULT_PORT
    host, colon, port = address.partition(":")
    if ":" in port:
        raise _bad(text, "an IPv6 address needs brackets", "write [2001:db8::1]:3260")
    if not host:
        raise _bad(text, "the host is missing", _FORM)
    if "%" in host:
        raise _bad(text, "'%' in the host", "in a secret, a '/' is written as %2F")
    if _HOST_NAME.fullmatch(host) is None:
        raise _bad(text, f"{host!r} is no host name", _FORM)
    return host, _port(text, port) if colon else DEFAULT_PORT


def _ipv6(text: str, host: str) -> str:
    host = host.replace("%25", "%")  # RFC 6874 writes a zone as %25eth0
    _, percent, zone = host.partition("%")
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        raise _bad(text, f"{host!r} is no IPv6 address", "write [2001:db8::1]:3260") from None
    if percent and _ZONE.fullmatch(zone) is None:
        raise _bad(text, f"{zone!r} is no IPv6 zone", "write the interface: [fe80::1%25eth0]")
    return host


def _port(text: str, digits: str) -> int:
    if _NUMBER.fullmatch(digits) and 0 < int(digits) < 65536:
        return int(digits)
    raise _bad(text, f"{digits!r} is no port", "a port is a number from 1 to 65535")


def _path(text: str, path: str) -> tuple[str | None, int | None]:
    name, slash, lun = path.rstrip("/").partition("/")
    if not name:
        if slash:
            raise _bad(text, "the target name is missing", _FORM)
        return None, None
    target = _decode(text, name)
    if _TARGET_NAME.fullmatch(target) is None or not target.isprintable():
        raise _bad(
            text,
            f"{target!r} is no target name: it begins with iqn., eui. or naa.",
            "`orion-iscsifs discover HOST` lists the names",
        )
    if len(target.encode()) > TARGET_NAME_BYTES_MAX:
        raise _bad(text, "the target name is too long", f"at most {TARGET_NAME_BYTES_MAX} bytes")
    return target, _lun(text, lun) if slash else None


def _lun(text: str, digits: str) -> int:
    if _NUMBER.fullmatch(digits) and int(digits) <= LUN_MAX:
        return int(digits)
    raise _bad(text, f"{digits!r} is no LUN", f"a LUN is a number from 0 to {LUN_MAX}")


def _query(text: str, query: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in filter(None, query.split("&")):
        key, _, value = item.partition("=")
        if not key:
            raise _bad(text, "an option after '?' has no name", "write ?key=value&key=value")
        pairs[key] = _decode(text, value)
    return pairs


def _decode(text: str, part: str) -> str:
    try:
        return unquote(part, errors="strict")
    except UnicodeDecodeError:
        raise _bad(text, "a %XX sequence is not UTF-8", "write a literal % as %25") from None

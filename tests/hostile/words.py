"""What users and portals write: URLs, options, addresses."""

from typing import Final

from orion_iscsifs.config import words
from orion_iscsifs.errors import ProtocolViolation, UsageError
from orion_iscsifs.initiator.dial import Portal
from orion_iscsifs.initiator.discovery import parse_targets
from orion_iscsifs.url import LUN_MAX, Source, parse, parse_portal, redact
from tests.hostile.draw import Draw
from tests.hostile.wire import check_violation

_SECRET: Final = "s3cretw0rd"
_PREFIXES: Final = ("", "iscsi://", "iscsi://host/", "iscsi://[", "iscsi://u%p@", "iscsis://")


def urls(data: bytes) -> None:
    """A source or a one-line error; a secret shows in neither."""
    draw = Draw(data)
    prefix = draw.choice(_PREFIXES)
    word = draw.rest().decode("utf-8", "replace")
    for parser in (parse, parse_portal):
        try:
            source = parser(prefix + word)
        except UsageError as error:
            assert str(error)
        else:
            _source(source)
    redact(word)


def _source(source: Source) -> None:
    assert source.host
    assert 0 < source.port < 1 << 16
    assert source.lun is None or 0 <= source.lun <= LUN_MAX
    assert source.lun is None or source.target is not None
    assert source.target is None or len(source.target.encode()) <= 223
    again = parse(source.redacted())
    assert (again.portal, again.target, again.lun) == (source.portal, source.target, source.lun)
    assert again.user == source.user


def secrets(data: bytes) -> None:
    """A URL that holds a secret, however wrong it is otherwise, never shows it in an error."""
    draw = Draw(data)
    tail = draw.rest().decode("utf-8", "replace").replace("@", "").replace("/", "")
    for text in (f"iscsi://user%{_SECRET}@{tail}", f"iscsi://host/?chap_secret={_SECRET}&{tail}"):
        assert _SECRET not in redact(text)
        try:
            assert _SECRET not in repr(parse(text))
        except UsageError as error:
            assert _SECRET not in error.line


def options(data: bytes) -> None:
    """An option's text is a value or a one-line error."""
    draw = Draw(data)
    names = (*words.OPTIONS, *words.ALIASES, *words.LATER)
    name = draw.choice(names)
    value = draw.rest().decode("utf-8", "replace")
    for candidate in (name, value):
        try:
            found, _ = words.parse_value(candidate, value)
        except UsageError as error:
            assert "\n" not in error.line
        else:
            assert found in words.OPTIONS


def addresses(data: bytes) -> None:
    """The answer to SendTargets: targets with portals that can be dialled, or a violation."""
    draw = Draw(data)
    pairs = []
    while draw:
        key = draw.choice(("TargetName", "TargetAddress", "TargetAlias"))
        pairs.append((key, draw.block().decode("utf-8", "replace")))
    asked = Portal("192.0.2.1", 3260)
    try:
        targets = parse_targets(pairs, asked)
    except ProtocolViolation as error:
        check_violation(error)
        return
    for target in targets:
        assert target.portals
        for portal in target.portals:
            assert portal.host
            assert 0 < portal.port < 1 << 16
            assert str(portal).isprintable()

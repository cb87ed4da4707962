"""Source URLs: what is understood, what is refused, and that a secret never shows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs import url
from orion_iscsifs.errors import OrionError, UsageError

IQN = "iqn.2024-01.org.example:disk"


@pytest.mark.parametrize(
    ("text", "host", "port", "target", "lun"),
    [
        ("iscsi://h", "h", 3260, None, None),
        ("iscsi://h/", "h", 3260, None, None),
        ("ISCSI://h:3261", "h", 3261, None, None),
        (f"iscsi://h/{IQN}", "h", 3260, IQN, None),
        (f"iscsi://h/{IQN}/", "h", 3260, IQN, None),
        (f"iscsi://h/{IQN}/0", "h", 3260, IQN, 0),
        (f"iscsi://h:1/{IQN}/16383", "h", 1, IQN, 16383),
        ("iscsi://192.0.2.7:65535", "192.0.2.7", 65535, None, None),
        (f"iscsi://[2001:db8::1]/{IQN}/1", "2001:db8::1", 3260, IQN, 1),
        (f"iscsi://[::1]:3261/{IQN}/1", "::1", 3261, IQN, 1),
        ("iscsi://[fe80::1%25eth0]/", "fe80::1%eth0", 3260, None, None),
        ("iscsi://h/iqn.2024-01.org.example%3Adisk/1", "h", 3260, IQN, 1),
        ("iscsi://h/eui.0123456789abcdef/1", "h", 3260, "eui.0123456789abcdef", 1),
    ],
)
def test_parses(text: str, host: str, port: int, target: str | None, lun: int | None) -> None:
    source = url.parse(text)
    assert (source.host, source.port, source.target, source.lun) == (host, port, target, lun)


@pytest.mark.parametrize(("text", "tls"), [("iscsi", False), ("iscsis", True), ("ISCSIS", True)])
def test_tls_is_a_scheme_of_its_own(text: str, tls: bool) -> None:
    source = url.parse(f"{text}://u@h:3261/{IQN}/1")
    assert source.tls is tls
    shown = f"{'iscsis' if tls else 'iscsi'}://u@h:3261/{IQN}/1"
    assert source.redacted() == shown
    assert url.parse(shown) == source
    assert url.parse_portal(f"{text}://h").tls is tls


def test_user_secret_and_query() -> None:
    source = url.parse(f"iscsi://al%p%40ss@word@h/{IQN}/1?ro&cache=none&chap_algs=sha256%2Bmd5")
    assert source.user == "al"
    assert source.secret == "p@ss@word"
    assert source.query == {"ro": "", "cache": "none", "chap_algs": "sha256+md5"}
    assert source.has_secret
    assert not url.parse("iscsi://al@h/").has_secret
    assert url.parse("iscsi://h/?target_password=x").has_secret


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("iscsi://h", "iscsi://h/"),
        (f"iscsi://u%hidden@h:3260/{IQN}/1?x=y", f"iscsi://u@h/{IQN}/1"),
        (f"iscsi://[::1]:99/{IQN}", f"iscsi://[::1]:99/{IQN}"),
    ],
)
def test_redacted(text: str, shown: str) -> None:
    source = url.parse(text)
    assert source.redacted() == str(source) == shown
    assert "hidden" not in repr(source)
    assert url.parse(source.redacted()).portal == source.portal


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a URL"),
        ("host", "not a URL"),
        ("/dev/sda", "not a URL"),
        ("http://h/", "unknown scheme 'http'"),
        ("iscsiss://h/", "unknown scheme 'iscsiss'"),
        ("iscsi:///", "host is missing"),
        ("iscsi://", "host is missing"),
        ("iscsi://@h", "name before '@' is empty"),
        ("iscsi://u%@h", "secret between"),
        ("iscsi://h:0/", "no port"),
        ("iscsi://h:/", "no port"),
        ("iscsi://h:70000/", "no port"),
        ("iscsi://h:²/", "no port"),
        ("iscsi://h:99999999999999999999999/", "no port"),
        ("iscsi://h:x/", "no port"),
        ("iscsi://::1/", "needs brackets"),
        ("iscsi://[::1/", "brackets"),
        ("iscsi://[::1]x/", "brackets"),
        ("iscsi://[zz]/", "no IPv6 address"),
        ("iscsi://[]/", "no IPv6 address"),
        ("iscsi://[fe80::1%]/", "no IPv6 address"),
        ("iscsi://[fe80::1%25\x1b[2J/", "brackets"),
        ("iscsi://[fe80::1%25\x1b2J]/", "no IPv6 zone"),
        ("iscsi://[fe80::1%25" + "x" * 40 + "]/", "no IPv6 zone"),
        ("iscsi://a b/", "no host name"),
        ("iscsi://h/1", "no target name"),
        ("iscsi://h/disk/1", "no target name"),
        ("iscsi://h//1", "target name is missing"),
        (f"iscsi://h/{IQN}/x", "no LUN"),
        (f"iscsi://h/{IQN}/-1", "no LUN"),
        (f"iscsi://h/{IQN}/16384", "no LUN"),
        (f"iscsi://h/{IQN}/1/2", "no LUN"),
        ("iscsi://h/iqn." + "x" * 300, "too long"),
        ("iscsi://h/iqn.%ff", "not UTF-8"),
        ("iscsi://h/?=x", "has no name"),
    ],
)
def test_refuses(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        url.parse(text)
    assert why in str(caught.value)
    assert "\n" not in caught.value.line


def test_an_error_never_shows_the_secret() -> None:
    for text in (
        "iscsi://u%topsecret@h:bad/",
        "iscsi://u%top/secret@h/",
        "http://u%topsecret@h/",
        "iscsi://h:bad/?target_password=topsecret",
    ):
        with pytest.raises(UsageError) as caught:
            url.parse(text)
        assert "top" not in caught.value.line


def test_portal() -> None:
    assert url.parse_portal("h").portal == "h:3260"
    assert url.parse_portal("[::1]:99").portal == "[::1]:99"
    assert url.parse_portal("iscsi://u%s@h").user == "u"
    with pytest.raises(UsageError, match="no target name"):
        url.parse_portal(f"iscsi://h/{IQN}")


@given(st.text(max_size=60))
def test_any_text_parses_or_is_a_usage_error(text: str) -> None:
    for candidate in (text, "iscsi://" + text):
        try:
            source = url.parse(candidate)
        except OrionError as error:
            assert isinstance(error, UsageError)  # noqa: PT017 (either outcome is right)
        else:
            assert 0 < source.port < 65536

"""Options that name files of secrets: LUKS, TLS, CHAP, the key of the local stores."""

import os
import tomllib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from orion_iscsifs.config import (
    MountConfig,
    TlsConfig,
)
from orion_iscsifs.config.build import build
from orion_iscsifs.config.render import to_toml
from orion_iscsifs.config.sources import (
    gather,
    names_secret,
)
from orion_iscsifs.errors import UsageError
from orion_iscsifs.testing.certificates import Authority, private_pem
from tests.test_config import NOWHERE, configured, secret_file, warned

# -- LUKS -----------------------------------------------------------------------------------------


def key_file(folder: Path, content: bytes = b"pass\nword\n\xff") -> Path:
    path = folder / "luks-key"
    path.touch(mode=0o600)
    path.write_bytes(content)
    return path


def test_all_of_a_key_file_is_the_passphrase(tmp_path: Path) -> None:
    path = key_file(tmp_path)
    config, warnings = warned(f"luks_key_file={path}")
    assert not warnings
    assert config.luks is not None
    assert config.luks.passphrase.reveal() == b"pass\nword\n\xff"
    shown = repr(config) + str(config.luks.passphrase) + f"{config.luks.passphrase}"
    shown += to_toml(config, "iscsi://h/")
    assert "word" not in shown
    assert f'luks_key_file = "{path}"' in shown


def test_a_key_file_that_others_can_read_is_warned_about(tmp_path: Path) -> None:
    path = key_file(tmp_path)
    path.chmod(0o644)
    assert any("every user can read it" in text for text in warned(f"luks_key_file={path}")[1])


def test_key_files_that_are_refused(tmp_path: Path) -> None:
    too_large = tmp_path / "large"
    too_large.touch()
    os.truncate(too_large, (8 << 20) + 1)
    empty = key_file(tmp_path, b"")
    for path, why in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "directory"),
        (empty, "empty"),
        (too_large, "more than 8388608 bytes"),
    ):
        with pytest.raises(UsageError, match=why):
            configured(f"luks_key_file={path}")


def test_the_log_of_an_encrypted_lun_has_to_be_sealed(tmp_path: Path) -> None:
    path = key_file(tmp_path)
    log = f"cache=log,log_dir={tmp_path}"
    with pytest.raises(UsageError, match="the plaintext") as caught:
        configured(f"luks_key_file={path},{log}")
    assert "cache_key_file" in caught.value.line
    assert configured(log).luks is None
    assert configured(f"luks_key_file={path},cache=writethrough").luks is not None


# -- TLS ------------------------------------------------------------------------------------------


def with_tls(*options: str) -> tuple[MountConfig, list[str]]:
    words = gather(options, {}, NOWHERE)
    return build(words, lambda: "iqn.2024-01.org.example:me", tls=True)


def test_tls_files(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue(client=True)
    both = tmp_path / "both.pem"
    both.touch(mode=0o600)
    both.write_bytes(pair.cert.read_bytes() + pair.key.read_bytes())
    assert with_tls()[0].session.tls == TlsConfig()
    config, warnings = with_tls(f"tls_ca={authority.ca},tls_cert={pair.cert},tls_key={pair.key}")
    assert config.session.tls == TlsConfig(
        ca=str(authority.ca), cert=str(pair.cert), key=str(pair.key)
    )
    assert warnings == []
    assert with_tls(f"tls_cert={both}")[0].session.tls == TlsConfig(cert=str(both))
    shown = to_toml(config, "iscsis://h/")
    assert tomllib.loads(shown)["tls_key"] == str(pair.key)
    again = tmp_path / "again.toml"
    again.write_text(shown)
    assert with_tls(f"config={again}")[0] == config
    pair.key.chmod(0o644)
    (warning,) = with_tls(f"tls_cert={pair.cert},tls_key={pair.key}")[1]
    assert f"chmod 600 {pair.key}" in warning


def test_tls_files_are_named_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Authority(tmp_path, "mine")
    monkeypatch.chdir(tmp_path)
    assert with_tls("tls_ca=mine.pem")[0].session.tls == TlsConfig(ca=str(tmp_path / "mine.pem"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("tls_ca={nothing}", "tls_ca={nothing}: can't be read: No such file"),
        ("tls_ca={folder}", "tls_ca={folder}: can't be read: Is a directory"),
        ("tls_ca={key}", "holds no certificate in PEM form"),
        ("tls_ca={broken}", "option tls_ca={broken}: "),
        ("tls_key={key}", "option tls_key: a private key without its certificate (add tls_cert="),
        ("tls_cert={cert}", "holds no private key in PEM form (add tls_key=FILE)"),
        ("tls_cert={key},tls_key={key}", "tls_cert={key}: holds no certificate"),
        ("tls_cert={cert},tls_key={cert}", "tls_key={cert}: holds no private key"),
        ("tls_cert={cert},tls_key={nothing}", "tls_key={nothing}: can't be read"),
        ("tls_cert={cert},tls_key={other}", "tls_key={other}: is not the key of the certificate"),
        ("tls_cert={cert},tls_key={locked}", "private key is encrypted"),
        ("tls_cert={broken},tls_key={key}", "tls_cert={broken}: certificate and key can't be used"),
    ],
)
def test_tls_files_that_are_no_use(tmp_path: Path, options: str, message: str) -> None:
    authority = Authority(tmp_path)
    pair, other = authority.issue(client=True), authority.issue(client=True)
    files = {
        "cert": pair.cert,
        "key": pair.key,
        "other": other.key,
        "locked": tmp_path / "locked.key",
        "broken": tmp_path / "broken.pem",
        "folder": tmp_path,
        "nothing": tmp_path / "nothing",
    }
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    files["locked"].write_bytes(private_pem(key, b"passphrase"))
    files["broken"].write_bytes(pair.cert.read_bytes()[:200])
    with pytest.raises(UsageError) as caught:
        with_tls(options.format_map(files))
    assert message.format_map(files) in caught.value.line
    assert "\n" not in caught.value.line


def test_a_secret_in_an_option_is_warned_about_and_never_shown() -> None:
    config, warnings = warned("chap_user=u,chap_secret=pa\\,ss")
    assert config.session.auth.initiator is not None
    assert config.session.auth.initiator.secret.reveal() == "pa,ss"
    assert any("seen by others" in warning for warning in warnings)
    assert any("shorter than 12 bytes" in warning for warning in warnings)
    shown = repr(config) + to_toml(config, "iscsi://h/") + "".join(warnings)
    assert "pa,ss" not in shown
    assert names_secret(["ro,chap_secret=x"])
    assert not names_secret(["ro,chap_secret_file=x"])


def test_secret_files(tmp_path: Path) -> None:
    path = secret_file(tmp_path)
    assert warned(f"chap_user=u,chap_secret_file={path}")[1] == []
    path.chmod(0o604)
    assert any(
        "every user can read" in w for w in warned(f"chap_user=u,chap_secret_file={path}")[1]
    )
    path.write_bytes(b"\n")
    with pytest.raises(UsageError, match="first line is empty"):
        configured(f"chap_user=u,chap_secret_file={path}")
    path.write_bytes(b"\xff\n")
    with pytest.raises(UsageError, match="no UTF-8"):
        configured(f"chap_user=u,chap_secret_file={path}")


def test_key_files(tmp_path: Path) -> None:
    path = secret_file(tmp_path)
    for content, key in (
        (b"text\n", b"text"),
        (b"text", b"text"),
        (b"two\nlines\r\n\n", b"two\nlines\r\n"),
        (b"\xff\x00\n\xfe", b"\xff\x00\n\xfe"),
    ):
        path.write_bytes(content)
        config, warnings = warned(f"cache_key_file={path}")
        assert (config.cache.passphrase, warnings) == (key, [])
        assert config.cache.key_file == str(path)
    assert configured("").cache.passphrase is None
    path.chmod(0o604)
    (warning,) = warned(f"cache_key_file={path}")[1]
    assert "every user can read" in warning
    for content, told in ((b"", "is empty"), (b"\n", "is empty"), (bytes(9 << 20), "more than")):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=told):
            configured(f"cache_key_file={path}")
    with pytest.raises(UsageError, match="can't be read"):
        configured(f"cache_key_file={tmp_path / 'none'}")

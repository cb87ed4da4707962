"""What a user gets wrong: one clear line, the right exit code, and nothing left behind."""

import contextlib
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orion_iscsifs.testing.programs import free_port
from orion_iscsifs.testing.tgt import Tgt
from tests.interop.conftest import TgtDisk
from tests.interop.product import COMMAND, Outcome, Product, is_mounted

pytestmark = pytest.mark.fuse
needs_tgt = pytest.mark.interop("tgtd", "tgtadm")

FAILED, USAGE = 32, 2
SOME_LUN = "iqn.2024-01.org.example:any/1"


def the_line(outcome: Outcome) -> str:
    """The only line on stderr."""
    lines = outcome.stderr.strip().splitlines()
    assert len(lines) == 1, outcome.stderr
    assert lines[0].startswith("orion-iscsifs: ")
    return lines[0]


def refused(product: Product, url: str, *options: str, code: int = FAILED) -> str:
    """A mount that has to fail; what it said in lower case."""
    mountpoint = product.new_mountpoint()
    outcome = product.mount(url, mountpoint, *options, code=code)
    assert not is_mounted(mountpoint)
    return the_line(outcome).lower()


@contextlib.contextmanager
def impostor(answer: bytes | None) -> Iterator[int]:
    """A server that says `answer` to whatever arrives, or nothing at all; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        stopping = threading.Event()

        def serve() -> None:
            with contextlib.ExitStack() as held:
                while not stopping.is_set():
                    with contextlib.suppress(OSError):
                        connection = held.enter_context(listener.accept()[0])
                        if answer is not None:
                            connection.recv(4096)
                            connection.sendall(answer)
                            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stopping.set()
            thread.join(5)


# -- the target -----------------------------------------------------------------------------------


def test_target_down_or_wrong_port(product: Product) -> None:
    port = free_port()
    said = refused(product, f"iscsi://127.0.0.1:{port}/{SOME_LUN}")
    assert f"127.0.0.1:{port}" in said
    assert "refused" in said


def test_unknown_host(product: Product) -> None:
    assert "no-such-host.invalid" in refused(product, f"iscsi://no-such-host.invalid/{SOME_LUN}")


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" + b"x" * 100, b"SSH-2.0-x\r\n", b""],
    ids=["web server", "ssh server", "hangs up"],
)
def test_not_an_iscsi_server(product: Product, answer: bytes) -> None:
    with impostor(answer) as port:
        assert "iscsi" in refused(
            product, f"iscsi://127.0.0.1:{port}/{SOME_LUN}", "login_timeout=3"
        )


def test_a_server_that_says_nothing(product: Product) -> None:
    with impostor(None) as port:
        said = refused(product, f"iscsi://127.0.0.1:{port}/{SOME_LUN}", "login_timeout=1")
    assert "login_timeout" in said or "1 s" in said or "in time" in said or "timed out" in said


@needs_tgt
def test_unknown_target_name(product: Product, tgt_disk: TgtDisk) -> None:
    name = "iqn.2024-01.org.example:nobody"
    assert name in refused(product, f"{tgt_disk.portal_url}/{name}/1")


@needs_tgt
def test_missing_lun(product: Product, tgt_disk: TgtDisk) -> None:
    said = refused(product, tgt_disk.target.lun_url(9))
    assert "lun" in said
    assert "9" in said


@needs_tgt
def test_a_lun_that_is_no_disk(product: Product, tgt_disk: TgtDisk) -> None:
    assert "disk" in refused(product, tgt_disk.target.lun_url(0))


@needs_tgt
def test_a_target_without_disks(product: Product, tgt: Tgt) -> None:
    target = tgt.add_target("iqn.2024-01.org.example:empty")
    assert "disk" in refused(product, target.url)


# -- the mount point and this host ----------------------------------------------------------------


@needs_tgt
def test_mountpoint_missing(product: Product, tgt_disk: TgtDisk, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    said = the_line(product.mount(tgt_disk.url, missing, code=FAILED))
    assert str(missing) in said


@needs_tgt
def test_mountpoint_is_a_file(product: Product, tgt_disk: TgtDisk, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    assert "director" in the_line(product.mount(tgt_disk.url, plain, code=FAILED)).lower()


@needs_tgt
def test_mountpoint_already_mounted(product: Product, tgt_disk: TgtDisk) -> None:
    with product.mounted(tgt_disk.url) as mountpoint:
        said = the_line(product.mount(tgt_disk.url, mountpoint, code=FAILED))
        assert str(mountpoint) in said
        assert "mounted" in said or "busy" in said
        assert (mountpoint / "lun1").exists()


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs unshare")
@needs_tgt
def test_no_fuse_device(product: Product, tgt_disk: TgtDisk) -> None:
    hide = (
        "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9"
        ' && exec "$0" "$@"'
    )
    mountpoint = product.new_mountpoint()
    words: list[str | Path] = ["sh", "-c", hide, COMMAND, "mount", tgt_disk.url, mountpoint]
    outcome = product.run("unshare", "--mount", *words, code=FAILED)
    assert "/dev/fuse" in the_line(outcome)


def test_umount_of_something_else(product: Product, tmp_path: Path) -> None:
    outcome = product("umount", tmp_path, code=1)
    assert str(tmp_path) in the_line(outcome)


# -- options and the command line -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("cache_sice=1G", ["cache_sice", "cache_size"]),
        ("replacement_timout=3", ["replacement_timout", "replacement_timeout"]),
        ("cache=sometimes", ["sometimes", "cache"]),
        ("cache_size=lots", ["lots", "cache_size"]),
        ("dirty_max=-1", ["dirty_max"]),
        ("login_timeout=soon", ["soon", "login_timeout"]),
        ("header_digest=md5", ["md5", "header_digest"]),
        ("chap_algs=rot13", ["rot13", "chap_algs"]),
        ("chap_user=somebody", ["chap_secret"]),
        ("chap_user=u,chap_secret_file=/nonexistent/file", ["/nonexistent/file"]),
        ("config=/nonexistent/config.toml", ["/nonexistent/config.toml"]),
    ],
)
def test_options(product: Product, option: str, words: list[str]) -> None:
    said = refused(product, f"iscsi://127.0.0.1/{SOME_LUN}", option, code=USAGE)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    "source",
    ["http://127.0.0.1/", "iscsi://", "iscsi://127.0.0.1:port/", "iscsi://h/iqn.2024-01.x:y/one"],
)
def test_sources(product: Product, source: str) -> None:
    refused(product, source, code=USAGE)


def test_options_of_later_versions_are_not_ignored(product: Product) -> None:
    for option in ("metrics_listen=127.0.0.1:9100", "audit_log=/tmp/audit"):
        refused(product, f"iscsi://127.0.0.1/{SOME_LUN}", option, code=USAGE)


@pytest.mark.parametrize("words", [["mount"], ["no-such-command"], ["target", "serve", "--bogus"]])
def test_command_line(product: Product, words: list[str]) -> None:
    outcome = product(*words, code=USAGE)
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.strip()


def test_help_and_version(product: Product) -> None:
    assert "mount" in product("--help").stdout
    assert "SOURCE MOUNTPOINT" in product("mount", "--help").stdout
    assert product("--version").stdout.strip()


def test_target_serve_mistakes(product: Product, tmp_path: Path) -> None:
    listen = ["--listen", f"127.0.0.1:{free_port()}", "--iqn", "iqn.2024-01.org.example:t"]
    missing = product("target", "serve", *listen, "--lun", f"0={tmp_path}/missing", code=None)
    assert missing.code in (1, USAGE)
    assert "missing" in the_line(missing)
    malformed = product("target", "serve", *listen, "--lun", "zero", code=None)
    assert malformed.code == USAGE
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["--listen", f"127.0.0.1:{port}", "--iqn", "iqn.2024-01.org.example:t"]
        busy = product("target", "serve", *words, "--lun", "0=ram:1M", code=1)
        assert str(port) in the_line(busy)

"""`orion-iscsifs target serve` as a program, under other people's initiators."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trio

from orion_iscsifs.cli.target import DEFAULT_IQN, LunOption, parse_lun, parse_portal
from orion_iscsifs.errors import UsageError
from orion_iscsifs.protocol.pdu import TextRequest, TextResponse
from orion_iscsifs.scsi import cdb
from orion_iscsifs.scsi.capacity import decode_capacity_16
from orion_iscsifs.target import Portal
from tests.target.client import OFFER, TUR, Client

SERVE = [sys.executable, "-m", "orion_iscsifs.cli.target", "serve"]
TIMEOUT_S = 60


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """The URL of a target that runs for the block, then must stop cleanly."""
    command = [*SERVE, "--listen", "127.0.0.1:0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        try:
            ready = program.stdout.readline().decode()
            match = re.fullmatch(r"ready (iscsi://127\.0\.0\.1:\d+/\S+)\n", ready)
            assert match is not None, ready + program.stderr.read().decode()
            yield match[1]
        finally:
            program.send_signal(signal.SIGTERM)
            assert program.wait(TIMEOUT_S) == 0
            said = program.stderr.read().decode().splitlines()
            assert [line for line in said if not line.startswith("portal ")] == []


def test_several_portals_are_all_shown() -> None:
    command = [*SERVE, "--lun", "0=ram:1M"]
    command += ["--listen", "127.0.0.1:0", "--listen", "127.0.0.1:0,7"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        ready = program.stdout.readline().decode()
        program.send_signal(signal.SIGTERM)
        out, shown = program.communicate(timeout=TIMEOUT_S)
    match = re.fullmatch(r"ready iscsi://127\.0\.0\.1:(\d+)/\S+\n", ready)
    assert match is not None
    first, second = shown.decode().splitlines()
    assert first == f"portal 127.0.0.1:{match[1]},1"
    assert re.fullmatch(r"portal 127\.0\.0\.1:\d+,7", second)
    assert (out, program.returncode) == (b"", 0), "ready is said once"


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "size", "read_only", "blocks"),
    [
        ("0=/d.img", "/d.img", None, False, (512, 4096)),
        ("0=/d.img,size=1G,ro", "/d.img", 1 << 30, True, (512, 4096)),
        ("0=ram:64M,block=4096", None, 64 << 20, False, (4096, 4096)),
        ("0=ram:64M,physical=512", None, 64 << 20, False, (512, 512)),
        ("0=/with,comma,block=512", "/with,comma", None, False, (512, 4096)),
    ],
)
def test_lun_option(
    text: str, path: str | None, size: int | None, read_only: bool, blocks: tuple[int, int]
) -> None:
    assert parse_lun(text) == LunOption(
        number=0,
        path=path,
        size=size,
        read_only=read_only,
        block_bytes=blocks[0],
        physical_block_bytes=blocks[1],
    )


@pytest.mark.parametrize(
    "text",
    [
        "/d.img",
        "x=/d",
        "-1=/d",
        "99999=/d",
        "0=",
        "0=/d,size=big",
        "0=ram:",
        "0=/d,block=520",
        "0=/d,physical=1",
    ],
)
def test_bad_lun_options(text: str) -> None:
    with pytest.raises(UsageError):
        parse_lun(text)


def test_portals() -> None:
    assert parse_portal("10.0.0.1:3261") == Portal("10.0.0.1", 3261)
    assert parse_portal("[::1]:0") == Portal("::1", 0)
    assert parse_portal("host") == Portal("host", 3260, 1)
    assert parse_portal("10.0.0.1:3261,2") == Portal("10.0.0.1", 3261, 2)
    assert parse_portal("[::1],0") == Portal("::1", 3260, 0)
    for text in ("", ":3260", "h:x", "h:99999", "::1:3260", "h:1,", "h:1,x", "h:1,65536", ",2"):
        with pytest.raises(UsageError):
            parse_portal(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lun", "0=ram:1M", "--erl", "3"], "--erl 3: not 0, 1 or 2"),
        (["--lun", "0=ram:1M", "--max-connections", "0"], "--max-connections 0: not 1 to"),
        (["--lun", "0=ram:1M", "--lun", "0=ram:1M"], "the same number twice"),
        (["--lun", "0=ram:1M", "--iqn", "Not A Name"], "not an iSCSI name"),
        (["--lun", "0=ram:1M", "--chap-user", "me"], "belong together"),
        (["--lun", "0=/nonexistent/disk.img"], "No such file"),
        (["--lun", "0=ram:1M", "--listen", "192.0.2.1:0"], "portal 192.0.2.1:0"),
    ],
)
def test_mistakes(options: Sequence[str], message: str) -> None:
    done = subprocess.run(
        [*SERVE, *options], capture_output=True, timeout=TIMEOUT_S, check=False, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("orion-iscsifs: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


async def test_connections_level_and_portal_groups() -> None:
    options = ["--listen", "127.0.0.1:0,7", "--max-connections", "3", "--erl", "2"]
    with serving("--lun", "0=ram:1M", *options) as url:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        offer = replace(OFFER, max_connections=8, error_recovery_level=2)
        async with await trio.open_tcp_stream(parts.hostname, parts.port) as stream:
            client = Client(stream)
            await client.log_in(DEFAULT_IQN, offer=offer)
            assert client.login is not None
            agreed = client.login.parameters
            assert (agreed.max_connections, agreed.error_recovery_level) == (3, 2)
            await client.send(TextRequest(5, data=b"SendTargets=\0", immediate=True))
            listed = bytes((await client.expect(TextResponse)).data).decode().split("\0")
        assert listed[1] == f"TargetAddress=127.0.0.1:{parts.port},1"
        assert re.fullmatch(r"TargetAddress=127\.0\.0\.1:\d+,7", listed[2])


@contextmanager
def serving_file(path: Path, shown: list[str]) -> Iterator[int]:
    """The port of a target that has the file `path`; what it says on stderr goes to `shown`."""
    command = [*SERVE, "--listen", "127.0.0.1:0", "--lun", f"0={path},size=1M"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        try:
            port = urlsplit(program.stdout.readline().decode().split()[1]).port
            assert port is not None
            yield port
        finally:
            program.send_signal(signal.SIGTERM)
            shown += program.communicate(timeout=TIMEOUT_S)[1].decode().splitlines()
    assert program.returncode == 0


async def test_a_file_that_is_resized_is_announced(tmp_path: Path) -> None:
    disk, shown = tmp_path / "disk.img", list[str]()
    with serving_file(disk, shown) as port:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            client = Client(stream)
            await client.log_in(DEFAULT_IQN)
            await client.settle()
            for size in (3 << 20, 2 << 20):
                os.truncate(disk, size)
                with trio.fail_after(TIMEOUT_S):
                    while (await client.run(TUR))[1].status == 0:
                        await trio.sleep(0.01)
                data, _ = await client.run(cdb.read_capacity_16(), read=32)
                assert decode_capacity_16(data).blocks * 512 == size
    assert shown == [f"lun 0 has {size} bytes now" for size in (3 << 20, 2 << 20)]


# -- other people's initiators ---------------------------------------------------------------------


@pytest.mark.interop("qemu-img")
@pytest.mark.parametrize("block", ["512", "4096"])
def test_qemu_copies_and_compares(tmp_path: Path, block: str) -> None:
    if not list(Path("/usr/lib").glob("*/qemu/block-iscsi.so")):
        pytest.skip("QEMU's iSCSI driver is not installed")
    source, disk = tmp_path / "source.raw", tmp_path / "disk.img"
    source.write_bytes(os.urandom(5 << 20) + bytes(11 << 20))
    with serving("--lun", f"0={disk},size=16M,block={block}") as url:
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), f"{url}/0")
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), f"{url}/0")
    assert disk.read_bytes() == source.read_bytes()


@pytest.mark.interop("iscsi-ls")
def test_chap_with_libiscsi(tmp_path: Path) -> None:
    secrets = [tmp_path / "mine", tmp_path / "other"]
    for path, text in zip(secrets, ("secret-of-mine", "secret-of-disk"), strict=True):
        path.write_text(text + "\n")
        path.chmod(0o600)
    options = ["--chap-user", "me", "--chap-secret-file", str(secrets[0])]
    options += ["--mutual-user", "disk", "--mutual-secret-file", str(secrets[1])]
    with serving("--lun", "0=ram:1M", *options) as url:
        portal = "/".join(url.split("/")[:3])
        with_user = portal.replace("iscsi://", "iscsi://me%secret-of-mine@")
        mutual = "?target_user=disk&target_password=secret-of-disk"
        assert "DIRECT_ACCESS" in run("iscsi-ls", "-s", with_user)
        assert "DIRECT_ACCESS" in run("iscsi-ls", "-s", with_user + mutual)
        refused = subprocess.run(
            ["iscsi-ls", portal], capture_output=True, timeout=TIMEOUT_S, check=False
        )
        assert refused.returncode != 0


@pytest.mark.interop("iscsi-inq", "iscsi-ls")
def test_digests_with_libiscsi() -> None:
    with serving("--lun", "0=ram:1M", "--digests") as url:
        assert "ORION" in run("iscsi-inq", f"{url}/0")
        assert "DIRECT_ACCESS" in run("iscsi-ls", "-s", "/".join(url.split("/")[:3]))

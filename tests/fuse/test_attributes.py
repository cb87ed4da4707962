"""`user.orion.*`, and that no write pays for them."""

import ctypes
import errno
import os
from struct import Struct

import pytest
from pyfuse3 import FUSEError, RequestContext

from orion_iscsifs.config import FuseConfig
from orion_iscsifs.fuse import nosec
from orion_iscsifs.fuse.nosec import HANDLE_KILLPRIV_V2, InitReply, add_flag, check_kernel
from orion_iscsifs.fuse.operations import DeviceFiles
from orion_iscsifs.fuse.slots import Unsound
from tests.fuse.conftest import MountFiles
from tests.fuse.devices import ByteDevice

CTX = RequestContext.__new__(RequestContext)
KEPT = {"size_bytes": "1048576", "name": "naa.600\u00e9"}


@pytest.mark.fuse
async def test_they_are_listed_and_read(mount_files: MountFiles) -> None:
    async with mount_files({"lun1": ByteDevice()}) as mounted:
        mounted.filesystem.describe = lambda path: KEPT if path == "lun1" else {}
        names = await mounted.call(os.listxattr, mounted.lun)
        assert sorted(names) == ["user.orion.name", "user.orion.size_bytes"]
        for name, value in KEPT.items():
            found = await mounted.call(os.getxattr, mounted.lun, f"user.orion.{name}")
            assert found.decode() == value

        def code(*arguments: object) -> int | None:
            try:
                os.getxattr(*arguments)  # type: ignore[arg-type]
            except OSError as error:
                return error.errno
            return None

        assert await mounted.call(code, mounted.lun, "user.orion.nothing") == errno.ENODATA
        status = mounted.folder / ".orion" / "status.json"
        assert await mounted.call(os.listxattr, status) == []
        assert await mounted.call(code, status, "user.orion.name") == errno.ENODATA


@pytest.mark.fuse
@pytest.mark.parametrize(
    ("direct", "flagged", "most"), [(False, True, 2), (True, True, 2), (False, False, 1000)]
)
async def test_writes_do_not_pay_for_them(
    mount_files: MountFiles,
    monkeypatch: pytest.MonkeyPatch,
    direct: bool,
    flagged: bool,
    most: int,
) -> None:
    """The kernel asks for security.capability once for a file; without the flag, at each write."""
    if not flagged:
        monkeypatch.setattr(nosec, "add_flag", lambda *_: True)
    device = ByteDevice()
    async with mount_files({"lun1": device}) as mounted:
        asked: list[bytes] = []
        described = mounted.filesystem._described

        def counted(inode: int) -> dict[bytes, bytes]:
            asked.append(b"")
            return described(inode)

        mounted.filesystem._described = counted  # type: ignore[method-assign]

        def write() -> None:
            flags = os.O_WRONLY | (os.O_DIRECT if direct else os.O_SYNC)
            descriptor = os.open(mounted.lun, flags)
            page = (ctypes.c_char * 8192)()
            start = -ctypes.addressof(page) % 4096
            try:
                for block in range(100):
                    os.pwrite(descriptor, memoryview(page)[start : start + 4096], block * 4096)
            finally:
                os.close(descriptor)

        await mounted.call(write)
        assert sum(name == "write" for name, _, _ in device.calls) == 100
        assert len(asked) <= most
        if not flagged:
            assert len(asked) >= 100


@pytest.mark.fuse
async def test_without_the_flag_there_are_none(
    mount_files: MountFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsound(*_: object) -> None:
        raise Unsound("for a test")

    monkeypatch.setattr(nosec, "find_slot", unsound)
    async with mount_files({"lun1": ByteDevice()}) as mounted:
        mounted.filesystem.describe = lambda _path: KEPT
        assert await mounted.call(os.listxattr, mounted.lun) == []
        with pytest.raises(OSError, match="not supported"):
            await mounted.call(os.getxattr, mounted.lun, "user.orion.name")


async def test_the_answer_before_it_is_known() -> None:
    fs = DeviceFiles({"lun1": ByteDevice()}, config=FuseConfig())
    with pytest.raises(FUSEError) as refused:
        await fs.getxattr(2, b"security.capability", CTX)
    assert refused.value.errno == errno.ENOSYS


# -- the answer to FUSE_INIT -----------------------------------------------------------------------

HEADER, INIT = Struct("=IiQ"), Struct("=IIII")


class Answer:
    """Two pieces, as libfuse writes them."""

    def __init__(self, header: bytes, body: bytes) -> None:
        self.header = ctypes.create_string_buffer(header, len(header))
        self.body = ctypes.create_string_buffer(body, len(body))
        self.vectors = (nosec._Vector * 2)(
            nosec._Vector(ctypes.addressof(self.header), len(header)),
            nosec._Vector(ctypes.addressof(self.body), len(body)),
        )

    def add_flag(self, count: int = 2) -> bool:
        return add_flag(ctypes.addressof(self.vectors), count)

    @property
    def flags(self) -> int:
        flags: int = INIT.unpack_from(self.body.raw)[3]
        return flags


def init_out(major: int = 7, minor: int = 38, flags: int = 0x1234) -> bytes:
    return INIT.pack(major, minor, 1 << 17, flags).ljust(64, b"\0")


def test_the_flag_is_added_and_nothing_else() -> None:
    answer = Answer(HEADER.pack(80, 0, 2), init_out())
    before = answer.body.raw
    assert answer.add_flag()
    assert answer.flags == 0x1234 | HANDLE_KILLPRIV_V2
    assert (answer.body.raw[:12], answer.body.raw[16:]) == (before[:12], before[16:])


@pytest.mark.parametrize(
    ("header", "body", "count"),
    [
        (HEADER.pack(80, 0, 2), init_out(), 1),
        (HEADER.pack(80, 0, 2), init_out(), 3),
        (HEADER.pack(80, -5, 2), init_out(), 2),
        (HEADER.pack(79, 0, 2), init_out(), 2),
        (HEADER.pack(80, 0, 2), init_out(major=8), 2),
        (HEADER.pack(80, 0, 2), init_out(minor=30), 2),
        (HEADER.pack(40, 0, 2), init_out()[:24], 2),
    ],
)
def test_any_other_answer_is_left_alone(header: bytes, body: bytes, count: int) -> None:
    answer = Answer(header, body)
    assert not answer.add_flag(count)
    assert answer.body.raw == body


@pytest.mark.parametrize("release", ["5.12.0", "5.12-rc1", "6.1.0-18-amd64", "10.0"])
def test_a_kernel_that_knows_the_flag(release: str) -> None:
    check_kernel(release)


@pytest.mark.parametrize("release", ["5.11.22", "4.19.0-26-amd64", "unknown", ""])
def test_a_kernel_that_does_not(release: str) -> None:
    with pytest.raises(Unsound, match=r"Linux 5\.12"):
        check_kernel(release)


def test_the_slot_is_put_back_after_one_call() -> None:
    reply = InitReply()
    reply.install()
    assert reply._slot is not None
    slot = reply._slot
    read, write = os.pipe()
    vectors = Answer(b"one", b"two").vectors
    text = ctypes.create_string_buffer(b"hello")
    vectors[0].base, vectors[0].length = ctypes.addressof(text), 5
    assert reply._replacement(write, ctypes.addressof(vectors), 1) == 5
    assert os.read(read, 10) == b"hello"
    assert not reply.in_force
    assert reply._slot is None
    assert slot.put(reply._before) == reply._before
    for descriptor in (read, write):
        os.close(descriptor)

"""What libfuse is told of a mount that it did not make; real takeovers are in tests/interop."""

import os
import struct

import pytest

from orion_iscsifs.errors import MountError
from orion_iscsifs.fuse import takeover


def test_the_request_offers_what_was_agreed() -> None:
    reply = struct.pack(
        "=IIIIHHIIHHI28x", 7, 38, 131072, 0x1234_5678, 128, 96, 1 << 20, 1, 256, 0, 9
    )
    request = takeover.init_request(reply)
    length, opcode, unique, *_ = struct.unpack_from("=IIQQIII", request)
    assert (length, opcode) == (len(request), 26)
    assert unique
    assert struct.unpack_from("=IIIII", request, 40) == (7, 38, 131072, 0x1234_5678, 9)


def test_an_unknown_answer() -> None:
    with pytest.raises(MountError, match="FUSE_INIT"):
        takeover.init_request(b"short")


@pytest.mark.parametrize(
    ("release", "possible"),
    [("6.9.0-rc1", True), ("6.18.4-arch1", True), ("7.0", True), ("6.8.12", False), ("x", False)],
)
def test_which_kernels(release: str, possible: bool) -> None:
    assert (takeover.obstacle(release) is None) is possible


def test_a_device_that_has_gone() -> None:
    reading, writing = os.pipe()
    assert not takeover.is_gone(writing)
    os.close(reading)
    assert takeover.is_gone(writing)
    os.close(writing)
    takeover.resend(writing)  # EBADF: the mount has ended


def test_a_kernel_that_does_not_know_it(tmp_path: object) -> None:
    read_only = os.open("/dev/null", os.O_WRONLY)
    takeover.resend(read_only)
    os.close(read_only)
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(MountError, match="FUSE_NOTIFY_RESEND"):
        takeover.resend(full)
    os.close(full)

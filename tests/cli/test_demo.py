"""The demo, as somebody new runs it: embedded target, mount, data, unmount, proof."""

import os

import pytest

from tests.cli.conftest import Command


@pytest.mark.fuse
def test_demo(command: Command) -> None:
    shown = command.ok("demo")
    assert shown.splitlines()[-1].startswith("demo: it works: 8 MiB written and read back")
    assert ("ext4" in shown) == (os.geteuid() == 0 and os.path.exists("/dev/loop-control"))

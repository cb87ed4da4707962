"""A handle's number says what it is the handle of."""

import pytest

from orion_iscsifs.fuse.handles import handle_number, opened_by


@pytest.mark.parametrize("fua", [False, True])
@pytest.mark.parametrize("serial", [0, 1, (1 << 34) - 1, 1 << 40])
@pytest.mark.parametrize("inode", [1, 2, (1 << 28) - 1])
def test_there_and_back(inode: int, serial: int, fua: bool) -> None:
    number = handle_number(inode, fua=fua, serial=serial)
    assert opened_by(number) == (inode, fua)
    assert 0 < number < 1 << 63


def test_each_open_file_has_its_own() -> None:
    assert len({handle_number(7, fua=False, serial=serial) for serial in range(100)}) == 100

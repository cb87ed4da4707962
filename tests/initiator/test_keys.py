"""The keys that this host registers: one for each path, and known again after a crash."""

from pathlib import Path

import pytest

from orion_iscsifs.errors import MountError
from orion_iscsifs.initiator.keys import LunKeys

ISID = bytes.fromhex("80abcdef0003")


def test_a_key_for_each_path(tmp_path: Path) -> None:
    keys = LunKeys.load(tmp_path, "naa.1")
    assert keys.of(ISID) & 0xFFFF == 3
    assert keys.of(ISID) >> 16 == keys.base
    assert keys.is_ours(keys.of(ISID))
    assert keys.is_ours(keys.of(bytes(6)))
    assert not keys.is_ours(keys.of(ISID) ^ 1 << 16)
    assert not keys.is_ours(0), "no key at all"


def test_they_are_kept_for_each_lun(tmp_path: Path) -> None:
    first = LunKeys.load(tmp_path, "naa.1")
    assert LunKeys.load(tmp_path, "naa.1") == first
    assert LunKeys.load(tmp_path, "naa.2") != first


def test_another_host_has_others(tmp_path: Path) -> None:
    assert LunKeys.load(tmp_path / "a", "naa.1") != LunKeys.load(tmp_path / "b", "naa.1")


@pytest.mark.parametrize("text", ["", "rubbish", "0", "1" + 12 * "0", "-5"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, text: str) -> None:
    LunKeys.load(tmp_path, "naa.1")
    (path,) = (tmp_path / "keys").iterdir()
    path.write_text(text)
    keys = LunKeys.load(tmp_path, "naa.1")
    assert 0 < keys.base < 1 << 48
    assert LunKeys.load(tmp_path, "naa.1") == keys


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("in the way")
    with pytest.raises(MountError, match="state directory"):
        LunKeys.load(tmp_path, "naa.1")

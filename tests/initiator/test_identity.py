"""The initiator name and the ISID survive a restart; live sessions never share an ISID."""

from pathlib import Path

import pytest

from orion_iscsifs.errors import MountError
from orion_iscsifs.initiator.identity import hold_isid, load_initiator_name


def test_the_system_name_comes_first(tmp_path: Path) -> None:
    system = tmp_path / "initiatorname.iscsi"
    system.write_text("# a comment\nInitiatorName = iqn.1993-08.org.debian:01:abc\n")
    assert load_initiator_name(tmp_path / "state", system) == "iqn.1993-08.org.debian:01:abc"


def test_a_generated_name_is_kept(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    first = load_initiator_name(tmp_path / "state", missing)
    assert first.startswith("iqn.2026-11.org.orion-iscsifs:")
    assert len(first.encode()) <= 223
    assert load_initiator_name(tmp_path / "state", missing) == first
    assert load_initiator_name(tmp_path / "other", missing) != first


@pytest.mark.checklist(36, "11.12.5")
def test_isid_is_of_the_random_format_and_the_same_after_a_restart(tmp_path: Path) -> None:
    """Checklist 36, RFC 7143 §11.12.5: T = 10b in the top bits."""
    with hold_isid(tmp_path, "iqn.a") as first:
        assert len(first) == 6
        assert first[0] == 0x80
    with hold_isid(tmp_path, "iqn.a") as again:
        assert again == first


@pytest.mark.checklist(36, "4.4.3")
def test_live_sessions_to_one_target_differ_in_their_isid(tmp_path: Path) -> None:
    """The ISID rule (RFC 7143 §4.4.3); another target may see the same one (§10.1.1)."""
    with hold_isid(tmp_path, "iqn.a") as first, hold_isid(tmp_path, "iqn.a") as second:
        assert first != second
        assert first[:4] == second[:4]
        with hold_isid(tmp_path, "iqn.b") as other:
            assert other == first
    with hold_isid(tmp_path, "iqn.a") as free_again:
        assert free_again == first


def test_a_state_directory_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(MountError, match="state directory") as caught:
        load_initiator_name(blocked / "state", tmp_path / "none")
    assert "ORION_ISCSIFS_STATE" in caught.value.line


def test_locks_that_cannot_be_made_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "sessions").write_text("")
    with pytest.raises(MountError, match="state directory"), hold_isid(tmp_path, "iqn.a"):
        pass


def test_a_name_file_that_is_no_text_is_passed_over(tmp_path: Path) -> None:
    system = tmp_path / "initiatorname.iscsi"
    system.write_bytes(b"InitiatorName=\xff\xfe\n# \x80")
    assert load_initiator_name(tmp_path / "state", system)

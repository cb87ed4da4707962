"""Tables show text as it stands, on a terminal and in a pipe."""

import pytest

from orion_iscsifs.cli.discover import _print as print_discovered
from orion_iscsifs.cli.tables import console
from orion_iscsifs.errors import LoginError
from orion_iscsifs.initiator.addresses import Portal
from orion_iscsifs.initiator.portals import DiscoveredTarget
from orion_iscsifs.initiator.survey import LunReport, TargetReport
from orion_iscsifs.url import Source

NAME = "iqn.2024-01.org.example:key:[bold]:a-name-that-is-longer-than-a-narrow-terminal"


def discovered(name: str) -> list[TargetReport]:
    target = DiscoveredTarget(name, (Portal("fe80::1%eth0", 3260, 1),))
    lun = LunReport(1, "disk", "ACME", "[red]disk", "1", 1 << 20, 512)
    lost = TargetReport(target, error=LoginError("iqn.x: [/no] such :key: there"))
    return [TargetReport(target, Portal("fe80::1", 3260, 1), [lun]), lost]


def test_nothing_is_taken_for_markup_or_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    print_discovered(Source(host="h"), discovered(NAME), luns=True)
    told = capsys.readouterr().out
    assert told.count(NAME) == 4
    assert "[fe80::1%eth0]:3260" in told
    assert "ACME [red]disk 1" in told
    assert "iqn.x: [/no] such :key: there" in told


def test_a_line_of_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    console().print("iscsi://[fe80::1]/iqn.x:key:1 [/b]")
    assert capsys.readouterr().out == "iscsi://[fe80::1]/iqn.x:key:1 [/b]\n"


def test_a_narrow_terminal_cuts_no_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    print_discovered(Source(host="h"), discovered(NAME)[:1], luns=False)
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines()[1:])) <= 60  # the heading has escape sequences
    column = "".join(line.split(" ")[0] for line in told.splitlines()[1:])
    assert column == NAME
    assert "…" not in told

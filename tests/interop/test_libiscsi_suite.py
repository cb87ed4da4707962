"""libiscsi's test suite, `iscsi-test-cu`, against `orion-iscsifs target serve`.

Every test of the families in `CLAIMED` passes, on each of the LUNs below. What is not run stands in
`SKIPPED` with its reason, and docs/conformance.md says the same. `iscsi-test-cu` counts a test that
skips itself, because the target lacks something, as passed; here it has to be in the table too, so
that a feature that gets lost is a failure and not a silent skip.
"""

import enum
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from orion_iscsifs.testing.programs import free_port

pytestmark = pytest.mark.interop("iscsi-test-cu")

CLAIMED: Final = (
    *("CompareAndWrite", "GetLBAStatus", "Inquiry", "Mandatory", "ModeSense6", "OrWrite"),
    *("Prefetch10", "Prefetch16", "Read6", "Read10", "Read12", "Read16", "ReadCapacity10"),
    *("ReadCapacity16", "ReportSupportedOpcodes", "TestUnitReady", "Unmap"),
    *("Verify10", "Verify12", "Verify16", "Write10", "Write12", "Write16"),
    *("WriteSame10", "WriteSame16", "WriteVerify10", "WriteVerify12", "WriteVerify16"),
    *("PrinReadKeys", "PrinServiceactionRange", "PrinReportCapabilities"),
    *("ProutRegister", "ProutReserve", "ProutClear", "ProutPreempt"),
    *("iSCSIcmdsn", "iSCSIdatasn", "iSCSIResiduals", "iSCSITMF"),
)
"""Families that run on every writable LUN."""

ONCE: Final = {"MultipathIO": "512", "ReadOnly": "read-only"}
"""Families that need something special, and the LUN that has it."""

_NOT_REMOVABLE: Final = "is about removable media; the embedded target's disks are not removable"
_COPY: Final = "the embedded target does not copy by itself (EXTENDED COPY)"
_DEFECTS: Final = "files and memory have no defect list"
_WSNZ: Final = "zero blocks are refused, as the WSNZ bit of its Block Limits page says"

SKIPPED: Final[dict[str, str]] = {
    "ExtendedCopy": _COPY,
    "ReceiveCopyResults": _COPY,
    "NoMedia": _NOT_REMOVABLE,
    "PreventAllow": _NOT_REMOVABLE,
    "StartStopUnit": _NOT_REMOVABLE,
    "ReadDefectData10": _DEFECTS,
    "ReadDefectData12": _DEFECTS,
    "Reserve6": "RESERVE(6) is obsolete since SPC-3",
    "Sanitize": "the embedded target has no SANITIZE",
    "WriteAtomic16": "the embedded target has no WRITE ATOMIC(16)",
    "WriteSame10.ZeroBlocks": _WSNZ,
    "WriteSame16.ZeroBlocks": _WSNZ,
}
"""By family, or by family and test: what is not claimed, on any LUN."""

_ONE_BLOCK: Final = "needs physical blocks of several logical ones"

ELSEWHERE: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "GetLBAStatus.UnmapSingle": (("512e",), "needs physical blocks of one logical one"),
    "CompareAndWrite.InvalidDataOutSize": (("512", "4096"), _ONE_BLOCK),
    "WriteSame10.InvalidDataOutSize": (("512", "4096"), _ONE_BLOCK),
    "WriteSame10.UnmapUnaligned": (("512", "4096"), _ONE_BLOCK),
    "WriteSame16.InvalidDataOutSize": (("512", "4096"), _ONE_BLOCK),
    "WriteSame16.UnmapUnaligned": (("512", "4096"), _ONE_BLOCK),
}
"""Tests that no target could pass on these LUNs; on every other one they do pass."""

READ_ONLY: Final = (
    *("ReadOnly", "Inquiry", "Mandatory", "ModeSense6", "Prefetch10", "Prefetch16", "Read6"),
    *("Read10", "Read12", "Read16", "ReadCapacity10", "ReadCapacity16"),
    *("ReportSupportedOpcodes", "TestUnitReady"),
)
"""Families that hold on a write-protected LUN."""

LUNS: Final = {"512": 0, "512e": 1, "4096": 2, "read-only": 3}
WRITABLE: Final = ("512", "512e", "4096")
TIMEOUT_S: Final = 100


class Verdict(enum.Enum):
    PASSED = enum.auto()
    SKIPPED = enum.auto()
    FAILED = enum.auto()


Verdicts = dict[str, dict[str, Verdict]]
"""By family and test."""


def verdicts(shown: str) -> Verdicts:
    """What `iscsi-test-cu -V` printed. A suite's teardown follows its last verdict: not counted."""
    found: Verdicts = {}
    family = test = ""
    skipped = False
    for line in shown.splitlines():
        if match := re.match(r"Suite: (\S+)", line):
            family, test = match[1], ""
            found[family] = {}
            continue
        if match := re.match(r"  Test: (\S+) \.\.\.(.*)", line):
            test, skipped, line = match[1], False, match[2]
        if not test:
            continue
        skipped = skipped or "[SKIPPED]" in line
        if line.startswith(("passed", "FAILED")):
            good = Verdict.SKIPPED if skipped else Verdict.PASSED
            found[family][test] = good if line.startswith("passed") else Verdict.FAILED
            test = ""
    assert not test, f"iscsi-test-cu ended in {family}.{test}: {shown[-2000:]}"
    return found


def test_the_parser() -> None:
    shown = "Suite: A\n  Test: X ...passed\n  Test: Y ...    [SKIPPED] no.\npassed    PRIN\n"
    shown += "    [SKIPPED] of the teardown\nSuite: B\n  Test: Z ...\n  text\nFAILED\n"
    assert verdicts(shown) == {
        "A": {"X": Verdict.PASSED, "Y": Verdict.SKIPPED},
        "B": {"Z": Verdict.FAILED},
    }


class Suite:
    """A target with the four LUNs at two portals; runs the suite once a LUN, when first asked."""

    def __init__(self, iqn_url: str, other_url: str) -> None:
        self._urls = (iqn_url, other_url)
        self.everything = cache(self._everything)

    def run(self, lun: str, test: str) -> Verdicts:
        urls = [f"{url}/{LUNS[lun]}" for url in self._urls]
        if lun != ONCE["MultipathIO"]:
            del urls[1]
        command = ["iscsi-test-cu", "--dataloss", "-V", f"--test={test}", *urls]
        shown = subprocess.run(
            command, capture_output=True, timeout=TIMEOUT_S, check=False, text=True
        ).stdout
        return verdicts(shown)

    def _everything(self, lun: str) -> Verdicts:
        return self.run(lun, "ALL")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    folder: Path = tmp_path_factory.mktemp("libiscsi")
    with serving(folder / "thin.img") as (first, second):
        yield Suite(first, second)


@contextmanager
def serving(backing: Path) -> Iterator[tuple[str, str]]:
    """The target's URL at each of its portals; the program must end well."""
    ports = [free_port(), free_port()]
    luns = {
        "512": "ram:128M,physical=512",
        "512e": f"{backing},size=128M",
        "4096": "ram:128M,block=4096",
        "read-only": "ram:128M,ro",
    }
    command = [sys.executable, "-m", "orion_iscsifs.cli.target", "serve"]
    for index, port in enumerate(ports):
        command += ["--listen", f"127.0.0.1:{port},{index + 1}"]
    for name, lun in luns.items():
        command += ["--lun", f"{LUNS[name]}={lun}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        try:
            ready = program.stdout.readline().decode()
            match = re.fullmatch(r"ready (iscsi://\S+)\n", ready)
            assert match is not None, ready + program.stderr.read().decode()
            yield match[1], match[1].replace(str(ports[0]), str(ports[1]))
        finally:
            program.terminate()
            assert program.wait(TIMEOUT_S) == 0
            said = program.stderr.read().decode().splitlines()
            assert said == [
                f"portal 127.0.0.1:{port},{index + 1}" for index, port in enumerate(ports)
            ]


def expected(lun: str, family: str, test: str) -> Verdict:
    name = f"{family}.{test}"
    if name in ELSEWHERE and lun in ELSEWHERE[name][0]:
        # The only one that does not see for itself that it makes no sense there.
        return Verdict.FAILED if name == "GetLBAStatus.UnmapSingle" else Verdict.SKIPPED
    if family in SKIPPED or name in SKIPPED:
        return Verdict.SKIPPED
    return Verdict.PASSED


def check(lun: str, family: str, found: dict[str, Verdict]) -> None:
    assert found, f"{family} did not run"
    wrong = {
        f"{family}.{test}": verdict.name
        for test, verdict in found.items()
        if verdict is not expected(lun, family, test)
    }
    assert not wrong, f"LUN {lun}: {wrong}"


# -- the tests -------------------------------------------------------------------------------------


def test_the_table_is_complete() -> None:
    """Every family that this `iscsi-test-cu` has is claimed or skipped with a reason, not both."""
    listed = subprocess.run(["iscsi-test-cu", "-l"], capture_output=True, check=False, text=True)
    names = [line.removeprefix("ALL.") for line in listed.stdout.split() if line[:4] == "ALL."]
    families = {name.partition(".")[0] for name in names}
    skipped = {name for name in SKIPPED if "." not in name}
    assert set(CLAIMED) | set(ONCE) | skipped == families
    assert not (set(CLAIMED) | set(ONCE)) & skipped
    named = {name for name in SKIPPED if "." in name} | set(ELSEWHERE)
    assert named <= set(names)


@pytest.mark.parametrize("family", CLAIMED)
@pytest.mark.parametrize("lun", WRITABLE)
def test_family(suite: Suite, lun: str, family: str) -> None:
    check(lun, family, suite.everything(lun)[family])


@pytest.mark.parametrize("family", [name for name in SKIPPED if "." not in name])
def test_family_that_is_not_claimed(suite: Suite, family: str) -> None:
    """It skips itself: nothing of it is half there. A family that runs belongs into `CLAIMED`."""
    check("512", family, suite.everything("512")[family])


def test_two_paths(suite: Suite) -> None:
    """Two sessions through two portals, in two portal groups."""
    check("512", "MultipathIO", suite.everything("512")["MultipathIO"])


@pytest.mark.parametrize("family", READ_ONLY)
def test_write_protected(suite: Suite, family: str) -> None:
    check("read-only", family, suite.run("read-only", f"SCSI.{family}")[family])

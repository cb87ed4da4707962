"""docs/conformance.md says what is true: every test that it names exists and shows what it says.

Sections with requirements, and the numbers of the 56 checks, are those of RFC 7143 and of the
project's own list; they are written down here once more, so that nothing can be dropped from the
page without a test that fails.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import pytest

TESTS: Final = Path(__file__).parent
PAGE: Final = TESTS.parent / "docs" / "conformance.md"
CHECKS: Final = range(1, 57)

LEVELS: Final = {"MUST", "MUST NOT", "SHOULD", "SHOULD NOT"}
VERDICTS: Final = ("supported: ", "refused: ", "not applicable: ")
SECTIONS: Final = """
4.2.1 4.2.2.1 4.2.2.2 4.2.2.3.2 4.2.2.3.3 4.2.2.3.4 4.2.2.4 4.2.3.3 4.2.3.4 4.2.3.5 4.2.3.6 4.2.4
4.2.5.1 4.2.5.2 4.2.5.3 4.2.6 4.2.7 4.2.7.1 4.2.7.2 4.2.7.4 4.3 4.4.2 4.4.3 4.5 4.6.1.2 6.1 6.2
6.2.1 6.2.2 6.3 6.3.1 6.3.2 6.3.3 6.3.4 6.3.5 6.4 7.1.4 7.1.4.1 7.1.4.3 7.1.5 7.2.1 7.2.2 7.3 7.4.1
7.4.2.1 7.4.2.2 7.4.3 7.5 7.7 7.8 7.9 7.11 7.12 7.14 7.15 9 9.1 9.2 9.2.1 9.2.2 9.2.3 9.3.1 9.3.2
9.3.3 9.4 10.1.1 10.1.2 10.2 10.3 10.6 10.6.1 10.7 11 11.1 11.2 11.2.1.2 11.2.1.5 11.2.1.6 11.2.1.8
11.2.2.3 11.3.1 11.3.4 11.3.5 11.4.1 11.4.2 11.4.3 11.4.5.1 11.4.5.2 11.4.5.3 11.4.6 11.4.7 11.4.8
11.4.9 11.4.11 11.5.1 11.5.2 11.5.4 11.5.5 11.5.6 11.6 11.6.1 11.6.2 11.7 11.7.1 11.7.2 11.7.3
11.7.4 11.7.7 11.8 11.8.1 11.8.4 11.8.5 11.9.1 11.9.3 11.10 11.10.2 11.10.3 11.10.4 11.10.5 11.11.1
11.11.2 11.11.4 11.11.6 11.12 11.12.2 11.12.4 11.12.4.1 11.12.4.2 11.12.5 11.12.6 11.12.7 11.12.8
11.12.10 11.13.1 11.13.2 11.13.3 11.13.5 11.13.6 11.13.7 11.13.8 11.14 11.14.2 11.14.5 11.15 11.15.2
11.16 11.16.1 11.16.2 11.16.3 11.16.4 11.16.5 11.16.6 11.16.7 11.17.1 11.18 11.18.1 11.18.2 11.19
11.19.1 11.19.3 12 12.1 12.1.1 12.1.2 12.1.3 13 13.1 13.4 13.5 13.6 13.7 13.8 13.11 13.12 13.14
13.19 13.21 13.22 13.23 13.24 13.25 13.26.1 13.26.2 14 15 C
"""
"""Sections of RFC 7143 with a MUST, SHOULD, SHALL, REQUIRED or RECOMMENDED of their own."""

_TEST_NAME: Final = re.compile(r"`([\w/]+\.py)(?:::(test_\w+))?`")


@dataclass(frozen=True)
class Test:
    """A test function and its `checklist` markers, those of its parameters included."""

    name: str
    marks: tuple[tuple[int, str], ...]

    __test__ = False


@cache
def every_test() -> dict[str, Test]:
    """Every test of the tree by `path::name`, read without being imported."""
    found = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        body = ast.parse(path.read_text()).body
        of_all = [mark for node in body if _is_pytestmark(node) for mark in _marks(node)]
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith(
                "test_"
            ):
                name = f"{path.relative_to(TESTS).as_posix()}::{node.name}"
                marks = [mark for part in node.decorator_list for mark in _marks(part)]
                found[name] = Test(name, (*of_all, *marks))
    return found


def _is_pytestmark(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"


def _marks(node: ast.AST) -> Iterator[tuple[int, str]]:
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and ast.unparse(part.func) == "pytest.mark.checklist":
            number, section = (ast.literal_eval(argument) for argument in part.args)
            assert isinstance(number, int)
            assert isinstance(section, str)
            yield number, section


@cache
def tables() -> dict[str, list[list[str]]]:
    """The rows of the page's tables by the heading they stand under, without head and rule."""
    found: dict[str, list[list[str]]] = {}
    heading, above = "", ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
            if line.startswith("## "):
                above = heading
        elif line.startswith("|") and not line.startswith("| ---"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            found.setdefault(above, []).append(cells)
    return {name: [row for row in rows if not _is_head(row)] for name, rows in found.items()}


def _is_head(row: list[str]) -> bool:
    return row[0] in ("#", "§", "row")


def checks() -> dict[int, list[str]]:
    """What is checked, its sections, its tests: by number."""
    return {int(row[0]): row[1:] for row in tables()["The 56 checks"]}


def requirements() -> list[list[str]]:
    return tables()["What the RFC asks of an initiator"]


def named(text: str) -> list[str]:
    """The tests and files of tests that a text names."""
    return [f"{path}::{test}" if test else path for path, test in _TEST_NAME.findall(text)]


def is_within(section: str, sections: list[str]) -> bool:
    return any(section == other or section.startswith(f"{other}.") for other in sections)


# -- the 56 checks -------------------------------------------------------------------------------


def test_every_check_is_on_the_page_once() -> None:
    rows = [int(row[0]) for row in tables()["The 56 checks"]]
    assert rows == list(CHECKS)


@pytest.mark.parametrize("number", CHECKS)
def test_a_check_has_tests_that_show_it(number: int) -> None:
    """With its number and one of its sections; the page names no others."""
    what, sections, shown_by = checks()[number]
    marked = {
        test.name for test in every_test().values() if any(mark[0] == number for mark in test.marks)
    }
    assert what
    assert marked, f"no test has the marker checklist({number}, ...)"
    assert named(shown_by)
    assert set(named(shown_by)) <= marked
    for name in marked:
        for mark, section in every_test()[name].marks:
            if mark == number:
                assert is_within(section, sections.split(", ")), (name, section)


def test_every_marker_has_a_number_of_the_list() -> None:
    numbers = {number for test in every_test().values() for number, _ in test.marks}
    assert numbers <= set(CHECKS)


# -- requirements --------------------------------------------------------------------------------


def test_every_section_with_requirements_is_on_the_page() -> None:
    own = {row[0] for row in requirements()}
    others = {
        section
        for row in tables()["What the RFC asks of a target"]
        for section in row[0].split(", ")
    }
    assert set(SECTIONS.split()) - own - others == set()
    assert own - set(SECTIONS.split()) == set()


@pytest.mark.parametrize("row", requirements(), ids=lambda row: f"{row[0]} {row[2][:40]}")
def test_every_requirement_has_a_verdict(row: list[str]) -> None:
    _, level, what, verdict = row
    assert level in LEVELS
    assert what
    assert verdict.startswith(VERDICTS), verdict
    kind, _, reason = verdict.partition(": ")
    if kind == "supported":
        assert named(reason)
        assert all("::" in name for name in named(reason))
    else:
        assert len(reason.split()) > 1, f"no reason: {verdict}"


def test_every_test_that_the_page_names_exists() -> None:
    names = named(PAGE.read_text())
    assert len(names) > 100
    for name in names:
        if "::" in name:
            assert name in every_test(), name
        else:
            assert (TESTS / name).is_file() or (TESTS.parent / "orion_iscsifs" / name).is_file()


# -- pains and quirks ----------------------------------------------------------------------------


def test_every_pain_and_quirk_has_an_answer() -> None:
    rows = tables()["Known pains and quirks"]
    pains = [int(row[0]) for row in rows if row[0].isdigit()]
    assert pains == list(range(1, 29))
    quirks = [row for row in rows if not row[0].isdigit()]
    assert len(quirks) >= 15 + 14
    for row in rows:
        assert len(row) == 3
        assert row[2], row


def test_links_lead_somewhere() -> None:
    """To a page of the manual, and to a heading that it has."""
    links = re.findall(r"\]\(([\w.]*)(?:#([\w-]+))?\)", PAGE.read_text())
    assert links
    for name, anchor in links:
        page = PAGE.parent / name if name else PAGE
        headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings]
        assert not anchor or anchor in anchors, f"{name}#{anchor}"

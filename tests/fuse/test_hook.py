"""The slot that is patched, and that nothing is patched when anything is unusual."""

import ctypes
import logging
import os
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.fuse import slots as module
from orion_iscsifs.fuse.elf import NotUnderstood, call_slots
from orion_iscsifs.fuse.hook import Hook
from orion_iscsifs.fuse.slots import Slot, Unsound, find_slot, loaded_library

IMAGE = Path(pyfuse3.__file__).read_bytes()
NAMES = frozenset({"fuse_session_new", "fuse_session_new_versioned"})
POINTER = 8


def test_the_slot_is_found_in_the_real_binding() -> None:
    slots = call_slots(IMAGE, NAMES)
    assert [len(places) for places in slots.values()] == [1]
    assert call_slots(IMAGE, frozenset({"no_such_function"})) == {}


@pytest.mark.parametrize(
    "image",
    [b"", b"\x7fELF", IMAGE[:200], b"MZ" + IMAGE[2:], IMAGE[:18] + b"\x03\x00" + IMAGE[20:]],
)
def test_other_files_are_not_understood(image: bytes) -> None:
    with pytest.raises(NotUnderstood):
        call_slots(image, NAMES)


@given(st.integers(0, 4096), st.binary(min_size=1, max_size=16))
def test_damaged_headers_never_raise_anything_else(offset: int, damage: bytes) -> None:
    image = IMAGE[:offset] + damage + IMAGE[offset + len(damage) :]
    try:
        slots = call_slots(image, NAMES)
    except NotUnderstood:
        return
    assert set(slots) <= NAMES


def table(entries: int, *empty: int) -> Any:
    made = (ctypes.c_void_p * entries)(*range(1, entries + 1))
    made[40] = None
    for index in empty:
        made[index] = None
    return made


@pytest.mark.parametrize("entries", [42, 44, 46])
def test_the_table_gets_one_entry_more(entries: int) -> None:
    given_table = table(entries)
    extended = Hook()._extended(ctypes.addressof(given_table), entries * POINTER)
    assert extended[40] not in (None, 41)
    others = [index for index in range(entries) if index != 40]
    assert [extended[index] for index in others] == [given_table[index] for index in others]
    assert given_table[40] is None, "the binding's own table stays as it is"


@pytest.mark.parametrize(
    ("made", "size"),
    [
        (table(42), 41 * POINTER),
        (table(42), 42 * POINTER - 1),
        (table(65), 65 * POINTER),
        *((table(42, missing), 42 * POINTER) for missing in (0, 15, 38, 41)),
    ],
)
def test_a_table_that_is_not_the_known_one_is_left_alone(made: Any, size: int) -> None:
    with pytest.raises(Unsound):
        Hook()._extended(ctypes.addressof(made), size)


def test_a_table_that_has_fallocate_is_left_alone() -> None:
    made = table(42)
    made[40] = 7
    with pytest.raises(Unsound):
        Hook()._extended(ctypes.addressof(made), 42 * POINTER)


@pytest.mark.parametrize(
    ("name", "problem"),
    [("call_slots", {}), ("call_slots", {"fuse_session_new": [0x10, 0x20]})],
)
def test_without_a_certain_slot_nothing_is_changed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, problem: object
) -> None:
    monkeypatch.setattr(module, name, lambda *_: problem)
    monkeypatch.setattr(Slot, "put", lambda *_: pytest.fail("a slot was changed"))
    hook = Hook()
    caplog.set_level(logging.INFO)
    with hook.around_init(lambda *_: None):
        pass
    assert not hook.installed
    assert "no fallocate on the device files" in caplog.text


def test_a_slot_with_a_strange_address_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    (places,) = call_slots(IMAGE, NAMES).values()
    # Some other word of the same object: no address of a function.
    monkeypatch.setattr(module, "call_slots", lambda *_: {"fuse_session_new": [places[0] & -4096]})
    monkeypatch.setattr(Slot, "put", lambda *_: pytest.fail("a slot was changed"))
    hook = Hook()
    with hook.around_init(lambda *_: None):
        pass
    assert not hook.installed


def test_the_slot_is_as_before_afterwards() -> None:
    libfuse = ctypes.CDLL(loaded_library("libfuse3.so"))
    slot = find_slot(os.path.realpath(pyfuse3.__file__), NAMES, libfuse).address
    before = ctypes.c_uint64.from_address(slot).value
    with Hook().around_init(lambda *_: None):
        assert ctypes.c_uint64.from_address(slot).value != before
    assert ctypes.c_uint64.from_address(slot).value == before


def test_an_exception_in_the_callback_is_an_answer() -> None:
    hook = Hook()
    answers: list[tuple[int, int]] = []
    hook._reply = lambda request, code: answers.append((request, code))

    def fails(*_: int) -> None:
        raise RuntimeError("a bug")

    hook._on_fallocate = fails
    hook._callback(4711, 2, 3, 0, 4096, None)
    assert answers == [(4711, 5)]

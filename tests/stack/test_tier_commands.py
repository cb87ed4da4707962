"""`orion-iscsifs cache` on tiers: what it tells of them, and what it does to them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from orion_iscsifs.cli.main import run
from orion_iscsifs.config import CacheMode
from orion_iscsifs.stack import open_stack
from orion_iscsifs.tier import record
from orion_iscsifs.url import parse
from tests.stack.test_tiers import KEY, OLD, SPAN, disk_of, image, kept, seen, tiered

# `_state` of that module is a fixture of these tests too.
from tests.stack.test_tiers import _state as _state


def told(capsys: pytest.CaptureFixture[str], command: str, *more: str, code: int = 0) -> Any:
    found = run("orion-iscsifs", ["cache", command, os.environ["TIERS"], "--json", *more])
    out = capsys.readouterr().out
    assert found == code, out
    return json.loads(out)


def folder() -> Path:
    (found,) = Path(os.environ["TIERS"]).iterdir()
    return found


@pytest.mark.parametrize("key", [None, KEY])
async def test_list_and_check(capsys: pytest.CaptureFixture[str], key: bytes | None) -> None:
    async with disk_of(OLD) as (_, running):
        assert await seen(running, tiered(key=key)) == OLD
    document = told(capsys, "list")
    assert document["logs"] == []
    (tier,) = document["tiers"]
    assert tier["folder"] == str(folder())
    assert (tier["state"], tier["sealed"]) == ("clean", key is not None)
    assert 0 < tier["used_bytes"] <= tier["size_bytes"] <= 64 << 20
    assert tier["reservation_key"].startswith("0x")
    assert tier["records"] is None, "a list does not read them"
    (tier,) = told(capsys, "check")["tiers"]
    assert (tier["state"], tier["damage"], tier["bad_records"]) == ("clean", None, 0)
    assert tier["records"] == tier["frames"] == SPAN >> 16


@pytest.mark.parametrize("key", [None, KEY])
async def test_check_finds_a_damaged_record(
    capsys: pytest.CaptureFixture[str], key: bytes | None
) -> None:
    async with disk_of(os.urandom(SPAN)) as (_, running):
        await seen(running, tiered(key=key))
    (segment,) = folder().glob("rseg-*")
    content = bytearray(segment.read_bytes())
    content[content.rindex(record.MAGIC) + record.HEADER_BYTES + 2000] ^= 1
    segment.write_bytes(content)
    (tier,) = told(capsys, "check", code=1)["tiers"]
    assert (tier["state"], tier["bad_records"]) == ("damaged", 1)
    assert run("orion-iscsifs", ["cache", "check", os.environ["TIERS"]]) == 1
    assert "1 are damaged and will be read from the target" in capsys.readouterr().out


async def test_one_in_use_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    async with (
        disk_of(OLD) as (_, running),
        open_stack(parse(running.url(1)), tiered(), "/mnt") as stack,
    ):
        assert await image(stack) == OLD
        await kept(stack.units[0])
        (tier,) = told(capsys, "check")["tiers"]
        assert tier["state"] == "in use"
        assert run("orion-iscsifs", ["cache", "drop", os.environ["TIERS"]]) == 1
        assert "in use by a mount (unmount it first)" in capsys.readouterr().err
        assert folder().exists()


async def test_one_that_a_crash_has_left(capsys: pytest.CaptureFixture[str]) -> None:
    async with disk_of(OLD) as (_, running):
        with trio.CancelScope() as killed:
            async with open_stack(parse(running.url(1)), tiered(), "/mnt") as stack:
                assert await image(stack) == OLD
                await kept(stack.units[0])
                killed.cancel()
                await trio.lowlevel.checkpoint()
    (tier,) = told(capsys, "check")["tiers"]
    assert (tier["state"], tier["damage"], tier["bad_records"]) == ("not closed", None, 0)


async def test_drop_and_rekey(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log and a tier side by side: both get the new key, both go."""
    old, new = tmp_path / "old", tmp_path / "new"
    for path, content in ((old, KEY), (new, b"the new key")):
        path.write_bytes(content)
        path.chmod(0o600)
    config = tiered(mode=CacheMode.LOG, key=KEY)
    assert config.cache.log_dir is not None
    monkeypatch.setenv("TIERS", config.cache.log_dir)
    async with disk_of(OLD) as (_, running):
        assert await seen(running, tiered(mode=CacheMode.LOG, key=KEY)) == OLD
        words = "--key-file", str(old), "--new-key-file", str(new)
        document = told(capsys, "rekey", *words)
        assert [one["rekeyed"] for one in document["logs"] + document["tiers"]] == [True, True]
        assert run("orion-iscsifs", ["cache", "rekey", os.environ["TIERS"], *words]) == 1
        assert "the key does not open it" in capsys.readouterr().err
        assert await seen(running, tiered(mode=CacheMode.LOG, key=b"the new key")) == OLD
    assert run("orion-iscsifs", ["cache", "drop", os.environ["TIERS"]]) == 0
    assert not os.listdir(os.environ["TIERS"])
    assert told(capsys, "list") == {"version": 1, "logs": [], "tiers": []}

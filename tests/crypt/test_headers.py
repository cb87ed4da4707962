"""Damage, unknown things, both copies: what is mended, and what is refused in which words."""

import hashlib
import struct
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import pytest

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.crypt import headers, luks1, luks2
from orion_iscsifs.crypt.errors import LuksError, NoLuksHeader, WrongPassphrase
from orion_iscsifs.crypt.opening import open_luks
from orion_iscsifs.testing.conformance import read
from orion_iscsifs.testing.memory import MemoryDevice
from tests.crypt.helpers import MIB, PASSPHRASE, disk, volume

SECOND = luks2.SIZE_BYTES


async def opens(device: MemoryDevice, passphrase: bytes = PASSPHRASE) -> None:
    opened = await open_luks(device, passphrase, "lun1")
    await read(opened, 0, 4096)


async def refusal(device: MemoryDevice, passphrase: bytes = PASSPHRASE) -> LuksError:
    """Why it does not open. Nothing was written."""
    before = device.peek(0, 17 * MIB)
    with pytest.raises(LuksError) as caught:
        await open_luks(device, passphrase, "lun1")
    assert str(caught.value).startswith("lun1: LUKS")
    assert "\n" not in caught.value.line
    assert device.peek(0, 17 * MIB) == before
    return caught.value


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("block_bytes", [512, 4096])
async def test_what_was_made_opens(version: Literal[1, 2], block_bytes: int) -> None:
    device = await volume(version, block_bytes=block_bytes)
    opened = await open_luks(device, PASSPHRASE, "lun1")
    await opened.write(0, b"x" * 4096)
    again = await open_luks(device, PASSPHRASE, "lun1")
    assert await read(again, 0, 4096) == b"x" * 4096
    assert again.uuid == opened.uuid != ""


@pytest.mark.parametrize("version", [1, 2])
async def test_a_wrong_passphrase(version: Literal[1, 2]) -> None:
    device = await volume(version)
    error = await refusal(device, b"another")
    assert isinstance(error, WrongPassphrase)
    assert "newline" not in error.line
    error = await refusal(device, PASSPHRASE + b"\n")
    assert isinstance(error, WrongPassphrase)
    assert "ends with a newline, which counts" in error.line
    assert PASSPHRASE.decode() not in error.line


async def test_no_header_at_all() -> None:
    error = await refusal(disk())
    assert isinstance(error, NoLuksHeader)
    assert "there is no header" in error.line
    assert "luks format" in error.line


async def test_a_file_system_instead() -> None:
    device = disk()
    device.poke(0x438, b"\x53\xef")
    error = await refusal(device)
    assert isinstance(error, NoLuksHeader)
    assert "ext4" in error.line


async def test_a_tiny_device() -> None:
    with pytest.raises(NoLuksHeader):
        await open_luks(MemoryDevice(512), PASSPHRASE, "lun1")


# -- LUKS1 -----------------------------------------------------------------------------------------


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def name(text: str) -> bytes:
    return text.encode().ljust(32, b"\0")


@pytest.mark.parametrize(
    ("offset", "content", "why"),
    [
        (6, b"\0\3", "version 3 is not known"),
        (8, name("serpent"), "cipher 'serpent-xts-plain64'"),
        (8, b"\xff" * 32, "cipher"),
        (40, name("cbc-essiv:sha256"), "cipher 'aes-cbc-essiv:sha256'"),
        (40, name("xts-plain"), "cipher 'aes-xts-plain'"),
        (72, name("ripemd160"), "hash 'ripemd160'"),
        (104, u32(0), "detached"),
        (104, u32(8), "outside of the header"),
        (104, u32(0xFFFFFFFF), "payload ends"),
        (108, u32(48), "48 bytes"),
        (108, u32(0xFFFFFFFF), "bytes"),
        (164, u32(0), "iterations"),
        (164, u32(0xFFFFFFFF), "4294967295 iterations"),
        (208, u32(0), "key slot 0: neither"),
        (208 + 4, u32(0xFFFFFFFF), "4294967295 iterations"),
        (208 + 40, u32(0), "outside of the header"),
        (208 + 40, u32(0xFFFFFFF0), "outside of the header"),
        (208 + 44, u32(0), "0 stripes"),
        (208 + 44, u32(0xFFFFFFFF), "stripes"),
        (208, u32(luks1.DISABLED), "no key slot"),
        # Of these nothing tells but that the key is not found any more.
        (112, bytes(20), "no key slot opens"),
        (132, bytes(32), "no key slot opens"),
        (208 + 8, bytes(32), "no key slot opens"),
        (4096 + 77, b"\xff\0\xff", "no key slot opens"),
    ],
)
async def test_luks1_damage(offset: int, content: bytes, why: str) -> None:
    device = await volume(1)
    device.poke(offset, content)
    assert why in (await refusal(device)).line


async def test_luks1_two_slots_in_one_place() -> None:
    device = await volume(1)
    first = device.peek(208, 48)
    device.poke(208 + 48, first)
    assert "in the same place" in (await refusal(device)).line


@pytest.mark.parametrize(
    ("left_bytes", "why"), [(64 << 10, "past the end"), (2 * MIB, "payload ends")]
)
async def test_luks1_truncated(left_bytes: int, why: str) -> None:
    device = await volume(1)
    device.change_geometry(size_bytes=left_bytes)
    assert why in (await refusal_of_short(device)).line


async def refusal_of_short(device: MemoryDevice) -> LuksError:
    with pytest.raises(LuksError) as caught:
        await open_luks(device, PASSPHRASE, "lun1")
    return caught.value


# -- LUKS2: two copies -----------------------------------------------------------------------------


async def damage_of(device: MemoryDevice) -> str:
    return (await headers.load(AlignedDevice(device))).damage


@pytest.mark.parametrize(
    ("offset", "what"),
    [
        (0, "magic"),
        (6, "version"),
        (9, "size"),
        (16, "sequence"),
        (24, "label"),
        (72, "checksum's name"),
        (104, "salt"),
        (168, "uuid"),
        (256, "offset"),
        (300, "padding"),
        (448, "checksum"),
        (1000, "padding"),
        (4096 + 5, "text"),
        (16383, "the last byte"),
    ],
)
@pytest.mark.parametrize("which", ["first", "second"])
async def test_one_flipped_bit_in_one_copy_is_mended_by_the_other(
    offset: int, what: str, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = await volume(2)
    at = offset + (0 if which == "first" else SECOND)
    device.poke(at, bytes([device.peek(at, 1)[0] ^ 0x10]))
    await opens(device)
    assert f"the {which} copy of the header is damaged" in caplog.text, what
    assert "luks add-key" in caplog.text


@pytest.mark.parametrize("offset", [0, 9, 16, 448, 4096 + 5])
async def test_both_copies_damaged(offset: int) -> None:
    device = await volume(2)
    for at in (offset, SECOND + offset):
        device.poke(at, bytes([device.peek(at, 1)[0] ^ 0x10]))
    line = (await refusal(device)).line
    assert "header" in line


async def test_the_newer_copy_counts(caplog: pytest.LogCaptureFixture) -> None:
    device = await volume(2)
    header = await headers.load(AlignedDevice(device))
    assert isinstance(header, luks2.Luks2)
    newer = header.without_slot(31)
    assert newer.sequence == header.sequence + 1
    device.poke(SECOND, newer.encode(second=True, salt=bytes(64)))
    found = await headers.load(AlignedDevice(device))
    assert isinstance(found, luks2.Luks2)
    assert found.sequence == newer.sequence
    assert "the first copy of the header is older" in found.damage
    await opens(device)
    assert "older" in caplog.text


async def test_swapped_copies_are_no_copies() -> None:
    device = await volume(2)
    first, second = device.peek(0, SECOND), device.peek(SECOND, SECOND)
    device.poke(0, second)
    device.poke(SECOND, first)
    await refusal(device)


async def test_a_copy_at_an_unlikely_place_is_found() -> None:
    """The second copy of a header of 64 KiB, whose first one was overwritten."""
    device = await volume(2)
    header = await headers.load(AlignedDevice(device))
    assert isinstance(header, luks2.Luks2)
    raw = header.raw
    raw["config"]["json_size"] = str(65536 - 4096)
    moved = luks2.Luks2(
        size_bytes=65536,
        sequence=9,
        label=b"",
        subsystem=b"",
        checksum="sha512",
        uuid=header.uuid,
        text=msgspec.json.encode(raw),
    )
    device.poke(0, bytes(2 * SECOND))
    device.poke(65536, moved.encode(second=True, salt=bytes(64)))
    found = await headers.load(AlignedDevice(device))
    assert isinstance(found, luks2.Luks2)
    assert (found.sequence, found.size_bytes) == (9, 65536)
    assert found.damage == "the first copy of the header is damaged"


async def test_a_file_system_over_a_volume_is_not_taken_for_one() -> None:
    device = await volume(2)
    device.poke(0, b"XFSB" + bytes(4092))
    line = (await refusal(device)).line
    assert "XFS" in line
    assert "in its place" in line


async def test_truncated_behind_the_header() -> None:
    device = await volume(2)
    device.change_geometry(size_bytes=SECOND + 4096)
    assert "past the end" in (await refusal_of_short(device)).line


# -- LUKS2: the text -------------------------------------------------------------------------------


async def rewritten(change: Callable[[dict[str, Any]], None]) -> MemoryDevice:
    """A volume whose header says something else, with good checksums."""
    device = await volume(2, pbkdf="argon2id")
    header = await headers.load(AlignedDevice(device))
    assert isinstance(header, luks2.Luks2)
    raw = header.raw
    change(raw)
    put(device, header, msgspec.json.encode(raw))
    return device


def put(device: MemoryDevice, header: luks2.Luks2, text: bytes) -> None:
    changed = luks2.Luks2(
        size_bytes=header.size_bytes,
        sequence=header.sequence + 1,
        label=header.label,
        subsystem=header.subsystem,
        checksum=header.checksum,
        uuid=header.uuid,
        text=text,
    )
    device.poke(0, changed.encode(second=False, salt=bytes(64)))
    device.poke(SECOND, changed.encode(second=True, salt=bytes(64)))


async def test_key_slots_larger_than_any() -> None:
    """Removing one would overwrite all of its area: that much memory, and perhaps data."""

    def change(raw: dict[str, Any]) -> None:
        raw["config"]["keyslots_size"] = str(1 << 40)
        raw["keyslots"]["0"]["area"]["size"] = str(1 << 39)
        raw["segments"]["0"]["offset"] = str(1 << 41)

    device = await rewritten(change)
    assert "bytes of key slots: at most 134217728" in (await refusal(device)).line


async def test_a_digest_that_costs_more_than_the_slots() -> None:
    """It is computed once for each slot that is tried."""

    def change(raw: dict[str, Any]) -> None:
        raw["digests"]["0"]["iterations"] = 1 << 28
        slot = raw["keyslots"]["0"]
        for number in range(1, 17):
            area = {**slot["area"], "offset": str(32768 + number * 258048)}
            raw["keyslots"][str(number)] = {**slot, "area": area}
        raw["digests"]["0"]["keyslots"] = [str(number) for number in range(17)]

    assert "more work" in (await refusal(await rewritten(change))).line


def setting(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        *inner, last = path.split("/")
        for step in inner:
            raw = raw[step]
        raw[last] = value

    return change


SLOT = "keyslots/0"
HUGE = str(2**63)


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("config/requirements", {"mandatory": ["online-reencrypt-v2"]}, "'online-reencrypt-v2'"),
        ("segments/1", {"type": "linear", "offset": "0", "size": "512"}, "2 segments"),
        ("segments/0/type", "hw-opal", "'hw-opal'"),
        ("segments/0/integrity", {"type": "hmac(sha256)"}, "integrity"),
        ("segments/0/flags", ["in-reencryption"], "'in-reencryption'"),
        ("segments/0/encryption", "aes-cbc-essiv:sha256", "'aes-cbc-essiv:sha256'"),
        ("segments/0/encryption", "capi:adiantum-plain64", "cipher"),
        ("segments/0/sector_size", 256, "sectors of 256"),
        ("segments/0/sector_size", 8192, "sectors of 8192"),
        ("segments/0/sector_size", -1, "makes no sense"),
        ("segments/0/offset", "0", "lies in the key slots"),
        ("segments/0/offset", HUGE, "no size"),
        ("segments/0/offset", "16777217", "not whole sectors"),
        ("keyslots/01", {"type": "x", "area": {"type": "x", "offset": "0", "size": "0"}}, "sense"),
        ("digests/0/keyslots", ["0\n"], "makes no sense"),
        ("segments/0/size", "1000", "not whole sectors"),
        ("segments/0/size", "0", "no size"),
        ("segments/0/size", "x", "no size"),
        ("segments/0/size", str(1 << 50), "has shrunk"),
        ("segments/0/iv_tweak", HUGE, "no size"),
        ("digests/0/segments", ["7"], "no digest"),
        ("digests/0/type", "sha3", "'sha3'"),
        ("digests/0/hash", "whirlpool", "'whirlpool'"),
        ("digests/0/iterations", 2**31, "iterations"),
        ("digests/0/digest", "QQ==", "digest of 1 bytes"),
        ("digests/0/keyslots", ["5"], "key slot 5, which does not exist"),
        ("digests/0/keyslots", [], "no key slot"),
        (f"{SLOT}/type", "reencrypt", "'reencrypt'"),
        (f"{SLOT}/key_size", 48, "48 bytes"),
        (f"{SLOT}/area/key_size", 0, "0 bytes"),
        (f"{SLOT}/area/encryption", "twofish-xts-plain64", "'twofish-xts-plain64'"),
        (f"{SLOT}/area/offset", "0", "outside of the key slots"),
        (f"{SLOT}/area/offset", str(1 << 40), "outside of the key slots"),
        (f"{SLOT}/area/size", "4096", "don't fit"),
        (f"{SLOT}/area/type", "journal", "'journal'"),
        (f"{SLOT}/af/stripes", 0, "0 stripes"),
        (f"{SLOT}/af/stripes", 2**31, "stripes"),
        (f"{SLOT}/af/type", "luks9", "'luks9'"),
        (f"{SLOT}/af/hash", "md5", "'md5'"),
        (f"{SLOT}/kdf/type", "argon2d", "'argon2d'"),
        (f"{SLOT}/kdf/memory", 2**32 - 1, "KiB"),
        (f"{SLOT}/kdf/memory", 1, "KiB"),
        (f"{SLOT}/kdf/time", 2**32 - 1, "passes"),
        (f"{SLOT}/kdf/time", 0, "passes"),
        (f"{SLOT}/kdf/cpus", 0, "lanes"),
        (f"{SLOT}/kdf/cpus", 4096, "lanes"),
        (f"{SLOT}/kdf/salt", "", "salt"),
        (f"{SLOT}/kdf/salt", "not base64!", "makes no sense"),
        (f"{SLOT}/kdf", {"type": "pbkdf2", "hash": "sha256", "salt": "AAAA"}, "0 iterations"),
        (f"{SLOT}/priority", 0, "no key slot"),
        ("keyslots/1", {"type": "luks2"}, "makes no sense"),
        ("keyslots", {}, "does not exist"),
        ("config/keyslots_size", str(1 << 40), "lies in the key slots"),
        ("config", None, "makes no sense"),
    ],
)
async def test_what_is_not_known_or_makes_no_sense(path: str, value: object, why: str) -> None:
    device = await rewritten(setting(path, value))
    assert why in (await refusal(device)).line


async def test_areas_that_overlap() -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["keyslots"]["1"] = raw["keyslots"]["0"]

    assert "in the same place" in (await refusal(await rewritten(change))).line


async def test_a_slot_that_is_not_known_does_not_keep_others_from_opening() -> None:
    def change(raw: dict[str, Any]) -> None:
        other = {**raw["keyslots"]["0"], "kdf": {"type": "argon2d", "salt": "AAAA"}}
        area = {**other["area"], "offset": str(1 << 20)}
        raw["keyslots"]["1"] = {**other, "area": area}
        raw["digests"]["0"]["keyslots"] = ["0", "1"]
        raw["tokens"] = {"0": {"type": "of somebody", "keyslots": ["1"], "more": [1, {"a": None}]}}

    await opens(await rewritten(change))


async def test_too_many_costly_slots_are_not_tried() -> None:
    def change(raw: dict[str, Any]) -> None:
        for number in range(6):
            costly = {**raw["keyslots"]["0"]["kdf"], "memory": 1 << 20, "time": 64}
            area = {**raw["keyslots"]["0"]["area"], "offset": str((number + 1) << 20)}
            slot = {**raw["keyslots"]["0"], "kdf": costly, "area": area}
            raw["keyslots"][str(number + 1)] = slot
        raw["digests"]["0"]["keyslots"] = [str(number) for number in range(7)]

    assert "more work" in (await refusal(await rewritten(change))).line


async def test_more_memory_than_there_is_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from orion_iscsifs.crypt import keys

    device = await rewritten(setting(f"{SLOT}/kdf/memory", 1 << 20))
    monkeypatch.setattr(keys, "_meminfo_kib", lambda name: 500 << 10)
    line = (await refusal(device)).line
    assert "1024 MiB" in line
    assert "500 MiB are available" in line


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"{" * 6000,
        b"[" * 12000,
        b'{"keyslots":' * 900,
        b'{"keyslots": {"0": NaN}}',
        b"\xff\xfe{}",
        b'{"keyslots":{},"segments":{},"digests":{},"config":{"json_size":"1"',
        b'{"keyslots":{},"segments":{},"digests":{},"config":{"json_size":"-1","keyslots_size":"0"}}',
        b'{"keyslots":{"' + b"9" * 9000 + b'":{}},"segments":{},"digests":{},"config":{}}',
        b"9" * 12000,
    ],
)
async def test_text_that_is_none(text: bytes) -> None:
    device = await volume(2)
    header = await headers.load(AlignedDevice(device))
    assert isinstance(header, luks2.Luks2)
    put(device, header, text)
    assert "makes no sense" in (await refusal(device)).line


async def test_a_later_version_is_said_to_be_one() -> None:
    device = await volume(2)
    for at in (0, SECOND):
        blob = bytearray(device.peek(at, SECOND))
        blob[6:8] = b"\0\x03"
        blob[448:512] = bytes(64)
        blob[448:480] = hashlib.sha256(blob).digest()
        device.poke(at, bytes(blob))
    assert "version 3 is not known" in (await refusal(device)).line

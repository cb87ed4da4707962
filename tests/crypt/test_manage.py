"""Making volumes and changing their keys, also when the power goes in the middle of it."""

import contextlib
import dataclasses
import random
from collections.abc import Awaitable, Callable
from typing import Literal

import pytest

from orion_iscsifs.block.align import AlignedDevice
from orion_iscsifs.block.device import BlockDevice, Buffer, Geometry, GeometryListener
from orion_iscsifs.crypt import headers, luks1, luks2, manage
from orion_iscsifs.crypt.errors import LuksError, WrongPassphrase
from orion_iscsifs.crypt.headers import Header
from orion_iscsifs.crypt.manage import Format
from orion_iscsifs.crypt.opening import open_luks
from orion_iscsifs.errors import DeviceError, UsageError
from orion_iscsifs.testing.conformance import read
from orion_iscsifs.testing.memory import MemoryDevice
from tests.crypt.helpers import MIB, PASSPHRASE, costs, disk, how, volume

OTHER, THIRD = b"another one", b"a third one"


async def loaded(device: BlockDevice) -> Header:
    return await headers.load(AlignedDevice(device))


async def opens(device: BlockDevice, passphrase: bytes) -> bool:
    try:
        await open_luks(device, passphrase, "lun1")
    except WrongPassphrase:
        return False
    return True


async def add(device: BlockDevice, existing: bytes, new: bytes) -> int:
    aligned = AlignedDevice(device)
    header = await headers.load(aligned)
    return (await manage.add_key(aligned, header, existing, new, costs()))[1]


async def remove(device: BlockDevice, passphrase: bytes, *, force: bool = False) -> None:
    aligned = AlignedDevice(device)
    header = await headers.load(aligned)
    slot = await manage.slot_of(aligned, header.volume, passphrase)
    await manage.remove_key(aligned, header, slot, force=force)


@pytest.mark.parametrize("version", [1, 2])
async def test_keys_come_and_go_and_the_data_stays(version: Literal[1, 2]) -> None:
    device = await volume(version)
    await (await open_luks(device, PASSPHRASE, "")).write(0, b"data" * 1024)
    assert await add(device, PASSPHRASE, OTHER) == 1
    assert await add(device, OTHER, THIRD) == 2
    await remove(device, PASSPHRASE)
    assert [await opens(device, one) for one in (PASSPHRASE, OTHER, THIRD)] == [False, True, True]
    assert await add(device, OTHER, PASSPHRASE) == 0
    await remove(device, OTHER)
    await remove(device, THIRD)
    opened = await open_luks(device, PASSPHRASE, "")
    assert await read(opened, 0, 4096) == b"data" * 1024
    assert not (await loaded(device)).damage


@pytest.mark.parametrize("version", [1, 2])
async def test_the_material_of_a_removed_slot_is_gone(version: Literal[1, 2]) -> None:
    device = await volume(version)
    await add(device, PASSPHRASE, OTHER)
    old_header = device.peek(0, 32 << 10)
    slot = (await loaded(device)).volume.slots[0]
    before = device.peek(slot.offset_bytes, slot.room_bytes)
    await remove(device, PASSPHRASE)
    after = device.peek(slot.offset_bytes, slot.room_bytes)
    same = sum(a == b for a, b in zip(before, after, strict=True))
    assert same < slot.material_bytes // 100
    # Not even with the header as it was.
    device.poke(0, old_header)
    assert not await opens(device, PASSPHRASE)
    assert await opens(device, OTHER)


@pytest.mark.parametrize("version", [1, 2])
async def test_the_last_slot_is_kept(version: Literal[1, 2]) -> None:
    device = await volume(version)
    with pytest.raises(LuksError, match="the last one") as caught:
        await remove(device, PASSPHRASE)
    assert "--force" in caught.value.line
    assert await opens(device, PASSPHRASE)
    await remove(device, PASSPHRASE, force=True)
    with pytest.raises(LuksError, match="no key slot"):
        await open_luks(device, PASSPHRASE, "lun1")


@pytest.mark.parametrize(("version", "slots"), [(1, 8), (2, 32)])
async def test_all_slots_in_use(version: Literal[1, 2], slots: int) -> None:
    device = await volume(version)
    header = await loaded(device)
    aligned = AlignedDevice(device)
    for number in range(1, slots):
        # The same key again and again: opening it once is enough.
        header, slot = await manage._with_key(header, costs(), bytes(range(64)))
        assert slot.number == number
    assert len(header.volume.slots) == slots
    await headers.store(aligned, header)
    assert len((await loaded(device)).volume.slots) == slots
    with pytest.raises(LuksError, match=f"all {slots} key slots are in use"):
        await add(device, PASSPHRASE, OTHER)


async def test_no_room_for_one_more_slot() -> None:
    device = await volume(2)
    header = await loaded(device)
    assert isinstance(header, luks2.Luks2)
    raw = header.raw
    raw["config"]["keyslots_size"] = str(300_000)
    import msgspec

    small = luks2.Luks2(
        size_bytes=header.size_bytes,
        sequence=9,
        label=b"",
        subsystem=b"",
        checksum="sha256",
        uuid=header.uuid,
        text=msgspec.json.encode(raw),
    )
    await headers.store(AlignedDevice(device), small)
    with pytest.raises(LuksError, match="no room"):
        await add(device, PASSPHRASE, OTHER)


async def test_what_others_put_into_the_header_stays() -> None:
    import msgspec

    device = await volume(2)
    header = await loaded(device)
    assert isinstance(header, luks2.Luks2)
    raw = header.raw
    raw["tokens"] = {"3": {"type": "systemd-tpm2", "keyslots": ["0"], "blob": "x" * 50}}
    raw["config"]["flags"] = ["allow-discards", "no-such-flag"]
    raw["keyslots"]["0"]["somebody's"] = [1, 2, {"deep": None}]
    text = msgspec.json.encode(raw)
    aligned = AlignedDevice(device)
    await headers.store(aligned, dataclasses.replace(header, text=text))
    await add(device, PASSPHRASE, OTHER)
    changed = await loaded(device)
    assert isinstance(changed, luks2.Luks2)
    kept = changed.raw
    assert kept["tokens"] == raw["tokens"]
    assert kept["config"] == raw["config"]
    assert kept["keyslots"]["0"] == raw["keyslots"]["0"]
    await remove(device, PASSPHRASE)
    changed = await loaded(device)
    assert isinstance(changed, luks2.Luks2)
    assert changed.raw["tokens"]["3"]["keyslots"] == []


@pytest.mark.parametrize("damaged", [0, luks2.SIZE_BYTES])
async def test_adding_a_key_mends_a_damaged_copy(damaged: int) -> None:
    device = await volume(2)
    device.poke(damaged + 4100, b"\0\0\0")
    assert (await loaded(device)).damage
    await add(device, PASSPHRASE, OTHER)
    assert not (await loaded(device)).damage
    assert await opens(device, OTHER)


# -- what is on the device before ------------------------------------------------------------------


def at_the_end(content: bytes) -> int:
    return 20 * MIB - len(content)


@pytest.mark.parametrize(
    ("offset", "content", "what"),
    [
        (0, b"LUKS\xba\xbe\0\1", "LUKS"),
        (16384, b"SKUL\xba\xbe\0\2", "LUKS2"),
        (0x438, b"\x53\xef", "ext4"),
        (0, b"XFSB", "XFS"),
        (0x10040, b"_BHRfS_M", "btrfs"),
        (512, b"EFI PART", "GPT"),
        (4096, b"EFI PART", "GPT"),
        (at_the_end(bytes(512)), b"EFI PART", "GPT"),
        (at_the_end(bytes(4096)), b"EFI PART", "GPT"),
        (510, b"\x55\xaa", "MBR"),
        (512, b"LABELONE", "LVM"),
        (4086, b"SWAPSPACE2", "swap"),
        (4096, b"\xfc\x4e\x2b\xa9", "RAID"),
        (3, b"NTFS    ", "NTFS"),
    ],
)
async def test_what_is_there_is_not_overwritten(offset: int, content: bytes, what: str) -> None:
    device = disk()
    device.poke(offset, content)
    before = device.peek(0, 20 * MIB)
    with pytest.raises(LuksError) as caught:
        await manage.format_volume(AlignedDevice(device), PASSPHRASE, how())
    assert what in caught.value.line
    assert "--force" in caught.value.line
    assert device.peek(0, 20 * MIB) == before
    await manage.format_volume(AlignedDevice(device), PASSPHRASE, how(force=True))
    assert await opens(device, PASSPHRASE)


async def test_nothing_of_the_volume_before_is_left() -> None:
    device = await volume(2)
    await add(device, PASSPHRASE, OTHER)
    await manage.format_volume(AlignedDevice(device), THIRD, how(1, force=True))
    assert await opens(device, THIRD)
    assert not await opens(device, OTHER)
    assert device.peek(luks2.SIZE_BYTES, 6) != luks2.SECOND_MAGIC


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (how(1, sector_bytes=4096), "LUKS1 has"),
        (how(1, pbkdf="argon2id"), "LUKS1 has"),
        (Format(version=1, costs=costs(), label="x"), "LUKS1 has"),
    ],
)
async def test_what_luks1_can_not(wanted: Format, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        await manage.format_volume(AlignedDevice(disk()), PASSPHRASE, wanted)


async def test_a_device_that_is_too_small() -> None:
    small = AlignedDevice(MemoryDevice(16 * MIB))
    with pytest.raises(UsageError, match="header alone takes") as caught:
        await manage.format_volume(small, PASSPHRASE, how())
    assert "luks1" in caught.value.line
    await manage.format_volume(small, PASSPHRASE, how(1))


@pytest.mark.parametrize(
    ("physical", "size", "sector"),
    [(4096, 20 * MIB, 4096), (512, 20 * MIB, 512), (4096, 20 * MIB + 512, 512)],
)
async def test_sectors_by_default(physical: int, size: int, sector: int) -> None:
    geometry = Geometry(size_bytes=size, physical_block_bytes=physical)
    device = MemoryDevice(geometry=geometry)
    header = await manage.format_volume(AlignedDevice(device), PASSPHRASE, how())
    assert header.volume.payload.sector_bytes == sector


# -- loss of power ---------------------------------------------------------------------------------


class PowerCut:
    """The power goes instead of the `after`th write; what was not flushed by then may be lost."""

    def __init__(self, device: MemoryDevice, after: int) -> None:
        self.device = device
        self.left = after
        self.is_gone = False

    @property
    def geometry(self) -> Geometry:
        return self.device.geometry

    def on_geometry_change(self, listener: GeometryListener) -> None:
        self.device.on_geometry_change(listener)

    async def read_into(self, offset: int, target: memoryview) -> None:
        await self.device.read_into(offset, target)

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        view = memoryview(source)
        if self.left == 0:
            # Half of it got through.
            await self.device.write(offset, view[: len(view) // 1024 * 512])
            self.is_gone = True
            raise DeviceError("the power is gone")
        self.left -= 1
        await self.device.write(offset, source, fua=fua)

    async def flush(self) -> None:
        await self.device.flush()

    async def discard(self, offset: int, length: int) -> None:
        await self.device.discard(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        await self.device.write_zeroes(offset, length, may_unmap=may_unmap)


async def two_keys() -> MemoryDevice:
    device = await volume(2)
    await add(device, PASSPHRASE, OTHER)
    return device


async def cut(
    work: Callable[[BlockDevice], Awaitable[object]],
    check: Callable[[MemoryDevice], Awaitable[None]],
    before: Callable[[], Awaitable[MemoryDevice]] = two_keys,
) -> None:
    """Do `work` with the power gone at every one of its writes, several ways each."""
    first = await before()
    start = first.peek(0, 2 * MIB)
    for after in range(20):
        cuts = 0
        for seed in range(3):
            rng = random.Random(seed)
            device = MemoryDevice(geometry=first.geometry, volatile_cache=True)
            device.poke(0, start)
            power = PowerCut(device, after)
            with contextlib.suppress(DeviceError):
                await work(power)
            cuts += power.is_gone
            device.crash(rng.choice)
            await check(device)
        if not cuts:
            assert after >= 3, "this does not write what it should"
            return
    raise AssertionError("it never ends")


async def test_adding_a_key_is_safe_against_a_loss_of_power() -> None:
    async def work(device: BlockDevice) -> None:
        await add(device, PASSPHRASE, THIRD)

    async def check(device: MemoryDevice) -> None:
        assert await opens(device, PASSPHRASE)
        assert await opens(device, OTHER)
        if len((await loaded(device)).volume.slots) == 3:
            assert await opens(device, THIRD)

    await cut(work, check)


async def test_removing_a_key_is_safe_against_a_loss_of_power() -> None:
    async def work(device: BlockDevice) -> None:
        await remove(device, OTHER)

    async def check(device: MemoryDevice) -> None:
        assert await opens(device, PASSPHRASE)
        if len((await loaded(device)).volume.slots) == 1:
            assert not await opens(device, OTHER)

    await cut(work, check)


async def test_luks1_places_are_those_of_the_format() -> None:
    header = await loaded(await volume(1))
    assert isinstance(header, luks1.Luks1)
    assert [block.material_sector for block in header.blocks] == [8 + 504 * n for n in range(8)]
    assert header.payload_sector == 4096


@pytest.mark.parametrize("damaged", [0, luks2.SIZE_BYTES])
async def test_the_only_copy_that_is_whole_is_written_last(damaged: int) -> None:
    async def before() -> MemoryDevice:
        device = await two_keys()
        device.poke(damaged + 4100, b"\0\0\0")
        return device

    async def work(device: BlockDevice) -> None:
        await remove(device, OTHER)

    async def check(device: MemoryDevice) -> None:
        assert await opens(device, PASSPHRASE)

    await cut(work, check, before)


async def test_a_key_that_only_the_newer_copy_knows_is_not_lost() -> None:
    """The power went between the copies when it was added; the old key goes, and it goes again."""

    async def before() -> MemoryDevice:
        device = await volume(2)
        old = device.peek(0, luks2.SIZE_BYTES)
        await add(device, PASSPHRASE, OTHER)
        device.poke(0, old)
        assert "the first copy of the header is older" in (await loaded(device)).damage
        return device

    async def work(device: BlockDevice) -> None:
        await remove(device, PASSPHRASE)

    async def check(device: MemoryDevice) -> None:
        assert await opens(device, OTHER)

    await cut(work, check, before)


async def test_sectors_that_the_device_is_not_whole_of() -> None:
    device = MemoryDevice(20 * MIB + 512)
    with pytest.raises(UsageError, match="not whole sectors of 4096") as caught:
        await manage.format_volume(AlignedDevice(device), PASSPHRASE, how(sector_bytes=4096))
    assert "--sector-size 512" in caught.value.line
    assert not any(device.peek(0, 20 * MIB))


async def test_new_key_material_begins_with_a_page() -> None:
    """Whatever another program has left behind the last slot."""
    device = await volume(2)
    header = await loaded(device)
    assert isinstance(header, luks2.Luks2)
    raw = header.raw
    area = raw["keyslots"]["0"]["area"]
    area["size"] = str(int(area["size"]) + 1)
    changed = header._changed(raw)
    await headers.store(AlignedDevice(device), changed)
    await add(device, PASSPHRASE, OTHER)
    assert (await loaded(device)).volume.slots[1].offset_bytes % 4096 == 0

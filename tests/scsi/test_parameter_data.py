"""INQUIRY, VPD, capacity, mode, LUN and provisioning data: golden bytes, round trips, hostility."""

from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.scsi import capacity, inquiry, lun, mode, provisioning
from orion_iscsifs.scsi.capacity import Capacity
from orion_iscsifs.scsi.inquiry import Designator, DesignatorType
from orion_iscsifs.scsi.malformed import MalformedData

# -- inquiry ---------------------------------------------------------------------------------------


def test_standard_inquiry_golden() -> None:
    data = inquiry.encode_inquiry(
        inquiry.StandardInquiry(vendor="ORION", product="iSCSI disk", revision="0100")
    )
    assert data[:8] == bytes.fromhex("00 00 06 12 3d 00 00 02")
    assert data[8:36] == b"ORION   iSCSI disk      0100"
    assert data[58:66] == bytes.fromhex("00a0 0460 04c0 0960")
    decoded = inquiry.decode_inquiry(data)
    assert decoded.is_disk
    assert (decoded.vendor, decoded.product, decoded.revision) == ("ORION", "iSCSI disk", "0100")


def test_a_controller_is_no_disk() -> None:
    assert not inquiry.decode_inquiry(bytes.fromhex("0c 00 05 02 1f")).is_disk
    assert not inquiry.decode_inquiry(bytes.fromhex("7f 00 05 02 1f")).is_disk
    assert not inquiry.decode_inquiry(bytes.fromhex("20 00 05 02 1f")).is_disk


def test_control_characters_do_not_reach_a_terminal() -> None:
    data = bytearray(inquiry.encode_inquiry(inquiry.StandardInquiry(vendor="ORION")))
    data[8:16] = b"\x1b[31mEV\xff"
    assert inquiry.decode_inquiry(data).vendor.isprintable()


def test_device_identification_golden() -> None:
    designators = [
        Designator(DesignatorType.T10_VENDOR_ID, b"ORION   abc", code_set=2),
        Designator(DesignatorType.NAA, bytes.fromhex("3123456789abcdef")),
        Designator(DesignatorType.SCSI_NAME, b"iqn.x,t,0x0001\0\0", association=1, code_set=3),
    ]
    data = inquiry.encode_designators(designators)
    assert data[:4] == bytes.fromhex("0083 002f")
    assert data[4:8] == bytes.fromhex("02 01 00 0b")
    assert data[19:23] == bytes.fromhex("01 03 00 08")
    assert data[31:35] == bytes.fromhex("53 98 00 10")
    assert inquiry.decode_designators(data) == designators
    best = inquiry.best_designator(designators)
    assert best is not None
    assert best.text == "3123456789abcdef"
    assert inquiry.best_designator([]) is None


def test_an_incomplete_designator_is_dropped() -> None:
    data = inquiry.encode_designators([Designator(3, bytes(8)), Designator(3, bytes(8))])
    assert len(inquiry.decode_designators(data[:-1])) == 1


def test_block_limits_golden_and_round_trip() -> None:
    limits = inquiry.BlockLimits(
        compare_and_write_blocks_max=255,
        optimal_transfer_granularity=8,
        transfer_blocks_max=65536,
        optimal_transfer_blocks=2048,
        unmap_blocks_max=0xFFFFFFFF,
        unmap_descriptors_max=256,
        optimal_unmap_granularity=8,
        unmap_alignment=0,
        write_same_blocks_max=1 << 18,
        write_same_non_zero=True,
    )
    data = inquiry.encode_block_limits(limits)
    assert data[:16] == bytes.fromhex("00b0003c 01ff0008 00010000 00000800")
    assert data[20:44] == bytes.fromhex("ffffffff 00000100 00000008 80000000 0000000000040000")
    assert inquiry.decode_block_limits(data) == limits
    assert inquiry.decode_block_limits(data[:12]).unmap_blocks_max == 0


def test_other_pages_round_trip() -> None:
    assert inquiry.decode_supported_pages(inquiry.encode_supported_pages([0xB0, 0, 0x83])) == {
        0,
        0x83,
        0xB0,
    }
    assert inquiry.decode_serial_number(inquiry.encode_serial_number("4711 ")) == "4711"
    assert inquiry.decode_rotation_rate(inquiry.encode_rotation_rate(7200)) == 7200
    thin = inquiry.Provisioning(
        unmap=True, write_same_16_unmap=True, reads_zeroes=True, provisioning_type=2
    )
    assert inquiry.encode_provisioning(thin) == bytes.fromhex("00b20004 00c40200")
    assert inquiry.decode_provisioning(inquiry.encode_provisioning(thin)) == thin


DECODERS: list[Callable[[bytes], object]] = [
    inquiry.decode_inquiry,
    inquiry.decode_supported_pages,
    inquiry.decode_serial_number,
    inquiry.decode_designators,
    inquiry.decode_block_limits,
    inquiry.decode_rotation_rate,
    inquiry.decode_provisioning,
    capacity.decode_capacity_10,
    capacity.decode_capacity_16,
    mode.decode_mode_sense_6,
    mode.decode_mode_sense_10,
    lun.decode_report_luns,
    lun.report_luns_length,
    provisioning.decode_unmap,
    provisioning.decode_lba_status,
]
PAGES = (0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2)


@pytest.mark.parametrize("decoder", DECODERS)
@given(raw=st.binary(max_size=400), page=st.sampled_from(PAGES))
def test_hostile_bytes_give_a_value_or_malformed_data(
    decoder: Callable[[bytes], object], raw: bytes, page: int
) -> None:
    for data in (raw, b"\0" + bytes((page,)) + raw):
        with suppress(MalformedData):
            decoder(data)


# -- capacity --------------------------------------------------------------------------------------


def test_capacity_golden() -> None:
    disk = Capacity(
        blocks=1 << 33,
        block_bytes=512,
        blocks_per_physical_exponent=3,
        provisioning=True,
        reads_zeroes=True,
    )
    data = capacity.encode_capacity_16(disk)
    assert data == bytes.fromhex("00000001ffffffff 00000200 00 03 c000").ljust(32, b"\0")
    assert capacity.decode_capacity_16(data) == disk
    assert disk.physical_block_bytes == 4096
    assert capacity.encode_capacity_10(disk) == bytes.fromhex("ffffffff 00000200")
    assert capacity.decode_capacity_10(bytes.fromhex("ffffffff 00000200")) is None


def test_capacity_10() -> None:
    disk = capacity.decode_capacity_10(bytes.fromhex("000007ff 00001000"))
    assert disk is not None
    assert disk.size_bytes == 2048 * 4096


@pytest.mark.parametrize("block", ["00000000", "00000208", "00000100", "00020000", "ffffffff"])
def test_impossible_block_lengths_are_refused(block: str) -> None:
    with pytest.raises(MalformedData):
        capacity.decode_capacity_16(bytes.fromhex("00000000000007ff" + block).ljust(32, b"\0"))


def test_a_size_beyond_64_bits_is_refused() -> None:
    with pytest.raises(MalformedData):
        capacity.decode_capacity_16(bytes.fromhex("ffffffffffffffff 00000200").ljust(32, b"\0"))


# -- LUNs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "encoded"),
    [
        (0, 0),
        (1, 0x0001_0000_0000_0000),
        (255, 0x00FF_0000_0000_0000),
        (256, 0x4100_0000_0000_0000),
        (0x3FFF, 0x7FFF_0000_0000_0000),
    ],
)
@pytest.mark.checklist(9, "11.2.1.7")
def test_lun_addressing(number: int, encoded: int) -> None:
    assert lun.encode_lun(number) == encoded
    assert lun.decode_lun(encoded) == number


def test_flat_addressing_of_a_small_number_is_read() -> None:
    assert lun.decode_lun(0x4005_0000_0000_0000) == 5


@pytest.mark.parametrize(
    "address", [0x0001_0001_0000_0000, 0xC101_0000_0000_0000, 0x0100_0000_0000_0000]
)
def test_other_addressing_methods_are_told_apart(address: int) -> None:
    assert lun.decode_lun(address) is None


@given(st.lists(st.integers(0, lun.LUN_MAX), max_size=20))
def test_report_luns_round_trip(numbers: list[int]) -> None:
    data = lun.encode_report_luns(numbers)
    assert [lun.decode_lun(raw) for raw in lun.decode_report_luns(data)] == numbers
    assert lun.report_luns_length(data) == len(data)


def test_a_truncated_list_gives_whole_luns_only() -> None:
    data = lun.encode_report_luns([1, 2, 3])
    assert len(lun.decode_report_luns(data[:-1])) == 2


# -- mode pages ------------------------------------------------------------------------------------


@given(
    write_protected=st.booleans(),
    dpofua=st.booleans(),
    write_cache=st.booleans(),
    read_cache=st.booleans(),
    software=st.booleans(),
    long_header=st.booleans(),
    descriptor=st.sampled_from([b"", bytes(8)]),
)
def test_mode_round_trip(
    write_protected: bool,
    dpofua: bool,
    write_cache: bool,
    read_cache: bool,
    software: bool,
    long_header: bool,
    descriptor: bytes,
) -> None:
    parameters = mode.ModeParameters(
        write_protected=write_protected,
        dpofua=dpofua,
        write_cache=write_cache,
        read_cache=read_cache,
        software_write_protect=software,
    )
    pages = mode.caching_page(parameters) + mode.control_page(parameters)
    pages += mode.informational_exceptions_page()
    data = mode.encode_mode_sense(
        parameters, pages, long_header=long_header, block_descriptor=descriptor
    )
    decode = mode.decode_mode_sense_10 if long_header else mode.decode_mode_sense_6
    assert decode(data) == parameters


def test_mode_golden() -> None:
    parameters = mode.ModeParameters(write_protected=True, dpofua=True)
    data = mode.encode_mode_sense(parameters, mode.caching_page(parameters), long_header=False)
    assert data == bytes.fromhex("17 00 90 00 08 12 04").ljust(24, b"\0")


def test_without_a_caching_page_a_write_cache_is_assumed() -> None:
    assert mode.decode_mode_sense_6(bytes(4)).write_cache
    assert mode.decode_mode_sense_6(b"").write_cache


# -- provisioning ----------------------------------------------------------------------------------


def test_unmap_golden_and_round_trip() -> None:
    ranges = [(0x10, 8), (1 << 40, 0xFFFFFFFF)]
    data = provisioning.encode_unmap(ranges)
    assert data[:24] == bytes.fromhex("0026 0020 00000000 0000000000000010 00000008 00000000")
    assert provisioning.decode_unmap(data) == ranges
    assert provisioning.decode_unmap(data[:-1]) == ranges[:1]


def test_lba_status_round_trip() -> None:
    extents = [provisioning.LbaStatus(5, 6, provisioning.ProvisioningStatus.DEALLOCATED)]
    data = provisioning.encode_lba_status(extents)
    assert data == bytes.fromhex("00000014 00000000 0000000000000005 00000006 01000000")
    assert provisioning.decode_lba_status(data) == extents

"""CDBs byte for byte, and the way back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.scsi import cdb


@pytest.mark.parametrize(
    ("built", "golden"),
    [
        (cdb.read(0x01020304, 8), "28 00 01020304 00 0008 00"),
        (cdb.read(5, 1, fua=True, dpo=True), "28 18 00000005 00 0001 00"),
        (cdb.read(1 << 32, 8), "88 00 0000000100000000 00000008 00 00"),
        (cdb.read(0, 65536), "88 00 0000000000000000 00010000 00 00"),
        (cdb.write(0x01020304, 0xFFFF), "2a 00 01020304 00 ffff 00"),
        (cdb.write(1 << 40, 2, fua=True), "8a 08 0000010000000000 00000002 00 00"),
        (cdb.verify(7, 2, byte_check=1), "2f 02 00000007 00 0002 00"),
        (cdb.verify(1 << 33, 2), "8f 00 0000000200000000 00000002 00 00"),
        (cdb.synchronize_cache(), "35 00 00000000 00 0000 00"),
        (cdb.synchronize_cache(1 << 32, 1, immediate=True), "91 02 0000000100000000 00000001 0000"),
        (cdb.write_same(9, 10, unmap=True), "41 08 00000009 00 000a 00"),
        (cdb.write_same(9, 10, no_data_out=True), "93 01 0000000000000009 0000000a 00 00"),
        (cdb.write_same(9, 70000, unmap=True), "93 08 0000000000000009 00011170 00 00"),
        (cdb.compare_and_write(3, 2, fua=True), "89 08 0000000000000003 000000 02 00 00"),
        (cdb.unmap(24), "42 00 00000000 00 0018 00"),
        (cdb.test_unit_ready(), "00"),
        (cdb.inquiry(), "12 00 00 00ff 00"),
        (cdb.inquiry(0x83, 512), "12 01 83 0200 00"),
        (cdb.read_capacity_10(), "25"),
        (cdb.read_capacity_16(), "9e 10 0000000000000000 00000020 00 00"),
        (cdb.get_lba_status(0x1122), "9e 12 0000000000001122 00000018 00 00"),
        (cdb.mode_sense_6(8), "1a 08 08 00 ff 00"),
        (cdb.mode_sense_10(0x3F, subpage=0xFF), "5a 08 3f ff 000000 0200 00"),
        (cdb.request_sense(), "03 00 00 00 fc 00"),
        (cdb.report_luns(), "a0 00 00 000000 00001000 00 00"),
        (cdb.start_stop_unit(start=True), "1b 00 00 00 01 00"),
        (cdb.prevent_allow_medium_removal(prevent=True), "1e 00 00 00 01 00"),
        (cdb.report_supported_operation_codes(), "a3 0c 00 00 0000 00001000 00 00"),
        (cdb.report_supported_operation_codes(0x42), "a3 0c 01 42 0000 00001000 00 00"),
        (cdb.report_supported_operation_codes(0x9E, 0x12), "a3 0c 02 9e 0012 00001000 00 00"),
    ],
)
def test_golden_bytes(built: bytes, golden: str) -> None:
    assert built == bytes.fromhex(golden).ljust(16, b"\0")


@given(lba=st.integers(0, (1 << 54) - 1), blocks=st.integers(0, (1 << 32) - 1), fua=st.booleans())
def test_transfer_parses_what_read_and_write_build(lba: int, blocks: int, fua: bool) -> None:
    for build in (cdb.read, cdb.write):
        built = build(lba, blocks, fua=fua)
        assert len(built) == cdb.CDB_BYTES
        parsed = cdb.transfer(built)
        assert (parsed.lba, parsed.blocks, parsed.fua, parsed.dpo) == (lba, blocks, fua, False)


def test_six_byte_commands_mean_256_by_zero() -> None:
    assert cdb.transfer(bytes.fromhex("08 1f ffff 00 00").ljust(16, b"\0")) == cdb.Transfer(
        0x1FFFFF, 256
    )
    assert cdb.transfer(bytes.fromhex("0a e0 0001 02 00").ljust(16, b"\0")) == cdb.Transfer(1, 2)


def test_twelve_byte_commands() -> None:
    parsed = cdb.transfer(bytes.fromhex("a8 28 00000010 00000020 00 00").ljust(16, b"\0"))
    assert (parsed.lba, parsed.blocks, parsed.fua, parsed.protect) == (0x10, 0x20, True, 1)


@given(st.binary(min_size=16, max_size=16))
def test_any_cdb_parses(raw: bytes) -> None:
    cdb.transfer(raw)
    cdb.parse_compare_and_write(raw)
    cdb.parse_inquiry(raw)
    cdb.parse_mode_sense(raw)
    cdb.parse_report_supported_operation_codes(raw)


def test_parsers_of_the_rest() -> None:
    assert cdb.parse_inquiry(cdb.inquiry(0xB0, 300)) == cdb.Inquiry(True, 0xB0, 300)
    six = cdb.parse_mode_sense(cdb.mode_sense_6(8))
    assert (six.page, six.no_block_descriptors, six.allocation_length, six.long_header) == (
        8,
        True,
        255,
        False,
    )
    ten = cdb.parse_mode_sense(cdb.mode_sense_10(0x0A, allocation_length=1000))
    assert (ten.page, ten.allocation_length, ten.long_header) == (0x0A, 1000, True)
    codes = cdb.parse_report_supported_operation_codes(
        cdb.report_supported_operation_codes(0x9E, 0x10)
    )
    assert (codes.options, codes.opcode, codes.service_action) == (2, 0x9E, 0x10)

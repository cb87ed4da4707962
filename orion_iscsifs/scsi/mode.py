"""MODE SENSE data: header, caching page and control page (SPC-4 §7.5, SBC-3 §6.5)."""

from dataclasses import dataclass
from typing import Final

from orion_iscsifs.scsi.malformed import Buffer, field

CACHING_PAGE: Final = 0x08
CONTROL_PAGE: Final = 0x0A
INFORMATIONAL_EXCEPTIONS_PAGE: Final = 0x1C
ALL_PAGES: Final = 0x3F
_PAGE_FORMAT_SUBPAGE: Final = 0x40
_WRITE_PROTECT: Final = 0x80
_DPOFUA: Final = 0x10


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeParameters:
    """What a disk's mode pages say; a page that is absent leaves the cautious default."""

    write_protected: bool = False
    dpofua: bool = False
    """The FUA and DPO bits of READ and WRITE are supported."""
    write_cache: bool = True
    """WCE: a volatile write cache may be in use. Cautious: yes."""
    read_cache: bool = True
    """Not RCD."""
    software_write_protect: bool = False
    """SWP of the control page."""


def decode_mode_sense_6(data: Buffer) -> ModeParameters:
    return _decode(data, field(data, 2, 1), 4 + field(data, 3, 1), 1 + field(data, 0, 1))


def decode_mode_sense_10(data: Buffer) -> ModeParameters:
    return _decode(data, field(data, 3, 1), 8 + field(data, 6, 2), 2 + field(data, 0, 2))


def _decode(data: Buffer, device_specific: int, offset: int, stated: int) -> ModeParameters:
    """Walk the pages from `offset`; stop at the shorter of the stated and the real length."""
    end = min(len(data), stated)
    write_cache = read_cache = True
    software_write_protect = False
    while offset + 2 <= end:
        code = data[offset]
        long_format = bool(code & _PAGE_FORMAT_SUBPAGE)
        length = field(data, offset + 2, 2) + 4 if long_format else data[offset + 1] + 2
        page = data[offset : min(end, offset + length)]
        if not long_format and len(page) > 2:
            if code & 0x3F == CACHING_PAGE:
                write_cache = bool(page[2] & 0x04)
                read_cache = not page[2] & 0x01
            elif code & 0x3F == CONTROL_PAGE:
                software_write_protect = bool(field(page, 4, 1) & 0x08)
        offset += length
    return ModeParameters(
        write_protected=bool(device_specific & _WRITE_PROTECT),
        dpofua=bool(device_specific & _DPOFUA),
        write_cache=write_cache,
        read_cache=read_cache,
        software_write_protect=software_write_protect,
    )


# -- the target's side -----------------------------------------------------------------------------


def caching_page(parameters: ModeParameters, *, changeable: bool = False) -> bytes:
    """20 bytes; `changeable` asks for the mask of what MODE SELECT may change: nothing."""
    page = bytearray(20)
    page[0:2] = bytes((CACHING_PAGE, 18))
    if not changeable:
        page[2] = parameters.write_cache << 2 | (not parameters.read_cache)
    return bytes(page)


def control_page(parameters: ModeParameters, *, changeable: bool = False) -> bytes:
    """12 bytes. QUEUE ALGORITHM MODIFIER 1: commands may be reordered."""
    page = bytearray(12)
    page[0:2] = bytes((CONTROL_PAGE, 10))
    if not changeable:
        page[3] = 0x10
        page[4] = parameters.software_write_protect << 3
    return bytes(page)


def informational_exceptions_page() -> bytes:
    """12 bytes of zeroes behind the header: no informational exception is ever reported."""
    return bytes((INFORMATIONAL_EXCEPTIONS_PAGE, 10)) + bytes(10)


def encode_mode_sense(
    parameters: ModeParameters, pages: bytes, *, long_header: bool, block_descriptor: bytes = b""
) -> bytes:
    """Header, block descriptor and pages; `long_header` is MODE SENSE(10)'s."""
    specific = parameters.write_protected << 7 | parameters.dpofua << 4
    body = block_descriptor + pages
    if long_header:
        long_lba = len(block_descriptor) == 16
        head = bytes((0, specific, long_lba, 0)) + len(block_descriptor).to_bytes(2, "big")
        return (len(head) + len(body)).to_bytes(2, "big") + head + body
    return bytes((3 + len(body), 0, specific, len(block_descriptor))) + body

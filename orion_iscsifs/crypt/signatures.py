"""What else may be on a disk that somebody is about to format. Pure.

The places are those that blkid(8) and the formats' own documents name. It is a guard against
mistakes: what is not in this list is not recognized.
"""

from typing import Final

from orion_iscsifs.crypt.volume import MAGIC

HEAD_BYTES: Final = 128 << 10
"""What `find` wants to see of the beginning, and `find_at_end` of the end."""

_SIGNATURES: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, MAGIC, "a LUKS volume"),
    (0x438, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    (0, b"XFSB", "an XFS file system"),
    (0x10040, b"_BHRfS_M", "a btrfs file system"),
    (0x400, b"\x10\x20\xf5\xf2", "an f2fs file system"),
    (3, b"NTFS    ", "an NTFS file system"),
    (3, b"EXFAT   ", "an exFAT file system"),
    (3, b"-FVE-FS-", "a BitLocker volume"),
    (0x36, b"FAT1", "a FAT file system"),
    (0x52, b"FAT32", "a FAT file system"),
    (0x8001, b"CD001", "an ISO 9660 file system"),
    (0, b"hsqs", "a squashfs file system"),
    (0, b"QFI\xfb", "a qcow2 image"),
    (0x1000, b"\xfc\x4e\x2b\xa9", "a member of a Linux RAID"),
    (0, b"\xfc\x4e\x2b\xa9", "a member of a Linux RAID"),
    *((0x200 * sector, b"LABELONE", "an LVM physical volume") for sector in range(4)),
    *((page - 10, b"SWAPSPACE2", "swap space") for page in (4096, 8192, 16384, 65536)),
    *((page - 10, b"SWAP-SPACE", "swap space") for page in (4096, 8192, 16384, 65536)),
    *((block, b"EFI PART", "a GPT partition table") for block in (512, 4096)),
    *((size << 10, b"SKUL\xba\xbe", "a LUKS2 volume (its second header)") for size in (16, 32, 64)),
    # Last: boot sectors of file systems have it too.
    (0x1FE, b"\x55\xaa", "a partition table (MBR) or a boot sector"),
)


def find(head: bytes) -> str:
    """What the beginning of a disk looks like, in words; empty: nothing that is known."""
    for offset, magic, what in _SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return what
    return ""


def find_at_end(tail: bytes) -> str:
    """The same of its end, where a GPT has its second header and an old RAID its only one."""
    for block in (512, 4096):
        if tail[-block:].startswith(b"EFI PART"):
            return "a GPT partition table (its second header)"
    at = (len(tail) & -(64 << 10)) - (64 << 10)
    if at >= 0 and tail[at : at + 4] == b"\xfc\x4e\x2b\xa9":
        return "a member of a Linux RAID"
    return ""

"""Another passphrase for stores that are sealed. Only their superblocks are written.

All or nothing, as far as can be: every store is locked, and the old passphrase is tried on every
one, before the first is changed. Of one store both copies of the superblock are written, one after
the other, so that the old passphrase opens nothing afterwards. After a crash in between, the newer
copy counts: it opens with exactly one of the two.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec

from orion_iscsifs.localstore import files, superblock
from orion_iscsifs.localstore.files import LogError
from orion_iscsifs.localstore.seal import WrongKey, rewrap
from orion_iscsifs.localstore.superblock import ForeignFormat, Superblock

Kind = tuple[type[msgspec.Struct], bytes]
"""The fields of a superblock, `store` and `sealing` among them, and its magic."""
LOG: Final[Kind] = (Superblock, superblock.MAGIC)


def change_keys(
    folders: Sequence[Path], old: bytes, new: bytes, *, kinds: Sequence[Kind] = (LOG,)
) -> list[Path]:
    """Those whose key was changed; the others are not sealed. Blocks.

    Raises LogError, WrongKey or BusyError, then with nothing changed; a LogError that says so when
    a disk fails in the middle.
    """
    with ExitStack() as locks:
        for folder in folders:
            try:
                locks.callback(os.close, files.lock(folder))
            except OSError as error:
                raise LogError(f"{folder}: can't be locked: {error.strerror}") from None
        planned = [(one, _plan(one, old, new, kinds)) for one in folders]
        changed = [(folder, write) for folder, write in planned if write is not None]
        for folder, write in changed:
            try:
                write()
            except OSError as error:
                raise LogError(
                    f"{folder}: its superblock can't be written: {error.strerror}",
                    advice="run it again when the disk is well; until then either key may be"
                    " the right one, and those named before this one have the new key",
                ) from None
    return [folder for folder, _ in changed]


def _plan(folder: Path, old: bytes, new: bytes, kinds: Sequence[Kind]) -> Callable[[], None] | None:
    """What writes it; None: it is not sealed."""
    try:
        pages = files.superblock_pages(folder)
        counter, block, incompat, magic = _newest(pages, kinds)
    except OSError as error:
        raise LogError(f"{folder}: can't be read: {error.strerror}") from None
    except ForeignFormat as error:
        raise LogError(f"{folder}: {error}", advice=error.advice) from None
    if block.sealing is None:
        return None
    try:
        sealing = rewrap(block.sealing, old, new, block.store)
    except WrongKey as error:
        raise WrongKey(
            f"{folder}: {error}", advice="nothing was changed anywhere; give its present key"
        ) from None
    changed = msgspec.structs.replace(block, sealing=sealing)

    def write() -> None:
        for number in range(counter + 1, counter + 1 + len(superblock.NAMES)):
            page = superblock.encode(number, changed, incompat=incompat, magic=magic)
            files.write_superblock_page(folder, number, page)

    return write


def _newest(pages: Sequence[bytes], kinds: Sequence[Kind]) -> tuple[int, Any, int, bytes]:
    """Counter, fields, incompatible features and magic of the copy that counts."""
    for kind, magic in kinds:
        found = [
            (*copy, superblock.incompat(page), magic)
            for page in pages
            if (copy := superblock.decode(page, kind, magic)) is not None
        ]
        if found:
            return max(found, key=lambda copy: copy[0])
    raise ForeignFormat("neither of its superblocks is sound")

"""What is in the logs and tiers of a folder, for `orion-iscsifs cache`. Nothing is changed."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_iscsifs.errors import OrionError, UsageError

if TYPE_CHECKING:
    from orion_iscsifs.localstore.superblock import Superblock
    from orion_iscsifs.tier.store import TierStore
    from orion_iscsifs.tier.superblock import TierSuperblock

Told = dict[str, Any]


def examine_all(folder: str, *, thoroughly: bool = False) -> tuple[list[Told], list[Told]]:
    """Of the logs in the folder, and of the tiers. `thoroughly`: every record of a tier is read."""
    logs, tiers = [], []
    for path in folders(folder):
        if is_tier(path):
            tiers.append(_examine_tier(path, thoroughly=thoroughly))
        else:
            logs.append(_examine_log(path))
    return logs, tiers


def is_tier(folder: Path) -> bool:
    """Or else a log. Damaged superblocks are a log's: that is never dropped by itself."""
    from orion_iscsifs.localstore import files
    from orion_iscsifs.tier.superblock import MAGIC

    try:
        return any(page.startswith(MAGIC) for page in files.superblock_pages(folder))
    except OSError:
        return False


def folders(folder: str) -> list[Path]:
    """The folder itself if it is a log or a tier, or else those in it that are."""
    from orion_iscsifs.localstore.superblock import NAMES

    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        raise UsageError(
            f"cache: {path}: no such folder", advice="name a log_dir or tier_dir, or a folder in it"
        )

    def is_store(one: Path) -> bool:
        return any((one / name).exists() for name in NAMES)

    try:
        found = [path] if is_store(path) else sorted(one for one in path.iterdir() if is_store(one))
    except OSError as error:
        raise UsageError(f"cache: {path}: {error.strerror}") from None
    return found


def _examine_log(folder: Path) -> Told:
    """What is in one log. It is not changed; that of a running mount changes meanwhile."""
    from orion_iscsifs.cache.writelog import recover
    from orion_iscsifs.localstore.files import is_in_use
    from orion_iscsifs.localstore.store import LogStore

    told: Told = {"folder": str(folder), "lun": None, "target": None, "size_bytes": 0}
    told |= {"state": "damaged", "pending_bytes": None, "records": None, "damage": None}
    told |= {"sealed": None}
    in_use = is_in_use(folder)
    try:
        store = LogStore.open(folder, shared=True)
    except OrionError as error:
        return told | {"damage": str(error)}
    try:
        told |= _identity(store.superblock)
        if store.superblock.ended:
            return told | {"state": "ended", "pending_bytes": 0, "damage": None}
        epochs, scan = recover(store, time.monotonic())
        told |= {
            "pending_bytes": 0 if store.superblock.clean else epochs.live.covered_bytes,
            "records": scan.next_seq - scan.needed,
            "flushes": scan.last_epoch,
            "incomplete_end": scan.torn_bytes > 0,
        }
        if in_use:
            return told | {"state": "in use"}
        if store.superblock.clean:
            return told | {"state": "clean"}
        return (
            told
            | {"state": "damaged" if scan.damage else "to be replayed"}
            | ({"damage": scan.damage or None})
        )
    except OrionError as error:
        return told | {"damage": str(error)}
    finally:
        store.close()


def _identity(block: "Superblock") -> Told:
    return {
        "lun": block.lun,
        "target": block.target,
        "size_bytes": block.segments * block.segment_bytes,
        "lun_bytes": block.size_bytes,
        "created": block.created,
        "sealed": block.sealing is not None,
        "reservation_key": f"{block.key:#018x}" if block.key else None,
    }


def _examine_tier(folder: Path, *, thoroughly: bool) -> Told:
    from orion_iscsifs.tier.store import TierStore, is_in_use

    told: Told = {"folder": str(folder), "lun": None, "target": None, "size_bytes": 0}
    told |= {"used_bytes": 0, "state": "damaged", "sealed": None, "damage": None}
    told |= {"frames": None, "records": None, "bad_records": None}
    in_use = is_in_use(folder)
    try:
        store = TierStore.open(folder, shared=True)
    except OrionError as error:
        return told | {"damage": str(error)}
    try:
        block = store.superblock
        told |= _tier_identity(block)
        told |= {"size_bytes": store.size_bytes, "used_bytes": store.used_bytes}
        state = "ended" if block.ended else "clean" if block.clean else "not closed"
        told["state"] = "in use" if in_use else state
        return told | (_checked(store, told["state"]) if thoroughly and not in_use else {})
    finally:
        store.close()


def _checked(store: "TierStore", state: str) -> Told:
    from orion_iscsifs.tier.checking import boot_id, check

    try:
        found = check(store, boot_id())
    except OSError as error:
        return {"state": "damaged", "damage": error.strerror}
    damaged = found.bad_records or (found.damage and state == "clean")
    return {
        "state": "damaged" if damaged else state,
        "damage": found.damage or None,
        "frames": found.frames,
        "records": found.records,
        "bad_records": found.bad_records,
    }


def _tier_identity(block: "TierSuperblock") -> Told:
    return {
        "lun": block.lun,
        "target": block.target,
        "lun_bytes": block.size_bytes,
        "created": block.created,
        "sealed": block.sealing is not None,
        "reservation_key": f"{block.key:#018x}" if block.key else None,
    }

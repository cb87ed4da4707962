"""Who may have written to a LUN since an earlier mount left something about it on the local disk.

Both the log and the tier ask, and they ask the opposite. What is in a log is newer than what the
target has, and is given up only on a *sign* that somebody else has written (`Evidence.objection`).
What is in a tier is a copy, and is used only on *proof* that nobody has (`Evidence.doubt`).

The sources are the same. This host keeps a note of which store its last mount that could write
had (`Owner`). The target has the reservation: each registration counts there (PRGENERATION, SPC-4
§5.13.1), and `Keeper` writes the count that was last seen to be ours into the store's superblock.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.config.places import create_private, state_dir
from orion_iscsifs.errors import OrionError
from orion_iscsifs.initiator.identity import forget, keep
from orion_iscsifs.initiator.keys import LunKeys, lun_stem
from orion_iscsifs.initiator.lun import LunDevice
from orion_iscsifs.initiator.standing import OUR_TYPE, Own, Seen, foreign_key
from orion_iscsifs.stack.exclusive import Exclusive, lun_name


def lun_folder(parent: str, lun: str, suffix: str = "") -> Path:
    """Where something of a LUN is kept; `lun` is its designator."""
    safe = re.sub(r"[^A-Za-z0-9.-]", "_", lun)[:64]
    return Path(parent) / f"{safe}-{lun_stem(lun)[:8]}{suffix}"


class Owner:
    """This host's note of which store the last mount that could write to a LUN had."""

    def __init__(self, kind: str, disk: LunDevice) -> None:
        """`kind`: `logs` or `tiers`."""
        self._path: Final = state_dir() / kind / lun_stem(lun_name(disk))

    def known(self) -> str:
        """The store's id in hexadecimal; empty: none."""
        try:
            return self._path.read_text().strip()
        except OSError:
            return ""

    def note(self, store: bytes) -> None:
        """Durable when it returns. Raises MountError."""
        keep(self._path, store.hex() + "\n")

    def forget(self) -> None:
        """Somebody writes without that store: what is in it is out of date from now on.

        Durable when it returns: a store that is taken up again after a loss of power would be
        trusted. Raises MountError.
        """
        forget(self._path)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about who wrote to the LUN."""

    owner: str
    """The store that the last mount of this host had; empty: none."""
    seen: Seen | None
    """Of the reservation, before this mount changed it; None: there is none."""
    own: Own

    def objection(self, store: bytes, generation: int) -> str:
        """The sign that somebody has written; empty: there is none.

        `generation` is what the store's superblock says; -1: not known.
        """
        if self.owner != store.hex():
            return "the LUN has been mounted on this host since, without this log"
        if self.seen is None or generation < 0:
            return ""
        foreign = foreign_key(self.seen, self.own)
        if foreign is not None:
            return f"another initiator (key {foreign:#018x}) is registered for the LUN"
        if self.seen.generation > generation and not self._is_held:
            return "another initiator may have written to the LUN since"
        return ""

    def doubt(self, store: bytes, generation: int) -> str:
        """Why it is not proven that nobody has written; empty: it is.

        It is when a reservation of ours has stood since, and nobody has registered: under Write
        Exclusive - Registrants Only, only who is registered may write (SPC-4 §5.13.7).
        """
        if self.owner != store.hex():
            return "the LUN has been mounted on this host since, without this tier"
        if self.seen is None or generation < 0:
            return "no reservation guards the LUN"
        if foreign_key(self.seen, self.own) is not None:
            return "another initiator is registered for the LUN"
        if not self._is_held:
            return "the reservation has not been held since"
        if self.seen.generation != generation:
            return "registrations have changed since"
        return ""

    @property
    def _is_held(self) -> bool:
        """By a key of this host, in the type that keeps others from writing."""
        holder = None if self.seen is None else self.seen.holder
        return holder is not None and holder.kind == OUR_TYPE and self.own.keys.is_ours(holder.key)


def evidence(owner: Owner, disk: LunDevice, seen: Seen | None) -> Evidence:
    """What speaks for and against what an earlier mount has left. Raises MountError."""
    keys = LunKeys.load(create_private(state_dir()), lun_name(disk))
    own = Own(keys, keys.of(disk.session.nexus.isid))
    return Evidence(owner.known(), seen, own)


class Update(Protocol):
    """Changes fields of a superblock, durably. Raises an OrionError: the store has failed."""

    async def __call__(self, **changes: object) -> None: ...


class Keeper:
    """Keeps a superblock up to date with the reservation and the size of the device."""

    def __init__(self, update: Update, exclusive: Exclusive | None, device: BlockDevice) -> None:
        self._update = update
        self._exclusive = exclusive
        self._device = device
        self._news = trio.Event()
        if exclusive is not None:
            exclusive.on_generation(self._wake)
        device.on_geometry_change(lambda _: self._wake())

    def _wake(self) -> None:
        """Registrations have changed, by us, or the size."""
        self._news.set()

    async def run(self) -> None:
        """The background, until the store fails, which it says itself."""
        with suppress(OrionError):
            while True:
                await self._news.wait()
                self._news = trio.Event()
                await self.write()

    async def write(self, **changes: object) -> None:
        """Some fields, the size of the device, and who may write to it."""
        exclusive = self._exclusive
        changes["size_bytes"] = self._device.geometry.size_bytes
        if exclusive is not None and exclusive.generation >= 0:
            changes |= {"generation": exclusive.generation, "key": exclusive.first.key}
        else:
            changes |= {"generation": -1, "key": 0}
        await self._update(**changes)

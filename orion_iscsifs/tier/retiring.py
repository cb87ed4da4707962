"""`Retirement`: once the tier has failed, nobody may believe what it has on the disk.

From then on the device changes without entries in the journal. So changes wait until that is
certain, or until all that can be tried has been tried once: a disk that hangs must not hang the
device. What did not work is tried again.
"""

import logging
from typing import Final

import trio

from orion_iscsifs.tier.store import TierStore
from orion_iscsifs.tier.superblock import TierError

log = logging.getLogger(__name__)

AGAIN_S: Final = 5.0


class Retirement:
    """Of one store; `run` is its background task."""

    def __init__(self, store: TierStore) -> None:
        self.is_certain = trio.Event()
        """Changes need not wait, nor any longer."""
        self._store = store
        self._wake = trio.lowlevel.ParkingLot()

    def wake(self) -> None:
        """The tier has failed."""
        self._wake.unpark_all()

    async def run(self) -> None:
        """Ends when the disk itself says that it must not be believed."""
        store = self._store
        while store.failed is None:
            await self._wake.park()
        is_told = False
        while True:
            # The owner first: what it writes is on another disk.
            is_told = is_told or await trio.to_thread.run_sync(store.tell_owner)
            if is_told:
                self.is_certain.set()
            try:
                await trio.to_thread.run_sync(store.retire)
            except TierError as error:
                if not self.is_certain.is_set():
                    log.error("%s", error.line)
                self.is_certain.set()
                await trio.sleep(AGAIN_S)
            else:
                self.is_certain.set()
                return

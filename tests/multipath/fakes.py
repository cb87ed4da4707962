"""A target whose paths may be lost with writes on the way, which land when it is least wanted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from orion_iscsifs.block.device import Buffer, Geometry, GeometryListener
from orion_iscsifs.errors import ConnectionLost, OrionError, PathInaccessible
from orion_iscsifs.multipath import Access, Path
from orion_iscsifs.scsi.alua import AccessState
from orion_iscsifs.testing.memory import MemoryDevice

SIZE_BYTES = 1 << 20


def not_accessible() -> PathInaccessible:
    return PathInaccessible("standby", status=2, sense_key=2, asc=4, ascq=0x0B)


@dataclass(eq=False)
class Sent:
    """A write on its way, or in a buffer of the target."""

    epoch: int
    offset: int
    data: bytes
    answered: trio.Event = field(default_factory=trio.Event)
    error: OrionError | None = None


class FakePath:
    """A path and the BlockDevice at its end. `patient` paths carry requests out at once.

    The content is the `disk`, shared with the other paths.
    """

    def __init__(self, name: str, disk: MemoryDevice, *, patient: bool = False) -> None:
        self.name = name
        self.disk = disk
        self.patient = patient
        self.is_up = True
        self.is_refused = False
        self.epoch = 1
        self.access = Access()
        self.fences = False
        """`fence` is able to prove anything."""
        self.fence_calls = 0
        self.activations = 0
        self.refreshes = 0
        self.checks = 0
        self.sent: list[Sent] = []
        self.served: list[str] = []
        self.fails: list[OrionError] = []
        self.geometry = disk.geometry
        self._listeners: list[Callable[[], None]] = []
        self._geometry_listeners: list[GeometryListener] = []

    # -- what the test does ------------------------------------------------------------------

    def lose(self) -> None:
        """The session has no connection any more; what was sent may yet be carried out."""
        self.is_up = False
        self._tell()
        for sent in self.sent:
            sent.error = ConnectionLost(f"{self.name}: lost")
            sent.answered.set()

    def log_in(self) -> None:
        """The target ends the session before, and with it all that was on its way."""
        self.epoch += 1
        self.end_nexus()
        self.is_up = True
        self._tell()

    def end_nexus(self) -> None:
        self.sent = [sent for sent in self.sent if sent.epoch == self.epoch and self.is_up]

    def deliver(self, sent: Sent) -> None:
        """A write arrives, whether or not anybody waits for it any more."""
        self.sent.remove(sent)
        self.disk.poke(sent.offset, sent.data)
        sent.answered.set()

    def say(self, access: AccessState, **more: bool) -> None:
        """The target says that its access state is another one."""
        self.access = Access(access, reported=True, **more)
        self._tell()

    def resize(self, geometry: Geometry) -> None:
        self.geometry = geometry
        for listener in self._geometry_listeners:
            listener(geometry)

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    # -- Path ----------------------------------------------------------------------------------

    @property
    def device(self) -> "FakePath":
        return self

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    async def check(self) -> Access:
        self.checks += 1
        self._require()
        return self.access

    async def activate(self) -> None:
        self.activations += 1
        self.access = Access(AccessState.ACTIVE_OPTIMIZED, explicit=True, reported=True)

    async def refresh(self) -> None:
        self.refreshes += 1

    async def fence(self, through: Sequence[Path]) -> bool:
        assert all(path.is_up for path in through)
        assert not self.is_up
        self.fence_calls += 1
        await trio.lowlevel.checkpoint()
        if self.fences and not self.is_up:
            self.end_nexus()
            return True
        return False

    # -- BlockDevice ---------------------------------------------------------------------------

    def on_geometry_change(self, listener: GeometryListener) -> None:
        self._geometry_listeners.append(listener)

    def _require(self) -> None:
        if not self.is_up:
            raise ConnectionLost(f"{self.name}: no connection")

    async def _serve(self, kind: str) -> None:
        self._require()
        self.served.append(kind)
        if self.fails:
            raise self.fails.pop(0)
        if not self.access.state.usable:
            raise not_accessible()
        epoch = self.epoch
        await trio.lowlevel.checkpoint()
        if not self.is_up or self.epoch != epoch:
            raise ConnectionLost(f"{self.name}: lost")

    async def read_into(self, offset: int, target: memoryview) -> None:
        await self._serve("read")
        target[:] = self.disk.peek(offset, len(target))

    async def write(self, offset: int, source: Buffer, *, fua: bool = False) -> None:
        if self.patient:
            await self._serve("write")
            self.disk.poke(offset, bytes(source))
            return
        self._require()
        self.served.append("write")
        sent = Sent(self.epoch, offset, bytes(source))
        self.sent.append(sent)
        # As the initiator does it: a cancelled write that is on the wire is waited for.
        with trio.CancelScope(shield=True):
            await sent.answered.wait()
        await trio.lowlevel.checkpoint_if_cancelled()
        if sent.error is not None:
            raise sent.error

    async def flush(self) -> None:
        await self._serve("flush")

    async def discard(self, offset: int, length: int) -> None:
        await self._serve("discard")

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        await self._serve("zero")
        self.disk.poke(offset, bytes(length))

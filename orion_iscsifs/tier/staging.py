"""What is on its way into the tier, and what must not get there any more. Pure.

Theory of operation
-------------------
Content that was read from the device is true until the device is changed there. Between the moment
when the device had it and the moment when the index says that the tier has it, other tasks run: so
each step keeps a list of what has been changed meanwhile.

* A *change* (write, discard, zeroing) of a range is announced with `begin_change` before the device
  is asked, and ends with `end_change` when its outcome is known, or known to be unknown. While it
  lasts nothing of the range is taken in (`stage`).
* A *request* whose content may be kept is announced with `watch` before the device is asked.
  `unwatch` says which pages of a frame a change has touched since: at its beginning (the request
  may have seen the time before) as well as at its end (it may have seen the time before or after).
* What is *staged* waits in memory, in whole buffers of frames. A change clears its pages.
* What is in the *batch* is being compressed and written by a thread, which has a copy of the mask.
  A change clears its pages in `mask`, and notes them in `changed` for what the thread adds from an
  older record. Only what is left of the mask afterwards gets into the index.

So nothing that is staged, in the batch or in the index overlaps a change that is under way. All
that is taken together makes "the tier has it" mean "the device has it".
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from orion_iscsifs.block.pages import FRAME_BYTES, FRAME_SHIFT, page_runs
from orion_iscsifs.block.ranges import Range
from orion_iscsifs.tier.index import pages_in

_KEPT_BUFFERS: Final = 64


@dataclass(slots=True, eq=False)
class Staged:
    """Pages of one frame, on their way to the disk."""

    frame: int
    buffer: memoryview | None
    """None: in the batch, to be written again from the disk."""
    mask: int = 0
    """The pages in `buffer` that are true."""
    changed: int = 0
    """In the batch: pages that have changed on the device since the batch began."""
    proven: bool = False


class Staging:
    """See the module's docstring. Holds at most `bytes_max` in buffers."""

    def __init__(self, bytes_max: int) -> None:
        self.queue: dict[int, Staged] = {}
        """The oldest first."""
        self.batch: dict[int, Staged] = {}
        self._frames_max = max(bytes_max >> FRAME_SHIFT, 1)
        self._free: list[memoryview] = []
        self._changes: list[Range] = []
        self._watched: dict[int, int] = {}
        """How many requests have the frame in their range."""
        self._touched: dict[int, int] = {}
        """Pages of watched frames that a change has touched."""

    @property
    def staged_bytes(self) -> int:
        """What the buffers take."""
        return len(self.queue) + len(self.batch) << FRAME_SHIFT

    # -- changes -----------------------------------------------------------------------------

    def begin_change(self, span: Range) -> None:
        """The device is about to change there."""
        self._changes.append(span)
        self._touch(span)
        for frame in _members(self.queue, span):
            staged = self.queue[frame]
            staged.mask &= ~pages_in(frame, span)
            if not staged.mask:
                del self.queue[frame]
                self.give_back(staged)
        for frame in _members(self.batch, span):
            pages = pages_in(frame, span)
            self.batch[frame].mask &= ~pages
            self.batch[frame].changed |= pages

    def end_change(self, span: Range) -> None:
        """It is done, or has failed, or was cancelled. The same span as at its beginning."""
        self._touch(span)
        self._changes.remove(span)

    def _touch(self, span: Range) -> None:
        for frame in _members(self._watched, span):
            self._touched[frame] = self._touched.get(frame, 0) | pages_in(frame, span)

    # -- requests ----------------------------------------------------------------------------

    def watch(self, span: Range) -> None:
        """A request begins whose content may be kept."""
        for frame in range(span[0] >> FRAME_SHIFT, (span[1] - 1 >> FRAME_SHIFT) + 1):
            self._watched[frame] = self._watched.get(frame, 0) + 1

    def unwatch(self, span: Range) -> dict[int, int]:
        """It has ended: of each frame, the pages that may be newer or older than what it saw.

        Frames that nothing has happened to are left out.
        """
        touched: dict[int, int] = {}
        for frame in range(span[0] >> FRAME_SHIFT, (span[1] - 1 >> FRAME_SHIFT) + 1):
            if pages := self._touched.get(frame, 0):
                touched[frame] = pages
            self._watched[frame] -= 1
            if not self._watched[frame]:
                del self._watched[frame]
                self._touched.pop(frame, None)
        return touched

    def stage(self, frame: int, pages: int, source: memoryview, at: int) -> int:
        """Take in these pages; those that were taken, 0: there is no room.

        `at`: where in `source` the frame begins; may be negative.
        """
        pages = self.unchanging(frame, pages)
        staged = self.queue.get(frame)
        if not pages or (staged is None and self.is_full):
            return 0
        if staged is None:
            buffer = self._free.pop() if self._free else memoryview(bytearray(FRAME_BYTES))
            staged = self.queue[frame] = Staged(frame, buffer)
        assert staged.buffer is not None
        for start, end in page_runs(pages):
            staged.buffer[start:end] = source[at + start : at + end]
        staged.mask |= pages
        return pages

    def unchanging(self, frame: int, pages: int) -> int:
        """Those of the pages that no change is under way for."""
        for change in self._changes:
            pages &= ~pages_in(frame, change)
        return pages

    @property
    def is_full(self) -> bool:
        return len(self.queue) + len(self.batch) >= self._frames_max

    # -- batches -----------------------------------------------------------------------------

    def begin_batch(self, count_max: int) -> list[Staged]:
        """The next of the queue, for a thread. One batch at a time."""
        assert not self.batch
        while self.queue and len(self.batch) < count_max:
            frame = next(iter(self.queue))
            self.batch[frame] = self.queue.pop(frame)
        return list(self.batch.values())

    def put_in_batch(self, frame: int, mask: int) -> Staged:
        """What the disk has of a frame is written again."""
        staged = self.batch[frame] = Staged(frame, None, mask, proven=True)
        return staged

    def end_batch(self) -> None:
        """The thread has ended, and the index has what it wrote."""
        for staged in self.batch.values():
            self.give_back(staged)
        self.batch.clear()

    def find(self, frame: int) -> Iterator[Staged]:
        """Where pages of the frame may be, the newest first."""
        if (staged := self.queue.get(frame)) is not None:
            yield staged
        if (staged := self.batch.get(frame)) is not None and staged.buffer is not None:
            yield staged

    def give_back(self, staged: Staged) -> None:
        """Its buffer serves another."""
        if staged.buffer is not None and len(self._free) < _KEPT_BUFFERS:
            self._free.append(staged.buffer)

    def clear(self) -> None:
        """Nothing that waits is of use any more."""
        self.queue.clear()
        for staged in self.batch.values():
            staged.mask, staged.changed = 0, 0xFFFF


def _members(frames: dict[int, Staged] | dict[int, int], span: Range) -> list[int]:
    """Those that have a byte of the range."""
    if not frames:
        return []
    first, last = span[0] >> FRAME_SHIFT, span[1] - 1 >> FRAME_SHIFT
    if last - first >= len(frames):
        return [frame for frame in frames if first <= frame <= last]
    return [frame for frame in range(first, last + 1) if frame in frames]

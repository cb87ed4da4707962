"""How hard to compress, and what not to try. Pure.

`AdaptiveLevel` compares, batch by batch, how long compressing took and how long writing took. If
candidates pile up, the slower of the two decides: a processor that can't keep up gets an easier
level, a disk that can't keep up gets less to write. Without a backlog nothing changes.

`Compressibility` remembers for each GiB of the device whether the last attempts saved anything, and
leaves out more and more of them where they did not: media files and encrypted volumes stay as they
are, and are tried again now and then.
"""

from collections import OrderedDict
from typing import Final

LEVELS: Final = (-5, -1, 1, 3, 5, 7, 9, 12)
"""What `adaptive` chooses from. Negative ones are zstd's fast levels."""
USUAL_LEVEL: Final = 1
LEVEL_MAX: Final = 19
SMOOTHING: Final = 0.25
MARGIN: Final = 1.5
"""One has to be that much slower than the other before it counts."""
PATIENCE: Final = 4
"""Batches between two changes."""
REGION_SHIFT: Final = 30
REGIONS_MAX: Final = 1 << 12
SKIP_MAX: Final = 256


class AdaptiveLevel:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._at = LEVELS.index(USUAL_LEVEL)
        self._compress_s = self._write_s = 0.0
        self._batches = 0

    @property
    def level(self) -> int:
        return LEVELS[self._at]

    def note(self, *, compress_s: float, write_s: float, raw_bytes: int, is_behind: bool) -> None:
        """A batch of `raw_bytes` took so long. `is_behind`: others wait, and leave no room."""
        if not raw_bytes:
            return
        self._compress_s += SMOOTHING * (compress_s / raw_bytes - self._compress_s)
        self._write_s += SMOOTHING * (write_s / raw_bytes - self._write_s)
        self._batches += 1
        if not is_behind or self._batches < PATIENCE:
            return
        if self._compress_s > MARGIN * self._write_s and self._at > 0:
            self._at -= 1
            self._batches = 0
        elif self._write_s > MARGIN * self._compress_s and self._at < len(LEVELS) - 1:
            self._at += 1
            self._batches = 0


class Compressibility:
    """See the module's docstring. Offsets are in bytes."""

    def __init__(self) -> None:
        self._regions: OrderedDict[int, tuple[int, int]] = OrderedDict()
        """How many attempts to leave out after a failure, and how many of them are left."""

    def is_worth_trying(self, offset: int) -> bool:
        """Asked once for each frame that would be compressed."""
        region = offset >> REGION_SHIFT
        skip, left = self._regions.get(region, (0, 0))
        if not left:
            return True
        self._regions[region] = skip, left - 1
        return False

    def note(self, offset: int, *, saved: bool) -> None:
        """An attempt has been made."""
        region = offset >> REGION_SHIFT
        if saved:
            self._regions.pop(region, None)
            return
        skip = min(max(2 * self._regions.get(region, (0, 0))[0], 1), SKIP_MAX)
        self._regions[region] = skip, skip
        self._regions.move_to_end(region)
        if len(self._regions) > REGIONS_MAX:
            self._regions.popitem(last=False)

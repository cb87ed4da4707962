"""Requests in bytes and frames in pages: who has which part of a request. Pure."""

from typing import Final

from orion_iscsifs.block.pages import FRAME_BYTES, FRAME_SHIFT, page_runs, pages_covered
from orion_iscsifs.block.ranges import Range
from orion_iscsifs.tier.index import frames_of

BRIDGE_BYTES: Final = 32 << 10
"""Asking the device for so much that the tier has costs less than another request."""


def whole_pages(span: Range) -> list[tuple[int, int]]:
    """The frames with a whole page in the range, each with the mask of those."""
    found = []
    for frame, _ in frames_of(span):
        base = frame << FRAME_SHIFT
        pages = pages_covered(max(span[0] - base, 0), min(span[1] - base, FRAME_BYTES))
        if pages:
            found.append((frame, pages))
    return found


def runs(missing: dict[int, int], span: Range) -> list[Range]:
    """The bytes of these pages in the range, in as few requests as are worth it, ascending."""
    runs: list[Range] = []
    for frame, pages in sorted(missing.items()):
        base = frame << FRAME_SHIFT
        for first, last in page_runs(pages):
            start, end = max(base + first, span[0]), min(base + last, span[1])
            if runs and start - runs[-1][1] < BRIDGE_BYTES:
                runs[-1] = runs[-1][0], max(end, runs[-1][1])
            else:
                runs.append((start, end))
    return runs


def copy(frame: int, pages: int, buffer: memoryview, span: Range, target: memoryview) -> None:
    """Pages out of a whole frame to where they are wanted."""
    base = frame << FRAME_SHIFT
    for first, last in page_runs(pages):
        start, end = max(base + first, span[0]), min(base + last, span[1])
        target[start - span[0] : end - span[0]] = buffer[start - base : end - base]

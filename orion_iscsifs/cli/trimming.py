"""The daemon's side of `orion-iscsifs trim`: discard a range of one device file."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import trio

from orion_iscsifs.block.device import BlockDevice, Geometry
from orion_iscsifs.block.ranges import Range
from orion_iscsifs.errors import DeviceError, NotSupported, OrionError, OutOfRange, WriteProtected
from orion_iscsifs.monitor.control import Message, Send

_STEP_BYTES: Final = 1 << 30
"""Discarded at a time: nothing else may use that range meanwhile."""
_PROGRESS_S: Final = 0.5


def whole_granules(geometry: Geometry, start: int, end: int) -> Range:
    """What of the range the device can discard; an empty range where that is nothing."""
    unit, origin = geometry.discard_granularity_bytes, geometry.discard_alignment_bytes
    first = start + (origin - start) % unit
    last = end - (end - origin) % unit
    return (first, last) if first < last else (start, start)


async def trim(
    files: Mapping[str, BlockDevice], request: Message, send: Send, *, read_only: bool
) -> Message:
    """`request` names the `file`, the `offset` and the `length` (None: to the end), in bytes.

    Answers with the bytes asked for and the bytes discarded. Raises an OrionError.
    """
    name = str(request.get("file"))
    device = files.get(name)
    if device is None:
        raise DeviceError(f"{name}: no device file of this mount")
    start, end = _asked(name, request, device.geometry.size_bytes)
    if read_only or device.geometry.read_only:
        raise WriteProtected(f"{name}: read-only, so nothing can be discarded")
    _check_support(name, device)
    first, last = whole_granules(device.geometry, start, end)
    done = 0

    async def tell() -> None:
        with suppress(trio.BrokenResourceError):  # the client has gone; the rest is still done
            while True:
                await send({"discarded_bytes": done})
                await trio.sleep(_PROGRESS_S)

    unit = device.geometry.discard_granularity_bytes
    step = max(_STEP_BYTES // unit, 1) * unit
    failure: OrionError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell)
        try:
            for position in range(first, last, step):
                length = min(step, last - position)
                await device.discard(position, length)
                _check_support(name, device)
                done += length
        except OrionError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return {"asked_bytes": end - start, "discarded_bytes": done, "granularity_bytes": unit}


def _asked(name: str, request: Message, size: int) -> Range:
    start, length = request.get("offset", 0), request.get("length")
    if not isinstance(start, int) or not isinstance(length, int | None) or start < 0:
        raise OutOfRange(f"{name}: offset and length are byte counts")
    end = size if length is None else start + length
    if not start <= end <= size:
        raise OutOfRange(f"{name}: {start} to {end} is not inside the {size} bytes of the LUN")
    return start, end


def _check_support(name: str, device: BlockDevice) -> None:
    """The device may also have refused only now what it said it could do."""
    if not device.geometry.discard_granularity_bytes:
        raise NotSupported(
            f"{name}: the LUN takes no UNMAP",
            advice="is it thin-provisioned at the target? An encrypted LUN takes none either",
        )

"""`user.orion.*`: what a device file says of itself in extended attributes. Pure, read-only."""

from collections.abc import Mapping
from typing import Final

from orion_iscsifs.block.device import Geometry

PREFIX: Final = "user.orion."
_VALUE_BYTES_MAX: Final = 1024
"""Texts come from a target; what is longer is cut."""


def geometry_attributes(geometry: Geometry) -> dict[str, str]:
    """Size and limits of the device as the file shows it."""
    return {
        "size_bytes": str(geometry.size_bytes),
        "logical_block_bytes": str(geometry.logical_block_bytes),
        "physical_block_bytes": str(geometry.physical_block_bytes),
        "optimal_transfer_bytes": str(geometry.optimal_transfer_bytes),
        "transfer_bytes_max": str(geometry.transfer_bytes_max),
        "discard_granularity_bytes": str(geometry.discard_granularity_bytes),
        "read_only": _text(geometry.read_only),
        "write_cache": _text(geometry.write_cache),
    }


def flattened(facts: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """A status document as attributes: `{"reservation": {"key": "0x1"}}` → `reservation.key`.

    What is None or a list is left out.
    """
    flat: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float | str):
            flat[prefix + name] = _text(value)
    return flat


def encoded(attributes: Mapping[str, str]) -> dict[bytes, bytes]:
    """Names with their prefix and values, as the kernel takes them."""
    return {
        (PREFIX + name).encode(): value.encode("utf-8", "replace")[:_VALUE_BYTES_MAX]
        for name, value in attributes.items()
    }


def _text(value: bool | float | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

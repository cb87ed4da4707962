"""The `user.orion.*` extended attributes of a device file (INTERFACE §3)."""

from collections.abc import Mapping

from orion_iscsifs.config import CacheMode
from orion_iscsifs.stack.unit import Unit


def describe(unit: Unit, mode: CacheMode) -> Mapping[str, str]:
    """Identity, geometry, and what is unwritten, as text; by the attribute's last name."""
    info, geometry = unit.disk.info, unit.top.geometry
    described: dict[str, object] = {
        "target": unit.target_name,
        "lun": unit.number,
        "name": info.name,
        "vendor": info.identity.vendor,
        "product": info.identity.product,
        "revision": info.identity.revision,
        "size_bytes": geometry.size_bytes,
        "block_size": geometry.logical_block_bytes,
        "physical_block_size": geometry.physical_block_bytes,
        "transfer_bytes_max": geometry.transfer_bytes_max,
        "optimal_transfer_bytes": geometry.optimal_transfer_bytes,
        "discard_granularity_bytes": geometry.discard_granularity_bytes,
        "read_only": int(geometry.read_only),
        "cache": mode.value,
        "dirty_bytes": unit.dirty_bytes,
    }
    reservation = unit.exclusive.status() if unit.exclusive is not None else None
    if reservation is not None:
        described["reservation"] = reservation["state"]
        described["reservation_key"] = reservation["key"] or ""
    return {name: str(value) for name, value in described.items()}

"""What the target is told: names, units, credentials, what it offers. Frozen, checked once."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.config import Secret
from orion_iscsifs.target.faults import Faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Chap:
    """`user` and `secret` are what an initiator must prove; the `mutual_` pair proves us to it."""

    user: str
    secret: Secret
    mutual_user: str | None = None
    mutual_secret: Secret | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the server offers and how much it takes on; lengths in bytes, times in seconds."""

    max_recv_data_segment_length: int = 1 << 18
    first_burst_length: int = 1 << 18
    max_burst_length: int = 1 << 20
    max_outstanding_r2t: int = 8
    initial_r2t: bool = False
    immediate_data: bool = True
    digests: bool = False
    """Insist on CRC32C for headers; otherwise, and for data, the initiator's wish decides."""
    command_window: int = 128
    transfer_bytes_max: int = 32 << 20
    """One command moves at most this much."""
    send_queue_bytes_max: int = 16 << 20
    """Above this no further command of the connection is read until the peer has read."""
    login_timeout_s: float = 15.0
    ping_interval_s: float = 30.0
    """An idle connection is pinged; silence for as long again closes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetConfig:
    """One target: its name, its logical units by number, who may use it, how it misbehaves."""

    iqn: str
    units: Mapping[int, BlockDevice]
    chap: Chap | None = None
    faults: Faults = field(default_factory=Faults)

"""What a measurement comes to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measurement. `rate` is in the workload's unit."""

    rate: float
    p50_us: float
    p99_us: float

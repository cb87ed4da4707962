"""How much must be on its way to keep the link to the device busy. Pure; `now` in seconds.

Twice the bandwidth-delay product (BDP): one for what travels, one for what the reader still has in
hand when the next is asked for. Both factors are measured the way BBR does (Cardwell et al.,
"BBR: congestion-based congestion control", ACM Queue 2016), on reads that take place anyway:

* *round trip*: the shortest time that a read took which left when no other was on its way. One
  that queues behind others shows the queue, which is as long as our own window: taking it for
  distance, the window would grow for ever. The read's own bytes are no distance either (that is
  why a window that is to open must begin at a multiple of `SOLITARY_BYTES_MAX`).
* *bandwidth*: for each bulk read, what arrived between the last arrival before it left and its
  own arrival, over that time; the largest of late. If the window is what limits it, the next
  window is twice as large, and so on until the link or the reader is what limits.

An estimate holds until later samples replace it: a device that rests does not come closer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

BULK_BYTES_MIN: Final = 64 << 10
"""Smaller reads say nothing about bandwidth."""
SOLITARY_BYTES_MAX: Final = 1 << 20
"""Larger reads say nothing about distance: their own bytes take too long."""
SOLITARY_SAMPLE: Final = 16
"""Of so many small reads that leave alone, one is timed; the first is."""
BANDWIDTH_PERIOD_S: Final = 5.0
ROUND_TRIP_PERIOD_S: Final = 30.0
GAIN: Final = 2


Sample = TypeVar("Sample")


@dataclass(slots=True)
class Extreme(Generic[Sample]):
    """The largest or smallest sample of the last one to two periods that had any."""

    choose: Callable[[Sample, Sample], Sample]
    period_s: float
    value: Sample | None = None
    _current: Sample | None = None
    _since: float = 0.0

    def add(self, sample: Sample, now: float) -> None:
        if self.value is None or self._current is None:
            self.value, self._current, self._since = sample, sample, now
        elif now - self._since >= self.period_s:
            self.value = self.choose(self._current, sample)
            self._current, self._since = sample, now
        else:
            self._current = self.choose(self._current, sample)
            self.value = self.choose(self.value, sample)


@dataclass(slots=True)
class Flight:
    """One read on its way, and what had arrived when it left."""

    alone: bool
    sent_at: float
    arrived_bytes: int
    arrived_at: float


@dataclass(slots=True)
class Link:
    """The estimate, and the window that follows from it: never outside the two bounds."""

    window_min_bytes: int
    window_max_bytes: int
    window_bytes: int = field(init=False)
    in_flight: int = 0
    """Reads on their way. Whoever sends one that is not worth a `Flight` counts it here."""
    _solitary: int = -1
    _bulk_in_flight: int = 0
    _arrived_bytes: int = 0
    _arrived_at: float = 0.0
    _round_trip: Extreme[tuple[float, int]] = field(
        default_factory=lambda: Extreme(min, ROUND_TRIP_PERIOD_S)
    )
    """How long the read took, and its length."""
    _bandwidth: Extreme[float] = field(default_factory=lambda: Extreme(max, BANDWIDTH_PERIOD_S))

    def __post_init__(self) -> None:
        assert self.window_min_bytes <= self.window_max_bytes
        self.window_bytes = self.window_min_bytes

    @property
    def round_trip_s(self) -> float | None:
        """Of the quickest read, its own bytes included."""
        return None if self._round_trip.value is None else self._round_trip.value[0]

    @property
    def bandwidth_bytes_per_s(self) -> float | None:
        return self._bandwidth.value

    def samples_small(self) -> bool:
        """Whether a small read that leaves alone now is worth a `Flight`.

        Taking the time twice costs a small read more than counting it, so few of them do.
        """
        self._solitary = (self._solitary + 1) % SOLITARY_SAMPLE
        return not self._solitary

    def depart(self, length: int, now: float) -> Flight:
        """A read leaves. `arrive` or `lose` must follow."""
        alone = not self.in_flight and length <= SOLITARY_BYTES_MAX
        self.in_flight += 1
        if length >= BULK_BYTES_MIN:
            if not self._bulk_in_flight:
                self._arrived_at = now  # the link rested until now
            self._bulk_in_flight += 1
        return Flight(alone, now, self._arrived_bytes, self._arrived_at)

    def arrive(self, flight: Flight, length: int, now: float) -> None:
        self.lose(length)
        if flight.alone:
            self._round_trip.add((now - flight.sent_at, length), now)
        if length >= BULK_BYTES_MIN:
            self._arrived_bytes += length
            self._arrived_at = now
            if now > flight.arrived_at:
                arrived = self._arrived_bytes - flight.arrived_bytes
                self._bandwidth.add(arrived / (now - flight.arrived_at), now)
        self._set_window()

    def lose(self, length: int) -> None:
        """The read failed or was cancelled: it tells nothing."""
        self.in_flight -= 1
        if length >= BULK_BYTES_MIN:
            self._bulk_in_flight -= 1

    def _set_window(self) -> None:
        quickest, bandwidth = self._round_trip.value, self._bandwidth.value
        if quickest is None or bandwidth is None:
            return
        round_trip_s, length = quickest
        wanted = GAIN * int(round_trip_s * bandwidth - length)
        self.window_bytes = max(self.window_min_bytes, min(wanted, self.window_max_bytes))

"""How much must be on its way to keep the link to the device busy. Pure; `now` in seconds.

Twice the bandwidth-delay product (BDP): one for what travels, one for what the reader still has in
hand when the next is asked for. Both factors are measured much as BBR does (Cardwell et al.,
"BBR: congestion-based congestion control", ACM Queue 2016), on reads that take place anyway:

* *round trip*: the shortest time that a read took which left when no other was on its way. One
  that queues behind others shows the queue, which is as long as our own window: taking it for
  distance, the window would grow for ever. If it is quicker all the same it counts: the first read
  of all meets cold caches. The read's own bytes are no distance either, so a window that is to
  open has to begin at a multiple of `SOLITARY_BYTES_MAX`.
* *bandwidth*: what bulk reads brought over a span of a few round trips; the largest of late. Over
  a shorter span the rate is that of a burst, several times what the link sustains. If the window
  is what limits it, the next window is twice as large, and so on until the link or the reader is
  what limits.

An estimate holds until later samples replace it: a device that rests does not come closer.
"""

import math
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
SPAN_MIN_S: Final = 0.01
SPAN_ROUND_TRIPS: Final = 4
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
    """One read on its way."""

    alone: bool
    sent_at: float


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
    _arrived_at: float = -math.inf
    _span_began: float = 0.0
    _span_bytes: int = 0
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
            if not self._bulk_in_flight and now - self._arrived_at > self._span_s:
                self._begin_span(now)  # the link has rested
            self._bulk_in_flight += 1
        return Flight(alone, now)

    def arrive(self, flight: Flight, length: int, now: float) -> None:
        self.lose(length)
        sample, quickest = (now - flight.sent_at, length), self._round_trip.value
        if flight.alone or (quickest is not None and sample < quickest):
            self._round_trip.add(sample, now)
        if length >= BULK_BYTES_MIN:
            self._arrived_at = now
            self._span_bytes += length
            if now - self._span_began >= self._span_s:
                self._bandwidth.add(self._span_bytes / (now - self._span_began), now)
                self._begin_span(now)
        self._set_window()

    @property
    def _span_s(self) -> float:
        """For so long, at least, bytes are counted for a sample of the bandwidth."""
        quickest = self._round_trip.value
        return max(SPAN_MIN_S, SPAN_ROUND_TRIPS * quickest[0] if quickest is not None else 0.0)

    def _begin_span(self, now: float) -> None:
        self._span_began, self._span_bytes = now, 0

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

"""The search for the largest batch that fits: what to try next, from peak = a + b·batch.

It knows nothing of processes: whoever searches hands in a function that tries one batch size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import isqrt

MOST_PROBES = 6
HEADROOM = 0.1
"""Share of the room that the found batch leaves free: later batches, other allocations."""
FIRST, SECOND = 1, 16
MOST = 1 << 16
"""No larger batch is tried."""
NOISE_BYTES = 32 << 20
"""Two peaks that differ by less give no slope: allocators hand out segments of 2 to 20 MiB, and the
resident memory of equal processes differs by some MiB."""
STEP = 8
"""The answer is sought to within an eighth: a probe costs more than the rest is worth."""
NEAR = 20
"""A peak that misses the target by less than a twentieth does not refute the model."""
ROUNDING = 16
"""Batches are multiples of the largest power of two within a sixteenth of them: the same search
gives the same number tomorrow, and hardware likes it."""


@dataclass(frozen=True)
class Probe:
    """One batch size tried in a process of its own."""

    asked: int
    status: str
    """`ok`, or how it died: of memory, or by its time limit."""
    room_bytes: int
    """Memory it could have: with more it would have died."""
    peak_bytes: int | None = None
    """Its largest stage; None where it died."""
    rows: int | None = None
    """Largest batch it really saw, where that is known: there may be no more rows."""
    expected_bytes: int | None = None
    """What the model said before."""
    beside: str = ""
    """Other settings that were searched before and had their numbers here."""

    @property
    def batch(self) -> int:
        """The batch its peak is of."""
        return self.asked if self.rows is None else min(self.asked, self.rows)

    @property
    def fits(self) -> bool:
        """Whether it ended well and left the head-room."""
        return self.peak_bytes is not None and self.peak_bytes <= target_bytes(self.room_bytes)


@dataclass(frozen=True)
class Line:
    """peak = at + slope · (batch − from): through two probes."""

    lower: Probe
    upper: Probe

    @property
    def slope(self) -> float:
        """Bytes for one more in a batch."""
        rise = (self.upper.peak_bytes or 0) - (self.lower.peak_bytes or 0)
        return rise / (self.upper.batch - self.lower.batch)

    @property
    def intercept(self) -> float:
        """Bytes that no batch size saves."""
        return (self.upper.peak_bytes or 0) - self.slope * self.upper.batch

    def peak_bytes(self, batch: int) -> int:
        """Predicted peak."""
        return round(self.intercept + self.slope * batch)

    def batch(self, peak_bytes: int) -> int:
        """Largest batch predicted to stay within."""
        return int((peak_bytes - self.intercept) / self.slope)


def target_bytes(room_bytes: int) -> int:
    """The room less the head-room."""
    return int((1 - HEADROOM) * room_bytes)


Try = Callable[[int], Probe]


def search(attempt: Try, most_probes: int = MOST_PROBES) -> list[Probe]:
    """Try batch sizes until the largest that fits is known to within a step, or the probes are
    used up; all probes in order. `largest` of them is the answer.
    """
    probes: list[Probe] = []
    while len(probes) < most_probes and (batch := next_batch(probes)) is not None:
        line = line_of(probes)
        probe = attempt(batch)
        probes.append(replace(probe, expected_bytes=line.peak_bytes(batch) if line else None))
    return probes


def largest(probes: Iterable[Probe]) -> Probe | None:
    """The largest batch that was seen to fit; None if there was none."""
    return max((probe for probe in probes if probe.fits), key=_batch, default=None)


def next_batch(probes: Sequence[Probe]) -> int | None:
    """What to try next; None when the answer is known or nothing fits."""
    if not probes:
        return FIRST
    best, high = largest(probes), first_misfit(probes)
    if best is None:
        return None
    low, line = best.batch, line_of(probes)
    target = target_bytes(best.room_bytes)
    guess = line.batch(target) if line else SECOND * low
    guess = rounded(min(guess, most_rows(probes)))
    if high is None:
        return guess if guess > low + low // STEP else None
    if high.batch - low <= max(1, high.batch // STEP):
        return None
    # Without a slope the answer may be anywhere between: then halve in ratio.
    middle = (low + high.batch) // 2 if line else max(low + 1, isqrt(low * high.batch))
    if line and high.peak_bytes is not None and high.peak_bytes - target <= target // NEAR:
        above = (high.peak_bytes - target) / line.slope  # the model holds, give or take a little
        guess = rounded(high.batch - round(above) - high.batch // (2 * STEP))
        return guess if low < guess < high.batch else middle
    return guess if low + low // STEP < guess < middle else middle


def line_of(probes: Iterable[Probe]) -> Line | None:
    """Through the largest batch that fits and the largest below it that is lower by more than
    noise: what costs memory at small batches only must not bend the line. None without such two.
    """
    known = sorted((probe for probe in probes if probe.fits), key=_batch)
    if not known:
        return None
    upper = known[-1]
    lower = [p for p in known if (upper.peak_bytes or 0) - (p.peak_bytes or 0) >= NOISE_BYTES]
    return Line(lower[-1], upper) if lower else None


def _batch(probe: Probe) -> int:
    return probe.batch


def first_misfit(probes: Iterable[Probe]) -> Probe | None:
    """The smallest batch that did not fit."""
    return min((probe for probe in probes if not probe.fits), key=_batch, default=None)


def most_rows(probes: Iterable[Probe]) -> int:
    """No batch holds more: the rows there are, once a probe has met their end."""
    ends = (p.rows for p in probes if p.rows is not None and p.rows < p.asked)
    return min((MOST, *ends))


def rounded(batch: int) -> int:
    """Down to a multiple of the largest power of two within a sixteenth of it."""
    if batch < ROUNDING:
        return batch
    unit: int = 1 << ((batch // ROUNDING).bit_length() - 1)
    return batch - batch % unit

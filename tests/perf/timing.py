"""Paired times of two pieces of work in ABBA blocks, and whether their ratio holds; no torch."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bench.judging.intervals import ALPHA, Effect

Work = Callable[[], object]
Clock = Callable[[], float]

CALLS = 3
"""Of which the quickest counts: another process can only make a call slower."""
SHORTEST_S = 0.003
ACCOUNT = Path("/proc/thread-self/schedstat")
"""Linux: nanoseconds run, nanoseconds queued, slices."""
FEWEST_BLOCKS, MOST_BLOCKS = 6, 24


@dataclass(frozen=True)
class Measured:
    """Ratio reference / guarded work over blocks: above 1 = the guarded work is the quicker one."""

    ratio: float
    low: float
    high: float
    blocks: int
    milliseconds: float
    """Of the guarded work, its quickest call."""

    def holds(self, at_least: float) -> bool | None:
        """Whether the whole interval lies above a ratio; None where it lies on both sides."""
        if self.low > at_least:
            return True
        return False if self.high < at_least else None


def own_seconds() -> float:
    """Wall clock less the time this thread stood in the scheduler's queue behind others.

    Sleeping and waiting for a disk count, being pushed off a shared core does not. Where the kernel
    keeps no such account it is the wall clock.
    """
    queued_ns = _queued_ns()
    while True:
        now = time.perf_counter()
        before, queued_ns = queued_ns, _queued_ns()
        if queued_ns == before:  # else it was pushed off between the two readings
            return now - queued_ns / 1e9


def _queued_ns() -> int:
    try:
        return int(ACCOUNT.read_bytes().split()[1])
    except (OSError, IndexError):
        return 0


def quickest(work: Work, times: int, clock: Clock) -> float:
    """Seconds of one piece of work in the quickest of `CALLS` calls of so many each."""
    found = []
    for _ in range(CALLS):
        begun = clock()
        for _ in range(times):
            work()
        found.append((clock() - begun) / times)
    return min(found)


def often_enough(work: Work, clock: Clock) -> int:
    """How often to do something short, so that reading the clock costs nothing beside it."""
    work()  # the first time may build and allocate
    return max(1, round(SHORTEST_S / max(quickest(work, 1, clock), 1e-7)))


def blocks(reference: Work, guarded: Work, clock: Clock) -> Iterator[tuple[float, float]]:
    """Endless (ln of the ratio, seconds of the guarded work), one of each ABBA block: a machine
    that grows slower or faster meets both alike.
    """
    times = [often_enough(work, clock) for work in (reference, guarded)]
    while True:
        first, second = quickest(reference, times[0], clock), quickest(guarded, times[1], clock)
        third, fourth = quickest(guarded, times[1], clock), quickest(reference, times[0], clock)
        yield math.log(first * fourth / (second * third)) / 2, min(second, third)


def compare(
    reference: Work, guarded: Work, at_least: float | None, clock: Clock = own_seconds
) -> Measured:
    """Measure blocks until the ratio is known to lie above or below `at_least`; None: the most."""
    logs: list[float] = []
    seconds = math.inf
    for log, own in itertools.islice(blocks(reference, guarded, clock), MOST_BLOCKS):
        logs.append(log)
        seconds = min(seconds, own)
        known = at_least is not None and summary(logs, seconds).holds(at_least) is not None
        if known and len(logs) >= FEWEST_BLOCKS:
            break
    return summary(logs, seconds)


def summary(logs: Sequence[float], seconds: float) -> Measured:
    """Mean ratio of the blocks with its 95 % interval."""
    mean = statistics.fmean(logs)
    width = math.inf
    if len(logs) > 1:
        width = Effect(mean, statistics.stdev(logs), len(logs)).half_width(ALPHA)
    return Measured(
        math.exp(mean), math.exp(mean - width), math.exp(mean + width), len(logs), 1000 * seconds
    )


# ---- goals: several ways of doing one thing, side by side ----


Name = TypeVar("Name")


class Steady(float):
    """Seconds that a piece of work measured itself: those of its steady state, without start-up."""


@dataclass(frozen=True)
class Paired:
    """Ratio reference / own over blocks: above 1 = the own work is the quicker one."""

    median: float
    low: float
    high: float
    """Smallest and largest of all blocks."""
    blocks: int
    milliseconds: float
    """Of the own work, its median."""


def rounds(
    works: Mapping[Name, Work], blocks: int, clock: Clock = time.process_time
) -> dict[Name, list[float]]:
    """Seconds of each piece of work in each block. A block does all of them once, every second one
    in reverse, after one round that is not counted. The clock is the process's own processor time.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()  # the first time builds and allocates
    for block in range(blocks):
        for name in list(works) if block % 2 == 0 else reversed(list(works)):
            begun = clock()
            own = works[name]()
            spent = clock() - begun
            seconds[name].append(float(own) if isinstance(own, Steady) else spent)
    return seconds


def paired(reference: Sequence[float], own: Sequence[float]) -> Paired:
    """The ratio of each block's two times."""
    ratios = [before / now for before, now in zip(reference, own, strict=True)]
    middle = statistics.median(ratios)
    return Paired(middle, min(ratios), max(ratios), len(ratios), 1000 * statistics.median(own))

"""Where warming up ends: the first step from which on two windows of steps agree."""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

TOLERANCE = 0.02
"""Medians closer than this agree, as do those that the scatter of the steps can explain."""
SIGMAS = 3.0
FEWEST_IN_WINDOW, COMMON_WINDOW = 3, 5
SHORTEST_S = 1e-12
"""A coarse clock may read 0."""
MEDIAN_FACTOR = math.sqrt(math.pi / 2)
"""Standard error of a median over that of a mean, of normal values."""


def steady_start(seconds: Sequence[float]) -> int | None:
    """Index of the first steady one of these durations; None if they never become steady.

    Two neighbouring windows agree if their medians differ by no more than 2 %, or than three
    standard errors of the scatter. Single durations at the front that still stand out are left
    out too. Fewer than two windows of three show nothing and count as steady from the first.
    """
    logs = [math.log(max(x, SHORTEST_S)) for x in seconds]
    window = window_of(len(logs))
    if len(logs) < 2 * window:
        return 0
    sigma = scatter(logs)
    agree = max(math.log1p(TOLERANCE), SIGMAS * sigma * MEDIAN_FACTOR * math.sqrt(2 / window))
    for start in range(0, len(logs) - 2 * window + 1, max(1, window // COMMON_WINDOW)):
        first, second = logs[start : start + window], logs[start + window : start + 2 * window]
        if abs(statistics.median(first) - statistics.median(second)) <= agree:
            level = statistics.median(first + second)
            stands_out = max(math.log1p(TOLERANCE), SIGMAS * sigma)
            while logs[start] - level > stands_out:
                start += 1
            return start
    return None


def window_of(count: int) -> int:
    """Durations in one window: a tenth of them, five of few, a quarter of very few."""
    return max(FEWEST_IN_WINDOW, min(count // 4, max(COMMON_WINDOW, count // 10)))


def scatter(logs: Sequence[float]) -> float:
    """Standard deviation of single logs about whatever trend they have, from their differences.

    The median absolute deviation, so that slow steps at the front do not widen it.
    """
    steps = [second - first for first, second in pairwise(logs)]
    middle = statistics.median(steps)
    return 1.4826 * statistics.median(abs(x - middle) for x in steps) / math.sqrt(2)

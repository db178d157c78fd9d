"""Paired statistics on logarithms of times: intervals of ratios, Holm's levels, the call."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

ALPHA = 0.05
POWER = 0.8
MIN_BLOCKS = 4
# Repeats beyond this are no advice anybody would follow.
MOST_REPEATS = 1000
# Rounding of logarithms alone, not a spread.
NO_SPREAD = 1e-12


@dataclass(frozen=True)
class Effect:
    """Mean and standard deviation of the natural log of cell / baseline over `blocks` pairs."""

    mean: float
    sd: float
    blocks: int

    @property
    def p_value(self) -> float:
        """Two-sided p of the paired t test; without spread the mean alone decides."""
        if self.blocks < 2:
            return 1.0
        if self.sd == 0:
            return 0.0 if abs(self.mean) > NO_SPREAD else 1.0
        t = abs(self.mean) / (self.sd / math.sqrt(self.blocks))
        return float(2 * stats.t.sf(t, self.blocks - 1))

    def half_width(self, level: float) -> float:
        """Half of the interval of the log: t(1 - level/2, n - 1) · sd / √n; needs two pairs."""
        if self.sd == 0:
            return 0.0
        quantile = stats.t.ppf(1 - level / 2, self.blocks - 1)
        return float(quantile * self.sd / math.sqrt(self.blocks))

    def smallest_seen(self, level: float) -> float:
        """Smallest log ratio this run would have found 4 times in 5 at the level."""
        quantiles = stats.t.ppf([1 - level / 2, POWER], self.blocks - 1)
        return float(quantiles.sum() * self.sd / math.sqrt(self.blocks))


def paired(cell: Sequence[float], baseline: Sequence[float]) -> Effect:
    """Effect of paired positive figures, one pair for each block. Raises ValueError for no pair."""
    if not cell or len(cell) != len(baseline):
        raise ValueError(f"paired: {len(cell)} and {len(baseline)} figures; pairs are needed")
    logs = [math.log(ours) - math.log(other) for ours, other in zip(cell, baseline, strict=True)]
    mean = math.fsum(logs) / len(logs)
    if len(logs) < 2:
        return Effect(mean, 0.0, len(logs))
    sd = math.sqrt(math.fsum((x - mean) ** 2 for x in logs) / (len(logs) - 1))
    return Effect(mean, sd if sd > NO_SPREAD else 0.0, len(logs))


def holm_levels(p_values: Sequence[float], alpha: float = ALPHA) -> list[float]:
    """Level of each comparison's interval, so that it excludes 1 exactly where Holm rejects.

    Holm tests the sorted p values at alpha/m, alpha/(m-1), … and stops at the first that fails; the
    comparisons after the stop keep the level at which it stopped.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    levels = [alpha] * len(p_values)
    stopped: float | None = None
    for rank, i in enumerate(order):
        levels[i] = stopped or alpha / (len(order) - rank)
        if stopped is None and p_values[i] > levels[i]:
            stopped = levels[i]
    return levels


def decide(effect: Effect, floor: float, level: float = ALPHA) -> tuple[str, int | None]:
    """The call of one comparison and, for `undecided`, how many more blocks it needs.

    `floor` is the smallest ratio worth acting on (0.02 = 2 %), taken alike in both directions. None
    blocks needed means more than `MOST_REPEATS` would be.
    """
    if effect.blocks < MIN_BLOCKS:
        return "undecided", MIN_BLOCKS - effect.blocks
    distance, width, edge = abs(effect.mean), effect.half_width(level), math.log1p(floor)
    if distance > width and distance >= edge:
        return ("faster" if effect.mean < 0 else "slower"), None
    if distance + width <= edge:
        return "same", None
    return "undecided", _blocks_needed(effect, edge, level)


def _blocks_needed(effect: Effect, edge: float, level: float) -> int | None:
    """Fewest further blocks whose interval would decide at the present estimate and spread."""
    sizes = np.arange(effect.blocks + 1, effect.blocks + MOST_REPEATS + 1)
    widths = stats.t.ppf(1 - level / 2, sizes - 1) * effect.sd / np.sqrt(sizes)
    distance = abs(effect.mean)
    enough = widths < distance if distance >= edge else widths <= edge - distance
    return int(sizes[enough.argmax()] - effect.blocks) if enough.any() else None


def mean_interval(values: Sequence[float], level: float = ALPHA) -> tuple[float, float, float]:
    """Mean of differences with its t interval; a single value has an unbounded one."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    spread = float(np.std(values, ddof=1))
    width = float(stats.t.ppf(1 - level / 2, len(values) - 1)) * spread / math.sqrt(len(values))
    return mean, mean - width, mean + width

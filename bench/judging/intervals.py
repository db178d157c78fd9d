"""Paired statistics on logarithms of times: intervals of ratios, Holm's levels, looks, the call."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit  # scipy.stats would take a second to import

ALPHA = 0.05
POWER = 0.8
MIN_BLOCKS = 4
# Repeats beyond this are no advice anybody would follow.
MOST_REPEATS = 1000
# Rounding of logarithms alone, not a spread.
NO_SPREAD = 1e-12
EARLY_SHARE = 0.5
"""Of a comparison's level, spent on all looks before the last together."""


@dataclass(frozen=True)
class Looks:
    """After which numbers of blocks a comparison may be decided: `first`, each one more, `last`.

    Whoever looks five times at data without any difference finds one more often than whoever looks
    once. So the looks share the level: those before the last have half of it in equal parts, the
    last has the other half. The sum of what is spent is the level, hence no rule decides wrongly
    more often, whatever the looks have in common (Bonferroni).
    """

    first: int
    last: int

    def share(self, blocks: int) -> float:
        """Part of a comparison's level that may be spent after so many blocks; 1 for one look."""
        early = self.last - max(self.first, MIN_BLOCKS)
        if early <= 0:
            return 1.0
        return EARLY_SHARE / early if blocks < self.last else 1 - EARLY_SHARE


ONE_LOOK = Looks(MIN_BLOCKS, MIN_BLOCKS)


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
        return float(2 * stdtr(self.blocks - 1, -t))

    def half_width(self, level: float) -> float:
        """Half of the interval of the log: t(1 - level/2, n - 1) · sd / √n; needs two pairs."""
        if self.sd == 0:
            return 0.0
        return half_width(self.sd, self.blocks, level)

    def smallest_seen(self, level: float) -> float:
        """Smallest log ratio this run would have found 4 times in 5 at the level."""
        quantiles = stdtrit(self.blocks - 1, POWER) - stdtrit(self.blocks - 1, level / 2)
        return float(quantiles * self.sd / math.sqrt(self.blocks))


def half_width(sd: float, blocks: int, level: float) -> float:
    """t(1 - level/2, n - 1) · sd / √n."""
    return float(-stdtrit(blocks - 1, level / 2) * sd / math.sqrt(blocks))


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


def call_of(effect: Effect, floor: float, level: float) -> str:
    """The call of one comparison at the level of this look; see `decide`."""
    if effect.blocks < MIN_BLOCKS:
        return "undecided"
    distance, width, edge = abs(effect.mean), effect.half_width(level), math.log1p(floor)
    if distance > width and distance >= edge:
        return "faster" if effect.mean < 0 else "slower"
    return "same" if distance + width <= edge else "undecided"


def decide(
    effect: Effect, floor: float, level: float = ALPHA, looks: Looks = ONE_LOOK
) -> tuple[str, int | None]:
    """The call of one comparison and, for `undecided`, how many more blocks it needs.

    `floor` is the smallest ratio worth acting on (0.02 = 2 %), taken alike in both directions.
    `level` is that of the comparison, of which this look has its share. None blocks needed means
    more than `MOST_REPEATS` would be.
    """
    call = call_of(effect, floor, level * looks.share(effect.blocks))
    if call != "undecided":
        return call, None
    if effect.blocks < MIN_BLOCKS:
        return call, MIN_BLOCKS - effect.blocks
    return call, blocks_needed(effect, math.log1p(floor), level, looks)


def blocks_needed(effect: Effect, edge: float, level: float, looks: Looks) -> int | None:
    """Fewest further blocks whose interval would decide at the present estimate and spread."""
    distance = abs(effect.mean)

    def decides(blocks: int) -> bool:
        width = half_width(effect.sd, blocks, level * looks.share(blocks))
        return width < distance if distance >= edge else width <= edge - distance

    start, most = effect.blocks + 1, effect.blocks + MOST_REPEATS
    for blocks in range(start, looks.last):  # the shares of early looks are smaller
        if decides(blocks):
            return blocks - effect.blocks
    later = range(max(start, looks.last), most + 1)
    if not later or not decides(later[-1]):
        return None
    return later[bisect_left(later, True, key=decides)] - effect.blocks


def mean_interval(values: Sequence[float], level: float = ALPHA) -> tuple[float, float, float]:
    """Mean of differences with its t interval; a single value has an unbounded one."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))
    width = half_width(spread, len(values), level)
    return mean, mean - width, mean + width

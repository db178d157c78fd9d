"""Effect of one run's figures against another's: paired where their blocks interleave, else Welch.

Two runs made one after the other differ by whatever drifted in between; pairing them by number
would call that drift a difference with the confidence of a paired test.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from scipy.special import stdtr, stdtrit  # scipy.stats would take a second to import

from bench.judging.intervals import Effect, paired

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Gap(Effect):
    """Mean log ratio between two runs, with the error and freedom of the test that suits them."""

    error: float = 0.0
    """Standard error of the mean."""
    freedom: float = 0.0
    """Degrees of freedom of the t distribution."""
    slack: float = 0.0
    """Half the range that the calibration kernels leave open; 0 in seconds."""
    in_blocks: bool = False

    @property
    def p_value(self) -> float:
        """Two-sided p of the t test; without spread the mean alone decides."""
        beyond = max(0.0, abs(self.mean) - self.slack)
        if self.blocks < 2:
            return 1.0
        if self.error == 0:
            return 0.0 if beyond > 0 else 1.0
        return float(2 * stdtr(self.freedom, -beyond / self.error))

    def half_width(self, level: float) -> float:
        """Half of the interval of the log ratio."""
        if self.error == 0:
            return self.slack
        return float(stdtrit(self.freedom, 1 - level / 2)) * self.error + self.slack


def interleaved(before: Sequence[Record], after: Sequence[Record]) -> bool:
    """Whether block i of both runs lies before block i + 1 of either, so that blocks are pairs."""
    starts = [_block_starts(side) for side in (before, after)]
    common = sorted(starts[0].keys() & starts[1].keys())
    ours, theirs = ([side[block] for block in common] for side in starts)
    rounds = list(zip(ours, theirs, strict=True))
    return len(rounds) > 1 and all(
        max(earlier) < min(later) for earlier, later in itertools.pairwise(rounds)
    )


def _block_starts(records: Sequence[Record]) -> dict[int, datetime]:
    """Block -> when its first measured stage began."""
    starts: dict[int, datetime] = {}
    for record in records:
        if record.get("started"):
            moment = datetime.fromisoformat(record["started"])
            starts[record["block"]] = min(moment, starts.get(record["block"], moment))
    return starts


def gap(before: Mapping[int, float], after: Mapping[int, float], in_blocks: bool) -> Gap:
    """Effect of positive figures by block, `after` against `before`. Raises ValueError for none."""
    common = sorted(before.keys() & after.keys())
    if in_blocks and common:
        effect = paired([after[block] for block in common], [before[block] for block in common])
        error, freedom = effect.sd / math.sqrt(effect.blocks), effect.blocks - 1.0
        return Gap(effect.mean, effect.sd, effect.blocks, error, freedom, in_blocks=True)
    if not before or not after:
        raise ValueError(f"gap: {len(before)} and {len(after)} figures; both runs need some")
    return welch([*before.values()], [*after.values()])


def welch(before: Sequence[float], after: Sequence[float]) -> Gap:
    """Welch's t test on logarithms; freedom after Satterthwaite (1946).

    `sd` and `blocks` are those of a paired test of the same width, so that the repeats still needed
    come out of the same rule.
    """
    sides = [[math.log(value) for value in side] for side in (before, after)]
    means = [statistics.fmean(side) for side in sides]
    mean, blocks = means[1] - means[0], min(map(len, sides))
    if blocks < 2:
        return Gap(mean, 0.0, blocks)
    variances = [statistics.variance(side) for side in sides]
    parts = [variance / len(side) for variance, side in zip(variances, sides, strict=True)]
    error = math.sqrt(math.fsum(parts))
    bottom = math.fsum(part**2 / (len(side) - 1) for part, side in zip(parts, sides, strict=True))
    freedom = math.fsum(parts) ** 2 / bottom if bottom else blocks - 1.0
    return Gap(mean, math.sqrt(math.fsum(variances)), blocks, error, freedom)


def calibrated(effect: Gap, machines: tuple[float, float]) -> Gap:
    """The effect beyond what the machines' kernels explain; `machines` are the logs of the smallest
    and largest kernel ratio. Where kernels disagree, the interval is that much wider.
    """
    low, high = machines
    return Gap(
        effect.mean - (low + high) / 2,
        effect.sd,
        effect.blocks,
        effect.error,
        effect.freedom,
        (high - low) / 2,
        effect.in_blocks,
    )

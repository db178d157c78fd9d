"""Quality guard: is a cell's ranking worse than the baseline's by more than the margin?"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.intervals import mean_interval

MARGIN = 0.01
"""Absolute loss of recall@10 or ndcg@10 that nobody should trade for speed."""
GAINS: dict[str, Callable[[float], float]] = {
    "recall@10": lambda rank: float(rank < 10),
    "ndcg@10": lambda rank: 1 / math.log2(rank + 2) if rank < 10 else 0.0,
}


@dataclass(frozen=True)
class Quality:
    """One metric of one cell against the baseline, 95 % interval over `count` users or blocks.

    `call`: "worse" (whole interval below -margin), "not worse" (interval above it), "open", or ""
    where no margin applies (loss) and for the baseline.
    """

    cell: str
    stage: str
    metric: str
    value: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    count: int = 0
    call: str = ""


def user_gains(records: Sequence[Mapping[str, Any]], metric: str) -> list[float] | None:
    """The metric of each evaluated user, averaged over repeats; None without comparable ranks."""
    lists = [record["ranks"] for record in records if record.get("ranks")]
    if not lists or len({len(ranks) for ranks in lists}) != 1:
        return None
    gain = GAINS[metric]
    return [math.fsum(map(gain, ranks)) / len(ranks) for ranks in zip(*lists, strict=True)]


def last_ranks(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """The ranks of the newest record that has some."""
    return next((r["ranks"] for r in reversed(records) if r.get("ranks")), [])


def guard(low: float, high: float) -> str:
    """Non-inferiority in one word, from the interval of a difference."""
    if high < -MARGIN:
        return "worse"
    return "not worse" if low >= -MARGIN else "open"


def compare(
    cell: str,
    stage: str,
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
) -> list[Quality]:
    """All metrics of a cell in one stage from `ok` records; no `theirs` = the baseline itself."""
    rows = []
    for metric in GAINS:
        if (mine := user_gains(ours, metric)) is None:
            continue
        value = math.fsum(mine) / len(mine)
        other = user_gains(theirs, metric)
        if other is None or len(other) != len(mine):
            rows.append(Quality(cell, stage, metric, value, count=len(mine)))
            continue
        gaps = [a - b for a, b in zip(mine, other, strict=True)]
        mean, low, high = mean_interval(gaps)
        if not any(gaps) and last_ranks(ours) != last_ranks(theirs):
            # Other scores, yet no user's gain moved: that bounds how often one would (rule of
            # three, 95 %), it does not make the models equal.
            low, high = -3 / len(gaps), 3 / len(gaps)
        rows.append(
            Quality(cell, stage, metric, value, mean, low, high, len(mine), guard(low, high))
        )
    losses = {r["block"]: r["metrics"]["loss"] for r in ours if "loss" in (r.get("metrics") or {})}
    if not losses:
        return rows
    value = math.fsum(losses.values()) / len(losses)
    others = {
        r["block"]: r["metrics"]["loss"] for r in theirs if "loss" in (r.get("metrics") or {})
    }
    if pairs := [losses[block] - others[block] for block in losses if block in others]:
        mean, low, high = mean_interval(pairs)
        rows.append(Quality(cell, stage, "loss", value, mean, low, high, len(pairs)))
    else:
        rows.append(Quality(cell, stage, "loss", value, count=len(losses)))
    return rows

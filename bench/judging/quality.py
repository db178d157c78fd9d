"""Quality guard: is a cell's ranking or training loss worse than the baseline's beyond a margin?"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from bench.judging.intervals import mean_interval

MARGIN = 0.01
"""Absolute loss of recall@10 or ndcg@10 that nobody should trade for speed."""
LOSS_MARGIN = 0.01
"""The same for the training loss, as a share of the baseline's."""
TRAINING_LOSS = "training loss"
LAST_SHARE, MOST_PARTS = 4, 8
"""The last quarter of a loss trace is judged, in so many parts at most."""
GAINS: dict[str, Callable[[float], float]] = {
    "recall@10": lambda rank: float(rank < 10),
    "ndcg@10": lambda rank: 1 / math.log2(rank + 2) if rank < 10 else 0.0,
}
NO_FLOORS: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Quality:
    """One metric of one cell against the baseline, 95 % interval over `count` users, parts of the
    trace (training loss) or blocks (loss of a test).

    `call`: "worse" (whole interval beyond the margin), "not worse" (interval short of it), "open",
    "missing" (one of the two sides has it and the other not, or of another number of users, so
    that nothing guards the cell), or "" where no margin applies (loss of a test) and for the
    baseline.
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


def guard(low: float, high: float, margin: float = MARGIN, floor: float = 0.0) -> str:
    """Non-inferiority in one word, from the interval of a gain (above 0 = better).

    Differences up to `floor`, by which the baseline's own repeats differ, are not called worse.
    """
    if high < -margin:
        return "worse" if (low + high) / 2 < -floor else "open"
    return "not worse" if low >= -margin else "open"


def last_losses(trace: Sequence[float]) -> list[float]:
    """Mean losses of equal parts of the last quarter of a trace.

    By its share of the training, so that traces of different lengths have equal parts: a batch
    twice as large makes half as many steps.
    """
    start = len(trace) - max(1, len(trace) // LAST_SHARE)
    count = min(MOST_PARTS, len(trace) - start)
    edges = [start + (len(trace) - start) * part // count for part in range(count + 1)]
    return [math.fsum(trace[a:b]) / (b - a) for a, b in pairwise(edges)]


def loss_parts(records: Sequence[Mapping[str, Any]], parts: int) -> list[float]:
    """`last_losses` averaged over repeats, joined to so many parts."""
    found = [last_losses(r["losses"]) for r in records if r.get("losses")]
    mean = [math.fsum(column) / len(found) for column in zip(*found, strict=False)]
    edges = [len(mean) * part // parts for part in range(parts + 1)]
    return [math.fsum(mean[a:b]) / (b - a) for a, b in pairwise(edges)]


def fewest_parts(records: Sequence[Mapping[str, Any]]) -> int:
    """Parts that all traces have; 0 without a trace."""
    return min((len(last_losses(r["losses"])) for r in records if r.get("losses")), default=0)


def absent(cell: str, stage: str, metric: str) -> Quality:
    """The row of a metric that the baseline has and the cell, although it was measured, has not."""
    return Quality(cell, stage, metric, math.nan, call="missing")


def compare_training(
    cell: str,
    stage: str,
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    floor: float = 0.0,
) -> list[Quality]:
    """The training loss at the end of a fit, paired by part of the trace (equal seeds draw equal
    batches) and averaged over repeats; nothing without a trace.
    """
    own, others = fewest_parts(ours), fewest_parts(theirs)
    parts = min(own, others)
    if not own:
        return [absent(cell, stage, TRAINING_LOSS)] if ours and others else []
    mine = loss_parts(ours, parts or own)
    value = math.fsum(mine) / len(mine)
    if not parts:
        missing = "missing" if theirs else ""
        return [Quality(cell, stage, TRAINING_LOSS, value, count=own, call=missing)]
    other = loss_parts(theirs, parts)
    mean, low, high = mean_interval([a - b for a, b in zip(mine, other, strict=True)])
    margin = LOSS_MARGIN * abs(math.fsum(other) / len(other))
    call = guard(-high, -low, margin, floor)
    return [Quality(cell, stage, TRAINING_LOSS, value, mean, low, high, parts, call)]


def compare(
    cell: str,
    stage: str,
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    floors: Mapping[str, float] = NO_FLOORS,
) -> list[Quality]:
    """Ranking metrics and test loss of a cell in one stage from `ok` records; no `theirs` = the
    baseline itself. `floors`: metric -> by how much the baseline's own repeats differ.
    """
    rows = []
    for metric in GAINS:
        mine, other = user_gains(ours, metric), user_gains(theirs, metric)
        if mine is None:
            rows += [absent(cell, stage, metric)] if ours and other else []
            continue
        value = math.fsum(mine) / len(mine)
        if other is None or len(other) != len(mine):
            missing = "missing" if theirs else ""
            rows.append(Quality(cell, stage, metric, value, count=len(mine), call=missing))
            continue
        gaps = [a - b for a, b in zip(mine, other, strict=True)]
        mean, low, high = mean_interval(gaps)
        if not any(gaps) and last_ranks(ours) != last_ranks(theirs):
            # Other scores, yet no user's gain moved: that bounds how often one would (rule of
            # three, 95 %), it does not make the models equal.
            low, high = -3 / len(gaps), 3 / len(gaps)
        call = guard(low, high, MARGIN, floors.get(metric, 0.0))
        rows.append(Quality(cell, stage, metric, value, mean, low, high, len(mine), call))
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

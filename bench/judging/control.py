"""Control pairs: by how much equal cells differ, seen in the repeats of the baseline.

All repeats of a cell have one seed, so whatever differs between them is the machine's doing, and a
difference of that size between two cells says nothing about either.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.judging.quality import GAINS, TRAINING_LOSS, last_losses, user_gains

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Control:
    """One outcome of the baseline over its repeats in a stage."""

    stage: str
    metric: str
    repeats: int
    identical: bool
    """Trace or ranks equal to the bit in all repeats."""
    spread: float
    """Largest less smallest value of the metric over repeats."""
    value: float
    """Its mean."""


def controls(records: Sequence[Record], stages: Sequence[str]) -> list[Control]:
    """Controls of every stage from the `ok` records of the baseline; none where it ran once."""
    found = []
    for stage in stages:
        own = [r for r in records if r["stage"] == stage]
        found += _controls(stage, TRAINING_LOSS, [r["losses"] for r in own if r.get("losses")])
        ranked = [r for r in own if r.get("ranks")]
        for metric in GAINS:
            found += _controls(stage, metric, [r["ranks"] for r in ranked])
    return found


def floors(found: Sequence[Control], stage: str) -> dict[str, float]:
    """Metric -> smallest difference worth a word in a stage."""
    return {one.metric: one.spread for one in found if one.stage == stage}


def _controls(stage: str, metric: str, outcomes: Sequence[Sequence[float]]) -> list[Control]:
    if len(outcomes) < 2:
        return []
    values = [_value(metric, outcome) for outcome in outcomes]
    identical = all(list(one) == list(two) for one, two in itertools.pairwise(outcomes))
    spread, mean = max(values) - min(values), math.fsum(values) / len(values)
    return [Control(stage, metric, len(outcomes), identical, spread, mean)]


def _value(metric: str, outcome: Sequence[float]) -> float:
    values = (
        last_losses(outcome)
        if metric == TRAINING_LOSS
        else user_gains([{"ranks": outcome}], metric) or []
    )
    return math.fsum(values) / len(values)

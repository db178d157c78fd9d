"""Equality first, then interleaved blocks: what is measured of running contenders, and judged."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from core import metrics
from perf.peers.desk import Split

SIZE_TOLERANCE = 0.02
"""Share of the parameters: libraries differ in extra rows and biases."""


class Trainable(Protocol):
    """What `contenders.Running` offers."""

    about: dict[str, Any]

    def train(self, steps: int) -> dict[str, Any]: ...

    def top(self, held_out: int, to: Path) -> tuple[dict[str, Any], np.ndarray]: ...


@dataclass
class Figures:
    """One contender's measurements, a value for each repeat."""

    train: list[float] = field(default_factory=list)
    """Real training targets for each CPU second."""
    ranked: list[float] = field(default_factory=list)
    """Users for each CPU second."""
    peak_rss_mib: float = 0.0
    quality: dict[str, float] = field(default_factory=dict)


def quality(best: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """recall@10 and ndcg@10 of top-10 lists, (U, 10), by the project's own formulas."""
    hits = best == targets[:, None]
    ranks = torch.from_numpy(np.where(hits.any(1), hits.argmax(1), best.shape[1])).float()
    summary = metrics.summary(ranks, [best.shape[1]])
    return {name: summary[f"{name}@{best.shape[1]}"] for name in ("recall", "ndcg")}


def difference(about: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Why a contender's data or model are not those of the reference; None = they are."""
    for name in ("digest", "targets"):
        if about[name] != wanted[name]:
            return f"other data: {name} {about[name]}, wanted {wanted[name]}"
    ratio = about["parameters"] / wanted["parameters"]
    if abs(ratio - 1) > SIZE_TOLERANCE:
        return f"another model: {about['parameters']} parameters, wanted {wanted['parameters']}"
    return None


def wrong_lists(best: np.ndarray, histories: list[np.ndarray], items: int) -> str | None:
    """Why lists are no ranking of unseen items; None = they are."""
    if best.min() < 1 or best.max() > items:
        return f"lists ids {best.min()} to {best.max()}; the catalogue is 1 to {items}"
    for user, (row, seen) in enumerate(zip(best, histories, strict=True)):
        if len(set(row.tolist())) < len(row) or np.isin(row, seen).any():
            return f"lists an item twice or one already seen (user {user})"
    return None


def repeats(
    contenders: Mapping[str, Trainable], split: Split, steps: int, count: int, scratch: Path
) -> dict[str, Figures]:
    """Blocks in turn, every other one in reverse order, so that a drifting machine meets all
    alike. The first block of each warms it up and is not counted.
    """
    found = {name: Figures() for name in contenders}
    for repeat in range(count + 1):
        order = list(contenders) if repeat % 2 else list(contenders)[::-1]
        for name in order:
            trained = contenders[name].train(steps)
            ranked, _ = contenders[name].top(1, scratch)
            if repeat:
                found[name].train.append(trained["targets"] / trained["cpu_s"])
                found[name].ranked.append(ranked["users"] / ranked["cpu_s"])
            found[name].peak_rss_mib = max(found[name].peak_rss_mib, ranked["peak_rss_mib"])
    return found


def ratio(own: list[float], other: list[float]) -> tuple[float, float, float]:
    """Median, least and largest of the pairs' ratios own / other."""
    pairs = [a / b for a, b in zip(own, other, strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def seconds_to(curve: list[dict[str, Any]], ndcg: float) -> float | None:
    """CPU seconds of training at the first point whose test ndcg@10 is reached; None = never."""
    return next((p["cpu_s"] for p in curve if p["test"]["ndcg"] >= ndcg), None)

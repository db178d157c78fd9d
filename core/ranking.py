"""The one evaluator: full ranking of held-out targets, whole batches, for every model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core import metrics
from core.data import Prepared
from core.settings import EvalSettings


@dataclass(frozen=True)
class Queries:
    """What a model is asked: the history before each target, as slices of `Prepared.items`."""

    items: np.ndarray
    starts: np.ndarray
    """(Q,) first item of the history."""
    ends: np.ndarray
    """(Q,) position of the target, one behind the history's last item."""
    users: np.ndarray
    """(Q,) user rows."""

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """(Q,) items in each history."""
        return self.ends - self.starts

    @property
    def targets(self) -> np.ndarray:
        """(Q,) item ids asked for, int64."""
        return self.items[self.ends].astype(np.int64)

    def take(self, rows: np.ndarray) -> "Queries":
        """Some of the queries, in the order given."""
        return Queries(self.items, self.starts[rows], self.ends[rows], self.users[rows])

    def longest(self, most: int) -> "Queries":
        """The `most` queries with the longest histories, longest first."""
        return self.take(np.argsort(-self.lengths, kind="stable")[:most])

    def newest(self, rows: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The newest `most` items of some histories: ids (B, L) left-aligned, 0 on the right;
        lengths (B,).
        """
        lengths = np.minimum(self.lengths[rows], most)
        columns = np.arange(max(1, lengths.max()))
        real = columns < lengths[:, None]
        where = np.where(real, (self.ends[rows] - lengths)[:, None] + columns, 0)
        return np.where(real, self.items[where], 0).astype(np.int64), lengths

    def by_length(self, batch_size: int, most: int) -> Iterator[np.ndarray]:
        """Row indices in batches of similar history length, so that little is padding."""
        order = np.argsort(np.minimum(self.lengths, most), kind="stable")
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


def held_out(prepared: Prepared, split: str) -> Queries:
    """The evaluated users' `validation` or `test` targets with everything before them."""
    users = prepared.eval_users
    back = {"validation": 2, "test": 1}[split]
    return Queries(
        prepared.items, prepared.offsets[users], prepared.offsets[users + 1] - back, users
    )


Scorer = Callable[[Queries], Iterator[tuple[np.ndarray, Tensor]]]
"""Yields batches of (row indices (B,), scores (B, V+1)) until every query is scored once."""


def evaluate(
    score: Scorer,
    prepared: Prepared,
    split: str,
    settings: EvalSettings,
    most: int | None = None,
) -> tuple[dict, list[float]]:
    """Metrics of a split with the chance levels beside them, and the rank (from 0) of each user's
    target.

    The loss is the mean cross-entropy over all items, seen ones included, as in training. `most`
    leaves the users with the longest histories only, longest first.
    """
    queries = held_out(prepared, split)
    if most is not None:
        queries = queries.longest(most)
    ranks = torch.full((len(queries),), float("nan"))
    loss = torch.zeros((), dtype=torch.float64)
    for rows, scores_BV in score(queries):
        scores_BV = scores_BV.float()
        targets_B = torch.from_numpy(queries.targets[rows]).to(scores_BV.device)
        log_total = scores_BV[:, 1:].logsumexp(1)
        loss += (log_total - scores_BV.gather(1, targets_B[:, None])[:, 0]).sum().cpu()
        seen_BL = None
        if settings.mask_seen:
            history, _ = queries.newest(rows, int(queries.lengths[rows].max()))
            seen_BL = torch.from_numpy(history).to(scores_BV.device)
        ranks[torch.from_numpy(rows)] = metrics.rank(scores_BV, targets_B, seen_BL).cpu()
    summary = metrics.summary(ranks, settings.top_k)
    summary |= {"loss": loss.item() / len(queries), "users": len(queries)}
    summary |= {"uniform_loss": float(np.log(prepared.num_items))}
    summary |= {f"chance_recall@{k}": k / prepared.num_items for k in settings.top_k}
    return summary, ranks.tolist()

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

    def histories(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All items before the targets of some queries, one query after the other: the place in
        `rows` that each belongs to, and its id; both (M,) int64.
        """
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        where = np.arange(lengths.sum()) + np.repeat(self.ends[rows] - ends, lengths)
        return np.repeat(np.arange(len(rows)), lengths), self.items[where].astype(np.int64)

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
"""Yields batches of (row indices (B,), scores (B, V+1)) until every query is scored once; row
indices are on the host, scores where the model is.
"""


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
    leaves the users with the longest histories only, longest first. Nothing is read back from the
    device before all is scored. Raises ValueError for targets outside the catalogue, scores of
    another number of items, non-finite scores, and queries not scored exactly once.
    """
    queries = held_out(prepared, split)
    if most is not None:
        queries = queries.longest(most)
    targets, columns = queries.targets, prepared.num_items + 1
    if len(targets) and not (targets.min() > 0 and targets.max() < columns):
        raise ValueError(f"{split}: a target lies outside 1..{columns - 1}; 0 is padding")
    scored, ranks, losses = [], [], []
    for rows, scores_BV in score(queries):
        if scores_BV.shape[1] != columns:
            raise ValueError(f"{split}: scores have {scores_BV.shape[1]} columns, need {columns}")
        device = scores_BV.device
        targets_B = to_device(targets[rows], device)
        seen_M = None
        if settings.mask_seen:
            lines, items = queries.histories(rows)
            seen_M = to_device(lines * columns + items, device)
        gaps_BV, own_B1 = metrics.gaps(scores_BV, targets_B)
        scored.append(rows)
        gaps_BV[:, 0] = -torch.inf  # padding has no part in the loss
        losses.append(gaps_BV.logsumexp(1))  # −log p of the target
        ranks.append(metrics.rank_by_gaps(gaps_BV, own_B1, targets_B, seen_M))
    if not scored:
        raise ValueError(f"{split}: the model scored none of {len(queries)} queries")
    ranks_Q = _in_order(np.concatenate(scored), torch.cat(ranks).cpu(), queries)
    summary = metrics.summary(ranks_Q, settings.top_k)
    summary |= {"loss": torch.cat(losses).double().mean().item(), "users": len(queries)}
    summary |= {"uniform_loss": float(np.log(prepared.num_items))}
    summary |= {f"chance_recall@{k}": k / prepared.num_items for k in settings.top_k}
    return summary, ranks_Q.tolist()


def _in_order(scored: np.ndarray, ranks_M: Tensor, queries: Queries) -> Tensor:
    """Ranks by query, (Q,). Raises ValueError unless each query has exactly one, and a number."""
    if not np.array_equal(np.sort(scored), np.arange(len(queries))):
        raise ValueError(
            f"scores for {len(np.unique(scored))} of {len(queries)} queries, {len(scored)} rows in "
            "all; need one row for each"
        )
    if broken := int(ranks_M.isnan().sum()):
        raise ValueError(
            f"rank: non-finite scores among the ranked items of {broken} users; need finite"
        )
    ranks_Q = torch.empty(len(queries))
    ranks_Q[torch.from_numpy(scored)] = ranks_M
    return ranks_Q


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy that the device fetches by itself: from other than pinned memory the host waits."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

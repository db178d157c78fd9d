"""Turns item scores into ranks, and ranks into recall, hit ratio and ndcg with 95 % intervals.

Shapes: B users, V items (ids 1..V, score column 0 = padding), L history length, K list length,
N evaluated users. All of it is whole-batch tensor code; callers pass many users in chunks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Z_95 = 1.959963984540054

Figures = dict[str, float | list[float]]


def rank(scores_BV1: Tensor, targets_B: Tensor, seen_BL: Tensor | None = None) -> Tensor:
    """Rank of each target among the items that may be recommended, from 0 = best; (B,) float32.

    rank = #greater + (#equal − 1) / 2: a tie costs its mean position, so a model that scores all
    items alike lands in the middle instead of first. The comparison is made in fp32.

    The padding column is never ranked; the ids in `seen_BL` (padded with 0) are taken out, the
    target never. Raises ValueError for targets outside 1..V and for non-finite ranked scores.
    """
    scores_BV1 = scores_BV1.float()
    items = scores_BV1.shape[1] - 1
    target_B1 = targets_B.unsqueeze(1)
    if bool(((target_B1 < 1) | (target_B1 > items)).any()):
        raise ValueError(f"rank: a target lies outside 1..{items}; 0 is padding, ids start at 1")
    masked_BV1 = torch.zeros_like(scores_BV1, dtype=torch.bool)
    if seen_BL is not None:
        masked_BV1.scatter_(1, seen_BL, True)
    masked_BV1[:, 0] = True
    masked_BV1.scatter_(1, target_B1, False)
    broken = int((~scores_BV1.isfinite() & ~masked_BV1).sum())
    if broken:
        raise ValueError(f"rank: {broken} non-finite scores among the ranked items; need finite")
    # Below every finite score, so a masked item is neither greater than nor equal to a target.
    ranked_BV1 = scores_BV1.masked_fill(masked_BV1, -math.inf)
    target_score_B1 = ranked_BV1.gather(1, target_B1)
    greater_B = (ranked_BV1 > target_score_B1).sum(1)
    equal_B = (ranked_BV1 == target_score_B1).sum(1)
    return greater_B.float() + (equal_B - 1).float() / 2


def top_k(scores_BV1: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best items of each row: ids (B, K) int64 and scores (B, K) fp32.

    Order: score descending, then id ascending. `torch.topk` returns tied items in any order, so it
    only finds the k-th score; the items above it are taken, then its ties from the lowest id on.
    -inf marks an item that must not be returned, the padding column never is.
    Raises ValueError for k outside 1..V, for NaN or +inf, and if fewer than k items are left.
    """
    scores_BV = scores_BV1[:, 1:].float()
    items = scores_BV.shape[1]
    if not 1 <= k <= items:
        raise ValueError(f"top_k: k = {k} with {items} items; need 1..{items}")
    broken = int((scores_BV.isnan() | scores_BV.isposinf()).sum())
    if broken:
        raise ValueError(f"top_k: {broken} scores are NaN or +inf; need finite scores or -inf")
    last_B1 = scores_BV.topk(k, dim=1).values[:, -1:]
    if bool(last_B1.isneginf().any()):
        raise ValueError(f"top_k: k = {k}, but a row has fewer items that are not -inf")
    above_BV, tied_BV = scores_BV > last_B1, scores_BV == last_B1
    wanted_ties_B1 = k - above_BV.sum(1, keepdim=True)
    taken_BV = above_BV | (tied_BV & (tied_BV.cumsum(1) <= wanted_ties_B1))
    # Row-major, so each row's k columns come in ascending order, which the stable sort keeps.
    column_BK = taken_BV.nonzero()[:, 1].view(-1, k)
    best = scores_BV.gather(1, column_BK).sort(dim=1, descending=True, stable=True)
    return column_BK.gather(1, best.indices) + 1, best.values


def summary(ranks_N: Tensor, top_k: Sequence[int]) -> Figures:
    """recall@k, hit_ratio@k, ndcg@k for each k, each with `<name>_interval` = [low, high], 95 %.

    One target for each user, so recall = hit ratio; ndcg = 1 / log2(rank + 2) if rank < k else 0.
    Recall has a Wilson interval, ndcg a normal one. Raises ValueError for no or NaN ranks.
    """
    figures: Figures = {}
    for k in top_k:
        hits_N, gains_N = _hits_and_gains(ranks_N, k)
        for name in (f"recall@{k}", f"hit_ratio@{k}"):
            figures[name] = float(hits_N.mean())
            figures[f"{name}_interval"] = _wilson(float(hits_N.sum()), len(hits_N))
        figures[f"ndcg@{k}"] = float(gains_N.mean())
        figures[f"ndcg@{k}_interval"] = _mean_interval(gains_N, lowest=0.0)
    return figures


def paired_difference(ranks_a_N: Tensor, ranks_b_N: Tensor, k: int) -> Figures:
    """Mean of a − b in recall@k and ndcg@k, each with `<name>_interval` = [low, high] at 95 %.

    The ranks are of the same users in the same order. Raises ValueError if they cannot be.
    """
    if ranks_a_N.shape != ranks_b_N.shape:
        raise ValueError(
            f"paired_difference: {len(ranks_a_N)} against {len(ranks_b_N)} users; need the same"
        )
    figures: Figures = {}
    pairs = zip(_hits_and_gains(ranks_a_N, k), _hits_and_gains(ranks_b_N, k), strict=True)
    for name, (a_N, b_N) in zip((f"recall@{k}", f"ndcg@{k}"), pairs, strict=True):
        figures[name] = float((a_N - b_N).mean())
        figures[f"{name}_interval"] = _mean_interval(a_N - b_N, lowest=-1.0)
    return figures


def _hits_and_gains(ranks_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Hit (0 or 1) and ndcg gain of each user, fp64."""
    if ranks_N.ndim != 1 or len(ranks_N) == 0 or not bool((ranks_N >= 0).all()):
        raise ValueError("ranks: need a non-empty vector of numbers from 0, and NaN is none")
    hits_N = (ranks_N < k).double()
    return hits_N, hits_N / torch.log2(ranks_N.double() + 2)


def _wilson(hits: float, users: int) -> list[float]:
    """Wilson score interval of a proportion: stays inside 0..1 and is honest at 0 hits."""
    share = hits / users
    shrink = 1 + Z_95**2 / users
    centre = (share + Z_95**2 / (2 * users)) / shrink
    half = Z_95 * math.sqrt(share * (1 - share) / users + Z_95**2 / (4 * users**2)) / shrink
    return [max(centre - half, 0.0), min(centre + half, 1.0)]


def _mean_interval(values_N: Tensor, lowest: float) -> list[float]:
    """Normal 95 % interval of the mean of values that lie in [lowest, 1].

    Values that are all alike have no spread, yet do not make the mean certain: users unlike them
    may be as frequent as Wilson's upper limit at 0 of N, with values anywhere in the range.
    """
    users, mean = len(values_N), float(values_N.mean())
    if bool((values_N == values_N[0]).all()):
        unseen = _wilson(0.0, users)[1]
        return [mean - unseen * (mean - lowest), mean + unseen * (1 - mean)]
    half = Z_95 * float(values_N.std()) / math.sqrt(users)
    return [max(mean - half, lowest), min(mean + half, 1.0)]

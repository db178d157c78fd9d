"""Turns item scores into ranks, and ranks into recall, hit ratio and ndcg with 95 % intervals.

Shapes: B users, V items (ids 1..V, score column 0 = padding), L history length, K list length,
N evaluated users. All of it is whole-batch tensor code; callers pass many users in chunks.
"""

import math
from collections.abc import Sequence

import numpy as np
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
    users, columns = scores_BV1.shape
    if bool(((targets_B < 1) | (targets_B >= columns)).any()):
        raise ValueError(
            f"rank: a target lies outside 1..{columns - 1}; 0 is padding, ids start at 1"
        )
    seen_M = None
    if seen_BL is not None:
        rows_B1 = torch.arange(users, device=seen_BL.device).unsqueeze(1)
        seen_M = (rows_B1 * columns + seen_BL).flatten()
    ranks_B = rank_by_gaps(*gaps(scores_BV1, targets_B), targets_B, seen_M)
    if broken := int(ranks_B.isnan().sum()):
        raise ValueError(
            f"rank: non-finite scores among the ranked items of {broken} users; need finite"
        )
    return ranks_B


def gaps(scores_BV1: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
    """Every score minus the target's, (B, V+1), in a tensor of its own, and the target's, (B, 1);
    fp32.
    """
    scores_BV1 = scores_BV1.float()
    own_B1 = scores_BV1.gather(1, targets_B.unsqueeze(1))
    return scores_BV1 - own_B1, own_B1


def rank_by_gaps(
    gaps_BV1: Tensor, own_B1: Tensor, targets_B: Tensor, seen_M: Tensor | None = None
) -> Tensor:
    """`rank` from `gaps`, which are used up; nothing is read back from the device.

    `seen_M`: what to take out, as flat indices row · (V+1) + item; repeats and padding do no harm.
    NaN marks a row with a non-finite ranked score, or with finite ones whose sum overflows.
    """
    columns = gaps_BV1.shape[1]
    # What is taken out lies below the target: it adds nothing to #greater + #equal / 2.
    gaps_BV1[:, 0] = -1.0
    if seen_M is not None:
        gaps_BV1.view(-1).scatter_(0, seen_M, -1.0)
    gaps_BV1.scatter_(1, targets_B.unsqueeze(1), own_B1 - own_B1)
    doubt_B = gaps_BV1.sum(1) * 0  # 0 or NaN
    # #greater − #less, and #greater + #equal + #less = columns. Sums of so many ones are exact.
    exact = torch.float32 if columns <= 1 << 24 else torch.float64
    lead_B = gaps_BV1.sign_().sum(1, dtype=exact)
    return ((columns - 1 + lead_B) / 2).float() + doubt_B


def top_k(scores_BV1: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best items of each row: ids (B, K) int64 and scores (B, K) fp32.

    Order: score descending, then id ascending. -inf marks an item that must not be returned, the
    padding column never is. Raises ValueError for k outside 1..V, for NaN or +inf, and if fewer
    than k items are left.
    """
    items = scores_BV1.shape[1] - 1
    if not 1 <= k <= items:
        raise ValueError(f"top_k: k = {k} with {items} items; need 1..{items}")
    largest_B = scores_BV1[:, 1:].amax(1)
    if broken := int((largest_B.isnan() | largest_B.isposinf()).sum()):
        raise ValueError(f"top_k: {broken} rows hold NaN or +inf; need finite scores or -inf")
    ids_BK, best_BK = best(scores_BV1, k)
    if bool(best_BK[:, -1].isneginf().any()):
        raise ValueError(f"top_k: k = {k}, but a row has fewer items that are not -inf")
    return ids_BK, best_BK


def best(scores_BV1: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`top_k` with nothing read back from a device: the caller checks that scores are finite."""
    scores_BV = scores_BV1[:, 1:].float()
    find = best_columns_on_host if scores_BV.device.type == "cpu" else best_columns_by_keys
    column_BK = find(scores_BV, k)
    return column_BK + 1, scores_BV.gather(1, column_BK)


def best_columns_by_keys(scores_BV: Tensor, k: int) -> Tensor:
    """Columns of the k best, (B, K), score descending, then column ascending.

    `torch.topk` returns tied items in any order, so the search is for keys without ties: the upper
    half of an int64 is the score, as an integer of the same order; the lower half falls with the
    column.
    """
    bits_BV = (scores_BV + 0.0).view(torch.int32)  # adding makes -0.0 the equal of 0.0
    # IEEE 754: as integers, positive floats are in order and negative ones in reverse.
    order_BV = bits_BV.bitwise_xor_((bits_BV >> 31).bitwise_and_(0x7FFFFFFF))
    falling_V = torch.arange(scores_BV.shape[1], 0, -1, device=scores_BV.device)
    return order_BV.long().mul_(1 << 32).add_(falling_V).topk(k, dim=1).indices


def best_columns_on_host(scores_BV: Tensor, k: int) -> Tensor:
    """The same for scores in the host's memory, where numpy's vectorised partition finds the k-th
    score several times quicker: the items above it are taken, then its ties from the left.
    """
    scores = scores_BV.numpy()
    kth_B = np.partition(scores, scores.shape[1] - k, axis=1)[:, -k]
    # So written, NaN is no exception. A flat search is ten times quicker than one for pairs.
    rows, columns = np.divmod(np.flatnonzero(~(scores < kth_B[:, None])), scores.shape[1])
    above = scores[rows, columns] > kth_B[rows]
    wanted_B = k - np.bincount(rows[above], minlength=len(scores))
    first_B = np.searchsorted(rows, np.arange(len(scores)))
    ties = np.cumsum(~above)
    before_B = ties[first_B] - ~above[first_B]
    taken = above | (ties - before_B[rows] <= wanted_B[rows])
    # Row by row, columns ascending, which the stable sort keeps.
    column_BK = columns[taken].reshape(-1, k)
    order = (-np.take_along_axis(scores, column_BK, axis=1)).argsort(axis=1, kind="stable")
    return torch.from_numpy(np.take_along_axis(column_BK, order, axis=1))


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


def _hits_and_gains(ranks_N: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Hit (0 or 1) and ndcg gain of each user, fp64; one copy from the device."""
    ranks = ranks_N.double().cpu().numpy()
    if ranks.ndim != 1 or len(ranks) == 0 or not (ranks >= 0).all():
        raise ValueError("ranks: need a non-empty vector of numbers from 0, and NaN is none")
    hits_N = (ranks < k).astype(float)
    return hits_N, hits_N / np.log2(ranks + 2)


def _wilson(hits: float, users: int) -> list[float]:
    """Wilson score interval of a proportion: stays inside 0..1 and is honest at 0 hits."""
    share = hits / users
    shrink = 1 + Z_95**2 / users
    centre = (share + Z_95**2 / (2 * users)) / shrink
    half = Z_95 * math.sqrt(share * (1 - share) / users + Z_95**2 / (4 * users**2)) / shrink
    return [max(centre - half, 0.0), min(centre + half, 1.0)]


def _mean_interval(values_N: np.ndarray, lowest: float) -> list[float]:
    """Normal 95 % interval of the mean of values that lie in [lowest, 1].

    Values that are all alike have no spread, yet do not make the mean certain: users unlike them
    may be as frequent as Wilson's upper limit at 0 of N, with values anywhere in the range.
    """
    users, mean = len(values_N), float(values_N.mean())
    if (values_N == values_N[0]).all():
        unseen = _wilson(0.0, users)[1]
        return [mean - unseen * (mean - lowest), mean + unseen * (1 - mean)]
    half = Z_95 * float(values_N.std(ddof=1)) / math.sqrt(users)
    return [max(mean - half, lowest), min(mean + half, 1.0)]

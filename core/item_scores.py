"""Scores of all items for many states without ever holding more of them than a byte budget.

Shapes: B states, R states of one part, D width, V items (row 0 of the vectors = padding).

Above the budget the *states* are taken in parts, each against every item: rank, top-k, log-sum-exp
and loss of a state then need no merging and are those of the whole matrix, ties included. Parts of
the items would save nothing: the vectors are V·D numbers and must be there anyway, so a part of
at most D states is no larger than they are.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SCORE_BYTES = 2 << 30
"""Most that the scores of one part and what is made of them may take."""
BYTES_EACH = 24
"""Of one score: itself, and in a search for the best its sort key with copies."""


def states_at_once(items: int) -> int:
    """How many states may be scored together against so many items; at least one."""
    return max(1, SCORE_BYTES // (BYTES_EACH * items))


def score(states_BD: Tensor, vectors_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """Products with every vector, (B, V) in fp32 whatever autocast says.

    Low-precision scores tie: a bf16 product keeps about a third of 3,700 distinct values.
    """
    with torch.autocast(states_BD.device.type, enabled=False):
        scores_BV = states_BD.float() @ vectors_VD.float().t()
        return scores_BV if bias_V is None else scores_BV.add_(bias_V.float())


def in_parts(
    states_BD: Tensor, vectors_VD: Tensor, bias_V: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Scores (R, V), fp32, of consecutive states that fit the budget together, with their place."""
    most = states_at_once(len(vectors_VD))
    for start in range(0, len(states_BD), most):
        part = slice(start, min(start + most, len(states_BD)))
        yield part, score(states_BD[part], vectors_VD, bias_V)


def cross_entropy(
    states_BD: Tensor, vectors_VD: Tensor, bias_V: Tensor | None, labels_B: Tensor
) -> Tensor:
    """Mean cross-entropy of states against the rows of the vectors (scalar, fp32).

    Equals `F.cross_entropy(score(states, vectors, bias), labels)`, gradients too. Above the budget
    the scores of each part are forgotten after the forward and made again in the backward.
    """

    def of_part(states_RD: Tensor, vectors_VD: Tensor, bias_V: Tensor | None, labels_R: Tensor):
        scores_RV = score(states_RD, vectors_VD, bias_V)
        return F.cross_entropy(scores_RV, labels_R, reduction="sum")

    most = states_at_once(len(vectors_VD))
    if len(states_BD) <= most:
        return F.cross_entropy(score(states_BD, vectors_VD, bias_V), labels_B)
    parts = zip(states_BD.split(most), labels_B.split(most), strict=True)
    losses = [
        checkpoint(of_part, states, vectors_VD, bias_V, labels, use_reentrant=False)
        for states, labels in parts
    ]
    return torch.stack(losses).sum() / len(states_BD)

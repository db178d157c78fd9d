"""Scores of all items for many states without ever holding more of them than a byte budget.

Shapes: B states, R states of one part, C items of one part, D width, V items (row 0 of the vectors
= padding).

Above the budget `in_parts` takes the *states* in parts, each against every item: rank, top-k and
log-sum-exp of a state then need no merging and are those of the whole matrix, ties included. Parts
of the items would save nothing: the vectors are V·D numbers and must be there anyway, so a part of
at most D states is no larger than they are. The loss takes the *items* in parts: its gradient has
the size of the vectors, and parts of the states would make and add up one each.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

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
    the scores of each part of the items are made twice, for the loss and for its gradient.
    """
    most = max(1, SCORE_BYTES // (BYTES_EACH * len(states_BD)))
    if len(vectors_VD) <= most:
        return F.cross_entropy(score(states_BD, vectors_VD, bias_V), labels_B)
    return _CrossEntropy.apply(states_BD, vectors_VD, bias_V, labels_B, most)


class _CrossEntropy(torch.autograd.Function):
    """loss = mean of log Σ_v exp(s_v) − s_label; ∂loss/∂s_v = (softmax_v − [v = label]) / B."""

    @staticmethod
    def forward(ctx, states_BD, vectors_VD, bias_V, labels_B, most):
        total_B = states_BD.new_full((len(states_BD),), -torch.inf, dtype=torch.float32)
        for vectors_CD, bias_C, _ in _items_in_parts(vectors_VD, bias_V, most):
            part_B = score(states_BD, vectors_CD, bias_C).logsumexp(1)
            total_B = torch.logaddexp(total_B, part_B)
        own_B = (states_BD.float() * vectors_VD[labels_B].float()).sum(1)
        if bias_V is not None:
            own_B += bias_V[labels_B]
        ctx.save_for_backward(states_BD, vectors_VD, bias_V, labels_B, total_B)
        ctx.most = most
        return (total_B - own_B).mean()

    @staticmethod
    def backward(ctx, grad):
        states_BD, vectors_VD, bias_V, labels_B, total_B = ctx.saved_tensors
        share = grad / len(states_BD)
        states = states_BD.float()
        grad_states = -share * vectors_VD[labels_B].float()
        grad_vectors = torch.empty_like(vectors_VD)
        grad_bias = None if bias_V is None else torch.empty_like(bias_V)
        with torch.autocast(states.device.type, enabled=False):
            for vectors_CD, bias_C, part in _items_in_parts(vectors_VD, bias_V, ctx.most):
                weights_BC = score(states_BD, vectors_CD, bias_C)
                weights_BC.sub_(total_B[:, None]).exp_().mul_(share)
                grad_states += weights_BC @ vectors_CD.float()
                grad_vectors[part] = weights_BC.t() @ states
                if grad_bias is not None:
                    grad_bias[part] = weights_BC.sum(0)
        grad_vectors.index_add_(0, labels_B, (-share * states).to(grad_vectors.dtype))
        if grad_bias is not None:
            grad_bias.index_add_(0, labels_B, -share.to(grad_bias.dtype).expand(len(labels_B)))
        return grad_states.to(states_BD.dtype), grad_vectors, grad_bias, None, None


def _items_in_parts(
    vectors_VD: Tensor, bias_V: Tensor | None, most: int
) -> Iterator[tuple[Tensor, Tensor | None, slice]]:
    for start in range(0, len(vectors_VD), most):
        part = slice(start, start + most)
        yield vectors_VD[part], None if bias_V is None else bias_V[part], part

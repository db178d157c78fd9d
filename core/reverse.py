"""Reverse distillation: holds the teacher's item table near the student embeddings it began as.

Shapes: V items (ids 1..V, row 0 = padding), H table width. L = L_rank + λ(t) · D(E, E0).
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

LossKind = Literal["mse", "l1", "huber", "cosine", "contrastive"]
DecayKind = Literal["none", "linear", "cosine", "exponential"]

HUBER_DELTA = 1.0
TEMPERATURE = 0.1
LAMBDA_FLOOR = 1e-6
SMALLEST_NORM = 1e-8


def reverse_loss(kind: LossKind, table_V1H: Tensor, start_V1H: Tensor) -> Tensor:
    """D(E, E0) over items 1..V, scalar fp32; the gradient reaches the table, never its start.

        mse          mean (E − E0)²
        l1           mean |E − E0|
        huber        quadratic up to δ = 1, linear beyond, mean
        cosine       1 − mean_i cos(E_i, E0_i)
        contrastive  InfoNCE: of all starts E0_j, E_i must be nearest to its own; temperature 0.1

    The first four are 0 at the start; InfoNCE stays above 0 as long as there are other items.
    A zero row has no direction: cosine and contrastive leave it out of the mean, since its
    gradient would be unbounded. Contrastive holds (V, V) fp32 logits, their softmax and gradient:
    about 12 V² bytes, 140 MB for 3,416 items, 4.8 GB for 20,000.
    Raises ValueError for unequal shapes or an unknown kind.
    """
    if table_V1H.shape != start_V1H.shape:
        shapes = f"table {tuple(table_V1H.shape)}, start {tuple(start_V1H.shape)}"
        raise ValueError(f"reverse_loss: {shapes}; need one shape")
    table_VH, start_VH = table_V1H[1:].float(), start_V1H.detach()[1:].float()
    if kind == "mse":
        return functional.mse_loss(table_VH, start_VH)
    if kind == "l1":
        return functional.l1_loss(table_VH, start_VH)
    if kind == "huber":
        return functional.huber_loss(table_VH, start_VH, delta=HUBER_DELTA)
    table_VH, table_directed_V = _directions(table_VH)
    start_VH, start_directed_V = _directions(start_VH)
    if kind == "cosine":
        loss_V = 1 - (table_VH * start_VH).sum(1)
    elif kind == "contrastive":
        # Autocast would round the cosines to bf16, an error that 1 / temperature makes ten times.
        with torch.autocast(table_VH.device.type, enabled=False):
            logits_VV = table_VH @ start_VH.T / TEMPERATURE
        own_V = torch.arange(len(logits_VV), device=logits_VV.device)
        loss_V = functional.cross_entropy(logits_VV, own_V, reduction="none")
    else:
        raise ValueError(f"reverse_loss: {kind!r}; one of mse, l1, huber, cosine, contrastive")
    directed_V = (table_directed_V & start_directed_V).float()
    return (loss_V * directed_V).sum() / directed_V.sum().clamp_min(1)


def _directions(rows_VH: Tensor) -> tuple[Tensor, Tensor]:
    """Rows at length 1, and which rows had a length; the others become 0, with gradient 0."""
    directed_V = rows_VH.detach().norm(dim=1) > SMALLEST_NORM
    # Replaced before the division: where() would not keep the NaN gradient of 0 / 0 away.
    safe_VH = torch.where(directed_V[:, None], rows_VH, 1.0)
    unit_VH = safe_VH / safe_VH.norm(dim=1, keepdim=True)
    return torch.where(directed_V[:, None], unit_VH, 0.0), directed_V


def decayed_lambda(
    kind: DecayKind, base: float, minimum: float, step: int, decay_steps: int
) -> float:
    """Weight λ of reverse distillation after `step` optimizer steps; p = min(step/decay_steps, 1).

        none         base
        linear       base − (base − minimum) p
        cosine       minimum + (base − minimum) (1 + cos πp) / 2
        exponential  base (minimum / base)^p, minimum at least 1e-6: it never reaches 0

    From `decay_steps` on λ is held. Raises ValueError for decay_steps < 1 or an unknown kind.
    """
    if decay_steps < 1:
        raise ValueError(f"decayed_lambda: decay_steps {decay_steps}; need at least 1")
    progress = min(step / decay_steps, 1.0)
    if kind == "none":
        return base
    if kind == "linear":
        return base - (base - minimum) * progress
    if kind == "cosine":
        return minimum + (base - minimum) * (1 + math.cos(math.pi * progress)) / 2
    if kind == "exponential":
        if base <= LAMBDA_FLOOR:  # the floor would make it grow
            return base
        return base * (max(minimum, LAMBDA_FLOOR) / base) ** progress
    raise ValueError(f"decayed_lambda: {kind!r}; one of none, linear, cosine, exponential")

"""DLLM2Rec: what the student learns from the teacher's stored outputs, as functions on tensors.

Equation numbers are those of the DLLM2Rec paper (RecSys 2024). Mode `paper` follows them;
`reference` the released code: one confidence for each candidate, position weights with β = 1, one
negative of a row for all candidates. Sums over rows are means, so lr is free of the batch size.

Shapes: B rows (one prefix of one user each), V items (ids 1..V, score column 0 = padding),
K teacher candidates, N negatives, D student width, H teacher width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.settings import DistillSettings

TINY = 1e-8


@dataclass(frozen=True)
class TeacherBatch:
    """The teacher's word on B rows, looked up by sample id, with their targets and negatives."""

    teacher_ids_BK: Tensor
    """int64, best first, distinct within a row; at least `candidate_topk` columns."""
    target_log_prob_B: Tensor
    """Teacher's log-probability of the true item, ≤ 0; a negative distance serves as well."""
    targets_B: Tensor
    negatives_BN: Tensor
    candidate_distance_BK: Tensor | None = None
    """`reference`: how far each candidate is from the teacher's answer, for instance −log p."""
    propensity_V1: Tensor | None = None
    """From `propensity`; needed when alpha > 0."""


def distillation_loss(
    scores_BV1: Tensor, batch: TeacherBatch, settings: DistillSettings, own: Tensor | None = None
) -> Tensor:
    """L = L_r + α DRO + λ_d L_d (11), scalar; the student's `own` loss may replace the BCE L_r."""
    loss = base_loss(scores_BV1, batch, settings) if own is None else own
    if settings.alpha:
        robust_B1 = robust_loss(scores_BV1, batch.targets_B.unsqueeze(1), batch, settings)
        loss = loss + settings.alpha * _row_mean(robust_B1).sum()
    return loss + ranking_distillation(scores_BV1, batch, settings)


def base_loss(scores_BV1: Tensor, batch: TeacherBatch, settings: DistillSettings) -> Tensor:
    """L_r = −log σ(y_target) − Σ_j log σ(−y_j), j negatives (3); the reference takes the mean."""
    scores_BV1 = _at_least_fp32(scores_BV1)
    positive_B1 = functional.logsigmoid(scores_BV1.gather(1, batch.targets_B.unsqueeze(1)))
    negative_BN = functional.logsigmoid(-scores_BV1.gather(1, batch.negatives_BN))
    loss_B = -positive_B1[:, 0] - negative_BN.sum(1)
    return _row_mean(loss_B) / (1 + negative_BN.shape[1] if settings.mode == "reference" else 1)


def ranking_distillation(
    scores_BV1: Tensor, batch: TeacherBatch, settings: DistillSettings
) -> Tensor:
    """λ_d L_d, the scalar to add to the student's own loss; `scores_BV1` are its logits.

        paper      L_d = −Σ_m w_m log σ(y_m), m over the teacher's top K (5)
        reference  L_d = Σ_m w_m [−log σ(y_m) − log σ(−y_neg)] + α DRO with m as target

    `bug_compat` repeats two faults of the release: log σ(1 − y_neg), and weights (B, 1) times
    losses (B,), whose (B, B) mean is the product of both means: no row keeps its own weight.
    Raises ValueError if shapes do not fit or the mode lacks an input.
    """
    scores_BV1 = _at_least_fp32(scores_BV1)
    candidates_BK = _candidates(batch, settings)
    weights_BK = candidate_weights(scores_BV1, batch, settings)
    loss_BK = -functional.logsigmoid(scores_BV1.gather(1, candidates_BK))
    if settings.mode == "paper":
        return settings.lam * _row_mean(weights_BK * loss_BK).sum()
    negative_B1 = scores_BV1.gather(1, batch.negatives_BN[:, :1])
    loss_BK = loss_BK - functional.logsigmoid((1 if settings.bug_compat else 0) - negative_B1)
    if settings.bug_compat:
        weights_BK = _row_mean(weights_BK).expand_as(weights_BK)
    loss_K = _row_mean(weights_BK * loss_BK)
    if settings.alpha:
        robust_K = _row_mean(robust_loss(scores_BV1, candidates_BK, batch, settings))
        loss_K = loss_K + settings.alpha * robust_K
    return settings.lam * loss_K.sum()


@torch.no_grad()
def candidate_weights(scores_BV1: Tensor, batch: TeacherBatch, settings: DistillSettings) -> Tensor:
    """w = γp w^p + γc w^c + γo w^o (10), (B, K); constants, no gradient passes.

        w^p  exp(−rank / β), normalised to sum 1 (6)
        w^c  exp(−distance of the true item from the teacher's answer), one for a sequence (7)
        w^o  1 where the candidate is in the student's present top K too, ties included (8)

    The distance of a classifier is −log p, so w^c is its probability of the true item: large where
    the teacher was right. `paper` leaves w as it is, so that a sequence on which the teacher was
    wrong weighs less; `reference` has a w^c for each candidate and normalises rows to sum 1.
    """
    candidates_BK = _candidates(batch, settings)
    count, paper = settings.candidate_topk, settings.mode == "paper"
    places_K = torch.arange(count, device=scores_BV1.device)
    position_K = torch.softmax(-places_K / (settings.beta_position if paper else 1.0), dim=0)
    last_place_B1 = scores_BV1[:, 1:].topk(count, dim=1).values[:, -1:]
    overlap_BK = (scores_BV1.gather(1, candidates_BK) >= last_place_B1).float()
    weights_BK = settings.gamma_position * position_K + settings.gamma_consistency * overlap_BK
    if paper:
        return weights_BK + settings.gamma_confidence * batch.target_log_prob_B.exp().unsqueeze(1)
    distance_BK = batch.candidate_distance_BK
    if distance_BK is None or distance_BK.shape != batch.teacher_ids_BK.shape:
        raise ValueError("distill.mode reference: candidate_distance_BK: need −log p of each id")
    weights_BK += settings.gamma_confidence * _candidate_confidence(distance_BK[:, :count])
    weights_BK += settings.gamma_consistency * TINY
    return weights_BK / weights_BK.sum(1, keepdim=True).clamp_min(TINY**2)


def _candidate_confidence(distance_BK: Tensor) -> Tensor:
    """exp(−distance) + 1e-8, normalised to sum 1 for each row.

    Raw distances between LLM states (60..66) would vanish beside the 1e-8 and leave all candidates
    alike, so they are counted from the row's nearest one, in units of the row's mean gap.
    """
    gap_BK = distance_BK.float() - distance_BK.float().amin(1, keepdim=True)
    gap_BK = gap_BK / gap_BK.mean(1, keepdim=True).clamp_min(TINY)
    return functional.normalize(torch.exp(-gap_BK) + TINY, p=1, dim=1)


def robust_loss(
    scores_BV1: Tensor, items_BK: Tensor, batch: TeacherBatch, settings: DistillSettings
) -> Tensor:
    """DRO with each of K distinct items of a row as target i, (B, K):

        log( Σ_{j≠i} exp(ps_j y_j² / β) + exp(ps_i (y_i − 1)² / β) )

    The plain form overflows at |y| = 11 in fp32. Here the K items leave the sum over V once and
    the K − 1 others return for each target: exact, finite, and no (B, K, V) tensor.
    """
    if batch.propensity_V1 is None:
        raise ValueError("distill.alpha > 0: no propensity_V1; give core.distill.propensity(...)")
    scores_BV1 = _at_least_fp32(scores_BV1)
    scale_V1 = batch.propensity_V1.to(scores_BV1) / settings.dro_beta
    exponents_BV1 = scale_V1 * scores_BV1.square()
    left_out_BV1 = torch.zeros_like(exponents_BV1, dtype=torch.bool).scatter_(1, items_BK, True)
    left_out_BV1[:, 0] = True
    rest_B11 = exponents_BV1.masked_fill(left_out_BV1, -torch.inf).logsumexp(1)[:, None, None]
    as_other_B1K = exponents_BV1.gather(1, items_BK).unsqueeze(1)
    as_target_B1K = (scale_V1[items_BK] * (scores_BV1.gather(1, items_BK) - 1).square())[:, None]
    itself_KK = torch.eye(items_BK.shape[1], dtype=torch.bool, device=items_BK.device)
    terms_BKK = torch.where(itself_KK, as_target_B1K, as_other_B1K)
    return torch.cat([terms_BKK, rest_B11.expand(-1, len(itself_KK), 1)], dim=2).logsumexp(2)


def propensity(targets: Tensor, items: int, power: float) -> Tensor:
    """ps_i = ((freq_i + 1) / Σ_j (freq_j + 1))^power, (V+1,) fp32, 0 for padding.

    `targets`: the next item of each training row in use, flat integers 1..V, else ValueError.
    """
    flat = targets.ndim == 1 and not targets.is_floating_point()
    if not flat or bool(((targets < 1) | (targets > items)).any()):
        raise ValueError(f"propensity: {targets.dtype} {targets.shape}; need flat ids 1..{items}")
    count_V = torch.bincount(targets, minlength=items + 1)[1:].double() + 1
    return functional.pad((count_V / count_V.sum()) ** power, (1, 0)).float()


class ItemEmbedding(nn.Module):
    """Input vectors of the student with the teacher's in them, (12, 13) with linear f and g.

    e_i = b_i + ed_weight · (W z_i + c); z (V+1, H) from the teacher is frozen, b is free.
    """

    def __init__(self, teacher_V1H: Tensor, width: int, ed_weight: float) -> None:
        super().__init__()
        self.ed_weight = ed_weight
        self.projector = nn.Linear(teacher_V1H.shape[1], width)
        self.register_buffer("teacher_V1H", teacher_V1H.detach().float())

    def forward(self, table_V1D: Tensor) -> Tensor:
        """The table b (V+1, D) -> the table e (V+1, D), padding row 0 whatever the bias c."""
        item_VD = table_V1D[1:] + self.ed_weight * self.projector(self.teacher_V1H[1:])
        return functional.pad(item_VD, (0, 0, 1, 0))


def _candidates(batch: TeacherBatch, settings: DistillSettings) -> Tensor:
    """The teacher's first K ids; refuses vectors of a shape that would broadcast to (B, B)."""
    (rows, stored), wanted = batch.teacher_ids_BK.shape, settings.candidate_topk
    if stored < wanted:
        raise ValueError(f"distill.candidate_topk {wanted}: only {stored} stored; store as many")
    if (given := tuple(batch.target_log_prob_B.shape)) != (rows,):
        raise ValueError(f"distill: target_log_prob_B of shape {given}; need ({rows},)")
    return batch.teacher_ids_BK[:, :wanted]


def _row_mean(values: Tensor) -> Tensor:
    """Mean over rows, 0 instead of NaN for a batch in which no row has a teacher."""
    return values.sum(0) / max(len(values), 1)


def _at_least_fp32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))

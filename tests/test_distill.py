"""DLLM2Rec on cases worked out by hand, and the faults of the release that must stay out."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.distill import (
    ItemEmbedding,
    TeacherBatch,
    base_loss,
    candidate_weights,
    distillation_loss,
    propensity,
    ranking_distillation,
    robust_loss,
)
from core.settings import DistillSettings


def make_settings(**given) -> DistillSettings:
    plain = {"lam": 1.0, "candidate_topk": 2, "gamma_position": 0.0, "gamma_confidence": 0.0}
    return DistillSettings(**(plain | {"gamma_consistency": 0.0} | given))


def make_batch(
    rows: int, items: int, count: int, seed: int = 0
) -> tuple[torch.Tensor, TeacherBatch]:
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, items + 1, generator=random)
    teacher_ids = torch.rand(rows, items, generator=random).argsort(1)[:, :count] + 1
    return scores, TeacherBatch(
        teacher_ids_BK=teacher_ids,
        target_log_prob_B=-3 * torch.rand(rows, generator=random),
        targets_B=torch.randint(1, items + 1, (rows,), generator=random),
        negatives_BN=torch.randint(1, items + 1, (rows, 3), generator=random),
        candidate_distance_BK=5 * torch.rand(rows, count, generator=random),
        propensity_V1=torch.cat([torch.zeros(1), torch.rand(items, generator=random)]),
    )


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


# One row over items 1..4; the teacher ranks 3 before 1, the student 4 before 3.
SCORES = torch.tensor([[99.0, 0.5, -1.0, 1.0, 2.0]])
BATCH = TeacherBatch(
    teacher_ids_BK=torch.tensor([[3, 1]]),
    target_log_prob_B=torch.tensor([math.log(0.25)]),
    targets_B=torch.tensor([4]),
    negatives_BN=torch.tensor([[2, 1]]),
    candidate_distance_BK=torch.tensor([[1.0, 2.0]]),
)


def test_each_weight_of_the_paper_by_hand():
    position = candidate_weights(
        SCORES, BATCH, make_settings(gamma_position=1.0, beta_position=2.0)
    )
    first = 1 / (1 + math.exp(-0.5))
    assert position.tolist()[0] == pytest.approx([first, 1 - first])
    confidence = candidate_weights(SCORES, BATCH, make_settings(gamma_confidence=1.0))
    assert confidence.tolist()[0] == pytest.approx([0.25, 0.25])
    overlap = candidate_weights(SCORES, BATCH, make_settings(gamma_consistency=1.0))
    assert overlap.tolist() == [[1.0, 0.0]]
    every = make_settings(
        gamma_position=0.3, gamma_confidence=0.5, gamma_consistency=0.1, beta_position=2.0
    )
    wanted = 0.3 * position + 0.5 * confidence + 0.1 * overlap
    torch.testing.assert_close(candidate_weights(SCORES, BATCH, every), wanted)


def test_paper_loss_by_hand():
    settings = make_settings(gamma_confidence=1.0, lam=0.5)
    wanted = -0.5 * 0.25 * (log_sigmoid(1.0) + log_sigmoid(0.5))
    assert ranking_distillation(SCORES, BATCH, settings).item() == pytest.approx(wanted)


def test_reference_weights_and_loss_by_hand():
    settings = make_settings(
        mode="reference", gamma_position=0.3, gamma_confidence=0.5, gamma_consistency=0.1, lam=0.5
    )
    # Distances 1 and 2: counted from the nearest in mean gaps they are 0 and 2; beta is 1.
    first, near = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    raw = [0.3 * first + 0.5 * near + 0.1, 0.3 * (1 - first) + 0.5 * (1 - near)]
    weights = [w / sum(raw) for w in raw]
    assert candidate_weights(SCORES, BATCH, settings)[0].tolist() == pytest.approx(weights)
    push = log_sigmoid(1.0)  # only the first negative, item 2 at -1, serves all candidates
    pairs = [-log_sigmoid(1.0) - push, -log_sigmoid(0.5) - push]
    wanted = 0.5 * sum(w * pair for w, pair in zip(weights, pairs, strict=True))
    assert ranking_distillation(SCORES, BATCH, settings).item() == pytest.approx(wanted)


def test_base_loss_by_hand_sum_in_paper_mean_in_reference():
    total = -log_sigmoid(2.0) - log_sigmoid(1.0) - log_sigmoid(-0.5)
    assert base_loss(SCORES, BATCH, make_settings()).item() == pytest.approx(total)
    reference = base_loss(SCORES, BATCH, make_settings(mode="reference"))
    assert reference.item() == pytest.approx(total / 3)


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_total_is_base_plus_dro_plus_ranking(mode):
    scores, batch = make_batch(6, 9, 4)
    settings = make_settings(mode=mode, gamma_position=0.3, gamma_confidence=0.5, alpha=0.7)
    robust = robust_loss(scores, batch.targets_B[:, None], batch, settings).mean()
    ranking = ranking_distillation(scores, batch, settings)
    wanted = base_loss(scores, batch, settings) + 0.7 * robust + ranking
    torch.testing.assert_close(distillation_loss(scores, batch, settings), wanted)
    own = torch.tensor(5.0)
    wanted = own + 0.7 * robust + ranking
    torch.testing.assert_close(distillation_loss(scores, batch, settings, own), wanted)


@pytest.mark.parametrize("count", [1, 3, 12])
def test_rows_sum_to_one_where_they_should(count):
    scores, batch = make_batch(7, 12, count)
    position = make_settings(candidate_topk=count, gamma_position=1.0, beta_position=0.5)
    torch.testing.assert_close(candidate_weights(scores, batch, position).sum(1), torch.ones(7))
    reference = DistillSettings(mode="reference", candidate_topk=count)
    weights = candidate_weights(scores, batch, reference)
    assert weights.shape == (7, count)
    torch.testing.assert_close(weights.sum(1), torch.ones(7))


def test_overlap_of_all_and_of_none():
    settings = make_settings(gamma_consistency=1.0)
    all_of_them = torch.tensor([[0.0, 5.0, -1.0, 6.0, 2.0]])
    assert candidate_weights(all_of_them, BATCH, settings).tolist() == [[1.0, 1.0]]
    none_of_them = torch.tensor([[50.0, 0.0, 6.0, 1.0, 5.0]])  # the padding column never counts
    assert candidate_weights(none_of_them, BATCH, settings).tolist() == [[0.0, 0.0]]
    reference = settings.model_copy(update={"mode": "reference"})
    for scores in (all_of_them, none_of_them):
        assert candidate_weights(scores, BATCH, reference)[0].tolist() == pytest.approx([0.5, 0.5])


def test_overlap_counts_among_as_many_places_as_candidates():
    scores, batch = make_batch(1, 5, 5)
    one = make_settings(candidate_topk=1, gamma_consistency=1.0)
    batch = replace(batch, teacher_ids_BK=scores[:, 1:].argsort(1, descending=True) + 1)
    assert candidate_weights(scores, batch, one).tolist() == [[1.0]]
    second = replace(batch, teacher_ids_BK=batch.teacher_ids_BK.roll(-1, 1))
    assert candidate_weights(scores, second, one).tolist() == [[0.0]]


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_weights_are_constants_for_the_gradient(mode):
    scores, batch = make_batch(4, 8, 3)
    settings = DistillSettings(mode=mode, candidate_topk=3)
    scores.requires_grad_()
    batch.target_log_prob_B.requires_grad_()
    batch.candidate_distance_BK.requires_grad_()
    assert not candidate_weights(scores, batch, settings).requires_grad
    ranking_distillation(scores, batch, settings).backward()
    touched = torch.zeros(4, 9, dtype=torch.bool).scatter_(1, batch.teacher_ids_BK, True)
    if mode == "reference":
        touched.scatter_(1, batch.negatives_BN[:, :1], True)
    assert torch.equal(scores.grad != 0, touched)


def test_paper_confidence_grows_with_the_teachers_trust_per_sequence():
    scores, batch = make_batch(3, 8, 2)
    batch = replace(batch, target_log_prob_B=torch.tensor([0.01, 0.2, 0.9]).log())
    weights = candidate_weights(scores, batch, make_settings(gamma_confidence=1.0))
    torch.testing.assert_close(weights, torch.tensor([[0.01] * 2, [0.2] * 2, [0.9] * 2]))


def test_reference_confidence_falls_with_the_distance_of_the_candidate():
    scores, batch = make_batch(1, 8, 4)
    batch = replace(batch, candidate_distance_BK=torch.tensor([[3.0, 1.0, 2.0, 9.0]]))
    settings = make_settings(mode="reference", candidate_topk=4, gamma_confidence=1.0)
    weights = candidate_weights(scores, batch, settings)[0]
    assert weights.argsort(descending=True).tolist() == [1, 2, 0, 3]


def test_reference_with_raw_distances_does_not_collapse_to_uniform():
    scores, batch = make_batch(1, 20, 10)
    batch = replace(batch, candidate_distance_BK=torch.linspace(60, 66, 10)[None])
    settings = make_settings(mode="reference", candidate_topk=10, gamma_confidence=1.0)
    weights = candidate_weights(scores, batch, settings)[0]
    assert weights[0] > 0.15 and weights[-1] < 0.05 and (weights.diff() < 0).all()
    # Neither their offset nor their unit matters.
    moved = replace(batch, candidate_distance_BK=torch.linspace(0, 1, 10)[None])
    torch.testing.assert_close(candidate_weights(scores, moved, settings)[0], weights)
    equal = replace(batch, candidate_distance_BK=torch.full((1, 10), 63.0))
    assert candidate_weights(scores, equal, settings)[0].tolist() == pytest.approx([0.1] * 10)


def test_reference_without_any_weight_is_zero_and_not_nan():
    scores, batch = make_batch(3, 8, 2)
    assert ranking_distillation(scores, batch, make_settings(mode="reference")).item() == 0


def test_reference_ignores_the_beta_of_the_paper():
    scores, batch = make_batch(3, 8, 2)
    weights = [
        candidate_weights(
            scores, batch, make_settings(mode="reference", gamma_position=1.0, beta_position=beta)
        )
        for beta in (1.0, 7.0)
    ]
    assert torch.equal(*weights)


def test_bug_compat_is_the_mean_of_the_b_by_b_product_and_the_wrong_tail():
    scores, batch = make_batch(5, 9, 3)
    settings = DistillSettings(mode="reference", candidate_topk=3, lam=0.7, bug_compat=True)
    weights = candidate_weights(scores, batch, settings)
    wanted = torch.zeros(())
    for m in range(3):
        positive = scores.gather(1, batch.teacher_ids_BK[:, m : m + 1])[:, 0]
        negative = scores.gather(1, batch.negatives_BN[:, :1])[:, 0]
        loss = -positive.sigmoid().log() - (1 - negative).sigmoid().log()
        wanted = wanted + 0.7 * (weights[:, m : m + 1] * loss).mean()  # (B, 1) * (B,) -> (B, B)
    torch.testing.assert_close(ranking_distillation(scores, batch, settings), wanted)
    right = settings.model_copy(update={"bug_compat": False})
    assert not torch.isclose(ranking_distillation(scores, batch, right), wanted, rtol=1e-3)


def test_without_bug_compat_every_row_keeps_its_own_weight():
    scores, batch = make_batch(5, 9, 3)
    settings = DistillSettings(mode="reference", candidate_topk=3)
    parts = [
        TeacherBatch(
            batch.teacher_ids_BK[i : i + 1],
            batch.target_log_prob_B[i : i + 1],
            batch.targets_B[i : i + 1],
            batch.negatives_BN[i : i + 1],
            batch.candidate_distance_BK[i : i + 1],
        )
        for i in range(5)
    ]
    alone = [ranking_distillation(scores[i : i + 1], parts[i], settings) for i in range(5)]
    torch.testing.assert_close(
        ranking_distillation(scores, batch, settings), torch.stack(alone).mean()
    )


class SquareTensors(TorchDispatchMode):
    """Notes every result that holds the number of rows twice."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows, self.found = rows, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and list(tensor.shape).count(self.rows) > 1:
                self.found.append(str(func))
        return result


@pytest.mark.parametrize("mode", ["paper", "reference"])
@pytest.mark.parametrize("bug_compat", [False, True])
def test_no_tensor_is_rows_by_rows(mode, bug_compat):
    scores, batch = make_batch(37, 12, 3)
    settings = DistillSettings(mode=mode, candidate_topk=3, alpha=0.5, bug_compat=bug_compat)
    with SquareTensors(37) as squares:
        distillation_loss(scores.requires_grad_(), batch, settings).backward()
        assert not squares.found
        scores @ scores.T
    assert squares.found == ["aten.mm.default"], "the watch itself must see a square"


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_scores_of_fifty_are_finite_with_gradients(mode, dtype, sign):
    scores, batch = make_batch(6, 12, 3)
    scores = (50.0 * sign * torch.where(scores > 0, 1.0, -1.0)).to(dtype).requires_grad_()
    settings = DistillSettings(mode=mode, candidate_topk=3, alpha=1.0)
    loss = distillation_loss(scores, batch, settings)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert scores.grad.isfinite().all() and scores.grad.abs().sum() > 0


@pytest.mark.parametrize("count", [1, 4, 9])  # 9 = all items: nothing is left in the sum
def test_robust_loss_equals_the_plain_formula_in_fp64(count):
    scores, batch = make_batch(5, 9, count)
    scores = scores.double().requires_grad_()
    batch = replace(batch, propensity_V1=batch.propensity_V1.double())
    beta = 0.8
    got = robust_loss(scores, batch.teacher_ids_BK, batch, make_settings(alpha=1.0, dro_beta=beta))
    ps, y = batch.propensity_V1[1:], scores[:, 1:]
    ps_i, y_i = batch.propensity_V1[batch.teacher_ids_BK], scores.gather(1, batch.teacher_ids_BK)
    wanted = torch.log(
        (ps * y**2 / beta).exp().sum(1, keepdim=True)
        - (ps_i * y_i**2 / beta).exp()
        + (ps_i * (y_i - 1) ** 2 / beta).exp()
    )
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(got.sum(), scores)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), scores)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-10, atol=1e-12)
    assert (gradient[:, 0] == 0).all()


def test_robust_loss_at_fifty_by_hand():
    scores = torch.tensor([[0.0, 50.0, -50.0, 3.0]])
    batch = replace(BATCH, propensity_V1=torch.tensor([0.0, 1.0, 0.5, 1.0]))
    got = robust_loss(
        scores,
        torch.tensor(
            [
                [1],
            ]
        ),
        batch,
        make_settings(alpha=1.0),
    )
    assert got.item() == pytest.approx(49**2)  # the rest, 0.5 * 2500 and 9, vanishes beside it
    assert robust_loss(scores, torch.tensor([[2]]), batch, make_settings()).item() == 2500


def test_reference_adds_a_robust_term_for_every_candidate():
    scores, batch = make_batch(4, 9, 3)
    with_it = DistillSettings(mode="reference", candidate_topk=3, alpha=0.6, lam=0.5)
    without = with_it.model_copy(update={"alpha": 0.0})
    robust = robust_loss(scores, batch.teacher_ids_BK, batch, with_it)
    wanted = ranking_distillation(scores, batch, without) + 0.5 * 0.6 * robust.mean(0).sum()
    torch.testing.assert_close(ranking_distillation(scores, batch, with_it), wanted)


def test_propensity_by_hand():
    got = propensity(torch.tensor([3, 3, 3, 1]), 4, 0.05)
    wanted = [0.0, *((count / 8) ** 0.05 for count in (2, 1, 4, 1))]
    assert got.tolist() == pytest.approx(wanted) and got.dtype == torch.float32
    assert propensity(torch.tensor([], dtype=torch.long), 2, 1.0).tolist() == [0, 0.5, 0.5]


@pytest.mark.parametrize(
    "bad", [torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([0]), torch.tensor([5])]
)
def test_propensity_refuses_anything_but_flat_item_ids(bad):
    with pytest.raises(ValueError, match=r"propensity: .*need flat ids 1\.\.4"):
        propensity(bad, 4, 0.05)


@pytest.mark.parametrize("mode", ["paper", "reference"])
@pytest.mark.parametrize("bug_compat", [False, True])
def test_a_batch_without_teacher_rows_costs_nothing(mode, bug_compat):
    scores, batch = make_batch(0, 9, 3)
    settings = DistillSettings(mode=mode, candidate_topk=3, alpha=1.0, bug_compat=bug_compat)
    assert ranking_distillation(scores, batch, settings).item() == 0


def test_more_stored_candidates_than_asked_are_cut():
    scores, batch = make_batch(4, 9, 5)
    settings = DistillSettings(mode="reference", candidate_topk=2)
    cut = replace(
        batch,
        teacher_ids_BK=batch.teacher_ids_BK[:, :2],
        candidate_distance_BK=batch.candidate_distance_BK[:, :2],
    )
    assert torch.equal(
        ranking_distillation(scores, batch, settings), ranking_distillation(scores, cut, settings)
    )


def test_missing_or_misshapen_inputs_are_refused():
    scores, batch = make_batch(4, 9, 3)
    settings = DistillSettings(mode="reference", candidate_topk=3)
    with pytest.raises(ValueError, match="candidate_topk 10: only 3 stored"):
        ranking_distillation(scores, batch, DistillSettings())
    column = replace(batch, target_log_prob_B=batch.target_log_prob_B[:, None])
    with pytest.raises(ValueError, match=r"shape \(4, 1\); need \(4,\)"):
        ranking_distillation(scores, column, settings)
    for distance in (None, batch.candidate_distance_BK[:, :1]):
        with pytest.raises(ValueError, match="candidate_distance_BK"):
            ranking_distillation(scores, replace(batch, candidate_distance_BK=distance), settings)
    with pytest.raises(ValueError, match="propensity_V1"):
        distillation_loss(
            scores, replace(batch, propensity_V1=None), DistillSettings(candidate_topk=3, alpha=1)
        )


def test_item_embedding_by_hand():
    teacher = torch.tensor([[9.0, 9.0, 9.0], [1.0, 2.0, 3.0], [0.0, -1.0, 0.0]])
    module = ItemEmbedding(teacher, width=2, ed_weight=0.5)
    with torch.no_grad():
        module.projector.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))
        module.projector.bias.copy_(torch.tensor([10.0, 20.0]))
    table = torch.tensor([[7.0, 7.0], [0.1, 0.2], [0.3, 0.4]])
    wanted = [[0, 0], [0.1 + 0.5 * 11, 0.2 + 0.5 * 25], [0.3 + 0.5 * 10, 0.4 + 0.5 * 19]]
    torch.testing.assert_close(module(table), torch.tensor(wanted))


def test_item_embedding_trains_projector_and_offsets_but_not_the_teacher():
    teacher = torch.randn(5, 3).requires_grad_()
    module, table = (
        ItemEmbedding(teacher, width=2, ed_weight=0.5),
        torch.randn(5, 2).requires_grad_(),
    )
    module(table).square().sum().backward()
    assert teacher.grad is None and [*dict(module.named_parameters())] == [
        "projector.weight",
        "projector.bias",
    ]
    assert module.projector.weight.grad.abs().sum() > 0
    assert (table.grad[0] == 0).all() and (table.grad[1:] != 0).all()
    off = ItemEmbedding(teacher, width=2, ed_weight=0.0)
    assert torch.equal(off(table)[1:], table[1:])

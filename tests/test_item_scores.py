"""Scores in parts below a byte budget: equal ranks, lists, losses, gradients; no large tensor."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import close, encoder, prepared
from torch.utils._python_dispatch import TorchDispatchMode

from core import item_scores, metrics, ranking, student
from core.settings import EvalSettings, StudentSettings


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returns."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.found = max(self.found, tensor.numel())
        return result


@pytest.fixture
def budget(monkeypatch):
    """Let so many states with so many items fit."""

    def fit(states: int, items: int) -> None:
        monkeypatch.setattr(item_scores, "SCORE_BYTES", states * items * item_scores.BYTES_EACH)

    return fit


def model_of(states: int, items: int, width: int = 4, seed: int = 0):
    """States, vectors and biases whose products are exact in fp32, with many ties."""
    random = torch.Generator().manual_seed(seed)
    shapes = (states, width), (items + 1, width), (items + 1,)
    return [torch.randint(-3, 4, shape, generator=random) / 2 for shape in shapes]


@given(st.integers(1, 20), st.integers(1, 60), st.integers(1, 25), st.integers(0, 10**6), st.data())
def test_parts_rank_and_list_as_the_whole_does(states, items, fitting, seed, data):
    given_states, vectors, bias = model_of(states, items, seed=seed)
    whole = given_states @ vectors.t() + bias
    targets = torch.randint(1, items + 1, (states,), generator=torch.Generator().manual_seed(seed))
    seen = torch.randint(0, items + 1, (states, 3), generator=torch.Generator().manual_seed(seed))
    k = data.draw(st.integers(1, items))
    with pytest.MonkeyPatch.context() as patch:
        fit = fitting * (items + 1) * item_scores.BYTES_EACH
        patch.setattr(item_scores, "SCORE_BYTES", fit)
        parts = list(item_scores.in_parts(given_states, vectors, bias))
    assert max(len(scores) for _, scores in parts) <= fitting
    assert torch.equal(torch.cat([scores for _, scores in parts]), whole)
    ranks = [metrics.rank(scores, targets[part], seen[part]) for part, scores in parts]
    assert torch.equal(torch.cat(ranks), metrics.rank(whole, targets, seen))
    lists = [metrics.top_k(scores, k) for _, scores in parts]
    for own, wanted in zip(zip(*lists, strict=True), metrics.top_k(whole, k), strict=True):
        assert torch.equal(torch.cat(own), wanted)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("fitting", [1, 4, 7, 100])
def test_cross_entropy_in_parts_has_the_loss_and_gradients_of_torch(budget, biased, fitting):
    torch.manual_seed(0)
    states, items, width = 23, 90, 8
    given_ = [torch.randn(states, width), torch.randn(items, width)]
    given_ += [torch.randn(items)] if biased else []
    labels = torch.randint(0, items, (states,))

    def run(loss_of) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in given_]
        loss = 3 * loss_of(leaves[0], leaves[1], leaves[2] if biased else None)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    def plain(states_BD, vectors_VD, bias_V):
        scores = states_BD @ vectors_VD.t()
        return F.cross_entropy(scores if bias_V is None else scores + bias_V, labels)

    budget(fitting, items)
    with Largest() as largest:
        found = run(lambda *leaves: item_scores.cross_entropy(*leaves, labels))
    for own, wanted in zip(found, run(plain), strict=True):
        assert close(own, wanted, 1e-5)
    assert largest.found <= max(fitting * items, items * width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradients_of_the_parts_have_the_dtype_of_their_tensors(budget, dtype):
    torch.manual_seed(0)
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((5, 8), (40, 8), (40,))]
    budget(1, 40)
    item_scores.cross_entropy(*leaves, torch.arange(5)).backward()
    parts = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    budget(100, 40)
    item_scores.cross_entropy(*leaves, torch.arange(5)).backward()
    for own, leaf in zip(parts, leaves, strict=True):
        assert own.dtype == dtype
        assert close(own, leaf.grad, 1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_the_whole_matrix_would_have_been_seen(budget):
    """The check above can fail."""
    states, vectors, _ = model_of(23, 90)
    budget(100, 91)
    with Largest() as largest:
        list(item_scores.in_parts(states, vectors))
    assert largest.found == 23 * 91


def test_a_state_that_exceeds_the_budget_alone_is_scored_alone(budget):
    budget(0, 1)
    states, vectors, bias = model_of(3, 10)
    assert [len(scores) for _, scores in item_scores.in_parts(states, vectors, bias)] == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_scored_in_fp32(dtype):
    torch.manual_seed(0)
    states, vectors = torch.randn(4, 64).to(dtype), torch.randn(3000, 64).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = item_scores.score(states, vectors)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, states.float() @ vectors.float().t())


def test_evaluation_of_a_student_in_parts_equals_the_whole(budget):
    cut, settings = prepared(), StudentSettings(hidden_size=16, num_blocks=1, max_length=6)
    model = encoder(settings)
    score = student.scorer(model, settings, 16)
    whole = ranking.evaluate(score, cut, "test", EvalSettings())
    budget(5, cut.num_items + 1)
    assert max(len(rows) for rows, _ in score(ranking.held_out(cut, "test"))) == 5
    parts = ranking.evaluate(score, cut, "test", EvalSettings())
    assert parts[1] == whole[1]
    assert parts[0].pop("loss") == pytest.approx(whole[0].pop("loss"))
    assert parts[0] == whole[0]

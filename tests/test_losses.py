"""Losses against their formulas: full softmax, BCE, gBCE, sampled softmax."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import close
from torch.utils._python_dispatch import TorchDispatchMode

from core.losses import gbce_beta, sampled_loss, sampled_softmax_loss, softmax_loss

ITEMS = 30


# ---- full softmax ----


def inputs(count: int = 11, width: int = 16):
    random = torch.Generator().manual_seed(2)
    states = torch.randn(count, width, generator=random, requires_grad=True)
    table = torch.randn(ITEMS + 1, width, generator=random, requires_grad=True)
    targets = torch.randint(1, ITEMS + 1, (count,), generator=random)
    targets[:2] = torch.tensor([1, ITEMS])  # both ends of the id space
    return states, table, targets


def plain_cross_entropy(states, table, targets):
    padding = torch.zeros(ITEMS + 1)
    padding[0] = float("-inf")
    return F.cross_entropy(states @ table.t() + padding, targets)


@pytest.mark.parametrize("chunk", [1, 4, 11, 512])
def test_softmax_loss_is_cross_entropy_with_both_gradients(chunk):
    states, table, targets = inputs()
    wanted = plain_cross_entropy(states, table, targets)
    wanted_gradients = torch.autograd.grad(3 * wanted, (states, table))
    found = softmax_loss(states, table, targets, chunk)
    gradients = torch.autograd.grad(3 * found, (states, table))
    assert close(found, wanted, 1e-6)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        assert close(gradient, wanted_gradient)
    assert not gradients[1][0].any()  # padding is no candidate


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_softmax_loss_at_small_and_huge_scores(scale):
    states, table, targets = inputs()
    wanted = plain_cross_entropy(scale * states, table, targets)
    found = softmax_loss(scale * states, table, targets, 4)
    assert found.isfinite()
    assert close(found, wanted)
    for a, b in zip(
        torch.autograd.grad(found, (states, table)),
        torch.autograd.grad(wanted, (states, table)),
        strict=True,
    ):
        assert close(a, b, 1e-4)


def test_softmax_loss_of_bf16_states_keeps_an_fp32_sum():
    states, table, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        low = states.bfloat16()
        found = softmax_loss(low, table, targets, 4)
    assert found.dtype == torch.float32
    assert close(found, plain_cross_entropy(states, table, targets), 2e-2)
    a = torch.autograd.grad(found, (states, table))
    b = torch.autograd.grad(plain_cross_entropy(states, table, targets), (states, table))
    assert a[1].dtype == torch.float32
    for x, y in zip(a, b, strict=True):
        assert close(x, y, 3e-2)


class Products(TorchDispatchMode):
    """The dtypes that matrix products were given."""

    def __init__(self):
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.__name__:
            self.dtypes |= {a.dtype for a in args if isinstance(a, torch.Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("low", [False, True])
def test_autocast_reaches_the_products_of_fp32_states(low):
    """The last norm gives fp32 under autocast; the dearest products of the student came after."""
    states, table, targets = inputs()
    seen = Products()
    with seen, torch.autocast("cpu", torch.bfloat16, enabled=low):
        found = softmax_loss(states, table, targets)
    assert seen.dtypes == {torch.bfloat16 if low else torch.float32}
    (gradient,) = torch.autograd.grad(found, states)
    assert gradient.dtype == torch.float32


# ---- sampled losses ----


def plain_sampled(states, table, targets, negatives, beta):
    """The formula, one position and one negative at a time."""
    total = 0.0
    for row, target in enumerate(targets):
        positive = torch.sigmoid(states[row] @ table[target])
        total = total - beta * positive.log()
        for negative in negatives:
            if negative != target:
                total = total - (1 - torch.sigmoid(states[row] @ table[negative])).log()
    return total / len(targets)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_sampled_loss_is_its_formula_and_skips_a_rows_own_target(beta):
    states, table, targets = inputs()
    states, table = (x.detach().mul(0.3).requires_grad_() for x in (states, table))
    negatives = torch.tensor([3, 7, 7, int(targets[4]), 1, ITEMS])
    wanted = plain_sampled(states, table, targets, negatives, beta)
    found = sampled_loss(states, table, targets, negatives, beta)
    assert close(found, wanted)
    for a, b in zip(
        torch.autograd.grad(found, (states, table)),
        torch.autograd.grad(wanted, (states, table)),
        strict=True,
    ):
        assert close(a, b, 1e-4)


def test_sampled_loss_survives_scores_whose_probability_rounds_to_one():
    states, table = torch.full((1, 1), 50.0), torch.tensor([[0.0], [-1.0], [1.0]])
    loss = sampled_loss(states, table, torch.tensor([1]), torch.tensor([2]), 1.0)
    assert close(loss, 100.0)


def test_sampled_softmax_over_every_item_is_the_full_softmax():
    states, table, targets = inputs()
    everything = torch.arange(1, ITEMS + 1)[torch.randperm(ITEMS)]
    wanted = plain_cross_entropy(states, table, targets)
    found = sampled_softmax_loss(states, table, targets, everything, torch.zeros(ITEMS))
    assert close(found, wanted, 1e-6)
    for a, b in zip(
        torch.autograd.grad(found, (states, table)),
        torch.autograd.grad(wanted, (states, table)),
        strict=True,
    ):
        assert close(a, b)


def test_sampled_softmax_has_the_gradient_of_its_value_and_leaves_accidental_hits_out():
    states, table, targets = (x.detach() for x in inputs(4, 3))
    states, table = states.double().requires_grad_(), table.double().requires_grad_()
    negatives = torch.tensor([3, 3, int(targets[1]), ITEMS])
    log_counts = torch.tensor([0.7, 0.7, -0.4, -1.3], dtype=torch.float64)

    def loss(states, table):
        return sampled_softmax_loss(states, table, targets, negatives, log_counts)

    # The value runs in fp32 by contract, so the difference quotient is a coarse one.
    assert torch.autograd.gradcheck(loss, (states, table), eps=1e-2, atol=1e-3, rtol=1e-2)
    wanted = 0.0
    for row, target in enumerate(targets.tolist()):
        scores = table.detach() @ states[row].detach()
        others = [
            scores[n] - c
            for n, c in zip(negatives.tolist(), log_counts, strict=True)
            if n != target
        ]
        wanted -= scores[target] - torch.stack([scores[target], *others]).logsumexp(0)
    assert loss(states, table).item() == pytest.approx(float(wanted) / 4, rel=1e-5)


def test_without_the_correction_a_popularity_proposal_is_biased():
    """The estimate of the softmax's denominator, from many draws by popularity."""
    states, table, targets = (x.detach() for x in inputs())
    shares = torch.arange(1, ITEMS + 1).double() ** 2
    shares /= shares.sum()
    random = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(shares, 60_000, replacement=True, generator=random)
    wanted = plain_cross_entropy(states, table, targets).item()
    corrected, biased = (
        sampled_softmax_loss(states, table, targets, drawn + 1, log_counts.float()).item()
        for log_counts in (
            (60_000 * shares[drawn]).log(),
            torch.full((60_000,), math.log(60_000 / ITEMS)),  # as if drawn uniformly
        )
    )
    assert corrected == pytest.approx(wanted, abs=0.02)
    assert abs(biased - wanted) > 0.1


def test_gbce_beta_at_its_ends():
    for negatives, items in itertools.product((1, 16, 256), (300, 4000)):
        alpha = negatives / (items - 1)
        assert gbce_beta(0.0, negatives, items) == pytest.approx(1.0)
        assert gbce_beta(1.0, negatives, items) == pytest.approx(alpha)
        middle = gbce_beta(0.75, negatives, items)
        assert alpha < middle < 1
    assert gbce_beta(0.75, 5000, 10) == pytest.approx(1.0)  # more negatives than items: plain BCE

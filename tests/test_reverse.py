"""Reverse distillation: hand-computed losses, a detached start, four decays."""

import math

import pytest
import torch

from core.reverse import decayed_lambda, reverse_loss

KINDS = ("mse", "l1", "huber", "cosine", "contrastive")
START = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 2.0]])


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        # Rows become (1, 1) and (0, 5): differences 0, 1, 0, 3.
        ("mse", (1 + 9) / 4),
        ("l1", (1 + 3) / 4),
        ("huber", (0.5 + 2.5) / 4),
        ("cosine", (1 - math.sqrt(0.5)) / 2),
        (
            "contrastive",  # cosines 0.71, 0.71 and 0, 1, each over temperature 0.1
            (math.log(2) + math.log(1 + math.exp(-10))) / 2,
        ),
    ],
)
def test_losses_by_hand_without_the_padding_row(kind, wanted):
    table = torch.tensor([[-50.0, 3.0], [1.0, 1.0], [0.0, 5.0]], requires_grad=True)
    loss = reverse_loss(kind, table, START)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    assert table.grad[0].tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["mse", "l1", "huber", "cosine"])
def test_loss_is_zero_at_the_start_and_positive_after_a_step(kind):
    table = torch.randn(6, 4).requires_grad_()
    start = table.detach().clone()
    assert reverse_loss(kind, table, start).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        table += torch.randn(6, 4)
    assert reverse_loss(kind, table, start).item() > 1e-3


def test_contrastive_of_orthogonal_rows_at_the_start():
    start = torch.cat([torch.zeros(1, 5), torch.eye(5)])
    wanted = math.log(1 + 4 * math.exp(-10))
    assert reverse_loss("contrastive", start.clone(), start).item() == pytest.approx(
        wanted, rel=1e-3
    )
    shuffled = start[[0, 2, 3, 4, 5, 1]]
    assert reverse_loss("contrastive", shuffled, start).item() == pytest.approx(10, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_start(kind):
    table, start = torch.randn(5, 3).requires_grad_(), torch.randn(5, 3).requires_grad_()
    reverse_loss(kind, table, start).backward()
    assert start.grad is None and table.grad[1:].abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_in", ["table", "start", "both", "all"])
def test_zero_rows_are_safe(kind, zero_in):
    table, start = torch.randn(4, 3), torch.randn(4, 3)
    if zero_in in ("table", "both"):
        table[2] = 0
    if zero_in in ("start", "both"):
        start[2] = 0
    if zero_in == "all":
        table.zero_()
        start.zero_()
    loss = reverse_loss(kind, table.requires_grad_(), start)
    loss.backward()
    assert loss.isfinite() and table.grad.isfinite().all()
    assert table.grad.abs().max() < 1e3, "a tiny norm must not blow the gradient up"


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_tables_are_compared_in_fp32(kind):
    table, start = torch.randn(9, 4).bfloat16(), torch.randn(9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = reverse_loss(kind, table, start)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reverse_loss(kind, table.float(), start).item(), rel=1e-6)


def test_bad_losses_are_refused():
    with pytest.raises(ValueError, match=r"table \(3, 2\), start \(1, 2\)"):
        reverse_loss("mse", START, START[:1])
    with pytest.raises(ValueError, match="'l2'; one of mse"):
        reverse_loss("l2", START, START)


@pytest.mark.parametrize(
    ("kind", "at_start", "half_way", "at_end"),
    [
        ("none", 0.4, 0.4, 0.4),
        ("linear", 0.4, 0.25, 0.1),
        ("cosine", 0.4, 0.25, 0.1),
        ("exponential", 0.4, 0.2, 0.1),
    ],
)
def test_decay_at_start_half_end_and_beyond(kind, at_start, half_way, at_end):
    got = [decayed_lambda(kind, 0.4, 0.1, step, 10) for step in (0, 5, 10, 11, 1000)]
    assert got == pytest.approx([at_start, half_way, at_end, at_end, at_end])


def test_cosine_is_slower_than_linear_at_first():
    assert decayed_lambda("cosine", 1.0, 0.0, 1, 4) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert decayed_lambda("linear", 1.0, 0.0, 1, 4) == 0.75


def test_exponential_stops_at_its_floor_and_never_grows():
    assert decayed_lambda("exponential", 1.0, 0.0, 5, 10) == pytest.approx(1e-3)
    assert decayed_lambda("exponential", 1.0, 0.0, 99, 10) == pytest.approx(1e-6)
    assert decayed_lambda("exponential", 0.0, 0.0, 5, 10) == 0
    assert decayed_lambda("exponential", 1e-7, 0.0, 10, 10) == 1e-7


def test_bad_decays_are_refused():
    with pytest.raises(ValueError, match="decay_steps 0"):
        decayed_lambda("linear", 0.1, 0.0, 0, 0)
    with pytest.raises(ValueError, match="'step'; one of none"):
        decayed_lambda("step", 0.1, 0.0, 0, 1)

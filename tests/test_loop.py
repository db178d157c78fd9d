"""The plain loop and Lightning: the same losses to the bit, the same stops, saves and errors."""

import itertools
import multiprocessing
import signal
import time
from dataclasses import dataclass, field
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset

from core.lightning import fit_lightning
from core.loop import Fit, NonFiniteLoss, adamw, fit_loop, float32_products
from core.observe import Observer
from core.settings import Precision

TRUE = {"bf16-true": torch.bfloat16, "fp16-true": torch.float16}
TRAINERS = {"loop": fit_loop, "lightning": fit_lightning}
both_trainers = pytest.mark.parametrize("trainer", TRAINERS)


class Batches(Dataset):
    """Random classification batches; row r of epoch e never changes, however the rows are cut."""

    def __init__(self, epoch: int, count: int, size: int):
        random = torch.Generator().manual_seed(epoch)
        self.features = torch.randn(count, size, 6, generator=random)
        self.targets = torch.randint(4, (count, size), generator=random)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict:
        features, targets = self.features[index], self.targets[index]
        size = len(targets)
        return {
            "features": features,
            "targets": targets,
            "samples": size,
            "tokens": 3 * size,
            "padded_tokens": 4 * size,
        }


@dataclass
class Run:
    """A small fit and everything it let be seen."""

    fit: Fit
    observer: Observer
    saved: list[tuple[str, dict]] = field(default_factory=list)
    seen: list[torch.Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    steps_before: list[int] = field(default_factory=list)
    flags: list[bool] = field(default_factory=list)
    modes: list[bool] = field(default_factory=list)

    def names(self) -> list[str]:
        return [name for name, _ in self.saved]


def small_run(
    *, batches=7, size=5, scores=None, device="cpu", scheduled=True, dropout=0.2, **options
) -> Run:
    """A fit of two layers with dropout; `scores` are the validation results epoch by epoch."""
    torch.manual_seed(3)
    dtype = TRUE.get(options.get("precision"), torch.float32)
    # Used twice: the cast of its weight is shared or not, and the gradients differ in the last bit.
    twice = nn.Linear(8, 8)
    parts = [nn.Linear(6, 8), nn.Dropout(dropout), twice, nn.GELU(), twice, nn.Linear(8, 4)]
    model = nn.Sequential(*parts)
    model.to(device, dtype)
    scores = itertools.count() if scores is None else iter(scores)
    optimizer = adamw(model.parameters(), lr=0.05, weight_decay=0.01)

    def loss(batch: dict) -> torch.Tensor:
        run.seen.append(batch["features"].clone())
        run.modes.append(model.training)
        run.rates.append(optimizer.param_groups[0]["lr"])
        return F.cross_entropy(model(batch["features"].to(dtype)).float(), batch["targets"])

    def validate() -> dict[str, float]:
        model.eval()
        return {"ndcg@10": float(next(scores))}

    def save(name: str) -> None:
        run.saved.append((name, {k: v.cpu().clone() for k, v in model.state_dict().items()}))

    fit = Fit(
        model=model,
        batches=lambda epoch: Batches(epoch, batches, size),
        loss=loss,
        validate=validate,
        save=save,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        if scheduled
        else None,
        before_step=lambda steps: run.steps_before.append(steps),
        device=torch.device(device),
        **{"max_epochs": 3, "patience": 5} | options,
    )
    run = Run(fit, Observer())
    run.observer.on_step = lambda step: run.flags.append(step.optimizer_step)
    return run


def trained(trainer: str, **options) -> Run:
    run = small_run(**options)
    TRAINERS[trainer](run.fit, run.observer)
    return run


def assert_same(loop: Run, lightning: Run) -> None:
    assert loop.observer.loss_trace() == lightning.observer.loss_trace()
    assert loop.fit.history == lightning.fit.history
    assert loop.names() == lightning.names()
    for (_, expected), (_, found) in zip(loop.saved, lightning.saved, strict=True):
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert loop.rates == lightning.rates
    assert loop.steps_before == lightning.steps_before
    assert loop.flags == lightning.flags
    assert loop.observer.counts == lightning.observer.counts


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("accumulate", [1, 4])
def test_both_trainers_give_the_same_losses_to_the_bit(accumulate, precision):
    """Seven batches: with four to a group the last group of each epoch is incomplete."""
    runs = [
        trained(
            name,
            accumulate_grad_batches=accumulate,
            precision=precision,
            gradient_clip_val=0.5,
        )
        for name in TRAINERS
    ]
    assert_same(*runs)
    groups = -(-7 // accumulate)
    assert runs[0].observer.counts["optimizer_steps"] == 3 * groups
    assert [run.observer.facts["trainer"] for run in runs] == ["loop", "lightning"]
    # The comparison is worth something only if the weights moved and the rates fell.
    assert runs[0].observer.loss_trace()[0] != runs[0].observer.loss_trace()[7]
    assert len(set(runs[0].rates)) == 3 * groups


def test_without_scheduler_and_clipping_the_trainers_agree_too():
    assert_same(*(trained(name, scheduled=False, max_epochs=2) for name in TRAINERS))


@pytest.mark.parametrize("precision", ["fp16-mixed", "fp16-true"])
def test_steps_that_fp16_leaves_out_are_the_same_under_both_trainers(precision, recwarn):
    """A gradient that overflows at the first scale: no step is made, and nobody warns of it."""
    runs = []
    for name, trainer in TRAINERS.items():
        run = small_run(precision=precision, max_epochs=1)
        start = run.fit.model[0].weight.detach().clone()
        loss = run.fit.loss

        def overflowing(batch: dict, run=run, loss=loss, start=start) -> torch.Tensor:
            value = loss(batch) * (1e3 if not run.seen[1:] else 1.0)
            if len(run.seen) == 2:
                assert torch.equal(run.fit.model[0].weight, start)
            return value

        run.fit.loss = overflowing
        trainer(run.fit, run.observer)
        assert not torch.equal(run.fit.model[0].weight, start), name
        runs.append(run)
    assert_same(*runs)
    assert not [str(warning.message) for warning in recwarn]


def half_layer(precision: str = "fp16-true") -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4).to(TRUE.get(precision, torch.float32))


def descend(layer: nn.Linear, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Losses of some steps whose gradients are small, as those of a mean over many items are."""
    batch, losses = Batches(0, 1, 32)[0], []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        logits = layer(batch["features"].to(layer.weight.dtype)).float()
        loss = F.cross_entropy(logits, batch["targets"])
        (loss * 1e-3).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_float16_weights_are_trained_as_well_as_fp32_ones():
    layer = half_layer()
    found = descend(layer, adamw(layer.parameters(), 0.05, 0.01), 40)
    whole = half_layer("fp32")
    wanted = descend(whole, adamw(whole.parameters(), 0.05, 0.01), 40)
    assert layer.weight.dtype == torch.float16
    assert wanted[-1] < 0.8 * wanted[0]
    assert found == pytest.approx(wanted, rel=0.01)


def test_adamw_in_float16_itself_would_break():
    """The reason for the fp32 copies."""
    layer = half_layer()
    losses = descend(layer, torch.optim.AdamW(layer.parameters(), lr=0.05, foreach=True), 40)
    assert not torch.tensor(losses).isfinite().all()


def test_updates_too_small_for_float16_add_up():
    layer = half_layer()
    nn.init.ones_(layer.weight)
    optimizer = adamw(layer.parameters(), 1e-5, 0.0)
    descend(layer, optimizer, 1)
    assert torch.equal(layer.weight, torch.ones_like(layer.weight)), "below half a float16 step"
    descend(layer, optimizer, 100)
    assert not torch.equal(layer.weight, torch.ones_like(layer.weight))


def test_gradients_of_float16_weights_add_up_in_fp32_and_leave_nothing_behind():
    layer = half_layer()
    optimizer = adamw(layer.parameters(), 1e-3, 0.0)
    for _ in range(3):
        layer(torch.full((1, 6), 1e-3, dtype=torch.float16)).sum().backward()
    master = optimizer.param_groups[0]["params"][0]
    assert master.grad.dtype == torch.float32
    assert torch.allclose(master.grad, torch.full((4, 6), 3e-3), rtol=1e-3)
    assert layer.weight.grad is None


def test_only_float16_weights_have_copies():
    layer = half_layer("bf16-true")
    own = adamw(layer.parameters(), 1e-3, 0.0).param_groups[0]["params"]
    assert [id(parameter) for parameter in own] == [id(p) for p in layer.parameters()]


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("before", ["highest", "high"])
def test_only_tf32_rounds_fp32_products_and_only_inside_the_block(precision, before):
    torch.set_float32_matmul_precision(before)
    try:
        with pytest.raises(KeyError), float32_products(precision):
            inside = torch.get_float32_matmul_precision()
            raise KeyError
        assert inside == ("high" if precision == "tf32" else "highest")
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


@both_trainers
def test_optimizer_steps_fall_on_full_groups_and_the_end_of_an_epoch(trainer):
    run = trained(trainer, accumulate_grad_batches=3, max_epochs=2)
    assert run.flags == [False, False, True, False, False, True, True] * 2
    assert run.steps_before == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 5]
    assert run.observer.counts["micro_batches"] == 14
    assert run.observer.counts["rows"] == 14 * 5
    assert run.observer.counts["tokens"] == 14 * 15
    assert run.observer.counts["padded_tokens"] == 14 * 20


@settings(deadline=None, max_examples=20)
@given(groups=st.integers(1, 6), size=st.integers(1, 5))
def test_micro_batches_of_a_group_are_one_large_batch(groups, size):
    def stepped(rows: int, count: int) -> list[torch.Tensor]:
        run = small_run(
            batches=1, dropout=0.0, scheduled=False, max_epochs=1, accumulate_grad_batches=count
        )
        data = Batches(0, 1, rows * count)[0]

        class Cut(Dataset):
            def __len__(self) -> int:
                return count

            def __getitem__(self, index: int) -> dict:
                part = slice(index * rows, (index + 1) * rows)
                return data | {k: data[k][part] for k in ("features", "targets")}

        run.fit.batches = lambda epoch: Cut()
        run.fit.optimizer = torch.optim.SGD(run.fit.model.parameters(), lr=1.0)
        before = [p.detach().clone() for p in run.fit.model.parameters()]
        fit_loop(run.fit, run.observer)
        after = run.fit.model.parameters()
        return [old - new.detach() for old, new in zip(before, after, strict=True)]

    for many, one in zip(stepped(size, groups), stepped(size * groups, 1), strict=True):
        torch.testing.assert_close(many, one)
    assert any(gradient.abs().max() > 0 for gradient in stepped(size, groups))


@both_trainers
def test_clipping_bounds_the_step(trainer):
    """One SGD step of rate 1 moves the weights by the clipped gradient: its norm is the limit."""
    run = small_run(batches=1, scheduled=False, max_epochs=1, gradient_clip_val=0.01)
    run.fit.optimizer = torch.optim.SGD(run.fit.model.parameters(), lr=1.0)
    before = nn.utils.parameters_to_vector(run.fit.model.parameters()).detach().clone()
    TRAINERS[trainer](run.fit, run.observer)
    moved = before - nn.utils.parameters_to_vector(run.fit.model.parameters()).detach()
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


@both_trainers
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_training_and_names_the_step(trainer, bad):
    run = small_run()
    healthy = run.fit.loss

    def loss(batch: dict) -> torch.Tensor:
        value = healthy(batch)
        return value * bad if len(run.seen) == 10 else value

    run.fit.loss = loss
    with pytest.raises(NonFiniteLoss, match=rf"step 9: training loss is -?{bad}"):
        TRAINERS[trainer](run.fit, run.observer)
    assert len(run.fit.history) == 1, "the epoch before it was sound, the bad one is not recorded"
    assert "last" not in run.names()


@both_trainers
def test_an_epoch_without_batches_is_an_error(trainer):
    run = small_run(batches=0)
    with pytest.raises(NonFiniteLoss, match="step 0: the epoch held no batch"):
        TRAINERS[trainer](run.fit, run.observer)


@both_trainers
def test_patience_ends_the_training_and_best_and_last_are_saved(trainer):
    run = trained(trainer, scores=[0.1, 0.3, 0.2, 0.3, 0.9], max_epochs=5, patience=2)
    assert [epoch["ndcg@10"] for epoch in run.fit.history] == [0.1, 0.3, 0.2, 0.3]
    assert [epoch["epoch"] for epoch in run.fit.history] == [0, 1, 2, 3]
    assert run.names() == ["best", "best", "last"]
    assert run.observer.counts["micro_batches"] == 4 * 7
    means = torch.tensor(run.observer.loss_trace()).view(4, 7).mean(1)
    assert [epoch["train_loss"] for epoch in run.fit.history] == pytest.approx(means.tolist())
    best, last = run.saved[1][1], run.saved[2][1]
    assert not torch.equal(best["0.weight"], last["0.weight"])
    assert torch.equal(last["0.weight"], run.fit.model[0].weight.detach())


@both_trainers
def test_validation_every_other_epoch_and_always_after_the_last(trainer):
    run = trained(trainer, max_epochs=5, eval_every=2)
    assert [epoch["epoch"] for epoch in run.fit.history] == [1, 3, 4]


@both_trainers
def test_every_step_runs_in_training_mode(trainer):
    """Validation leaves the model in eval mode, where dropout and checkpointing do nothing."""
    run = small_run(max_epochs=2)
    run.fit.model.eval()
    TRAINERS[trainer](run.fit, run.observer)
    assert run.modes == [True] * 14


@both_trainers
@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_are_seen_and_change_no_batch(trainer, workers):
    """Workers that outlive their epoch would be counted again in validation."""
    run = small_run(num_workers=workers, max_epochs=2)
    validate, alive = run.fit.validate, []
    run.fit.validate = lambda: alive.append(multiprocessing.active_children()) or validate()
    TRAINERS[trainer](run.fit, run.observer)
    assert alive == [[], []]
    assert run.observer.facts["loader_workers"] == workers
    expected = [Batches(epoch, 7, 5)[index]["features"] for epoch in (0, 1) for index in range(7)]
    for found, wanted in zip(run.seen, expected, strict=True):
        assert torch.equal(found, wanted)
    assert run.observer.loss_trace() == trained("loop", max_epochs=2).observer.loss_trace()


@both_trainers
def test_waiting_for_batches_is_measured(trainer, monkeypatch):
    run = small_run(max_epochs=1)
    fetch = Batches.__getitem__

    def slow(self, index):
        time.sleep(0.01)
        return fetch(self, index)

    monkeypatch.setattr(Batches, "__getitem__", slow)
    TRAINERS[trainer](run.fit, run.observer)
    assert 0.07 <= run.observer.loader_wait_s < 0.5


@both_trainers
def test_phases_are_separate_and_the_observed_step_is_one_of_them(trainer):
    run = trained(trainer)
    assert set(run.observer.phases) == {"train_steps", "observed_step", "validation", "checkpoint"}


def test_the_census_covers_the_same_step_under_both_trainers():
    """Forward and backward of the first micro-batch: the same bytes saved, no operator missing."""
    loop, lightning = (trained(name, max_epochs=1).observer.facts for name in TRAINERS)
    assert loop["saved_bytes"] == lightning["saved_bytes"] > 0
    assert loop["operators"] <= lightning["operators"] <= loop["operators"] + 10
    forward = small_run(max_epochs=1)
    with forward.observer.first_step(), torch.enable_grad():
        forward.fit.loss(Batches(0, 7, 5)[0])
    assert loop["operators"] > forward.observer.facts["operators"] + 5, "backward is included"


@both_trainers
def test_an_interrupt_stays_an_interrupt(trainer):
    """Lightning turns it into SystemExit and leaves SIGINT ignored."""
    run = small_run()
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(batch: dict) -> torch.Tensor:
        raise KeyboardInterrupt

    run.fit.loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        TRAINERS[trainer](run.fit, run.observer)
    assert signal.getsignal(signal.SIGINT) is handler


@both_trainers
def test_an_error_in_the_loss_comes_through_and_leaves_no_mode_behind(trainer):
    run = small_run()
    operators = []

    def broken(batch: dict) -> torch.Tensor:
        operators.append(batch)
        raise ZeroDivisionError("in the loss")

    run.fit.loss = broken
    with pytest.raises(ZeroDivisionError, match="in the loss"):
        TRAINERS[trainer](run.fit, run.observer)
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0
    assert len(operators) == 1


@both_trainers
def test_training_prints_and_writes_nothing(trainer, capfd, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    trained(trainer, max_epochs=1)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", get_args(Precision))
def test_on_a_gpu_the_trainers_agree_and_the_model_stays_there(precision):
    runs = [
        trained(name, device="cuda", precision=precision, gradient_clip_val=0.5, dropout=0.0)
        for name in TRAINERS
    ]
    assert_same(*runs)
    assert {p.device.type for run in runs for p in run.fit.model.parameters()} == {"cuda"}

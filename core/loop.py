"""The plain training loop (`train.trainer: loop`): epochs, accumulation, validation, best
checkpoint.

`Fit` is what any trainer needs to know of a model; `core.lightning` runs the same `Fit` under
Lightning.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from core.observe import Observer
from core.ranks import ALONE, Group, facts


class NonFiniteLoss(RuntimeError):
    """A training loss was NaN or infinite; the message names the first bad step."""


@dataclass
class Fit:
    """One model's training, trainer-independent.

    A batch is a dictionary of tensors with the integers `samples`, `tokens` and `padded_tokens`
    beside them.
    """

    model: nn.Module
    batches: Callable[[int], Dataset]
    """Epoch number -> map-style data set whose items are whole batches."""
    loss: Callable[[dict[str, Any]], Tensor]
    validate: Callable[[], dict[str, float]]
    save: Callable[[str], None]
    """Write the trainable state under the given name ("best", "last")."""
    optimizer: torch.optim.Optimizer
    device: torch.device
    max_epochs: int
    patience: int
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    """Stepped once for each optimizer step."""
    precision: str = "fp32"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float = 0.0
    eval_every: int = 1
    num_workers: int = 0
    monitor: str = "ndcg@10"
    before_step: Callable[[int], None] = lambda optimizer_steps: None
    """Called before each micro-batch with the optimizer steps done so far."""
    group: Group = ALONE
    """The processes that train it; more than one under Lightning only."""
    history: list[dict[str, float]] = field(default_factory=list)


SCALED = ("fp16-mixed", "fp16-true")
"""Precisions whose loss is scaled up for the backward: small float16 gradients would vanish."""


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Round the factors of fp32 matrix products to TF32 inside the block, or for every precision
    but `tf32` forbid it.
    """
    # torch refuses a mixture of this switch and its newer ones: nothing else here touches them.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The autocast region of a precision setting: mixed forms only, `fp8` among them, the others
    run in the weights' dtype.
    """
    if not precision.endswith("-mixed") and precision != "fp8":
        return contextlib.nullcontext()
    dtype = torch.float16 if precision == "fp16-mixed" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype)


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; float16 parameters are trained through fp32 copies, which get their gradients too."""
    # In float16 the squares of most gradients and AdamW's eps are zero, and a GradScaler will not
    # unscale float16 gradients. So the classic recipe: fp32 master weights and a scaled loss
    # (Micikevicius et al., Mixed Precision Training, ICLR 2018).
    parameters = list(parameters)
    halves = [p for p in parameters if p.dtype == torch.float16]
    masters = {p: _master(p) for p in halves}
    optimizer = torch.optim.AdamW(
        [masters.get(p, p) for p in parameters], lr=lr, weight_decay=weight_decay, fused=True
    )

    def write_back(*_: Any) -> None:
        for parameter in halves:
            parameter.data.copy_(masters[parameter].data)

    optimizer.register_step_post_hook(write_back)
    return optimizer


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """An fp32 copy that takes over each gradient of the parameter as soon as it is known."""
    master = nn.Parameter(parameter.detach().float())

    def hand_over(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad.float(), None
        master.grad = gradient if master.grad is None else master.grad + gradient

    parameter.register_post_accumulate_grad_hook(hand_over)
    return master


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch, leave its counts."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def loader(dataset: Dataset, num_workers: int, device: torch.device) -> DataLoader:
    """A loader over ready-made batches; with workers they are assembled in other processes."""
    return DataLoader(
        dataset, batch_size=None, num_workers=num_workers, pin_memory=device.type == "cuda"
    )


def delivered(source: Iterable, observer: Observer, device: torch.device) -> Iterator[dict]:
    """Batches on the device; the time spent waiting for each is the loader wait, the start of
    workers included.
    """
    asked = time.perf_counter()
    for batch in source:
        observer.loader_wait_s += time.perf_counter() - asked
        yield to_device(batch, device)
        asked = time.perf_counter()


class BestSoFar:
    """Early stopping on a validation metric (larger is better), shared by both trainers."""

    def __init__(self, fit: Fit):
        self.fit = fit
        self.best = float("-inf")
        self.bad = 0

    def update(
        self, epoch: int, train_loss: float, metrics: dict[str, float], observer: Observer
    ) -> bool:
        """Record an epoch's validation, save when improved; True when patience is used up."""
        self.fit.history.append({"epoch": epoch, "train_loss": train_loss, **metrics})
        observer.on_validation(self.fit.history[-1], self.fit.max_epochs)
        if metrics[self.fit.monitor] > self.best:
            self.best, self.bad = metrics[self.fit.monitor], 0
            with observer.phase("checkpoint"):
                self.fit.save("best")
        else:
            self.bad += 1
        return self.bad >= self.fit.patience


def end_epoch(fit: Fit, epoch: int, first_step: int, best: BestSoFar, observer: Observer) -> bool:
    """Check an epoch's losses, from `first_step` on, and validate where due; True when training
    should stop.

    Raises NonFiniteLoss.
    """
    with observer.phase("train_steps"):  # the device still works: what it has left belongs here
        train_loss = mean_loss(observer.losses[first_step:], first_step)
    if (epoch + 1) % fit.eval_every and epoch + 1 < fit.max_epochs:
        return False
    with observer.phase("validation"):
        metrics = fit.validate()
    return best.update(epoch, train_loss, metrics, observer)


def mean_loss(losses: list[Tensor], first_step: int) -> float:
    """Mean of an epoch's losses. Raises NonFiniteLoss naming the first bad step; the epoch's one
    device read.
    """
    if not losses:
        raise NonFiniteLoss(f"step {first_step}: the epoch held no batch")
    values = torch.stack(losses).float()
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        step = first_step + int(bad[0])
        raise NonFiniteLoss(f"step {step}: training loss is {values[int(bad[0])].item()}")
    return values.mean().item()


def fit_loop(fit: Fit, observer: Observer) -> None:
    """Train `fit.model` with the plain loop; `fit.save` holds "best" and "last" afterwards."""
    scaler = torch.amp.GradScaler(fit.device.type, enabled=fit.precision in SCALED)
    best = BestSoFar(fit)
    optimizer_steps = 0
    observer.facts.update(trainer="loop", **facts())
    for epoch in range(fit.max_epochs):
        first = len(observer.losses)
        with observer.phase("train_steps"):
            optimizer_steps = _epoch(fit, epoch, optimizer_steps, scaler, observer)
        if end_epoch(fit, epoch, first, best, observer):
            break
    with observer.phase("checkpoint"):
        fit.save("last")


def _epoch(fit: Fit, epoch: int, optimizer_steps: int, scaler, observer: Observer) -> int:
    """One pass over the training batches; returns the optimizer steps done so far."""
    fit.model.train()
    dataset = fit.batches(epoch)
    micro_batches = len(dataset)
    source = loader(dataset, fit.num_workers, fit.device)
    for index, batch in enumerate(delivered(source, observer, fit.device)):
        if index == 0:
            observer.loader_processes()
        fit.before_step(optimizer_steps)
        # Like Lightning: the last, possibly shorter, group of an epoch is stepped too.
        stepping = (index + 1) % fit.accumulate_grad_batches == 0 or index + 1 == micro_batches
        with observer.first_step():
            with autocast(fit.precision, fit.device):
                loss = fit.loss(batch)
            scaler.scale(loss / fit.accumulate_grad_batches).backward()
        if stepping:
            if fit.gradient_clip_val:
                scaler.unscale_(fit.optimizer)
                nn.utils.clip_grad_norm_(
                    [p for group in fit.optimizer.param_groups for p in group["params"]],
                    fit.gradient_clip_val,
                )
            scaler.step(fit.optimizer)
            scaler.update()
            fit.optimizer.zero_grad(set_to_none=True)
            if fit.scheduler is not None:
                fit.scheduler.step()
            optimizer_steps += 1
        observer.step(
            batch["samples"],
            batch["tokens"],
            batch["padded_tokens"],
            optimizer_step=stepping,
            loss=loss,
        )
    return optimizer_steps

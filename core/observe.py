"""What one live step really did: operators, operand dtypes, saved bytes, phases and counts,
collected as facts.

Facts are read off the running process, never copied from the settings; `bench.proofs` compares the
two.
"""

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GEMMS = {"mm", "addmm", "bmm", "baddbmm", "_addmm_activation"}
# A fused operator is listed under the name its users know; the eager path shows as `_softmax`.
ATTENTION = {
    "_scaled_dot_product_flash_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    "_scaled_dot_product_efficient_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_cudnn_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_fused_attention_overrideable": "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math": "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math_for_mps": "scaled_dot_product_attention",
    "_softmax": "_softmax",
}


@dataclass(frozen=True)
class Step:
    """One finished micro-batch: what the step clock needs to turn seconds into rates."""

    samples: int
    tokens: int
    padded_tokens: int
    optimizer_step: bool


class Census(TorchDispatchMode):
    """Counts dispatched operators, the operand dtypes of matrix products, and attention kernels.

    Autocast has already acted when an operator is dispatched, so the dtypes are those that ran.
    """

    def __init__(self):
        super().__init__()
        self.operators = 0
        self.gemm_dtypes: Counter[str] = Counter()
        self.attention_ops: Counter[str] = Counter()
        self.inside_backbone = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Inference mode hands over composite operators (linear, matmul) whole; otherwise they have
        # been taken apart already.
        with self:
            taken_apart = func.decompose(*args, **(kwargs or {}))
        if taken_apart is not NotImplemented:
            return taken_apart
        name = func.overloadpacket.__name__
        self.operators += 1
        if self.inside_backbone:
            if name in GEMMS:
                # The last two tensor operands are the product's; an addmm's first is the bias.
                factors = [a for a in args if isinstance(a, torch.Tensor)][-2:]
                self.gemm_dtypes[_name(factors[-1].dtype)] += 1
            if name in ATTENTION:
                self.attention_ops[ATTENTION[name]] += 1
            elif "flash_attn" in str(func):
                self.attention_ops["flash_attn"] += 1
        return func(*args, **(kwargs or {}))


class Observer:
    """Collects the facts, phases and steps of one stage; the harness listens through the two
    callbacks.
    """

    def __init__(
        self,
        on_step: Callable[[Step], None] = lambda step: None,
        on_phase: Callable[[str], None] = lambda name: None,
        on_validation: Callable[[dict, int], None] = lambda figures, max_epochs: None,
    ):
        self.on_step = on_step
        self.on_validation = on_validation
        self.on_phase = on_phase
        self.facts: dict = {}
        self.counts: Counter[str] = Counter()
        self.phases: Counter[str] = Counter()
        self.losses: list[torch.Tensor] = []
        self.metrics: dict = {}
        self.ranks: list[float] | None = None
        self.loader_wait_s = 0.0
        self.probes: dict[str, Callable[[], object]] = {}
        """Facts read once, when the observed step (forward and backward) has ended."""
        self._open: list[list] = []
        self._census: Census | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase in seconds; a phase inside another is subtracted from the outer one, so
        phases add up.
        """
        self.on_phase(name)
        self._open.append([name, 0.0])
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            _, inner = self._open.pop()
            self.phases[name] += elapsed - inner
            if self._open:
                self._open[-1][1] += elapsed
                self.on_phase(self._open[-1][0])

    def step(
        self,
        samples: int,
        tokens: int = 0,
        padded_tokens: int = 0,
        *,
        optimizer_step: bool = False,
        loss: torch.Tensor | None = None,
    ) -> None:
        """Report one finished batch. The loss is kept on its device: reading it here would
        synchronise.
        """
        self.counts.update(
            micro_batches=1,
            optimizer_steps=int(optimizer_step),
            rows=samples,
            tokens=tokens,
            padded_tokens=padded_tokens,
        )
        if loss is not None:
            self.losses.append(loss.detach())
        self.on_step(Step(samples, tokens, padded_tokens, optimizer_step))

    @contextmanager
    def first_step(self) -> Iterator[None]:
        """Observe the first batch of a stage under the census; later batches run untouched.

        The observed batch is its own phase and never reaches the step clock's steady samples.
        """
        if "operators" in self.facts:
            yield
            return
        saved = Counter()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved["bytes"] += tensor.numel() * tensor.element_size()
            return tensor

        with (
            self.phase("observed_step"),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            Census() as self._census,
        ):
            yield
        census, self._census = self._census, None
        self.facts.update(
            operators=census.operators,
            gemm_dtypes=dict(census.gemm_dtypes),
            attention_ops=dict(census.attention_ops),
            saved_bytes=saved["bytes"],
            **{name: probe() for name, probe in self.probes.items()},
        )

    @contextmanager
    def backbone(self) -> Iterator[None]:
        """Mark the part of a step whose products and attention the census attributes to the
        backbone.
        """
        if self._census is None:
            yield
            return
        self._census.inside_backbone = True
        kind = torch.device(self.facts.get("device", "cpu")).type
        on = torch.is_autocast_enabled(kind)
        self.facts["autocast_dtype"] = _name(torch.get_autocast_dtype(kind)) if on else None
        try:
            yield
        finally:
            self._census.inside_backbone = False

    def loader_processes(self) -> None:
        """Note how many loader workers live right now (the largest number seen is the fact)."""
        alive = len(multiprocessing.active_children())
        self.facts["loader_workers"] = max(alive, self.facts.get("loader_workers", 0))

    def largest(self, name: str, value: int) -> None:
        """Keep the largest value seen under a fact's name."""
        self.facts[name] = max(value, self.facts.get(name, 0))

    def loss_trace(self) -> list[float]:
        """All losses of the stage as numbers, one device read."""
        return torch.stack(self.losses).float().tolist() if self.losses else []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parameter_dtypes(module: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Number of parameter tensors by dtype, trainable and frozen apart."""
    found: dict[str, Counter[str]] = {"trainable": Counter(), "frozen": Counter()}
    for parameter in module.parameters():
        kind = "trainable" if parameter.requires_grad else "frozen"
        found[kind][_name(parameter.dtype)] += 1
    return {kind: dict(counts) for kind, counts in found.items()}

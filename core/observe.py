"""What one live step really did: operators, operand dtypes, saved bytes, phases and counts,
collected as facts.

Facts are read off the running process, never copied from the settings; `bench.proofs` compares the
two.
"""

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

GEMMS = {"mm", "addmm", "bmm", "baddbmm", "_addmm_activation"}
# Of bitsandbytes and of float8 layers; the factors come first, scales and constants behind them.
FACTORS_FIRST = {"gemm_4bit", "gemv_4bit", "_scaled_mm"}
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


def kernel_names(events: Iterable) -> list[str]:
    """Names of the kernels among a profiler's events; copies and fills of memory are none."""
    return sorted(
        {
            event.name
            for event in events
            if event.device_type == DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
            and not event.name.startswith(("Memcpy", "Memset"))
        }
    )


@contextmanager
def profiled_kernels(on_gpu: bool) -> Iterator[dict[str, list[str]]]:
    """The fact `gpu_kernels` of the block, filled in at its end; on a CPU it stays empty."""
    facts: dict[str, list[str]] = {}
    if not on_gpu:
        yield facts
        return
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield facts
        torch.cuda.synchronize()  # what is still in the queue belongs to the block
    facts["gpu_kernels"] = kernel_names(profiler.events())


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
        if any(kind.__torch_dispatch__ != torch.Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # a tensor that answers for itself, with operators seen here
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
            elif name in FACTORS_FIRST:
                self.gemm_dtypes[_name(args[0].dtype)] += 1
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
        self.cache_read = False
        """Whether any forward of the backbone was given a cache to read."""
        self.uncompiled: Callable[[], AbstractContextManager] = nullcontext
        """Entered around the observed step: the census cannot see into compiled code."""
        self.learnt: Callable[[], dict[str, float]] = dict
        """What a phase that may last has found out so far; another thread may ask."""
        self.until_end = ExitStack()
        """Contexts of the stage, closed by whoever runs it."""
        self._shapes: set[tuple[int, ...]] = set()
        self._lengths = np.zeros(5)
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
            self.uncompiled(),
            profiled_kernels(self._device_type() == "cuda") as kernels,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            Census() as self._census,
        ):
            yield
            float32_matmul_precision = torch.get_float32_matmul_precision()
        census, self._census = self._census, None
        self.facts.update(
            operators=census.operators,
            gemm_dtypes=dict(census.gemm_dtypes),
            attention_ops=dict(census.attention_ops),
            saved_bytes=saved["bytes"],
            float32_matmul_precision=float32_matmul_precision,
            **kernels,
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
        kind = self._device_type()
        on = torch.is_autocast_enabled(kind)
        self.facts["autocast_dtype"] = _name(torch.get_autocast_dtype(kind)) if on else None
        try:
            yield
        finally:
            self._census.inside_backbone = False

    def backbone_call(self, module: torch.nn.Module, args: tuple, given: dict) -> None:
        """Forward pre-hook of the backbone: what it is really given; facts in the observed step."""
        if given.get("past_key_values") is not None:
            self.cache_read = True
            if self.facts.get("cache"):
                self.facts["cache"]["read"] = True
        if self._census is not None and self._census.inside_backbone:
            for name in ("inputs_embeds", "attention_mask"):
                tensor = given.get(name)
                self.facts[name] = None if tensor is None else _shape_and_dtype(tensor)
            self.facts["grad_enabled"] = torch.is_grad_enabled()

    def _device_type(self) -> str:
        return torch.device(self.facts.get("device", "cpu")).type

    def loader_processes(self) -> None:
        """Note how many loader workers live right now (the largest number seen is the fact)."""
        alive = len(multiprocessing.active_children())
        self.facts["loader_workers"] = max(alive, self.facts.get("loader_workers", 0))

    def largest(self, name: str, value: int) -> None:
        """Keep the largest value seen under a fact's name."""
        self.facts[name] = max(value, self.facts.get(name, 0))

    def batch(self, batch: dict) -> None:
        """Note the shape of a batch of prompts, and whether prompts of like length met in it.

        Of the logarithms of all lengths so far, their variance and that inside batches: where
        prompts meet at random the two are equal.
        """
        self._shapes.add(tuple(batch["ids"].shape))
        logs = np.log(batch["lengths"])
        inside = ((logs - logs.mean()) ** 2).sum()
        self._lengths += (len(logs), logs.sum(), (logs**2).sum(), inside, len(logs) - 1)
        count, total, squares, inside, freedom = self._lengths
        self.counts.update(prompts=len(logs), prompt_batches=1)
        self.facts["batch_shapes"] = len(self._shapes)
        if freedom:
            everywhere = max(squares - total**2 / count, 0.0) / (count - 1)
            self.facts["length_variance"] = {
                "all": float(everywhere),
                "inside": float(inside / freedom),
            }

    def loss_trace(self) -> list[float]:
        """All losses of the stage as numbers, one device read."""
        return torch.stack(self.losses).float().tolist() if self.losses else []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape_and_dtype(tensor: torch.Tensor) -> dict:
    return {"shape": list(tensor.shape), "dtype": _name(tensor.dtype)}


def parameter_dtypes(module: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Number of parameter tensors by dtype, trainable and frozen apart."""
    found: dict[str, Counter[str]] = {"trainable": Counter(), "frozen": Counter()}
    for parameter in module.parameters():
        kind = "trainable" if parameter.requires_grad else "frozen"
        found[kind][_name(parameter.dtype)] += 1
    return {kind: dict(counts) for kind, counts in found.items()}

"""On a GPU: which kernels a step runs, that it never waits for the device, and that compiled or
captured it stays the same.

What is shared with the processor is tested there; here is what only a CUDA device can show.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny
import torch

from core import teacher
from core.loop import adamw, autocast, float32_products, to_device
from core.observe import Observer
from core.teacher import Teacher

CUDA = torch.device("cuda")
ROWS = [0, 5, 11, 60, 61, 62, 100, 130]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Step:
    """One training step of a small teacher on a fixed batch."""

    def __init__(
        self,
        precision: str = "fp32",
        compile: str = "off",
        batching: str = "grouped",
        device: torch.device = CUDA,
        **given,
    ):
        settings = tiny.settings(precision, **given)
        changed = {
            "train": settings.train.model_copy(update={"compile": compile}),
            "data": settings.data.model_copy(update={"batching": batching}),
        }
        self.settings, self.device = settings.model_copy(update=changed), device
        torch.manual_seed(0)
        encoder = tiny.encoder(self.settings.student)
        self.model = Teacher(self.settings, encoder, device).train()
        tiny.activate(self.model)
        batches = tiny.batches(self.model, self.settings, len(ROWS))
        self.batches = [to_device(batches[i], device) for i in range(2)]
        self.observer = Observer()
        self.observer.facts["device"] = str(device)
        teacher.describe(self.model, self.observer)
        self.optimizer = adamw(self.model.trainable(), lr=1e-3, weight_decay=0.0)

    def loss(self, batch: dict) -> torch.Tensor:
        with autocast(self.settings.train.precision, self.device):
            return teacher.training_loss(self.model, batch, self.settings, 0.0, self.observer)

    def run(self, batch: dict) -> torch.Tensor:
        """Forward, backward, clipping and the optimizer; the loss stays on the device."""
        loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.trainable(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def observed(self) -> dict:
        """Facts of one step under the census."""
        with float32_products(self.settings.train.precision), self.observer.first_step():
            self.loss(self.batches[0]).backward()
        return self.observer.facts


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("precision", "operands"), [("bf16-mixed", "bfloat16"), ("fp16-mixed", "float16")]
)
def test_in_16_bit_attention_is_a_flash_kernel_and_products_are_16_bit(precision, operands):
    facts = Step(precision).observed()
    kernels = [name.lower() for name in facts["gpu_kernels"]]
    assert any("flash" in name for name in kernels), kernels
    assert set(facts["gemm_dtypes"]) == {operands}


def test_tf32_rounds_products_and_fp32_does_not():
    torch.manual_seed(0)
    left, right = torch.randn(2, 512, 512, dtype=torch.float64, device=CUDA)
    wanted = left @ right
    errors = {}
    for precision in ("fp32", "tf32"):
        with float32_products(precision):
            found = left.float() @ right.float()
        errors[precision] = float((found - wanted).abs().max() / wanted.abs().max())
    assert errors["fp32"] < 2e-6 < 5e-5 < errors["tf32"] < 5e-3


def test_tf32_runs_other_kernels_than_fp32():
    found = {p: set(Step(p).observed()["gpu_kernels"]) for p in ("fp32", "tf32")}
    assert found["fp32"] != found["tf32"]


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_four_bit_layers_run_on_the_device(precision):
    step = Step(precision, adapter="qlora")
    facts = step.observed()
    assert facts["layers_4bit"] > 0
    assert facts["quant"]["quant_type"] == "nf4"
    assert facts["frozen_bytes"] < Step(precision).observer.facts["frozen_bytes"]
    assert torch.isfinite(step.run(step.batches[1]))


@pytest.mark.parametrize("batching", ["grouped", "packed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_a_step_never_waits_for_the_device(precision, batching):
    step = Step(precision, batching=batching)
    for batch in step.batches:  # workspaces and handles are made first
        step.run(batch)
    with waiting_is_an_error():
        for batch in step.batches:
            step.run(batch)


def test_waiting_would_be_noticed():
    value = torch.ones(1, device=CUDA)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


def test_packed_batches_are_compiled_once():
    step = Step("bf16-mixed", compile="regional", batching="packed")
    first = step.run(step.batches[0])
    calls = step.model.execution.compiled_calls
    assert calls > 0
    for batch in step.batches:
        step.run(batch)
    assert step.model.execution.recompiles == 0
    assert step.model.execution.compiled_calls == 3 * calls
    plain = Step("bf16-mixed", batching="packed")
    assert tiny.close(first.cpu(), plain.run(plain.batches[0]).cpu(), 2e-2)


def test_forward_and_backward_can_be_captured_and_replayed():
    """A step that allocates nothing outside the pool and asks the host nothing is a CUDA graph."""
    step, plain = (Step("fp32", batching="packed") for _ in range(2))
    batch = step.batches[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step.loss(batch).backward()
            step.optimizer.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step.loss(batch)
        loss.backward()
    graph.replay()
    wanted = plain.loss(plain.batches[0])
    wanted.backward()
    assert tiny.close(loss.detach().cpu(), wanted.detach().cpu(), 1e-5)
    for found, expected in zip(step.model.trainable(), plain.model.trainable(), strict=True):
        assert tiny.close(found.grad.cpu(), expected.grad.cpu(), 1e-3)

"""Precision `fp8`: which layers multiply in float8, that the census sees them, who refuses it."""

import re

import pytest
import tiny
import torch
from torch import nn

from bench.proofs import PROOFS, facts_of
from core import llm, pipeline, teacher
from core.config import InputError
from core.loop import autocast
from core.observe import Observer
from core.settings import Settings

ROWS = list(range(6))
FLOAT8_LAYERS = 12
"""Six linear layers in each of two."""


@pytest.fixture
def torchao():
    """The extra `fp8`; where it is missing nothing can be converted."""
    return pytest.importorskip("torchao.float8")


@pytest.fixture
def as_if_it_could(monkeypatch):
    """Let a CPU pass for a device with float8 products, which torch computes there, slowly."""
    monkeypatch.setattr(llm, "float8_problem", lambda device: None)


def observed(given: Settings) -> dict:
    """Facts of one training step, as a record holds them."""
    model, observer = tiny.teacher(given).train(), Observer()
    teacher.describe(model, observer)
    with observer.first_step(), autocast(given.train.precision, tiny.CPU):
        loss = teacher.training_loss(model, tiny.batch(model, given, ROWS), given, 0.0, observer)
        loss.backward()
    assert all(p.grad is not None for p in model.trainable())
    return facts_of({"facts": observer.facts})


def holds(facts: dict, asked: str = "fp8") -> bool | None:
    return PROOFS["train.precision"].check(asked, facts, {}).holds


def test_the_frozen_linears_are_converted_and_nothing_else(torchao, as_if_it_could):
    given = tiny.settings("fp8")
    plain, model = tiny.teacher(tiny.settings("bf16-mixed")), tiny.teacher(given)
    linears = {name: layer for name, layer in plain.named_modules() if isinstance(layer, nn.Linear)}
    converted = {
        name for name, layer in model.named_modules() if type(layer).__name__ == "Float8Linear"
    }
    frozen = {name for name, layer in linears.items() if not layer.weight.requires_grad}
    # peft's wrapper is no layer of its own: what it wraps is.
    assert converted == {name for name in frozen if "lora_" not in name}
    assert len(converted) == FLOAT8_LAYERS
    other = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, other[name]) and parameter.dtype == other[name].dtype
        assert parameter.requires_grad == other[name].requires_grad


def test_a_layer_whose_shape_no_kernel_takes_stays_as_it_is(torchao):
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 40), nn.Linear(40, 32))
    llm.multiply_in_float8(model)
    assert [type(layer).__name__ for layer in model] == ["Float8Linear", "Linear", "Linear"]


def test_the_census_sees_a_float8_product_for_each_and_the_proof_holds(torchao, as_if_it_could):
    facts = observed(tiny.settings("fp8"))
    # Two of each of the four adapters run beside them.
    assert facts["gemm_dtypes"] == {"float8_e4m3fn": FLOAT8_LAYERS, "bfloat16": 8}
    assert facts["layers_float8"] == FLOAT8_LAYERS
    assert holds(facts) is True
    assert holds(facts, "bf16-mixed") is False


@pytest.mark.parametrize("broken", ["never converted", "emulated", "one layer forgotten"])
def test_a_step_that_does_not_multiply_in_float8_is_convicted(
    torchao, as_if_it_could, monkeypatch, broken
):
    convert = llm.multiply_in_float8
    instead = {
        "never converted": lambda model: None,
        "emulated": lambda model: convert(model, emulate=True),
        "one layer forgotten": lambda model: (convert(model), forget_one(model)),
    }
    monkeypatch.setattr(llm, "multiply_in_float8", instead[broken])
    assert holds(observed(tiny.settings("fp8"))) is False


def forget_one(model: nn.Module) -> None:
    """Let a converted layer multiply as it did before."""
    layer = llm.float8_layers(model)[0]
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)


def test_scores_stay_near_those_of_bf16(torchao, as_if_it_could):
    """Rounding to three bits moves them, and not far: what a quality guard has to judge."""
    states = []
    for precision in ("bf16-mixed", "fp8"):
        given = tiny.settings(precision)
        model = tiny.teacher(given)
        with torch.inference_mode(), autocast(precision, tiny.CPU):
            states.append(model.read_out(tiny.batch(model, given, ROWS)).float())
    error = (states[1] - states[0]).norm() / states[0].norm()
    assert 0.001 < error < 0.2


def test_a_cpu_refuses_before_anything_is_loaded(monkeypatch):
    given = tiny.settings("fp8")
    with pytest.raises(InputError, match=r"train.precision: fp8: the CPU has no float8 products"):
        pipeline.choose_device(given)
    monkeypatch.setattr(llm, "preset_config", lambda name: pytest.fail("began to load"))
    with pytest.raises(InputError, match="use bf16-mixed"):
        llm.load_backbone(given.teacher, "fp8", tiny.CPU, 0)


@pytest.mark.parametrize(
    ("capability", "installed", "reason"),
    [
        ((8, 0), True, "needs CUDA capability 8.9, this GPU has 8.0"),
        ((9, 0), False, r"pip install 'ilora-bench\[fp8\]'"),
        ((8, 9), True, None),
    ],
)
def test_a_gpu_is_asked_for_its_capability_and_torchao(monkeypatch, capability, installed, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(llm.importlib.util, "find_spec", lambda name: installed or None)
    problem = llm.float8_problem(torch.device("cuda"))
    assert problem is None if reason is None else re.search(reason, problem)


def test_four_bit_layers_cannot_be_float8():
    with pytest.raises(ValueError, match="holds in 4 bit; use lora, or bf16-mixed"):
        tiny.settings("fp8", adapter="qlora")

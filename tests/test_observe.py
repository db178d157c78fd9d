"""The observer: dtypes and operators as they really ran, phases that add up, counts."""

import time
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from core.loop import autocast, float32_products
from core.observe import Observer, Step, kernel_names, parameter_dtypes

CPU = torch.device("cpu")


class Backbone(nn.Module):
    """Three products of linear layers and one fused or spelled-out attention."""

    def __init__(self, fused: bool = True, deaf: bool = False):
        super().__init__()
        self.biased, self.plain = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.out = nn.Linear(8, 8)
        self.fused, self.deaf = fused, deaf

    def forward(self, hidden_BLD):
        with torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu") and not self.deaf):
            query, key = self.biased(hidden_BLD)[:, None], self.plain(hidden_BLD)[:, None]
            if self.fused:
                mixed = F.scaled_dot_product_attention(query, key, query)
            else:
                mixed = (query @ key.transpose(-1, -2)).softmax(-1) @ query
            return self.out(mixed[:, 0]).float()


def observed(precision="fp32", mode=torch.enable_grad, **kind) -> dict:
    """Facts of one step: a product before the backbone, the backbone, a product behind it."""
    torch.manual_seed(0)
    model, head, observer = Backbone(**kind), nn.Linear(8, 4), Observer()
    inputs = torch.randn(2, 5, 8)
    with mode(), observer.first_step(), autocast(precision, CPU):
        hidden = inputs @ torch.eye(8)
        with observer.backbone():
            hidden = model(hidden.float())
        loss = head(hidden).float().square().mean()
        if loss.requires_grad:
            loss.backward()
    return observer.facts


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", "float32"), ("bf16-mixed", "bfloat16"), ("fp16-mixed", "float16")],
)
def test_products_of_the_backbone_are_counted_in_the_dtype_that_ran(precision, dtype, mode):
    """Inference mode too, where linear layers reach the census whole."""
    facts = observed(precision, mode)
    assert facts["gemm_dtypes"] == {dtype: 3}
    assert facts["attention_ops"] == {"scaled_dot_product_attention": 1}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_a_model_that_ignores_autocast_is_found_out(mode):
    assert observed("bf16-mixed", mode, deaf=True)["gemm_dtypes"] == {"float32": 3}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_spelled_out_attention_is_told_from_fused(mode):
    facts = observed(mode=mode, fused=False)
    assert facts["attention_ops"] == {"_softmax": 1}
    assert facts["gemm_dtypes"] == {"float32": 5}, "the two products of attention are products"


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_products_with_packed_weights_count_in_the_dtype_of_their_other_factor(mode):
    layer = bnb.nn.Linear4bit(64, 8, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    layer.support_avx512bf16_for_cpu = False
    observer = Observer()
    with mode(), observer.first_step(), observer.backbone():
        layer(torch.randn(2, 64))
    assert observer.facts["gemm_dtypes"] == {"bfloat16": 1}


@pytest.mark.parametrize(("precision", "seen"), [("tf32", "high"), ("fp32", "highest")])
def test_how_fp32_products_are_computed_is_read_inside_the_step(precision, seen):
    observer = Observer()
    with float32_products(precision), observer.first_step():
        pass
    assert torch.get_float32_matmul_precision() == "highest"
    assert observer.facts["float32_matmul_precision"] == seen


# ---- what the backbone is given ----


def watched() -> tuple[nn.Module, Observer]:
    class Given(nn.Module):
        def forward(self, inputs_embeds, attention_mask=None, past_key_values=None):
            return inputs_embeds

    model, observer = Given(), Observer()
    model.register_forward_pre_hook(observer.backbone_call, with_kwargs=True)
    return model, observer


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("masked", [False, True])
def test_what_the_backbone_is_given_is_seen_in_the_observed_step(mode, masked):
    model, observer = watched()
    mask = torch.ones(2, 3, dtype=torch.int64) if masked else None
    with mode(), observer.first_step(), observer.backbone():
        model(inputs_embeds=torch.zeros(2, 3, 4, dtype=torch.bfloat16), attention_mask=mask)
    with observer.backbone():  # a later step with other shapes
        model(inputs_embeds=torch.zeros(9, 9, 9))
    facts = observer.facts
    assert facts["inputs_embeds"] == {"shape": [2, 3, 4], "dtype": "bfloat16"}
    assert facts["attention_mask"] == ({"shape": [2, 3], "dtype": "int64"} if masked else None)
    assert facts["grad_enabled"] == (mode is torch.enable_grad)


def test_a_cache_that_is_read_by_any_later_forward_is_noticed():
    model, observer = watched()
    observer.probes["cache"] = lambda: {"written_bytes": 8, "read": observer.cache_read}
    with observer.first_step(), observer.backbone():
        model(inputs_embeds=torch.zeros(1))
    assert observer.facts["cache"]["read"] is False
    model(inputs_embeds=torch.zeros(1), past_key_values=object())
    assert observer.facts["cache"]["read"] is True


def test_a_cache_that_is_read_within_the_observed_step_is_noticed():
    model, observer = watched()
    observer.probes["cache"] = lambda: {"written_bytes": 8, "read": observer.cache_read}
    with observer.first_step(), observer.backbone():
        model(inputs_embeds=torch.zeros(1), past_key_values=object())
    assert observer.facts["cache"]["read"] is True


# ---- kernels ----


def event(name: str, device: DeviceType = DeviceType.CUDA, annotation: bool = False):
    return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation)


def test_kernels_are_told_from_everything_else_a_profiler_records():
    recorded = [
        event("aten::mm", DeviceType.CPU),
        event("cudaLaunchKernel", DeviceType.CPU),
        event("sm90_xmma_gemm_bf16bf16_bf16f32"),
        event("void flash_fwd_kernel<...>"),
        event("sm90_xmma_gemm_bf16bf16_bf16f32"),
        event("Memcpy HtoD (Pageable -> Device)"),
        event("Memset (Device)"),
        event("Optimizer.step#AdamW.step", annotation=True),
    ]
    assert kernel_names(recorded) == [
        "sm90_xmma_gemm_bf16bf16_bf16f32",
        "void flash_fwd_kernel<...>",
    ]


def test_a_real_profile_of_the_cpu_holds_no_kernel():
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.randn(4, 4) @ torch.randn(4, 4)
    assert len(profiler.events()) > 0
    assert kernel_names(profiler.events()) == []
    assert "gpu_kernels" not in observed()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "part"), [(torch.bfloat16, "bf16"), (torch.float32, "f32")])
def test_on_a_gpu_the_kernels_of_the_observed_step_alone_are_named(dtype, part):
    observer = Observer()
    observer.facts["device"] = "cuda:0"
    factor = torch.randn(512, 512, device="cuda", dtype=dtype)
    with observer.first_step():
        factor @ factor
    first = observer.facts["gpu_kernels"]
    assert any("gemm" in name.lower() for name in first)
    assert any(part in name or "sgemm" in name for name in first)
    with observer.first_step():
        factor.exp()
    assert observer.facts["gpu_kernels"] == first


def test_only_gradients_save_bytes():
    training, mixed = observed(), observed("bf16-mixed")
    assert training["saved_bytes"] > mixed["saved_bytes"] > 0
    assert observed(mode=torch.no_grad)["saved_bytes"] == 0
    assert observed(mode=torch.inference_mode)["saved_bytes"] == 0


def test_training_runs_more_operators_than_inference():
    assert observed()["operators"] > observed(mode=torch.no_grad)["operators"] > 0


def test_saved_bytes_are_those_of_one_known_operator():
    observer = Observer()
    with observer.first_step():
        torch.ones(10, requires_grad=True).exp()  # keeps its result: 10 floats
    assert observer.facts["saved_bytes"] == 40


def test_recomputation_saves_less_and_runs_more():
    def step(layer) -> dict:
        observer = Observer()
        with observer.first_step():
            layer(torch.randn(4, 8)).sum().backward()
        return observer.facts

    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
    plain = step(model)
    cheap = step(lambda x: checkpoint(model, x, use_reentrant=False))
    assert cheap["saved_bytes"] < plain["saved_bytes"]
    assert cheap["operators"] > plain["operators"]


def test_only_the_first_step_is_observed_and_probes_are_read_at_its_end():
    observer, read = Observer(), []
    observer.probes["reads"] = lambda: read.append("probe") or len(read)
    for size in (4, 400):
        with observer.first_step():
            read.append("step")
            torch.randn(size, 4) @ torch.randn(4, 4)
    assert read == ["step", "probe", "step"]
    assert observer.facts["reads"] == 2
    operators = observer.facts["operators"]
    with observer.first_step():
        torch.randn(4).exp()
    assert observer.facts["operators"] == operators
    assert list(observer.phases) == ["observed_step"]


def test_nothing_is_counted_for_a_backbone_outside_the_observed_step():
    observer = Observer()
    with observer.backbone():
        Backbone()(torch.randn(1, 2, 8))
    with observer.first_step():
        pass
    assert observer.facts["gemm_dtypes"] == {}


def test_a_failed_first_step_leaves_no_fact():
    observer = Observer()
    with pytest.raises(ZeroDivisionError), observer.first_step():
        raise ZeroDivisionError
    assert "operators" not in observer.facts


class Clock:
    """Time that passes only when told."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


trees = st.recursive(
    st.just([]),
    lambda inner: st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), inner), max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(tree=trees)
def test_phases_add_up_and_none_is_counted_twice(tree):
    """Time of a phase inside another, even of the same name, belongs to the inner one alone."""
    with pytest.MonkeyPatch.context() as patch:
        clock, observer, own = Clock(patch), Observer(), {}

        def enter(phases) -> None:
            for name, seconds, inner in phases:
                with observer.phase(name):
                    clock.now += seconds
                    own[name] = own.get(name, 0) + seconds
                    enter(inner)
                    clock.now += 0.5
                    own[name] += 0.5

        enter(tree)
    assert dict(observer.phases) == own
    assert sum(observer.phases.values()) == clock.now


def test_the_harness_hears_a_phase_begin_and_its_surroundings_return():
    heard = []
    observer = Observer(on_phase=heard.append)
    with observer.phase("train_steps"), observer.phase("validation"):
        pass
    assert heard == ["train_steps", "validation", "train_steps"]


def test_a_phase_that_fails_is_still_timed(monkeypatch):
    clock, observer = Clock(monkeypatch), Observer()
    with pytest.raises(ZeroDivisionError), observer.phase("outer"), observer.phase("inner"):
        clock.now += 2.0
        raise ZeroDivisionError
    assert dict(observer.phases) == {"inner": 2.0, "outer": 0.0}


def test_steps_are_counted_and_passed_on():
    heard = []
    observer = Observer(heard.append)
    observer.step(3, 10, 12, loss=torch.tensor(1.5, requires_grad=True))
    observer.step(2, 8, 8, optimizer_step=True, loss=torch.tensor(0.5))
    observer.step(4)
    assert heard == [Step(3, 10, 12, False), Step(2, 8, 8, True), Step(4, 0, 0, False)]
    assert observer.counts == {
        "micro_batches": 3,
        "optimizer_steps": 1,
        "rows": 9,
        "tokens": 18,
        "padded_tokens": 20,
    }
    assert observer.loss_trace() == [1.5, 0.5]
    assert not observer.losses[0].requires_grad


def test_the_largest_value_seen_is_the_fact():
    observer = Observer()
    for value in (3, 7, 5):
        observer.largest("largest_batch", value)
    assert observer.facts == {"largest_batch": 7}


def test_parameter_dtypes_tell_trained_from_frozen():
    model = nn.ModuleDict({"base": nn.Linear(2, 2).bfloat16(), "new": nn.Linear(2, 2)})
    model["base"].requires_grad_(False)
    model["base"].bias.requires_grad_(True)
    assert parameter_dtypes(model) == {
        "trainable": {"float32": 2, "bfloat16": 1},
        "frozen": {"bfloat16": 1},
    }

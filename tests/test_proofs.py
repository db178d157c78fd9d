"""Every proof holds on facts that agree and fails on a setting broken on purpose."""

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.proofs import PROOFS, check, facts_of
from bench.proving.differences import (
    EXPECTED_EFFECTS,
    EXPECTED_FACTS,
    no_effect,
    second_differences,
)

BF16_MIXED = {
    "gemm_dtypes": {"bfloat16": 40, "float32": 1},
    "autocast_dtype": "bfloat16",
    "param_dtypes": {"trainable": {"float32": 9}, "frozen": {"bfloat16": 30, "uint8": 8}},
}
BF16_TRUE = BF16_MIXED | {"autocast_dtype": None}
FP8 = BF16_MIXED | {
    "gemm_dtypes": {"float8_e4m3fn": 12, "bfloat16": 8},
    "layers_float8": 12,
    "layers_adapted": 4,
}
FP16_MIXED = {
    "gemm_dtypes": {"float16": 40, "float32": 1},
    "autocast_dtype": "float16",
    "param_dtypes": {"trainable": {"float32": 9}, "frozen": {"float16": 30}},
}
FP16_TRUE = FP16_MIXED | {"autocast_dtype": None}
FP32 = {
    "gemm_dtypes": {"float32": 41},
    "autocast_dtype": None,
    "float32_matmul_precision": "highest",
}
TF32 = FP32 | {"float32_matmul_precision": "high"}
# As cuBLAS and CUTLASS name them on Ampere and Hopper.
SIMT = ["ampere_sgemm_128x64_tn", "void softmax_warp_forward<float, float, float, 2>"]
TENSOR = ["sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x32_cublas"]
CUTLASS_TF32 = ["cutlass_80_tensorop_s1688gemm_128x128_16x5_tn_align4"]
CUTLASS_BF16 = ["cutlass_75_tensorop_bf16_s1688gemm_bf16_256x128_nn_align1", *SIMT]
ADAPTER = {"layers_adapted": 4, "layers_4bit": 0, "gate_calls": 4, "frozen_bytes": 1 << 20}
QUANT = {"quant_type": "nf4", "double": False, "compute_dtype": "bfloat16"}
QLORA = ADAPTER | {"layers_4bit": 14}
QLORA_BF16 = BF16_MIXED | QLORA | {"quant": QUANT}
EAGER = {"attention_ops": {"_softmax": 2}, "attn_implementation": "eager"}
SDPA = {"attention_ops": {"scaled_dot_product_attention": 2}, "attn_implementation": "sdpa"}
FLASH = {"attention_ops": {"flash_attn": 2}, "attn_implementation": "flash_attention_2"}
# torch's own copy of the kernels, which the student's attention runs in every cell.
TORCH_FLASH = ["void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>"]
FLASH_ATTN = ["void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64>>", *TORCH_FLASH]
ONCE = {"checkpoint_calls": {"forward": 1, "after_backward": 1}}
TWICE = {"checkpoint_calls": {"forward": 1, "after_backward": 2}}
STEPS = {"micro_batches": 10, "optimizer_steps": 3, "longest_group": 4}
UNCOMPILED = {"compile": {"mode": "off", "graphs": 0}}
GRAPHS = {"mode": "regional", "graphs": 2, "breaks": 1, "recompiles": 1, "limit_reached": False}
GRAPHS |= {"compiled_calls": 40, "eager_calls": 0}
LAUNCHED = {"id": "3f", "image": "cu118", "digest": "sha256:0123456789abcdef", "engine": "podman"}
IN_CU118 = {
    "image": "cu118",
    "torch_cuda": "11.8",
    "container": {"id": "3f", "engine": "podman"},
    "launched": LAUNCHED,
}
ALONE = {"world_size": 1, "backend": None, "strategy": "SingleDeviceStrategy"}
TWO_RANKS = {"world_size": 2, "backend": "gloo", "strategy": "DDPStrategy"}
SHARDED = TWO_RANKS | {
    "strategy": "Sharded",
    "frozen_here": {"bytes": 5 << 20, "whole_bytes": 8 << 20},
}
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "", "expandable_segments": True, "max_split_size": -1}


# setting, value, facts that agree, then facts of a setting that did not reach the model.
def gates(**seen: int) -> dict[str, Any]:
    """Sixteen prompts with a gate each on all tokens, but for what is given."""
    usual = {"prompts": 16, "answers": 16, "tokens": 900, "gated_tokens": 900, "gates": 16}
    return {"gate_use": usual | seen}


def batches(rows: int = 16, inside: float = 0.0) -> dict[str, Any]:
    """Five batches of sixteen prompts, and how much of a variance of 0.2 lies inside them."""
    return gates() | {
        "inputs_embeds": {"shape": [rows, 80, 128], "dtype": "float32"},
        "attention_mask": {"shape": [rows, 1, 80, 80], "dtype": "bool"} if rows < 16 else None,
        "batch_shapes": 5 if rows == 16 else 1,
        "prompt_batches": 5,
        "length_variance": {"all": 0.2, "inside": inside},
    }


CASES = [
    ("train.precision", "fp32", FP32, BF16_MIXED | FP32 | {"autocast_dtype": "bfloat16"}),
    ("train.precision", "fp32", FP32, FP32 | {"gemm_dtypes": {"float32": 40, "bfloat16": 1}}),
    ("train.precision", "fp32", FP32, TF32),
    ("train.precision", "fp32", FP32 | {"gpu_kernels": SIMT}, FP32 | {"gpu_kernels": TENSOR}),
    ("train.precision", "fp32", FP32 | {"gpu_kernels": CUTLASS_BF16}, TF32),
    (
        "train.precision",
        "fp32",
        FP32,
        FP32 | {"param_dtypes": {"trainable": {}, "frozen": {"bfloat16": 30}}},
    ),
    ("train.precision", "tf32", TF32, FP32),
    ("train.precision", "tf32", TF32, TF32 | {"gemm_dtypes": {"bfloat16": 41}}),
    ("train.precision", "tf32", TF32 | {"gpu_kernels": TENSOR}, TF32 | {"gpu_kernels": SIMT}),
    (
        "train.precision",
        "tf32",
        TF32 | {"gpu_kernels": CUTLASS_TF32},
        TF32 | {"gpu_kernels": CUTLASS_BF16},
    ),
    # cuBLAS's newest kernels bear no operand type, and have tensor cores alone.
    ("train.precision", "tf32", TF32 | {"gpu_kernels": ["nvjet_sm90_sst_64x8"]}, FP32),
    ("train.precision", "bf16-mixed", BF16_MIXED, FP32),
    ("train.precision", "bf16-mixed", BF16_MIXED, BF16_TRUE),
    (
        "train.precision",
        "bf16-mixed",
        BF16_MIXED,
        BF16_MIXED | {"gemm_dtypes": {"bfloat16": 22, "float32": 3}},
    ),
    (
        "train.precision",
        "bf16-mixed",
        BF16_MIXED,
        BF16_MIXED | {"param_dtypes": {"trainable": {"bfloat16": 9}, "frozen": {}}},
    ),
    (
        "train.precision",
        "bf16-mixed",
        QLORA_BF16,
        QLORA_BF16 | {"quant": QUANT | {"compute_dtype": "float32"}},
    ),
    ("train.precision", "bf16-true", BF16_TRUE, BF16_MIXED),
    ("train.precision", "fp8", FP8, BF16_MIXED | {"layers_float8": 0, "layers_adapted": 4}),
    ("train.precision", "fp8", FP8, FP8 | {"layers_float8": 13}),
    ("train.precision", "fp8", FP8, FP8 | {"layers_float8": 3, "layers_adapted": 4}),
    ("train.precision", "fp8", FP8, FP8 | {"gemm_dtypes": {"float32": 12, "bfloat16": 8}}),
    ("train.precision", "fp8", FP8, FP8 | {"gemm_dtypes": {"float8_e4m3fn": 12, "float16": 8}}),
    ("train.precision", "fp8", FP8, FP8 | {"autocast_dtype": None}),
    (
        "train.precision",
        "bf16-true",
        BF16_TRUE,
        BF16_TRUE | {"param_dtypes": {"trainable": {}, "frozen": {"float32": 30}}},
    ),
    ("train.precision", "fp16-mixed", FP16_MIXED, BF16_MIXED),
    ("train.precision", "fp16-mixed", FP16_MIXED, FP16_TRUE),
    ("train.precision", "fp16-true", FP16_TRUE, FP16_MIXED),
    ("train.precision", "fp16-true", FP16_TRUE, BF16_TRUE),
    (
        "train.precision",
        "fp16-true",
        FP16_TRUE,
        FP16_TRUE | {"param_dtypes": {"trainable": {}, "frozen": {"float32": 30}}},
    ),
    ("teacher.adapter", "lora", ADAPTER, QLORA),
    ("teacher.adapter", "lora", ADAPTER, ADAPTER | {"gate_calls": 3}),
    ("teacher.adapter", "qlora", QLORA, ADAPTER),
    ("teacher.adapter", "qlora", QLORA, QLORA | {"layers_4bit": 3}),
    ("teacher.adapter", "qlora", QLORA, QLORA | {"adapted_4bit": 3}),
    ("teacher.adapter", "qlora", QLORA, QLORA | {"layers_adapted": 0, "gate_calls": 0}),
    (
        "teacher.bnb_4bit_use_double_quant",
        True,
        {"quant": QUANT | {"double": True}},
        {"quant": QUANT},
    ),
    ("teacher.bnb_4bit_use_double_quant", True, {"quant": QUANT | {"double": True}}, ADAPTER),
    (
        "teacher.bnb_4bit_use_double_quant",
        False,
        {"quant": QUANT},
        {"quant": QUANT | {"double": "mixed"}},
    ),
    ("teacher.bnb_4bit_use_double_quant", False, ADAPTER, {"quant": QUANT | {"double": True}}),
    ("teacher.attn", "eager", EAGER, SDPA),
    ("teacher.attn", "eager", EAGER | {"gpu_kernels": TORCH_FLASH}, SDPA),
    ("teacher.attn", "sdpa", SDPA, EAGER),
    # A configuration that claims the kernel, while the operators show the fallback.
    ("teacher.attn", "sdpa", SDPA, EAGER | {"attn_implementation": "sdpa"}),
    (
        "teacher.attn",
        "sdpa",
        SDPA,
        SDPA | {"attention_ops": {"scaled_dot_product_attention": 1, "_softmax": 1}},
    ),
    (
        "teacher.attn",
        "sdpa",
        SDPA | {"gpu_kernels": TORCH_FLASH},
        SDPA | {"gpu_kernels": FLASH_ATTN},
    ),
    ("teacher.attn", "flash_attention_2", FLASH, SDPA),
    # Kernels decide: an older flash-attn registers no operator, a wrapper may name one in vain.
    (
        "teacher.attn",
        "flash_attention_2",
        {"gpu_kernels": FLASH_ATTN},
        FLASH | {"gpu_kernels": TORCH_FLASH},
    ),
    ("teacher.mode", "instance", gates(), gates(gates=40, answers=90)),
    ("teacher.mode", "instance", gates(), gates(gated_tokens=100)),
    ("teacher.mode", "causal", gates(gates=40, answers=90), gates()),
    ("teacher.mode", "causal", gates(gates=40), gates(gates=40, gated_tokens=100)),
    ("teacher.mode", "tail", gates(gates=40, gated_tokens=100), gates(gates=40)),
    ("data.batching", "grouped", batches(inside=0.02), batches(inside=0.19)),
    ("data.batching", "grouped", batches(inside=0.02), batches(rows=2)),
    ("data.batching", "padded", batches(inside=0.19), batches(inside=0.02)),
    ("data.batching", "packed", batches(rows=2), batches(inside=0.02)),
    # Several prompts in a row that nothing keeps apart.
    ("data.batching", "packed", batches(rows=2), batches(rows=2) | {"attention_mask": None}),
    ("teacher.gradient_checkpointing", True, TWICE, ONCE),
    ("teacher.gradient_checkpointing", False, ONCE, TWICE),
    ("teacher.gradient_checkpointing", None, ONCE, TWICE),
    ("teacher.use_cache", True, {"cache": {"written_bytes": 9, "read": False}}, {"cache": None}),
    ("teacher.use_cache", True, {"cache": {"written_bytes": 9}}, {"cache": {"written_bytes": 0}}),
    ("teacher.use_cache", False, {"cache": None}, {"cache": {"written_bytes": 9, "read": True}}),
    ("train.compile", "off", UNCOMPILED, {"compile": GRAPHS}),
    ("train.compile", "regional", {"compile": GRAPHS}, UNCOMPILED),
    ("train.compile", "regional", {"compile": GRAPHS}, {"compile": GRAPHS | {"graphs": 0}}),
    (
        "train.compile",
        "regional",
        {"compile": GRAPHS},
        {"compile": GRAPHS | {"limit_reached": True}},
    ),
    ("train.compile", "regional", {"compile": GRAPHS}, {"compile": GRAPHS | {"eager_calls": 9}}),
    ("train.compile", "regional", {"compile": GRAPHS}, {"compile": GRAPHS | {"compiled_calls": 0}}),
    (
        "train.compile",
        "whole",
        {"compile": GRAPHS | {"mode": "whole"}},
        {"compile": GRAPHS},
    ),
    ("train.num_workers", 2, {"loader_workers": 2}, {"loader_workers": 0}),
    ("train.num_workers", 0, {"loader_workers": 0}, {"loader_workers": 1}),
    ("train.accumulate_grad_batches", 4, STEPS, STEPS | {"optimizer_steps": 10}),
    ("train.accumulate_grad_batches", 4, STEPS, STEPS | {"longest_group": 2}),
    # Where compiling took steps off the clock, every group may look shorter, none longer.
    (
        "train.accumulate_grad_batches",
        4,
        STEPS | {"longest_group": 3, "unclocked": 2},
        STEPS | {"longest_group": 5, "unclocked": 2},
    ),
    (
        "train.accumulate_grad_batches",
        1,
        {"micro_batches": 10, "optimizer_steps": 10},
        {"micro_batches": 10, "optimizer_steps": 9},
    ),
    ("teacher.inference_batch_size", 64, {"largest_batch": 64, "rows": 99}, {"largest_batch": 32}),
    ("teacher.inference_batch_size", 64, {"largest_batch": 50, "rows": 50}, {"largest_batch": 65}),
    ("train.batch_size", 64, {"largest_train_batch": 64}, {"largest_train_batch": 32}),
    # Two processes, each with half of the rows.
    (
        "train.batch_size",
        9,
        {"largest_train_batch": 5, "world_size": 2},
        {"largest_train_batch": 9, "world_size": 2},
    ),
    ("train.trainer", "loop", {"trainer": "loop"}, {"trainer": "lightning"}),
    (
        "train.trainer",
        "loop",
        {"trainer": "loop", "lightning_imported": False},
        {"trainer": "loop", "lightning_imported": True},
    ),
    (
        "train.trainer",
        "lightning",
        {"trainer": "lightning", "lightning_imported": True},
        {"trainer": "loop"},
    ),
    ("train.devices", 1, {"world_size": 1}, TWO_RANKS),
    ("train.devices", 2, TWO_RANKS, {"world_size": 1}),
    # Two processes that never met train two models.
    ("train.devices", 2, TWO_RANKS, TWO_RANKS | {"backend": None}),
    (
        "train.devices",
        "auto",
        TWO_RANKS | {"visible_devices": 2},
        TWO_RANKS | {"visible_devices": 4},
    ),
    ("train.strategy", "auto", ALONE, ALONE | {"strategy": "DDPStrategy"}),
    ("train.strategy", "auto", TWO_RANKS, TWO_RANKS | {"strategy": "SingleDeviceStrategy"}),
    ("train.strategy", "ddp", TWO_RANKS, TWO_RANKS | {"strategy": "Sharded"}),
    ("train.strategy", "fsdp", SHARDED, TWO_RANKS | {"frozen_here": SHARDED["frozen_here"]}),
    (
        "train.strategy",
        "fsdp",
        SHARDED,
        SHARDED | {"frozen_here": {"bytes": 8 << 20, "whole_bytes": 8 << 20}},
    ),
    ("machine.image", "cu118", IN_CU118, {"image": "host"}),
    ("machine.image", "cu118", IN_CU118, IN_CU118 | {"launched": {}}),
    ("machine.image", "cu118", IN_CU118, IN_CU118 | {"container": {"id": "another"}}),
    # A second environment inside the image: the name is right, the image's CUDA never ran.
    ("machine.image", "cu118", IN_CU118, IN_CU118 | {"torch_cuda": "12.8"}),
    (
        "machine.image",
        "my/bench:7",
        IN_CU118 | {"image": "unnamed", "launched": LAUNCHED | {"image": "my/bench:7"}},
        IN_CU118,
    ),
    ("machine.image", "host", {"image": "host"}, {"image": "cu121"}),
    ("machine.image", "host", {"image": "unnamed"}, IN_CU118 | {"image": "host"}),
    (
        "machine.allocator_conf",
        "expandable_segments:True",
        {"allocator_settings": EXPANDABLE},
        {"allocator_settings": EXPANDABLE | {"expandable_segments": False}},
    ),
    # The variable of another name was set: the allocator never read it.
    (
        "machine.allocator_conf",
        "max_split_size_mb:128, garbage_collection_threshold:0.80",
        {
            "allocator_settings": {
                "max_split_size": 128 * 2**20,
                "garbage_collection_threshold": 0.8,
            }
        },
        {"allocator_settings": EXPANDABLE | {"garbage_collection_threshold": 0.8}},
    ),
    (
        "machine.allocator_conf",
        "roundup_power2_divisions:[256:1,512:2],backend:native",
        {"allocator_settings": "roundup_power2_divisions:[256:1,512:2],backend:native"},
        {"allocator_settings": "roundup_power2_divisions:[256:1,512:4],backend:native"},
    ),
    (
        "machine.env",
        ("A=1", "B=x=y"),
        {"env": {"A": "1", "B": "x=y"}},
        {"env": {"A": "1", "B": ""}},
    ),
    ("machine.env", ("A=1",), {"env": {"A": "1", "B": None}}, {"env": {"A": None}}),
    ("machine.env", (), {"env": {"A": None}}, {"env": {"A": "1"}}),
]


@pytest.mark.parametrize(("setting", "value", "agreeing", "broken"), CASES)
def test_proof_holds_and_breaks(setting, value, agreeing, broken):
    prove = PROOFS[setting].check
    assert prove(value, agreeing, {}).holds is True
    assert prove(value, broken, {}).holds is False


@pytest.mark.parametrize("setting", PROOFS)
def test_every_proof_is_broken_by_a_case_and_silence_is_unknown(setting):
    values = [case[1] for case in CASES if case[0] == setting]
    assert values
    for value in values:
        empty = {"gemm_dtypes": {}, "attention_ops": {}, "checkpoint_calls": {}, "gpu_kernels": []}
        assert PROOFS[setting].check(value, {}, {}).holds is None
        assert PROOFS[setting].check(value, empty, {}).holds is None


@pytest.mark.parametrize(
    ("setting", "value", "facts"),
    [
        ("train.precision", "fp32", {k: v for k, v in FP32.items() if "matmul" not in k}),
        ("train.precision", "tf32", {k: v for k, v in TF32.items() if "matmul" not in k}),
        ("train.precision", "tf32", TF32 | {"gpu_kernels": ["a_kernel_of_tomorrow"]}),
        ("train.precision", "bf16-mixed", BF16_MIXED | QLORA),
        ("train.precision", "fp8", {k: v for k, v in FP8.items() if k != "layers_float8"}),
        ("train.precision", "fp8", FP8 | {"gemm_dtypes": {}}),
        ("train.compile", "regional", {"compile": GRAPHS, "steady_steps": 0}),
        ("machine.env", ("A=1",), {"env": {}}),
        ("machine.image", "cu118", {k: v for k, v in IN_CU118.items() if k != "torch_cuda"}),
        ("machine.allocator_conf", None, {"allocator_settings": None}),
    ],
)
def test_half_of_what_a_proof_needs_proves_nothing(setting, value, facts):
    assert PROOFS[setting].check(value, facts, {}).holds is None


def test_every_precision_is_broken_by_every_other():
    facts = {
        "fp32": FP32,
        "tf32": TF32,
        "bf16-mixed": BF16_MIXED,
        "bf16-true": BF16_TRUE,
        "fp16-mixed": FP16_MIXED,
        "fp16-true": FP16_TRUE,
        "fp8": FP8,
    }
    for asked in facts:
        held = {
            ran for ran in facts if PROOFS["train.precision"].check(asked, facts[ran], {}).holds
        }
        assert held == {asked}


def test_checkpointing_left_to_peft_is_what_peft_does():
    """4-bit backbones are recomputed, and by nobody else."""

    def prove(adapter, **facts):
        settings = {"teacher": {"adapter": adapter}}
        return PROOFS["teacher.gradient_checkpointing"].check(None, facts, settings)

    by_peft = prove("qlora", **TWICE, gradient_checkpointing_by="peft")
    assert by_peft.holds is True
    assert by_peft.observed == "1 after forward, 2 after backward, switched on by peft"
    assert prove("qlora", **TWICE, gradient_checkpointing_by="setting").holds is False
    assert prove("qlora", **ONCE, gradient_checkpointing_by=None).holds is False
    assert prove("qlora", **TWICE).holds is None
    assert prove("lora", **ONCE, gradient_checkpointing_by=None).holds is True
    assert prove("lora", **TWICE, gradient_checkpointing_by="peft").holds is False


def test_a_cache_nobody_reads_is_said_to_be_one():
    def observed(read):
        facts = {"cache": {"written_bytes": 3 << 20, "read": read}}
        return PROOFS["teacher.use_cache"].check(True, facts, {}).observed

    assert observed(False) == "3.0 MiB written, never read"
    assert observed(True) == "3.0 MiB written, read by a later forward"


def test_compilation_tells_breaks_with_reasons_and_recompiles():
    seen = GRAPHS | {"break_reasons": ["print in forward"], "limit_reached": True}
    found = PROOFS["train.compile"].check("regional", {"compile": seen}, {})
    assert found.observed == (
        "regional, 2 graphs, 1 break (print in forward), 1 recompile; "
        "limit of recompiles reached: later steps ran uncompiled; "
        "40 calls of compiled code, 0 of layers left as Python"
    )


def test_an_allocator_left_alone_shows_what_the_environment_set():
    prove = PROOFS["machine.allocator_conf"].check
    outside = prove(None, {"allocator_settings": "expandable_segments:True"}, {})
    assert (outside.holds, outside.observed) == (True, "expandable_segments:True")
    assert prove(None, {"allocator_settings": EXPANDABLE}, {}).observed == "no option set"


def test_autocast_is_inferred_from_float32_adapters_and_else_unknown():
    def prove(value, **change):
        facts = {k: v for k, v in BF16_MIXED.items() if k != "autocast_dtype"} | change
        return PROOFS["train.precision"].check(value, facts, {}).holds

    trained_low = {"trainable": {"bfloat16": 8, "float32": 4}, "frozen": {"bfloat16": 30}}
    assert prove("bf16-mixed") is True
    assert prove("bf16-true") is False
    assert prove("bf16-mixed", param_dtypes=trained_low) is False
    assert prove("bf16-true", param_dtypes=trained_low) is True
    assert prove("bf16-mixed", param_dtypes={}) is None
    assert prove("bf16-true", param_dtypes={}) is None


@given(
    epochs=st.integers(1, 5),
    length=st.integers(1, 30),
    n=st.integers(1, 8),
    other=st.integers(1, 8),
)
def test_accumulation_is_told_apart_over_epochs(epochs, length, n, other):
    """A last short group of each epoch is allowed, another group size is not."""
    steps = []
    for _ in range(epochs):
        steps += [(i + 1) % other == 0 or i + 1 == length for i in range(length)]
    record = {
        "counts": {"micro_batches": len(steps), "optimizer_steps": sum(steps)},
        # The first batch is observed, not timed.
        "steps": [{"optimizer_step": stepping} for stepping in steps[1:]],
    }
    settings = {"train": {"max_epochs": epochs}}
    found = PROOFS["train.accumulate_grad_batches"].check(n, facts_of(record), settings)
    if n == other and length >= n:
        assert found.holds is True
    elif length > n and length > other and any(steps[1:]) and other != n:
        assert found.holds is False


def record(stage="teacher_fit", status="ok", **facts):
    return {"stage": stage, "status": status, "facts": facts, "counts": {}, "steps": []}


def test_one_contradicting_repeat_decides_and_silent_repeats_do_not():
    good, bad, silent = record(loader_workers=2), record(loader_workers=0), record()
    failed = record(status="error", loader_workers=0)
    asked = {"train.num_workers": 2}

    def holds(*records):
        return [row.holds for row in check(asked, records)]

    assert holds(good, silent, good) == [True]
    assert holds(good, good, bad) == [False]
    assert holds(silent, silent) == [None]
    assert holds(good, failed) == [True]


def test_a_setting_is_proven_only_where_it_acts_and_an_unknown_one_everywhere():
    records = [record("teacher_fit", trainer="loop"), record("teacher_outputs")]
    rows = check({"train.trainer": "loop", "data.seed": 3}, records)
    assert [(row.setting, row.stage, row.holds) for row in rows] == [
        ("train.trainer", "teacher_fit", True),
        ("data.seed", "teacher_fit", None),
        ("data.seed", "teacher_outputs", None),
    ]


def test_second_differences_leave_out_what_the_axis_explains():
    baseline = record(**FP32, **ADAPTER, device="cuda:0")
    cell = record(**BF16_MIXED, **ADAPTER, device="cuda:0")
    assert second_differences(["train.precision"], cell, baseline) == []
    assert second_differences(["train.num_workers"], cell, baseline) == [
        "autocast_dtype: bfloat16, baseline none",
        "matrix products in bfloat16 + float32, baseline float32",
    ]


def weights(frozen):
    return {"param_dtypes": {"trainable": {"float32": 9}, "frozen": frozen}}


def test_what_peft_adds_to_4_bit_are_second_differences():
    """QLoRA against LoRA with checkpointing left to peft: recomputed, and norms held in float32."""
    baseline = record(
        **ADAPTER, **ONCE, **weights({"bfloat16": 30}), gradient_checkpointing_by=None
    )
    kept, upcast = {"bfloat16": 22, "uint8": 8}, {"float32": 22, "uint8": 8}
    cell = record(**QLORA, **TWICE, **weights(upcast), gradient_checkpointing_by="peft")
    assert second_differences(["teacher.adapter"], cell, baseline) == [
        "gradient checkpointing (switched on by peft): each layer runs ×2, baseline ×1",
        "frozen weights that are not packed held in float32, baseline bfloat16",
    ]
    equalised = record(**QLORA, **ONCE, **weights(kept), gradient_checkpointing_by=None)
    assert second_differences(["teacher.adapter"], equalised, baseline) == []
    twice_as_many = record(checkpoint_calls={"forward": 2, "after_backward": 2})
    assert second_differences(["teacher.adapter"], twice_as_many, baseline) == []


def test_a_compared_group_differs_by_its_parts():
    baseline = record(quant=QUANT, cache=None, compile=UNCOMPILED["compile"])
    cell = record(quant=QUANT | {"double": True}, cache={"written_bytes": 9}, compile=GRAPHS)
    assert second_differences(["teacher.adapter"], cell, baseline) == [
        "keys and values kept: yes, baseline none",
        "compilation: regional, baseline off",
        "constants of 4-bit blocks quantised: True, baseline False",
    ]
    explained = ["teacher.bnb_4bit_use_double_quant", "teacher.use_cache", "train.compile"]
    assert second_differences(explained, cell, baseline) == []


def test_shapes_follow_the_first_batch():
    def given(length, mask):
        return record(
            inputs_embeds={"shape": [8, length, 64], "dtype": "float32"}, attention_mask=mask
        )

    cell, baseline = given(40, None), given(32, {"shape": [8, 32], "dtype": "bool"})
    assert second_differences(["train.num_workers"], cell, baseline) == [
        "attention mask given: none, baseline yes",
        "inputs of the backbone of shape [8, 40, 64], baseline [8, 32, 64]",
    ]
    for setting in ("train.batch_size", "data.source", "seed", "teacher.max_history"):
        assert second_differences([setting], cell, baseline) == []


def test_what_only_one_process_has_is_no_difference():
    cell = record(container={"id": "a"}, gpu_kernels=["x"], quant=QUANT)
    baseline = record(container={"id": "b"}, gpu_kernels=["y"])
    assert second_differences([], cell, baseline) == []


def test_expected_tables_speak_of_settings_that_exist(all_settings):
    assert {*PROOFS, *EXPECTED_FACTS, *EXPECTED_EFFECTS} <= all_settings


@pytest.fixture
def all_settings():
    from core.config import leaves
    from core.settings import Settings

    return set(leaves(Settings))


def measured(losses, allocated, reserved=0, stage="teacher_fit", device="cuda:0"):
    memory = {"torch_allocated_peak_bytes": allocated, "torch_reserved_peak_bytes": reserved}
    return record(stage, device=device) | {"losses": losses, "memory": memory}


SAME = measured([1.0, 0.5], 100, 200)
LOSS, PEAK, RESERVED = "loss trace", "peak of allocated memory", "peak of reserved memory"


@pytest.mark.parametrize(
    ("setting", "change", "suspicious"),
    [
        ("train.precision", ("fp32", "bf16-mixed"), [LOSS, PEAK]),
        # TF32 rounds products and stores all in float32.
        ("train.precision", ("fp32", "tf32"), [LOSS]),
        ("train.precision", ("bf16-mixed", "fp16-mixed"), [LOSS]),
        ("teacher.bnb_4bit_use_double_quant", (False, True), [LOSS, PEAK]),
        ("teacher.gradient_checkpointing", (False, True), [PEAK]),
        # peft may decide as the baseline did.
        ("teacher.gradient_checkpointing", (False, None), []),
        ("machine.allocator_conf", (None, "expandable_segments:True"), [RESERVED]),
        # Accumulation rightly leaves the peak alone, loader workers and compiling everything.
        ("train.accumulate_grad_batches", (1, 4), [LOSS]),
        ("train.num_workers", (0, 4), []),
        ("train.compile", ("off", "whole"), []),
    ],
)
def test_no_effect_is_suspected_only_where_an_effect_must_show(setting, change, suspicious):
    assert no_effect({setting: change}, SAME, SAME) == suspicious
    assert no_effect({setting: change}, measured([1.0, 0.4], 101, 201), SAME) == []
    absent = measured([], {"unavailable": "no GPU"}, {"unavailable": "no GPU"})
    assert no_effect({setting: change}, absent, absent) == []


def test_a_cpu_need_not_round_to_tf32():
    on_cpu = measured([1.0], 0, device="cpu")
    assert no_effect({"train.precision": ("fp32", "tf32")}, on_cpu, on_cpu) == []


def test_a_cache_must_show_in_scoring_alone():
    for stage, expected in (("teacher_fit", []), ("teacher_test", [PEAK])):
        one = measured([], 100, stage=stage)
        assert no_effect({"teacher.use_cache": (False, True)}, one, one) == expected


def test_steps_off_the_clock_are_counted():
    """Compiling takes its steps off the clock; which groups they belonged to is not known."""
    steps = [{"optimizer_step": stepping} for stepping in (False, True, False, False, True)]
    counts = {"micro_batches": 9, "optimizer_steps": 3}
    facts = facts_of({"counts": counts, "steps": steps, "warmup_steps": 2})
    assert (facts["unclocked"], facts["longest_group"], facts["steady_steps"]) == (4, 3, 3)
    assert PROOFS["train.accumulate_grad_batches"].check(3, facts, {}).holds is True


def test_proofs_load_without_torch():
    script = "import sys, bench.proofs, bench.proving.differences; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

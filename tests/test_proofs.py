"""Every proof holds on facts that agree and fails on a setting broken on purpose."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import proofs
from bench.proofs import PROOFS, check, facts_of, no_effect, second_differences

BF16_MIXED = {
    "gemm_dtypes": {"bfloat16": 40, "float32": 1},
    "autocast_dtype": "bfloat16",
    "param_dtypes": {"trainable": {"float32": 9}, "frozen": {"bfloat16": 30, "uint8": 8}},
}
BF16_TRUE = BF16_MIXED | {"autocast_dtype": None}
FP32 = {"gemm_dtypes": {"float32": 41}, "autocast_dtype": None}
ADAPTER = {"layers_adapted": 4, "layers_4bit": 0, "gate_calls": 4, "frozen_bytes": 1 << 20}
QLORA = ADAPTER | {"layers_4bit": 14}
EAGER = {"attention_ops": {"_softmax": 2}, "attn_implementation": "eager"}
SDPA = {"attention_ops": {"scaled_dot_product_attention": 2}, "attn_implementation": "sdpa"}
STEPS = {"micro_batches": 10, "optimizer_steps": 3, "longest_group": 4}

# setting, value, facts that agree, then facts of a setting that did not reach the model.
CASES = [
    ("train.precision", "fp32", FP32, BF16_MIXED),
    ("train.precision", "fp32", FP32, FP32 | {"gemm_dtypes": {"float32": 40, "bfloat16": 1}}),
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
    ("train.precision", "bf16-true", BF16_TRUE, BF16_MIXED),
    (
        "train.precision",
        "bf16-true",
        BF16_TRUE,
        BF16_TRUE | {"param_dtypes": {"trainable": {}, "frozen": {"float32": 30}}},
    ),
    (
        "train.precision",
        "fp16-mixed",
        BF16_MIXED | {"gemm_dtypes": {"float16": 40}, "autocast_dtype": "float16"},
        BF16_MIXED,
    ),
    ("teacher.adapter", "lora", ADAPTER, QLORA),
    ("teacher.adapter", "lora", ADAPTER, ADAPTER | {"gate_calls": 3}),
    ("teacher.adapter", "qlora", QLORA, ADAPTER),
    ("teacher.adapter", "qlora", QLORA, QLORA | {"layers_4bit": 3}),
    ("teacher.adapter", "qlora", QLORA, QLORA | {"adapted_4bit": 3}),
    ("teacher.adapter", "qlora", QLORA, QLORA | {"layers_adapted": 0, "gate_calls": 0}),
    ("teacher.attn", "eager", EAGER, SDPA),
    ("teacher.attn", "sdpa", SDPA, EAGER),
    # A configuration that claims the kernel, while the operators show the fallback.
    ("teacher.attn", "sdpa", SDPA, EAGER | {"attn_implementation": "sdpa"}),
    (
        "teacher.attn",
        "sdpa",
        SDPA,
        SDPA | {"attention_ops": {"scaled_dot_product_attention": 1, "_softmax": 1}},
    ),
    ("teacher.attn", "flash_attention_2", {"attention_ops": {"flash_attn": 2}}, SDPA),
    (
        "teacher.gradient_checkpointing",
        True,
        {"checkpoint_calls": {"forward": 1, "after_backward": 2}},
        {"checkpoint_calls": {"forward": 1, "after_backward": 1}},
    ),
    (
        "teacher.gradient_checkpointing",
        False,
        {"checkpoint_calls": {"forward": 1, "after_backward": 1}},
        {"checkpoint_calls": {"forward": 1, "after_backward": 2}},
    ),
    ("train.num_workers", 2, {"loader_workers": 2}, {"loader_workers": 0}),
    ("train.num_workers", 0, {"loader_workers": 0}, {"loader_workers": 1}),
    ("train.accumulate_grad_batches", 4, STEPS, STEPS | {"optimizer_steps": 10}),
    ("train.accumulate_grad_batches", 4, STEPS, STEPS | {"longest_group": 2}),
    (
        "train.accumulate_grad_batches",
        1,
        {"micro_batches": 10, "optimizer_steps": 10},
        {"micro_batches": 10, "optimizer_steps": 9},
    ),
    ("teacher.inference_batch_size", 64, {"largest_batch": 64, "rows": 99}, {"largest_batch": 32}),
    ("teacher.inference_batch_size", 64, {"largest_batch": 50, "rows": 50}, {"largest_batch": 65}),
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
    ("machine.image", "cu118", {"image": "ilora-bench:cu118"}, {"image": "host"}),
    ("machine.image", "host", {"image": "host"}, {"image": "cu121"}),
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
        empty = {"gemm_dtypes": {}, "attention_ops": {}, "checkpoint_calls": {}}
        assert PROOFS[setting].check(value, {}, {}).holds is None
        assert PROOFS[setting].check(value, empty, {}).holds is None


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
        "gemm_dtypes: bfloat16 + float32, baseline float32",
    ]


def test_checkpointing_switched_on_by_the_adapter_is_a_second_difference():
    plain = {"forward": 1, "after_backward": 1}
    baseline = record(**ADAPTER, checkpoint_calls=plain)
    cell = record(**QLORA, checkpoint_calls={"forward": 1, "after_backward": 2})
    assert second_differences(["teacher.adapter"], cell, baseline) == [
        "checkpoint_calls: recomputed ×2, baseline recomputed ×1"
    ]
    twice_as_many = {"forward": 2, "after_backward": 2}
    assert not second_differences(
        ["teacher.adapter"], record(checkpoint_calls=twice_as_many), baseline
    )


def test_expected_tables_speak_of_settings_that_exist(all_settings):
    named = {*PROOFS, *proofs.EXPECTED_FACTS, *proofs.EXPECTED_EFFECTS}
    assert named <= all_settings


@pytest.fixture
def all_settings():
    from core.config import leaves
    from core.settings import Settings

    return set(leaves(Settings))


def test_no_effect_is_suspected_only_where_an_effect_must_show():
    def measured(losses, peak):
        return record() | {"losses": losses, "memory": {"torch_allocated_peak_bytes": peak}}

    baseline = measured([1.0, 0.5], 100)
    assert no_effect(["train.precision"], measured([1.0, 0.5], 100), baseline) == [
        "loss trace",
        "peak of allocated memory",
    ]
    assert no_effect(["train.precision"], measured([1.0, 0.4], 101), baseline) == []
    # Accumulation rightly leaves the peak alone, loader workers everything.
    assert no_effect(["train.accumulate_grad_batches"], measured([1.0, 0.4], 100), baseline) == []
    assert no_effect(["train.num_workers"], measured([1.0, 0.5], 100), baseline) == []
    absent = measured([], {"unavailable": "no GPU"})
    assert no_effect(["train.precision"], absent, absent) == []


def test_proofs_load_without_torch():
    script = "import sys, bench.proofs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

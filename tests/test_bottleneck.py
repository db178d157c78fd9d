"""One sentence a stage: known shares give a known sentence, and records and profiles the shares."""

import pytest

from bench.profile.arithmetic import Backbone, attention_share, guessed_attention_share
from bench.profile.bottleneck import Shares, percent, sentence, shares

TABLE = [
    (Shares("teacher_fit"), ""),
    (Shares("teacher_fit", wait=0.012), "teacher_fit: loader wait 1.2 %: workers cannot help."),
    (
        Shares("teacher_fit", stepping=0.30, phase=("set_up", 0.62), wait=0.0),
        "teacher_fit: 62 % of the wall is set_up, so faster steps can gain 30 % at most; "
        "loader wait 0 %: workers cannot help.",
    ),
    (
        Shares("teacher_fit", stepping=0.9, phase=("validation", 0.06), wait=0.07),
        "teacher_fit: steps are 90 % of the wall, the largest part beside them is validation with "
        "6.0 %; loader wait 7.0 %: workers can gain no more than that.",
    ),
    (
        Shares("teacher_fit", wait=0.4, issue=0.95, flops=0.1, traffic=0.1),
        "teacher_fit: data-bound: the steps wait for their batches; "
        "loader wait 40 %: workers can gain no more than that.",
    ),
    (
        Shares("teacher_test", wait=0.01, issue=0.95, flops=0.1, traffic=0.1),
        "teacher_test: host-bound: issuing the operators takes 95 % of a step, so kernels and "
        "dtypes cannot matter; fewer operators or larger batches can; "
        "loader wait 1.0 %: workers cannot help.",
    ),
    (
        Shares("teacher_fit", issue=0.3, flops=0.62, traffic=0.55, attention=0.004),
        "teacher_fit: compute-bound: products run at 62 % of the measured GEMM peak; "
        "attention is 0.4 % of the arithmetic: little to gain, unless its kernel is a bad one.",
    ),
    (
        Shares("teacher_fit", issue=0.3, flops=0.2, traffic=0.71, attention=0.12),
        "teacher_fit: memory-bound: tensors move at 71 % of the measured copy rate, products run "
        "at 20 % of the GEMM peak; attention is 12 % of the arithmetic.",
    ),
    (
        Shares("teacher_fit", cpu=0.4, flops=0.2, traffic=0.1, operator=("aten::mm", 0.3)),
        "teacher_fit: bound by neither products (20 % of the measured GEMM peak) nor traffic "
        "(10 % of the copy rate): small operators, casts or waiting, and the process ran for 40 % "
        "of the time only; the longest operator, aten::mm, takes 30 %.",
    ),
    (
        Shares("teacher_fit", attention=0.012, guessed=True),
        "teacher_fit: attention is about 1.2 % of the arithmetic: little to gain, unless its "
        "kernel is a bad one.",
    ),
    (
        Shares("teacher_fit", attention=0.03, guessed=True),
        "teacher_fit: attention is about 3.0 % of the arithmetic.",
    ),
    (  # a profile knows better: little arithmetic may take long, and much of it little time
        Shares("teacher_fit", attention=0.004, attention_time=0.11, fused=True),
        "teacher_fit: attention is 0.4 % of the arithmetic and 11 % of the time.",
    ),
    (
        Shares("teacher_fit", attention=0.06, attention_time=0.013, fused=True),
        "teacher_fit: attention is 6.0 % of the arithmetic and 1.3 % of the time: its kernel "
        "cannot matter here.",
    ),
    (  # 3 % can be gained, which is more than the floor
        Shares("teacher_fit", attention=0.06, attention_time=0.03, fused=True),
        "teacher_fit: attention is 6.0 % of the arithmetic and 3.0 % of the time.",
    ),
    (  # eager attention hides masks and copies among everybody's operators
        Shares("teacher_fit", attention=0.06, attention_time=0.01),
        "teacher_fit: attention is 6.0 % of the arithmetic and at least 1.0 % of the time.",
    ),
    (
        Shares("teacher_fit", wait=0.035),
        "teacher_fit: loader wait 3.5 %: workers can gain no more than that.",
    ),
    (
        Shares("teacher_fit", stepping=0.3, phase=("set_up", 0.6), issue=0.1, flops=0.7, traffic=0),
        "teacher_fit: 60 % of the wall is set_up, so faster steps can gain 30 % at most; "
        "compute-bound: products run at 70 % of the measured GEMM peak.",
    ),
]


@pytest.mark.parametrize(("known", "said"), TABLE, ids=range(len(TABLE)))
def test_known_shares_give_a_known_sentence(known: Shares, said: str) -> None:
    assert sentence(known) == said


def record(**changes):
    phases = {"set_up": 2.0, "train_steps": 6.0, "validation": 1.0, "unaccounted": 1.0}
    return {"wall_s": 10.0, "phases": phases, "loader_wait_s": 0.1, "facts": {}} | changes


def test_ordinary_records_are_enough_for_a_sentence() -> None:
    known = shares("teacher_fit", [record(), record(loader_wait_s=0.2)])
    assert known.stepping == pytest.approx(0.6)
    assert known.phase == ("set_up", pytest.approx(0.2))
    assert known.wait == pytest.approx(0.015)
    assert known.attention is None
    assert sentence(known).endswith("loader wait 1.5 %: workers cannot help.")


def test_a_stage_without_a_loader_says_nothing_of_workers() -> None:
    assert "workers" not in sentence(shares("evaluate_all", [record(loader_wait_s=None)]))


@pytest.mark.parametrize(
    ("names", "fused"),
    [
        (["aten::bmm", "aten::_softmax"], False),
        (["aten::_scaled_dot_product_flash_attention"], True),
    ],
)
def test_only_a_fused_kernel_is_all_of_attention(names: list[str], fused: bool) -> None:
    operators = [{"name": name, "seconds": 0.01, "share": 0.005} for name in names]
    probe = {"seconds": 0.1, "issue_s": 0.1, "wait_s": 0.0, "cpu_s": 0.1}
    work = {"samples": 8, "tokens": 800, "padded_tokens": 800}
    profile = {
        "stage": "teacher_test",
        "device": "cpu",
        "probes": [probe | work],
        "counted": work | {"flops": 1e9, "bytes": 1e8, "head_flops": 0},
        "backbone": {"weights": 10**6, "lora": 10**4, "layers": 2, "width": 128},
        "window": {"operators": operators},
        "ceilings": {"gemm_flops_per_s": 1e11, "copy_bytes_per_s": 1e10},
    }
    known = shares("teacher_test", [record()], profile)
    assert known.fused == fused
    assert ("cannot matter" in sentence(known)) == fused


def test_the_batch_s_shape_gives_a_guess_of_attention() -> None:
    facts = {"inputs_embeds": {"shape": [32, 100, 4096], "dtype": "bfloat16"}}
    known = shares("teacher_fit", [record(facts=facts)])
    assert known.guessed
    assert known.attention == pytest.approx(0.004, rel=0.05)


@pytest.mark.parametrize(
    ("sizes", "length"),
    [
        (Backbone(85_054_464, 2_654_208, 12, 768), 100),
        (Backbone(6_476_005_376, 39_976_960, 32, 4096), 100),
        (Backbone(6_476_005_376, 39_976_960, 32, 4096), 400),
    ],
    ids=["opt-125m", "llama-2-7b", "llama-2-7b, long"],
)
def test_the_guess_is_close_to_the_count(sizes: Backbone, length: int) -> None:
    guess = guessed_attention_share(length, sizes.width)
    assert guess == pytest.approx(attention_share(sizes, length, False), rel=0.1)


def test_a_profile_goes_before_what_records_tell() -> None:
    probe = {"seconds": 0.1, "issue_s": 0.1, "wait_s": 0.05, "cpu_s": 0.05, "samples": 8}
    probe |= {"tokens": 0, "padded_tokens": 0}
    profile = {
        "stage": "student_test",
        "device": "cpu",
        "probes": [probe],
        "counted": None,
        "backbone": None,
        "window": None,
        "ceilings": {"gemm_flops_per_s": 1e11, "copy_bytes_per_s": 1e10},
    }
    known = shares("student_test", [record()], profile)
    assert known.wait == pytest.approx(0.5)
    assert (known.issue, known.cpu) == (None, pytest.approx(0.5))
    assert known.flops is None


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (0.004, "0.4 %"), (0.0949, "9.5 %"), (0.095, "10 %"), (0.62, "62 %")],
)
def test_small_shares_keep_a_digit(share: float, text: str) -> None:
    assert percent(share) == text

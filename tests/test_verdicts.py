"""The rule of every call, simulated error rates, and the judgement of the synthetic run."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from synthetic_records import (
    FIT,
    MATRIX,
    OUTPUTS,
    REPEATS,
    TEST,
    all_records,
    head,
    ok_record,
    report_cells,
)

from bench.judging.figures import TOTAL, stage_figures, steady_figure
from bench.judging.findings import trends
from bench.judging.intervals import (
    ALPHA,
    MIN_BLOCKS,
    Effect,
    decide,
    holm_levels,
    mean_interval,
    paired,
)
from bench.judging.quality import compare, guard
from bench.matrix import Matrix, cells
from bench.verdicts import judge

FLOOR = 0.02
seconds = st.floats(1e-3, 1e3)
pairs = st.lists(st.tuples(seconds, seconds), min_size=2, max_size=9)


# ---- statistics


def test_one_run_each_decides_nothing():
    assert decide(paired([139.70], [139.44]), FLOOR) == ("undecided", 3)


@pytest.mark.parametrize(
    ("ratios", "call"),
    [
        ([0.90, 0.91, 0.89, 0.90, 0.905], "faster"),
        ([1.10, 1.11, 1.09, 1.10, 1.105], "slower"),
        ([1.001, 0.999, 1.002, 1.0, 0.998], "same"),
        # Sure to be faster, but not by as much as anybody would act on, nor surely by less.
        ([0.981, 0.9805, 0.9815, 0.9811, 0.9809], "same"),
        ([0.983, 0.975, 0.990, 0.985, 0.979], "undecided"),
        ([0.8, 1.2, 0.9, 1.1, 1.0], "undecided"),
        ([0.5, 0.5, 0.5], "undecided"),
    ],
)
def test_calls(ratios, call):
    assert decide(paired(ratios, [1.0] * len(ratios)), FLOOR)[0] == call


def test_no_spread_is_a_point_interval():
    same = paired([3.0] * 4, [3.0] * 4)
    half = paired([1.5] * 4, [3.0] * 4)
    assert (same.sd, same.p_value, decide(same, FLOOR)[0]) == (0, 1, "same")
    assert (half.half_width(ALPHA), half.p_value, decide(half, FLOOR)[0]) == (0, 0, "faster")


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="pairs are needed"):
        paired([], [])


@given(pairs)
def test_ratio_of_exchanged_cells_is_the_inverse(values):
    ours, theirs = zip(*values, strict=True)
    forth, back = paired(ours, theirs), paired(theirs, ours)
    assert math.exp(forth.mean) * math.exp(back.mean) == pytest.approx(1)
    mirrored = {"faster": "slower", "slower": "faster"}
    word = decide(forth, FLOOR)[0]
    assert decide(back, FLOOR)[0] == mirrored.get(word, word)


@given(pairs, st.floats(1e-3, 1e3))
def test_unit_of_time_does_not_matter(values, scale):
    ours, theirs = zip(*values, strict=True)
    plain = paired(ours, theirs)
    scaled = paired([scale * x for x in ours], [scale * x for x in theirs])
    assert scaled.mean == pytest.approx(plain.mean, abs=1e-9)
    assert scaled.sd == pytest.approx(plain.sd, abs=1e-9)


@given(st.floats(-0.2, 0.2), st.floats(1e-3, 0.1), st.integers(4, 12))
def test_needed_blocks_are_the_fewest_that_decide(mean, sd, blocks):
    call, needs = decide(Effect(mean, sd, blocks), FLOOR)
    if call != "undecided" or needs is None:
        return
    assert decide(Effect(mean, sd, blocks + needs), FLOOR)[0] != "undecided"
    assert decide(Effect(mean, sd, blocks + needs - 1), FLOOR)[0] == "undecided"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_levels_reject_exactly_what_holm_rejects(p_values):
    rejected = set()
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[i] > ALPHA / (len(p_values) - rank):
            break
        rejected.add(i)
    levels = holm_levels(p_values)
    assert {i for i, level in enumerate(levels) if p_values[i] <= level} == rejected
    assert min(levels) >= ALPHA / len(p_values)


def test_smallest_difference_is_found_four_times_in_five():
    random = np.random.default_rng(3)
    shift = Effect(0.0, 0.01, 5).smallest_seen(ALPHA)
    samples = shift + 0.01 * random.standard_normal((4000, 5))
    found = stats.ttest_1samp(samples, 0, axis=1).pvalue < ALPHA
    # The formula is the usual approximation by two central t quantiles.
    assert 0.75 < found.mean() < 0.9


def process_medians(random, trials, blocks, shift):
    """Median step of fresh processes: AR(1) noise, outliers, spread between processes, drift."""
    steps, correlation = 60, 0.6
    shocks = 0.02 * random.standard_normal((trials, blocks, steps))
    noise = np.zeros_like(shocks)
    for i in range(1, steps):
        noise[..., i] = correlation * noise[..., i - 1] + shocks[..., i]
    outliers = np.where(random.random(shocks.shape) < 0.02, 1.8, 1.0)
    between = 0.01 * random.standard_normal((trials, blocks, 1))
    drift = 0.01 * np.arange(blocks)[:, None]
    return np.median(shift * outliers * np.exp(noise + between + drift), axis=-1)


@pytest.mark.parametrize(("shift", "least", "most"), [(1.0, 0.0, 0.07), (1.05, 0.95, 1.0)])
def test_simulated_error_rates_at_five_blocks(shift, least, most):
    random = np.random.default_rng(20)
    trials = 400
    cell = process_medians(random, trials, 5, shift)
    baseline = process_medians(random, trials, 5, 1.0)
    calls = [
        decide(paired(ours, theirs), FLOOR)[0]
        for ours, theirs in zip(cell.tolist(), baseline.tolist(), strict=True)
    ]
    claimed = sum(call in ("faster", "slower") for call in calls) / trials
    assert least <= claimed <= most
    if shift > 1:
        assert "faster" not in calls


@pytest.mark.parametrize(
    ("low", "high", "call"),
    [(-0.05, -0.011, "worse"), (-0.05, 0.02, "open"), (-0.009, 0.02, "not worse")],
)
def test_quality_guard(low, high, call):
    assert guard(low, high) == call


def test_interval_of_one_value_is_unbounded():
    assert mean_interval([0.3]) == (0.3, -math.inf, math.inf)


# ---- figures


def stepping(*steps):
    """Steps from (seconds, samples, optimizer step)."""
    keys = ("seconds", "samples", "optimizer_step")
    return [dict(zip(keys, step, strict=True)) for step in steps]


def test_warm_up_steps_are_not_judged():
    steps = stepping((90, 1, False), (90, 1, False), (2, 4, False), (4, 4, False), (3, 2, False))
    assert steady_figure({"steps": steps, "warmup_steps": 2}).seconds == 1.0
    assert steady_figure({"steps": steps, "warmup_steps": 5}) is None
    assert steady_figure({"steps": [], "warmup_steps": 0}) is None


def test_micro_batches_are_judged_by_optimizer_step():
    group = [(1, 2, False), (1, 2, False), (4, 2, True)]
    steps = stepping(*[(50, 2, False)] * 2, (50, 2, True), *group, *group, (70, 2, False))
    found = steady_figure({"steps": steps, "warmup_steps": 1})
    assert (found.seconds, found.samples) == (1.0, 2)


def test_a_stage_with_unsteady_processes_is_judged_by_its_wall():
    first, second = report_cells()[:2]
    short = ok_record(first, 0, FIT) | {"warmup_steps": 1000}
    figures = stage_figures([short, ok_record(second, 0, FIT)], [FIT])
    assert {figure.samples for figure in figures[FIT].values()} == {None}
    assert figures[FIT][first.key, 0].seconds == short["wall_s"]


def test_drift_of_the_baseline_is_seen():
    [steady] = trends({FIT: dict(enumerate([1.0, 1.001, 0.999, 1.0, 1.0005]))})
    [warming] = trends({FIT: {block: 1.01**block for block in range(5)}})
    assert steady.p_value > ALPHA
    assert warming.ratio == pytest.approx(1.01**4)
    assert warming.p_value < ALPHA


# ---- the judgement


@pytest.fixture(scope="module")
def judged():
    return judge(MATRIX, report_cells(), all_records())


def calls(judgement, stage):
    return {row.cell: row.call for row in judgement.tables[stage]}


def test_every_call_and_status_has_its_row(judged):
    assert calls(judged, FIT) == {
        "baseline": "baseline",
        "train.precision=bf16-mixed": "faster",
        "train.precision=fp16-mixed": "not in effect",
        "train.precision=bf16-true": "oom_host",
        "teacher.adapter=qlora": "slower",
        "teacher.attn=eager": "slower",
        "teacher.attn=flash_attention_2": "unsupported",
        "train.accumulate_grad_batches=4": "worse quality",
        "train.accumulate_grad_batches=8": "killed",
        "train.num_workers=2": "same",
        "train.num_workers=4": "timeout(train_steps)",
        "train.trainer=lightning": "undecided",
        "teacher.gradient_checkpointing=true": "slower",
        "teacher.lora_r=16": "unproven",
        "teacher.lora_r=32": "import",
        "teacher.lora_r=64": "silent_exit",
        "train.batch_size=128": "oom_gpu",
        "train.compile=regional": "faster",
        "train.compile=whole": "timeout(compile)",
        "machine.image=cu118": "skipped",
        "train.precision=bf16-mixed, teacher.inference_batch_size=256": "faster",
    }
    assert {row.status for row in judged.unmeasured} >= {"bad_output", "error", "driver"}
    assert judged.exit_status == 1


def test_a_stage_lists_only_cells_that_act_there(judged):
    assert "train.trainer=lightning" not in calls(judged, OUTPUTS)
    assert "teacher.inference_batch_size=256" not in calls(judged, FIT)
    assert "teacher.lora_r=16" in calls(judged, OUTPUTS)
    assert set(calls(judged, TOTAL)) == {cell.name for cell in report_cells()}


def test_only_compared_cells_have_a_ratio(judged):
    without = {"baseline", "not in effect", "unsupported", "skipped", "oom_gpu", "killed"}
    compared = {"faster", "slower", "same", "undecided", "unproven", "worse quality"}
    rows = [row for table in judged.tables.values() for row in table]
    assert {row.call for row in rows if row.ratio is not None} == compared
    assert {row.call for row in rows if row.ratio is None} >= without


def test_the_fastest_proven_cell_is_best(judged):
    assert judged.best.cell == "train.precision=bf16-mixed, teacher.inference_batch_size=256"
    assert not judged.best.is_baseline


def test_warnings_name_no_effect_and_second_difference(judged):
    text = "\n".join(finding.text for finding in judged.warnings)
    assert "train.precision=fp16-mixed: no effect visible" in text
    assert (
        "train.trainer=lightning: more than the setting under test differs: pinned_memory" in text
    )
    assert "teacher_outputs: up to" in text
    assert "first step 4× slower (5 records)" in text


SMALL = Matrix(
    question="Does it help?",
    stages=(FIT, TEST),
    axes={"train.precision": ["fp32", "bf16-mixed"]},
    repeats=REPEATS,
)
BF16 = "train.precision=bf16-mixed"


def small_records(change=lambda record: record, blocks=REPEATS):
    return [
        change(ok_record(cell, block, stage))
        for block in range(blocks)
        for cell in cells(SMALL, True)
        for stage in SMALL.stages
    ]


def small(records):
    return judge(SMALL, cells(SMALL, True), records)


def test_a_clean_faster_cell_passes():
    judged = small(small_records())
    assert calls(judged, TOTAL) == {"baseline": "baseline", BF16: "faster"}
    assert (judged.best.cell, judged.exit_status, judged.comparisons) == (BF16, 0, 3)


def test_three_blocks_are_never_enough():
    judged = small(small_records(blocks=3))
    row = judged.tables[TOTAL][1]
    assert (row.call, row.needs, row.words) == ("undecided", 1, "undecided (needs 1 more)")
    assert judged.best.is_baseline
    assert "undecided" in judged.best.reason


def test_one_run_each_is_undecided():
    def as_noted(record):
        return record | {"steps": [], "wall_s": 139.44 if record["cell"] == "baseline" else 139.70}

    row = small(small_records(as_noted, blocks=1)).tables[FIT][1]
    assert (row.words, row.low) == ("undecided (needs 3 more)", None)
    assert row.ratio == pytest.approx(139.70 / 139.44)


def test_a_baseline_that_does_not_run_as_asked_spoils_every_comparison():
    def fell_back(record):
        facts = record["facts"] | {"gemm_dtypes": {"bfloat16": 25}, "autocast_dtype": "bfloat16"}
        return record | ({"facts": facts} if record["cell"] == "baseline" else {})

    judged = small(small_records(fell_back))
    assert set(calls(judged, FIT).values()) == {"not in effect"}
    assert judged.tables[FIT][1].ratio is None
    assert (judged.best.is_baseline, judged.exit_status) == (True, 1)


def test_an_unobserved_setting_is_unproven_and_never_best():
    judged = small(small_records(lambda record: record | {"facts": {}}))
    assert set(calls(judged, FIT).values()) == {"baseline", "unproven"}
    assert judged.best.is_baseline


def test_halved_recall_is_worse_quality_in_every_stage():
    def halved(record):
        if record["ranks"] and record["cell"] != "baseline":
            return record | {"ranks": [r + 50 * (u % 2) for u, r in enumerate(record["ranks"])]}
        return record

    judged = small(small_records(halved))
    assert calls(judged, FIT)[BF16] == "worse quality"
    assert judged.tables[FIT][1].ratio < 0.7
    assert judged.best.is_baseline


def test_a_cell_that_failed_once_is_not_best():
    records = small_records()
    cell = cells(SMALL, True)[1]
    lost = [r for r in records if not (r["key"] == cell.key and r["block"] == 2)]
    lost.append(head(cell, 2, FIT, "oom_gpu") | {"reason": "CUDA out of memory"})
    judged = small(lost)
    assert judged.tables[TOTAL][1].repeats == MIN_BLOCKS
    assert calls(judged, TOTAL)[BF16] == "faster"
    assert judged.best.is_baseline
    assert "failed repeats" in judged.best.reason


def test_nothing_measured_is_a_failure_with_rows():
    judged = small([])
    assert calls(judged, TOTAL) == {"baseline": "skipped", BF16: "skipped"}
    assert judged.exit_status == 1


def test_pairs_are_made_by_block_not_by_order():
    """A machine that doubles its time in one block changes no ratio."""

    def doubled(record):
        factor = 2.0 if record["block"] == 1 else 1.0
        steps = [step | {"seconds": factor * step["seconds"]} for step in record["steps"]]
        return record | {"steps": steps}

    plain, slow = small(small_records()), small(list(reversed(small_records(doubled))))
    assert slow.tables[FIT][1].ratio == pytest.approx(plain.tables[FIT][1].ratio)
    assert slow.tables[FIT][1].low == pytest.approx(plain.tables[FIT][1].low)


def test_memory_peaks_are_the_largest_and_contradictions_are_named():
    def odd(record):
        memory = record["memory"] | {"torch_reserved_peak_bytes": 5}
        return record | ({"memory": memory} if record["block"] == 0 else {})

    judged = small(small_records(odd))
    peak = judged.tables[FIT][0].memory["torch_reserved_peak_bytes"]
    assert peak == max(
        r["memory"]["torch_reserved_peak_bytes"] for r in small_records() if r["stage"] == FIT
    )
    odd_ones = [f.text for f in judged.warnings if "torch_allocated_peak_bytes" in f.text]
    assert len(odd_ones) == len(SMALL.stages)
    assert all("is above torch_reserved_peak_bytes 0.00 GiB" in text for text in odd_ones)
    assert "device_peak_bytes" not in judged.tables[FIT][0].memory


def test_holm_widens_the_intervals_of_a_larger_matrix(judged):
    """The same pairs alone would give a narrower interval than among all comparisons."""
    wide = next(row for row in judged.tables[FIT] if row.cell == "train.trainer=lightning")
    names = {"baseline", "train.trainer=lightning"}
    few = [cell for cell in report_cells() if cell.name in names]
    alone = judge(MATRIX, few, [r for r in all_records() if r["cell"] in names])
    narrow = alone.tables[FIT][1]
    assert narrow.ratio == pytest.approx(wide.ratio)
    assert narrow.high - narrow.low < wide.high - wide.low


def quality_record(ranks: list[float]) -> dict:
    return {"ranks": ranks, "block": 1, "metrics": {}}


@pytest.mark.parametrize(("users", "call"), [(50, "open"), (1000, "not worse")])
def test_no_hit_in_either_model_is_little_evidence_with_few_users(users, call):
    """Fifty users without a hit are no proof that a cell is as good."""
    base = [quality_record([100.0 + i for i in range(users)])]
    cell = [quality_record([90.0 + i for i in range(users)])]
    found = compare("c", "teacher_test", cell, base)
    recall = next(q for q in found if q.metric == "recall@10")
    assert (recall.difference, recall.call) == (0.0, call)
    assert recall.high == pytest.approx(3 / users)


def test_equal_ranks_are_the_same_model():
    base = [quality_record([100.0, 200.0, 3.0])]
    same = compare("c", "teacher_test", base, base)
    assert {(q.low, q.high, q.call) for q in same} == {(0.0, 0.0, "not worse")}

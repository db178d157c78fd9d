"""Two runs against each other: what forbids it, which test is used, the words, the exit status."""

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.compare import app, parse_rule
from bench.comparing import comparability
from bench.comparing.between import gap, interleaved, welch
from bench.judging.intervals import decide, paired
from bench.matrix import Cell, Matrix, cells, resolved
from core.config import InputError

ROOT = Path(__file__).resolve().parent.parent
MATRIX = Matrix(
    question="Does the seed matter?",
    stages=("teacher_fit", "teacher_test"),
    axes={"teacher.attn": ["sdpa", "eager"]},
)
BASELINE, EAGER = cells(MATRIX, has_gpu=False)
CALIBRATION = {
    "device": "cpu",
    "kernels": {
        name: {"seconds": seconds, "spread": 0.01, "rounds": 50}
        for name, seconds in (
            ("gemm_float32", 2e-3), ("gemm_bfloat16", 9e-3), ("copy", 1e-3), ("interpreter", 3e-3)
        )
    },
}  # fmt: skip
MACHINE: dict[str, Any] = {
    "has_gpu": False,
    "gpus": [],
    "packages": {"torch": "2.7.1", "peft": "0.18.0"},
    "python": "3.11.7",
    "cpu": "EPYC",
    "usable_cores": 8,
    "variables": {"OMP_NUM_THREADS": "1"},
    "git": {"commit": "1234567890abcdef", "dirty": False},
    "code": "aaaa",
    "containers": {"images": {"cu118": "sha256:1"}},
    "worker": ["python", "-m", "bench.worker"],
    "process": {"torch": "2.7.1+cpu", "image": "host"},
    "calibration": CALIBRATION,
}
ATTENTION = {"sdpa": "scaled_dot_product_attention", "eager": "_softmax"}
Seconds = Callable[[Cell, int], float]


def steady(cell: Cell, block: int) -> float:
    """Half a per cent of spread around one second."""
    return math.exp(0.005 * random.Random(f"{cell.name}{block}").gauss(0, 1))


def record(cell: Cell, stage: str, block: int, seconds: float, started: datetime) -> dict[str, Any]:
    attention = ATTENTION[cell.settings.teacher.attn]
    return {
        "schema": 1, "matrix": "m", "cell": cell.name, "key": cell.key, "block": block,
        "repeat": block, "stage": stage, "status": "ok", "reason": None,
        "started": started.isoformat(), "wall_s": seconds, "steps": [], "warmup_steps": 2,
        "memory": {"torch_allocated_peak_bytes": 1 << 30}, "losses": [], "metrics": {},
        "facts": {
            "attn_implementation": cell.settings.teacher.attn,
            "attention_ops": {attention: 2}, "gemm_dtypes": {"float32": 4},
        },
        "ranks": [float(i) for i in range(40)] if stage == "teacher_test" else None,
        "data_digest": "d" * 64,
    }  # fmt: skip


def write_run(
    folder: Path,
    seconds: Seconds = steady,
    *,
    change: Callable[[dict[str, Any]], Any] = lambda record: None,
    keep: Callable[[dict[str, Any]], bool] = lambda record: True,
    matrix: Matrix = MATRIX,
    blocks: int = 6,
    first_s: float = 0.0,
    every_s: float = 600.0,
    **machine: Any,
) -> Path:
    """A finished run whose block i starts at `first_s` + i · `every_s`."""
    folder.mkdir(parents=True)
    lines = []
    for block in range(1, blocks + 1):
        started = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=first_s + block * every_s)
        for cell in cells(matrix, has_gpu=False):
            for stage in matrix.stages:
                found = record(cell, stage, block, seconds(cell, block), started)
                change(found)
                lines += [found] if keep(found) else []
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "machine.json").write_text(json.dumps(MACHINE | machine))
    (folder / "matrix.yaml").write_text(resolved(matrix))
    return folder


def run(*words: Any) -> tuple[int, str]:
    """Exit status and all output of the command."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def slower_by(ratio: float, name: str = "") -> Seconds:
    return lambda cell, block: steady(cell, block + 100) * (ratio if name in cell.name else 1.0)


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return write_run(tmp_path / "m" / "a")


def test_a_run_against_itself_has_no_difference(before):
    done = subprocess.run(
        [sys.executable, "-m", "bench.compare", before, before, "--fail-on", "slower"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Nothing in the comparability key differs." in done.stdout
    assert "6 comparisons: 6 same" in done.stdout and "1.000 to 1.000" in done.stdout


@pytest.mark.parametrize(
    ("rules", "status"),
    [
        ([], 0),
        (["slower"], 1),
        (["slower:20%"], 1),
        (["slower:50%"], 0),
        (["memory"], 0),
        (["quality"], 0),
    ],
)
def test_a_slowdown_breaks_the_rule_that_forbids_it(before, tmp_path, rules, status):
    after = write_run(tmp_path / "b", slower_by(1.3, "eager"))
    options = [word for rule in rules for word in ("--fail-on", rule)]
    found, text = run(before, after, *options)
    assert found == status, text
    assert "3 slower" in text and "3 same" in text
    if status:
        assert re.search(r"FAILED: slower: teacher.attn=eager, teacher_fit: 1\.(29|30)", text)


def test_one_repeat_of_each_is_no_verdict(tmp_path):
    """139.44 s against 139.70 s, the user's own two runs; nor does a factor of two convince."""
    for name, seconds in (("near", 139.70), ("far", 280.0)):
        a = write_run(tmp_path / name / "a", lambda *_: 139.44, blocks=1)
        b = write_run(tmp_path / name / "b", lambda *_, s=seconds: s, blocks=1)
        status, text = run(a, b, "--fail-on", "slower")
        assert status == 0 and "6 undecided" in text and "undecided (needs 3 more)" in text


MUTATIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "code": ("code", {"code": "bbbb"}, "`bbbb`"),
    "another worker": ("code", {"worker": ["python", "fake.py"]}, "`['fake.py']`"),
    "package": ("packages", {"packages": MACHINE["packages"] | {"peft": "0.19.0"}}, "`0.19.0`"),
    "python": ("packages", {"python": "3.12.1"}, "`3.12.1`"),
    "torch of the worker": ("packages", {"process": {"torch": "2.8", "image": "host"}}, "`2.8`"),
    "image": ("image", {"containers": {"images": {"cu118": "sha256:2"}}}, "`sha256:2`"),
    "variable": ("variables", {"variables": {"OMP_NUM_THREADS": "2"}}, "`OMP_NUM_THREADS`"),
    "new variable": ("variables", {"variables": MACHINE["variables"] | {"A": "b"}}, "`absent`"),
    "cpu": ("cpu", {"cpu": "Xeon"}, "`Xeon`"),
    "gpu": ("gpu", {"gpus": [{"name": "H200", "memory_bytes": 1, "driver": "570"}]}, "H200"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_one_changed_thing_is_named_and_refused(before, tmp_path, name):
    field, machine, shown = MUTATIONS[name]
    after = write_run(tmp_path / "b", **machine)
    status, text = run(before, after)
    assert status == 3 and shown in text
    assert field in re.search("NOT COMPARABLE: (.*) differ;", text)[1].split(", ")
    if field not in comparability.HARDWARE:
        assert "0 comparisons" in text
        assert run(before, after, "--across", field)[0] == 0
    assert run(before, after, "--across", "all")[0] == 0


def test_keys_are_equal_exactly_where_nothing_differs(before, tmp_path):
    same = comparability.read_side(write_run(tmp_path / "b"))
    other = comparability.read_side(write_run(tmp_path / "c", code="bbbb"))
    keys = [
        comparability.key(comparability.identity(side))
        for side in (comparability.read_side(before), same, other)
    ]
    assert keys[0] == keys[1] != keys[2]


def test_a_driver_is_told_from_its_gpu(tmp_path):
    gpu = {"name": "H200", "memory_bytes": 1, "driver": "570"}
    a = write_run(tmp_path / "a", gpus=[gpu])
    b = write_run(tmp_path / "b", gpus=[gpu | {"driver": "580"}])
    assert "NOT COMPARABLE: driver differ" in run(a, b)[1]
    status, text = run(a, b, "--across", "driver")
    assert status == 0 and "in seconds" not in text, "one machine keeps its seconds"


def test_other_ratings_are_found_in_the_records(before, tmp_path):
    after = write_run(tmp_path / "b", change=lambda r: r.update(data_digest="e" * 64))
    status, text = run(before, after)
    assert status == 3 and "NOT COMPARABLE: data" in text
    unknown = [
        write_run(tmp_path / name, change=lambda r: r.pop("data_digest")) for name in ("c", "d")
    ]
    status, text = run(*unknown)
    assert status == 0 and "recorded by neither run, so it may differ unseen: data" in text
    assert run(before, unknown[0])[0] == 3


def test_a_changed_setting_is_named_with_both_values(before, tmp_path):
    base = MATRIX.base.model_copy(update={"seed": 7})
    after = write_run(tmp_path / "b", matrix=MATRIX.model_copy(update={"base": base}))
    status, text = run(before, after)
    assert status == 3 and "`seed`" in text and "`7`" in text
    assert run(before, after, "--across", "settings")[0] == 0
    base = MATRIX.base.model_copy(
        update={"train": MATRIX.base.train.model_copy(update={"lr": 1.0})}
    )
    after = write_run(tmp_path / "c", matrix=MATRIX.model_copy(update={"base": base}))
    assert run(before, after, "--across", "train.lr")[0] == 0
    assert run(before, after, "--across", "train.batch_size")[0] == 3


def test_more_than_one_factor_is_warned_of(before, tmp_path):
    after = write_run(tmp_path / "b", code="bbbb", python="3.12.1")
    status, text = run(before, after, "--across", "code", "--across", "packages")
    assert status == 0 and "2 factors differ (code, packages)" in text
    assert "factors differ" not in run(before, write_run(tmp_path / "c", code="b"))[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--across", "cod"], "did you mean code?"),
        (["--fail-on", "slowr"], "did you mean slower?"),
        (["--fail-on", "slower:"], "--fail-on slower:"),
        (["--fail-on", "slower:5"], "slower:5%"),
        (["--fail-on", "quality:3%"], "--fail-on quality:3%"),
    ],
)
def test_wrong_words_are_bad_input(before, options, words):
    status, text = run(before, before, *options)
    assert status == 2 and words in text


def test_rules_are_read_in_per_cent():
    assert parse_rule("memory:+3%").threshold == parse_rule("slower:3 %").threshold == 0.03
    assert parse_rule("memory").threshold is None


# ---- what is gone ----


def test_a_cell_that_is_gone_fails_without_any_rule(before, tmp_path):
    alone = MATRIX.model_copy(update={"axes": {"teacher.attn": ("sdpa",)}})
    status, text = run(before, write_run(tmp_path / "b", matrix=alone))
    assert (
        status == 1 and "FAILED: gone: teacher.attn=eager, teacher_fit: no such cell in B" in text
    )
    status, text = run(write_run(tmp_path / "c", matrix=alone), before)
    assert status == 0, "a new cell is no loss"


def test_a_cell_that_fails_now_is_gone_too(before, tmp_path):
    def die(found):
        if found["cell"] != "baseline" and found["stage"] == "teacher_test":
            found.update(status="oom_gpu", reason="CUDA out of memory")

    status, text = run(before, write_run(tmp_path / "b", change=die))
    assert status == 1
    assert "FAILED: gone: teacher.attn=eager, teacher_test: oom_gpu: CUDA out of memory" in text


def test_a_stage_that_is_gone_fails(before, tmp_path):
    short = MATRIX.model_copy(update={"stages": ("teacher_fit",)})
    status, text = run(before, write_run(tmp_path / "b", matrix=short))
    assert status == 1 and "gone: baseline, teacher_test: not measured in B" in text


# ---- proof, quality, memory ----


def test_a_cell_that_no_longer_does_what_it_says_is_not_in_effect(before, tmp_path):
    def fall_back(found):
        if found["cell"] != "baseline":
            found["facts"]["attention_ops"] = {ATTENTION["sdpa"]: 2}
            found["facts"]["attn_implementation"] = "sdpa"

    after = write_run(tmp_path / "b", slower_by(0.5, "eager"), change=fall_back)
    _, text = run(before, after)
    assert "3 not in effect" in text and "faster" not in text and "B: teacher.attn" in text


def test_worse_rankings_beat_any_speed(before, tmp_path):
    def worsen(found):
        found["ranks"] = found["ranks"] and [rank + 8 for rank in found["ranks"]]

    after = write_run(tmp_path / "b", slower_by(0.5), change=worsen)
    status, text = run(before, after, "--fail-on", "quality")
    assert status == 1 and "6 worse quality" in text and "FAILED: quality: baseline" in text


def test_a_run_that_ranks_fewer_users_is_not_faster(before, tmp_path):
    def skip(found):
        found["ranks"] = found["ranks"] and found["ranks"][:20]

    after = write_run(tmp_path / "b", slower_by(0.5), change=skip)
    status, text = run(before, after, "--fail-on", "quality")
    assert "6 unproven" in text and "teacher_test: recall@10 is not comparable" in text
    assert status == 1
    assert "FAILED: quality: baseline, teacher_test, recall@10: not comparable" in text


def test_a_run_that_leaves_rows_out_is_not_faster(tmp_path):
    def counting(rows):
        def change(found):
            if found["stage"] == "teacher_test":
                found["counts"] = {"rows": rows}

        return change

    before = write_run(tmp_path / "a", change=counting(40))
    after = write_run(tmp_path / "b", slower_by(0.5), change=counting(20))
    _, text = run(before, after)
    assert "teacher_test: 20 rows, before 40" in text
    assert "4 unproven, 2 faster" in text, "the fit did the same work"
    _, text = run(before, write_run(tmp_path / "c", slower_by(0.5), change=counting(40)))
    assert "6 faster" in text


@pytest.mark.parametrize(("rule", "status"), [("memory:+3%", 1), ("memory:+6%", 0), ("memory", 1)])
def test_a_larger_peak_breaks_the_memory_rule(before, tmp_path, rule, status):
    grown = {"torch_allocated_peak_bytes": round(1.05 * 2**30), "device_peak_bytes": {"un": "x"}}
    after = write_run(tmp_path / "b", change=lambda r: r.update(memory=grown))
    found, text = run(before, after, "--fail-on", rule)
    assert found == status and "+5.0%" in text and "torch allocated" in text


# ---- which test ----


def test_blocks_pair_only_where_the_runs_alternate(before, tmp_path):
    between_blocks = write_run(tmp_path / "b", first_s=300)
    afterwards = write_run(tmp_path / "c", first_s=10 * 600)
    sides = [comparability.read_side(folder).records for folder in (before, between_blocks)]
    assert interleaved(*sides) and interleaved(*reversed(sides))
    assert not interleaved(sides[0], comparability.read_side(afterwards).records)
    _, text = run(before, between_blocks)
    assert "| paired" in text and "unpaired" not in text
    _, text = run(before, afterwards)
    assert "| unpaired" in text and "measure again in turn" in text


def test_pairs_take_out_a_drift_that_both_share():
    random_ = random.Random(1)
    drift = {block: 1.05**block for block in range(6)}
    a, b = (
        {block: slow * (1 + 0.002 * random_.gauss(0, 1)) * factor for block, slow in drift.items()}
        for factor in (1.0, 1.04)
    )
    assert decide(gap(a, b, in_blocks=True), 0.02)[0] == "slower"
    assert decide(gap(a, b, in_blocks=False), 0.02)[0] == "undecided"


def test_the_unpaired_test_is_welchs():
    from scipy import stats

    a, b = [1.0, 1.1, 1.02, 1.3], [1.5, 1.42, 1.61, 1.4, 1.55]
    found = welch(a, b)
    known = stats.ttest_ind([*map(math.log, b)], [*map(math.log, a)], equal_var=False)
    low, high = known.confidence_interval(0.95)
    assert found.p_value == pytest.approx(known.pvalue) and found.freedom == pytest.approx(known.df)
    assert found.mean - found.half_width(0.05) == pytest.approx(low)
    assert found.mean + found.half_width(0.05) == pytest.approx(high)
    assert welch(b, a).mean == -found.mean


def test_equal_figures_are_a_point_and_a_paired_gap_is_the_paired_rule():
    equal = welch([2.0] * 4, [2.0] * 4)
    assert (equal.p_value, equal.half_width(0.05)) == (1.0, 0.0)
    assert (
        decide(equal, 0.02)[0] == "same"
        and decide(welch([1.0] * 4, [2.0] * 4), 0.02)[0] == "slower"
    )
    a, b = {1: 1.0, 2: 1.2, 3: 0.9}, {1: 1.1, 2: 1.25, 3: 1.05, 9: 7.0}
    rule = paired([b[i] for i in a], [a[i] for i in a])
    found = gap(a, b, in_blocks=True)
    assert found.mean == rule.mean and found.p_value == pytest.approx(rule.p_value)
    assert found.half_width(0.01) == pytest.approx(rule.half_width(0.01))


def test_the_same_thing_twice_is_rarely_called_different():
    random_ = random.Random(5)

    def sample() -> list[float]:
        return [math.exp(0.01 * random_.gauss(0, 1)) for _ in range(5)]

    calls = [decide(welch(sample(), sample()), 0.02)[0] for _ in range(200)]
    assert sum(call in ("faster", "slower") for call in calls) <= 10
    found = [decide(welch(sample(), [1.1 * x for x in sample()]), 0.02)[0] for _ in range(50)]
    assert found.count("slower") == 50


# ---- two machines ----


def twice_as_slow(**kernels: float) -> dict[str, Any]:
    """The calibration of a machine half as fast, but for the kernels given."""
    found = json.loads(json.dumps(CALIBRATION))
    for name, kernel in found["kernels"].items():
        kernel["seconds"] *= kernels.get(name, 2.0)
    return found


def test_a_machine_half_as_fast_is_the_same_in_calibrated_units(before, tmp_path):
    after = write_run(tmp_path / "b", slower_by(2.0), cpu="Old", calibration=twice_as_slow())
    status, text = run(before, after)
    assert status == 3 and "not comparable in seconds" in text and "6 same" in text
    status, text = run(before, after, "--across", "cpu", "--across", "speed")
    assert status == 0 and "6 same" in text and "calibrated ratio" in text
    real = write_run(tmp_path / "c", slower_by(2.6), cpu="Old", calibration=twice_as_slow())
    status, text = run(before, real, "--across", "all", "--fail-on", "slower:25%")
    assert status == 1 and "6 slower" in text and "1.30" in text


def test_kernels_that_disagree_leave_it_open(before, tmp_path):
    mixed = twice_as_slow(copy=1.6)
    after = write_run(tmp_path / "b", slower_by(1.8), cpu="Old", calibration=mixed)
    _, text = run(before, after, "--across", "all")
    assert "6 undecided" in text and "kernels disagree" in text


def test_only_kernels_like_the_stage_count(before, tmp_path):
    other = twice_as_slow(gemm_bfloat16=9.0)  # no stage multiplies in bfloat16
    after = write_run(tmp_path / "b", slower_by(2.0), cpu="Old", calibration=other)
    assert "6 same" in run(before, after, "--across", "all")[1]


def test_a_machine_of_the_same_name_may_be_slower(before, tmp_path):
    after = write_run(tmp_path / "b", slower_by(2.0), calibration=twice_as_slow())
    status, text = run(before, after)
    assert status == 3 and "NOT COMPARABLE: speed" in text and "2.00 x the time" in text
    noisy = twice_as_slow(**dict.fromkeys(CALIBRATION["kernels"], 1.2))
    assert run(before, write_run(tmp_path / "c", calibration=noisy))[0] == 0


def test_without_calibration_other_machines_are_not_comparable(before, tmp_path):
    after = write_run(tmp_path / "b", cpu="Old", calibration={"unavailable": "no torch"})
    status, text = run(before, after)
    assert status == 3 and "not comparable in seconds" in text and "0 comparisons" in text


# ---- finding runs ----


def test_a_run_is_found_by_folder_records_id_and_commit(tmp_path):
    old = write_run(tmp_path / "m" / "20260101-000000")
    new = write_run(tmp_path / "m" / "20260102-000000")
    other = write_run(tmp_path / "n" / "20260101-111111", git={"commit": "fedcba98", "dirty": True})
    find = comparability.find_run
    assert find(str(old), tmp_path) == find(str(old / "records.jsonl"), tmp_path) == old
    assert find("20260101-000000", tmp_path) == old
    assert find("12345", tmp_path) == new and find("fedc", tmp_path) == other
    assert "commit fedcba98 with changes" in run(other, other)[1]
    with pytest.raises(InputError, match="did you mean 20260102-000000"):
        find("20260102-00000", tmp_path)
    write_run(tmp_path / "n" / "20260103-000000")
    with pytest.raises(InputError, match=r"runs of 2 matrices \(m, n\)"):
        find("12345", tmp_path)


def test_a_damaged_run_is_bad_input(before, tmp_path):
    (before / "machine.json").write_text("{")
    status, text = run(before, before)
    assert status == 2 and "missing or damaged" in text

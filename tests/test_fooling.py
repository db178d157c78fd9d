"""Ways to look fast without being it: each must be told, and none may win."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_launcher import FakeLauncher, a_run, measure
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_blocks import OTHER
from test_run import Bench, bench  # noqa: F401
from test_verdicts import BF16, FIT, SMALL, TEST, TOTAL, calls, small, small_records

from bench.execute import file_name
from bench.judging.judgement import Judgement
from bench.launching import deaths
from bench.matrix import Matrix, cells
from bench.records import Record
from bench.verdicts import judge

Change = Callable[[Record], None]


def fooled(change: Change, who: str = BF16) -> Judgement:
    """The judgement of a run in which one cell's records were tampered with; it is faster by a
    third without that.
    """
    records = [copy.deepcopy(record) for record in small_records()]
    for record in records:
        if record["cell"] == who:
            change(record)
    return small(records)


def texts(judgement: Judgement) -> str:
    return "\n".join(finding.text for finding in judgement.warnings)


def timed(record: Record, process_wall_s: float) -> Record:
    return record | {"process_wall_s": process_wall_s}


# ---- less work


def scores_half(record: Record) -> None:
    if record["stage"] == TEST:
        record["counts"]["rows"] //= 2
        record["steps"] = record["steps"][::2]


def ranks_half(record: Record) -> None:
    record["ranks"] = record["ranks"] and record["ranks"][:200]


def ranks_nobody(record: Record) -> None:
    record["ranks"] = None


def hides_its_losses(record: Record) -> None:
    record["losses"] = []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (scores_half, "teacher_test: 768 rows, the baseline 1536"),
        (ranks_half, "teacher_test: recall@10 of 200, the baseline's of 400: not comparable"),
        (ranks_nobody, "teacher_test: recall@10 of none, the baseline's of 400: not comparable"),
        (hides_its_losses, "teacher_fit: training loss of none, the baseline's of 6: not"),
    ],
)
def test_less_work_proves_nothing(change: Change, said: str) -> None:
    judged = fooled(change)
    assert calls(judged, TOTAL)[BF16] == "unproven"
    assert judged.tables[TOTAL][1].reason.startswith(said)
    assert judged.best.is_baseline
    assert f"{BF16}: unproven: {said}" in texts(judged)


def test_what_the_baseline_hides_guards_nobody() -> None:
    """A guard against nothing is none, whoever it is that has nothing."""
    judged = fooled(ranks_nobody, "baseline")
    assert calls(judged, TOTAL)[BF16] == "unproven"
    assert "recall@10 of 400, the baseline's of none" in texts(judged)


def test_rows_of_a_fit_are_a_second_difference_unless_asked_for() -> None:
    def trains_on_half(record: Record) -> None:
        if record["stage"] == FIT:
            record["counts"]["rows"] //= 2

    judged = fooled(trains_on_half)
    assert calls(judged, TOTAL)[BF16] == "faster"
    assert "more than the setting under test differs: rows worked on: 384, baseline 768" in texts(
        judged
    )
    asked = Matrix.model_validate(
        SMALL.model_dump(exclude={"axes", "without_gpu"}) | {"axes": {"train.max_steps": [-1, 12]}}
    )
    planned = cells(asked, True)
    renamed = dict(zip(("baseline", BF16), planned, strict=True))
    records = []
    for record in small_records():
        cell = renamed[record["cell"]]
        record |= {"cell": cell.name, "key": cell.key, "facts": {}}
        if cell is planned[1] and record["stage"] == FIT:
            record["counts"]["rows"] //= 2
        records.append(record)
    assert "rows worked on" not in texts(judge(asked, planned, records))


def test_a_quality_drop_in_one_metric_is_enough() -> None:
    """Every hit stays a hit and falls to the last of ten places."""

    def last_of_ten(record: Record) -> None:
        record["ranks"] = record["ranks"] and [max(r, 9.0) for r in record["ranks"]]

    judged = fooled(last_of_ten)
    assert calls(judged, TOTAL)[BF16] == "worse quality"
    assert "recall@10" not in judged.tables[TOTAL][1].reason
    assert "ndcg@10" in judged.tables[TOTAL][1].reason


@pytest.mark.parametrize("who", [BF16, "baseline"])
def test_another_data_set_is_a_second_difference(who: str) -> None:
    """A file that was replaced while the run went on."""

    def eats_other_data(record: Record) -> None:
        record["data_digest"] = "b" * 64

    records = [record | {"data_digest": "a" * 64} for record in small_records()]
    assert "ratings" not in texts(small(records))
    for record in records:
        if record["cell"] == who and record["block"] > 2:
            eats_other_data(record)
    said = texts(small(records))
    assert "more than the setting under test differs: digest of the ratings: " in said
    assert f"the ratings changed between the repeats of: {who}" in said


# ---- time where nobody looks


def test_time_moved_out_of_the_stages_is_told() -> None:
    def moves(record: Record) -> None:
        record["process_wall_s"] = 30.0

    records = [timed(record, 20.0) for record in small_records()]
    assert "outside the measured stages" in texts(small(records))  # a cell with shorter stages
    honest = [timed(r, 4.0 + walls(records)[r["cell"], r["block"]]) for r in records]
    assert "outside the measured stages" not in texts(small(honest))
    for record in honest:
        if record["cell"] == BF16:
            record["process_wall_s"] += 3.0
    judged = small(honest)
    assert "3 s more outside the measured stages" in texts(judged)


def walls(records: list[Record]) -> dict[tuple[str, int], float]:
    found: dict[tuple[str, int], float] = {}
    for record in records:
        name = (record["cell"], record["block"])
        found[name] = found.get(name, 0.0) + record["wall_s"]
    return found


def test_a_phase_nobody_names_is_counted_and_not_believed() -> None:
    def forgets(record: Record) -> None:
        record["wall_s"] *= 1.5
        record["phases"]["unaccounted"] = 0.0

    judged = fooled(forgets)
    assert "teacher_fit: up to 34 % of the wall lies outside every named phase" in texts(judged)


def test_phases_that_claim_more_than_the_wall_are_told() -> None:
    def shortens(record: Record) -> None:
        record["wall_s"] *= 0.8

    assert "teacher_fit: the phases add up to 125 % of the wall" in texts(fooled(shortens))


@pytest.mark.parametrize("excess", [-0.001, 0.0, 0.001])
def test_the_play_of_two_clocks_is_no_complaint(excess: float) -> None:
    def reads_late(record: Record) -> None:
        record["wall_s"] = math.fsum(record["phases"].values()) * (1 + excess)

    assert "phases" not in texts(fooled(reads_late))


def test_steps_that_gain_what_the_stage_loses_are_told() -> None:
    def validates_longer(record: Record) -> None:
        record["phases"]["validation"] = record["wall_s"]
        record["wall_s"] *= 2

    judged = fooled(validates_longer)
    assert calls(judged, FIT)[BF16] == "faster"
    assert calls(judged, TOTAL)[BF16] == "slower"
    said = f"{BF16}: slower as a whole stage, though not by its steps: teacher_fit (whole stage "
    assert said in texts(judged)
    assert texts(judged).count("though not by its steps") == 1, "a line for a cell"


def test_stalls_in_a_few_steps_are_no_same() -> None:
    """A median does not see one step in four that takes ten times as long; the stage does."""

    def stalls(record: Record) -> None:
        for step in record["steps"][3::4]:
            record["wall_s"] += 9 * step["seconds"]
            record["phases"]["stalls"] = record["phases"].get("stalls", 0) + 9 * step["seconds"]
            step["seconds"] *= 10

    judged = fooled(stalls)
    assert calls(judged, FIT)[BF16] == "faster"
    said = f"{BF16}: slower as a whole stage, though not by its steps: teacher_fit (whole stage "
    assert said in texts(judged)
    assert texts(judged).count("though not by its steps") == 1, "a line for a cell"


def test_a_gain_in_the_warm_up_alone_is_none_of_the_steps() -> None:
    def warms_up_fast(record: Record) -> None:
        twin = next(
            one
            for one in small_records()
            if one["cell"] == "baseline"
            and (one["block"], one["stage"]) == (record["block"], record["stage"])
        )
        record["steps"] = copy.deepcopy(twin["steps"])
        for step in record["steps"][:2]:
            step["seconds"] /= 100

    judged = fooled(warms_up_fast)
    assert judged.tables[FIT][1].ratio == pytest.approx(1.0)
    assert calls(judged, FIT)[BF16] == "same"


def test_a_longer_warm_up_chosen_by_the_cell_is_a_second_difference() -> None:
    def chooses(record: Record) -> None:
        record["warmup_steps"] = 12

    assert "steps left out as warm-up: 12, baseline 2" in texts(fooled(chooses))


# ---- figures that are none


def test_a_record_shown_twice_is_no_second_measurement() -> None:
    once = {r["cell"] + r["stage"]: r for r in small_records() if r["block"] == 1}
    shown = [once[r["cell"] + r["stage"]] | {"block": r["block"]} for r in small_records()]
    said = texts(small(shown))
    assert f"teacher_fit: 5 processes have step times equal to the bit, of {BF16}: copied" in said
    assert "copied" not in texts(small(small_records()))


def test_the_baseline_s_record_under_another_name_is_found() -> None:
    theirs = {(r["block"], r["stage"]): r for r in small_records() if r["cell"] == "baseline"}

    def borrows(record: Record) -> None:
        record["steps"] = theirs[record["block"], record["stage"]]["steps"]

    assert f"2 processes have step times equal to the bit, of baseline; {BF16}" in texts(
        fooled(borrows)
    )


SOUND = {
    "stage": FIT,
    "status": "ok",
    "started": "now",
    "wall_s": 1.0,
    "phases": {"train_steps": 1.0},
    "steps": [{"seconds": 0.5, "samples": 4}] * 2,
    "warmup_steps": 0,
    "counts": {"rows": 8},
    "memory": {},
    "facts": {},
    "losses": [1.0],
    "metrics": {},
    "ranks": [0.0],
    "warnings": [],
}


@given(st.sampled_from(["wall_s", "seconds", "phase", "rank"]), st.floats(-1e9, -1e-9))
@hypothesis_settings(max_examples=40)
def test_no_figure_runs_backwards(what: str, below: float) -> None:
    """A clock that is set back must not become a speed-up, nor a crash of the judge."""
    assert deaths.stage_problem(SOUND) is None
    changes: dict[str, Any] = {
        "wall_s": {"wall_s": below},
        "seconds": {"steps": [{"seconds": below, "samples": 4}]},
        "phase": {"phases": {"train_steps": below}},
        "rank": {"ranks": [below]},
    }
    assert "teacher_fit: " in str(deaths.stage_problem(SOUND | changes[what]))


def test_a_coarse_clock_has_no_step_figure() -> None:
    def reads_nothing(record: Record) -> None:
        for step in record["steps"]:
            step["seconds"] = 0.0

    judged = fooled(reads_nothing)
    assert judged.tables[FIT][1].unit == "wall"
    assert "too few steady steps" in texts(judged)


def test_more_samples_than_rows_is_bad_output() -> None:
    steps = [{"seconds": 0.5, "samples": 8}] * 2
    said = "its steps hold 16 samples, its counts 8 rows"
    assert said in str(deaths.stage_problem(SOUND | {"steps": steps}))


# ---- the run around the records


def test_a_baseline_lost_in_one_block_takes_that_pair_only(tmp_path: Path) -> None:
    records = small_records()
    lost = [
        r | {"status": "oom_gpu", "steps": [], "losses": [], "ranks": None, "reason": "memory"}
        if (r["cell"], r["block"]) == ("baseline", 2)
        else r
        for r in records
    ]
    judged = small(lost)
    assert (judged.tables[FIT][1].repeats, calls(judged, FIT)[BF16]) == (5, "faster")
    without = small([r for r in records if r["block"] != 2])
    assert judged.tables[FIT][1].ratio == pytest.approx(without.tables[FIT][1].ratio)
    assert judged.tables[FIT][1].low == pytest.approx(without.tables[FIT][1].low)
    assert judged.exit_status == 1


def test_names_that_begin_alike_share_no_file(tmp_path: Path) -> None:
    """Also where one name ends as the files of another are called."""
    axis = {"teacher.llm_model_name": ["tiny", "a", "a-r1", "a-r1-again1", "a b", "a_b", "a" * 99]}
    run = a_run(tmp_path / "run", 1, axes=axis, repeats=2, remeasures=1)
    names = {file_name(cell) for cell in run.cells}
    assert len(names) == len(run.cells)
    launcher = FakeLauncher()
    found = measure(run, launcher)
    assert len(launcher.started) == 2 * len(run.cells)
    for record in found:
        cell = next(one for one in run.cells if one.key == record["key"])
        assert record["cell"] == cell.name
    assert len(list((tmp_path / "run" / "cells").glob("*-r[12].json"))) == 2 * len(run.cells)


def test_only_slow_repeats_measured_again_gain_nothing(tmp_path: Path) -> None:
    """A cell whose slow repeats call themselves disturbed has its second attempts judged, and the
    report says that they were second ones.
    """
    run = a_run(tmp_path / "run", 2, repeats=5)
    launcher = FakeLauncher(**{OTHER: {"tags": ["throttled: power 40 %"], "tagged": [2, 4]}})
    judged = judge(run.matrix, list(run.cells), measure(run, launcher))
    assert "measured again for that reason: 2" in texts(judged)


def test_a_changed_matrix_joins_no_run(bench: Bench) -> None:  # noqa: F811
    """What was measured under other settings is no repeat of the cell of that name."""
    matrix = bench.matrix()
    bench.run(matrix)
    (folder,) = bench.folders()
    resolved = folder / "matrix.yaml"
    resolved.write_text(resolved.read_text().replace("mean_length: ", "mean_length: 1"))
    before = (folder / "records.jsonl").read_bytes()
    done = bench.run(matrix, "--resume", folder.name)
    assert done.returncode == 2
    assert "baseline was measured with other settings" in done.stderr
    assert (folder / "records.jsonl").read_bytes() == before


# ---- memory of others


def with_device(record: Record, baseline_bytes: int, beside_bytes: int = 0) -> Record:
    held = record["memory"]["torch_reserved_peak_bytes"]
    over = held + (400 << 20) + beside_bytes
    memory = {
        "device_baseline_bytes": baseline_bytes,
        "device_peak_bytes": baseline_bytes + over,
        "device_delta_peak_bytes": over,
    }
    facts = {"name": "GPU-1", "source": "NVML memory v2", "samples": 20, "longest_gap_s": 0.1}
    return record | {"memory": record["memory"] | memory, "device": facts}


def test_memory_that_a_worker_leaves_behind_reaches_the_report() -> None:
    records = [with_device(r, (1 << 30) * (1 + (r["block"] > 2))) for r in small_records()]
    told = [text for text in texts(small(records)).splitlines() if "not given back" in text]
    assert told == [
        f"device GPU-1: 2.00 GiB in use before baseline repeat 4, 1.00 GiB before {BF16} repeat 3: "
        "not given back, or of others"
    ]
    assert "not given back" not in texts(small([with_device(r, 1 << 30) for r in small_records()]))


def test_a_neighbour_on_the_device_reaches_the_report() -> None:
    records = [
        with_device(r, 1 << 30, (2 << 30) * ((r["cell"], r["block"]) == (BF16, 2)))
        for r in small_records()
    ]
    assert f"teacher_fit: 2.39 GiB of device memory beside torch's in {BF16} repeat 3" in texts(
        small(records)
    )


def test_sentences_of_one_kind_do_not_flood_the_report() -> None:
    coming_and_going = [
        with_device(r, (1 << 30) * (1 + (r["block"] + (r["cell"] == BF16)) % 2))
        for r in small_records()
    ]
    told = texts(small(coming_and_going))
    assert told.count("not given back") == 3
    assert "further ones of this kind: " in told

    def undersampled(record: Record) -> Record:
        found = with_device(record, 1 << 30)
        return found | {"device": found["device"] | {"samples": record["block"]}}

    lines = texts(small([undersampled(record) for record in small_records()])).splitlines()
    found = [line for line in lines if "undersampled" in line]
    assert len(found) == len(SMALL.stages), "one line a stage, whatever their figures"
    assert all("(10 records)" in line for line in found)

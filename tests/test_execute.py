"""Which cells share a set-up, and the order in which a run walks its schedule."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import records
from bench.execute import Progress, Run, execute, file_name, upstream_need
from bench.launch import Interrupted, Outcome
from bench.launching.deaths import Events, Job
from bench.matrix import Matrix, cells
from core.settings import Settings

BASE = Settings()
OTHERS = {
    "data": Settings.model_validate({"data": {"seed": 1}}),
    "teacher": Settings.model_validate({"teacher": {"attn": "eager"}}),
    "train": Settings.model_validate({"train": {"precision": "bf16-mixed"}}),
    "distill": Settings.model_validate({"distill": {"lam": 0.1}}),
    "machine": Settings.model_validate({"machine": {"threads": 1}}),
}


@pytest.mark.parametrize(
    ("stages", "parting"),
    [
        (("teacher_fit", "teacher_test"), {"data"}),
        (("teacher_fit", "teacher_outputs"), {"data"}),
        (("teacher_outputs",), {"data", "teacher", "train"}),
        (("teacher_fit", "distill_fit"), {"data", "teacher", "train"}),
        (("distill_test",), {"data", "teacher", "train", "distill"}),
        (("prepare_data", "student_fit", "teacher_fit", "evaluate_all"), set(OTHERS) - {"machine"}),
    ],
)
def test_cells_share_a_set_up_unless_it_would_make_other_artefacts(
    stages: tuple[str, ...], parting: set[str]
) -> None:
    need = upstream_need(BASE, stages)
    assert need is not None
    parted = {name for name, other in OTHERS.items() if upstream_need(other, stages) != need}
    assert parted == parting


@pytest.mark.parametrize(
    "stages", [("prepare_data",), ("prepare_data", "student_fit", "teacher_fit")]
)
def test_nothing_upstream_needs_no_set_up(stages: tuple[str, ...]) -> None:
    assert upstream_need(BASE, stages) is None


class FakeLauncher:
    """Records what it was asked to start; ends every process at once, some in failure."""

    def __init__(self, failing: str = "") -> None:
        self.started: list[str] = []
        self.jobs: list[Job] = []
        self.failing = failing

    def __call__(self, job: Job, stopped: Any, on_progress: Any) -> Outcome:
        self.started.append(job.cell_file.stem)
        self.jobs.append(job)
        on_progress(Events())
        if job.cell_file.stem == self.failing:
            told = ("oom_gpu", "CUDA out of memory", "teacher_fit", ())
            return Outcome(*told, {}, "now", 2.0, ("the log",), phase="reload")
        lines = job.stages if job.task == "measure" else []
        ok = tuple(
            records.empty_record(stage, "ok", None) | {"started": "now", "wall_s": 1.0}
            for stage in lines
        )
        return Outcome("ok", None, "", ok, {"torch": "fake"}, "now", 2.0, ())


SILENT = Progress(
    expect=lambda count: None,
    begin=lambda name: None,
    step=lambda events: None,
    end=lambda name, outcome, is_measured: None,
)


def a_run(tmp_path: Path, **changes: Any) -> Run:
    """A run folder and a matrix of three cells and two repeats."""
    entries = {
        "question": "?",
        "stages": ["teacher_fit"],
        "axes": {"train.max_epochs": [1, 2, 3]},
        "repeats": 2,
    }
    matrix = Matrix.model_validate(entries | changes)
    folder = tmp_path / "m" / "run"
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, matrix, tuple(cells(matrix, False)), ("none",))


def walk(run: Run, launcher: FakeLauncher, untried: dict[str, str] | None = None) -> list[str]:
    """Names of the processes that were started."""
    launcher.started.clear()
    execute(run, {}, untried or {}, SILENT, lambda: False, lambda process: None, launcher)
    return launcher.started


def test_set_up_comes_first_then_each_cell_is_tried_and_blocks_rotate(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    launcher = FakeLauncher()
    processes: list[dict[str, Any]] = []
    execute(run, {}, {}, SILENT, lambda: False, processes.append, launcher)
    one, two, three = (file_name(cell) for cell in run.cells)
    set_up, *later = launcher.started
    assert set_up.startswith("set-up-")
    tried = [f"preflight-{name}-{half}" for name in (one, two, three) for half in ("fit", "load")]
    assert later[:6] == tried
    assert later[6:] == [f"{name}-r1" for name in (one, two, three)] + [
        f"{name}-r2" for name in (two, three, one)
    ]
    assert processes == [{"torch": "fake"}] * 6, "of measured processes alone"
    assert walk(run, launcher) == []


def test_both_halves_of_a_trial_share_a_folder_and_its_time(tmp_path: Path) -> None:
    run, launcher = a_run(tmp_path, preflight_timeout_s=5, timeout_s=4), FakeLauncher()
    walk(run, launcher)
    fit, load, measured = launcher.jobs[1], launcher.jobs[2], launcher.jobs[-1]
    assert (fit.task, load.task, measured.task) == ("preflight_fit", "preflight_load", "measure")
    assert (fit.timeout_s, load.timeout_s, measured.timeout_s) == (4, 3, 4)
    orders = [json.loads(job.cell_file.read_text()) for job in launcher.jobs]
    assert orders[1]["artefacts"] == orders[2]["artefacts"] != orders[3]["artefacts"]
    assert fit.env["TORCHINDUCTOR_CACHE_DIR"] == load.env["TORCHINDUCTOR_CACHE_DIR"]
    assert [path.name for path in (run.folder / "artefacts").iterdir()] == ["shared"]


@pytest.mark.parametrize("half", ["fit", "load"])
def test_a_failed_trial_blocks_its_cell_alone(tmp_path: Path, half: str) -> None:
    run = a_run(tmp_path, stages=["teacher_fit", "teacher_test"])
    bad = file_name(run.cells[1])
    launcher = FakeLauncher(failing=f"preflight-{bad}-{half}")
    started = walk(run, launcher)
    assert [name for name in started if bad in name] == [
        f"preflight-{bad}-{part}" for part in ("fit", "load")[: 1 if half == "fit" else 2]
    ]
    assert sum(name.endswith(("-r1", "-r2")) for name in started) == 4
    found = records.read(run.records_path)
    own = [record for record in found if record["key"] == run.cells[1].key]
    assert [(r["repeat"], r["stage"], r["status"]) for r in own] == [
        (0, "teacher_fit", "oom_gpu"),
        (0, "teacher_test", "skipped"),
    ]
    assert (own[0]["phase"], own[0]["log_tail"]) == ("preflight", ["the log"])
    assert own[0]["reason"] == "preflight: CUDA out of memory"
    assert own[1]["reason"] == "preflight failed: oom_gpu in teacher_fit"
    assert walk(run, FakeLauncher()) == [], "a blocked cell stays blocked"


def test_a_trial_is_not_repeated_and_one_cut_short_is(tmp_path: Path) -> None:
    """Stopped in the second cell's trial: the first has passed, whatever was measured since."""
    run, launcher = a_run(tmp_path), FakeLauncher()

    def stopping(job: Job, stopped: Any, on_progress: Any) -> Outcome:
        if job.cell_file.stem == f"preflight-{file_name(run.cells[1])}-load":
            raise Interrupted
        return launcher(job, stopped, on_progress)

    with pytest.raises(Interrupted):
        execute(run, {}, {}, SILENT, lambda: False, lambda process: None, stopping)
    started = walk(run, launcher)
    _, two, three = (file_name(cell) for cell in run.cells)
    assert [name for name in started if name.startswith("preflight")] == [
        f"preflight-{name}-{half}" for name in (two, three) for half in ("fit", "load")
    ]
    for path in (run.folder / "cells").glob("*.passed.json"):
        path.unlink()
    more = a_run(tmp_path, repeats=3)
    assert len(walk(more, launcher)) == 3, "what was measured in this run needs no trial"


def test_cells_without_a_trial_are_measured_at_once(tmp_path: Path) -> None:
    run = a_run(tmp_path, repeats=1)
    one, two, three = run.cells
    started = walk(run, FakeLauncher(), {one.key: "short", three.key: "short"})
    tried = [name for name in started if name.startswith("preflight")]
    assert tried == [f"preflight-{file_name(two)}-{half}" for half in ("fit", "load")]


def test_a_cell_whose_set_up_failed_is_not_tried(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    launcher = FakeLauncher()
    walk(run, launcher)
    set_up = launcher.started[0]
    other = a_run(tmp_path / "other")
    assert walk(other, FakeLauncher(failing=set_up)) == [set_up]
    assert {record["status"] for record in records.read(other.records_path)} == {"skipped"}


def test_file_names_stay_apart_and_hold_no_separator() -> None:
    matrix = Matrix.model_validate(
        {
            "question": "?",
            "stages": ["teacher_fit"],
            "axes": {"teacher.llm_model_name": ["a", "x/y", "x y", "x" * 300]},
        }
    )
    names = [file_name(cell) for cell in cells(matrix, False)]
    assert len(set(names)) == 4
    assert all("/" not in name and len(name) < 100 for name in names)
    assert names[0] == "baseline"

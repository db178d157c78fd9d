"""Which cells share a set-up, and the order in which a run walks its schedule."""

from pathlib import Path
from typing import Any

import pytest

from bench import records
from bench.deaths import Events, Job
from bench.execute import Progress, Run, execute, file_name, upstream_need
from bench.launch import Outcome
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
    """Records what it was asked to start; ends every process at once."""

    def __init__(self) -> None:
        self.started: list[str] = []

    def __call__(self, job: Job, stopped: Any, on_progress: Any) -> Outcome:
        self.started.append(job.cell_file.stem)
        on_progress(Events())
        lines = [] if job.prepare else job.stages
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


def test_set_up_comes_first_and_blocks_rotate(tmp_path: Path) -> None:
    matrix = Matrix.model_validate(
        {
            "question": "?",
            "stages": ["teacher_fit"],
            "axes": {"train.max_epochs": [1, 2, 3]},
            "repeats": 2,
        }
    )
    folder = tmp_path / "m" / "run"
    folder.mkdir(parents=True)
    planned = cells(matrix, False)
    launcher = FakeLauncher()
    processes: list[dict[str, Any]] = []
    run = Run(folder, matrix, tuple(planned), ("none",))
    execute(run, {}, SILENT, lambda: False, processes.append, launcher)
    one, two, three = (file_name(cell) for cell in planned)
    set_up, *measured = launcher.started
    assert set_up.startswith("set-up-")
    assert measured == [f"{name}-r1" for name in (one, two, three)] + [
        f"{name}-r2" for name in (two, three, one)
    ]
    assert processes == [{"torch": "fake"}] * 6
    launcher.started.clear()
    execute(run, {}, SILENT, lambda: False, processes.append, launcher)
    assert launcher.started == []


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

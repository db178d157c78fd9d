"""Runs the fake worker inside the test: whole runs through `bench.execute`, without processes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_worker

from bench import records
from bench.execute import Progress, Run, execute
from bench.launch import Outcome
from bench.launching.deaths import Events, Job
from bench.matrix import Matrix, cells

SILENT = Progress(
    expect=lambda count: None,
    begin=lambda name: None,
    step=lambda events: None,
    end=lambda name, outcome, is_measured: None,
)


class FakeLauncher:
    """Ends every process at once; its seconds are those its stages claim, cut at the time limit."""

    def __init__(self, **choices: dict[str, Any]) -> None:
        self.choices = {name.replace("__", "."): choice for name, choice in choices.items()}
        self.started: list[str] = []
        """Names of the measured processes in order: block and cell."""
        self.spent_s = 0.0

    def __call__(
        self, job: Job, stopped: Callable[[], bool], on_progress: Callable[[Events], None]
    ) -> Outcome:
        order = json.loads(job.cell_file.read_text())
        if order["task"] != "measure":
            return Outcome("ok", None, "", (), {}, "now", 0.1, ())
        again = "'" * order["attempt"]
        self.started.append(f"{order['block']}{again} {order['cell']}")
        job.records.touch()
        choice = self.choices.get(order["cell"], self.choices.get("every", {}))
        # Figures that do not change with every new setting, which changes the key.
        order["key"] = f"{order['settings']['seed']} {order['cell']}"
        lines = tuple(fake_worker.stage_line(order, stage, choice, "ok") for stage in job.stages)
        wall_s = sum(line["wall_s"] for line in lines)
        self.spent_s += min(wall_s, job.timeout_s)
        if wall_s > job.timeout_s:
            where = job.stages[0]
            return Outcome("timeout", "too long", where, (), {}, "now", job.timeout_s, ())
        return Outcome("ok", None, "", lines, {"torch": "fake"}, "now", wall_s, ())


def a_run(folder: Path, cell_count: int, seed: int = 0, **entries: Any) -> Run:
    """A run of cells that differ in the number of loader workers, which the fake worker proves."""
    matrix = Matrix.model_validate(
        {
            "question": "?",
            "stages": ["teacher_fit", "teacher_test"],
            "axes": {"train.num_workers": list(range(cell_count))},
            "base": {"seed": seed},
            "preflight": "never",
        }
        | entries
    )
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, matrix, tuple(cells(matrix, False)), ("none",))


def measure(run: Run, launcher: FakeLauncher) -> list[records.Record]:
    """Walk the run to its end; all its records."""
    untried = {cell.key: "never" for cell in run.cells}
    execute(run, {}, untried, SILENT, lambda: False, lambda process: None, launcher)
    return records.read(run.records_path)

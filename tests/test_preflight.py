"""Which cells get a short trial before they are measured, and what becomes of those that fail."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import preflight, records
from bench.launch import Outcome
from bench.matrix import Matrix, cells

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
SMALL = """\
question: Does the seed matter?
stages: [teacher_fit, teacher_test]
axes:
  data.seed: [0, 1, 2]
repeats: 2
timeout_s: 20
preflight_timeout_s: 10
"""
REAL = """\
question: Does the rate matter?
stages: [teacher_fit, teacher_test, teacher_outputs]
axes:
  train.lr: [0.001, 0.002, 0.003]
repeats: 1
timeout_s: 120
base:
  data.synthetic: {users: 100, items: 60, mean_length: 6}
  student: {max_epochs: 1, hidden_size: 16}
  teacher: {inference_batch_size: 16}
  train: {max_epochs: 1, batch_size: 16, max_steps: 6}
  machine: {threads: 1, device: cpu}
"""


def matrix(**changes: Any) -> Matrix:
    """Three cells of a teacher."""
    entries = {"question": "?", "stages": ["teacher_fit"], "axes": {"train.lr": [1, 2, 3]}}
    return Matrix.model_validate(entries | changes)


# ---- what is due ----


@pytest.mark.parametrize(
    ("stages", "number"),
    [
        (["prepare_data"], 0),
        (["evaluate_all"], 0),
        (["teacher_test"], 1),
        (["teacher_outputs", "distill_test"], 1),
        (["student_fit"], 2),
        (["prepare_data", "student_fit", "teacher_fit", "teacher_outputs", "evaluate_all"], 2),
    ],
)
def test_no_process_is_started_where_one_or_none_suffices(stages: list[str], number: int) -> None:
    assert len(preflight.halves(stages)) == number


def test_auto_leaves_out_cells_that_were_short() -> None:
    planned = cells(matrix(), False)
    one, two, three = (cell.key for cell in planned)
    seconds = {one: 59.0, two: 60.0}
    assert set(preflight.left_out(matrix(), planned, seconds)) == {one}
    assert preflight.left_out(matrix(preflight="always"), planned, seconds) == {}
    assert set(preflight.left_out(matrix(preflight="never"), planned, {})) == {one, two, three}
    whole = matrix(stages=["prepare_data"], preflight="always")
    assert set(preflight.left_out(whole, planned, {})) == {one, two, three}


def test_the_plan_counts_processes_and_names_the_cells_without() -> None:
    planned = cells(matrix(), False)
    one, two, three = planned
    reasons = {one.key: "short", three.key: "short", two.key: "asked"}
    assert list(preflight.lines(matrix(), planned, [], reasons)) == [
        "no preflight for 2: asked",
        "no preflight for 1 3: short",
    ]
    assert list(preflight.lines(matrix(), planned, planned, {})) == [
        "preflight: 2 short processes for each of 3 cells, at most 600 s for each cell"
    ]
    test_only = matrix(stages=["teacher_test"])
    (line,) = preflight.lines(test_only, planned, [one], {})
    assert line.startswith("preflight: 1 short process for each of 1 cells")


def test_the_rows_of_a_blocked_cell_end_its_measuring(tmp_path: Path) -> None:
    """Also where it died before or between the stages."""
    three = matrix(stages=["teacher_fit", "teacher_test", "teacher_outputs"])
    identity = {"matrix": "m", "cell": "c", "key": "k", "block": 0, "repeat": 0}
    for stage, others in (("teacher_test", 2), ("start_up", 3)):
        outcome = Outcome("timeout", "no end within 7 s", stage, (), {}, "now", 7.0, ())
        dead, *waiting = preflight.blocked(outcome, three, identity)
        assert (dead["stage"], dead["status"], dead["phase"]) == (stage, "timeout", "preflight")
        assert "preflight: no end within 7 s (preflight_timeout_s: 600 s for" in dead["reason"]
        assert [row["status"] for row in waiting] == ["skipped"] * others
        assert {row["reason"] for row in waiting} == {f"preflight failed: timeout in {stage}"}
        group = [dead, *waiting]
        records.append(tmp_path / stage, group)
        assert records.repair(tmp_path / stage, three.stages) == group
        assert records.finished(group, three.stages) == {("k", 0)}


@pytest.mark.parametrize(
    ("status", "phase", "shown"),
    [
        ("timeout", "compile", "compile"),
        ("timeout", "reload", "preflight"),
        ("oom_gpu", "compile", "preflight"),
    ],
)
def test_only_endless_compiling_keeps_its_phase(status: str, phase: str, shown: str) -> None:
    outcome = Outcome(status, "why", "teacher_fit", (), {}, "now", 7.0, (), phase=phase)
    dead, *_ = preflight.blocked(outcome, matrix(), {"cell": "c", "key": "k", "repeat": 0})
    assert dead["phase"] == shown
    assert dead["reason"].startswith("preflight: why")


# ---- from outside, with a fake worker ----


class Bench:
    """The command line in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.worker, self.variable = "fake_worker.py", "FAKE_WORKER"

    def start(self, text: str, *words: str | Path, **choices: Any) -> subprocess.Popen[str]:
        path = self.folder / "small.yaml"
        path.write_text(text)
        worker = f"{sys.executable} {TESTS / self.worker}"
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "bench.run",
                path,
                *words,
                "--out",
                self.out,
                "--worker",
                worker,
            ],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), self.variable: json.dumps(choices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, text: str, *words: Any, **choices: Any) -> tuple[int, str]:
        """Exit status and standard output."""
        process = self.start(text, *words, **choices)
        out, err = process.communicate(timeout=200)
        assert not err, err
        return process.returncode, out

    @property
    def run_folder(self) -> Path:
        return sorted(self.out.glob("small/*"))[-1]

    def rows(self) -> list[tuple[str, int, str, str]]:
        text = (self.run_folder / "records.jsonl").read_text()
        found = [json.loads(line) for line in text.splitlines()]
        return [(r["cell"], r["repeat"], r["stage"], r["status"]) for r in found]

    @property
    def report(self) -> str:
        return (self.run_folder / "report.md").read_text()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def tried(out: str) -> list[str]:
    """Cells in whose trials a process ended, by the display's lines."""
    return [line.split()[2][:-1] for line in out.splitlines() if line.startswith("preflight ")]


def test_a_failing_cell_is_blocked_with_its_reason_while_the_others_run(bench: Bench) -> None:
    status, out = bench.run(SMALL, **{"data.seed=1": {"preflight": "driver"}})
    assert status == 1
    assert "preflight 2/3 data.seed=1, load: driver in teacher_fit" in out
    assert tried(out) == ["baseline"] * 2 + ["data.seed=1"] * 2 + ["data.seed=2"] * 2
    rows = bench.rows()
    assert [row[1:] for row in rows if row[0] == "data.seed=1"] == [
        (0, "teacher_fit", "driver"),
        (0, "teacher_test", "skipped"),
    ]
    assert sum(row[3] == "ok" for row in rows) == 8
    assert "preflight: RuntimeError: CUDA driver error: operation not supported" in bench.report
    assert "preflight failed: driver in teacher_fit" in bench.report


def test_a_trial_that_hangs_costs_no_more_than_its_limit(bench: Bench) -> None:
    text = SMALL.replace("preflight_timeout_s: 10", "preflight_timeout_s: 1")
    begin_s = time.monotonic()
    status, _ = bench.run(text, **{"data.seed=2": {"preflight_fit": "hang"}})
    assert time.monotonic() - begin_s < 15
    assert status == 1
    assert ("data.seed=2", 0, "teacher_fit", "timeout") in bench.rows()


@pytest.mark.slow
def test_healthy_cells_are_tried_once_and_measured_as_ever(bench: Bench) -> None:
    status, out = bench.run(SMALL)
    assert status == 0, out
    assert {row[3] for row in bench.rows()} == {"ok"}
    assert len(bench.rows()) == 12
    assert len(tried(out)) == 6
    _, out = bench.run(SMALL, "--resume", bench.run_folder, "--repeats", "3")
    assert tried(out) == []
    assert len(bench.rows()) == 18
    # What was fast there needs no trial in the next run either.
    status, out = bench.run(SMALL)
    assert status == 0
    assert tried(out) == []
    assert "no preflight for 1 2 3: under 60 s for each process in earlier runs" in out
    _, out = bench.run(SMALL, "--set", "preflight=always", "--repeats", "1")
    assert len(tried(out)) == 6


def test_a_kill_in_the_trials_leaves_the_passed_ones_passed(bench: Bench) -> None:
    choices = {"data.seed=1": {"preflight": "hang"}}
    parent = bench.start(SMALL.replace("_timeout_s: 10", "_timeout_s: 100"), **choices)
    wait_for(lambda: any(bench.out.glob("small/*/cells/preflight-data.seed=1-load.jsonl")))
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    assert bench.rows() == []
    status, out = bench.run(SMALL, "--resume", bench.run_folder)
    assert status == 0, out
    assert tried(out) == ["data.seed=1"] * 2 + ["data.seed=2"] * 2
    assert len(bench.rows()) == 12


def wait_for(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_the_plan_says_what_will_be_tried(bench: Bench) -> None:
    _, out = bench.run(SMALL, "--plan")
    assert "preflight: 2 short processes for each of 3 cells, at most 10 s for each cell" in out
    _, out = bench.run(SMALL, "--plan", "--set", "preflight=never")
    assert "no preflight for 1 2 3: preflight: never" in out
    assert not bench.out.exists()


# ---- with the real worker ----


@pytest.mark.slow
def test_checkpoints_that_do_not_keep_the_model_block_their_cells(bench: Bench) -> None:
    """A key that never reached the file, numbers that come back changed; others are measured."""
    bench.worker, bench.variable = "forgetful_worker.py", "FORGETFUL_WORKER"
    ways = {"train.lr=0.002": "drops_a_key", "train.lr=0.003": "loads_other_numbers"}
    status, out = bench.run(REAL, **ways)
    assert status == 1, out
    stages = ("teacher_fit", "teacher_test", "teacher_outputs")
    assert bench.rows() == [
        *(
            (cell, 0, stage, "bad_output" if stage == "teacher_fit" else "skipped")
            for cell in ways
            for stage in stages
        ),
        *(("baseline", 1, stage, "ok") for stage in stages),
    ]
    assert "keys do not fit" in bench.report
    assert "loaded anew, the scores of 16 users differ by" in bench.report

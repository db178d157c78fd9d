"""The main command from outside: exit status, resume exactly once, plan."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAKE = f"{sys.executable} {ROOT / 'tests' / 'fake_worker.py'}"
SMALL = """\
question: Does the seed matter?
stages: [teacher_fit, teacher_test]
axes:
  data.seed: [0, 1]
repeats: 2
timeout_s: 20
"""


class Bench:
    """The command line in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"

    def matrix(self, text: str = SMALL, name: str = "small") -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(text)
        return path

    def command(self, *words: Any) -> list[str]:
        return [sys.executable, "-m", "bench.run", *map(str, words), "--out", str(self.out)]

    def start(self, *words: Any, **choices: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words, "--worker", FAKE),
            cwd=ROOT,
            env=environment(choices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: Any, variables: dict[str, str] | None = None, **choices: Any) -> Any:
        return subprocess.run(
            self.command(*words, "--worker", FAKE),
            cwd=ROOT,
            env=environment(choices) | (variables or {}),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def folders(self) -> list[Path]:
        return sorted(path.parent for path in self.out.glob("*/*/matrix.yaml"))

    def records(self, folder: Path | None = None) -> list[dict[str, Any]]:
        path = (folder or self.folders()[-1]) / "records.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]


def environment(choices: dict[str, Any]) -> dict[str, str]:
    cells = {name.replace("__", "."): choice for name, choice in choices.items()}
    cells.setdefault("*", cells.pop("every", {}))
    return os.environ | {"FAKE_WORKER": json.dumps(cells)}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def rows(records: list[dict[str, Any]]) -> Counter[tuple[str, int, str, str]]:
    return Counter((r["key"], r["repeat"], r["stage"], r["status"]) for r in records)


def wait_for(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_a_healthy_matrix(bench: Bench) -> None:
    done = bench.run(bench.matrix())
    assert done.returncode == 0, done.stderr
    (folder,) = bench.folders()
    assert done.stdout.splitlines()[-1] == str(folder / "report.md")
    assert (folder / "report.md").stat().st_size > 0
    found = bench.records()
    assert Counter((r["cell"], r["repeat"], r["stage"]) for r in found) == Counter(
        (cell, repeat, stage)
        for cell in ("baseline", "data.seed=1")
        for repeat in (1, 2)
        for stage in ("teacher_fit", "teacher_test")
    )
    assert {r["status"] for r in found} == {"ok"}
    assert [r["cell"] for r in found[::2]] == [
        "baseline",
        "data.seed=1",
        "data.seed=1",
        "baseline",
    ]
    machine = json.loads((folder / "machine.json").read_text())
    assert machine["process"]["torch"] == "fake"
    assert machine["worker"] == FAKE.split()
    assert [path.name for path in (folder / "artefacts").iterdir()] == ["shared"]
    assert "[4/4] block 2 baseline: ok in" in done.stdout


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_a_killed_parent_resumes_to_the_undisturbed_set(bench: Bench) -> None:
    """A failing cell and an unsupported one included; nothing is measured twice."""
    text = SMALL.replace("axes:", "axes:\n  teacher.attn: [sdpa, flash_attention_2]")
    failing = {"data__seed=1": {"mode": "oom_gpu"}}
    undisturbed = bench.run(bench.matrix(text, "undisturbed"), **failing)
    assert undisturbed.returncode == 1, undisturbed.stderr
    whole = rows(bench.records(next(bench.out.glob("undisturbed/*"))))
    matrix = bench.matrix(text, "disturbed")
    slow = failing | {"every": {"sleep_s": 0.1}}
    parent = bench.start(matrix, **slow)
    path = bench.out / "disturbed"
    for least in (3, 7):
        wait_for(lambda least=least: lines_below(path) >= least)
        parent.kill()
        parent.communicate()
        (folder,) = path.iterdir()
        with (folder / "records.jsonl").open("a") as file:
            file.write('{"schema": 1, "key": "to')
        parent = bench.start(matrix, "--resume", folder.name, **slow)
    out, err = parent.communicate(timeout=30)
    assert parent.returncode == 1, err
    assert out.splitlines()[-1] == str(folder / "report.md")
    assert rows(bench.records(folder)) == whole


def lines_below(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.glob("*/records.jsonl"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_a_report_and_says_how_to_go_on(bench: Bench, number: int) -> None:
    matrix = bench.matrix()
    parent = bench.start(matrix, **{"data__seed=1": {"mode": "hang", "repeats": [2]}})
    wait_for(lambda: lines_below(bench.out / "small") == 4)
    (folder,) = bench.folders()
    worker = folder / "cells" / "data.seed=1-r2.jsonl"
    wait_for(lambda: worker.exists() and "teacher_test" in worker.read_text())
    parent.send_signal(number)
    out, err = parent.communicate(timeout=20)
    assert parent.returncode == 130, err
    assert not is_alive(json.loads(worker.read_text().splitlines()[0])["pid"])
    assert out.splitlines()[-1] == str(folder / "report.md")
    assert len(bench.records(folder)) == 4
    if number == signal.SIGTERM:
        return  # the way on is the same
    hint = next(line for line in out.splitlines() if line.startswith("interrupted"))
    again = hint.split(": ", 1)[1].split()[3:]
    resumed = bench.run(*again)
    assert resumed.returncode == 0, resumed.stderr
    assert len(rows(bench.records(folder))) == 8
    assert set(rows(bench.records(folder)).values()) == {1}


def test_a_finished_run_takes_more_repeats_on_the_same_machine(bench: Bench) -> None:
    matrix = bench.matrix(SMALL.replace("repeats: 2", "repeats: 1"))
    bench.run(matrix)
    (folder,) = bench.folders()
    first = bench.records(folder)
    done = bench.run(matrix, "--resume", folder, "--repeats", 2)
    assert done.returncode == 0, done.stderr
    assert bench.records(folder)[:4] == first
    assert Counter(r["repeat"] for r in bench.records(folder)) == {1: 4, 2: 4}
    path = folder / "machine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cpu": "another"}))
    refused = bench.run(matrix, "--resume", folder, "--repeats", 3)
    assert refused.returncode == 3
    assert "cpu was another, is" in refused.stderr
    assert len(bench.records(folder)) == 8


def test_only_measures_the_cell_and_the_baseline_also_when_resumed(bench: Bench) -> None:
    matrix = bench.matrix(SMALL.replace("[0, 1]", "[0, 1, 2]").replace("repeats: 2", "repeats: 1"))
    done = bench.run(matrix, "--only", "seed=2")
    assert done.returncode == 0, done.stderr
    (folder,) = bench.folders()
    bench.run(matrix, "--resume", folder)
    assert Counter(r["cell"] for r in bench.records()) == {"baseline": 2, "data.seed=2": 2}


def test_a_failed_set_up_skips_its_cells_alone(bench: Bench) -> None:
    choices = {"data__seed=1": {"prepare": "raise"}}
    done = bench.run(bench.matrix(), **choices)
    assert done.returncode == 1, done.stderr
    skipped = [r for r in bench.records() if r["cell"] == "data.seed=1"]
    assert [(r["stage"], r["status"], r["repeat"]) for r in skipped] == [
        ("teacher_fit", "skipped", 0),
        ("teacher_test", "skipped", 0),
    ]
    assert "set-up failed: error in start_up" in skipped[0]["reason"]
    assert "an ordinary mistake" in skipped[0]["reason"]
    assert len([r for r in bench.records() if r["status"] == "ok"]) == 4


def test_a_cell_that_only_fails_is_given_up(bench: Bench) -> None:
    """Two failures end it; one failure beside a success does not."""
    text = SMALL.replace("[0, 1]", "[0, 1, 2]").replace("repeats: 2", "repeats: 4")
    choices = {"mode": "failure"}
    bench.run(
        bench.matrix(text),
        **{"data__seed=1": choices, "data__seed=2": choices | {"repeats": [1, 3, 4]}},
    )
    found = [(r["cell"], r["repeat"], r["status"]) for r in bench.records()]
    test_stage = [row for row in found if row[0] == "data.seed=1" and row[2] != "ok"]
    assert [row[1:] for row in test_stage] == [
        (1, "bad_output"),
        (2, "bad_output"),
        (0, "skipped"),
        (0, "skipped"),
    ]
    statuses = {row[1]: row[2] for row in found if row[0] == "data.seed=2"}
    assert statuses == {1: "bad_output", 2: "ok", 3: "bad_output", 4: "bad_output"}
    assert {row[1] for row in found if row[0] == "baseline"} == {1, 2, 3, 4}


def test_unsupported_cells_are_rows_and_no_failure(bench: Bench) -> None:
    text = SMALL.replace("repeats: 2", "repeats: 1").replace(
        "data.seed: [0, 1]", "machine.image: [host, cu121]\n  data.seed: [0, 1]"
    )
    done = bench.run(bench.matrix(text), variables={"PATH": "/nowhere"})
    assert done.returncode == 0, done.stderr
    found = {r["cell"]: r for r in bench.records()}
    assert found["machine.image=cu121"]["status"] == "unsupported"
    assert found["machine.image=cu121"]["reason"].startswith("no container engine")
    assert found["baseline"]["status"] == "ok"


def test_nothing_measured_is_a_failure(bench: Bench) -> None:
    text = SMALL + "base: {machine.image: cu118}\n"
    done = bench.run(bench.matrix(text), variables={"PATH": "/nowhere"})
    assert done.returncode == 1, done.stderr
    assert {r["status"] for r in bench.records()} == {"unsupported"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "data.sed=3"], "did you mean"),
        (["--only", "seed=9"], "--only seed=9: no such cell"),
        (["--repeats", "0"], "repeats"),
        (["--resume", "20200101-000000"], "no run folder and no run below"),
        (["--resume", "x", "--set", "seed=1"], "drop --set, --base and --only"),
    ],
)
def test_bad_input_is_2_and_writes_nothing(bench: Bench, words: list[str], message: str) -> None:
    done = bench.run(bench.matrix(), *words)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr
    assert not bench.out.exists()


def test_an_unfit_machine_is_3_and_writes_nothing(bench: Bench) -> None:
    done = bench.run(bench.matrix(), variables={"CUDA_LAUNCH_BLOCKING": "1"})
    assert done.returncode == 3
    assert done.stderr.startswith("machine: CUDA_LAUNCH_BLOCKING=1 is set")
    assert not bench.out.exists()


PLAN = """
import sys, time
sys.argv[1:] = {words}
begin = time.process_time()
from bench import run
try:
    run.app()
except SystemExit as end:
    assert end.code == 0, end.code
print(time.process_time() - begin)
print([name for name in ("torch", "scipy.stats", "matplotlib") if name in sys.modules])
"""


def plan(bench: Bench, matrix: Path) -> list[str]:
    script = PLAN.format(words=[str(matrix), "--plan", "--out", str(bench.out)])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_plan_says_all_quickly_without_torch_and_writes_nothing(bench: Bench) -> None:
    matrix = bench.matrix(SMALL.replace("repeats: 2", "repeats: 5") + "design: grid\n")
    lines = plan(bench, matrix)
    assert lines[-1] == "[]"
    assert float(lines[-2]) < 1.0
    text = "\n".join(lines)
    assert "Does the seed matter?" in text
    assert "2 cells x 5 repeats" in text
    assert [x for x in lines if x.startswith("block")][:2] == ["block 1: 1 2", "block 2: 2 1"]
    assert "10 processes to measure, 2 set-up processes before them" in text
    assert "no history" in text
    # (2.776 + 0.941) · √2 · 1 % / √5
    assert "smallest detectable difference: 2.4% for one comparison" in text
    assert "assumed: 1 % per process" in text
    assert not bench.out.exists()


def test_the_plan_learns_from_earlier_runs(bench: Bench) -> None:
    matrix = bench.matrix()
    bench.run(matrix, every={"noise": 0.05})
    text = "\n".join(plan(bench, matrix))
    assert "time: about" in text
    assert "(2 of 2 cells timed before)" in text
    assert "from earlier runs" in text


def test_the_plan_tells_the_range_the_budget_and_what_trials_took(bench: Bench) -> None:
    text = SMALL + "max_repeats: 6\nbudget_s: 2h\npreflight: always\n"
    matrix = bench.matrix(text)
    bench.run(matrix, "--max-repeats", 2)
    said = "\n".join(plan(bench, matrix))
    assert "2 cells x 2 repeats, up to 6 where undecided" in said
    assert re.search(r"time: about \d+ s \(2 of 2 cells timed before\), up to \d+ s with", said)
    assert re.search(r"; preflight about \d+ s; set-up about \d+ s", said)
    assert "budget: 120 min for the run" in said or "budget: 2 h 0 min for the run" in said


@pytest.mark.slow
def test_a_budget_on_the_command_line_ends_the_run_in_time(bench: Bench) -> None:
    """A cell that would take an hour gets its share, the others go on, all within the budget."""
    matrix = bench.matrix(SMALL.replace("[0, 1]", "[0, 1, 2]").replace("timeout_s: 20", ""))
    began_s = time.monotonic()
    done = bench.run(matrix, "--budget", "12s", **{"data__seed=1": {"mode": "hang"}})
    assert time.monotonic() - began_s < 12 + 15, "beside the processes: start-up and the report"
    assert done.returncode == 0, done.stderr
    found = bench.records()
    statuses = {(r["cell"], r["status"]) for r in found}
    assert statuses >= {("baseline", "ok"), ("data.seed=2", "ok"), ("data.seed=1", "skipped")}
    assert ("data.seed=1", "ok") not in statuses
    assert {r["stopped_by"] for r in found if r["status"] == "skipped"} == {"budget"}

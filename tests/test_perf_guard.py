"""The guard of `make perf` itself: what it must catch, and what it must let pass."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from perf import baseline, timing

ROOT = Path(__file__).resolve().parent.parent
PERF = ROOT / "tests" / "perf"


def test_processors_of_one_name_and_two_generations_are_two_classes(tmp_path, monkeypatch):
    classes = set()
    for model in (1, 2):
        told = tmp_path / "cpuinfo"
        told.write_text(f"cpu family\t: 26\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\n" * 2)
        monkeypatch.setattr(baseline, "CPUINFO", told)
        classes.add(baseline.machine_class())
        assert f" 26/{model}, " in baseline.machine_class()
    monkeypatch.setattr(baseline, "CPUINFO", tmp_path / "none")
    assert len(classes | {baseline.machine_class()}) == 3


# ---- the rule, on machines made up ----


class Machine:
    """A noisy clock: every call takes its cost times a little more or less, now and then double."""

    def __init__(self, seed: int, growth: float = 1.0005):
        self.random = random.Random(seed)
        self.now = 0.0
        self.drift, self.growth = 1.0, growth  # it gets slower all the time

    def clock(self) -> float:
        return self.now

    def work(self, cost: float):
        def call() -> None:
            self.drift *= self.growth
            noise = self.random.lognormvariate(0, 0.03) * (2 if self.random.random() < 0.05 else 1)
            self.now += cost * noise * self.drift

        return call


def outcome(seed: int, slower: float) -> bool | None:
    """Whether the gate holds for work that was accepted at half the reference's time, in a process
    that is a few per cent luckier or unluckier than the one of the acceptance.
    """
    machine = Machine(seed)
    luck = machine.random.lognormvariate(0, 0.03)
    reference, guarded = machine.work(0.02), machine.work(0.01 * slower * luck)
    at_least = 2 * baseline.TOLERATED
    return timing.compare(reference, guarded, at_least, machine.clock).holds(at_least)


def test_the_same_speed_holds_and_a_third_slower_does_not():
    trips = sum(outcome(seed, 1.0) is not True for seed in range(50))
    caught = sum(outcome(seed, 1.3) is not True for seed in range(50, 70))
    assert trips <= 1 and caught == 20


def test_drift_meets_both_alike():
    machine = Machine(1)
    found = timing.compare(machine.work(0.01), machine.work(0.01), None, machine.clock)
    assert found.low < 1 < found.high and found.high / found.low < 1.1
    assert found.blocks == timing.MOST_BLOCKS and machine.drift > 1.1


def test_short_work_is_repeated_until_a_clock_can_see_it():
    machine = Machine(2, growth=1.0)
    calls = []
    short = machine.work(1e-5)
    found = timing.compare(
        machine.work(2e-5), lambda: (calls.append(1), short()), None, machine.clock
    )
    assert found.ratio == pytest.approx(2, rel=0.05) and len(calls) > 100 * timing.CALLS
    assert found.milliseconds == pytest.approx(0.01, rel=0.2)


def test_sleeping_counts_as_time_and_no_account_means_the_wall_clock(monkeypatch):
    begun = timing.own_seconds()
    time.sleep(0.02)
    assert 0.015 < timing.own_seconds() - begun < 5
    monkeypatch.setattr(timing, "ACCOUNT", Path("nowhere"))
    assert timing.own_seconds() == pytest.approx(time.perf_counter(), abs=0.5)


# ---- the session, on a small suite of its own ----

SUITE = """\
import time
import pytest
pytestmark = pytest.mark.perf

def test_counted(guard):
    guard.counters("step", {"operators": 40, "operator mul": 7})

def test_written(guard):
    guard.counters("files", {"files": 3})

def test_timed(guard):
    guard.ratio("step / old", lambda: time.sleep(0.004), lambda: time.sleep(0.002))
"""


class Suite:
    """A guarded suite in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder / "suite"
        self.folder.mkdir()
        shutil.copy(PERF / "conftest.py", self.folder)
        self.page, self.baseline = folder / "report.md", folder / "baseline.json"
        self.write(SUITE)

    def write(self, text: str) -> None:
        (self.folder / "test_small.py").write_text(text)

    def run(self, *words: str) -> tuple[int, str]:
        """Exit status and output."""
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", str(self.folder), "--rootdir", str(self.folder)),
                *("-c", str(ROOT / "pyproject.toml"), "-m", "perf", "-p", "no:cacheprovider"),
                *("--perf-baseline", str(self.baseline), "--perf-page", str(self.page), *words),
            ],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{PERF.parent}{os.pathsep}{ROOT}"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The baseline that accepting makes."""
    found = Suite(tmp_path_factory.mktemp("accepted"))
    status, text = found.run("--perf-accept")
    assert status == 0, text
    return found.baseline


@pytest.fixture
def suite(tmp_path: Path, accepted: Path) -> Suite:
    """With an accepted baseline."""
    found = Suite(tmp_path)
    shutil.copy(accepted, found.baseline)
    return found


@pytest.mark.slow
def test_accepting_shows_what_changes_and_a_run_changes_nothing(suite):
    accepted = suite.baseline.read_text()
    status, text = suite.run()
    assert status == 0, text
    assert suite.baseline.read_text() == accepted, "a baseline never moves by itself"
    assert f"Baseline: {json.loads(accepted)['id']}" in suite.page.read_text()
    suite.write(SUITE.replace('"operators": 40', '"operators": 41'))
    status, text = suite.run("--perf-accept")
    assert status == 0 and '-   "operators": 40' in text and '+   "operators": 41' in text
    assert json.loads(suite.baseline.read_text())["counters"]["step"]["operators"] == 41
    assert suite.run()[0] == 0


def test_small_losses_do_not_add_up_by_being_accepted():
    ratios = [2.0]
    made = baseline.made_now({}, {"step": 2.0}, "here", None)
    for loss in (1.95, 1.9, 1.82):
        made = baseline.made_now({}, {"step": loss, "new": 1.0}, "here", made)
        ratios.append(made.ratios["step"]["ratio"])
    assert ratios == [2.0] * 4 and made.ratios["new"] == {"ratio": 1.0, "at_least": 0.85}
    assert baseline.made_now({}, {"step": 1.5}, "here", made).ratios["step"]["ratio"] == 1.5
    assert baseline.made_now({}, {"step": 1.95}, "there", made).ratios["step"]["ratio"] == 1.95


def test_a_changed_counter_fails_with_its_name(suite):
    suite.write(SUITE.replace('"operators": 40, "operator mul": 7', '"operators": 41'))
    status, text = suite.run()
    assert status == 1 and "operators: 40 -> 41 (+1)" in text and "operator mul: 7 -> 0" in text
    page = suite.page.read_text()
    assert "## Failed" in page and "CHANGED +1" in page and "make perf-accept" in text


def test_slower_work_fails(suite):
    suite.write(SUITE.replace("sleep(0.002)", "sleep(0.0028)"))
    status, text = suite.run()
    assert status == 1 and "is not above" in text and "FAILS" in suite.page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("def test_written", "def written", "files"),
        ("    guard.ratio(", "    return\n    guard.ratio(", "step / old"),
        ('"files", {', '"renamed", {', "files"),
        ("def test_timed", "@pytest.mark.skip\ndef test_timed", "step / old"),
    ],
    ids=["deleted", "measures nothing", "renamed", "skipped"],
)
def test_a_guarded_thing_that_is_missing_fails(suite, old, new, word):
    suite.write(SUITE.replace(old, new))
    status, text = suite.run()
    assert status == 1 and f"guarded but not measured: {word}" in text, text


@pytest.mark.slow
def test_empty_measurements_are_none(suite):
    suite.write(SUITE.replace('{"files": 3}', "{}"))
    assert "files: measured nothing" in suite.run("--perf-accept")[1]
    suite.write(SUITE.replace('{"files": 3}', '{"files": 0}'))
    status, text = suite.run()
    assert status == 1 and "files: measured nothing" in text


@pytest.mark.slow
def test_a_failed_test_accepts_nothing(suite):
    before = suite.baseline.read_text()
    suite.write(SUITE + "\ndef test_equal(guard):\n    assert 1 == 2\n")
    status, text = suite.run("--perf-accept")
    assert status == 1 and "nothing accepted" in text and suite.baseline.read_text() == before


def test_without_a_baseline_nothing_passes(tmp_path):
    suite = Suite(tmp_path)
    status, text = suite.run()
    assert status == 1 and "no accepted baseline; make perf-accept" in text
    assert not suite.baseline.exists()


@pytest.mark.slow
def test_a_new_measurement_wants_to_be_accepted(suite):
    suite.write(SUITE + "\ndef test_new(guard):\n    guard.counters('new', {'files': 1})\n")
    status, text = suite.run()
    assert status == 1 and "new: no accepted counters; make perf-accept" in text


@pytest.mark.slow
def test_an_edited_baseline_is_refused(suite):
    suite.baseline.write_text(suite.baseline.read_text().replace('"files": 3', '"files": 4'))
    status, text = suite.run()
    assert status != 0 and "it was edited" in text
    assert suite.run("--perf-accept")[0] == 0 and suite.run()[0] == 0


@pytest.mark.slow
def test_another_machine_is_not_judged_by_time_but_by_counters(suite):
    made = baseline.read(suite.baseline)
    other = baseline.Baseline(
        "Another, 64 cores", {"torch": "1.0"}, made.counters, made.ratios, made.accepted
    )
    suite.baseline.write_text(other.text())
    status, text = suite.run()
    assert status == 0 and "1 skipped" in text
    assert "TIMES NOT GUARDED (1 ratios; accepted on Another, 64 cores" in text
    assert "not judged: accepted on Another, 64 cores" in suite.page.read_text()
    suite.write(SUITE.replace('{"files": 3}', '{"files": 4}').replace("sleep(0.002)", "sleep(0.1)"))
    status, text = suite.run()
    assert status == 1 and "files: 3 -> 4 (+1)" in text
    assert "other libraries than accepted with: torch 1.0 ->" in text


@pytest.mark.slow
def test_a_part_of_the_suite_writes_nothing(suite):
    status, text = suite.run("-k", "counted")
    assert status == 0 and "part of the suite" in text and not suite.page.exists()
    before = suite.baseline.read_text()
    suite.run("-k", "counted", "--perf-accept")
    assert suite.baseline.read_text() == before


@pytest.mark.slow
def test_nothing_is_missed_where_no_guard_was_to_run(suite):
    suite.write(SUITE.replace("pytestmark", "unmarked"))
    status, _ = suite.run()
    assert status == pytest.ExitCode.NO_TESTS_COLLECTED and not suite.page.exists()


# ---- the real suite with faults planted ----


def perf(*words: str, faults: tuple[str, ...] = ()) -> tuple[int, str]:
    """The real suite, with some faults in the code."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", str(PERF), "-m", "perf", *words),
            *("-p", "perf.plants", "-p", "no:cacheprovider"),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(PERF.parent), "PERF_PLANT": ",".join(faults)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def accepted_here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline of this very machine: another one's judges no times here."""
    path = tmp_path_factory.mktemp("perf") / "baseline.json"
    shutil.copy(PERF / "baseline.json", path)
    status, text = perf("--perf-accept", "--perf-baseline", str(path))
    assert status == 0, text
    return path


def planted(path: Path, *faults: str) -> tuple[int, str]:
    """The guards of the teacher's training with some faults in the code."""
    return perf("-k", "teacher_fit", "--perf-baseline", str(path), faults=faults)


@pytest.mark.slow
def test_the_code_as_it_is_raises_no_alarm(accepted_here):
    status, text = planted(accepted_here)
    assert status == 0, text
    assert "NOT GUARDED" not in text


@pytest.mark.slow
def test_one_operator_more_in_a_step_is_caught(accepted_here):
    status, text = planted(accepted_here, "operator")
    assert status == 1 and "operator mul:" in text
    more = re.search(r"operators: \d+ -> \d+ \(\+(\d+)\)", text)
    assert int(more[1]) == 8, "forward and backward of four micro-batches"
    assert "FAILED tests/perf/test_ratios.py" not in text, "no slow-down was planted"


@pytest.mark.slow
def test_steps_a_third_slower_are_caught(accepted_here):
    status, text = planted(accepted_here, "slow")
    assert status == 1 and re.search(r"teacher_fit / yardstick: .* is not above", text)
    assert "FAILED tests/perf/test_counters.py" not in text, "no operator was planted"


def test_the_committed_baseline_is_whole():
    accepted = baseline.read(PERF / "baseline.json")
    assert {"teacher_fit", "teacher_inference", "student_fit", "ranking", "outputs_writing"} <= set(
        accepted.counters
    )
    assert all(limit["at_least"] > 0 for limit in accepted.ratios.values())

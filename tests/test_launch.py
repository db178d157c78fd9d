"""Every way a worker can end gets exactly its status, and nothing of it survives."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import deaths, launch, records
from bench.deaths import Events, Job
from bench.launch import Interrupted, Outcome, run_worker, stage_records
from core.settings import Settings

FAKE = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
STAGES = ("teacher_fit", "teacher_test")
IDENTITY = {"matrix": "m", "cell": "baseline", "key": "k", "block": 1, "repeat": 1}
Run = Callable[..., Outcome]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    cell = {
        **IDENTITY,
        "stages": STAGES,
        "settings": Settings().model_dump(mode="json"),
        "records": str(tmp_path / "records.jsonl"),
        "artefacts": str(tmp_path / "private"),
        "shared_artefacts": str(tmp_path / "shared"),
        "warmup_steps": 2,
        "prepare": False,
    }
    (tmp_path / "cell.json").write_text(json.dumps(cell))
    return Job(
        FAKE,
        tmp_path / "cell.json",
        tmp_path / "records.jsonl",
        tmp_path / "worker.log",
        STAGES,
        timeout_s=20.0,
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda **choice: monkeypatch.setenv("FAKE_WORKER", json.dumps({"*": choice}))


def limited(job: Job, **changes: Any) -> Job:
    return Job(**{**vars(job), **changes})


def test_a_sound_worker_is_ok(job: Job, fake: Callable[..., None]) -> None:
    seen: list[Events] = []
    fake(sleep_s=0.1)
    outcome = run_worker(job, on_progress=seen.append)
    assert (outcome.status, outcome.reason) == ("ok", None)
    assert [line["stage"] for line in outcome.stage_lines] == list(STAGES)
    assert outcome.process["torch"] == "fake"
    assert seen[-1].progress is not None
    lines = stage_records(outcome, IDENTITY)
    assert [(line["schema"], line["cell"], line["status"]) for line in lines] == [
        (1, "baseline", "ok")
    ] * 2


@pytest.mark.parametrize(
    ("mode", "status", "stage", "reason"),
    [
        ("silent_exit", "silent_exit", "teacher_test", "without an end record"),
        ("torn", "silent_exit", "teacher_test", "without an end record"),
        ("grandchild", "silent_exit", "teacher_test", "without an end record"),
        ("sigkill", "killed", "teacher_test", "SIGKILL"),
        ("oom_gpu", "oom_gpu", "teacher_test", "CUDA out of memory"),
        ("gvisor", "oom_gpu", "teacher_test", "INTERNAL ASSERT FAILED"),
        ("import", "import", "teacher_test", "undefined symbol"),
        ("driver", "driver", "teacher_test", "operation not supported"),
        ("raise", "error", "teacher_test", "an ordinary mistake"),
        ("failure", "bad_output", "teacher_test", "backward: loss is nan at optimizer step 3"),
        ("nan_loss", "bad_output", "teacher_fit", "teacher_fit: losses.3 is nan"),
        ("missing_stage", "bad_output", "teacher_test", "no record of teacher_test"),
        ("crash_at_exit", "killed", "tear_down", "SIGSEGV"),
    ],
)
def test_a_death_gets_its_name(
    job: Job, fake: Callable[..., None], mode: str, status: str, stage: str, reason: str
) -> None:
    fake(mode=mode)
    outcome = run_worker(job)
    assert (outcome.status, outcome.stage) == (status, stage)
    assert reason in str(outcome.reason)
    assert no_process_of_group(job)
    lines = stage_records(outcome, IDENTITY)
    sound = {"tear_down": list(STAGES), "teacher_fit": []}.get(stage, ["teacher_fit"])
    assert [line["stage"] for line in lines] == [*sound, stage]
    assert [line["status"] for line in lines] == ["ok"] * len(sound) + [status]
    assert lines[-1]["log_tail"] == list(outcome.log_tail)
    json.dumps(lines, allow_nan=False)


def no_process_of_group(job: Job) -> bool:
    """Neither the worker nor what it started in its group is alive."""
    start = json.loads(job.records.read_text().splitlines()[0])
    try:
        os.killpg(start["pid"], 0)
    except ProcessLookupError:
        return True
    # Orphans may wait a moment for their reaper.
    states = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat")]
    group = [text.rsplit(")", 1)[1].split() for text in states]
    return all(fields[0] == "Z" for fields in group if fields[2] == str(start["pid"]))


def test_a_kill_with_a_raised_counter_is_the_hosts_memory(
    job: Job, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([3, 4])
    monkeypatch.setattr(launch, "oom_kills", lambda: next(counts))
    fake(mode="sigkill")
    assert run_worker(job).status == "oom_host"


class JumpingClock:
    """Monotonic time that leaps at each sleep, so that a limit of an hour passes at once."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        self.now_s += 600.0 if self.started else seconds

    started = False


def test_a_hang_ends_at_the_limit_with_its_place(job: Job, fake: Callable[..., None]) -> None:
    clock = JumpingClock()

    def start_leaping(events: Events) -> None:
        clock.started = bool(events.progress and events.progress["stage"] == "teacher_test")

    fake(mode="hang")
    outcome = run_worker(limited(job, timeout_s=3600.0), on_progress=start_leaping, clock=clock)
    assert outcome.status == "timeout"
    assert outcome.reason == "no end within 3600 s; last seen in teacher_test, phase steps, step 1"
    assert no_process_of_group(job)


def test_a_stop_kills_the_group(job: Job, fake: Callable[..., None]) -> None:
    fake(mode="hang")
    with pytest.raises(Interrupted):
        run_worker(job, stopped=lambda: job.records.exists() and "test" in job.records.read_text())
    assert no_process_of_group(job)


def test_the_worker_dies_with_its_parent(job: Job, fake: Callable[..., None]) -> None:
    fake(mode="hang")
    parent = os.fork()
    if parent == 0:
        run_worker(job)
        os._exit(0)
    wait_until(lambda: job.records.exists() and "progress" in job.records.read_text())
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_until(lambda: no_process_of_group(job))


def wait_until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("log", "status"),
    [
        (["ImportError: harmless", "Traceback (most recent call last):", "ValueError: x"], None),
        (["Traceback (most recent call last):", "MemoryError"], "oom_host"),
        (["Traceback (most recent call last):", "torch.cuda.OutOfMemoryError: x"], "oom_gpu"),
        (["CUDA error: GPU is lost"], "driver"),
        (["No module named 'peft'"], "import"),
        ([], None),
    ],
)
def test_only_the_last_traceback_counts(log: list[str], status: str | None) -> None:
    found = deaths.text_death(log)
    assert (found and found[0]) == status


def test_a_shell_around_the_worker_passes_its_signal_on(job: Job) -> None:
    command = ("/bin/sh", "-c", "kill -9 $$; :")
    assert run_worker(limited(job, command=command)).status == "killed"
    command = ("/bin/sh", "-c", "exit 137")
    assert run_worker(limited(job, command=command)).status == "killed"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"wall_s": None}, "wall_s is NoneType"),
        ({"wall_s": float("inf")}, "wall_s is inf"),
        ({"steps": None}, "steps is NoneType"),
        ({"status": "error"}, "status error"),
        ({"metrics": {"recall@10": float("nan")}}, "metrics.recall@10 is nan"),
    ],
)
def test_a_stage_line_must_be_whole(
    job: Job, fake: Callable[..., None], change: dict[str, Any], problem: str
) -> None:
    fake()
    line = run_worker(job).stage_lines[0]
    assert deaths.stage_problem(line) is None
    assert problem in str(deaths.stage_problem(line | change))


def test_twice_the_same_stage_is_bad_output_and_kept_once(job: Job) -> None:
    fit = {"stage": "teacher_fit"} | records.empty_record("teacher_fit", "ok", None)
    fit |= {"started": "now", "wall_s": 1.0}
    events = Events(stages=[fit, fit, fit | {"stage": "teacher_test"}], ended=True)
    status, reason = deaths.name_death(job, events, 0, False, False, [])
    assert (status, reason) == (
        "bad_output",
        "unexpected records: ['teacher_fit', 'teacher_fit', 'teacher_test']",
    )
    assert [line["stage"] for line in deaths.sound_lines(job, events)] == list(STAGES)


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [
        ("error", "RuntimeError: CUDA driver error: operation not supported", "driver"),
        (None, "RuntimeError: CUDA driver error: operation not supported", "driver"),
        (None, "ValueError: x", "error"),
        ("bad_output", "loss is nan; CUDA out of memory", "bad_output"),
        ("nonsense", "x", "error"),
    ],
)
def test_the_workers_word_decides_unless_it_says_only_error(
    job: Job, status: str | None, reason: str, expected: str
) -> None:
    events = Events(failure={"stage": "teacher_fit", "status": status, "reason": reason})
    assert deaths.name_death(job, events, 1, False, False, [])[0] == expected


def test_garbage_in_the_records_is_bad_output(job: Job) -> None:
    job.records.write_text('{"kind": "start"}\nnonsense\n{"kind": "end"}\n')
    events = Events()
    deaths.read_events(job.records, events)
    assert events.ended
    assert deaths.name_death(job, events, 0, False, False, [])[0] == "bad_output"

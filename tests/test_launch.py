"""How a worker's end is found out and named, and that nothing of it survives.

What the command makes of each kind of end is in the failure drills.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import launch, records
from bench.launch import Interrupted, Outcome, run_worker, stage_records
from bench.launching import deaths, texts
from bench.launching.deaths import Events, Job
from bench.launching.limits import Watch
from bench.machine import UnfitMachine
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
        "task": "measure",
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
    ("mode", "status", "stage", "phase", "reason"),
    [
        ("silent_exit", "silent_exit", "teacher_test", "steps", "without an end record"),
        ("failure", "bad_output", "teacher_test", "backward", "backward: loss is nan at optimizer"),
        ("nan_loss", "bad_output", "teacher_fit", None, "teacher_fit: losses.3 is nan"),
        ("missing_stage", "bad_output", "teacher_test", "steps", "no record of teacher_test"),
        ("crash_at_exit", "killed", "tear_down", None, "SIGSEGV"),
    ],
)
def test_a_death_has_its_place_and_keeps_the_sound_stages(
    job: Job,
    fake: Callable[..., None],
    mode: str,
    status: str,
    stage: str,
    phase: str | None,
    reason: str,
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
    assert lines[-1]["phase"] == phase
    json.dumps(lines, allow_nan=False)


def no_process_of_group(job: Job) -> bool:
    """Neither the worker nor what shares its group, the keeper included, is alive."""
    start = json.loads(job.records.read_text().splitlines()[0])
    # Orphans may wait a moment for their reaper.
    states = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat")]
    group = [text.rsplit(")", 1)[1].split() for text in states]
    return all(fields[0] == "Z" for fields in group if fields[2] == str(start["session"]))


def test_a_kill_with_a_raised_counter_is_the_hosts_memory(
    job: Job, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([3, 4])
    monkeypatch.setattr(launch, "oom_kills", lambda container: next(counts))
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


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"timeout_s": 3600.0}, "timeout_s: no end within 3600 s"),
        ({"hang_timeout_s": 900.0}, "hang_timeout_s: no new step or phase for 900 s"),
        ({"phase_timeouts_s": {"steps": 60.0}}, "phase_timeouts_s.steps: more than 60 s in this"),
    ],
)
def test_a_hang_ends_at_a_limit_with_its_place(
    job: Job, fake: Callable[..., None], limits: dict[str, Any], said: str
) -> None:
    clock = JumpingClock()

    def start_leaping(events: Events) -> None:
        clock.started = bool(events.progress and events.progress["stage"] == "teacher_test")

    fake(mode="hang")
    outcome = run_worker(
        limited(job, **{"timeout_s": 1e6} | limits), on_progress=start_leaping, clock=clock
    )
    assert (outcome.status, outcome.stage, outcome.phase) == ("timeout", "teacher_test", "steps")
    assert str(outcome.reason).startswith(said)
    assert str(outcome.reason).endswith("; last seen in teacher_test, phase steps, step 1")
    assert no_process_of_group(job)
    assert stage_records(outcome, IDENTITY)[-1]["phase"] == "steps"


# ---- limits, by hand ----


def lines(*told: tuple[float, str, int], stage: str = "teacher_fit") -> list[dict[str, Any]]:
    """Progress lines from (worker's clock, phase, step)."""
    return [
        {"kind": "progress", "time_s": time_s, "stage": stage, "phase": phase, "step": step}
        for time_s, phase, step in told
    ]


class Told:
    """A worker's lines and the parent's looks at them, at times of our own."""

    def __init__(self, job: Job, **limits: Any) -> None:
        self.job = limited(job, **{"timeout_s": 1e6} | limits)
        self.events = Events()
        self.watch = Watch(self.job, 1000.0)

    def look(self, after_s: float, *new: dict[str, Any]) -> str | None:
        """What the parent finds so long after the start, when these lines are new."""
        with self.job.records.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in new)
        deaths.read_events(self.job.records, self.events)
        return self.watch.passed(self.events, 1000.0 + after_s)

    def reason(self, limit: str | None) -> str:
        return str(deaths.name_death(self.job, self.events, 0, limit, False, [])[1])


def test_a_step_or_a_phase_is_a_sign_of_life_and_a_line_alone_is_none(job: Job) -> None:
    told = Told(job, hang_timeout_s=10.0)
    assert told.look(9, *lines((9, "set_up", 0))) is None
    assert told.look(18, *lines((18, "steps", 0))) is None
    assert told.look(27, *lines((27, "steps", 1))) is None
    assert told.look(36, *lines((36, "steps", 1))) is None
    assert told.look(38, *lines((38, "steps", 1))) == (
        "hang_timeout_s: no new step or phase for 10 s"
    )


def test_a_worker_silent_from_its_start_hangs(job: Job) -> None:
    told = Told(job, hang_timeout_s=10.0)
    assert told.look(9) is None
    assert told.reason(told.look(11)) == (
        "hang_timeout_s: no new step or phase for 10 s; last seen in start_up"
    )


def test_a_worker_that_says_end_and_stays_hangs(job: Job) -> None:
    told = Told(job, hang_timeout_s=10.0)
    stage = {"kind": "stage"} | records.empty_record("teacher_fit", "ok", None)
    assert told.look(9, *lines((9, "steps", 1)), stage, {"kind": "end"}) is None
    assert told.reason(told.look(20)).endswith("; last seen in tear_down")


def test_the_limit_of_a_phase_counts_each_visit_anew(job: Job) -> None:
    told = Told(job, phase_timeouts_s={"validation": 10.0})
    assert told.look(1, *lines((1, "validation", 0))) is None
    assert told.look(9, *lines((9, "steps", 0))) is None
    assert told.look(50, *lines((50, "validation", 0))) is None
    assert told.look(59, *lines((59, "validation", 7))) is None
    assert told.look(61) == "phase_timeouts_s.validation: more than 10 s in this phase"


def test_the_limit_of_compiling_counts_the_sum_of_its_visits(job: Job) -> None:
    """Most visits are over before the parent looks; those count by the worker's own clock."""
    told = Told(job, phase_timeouts_s={"compile": 10.0}, hang_timeout_s=10.0)
    assert told.look(1, *lines((1, "steps", 0))) is None
    visits = [
        (2 + i + half, "compile" if not half else "steps", 0) for i in range(8) for half in (0, 0.9)
    ]
    assert told.look(10, *lines(*visits)) is None
    assert told.events.compile_s == pytest.approx(8 * 0.9)
    assert told.look(12, *lines((12, "compile", 0))) is None
    assert told.look(14.5) is None
    assert told.look(15) == "phase_timeouts_s.compile: more than 10 s in this phase"


def test_compiling_with_a_limit_of_its_own_is_no_hang(job: Job) -> None:
    told = Told(job, phase_timeouts_s={"compile": 100.0}, hang_timeout_s=10.0)
    assert told.look(1, *lines((1, "compile", 0))) is None
    assert told.look(50) is None
    assert told.look(60, *lines((60, "steps", 1))) is None
    assert told.look(71) == "hang_timeout_s: no new step or phase for 10 s"
    without = Told(limited(job, records=job.log), hang_timeout_s=10.0)
    assert without.look(1, *lines((1, "compile", 0))) is None
    assert without.look(12) == "hang_timeout_s: no new step or phase for 10 s"


@pytest.mark.parametrize(
    ("learnt", "said"),
    [
        (
            {"graphs": 3, "breaks": 1, "compile_s": 5.125},
            "; learnt: 3 graphs, 1 break after 5.1 s of compiling",
        ),
        ({"graphs": "many", "compile_s": "long"}, "; learnt: "),
        ("nothing", ""),
    ],
)
def test_the_reason_says_what_was_learnt(job: Job, learnt: Any, said: str) -> None:
    told = Told(job, phase_timeouts_s={"compile": 10.0})
    (line,) = lines((1, "compile", 0))
    told.look(1, line | {"learnt": learnt})
    assert told.reason(told.look(12)).endswith(f"phase compile, step 0{said}")


# ---- stopping ----


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


def test_the_workers_group_dies_with_its_keeper(job: Job, fake: Callable[..., None]) -> None:
    fake(mode="hang")
    told: list[Events] = []

    def kill_keeper(events: Events) -> None:
        if events.start and events.progress and not told:
            told.append(events)
            os.kill(events.start["session"], signal.SIGKILL)

    outcome = run_worker(job, on_progress=kill_keeper)
    assert outcome.status == "killed"
    assert no_process_of_group(job)


def test_nothing_of_a_spreading_tree_of_sessions_is_left(job: Job) -> None:
    number = f"{600 + os.getpid() % 100}.5"
    code = f"""
import os
for generation in range(6):
    os.fork() or os.setsid()
os.execlp("sleep", "sleep", "{number}")
"""
    script = job.log.with_name("spread.py")
    script.write_text(code)
    command = ("/bin/sh", "-c", f"{sys.executable} -S {script} & sleep 0.3")
    assert run_worker(limited(job, command=command)).status == "silent_exit"
    left = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not [line for line in left if number.encode() in line]


def test_a_command_that_is_not_there_is_an_error_with_its_text(job: Job) -> None:
    outcome = run_worker(limited(job, command=("no-such-command",)))
    assert outcome.status == "error"
    assert "no-such-command" in str(outcome.reason)


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
    found = texts.text_death(log)
    assert (found and found[0]) == status


def test_what_a_library_logs_about_an_optional_package_explains_no_signal(job: Job) -> None:
    log = ["CUDA driver error: x", "Failed to load a kernel: No module named 'kernels'"]
    end = deaths.name_death(job, Events(), -signal.SIGSEGV, None, False, log[1:])
    assert end == ("killed", "SIGSEGV")
    end = deaths.name_death(job, Events(), -signal.SIGABRT, None, False, log)
    assert end == ("driver", log[0])


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
        ({"losses": ["low"]}, "a phase, loss, rank or step is no figure"),
        ({"phases": {"steps": None}}, "a phase, loss, rank or step is no figure"),
        ({"steps": [17]}, "a phase, loss, rank or step is no figure"),
        ({"steps": [{"seconds": 1.0}]}, "a phase, loss, rank or step is no figure"),
        ({"metrics": {"recall@10": float("nan")}}, "metrics.recall@10 is nan"),
        ({"wall_s": 0.0}, "wall_s is 0"),
        ({"wall_s": -1.0}, "wall_s is -1"),
        ({"phases": {"train_steps": -0.5}}, "is -0.5, below 0"),
        ({"steps": [{"seconds": -0.1, "samples": 1}]}, "is -0.1, below 0"),
        ({"ranks": [-1.0]}, "is -1.0, below 0"),
        ({"ranks": ["first"]}, "a phase, loss, rank or step is no figure"),
        (
            {"counts": {"rows": 32}, "steps": [{"seconds": 0.1, "samples": 33}]},
            "its steps hold 33 samples, its counts 32 rows",
        ),
    ],
)
def test_a_stage_line_must_be_whole(
    job: Job, fake: Callable[..., None], change: dict[str, Any], problem: str
) -> None:
    fake()
    line = run_worker(job).stage_lines[0]
    assert deaths.stage_problem(line) is None
    assert problem in str(deaths.stage_problem(line | change))


CLOCK = {"begun_s": 100.5, "imported_s": 103.0, "ready_s": 103.2}


def test_a_process_adds_up_with_its_stages() -> None:
    stages = [{"stage": "teacher_fit", "wall_s": 4.0}, {"stage": "teacher_test", "wall_s": 1.0}]
    events = Events(start={"clock": CLOCK}, stages=stages, ended=True, ended_s=108.5)
    found = deaths.process_phases(events, 100.0, 108.9)
    assert found == pytest.approx(
        {
            "start_up": 0.5,
            "imports": 2.5,
            "device": 0.2,
            "between_stages": 0.3,
            "tear_down": 0.4,
        }
    )
    assert sum(found.values()) + 5.0 == pytest.approx(8.9)


@pytest.mark.parametrize(
    "events",
    [
        Events(ended=True, ended_s=108.5),
        Events(start={"clock": CLOCK}, ended=True),
        Events(start={"clock": CLOCK | {"ready_s": "soon"}}, ended=True, ended_s=108.5),
        Events(start={"clock": CLOCK | {"begun_s": 7.0}}, ended=True, ended_s=108.5),
    ],
    ids=["none told", "no end told", "no number", "another machine's clock"],
)
def test_without_sound_times_a_process_has_no_phases(events: Events) -> None:
    assert deaths.process_phases(events, 100.0, 108.9) == {}


def test_twice_the_same_stage_is_bad_output_and_kept_once(job: Job) -> None:
    fit = {"stage": "teacher_fit"} | records.empty_record("teacher_fit", "ok", None)
    fit |= {"started": "now", "wall_s": 1.0}
    events = Events(stages=[fit, fit, fit | {"stage": "teacher_test"}], ended=True)
    status, reason = deaths.name_death(job, events, 0, None, False, [])
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
    assert deaths.name_death(job, events, 1, None, False, [])[0] == expected


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"\xff\xfe",
        b"[" * 100_000,
        b"17",
        b'{"kind": "else"}',
        b'{"kind": "start", "machine": "mine"}',
        b'{"kind": "stage", "stage": []}',
        b'{"kind": "progress", "stage": "teacher_fit", "phase": "steps", "time_s": "soon"}',
    ],
    ids=lambda line: line[:30].decode(errors="replace"),
)
def test_garbage_in_the_records_is_bad_output(job: Job, line: bytes) -> None:
    job.records.write_bytes(b'{"kind": "start"}\n' + line + b'\nmore\n{"kind": "end"}\n')
    events = Events()
    deaths.read_events(job.records, events)
    assert events.ended
    status, reason = deaths.name_death(job, events, 0, None, False, [])
    assert status == "bad_output"
    assert f"{line[:80].decode(errors='replace')!a}" in str(reason), "the first is named"


# ---- disk ----


@pytest.mark.parametrize(
    ("reason", "log", "found"),
    [
        ("OSError: [Errno 28] No space left on device: 'x.pt'", [], True),
        (None, ["I/O error: No space left on device (os error 28)"], True),
        (None, ["OSError: [Errno 122] Disk quota exceeded"], True),
        ("unable to write to file </torch_17>: No space left on device (28)", [], False),
        ("ValueError: x", ["ValueError: x"], False),
    ],
)
def test_a_full_disk_is_read_from_the_text_unless_it_is_shared_memory(
    reason: str | None, log: list[str], found: bool
) -> None:
    assert bool(texts.full_disk(reason, log)) == found


def test_a_worker_that_fails_on_a_full_disk_is_nobodys_result(job: Job) -> None:
    code = "raise OSError(28, 'No space left on device')"
    with pytest.raises(UnfitMachine, match=r"disk is full \(.*Errno 28.*--resume"):
        run_worker(limited(job, command=(sys.executable, "-c", code)))

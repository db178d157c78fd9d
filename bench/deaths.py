"""Reads what a worker wrote and names how it ended, by its own word, signal, log and output."""

import json
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.records import nonfinite

WORKER_STATUSES = ("oom_gpu", "oom_host", "import", "driver", "bad_output", "unsupported", "error")
DEATH_TEXTS = (
    # The allocator's own complaint; inside gVisor, NVML cannot report and torch asserts instead
    # (google/gvisor#9700).
    (
        "oom_gpu",
        re.compile(r"CUDA out of memory|NVML_SUCCESS == r INTERNAL ASSERT FAILED|OutOfMemoryError"),
    ),
    (
        "driver",
        re.compile(
            r"CUDA driver error|CUDA error: .*operation not supported|CUDA unknown error"
            r"|CUDA driver version is insufficient|GPU is lost|fallen off the bus",
            re.IGNORECASE,
        ),
    ),
    ("import", re.compile(r"ImportError|ModuleNotFoundError|undefined symbol|No module named")),
    ("oom_host", re.compile(r"\bMemoryError\b|DefaultCPUAllocator: .*allocate memory")),
)
STAGE_FIELDS: dict[str, type | tuple[type, ...]] = {
    "status": str,
    "started": str,
    "wall_s": (int, float),
    "phases": dict,
    "steps": list,
    "warmup_steps": int,
    "counts": dict,
    "memory": dict,
    "facts": dict,
    "losses": list,
    "metrics": dict,
    "warnings": list,
}


@dataclass(frozen=True)
class Job:
    """One worker process to start: its command line, its files and its limit."""

    command: tuple[str, ...]
    cell_file: Path
    records: Path
    log: Path
    stages: tuple[str, ...]
    timeout_s: float
    prepare: bool = False


@dataclass
class Events:
    """What the worker wrote so far."""

    offset: int = 0
    start: dict[str, Any] | None = None
    progress: dict[str, Any] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    failure: dict[str, Any] | None = None
    ended: bool = False
    damaged: str | None = None

    @property
    def place(self) -> str:
        """Stage the worker was in: the one it named last, else the border it stood at."""
        named = self.failure or self.progress
        done = [line.get("stage") for line in self.stages]
        if named and named.get("stage") and named["stage"] not in done:
            return str(named["stage"])
        return "start_up" if not done else "tear_down"


def read_events(path: Path, events: Events) -> None:
    """Take in what the worker appended since the last look; a half-written last line waits."""
    if not path.exists() or path.stat().st_size == events.offset:
        return
    with path.open("rb") as file:
        file.seek(events.offset)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    events.offset += len(whole)
    for line in whole.splitlines():
        try:
            _take(json.loads(line), events)
        except (ValueError, TypeError, KeyError):
            events.damaged = (
                f"unreadable line in the worker's records: {line[:80].decode(errors='replace')}"
            )


def _take(line: dict[str, Any], events: Events) -> None:
    kind = line["kind"]
    if kind == "start":
        events.start = line
    elif kind == "progress":
        events.progress = line
    elif kind == "stage":
        events.stages.append({name: value for name, value in line.items() if name != "kind"})
    elif kind == "failure":
        events.failure = line
    elif kind == "end":
        events.ended = True
    else:
        raise ValueError(kind)


def name_death(
    job: Job,
    events: Events,
    returncode: int,
    timed_out: bool,
    oom_killed: bool,
    tail: Sequence[str],
) -> tuple[str, str | None]:
    """Status and reason of a finished process; the worker's own last word goes first."""
    if events.failure:
        return _worker_failure(events.failure)
    if timed_out:
        return "timeout", f"no end within {job.timeout_s:g} s; last seen in {_last_seen(events)}"
    if number := _signal_number(returncode):
        return _signal_death(number, oom_killed, tail)
    if returncode:
        return text_death(tail) or ("error", f"exit {returncode}: {_last_line(tail)}")
    if not events.ended:
        return "silent_exit", f"exit 0 without an end record; last seen in {_last_seen(events)}"
    problem = output_problem(job, events)
    return ("bad_output", problem) if problem else ("ok", None)


def _worker_failure(line: dict[str, Any]) -> tuple[str, str]:
    status, reason = line.get("status") or "error", str(line.get("reason") or "no reason given")
    if status not in WORKER_STATUSES:
        return "error", f"{status}: {reason}"
    if status == "error" and (named := text_death(reason.splitlines())):
        status = named[0]  # an exception type that says nothing, a text that does
    return str(status), f"{line['phase']}: {reason}" if line.get("phase") else reason


def _signal_number(returncode: int) -> int:
    """A wrapping shell turns death by signal n into exit 128 + n."""
    if returncode < 0:
        return -returncode
    return returncode - 128 if 128 < returncode <= 128 + signal.SIGRTMAX else 0


def _signal_death(number: int, oom_killed: bool, tail: Sequence[str]) -> tuple[str, str]:
    known = {member.value: member.name for member in signal.Signals}
    name = known.get(number, f"signal {number}")
    if number == signal.SIGKILL:
        if oom_killed:
            return "oom_host", f"{name}: the kernel's out-of-memory killer ended it"
        return "killed", f"{name}, and the kernel counted no out-of-memory kill"
    return text_death(tail) or ("killed", name)


def text_death(tail: Sequence[str]) -> tuple[str, str] | None:
    """Status by the log's last traceback (or its tail), judged from the last line upwards."""
    starts = [i for i, line in enumerate(tail) if line.startswith("Traceback (most recent call")]
    for line in reversed(tail[starts[-1] :] if starts else tail):
        for status, pattern in DEATH_TEXTS:
            if pattern.search(line):
                return status, line.strip()
    return None


def output_problem(job: Job, events: Events) -> str | None:
    """What is missing or impossible in the stage lines of a worker that claims success."""
    if events.damaged:
        return events.damaged
    names = [line.get("stage") for line in events.stages]
    expected = () if job.prepare else job.stages
    if sorted(map(str, names)) != sorted(expected):
        missing = [name for name in expected if name not in names]
        return f"no record of {', '.join(missing)}" if missing else f"unexpected records: {names}"
    problems = (stage_problem(line) for line in events.stages)
    return next((problem for problem in problems if problem), None)


def sound_lines(job: Job, events: Events) -> tuple[dict[str, Any], ...]:
    """The first flawless line of each measured stage, in the order of the stages."""
    sound: dict[str, dict[str, Any]] = {}
    for line in events.stages:
        if line.get("stage") in job.stages and not stage_problem(line):
            sound.setdefault(line["stage"], line)
    return tuple(sound[stage] for stage in job.stages if stage in sound)


def stage_problem(line: dict[str, Any]) -> str | None:
    """First missing field, wrong type or figure that is not finite in one stage line."""
    for name, kind in STAGE_FIELDS.items():
        if not isinstance(line.get(name), kind):
            return f"{line['stage']}: {name} is {type(line.get(name)).__name__}"
    if line["status"] != "ok":
        return f"{line['stage']}: status {line['status']} although the process claims success"
    found = nonfinite(line)
    return f"{line['stage']}: {found}" if found else None


def failed_stage(job: Job, events: Events) -> str:
    """For bad output the first stage that is missing or wrong, else the place the worker was at."""
    if events.failure or not events.ended:
        return events.place
    done = {line.get("stage"): line for line in events.stages}
    for stage in () if job.prepare else job.stages:
        if stage not in done or stage_problem(done[stage]):
            return stage
    return "tear_down"


def _last_seen(events: Events) -> str:
    line = events.progress
    if line is None or events.place != line.get("stage"):
        return events.place
    return f"{line['stage']}, phase {line.get('phase')}, step {line.get('step')}"


def _last_line(tail: Sequence[str]) -> str:
    return next((line.strip() for line in reversed(tail) if line.strip()), "no output")

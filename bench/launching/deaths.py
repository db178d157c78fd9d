"""Reads what a worker wrote and names how it ended, by its own word, signal, log and output."""

import json
import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.launching.containers import Container
from bench.launching.texts import text_death
from bench.records import nonfinite

Kind = Literal[
    "measure",
    "prepare",
    "preflight_fit",
    "preflight_load",
    "profile",
    "memory_set_up",
    "memory_probe",
]
"""What a process is for: a measured repeat, the artefacts before the measured stages, one of the
two halves of a preflight, a profile, or a short trial of a batch size and the set-up before it."""
MEASURING = ("measure", "memory_probe")
"""Processes that write a line for each stage."""
CLOCKS_APART_S = 0.1
COMPILE = "compile"
"""Phase of a stage whose limit holds for the sum of its visits."""
WORKER_STATUSES = ("oom_gpu", "oom_host", "import", "driver", "bad_output", "unsupported", "error")
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
    """One worker process to start: its command line, its files and its limits."""

    command: tuple[str, ...]
    cell_file: Path
    records: Path
    log: Path
    stages: tuple[str, ...]
    timeout_s: float
    task: Kind = "measure"
    hang_timeout_s: float = math.inf
    phase_timeouts_s: Mapping[str, float] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables beside those of the parent."""
    container: Container | None = None
    """Where it runs; None = as a process on the host."""


@dataclass
class Events:
    """What the worker wrote so far."""

    offset: int = 0
    start: dict[str, Any] | None = None
    progress: dict[str, Any] | None = None
    visits: int = 0
    """Phases entered so far."""
    entered_s: float = 0.0
    """When the newest of them was entered, by the worker's clock."""
    compile_s: float = 0.0
    """Sum of the finished visits to the compile phase, by the worker's clock."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    failure: dict[str, Any] | None = None
    ended: bool = False
    ended_s: float | None = None
    """When its work was done, by the monotonic clock."""
    damaged: str | None = None

    @property
    def place(self) -> str:
        """Stage the worker was in: the one it named last, else the border it stood at."""
        named = self.failure or self.progress
        done = [line.get("stage") for line in self.stages]
        if named and named.get("stage") and named["stage"] not in done:
            return str(named["stage"])
        return "start_up" if not done else "tear_down"

    @property
    def phase(self) -> str | None:
        """Phase of the stage the worker was in; None at a border."""
        for line in (self.failure, self.progress):
            if line and line.get("phase") and line.get("stage") == self.place:
                return str(line["phase"])
        return None


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
        except (ValueError, TypeError, KeyError, RecursionError):
            events.damaged = events.damaged or (
                f"unreadable line in the worker's records: {line[:80].decode(errors='replace')!a}"
            )


def _take(line: dict[str, Any], events: Events) -> None:
    kind = line["kind"]
    if kind == "start" and isinstance(line.get("machine", {}), dict):
        events.start = line
    elif kind == "progress":
        _take_progress(line, events)
    elif kind == "stage" and isinstance(line["stage"], str):
        events.stages.append({name: value for name, value in line.items() if name != "kind"})
    elif kind == "failure":
        events.failure = line
    elif kind == "end":
        events.ended = True
        events.ended_s = line.get("clock_s")
    else:
        raise ValueError(kind)


def _take_progress(line: dict[str, Any], events: Events) -> None:
    """The parent looks now and then and a visit to a phase may be short, so visits count here."""
    before, time_s = events.progress or {}, float(line["time_s"])
    if (line["stage"], line["phase"]) != (before.get("stage"), before.get("phase")):
        if before.get("phase") == COMPILE:
            events.compile_s += max(0.0, time_s - events.entered_s)
        events.visits += 1
        events.entered_s = time_s
    events.progress = line


def process_phases(events: Events, begin_s: float, end_s: float) -> dict[str, float]:
    """Seconds of a process beside its stages, from its start to its end as the parent saw them:
    `start_up` of the interpreter, `imports`, `device` (made ready, CUDA started), `between_stages`,
    `tear_down`. Empty where the worker gave no times, or of another clock than ours.
    """
    clock = (events.start or {}).get("clock") or {}
    told = [clock.get(name) for name in ("begun_s", "imported_s", "ready_s")] + [events.ended_s]
    moments = [begin_s, *(one for one in told if isinstance(one, int | float)), end_s]
    if len(moments) < len(told) + 2:
        return {}
    names = ("start_up", "imports", "device", "between_stages", "tear_down")
    found = {n: b - a for n, a, b in zip(names, moments, moments[1:], strict=False)}
    found["between_stages"] -= math.fsum(line["wall_s"] for line in events.stages)
    return found if min(found.values()) > -CLOCKS_APART_S else {}


def name_death(
    job: Job,
    events: Events,
    returncode: int,
    passed_limit: str | None,
    oom_killed: bool,
    tail: Sequence[str],
) -> tuple[str, str | None]:
    """Status and reason of a finished process; the worker's own last word goes first.

    `passed_limit` says which limit the parent ended it for.
    """
    if events.failure:
        return _worker_failure(events.failure)
    if passed_limit:
        return "timeout", f"{passed_limit}; last seen in {_last_seen(events)}{_learnt(events)}"
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
    # No signal comes of a missing package, and libraries log those they can do without.
    return text_death(tail, ruled_out="import") or ("killed", name)


def output_problem(job: Job, events: Events) -> str | None:
    """What is missing or impossible in the stage lines of a worker that claims success."""
    if events.damaged:
        return events.damaged
    names = [line.get("stage") for line in events.stages]
    expected = () if job.task not in MEASURING else job.stages
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
    spent, ranks = [*line["phases"].values()], line.get("ranks") or []
    for step in line["steps"]:
        spent += [step.get(n) for n in ("seconds", "samples")] if isinstance(step, dict) else [""]
    if not all(isinstance(figure, int | float) for figure in [*spent, *line["losses"], *ranks]):
        return f"{line['stage']}: a phase, loss, rank or step is no figure"
    if found := nonfinite(line) or _impossible(line, [*spent, *ranks]):
        return f"{line['stage']}: {found}"
    return None


def _impossible(line: Mapping[str, Any], counted: Sequence[float]) -> str | None:
    """What no clock and no count can show; `counted`: figures that are never below 0."""
    if line["wall_s"] <= 0:
        return f"wall_s is {line['wall_s']}"
    if counted and min(counted) < 0:
        return f"a phase, rank or step is {min(counted)}, below 0"
    rows, samples = line["counts"].get("rows"), sum(step["samples"] for step in line["steps"])
    if isinstance(rows, int) and samples > rows:
        return f"its steps hold {samples} samples, its counts {rows} rows"
    return None


def failed_stage(job: Job, events: Events) -> str:
    """For bad output the first stage that is missing or wrong, else the place the worker was at."""
    if events.failure or not events.ended:
        return events.place
    done = {line.get("stage"): line for line in events.stages}
    for stage in () if job.task not in MEASURING else job.stages:
        if stage not in done or stage_problem(done[stage]):
            return stage
    return "tear_down"


def _last_seen(events: Events) -> str:
    line = events.progress
    if line is None or events.place != line.get("stage"):
        return events.place
    return f"{line['stage']}, phase {line.get('phase')}, step {line.get('step')}"


def _learnt(events: Events) -> str:
    """What the phase had found out when it was ended, e.g. how far compiling had come."""
    learnt = (events.progress or {}).get("learnt")
    if events.phase is None or not isinstance(learnt, dict):
        return ""
    counts = [
        f"{value} {name.removesuffix('s') if value == 1 else name}"
        for name, value in learnt.items()
        if isinstance(value, int)
    ]
    seconds = learnt.get("compile_s")
    after = f" after {seconds:.1f} s of compiling" if isinstance(seconds, float) else ""
    return f"; learnt: {', '.join(counts)}{after}"


def _last_line(tail: Sequence[str]) -> str:
    return next((line.strip() for line in reversed(tail) if line.strip()), "no output")

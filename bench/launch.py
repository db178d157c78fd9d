"""Start one worker process, follow its records, end its whole group and name its death."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from bench.deaths import Events, Job, failed_stage, name_death, read_events, sound_lines
from bench.records import SCHEMA, Record, empty_record

POLL_S = 0.05
DYING_S = 2.0
LOG_TAIL_LINES = 20
LOG_READ_BYTES = 64 * 1024
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)


class Clock(Protocol):
    """The part of the `time` module that waiting needs; tests pass one that does not wait."""

    def monotonic(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How one worker process ended."""

    status: str
    reason: str | None
    stage: str
    """Stage that failed; meaningless for `ok`."""
    stage_lines: tuple[dict[str, Any], ...]
    """Finished, sound stages in the worker's words, each once."""
    process: dict[str, Any]
    """The worker's own account of its interpreter, libraries and device."""
    started: str
    wall_s: float
    """From start of the process to its end, the interpreter's start-up included."""
    log_tail: tuple[str, ...]


class Interrupted(Exception):
    """The user asked to stop; the worker is dead and its unfinished repeat is not recorded."""


def run_worker(
    job: Job,
    stopped: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Events], None] = lambda events: None,
    clock: Clock = time,
) -> Outcome:
    """Run one worker to its end, leaving no process of its group, and say how it ended.

    Raises Interrupted when `stopped()` turns true; the group is killed then too.
    """
    oom_kills_before = oom_kills()
    started, begin_s = datetime.now(UTC).isoformat(timespec="milliseconds"), clock.monotonic()
    with job.log.open("wb") as log:
        process = subprocess.Popen(
            [*job.command, str(job.cell_file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent(os.getpid()),
        )
    events = Events()
    try:
        timed_out = _follow(process, job, events, begin_s, stopped, on_progress, clock)
    finally:
        _kill_group(process)
    read_events(job.records, events)
    tail = log_tail(job.log)
    status, reason = name_death(
        job, events, process.returncode, timed_out, oom_kills() > oom_kills_before, tail
    )
    return Outcome(
        status=status,
        reason=reason,
        stage=failed_stage(job, events),
        stage_lines=sound_lines(job, events),
        process=(events.start or {}).get("machine") or {},
        started=started,
        wall_s=clock.monotonic() - begin_s,
        log_tail=tail[-LOG_TAIL_LINES:],
    )


def _follow(
    process: subprocess.Popen[bytes],
    job: Job,
    events: Events,
    begin_s: float,
    stopped: Callable[[], bool],
    on_progress: Callable[[Events], None],
    clock: Clock,
) -> bool:
    """Wait for the end; True if the time limit came first."""
    while not _has_exited(process):
        if stopped():
            raise Interrupted
        if clock.monotonic() - begin_s > job.timeout_s:
            return True
        read_events(job.records, events)
        on_progress(events)
        clock.sleep(POLL_S)
    return False


def _die_with_parent(parent: int) -> Callable[[], None]:
    """The kernel kills the worker when the parent dies, kill -9 included."""

    def ask_kernel() -> None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel was asked
            os._exit(1)

    return ask_kernel


def _has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Without reaping: the pid keeps naming the group until `_kill_group` is done."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, flags) is not None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill and see off the whole group: a process still dying would share the next one's machine.

    Bounded, because orphans stay zombies where the container has no init to reap them.
    """
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    limit_s = time.monotonic() + DYING_S
    while time.monotonic() < limit_s:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(POLL_S / 10)


def log_tail(path: Path) -> tuple[str, ...]:
    """Last lines of a log, progress bars' carriage returns taken as line ends."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_READ_BYTES))
        return tuple(file.read().decode(errors="replace").splitlines())


def oom_kills() -> int:
    """Processes of our memory cgroup (of this kernel if there is none) killed for memory so far."""
    for path in (*_cgroup_counters(), Path("/proc/vmstat")):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0


def _cgroup_counters() -> list[Path]:
    """Version 2 first: its counter includes the groups below."""
    try:
        entries = [
            line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()
        ]
    except OSError:
        return []
    root = Path("/sys/fs/cgroup")
    inside = {kind: group.lstrip("/") for _, kind, group in entries}
    paths = [root / inside.get("", "") / "memory.events", root / "memory.events"]
    if "memory" in inside:
        v1 = root / "memory"
        paths += [v1 / inside["memory"] / "memory.oom_control", v1 / "memory.oom_control"]
    return paths


def stage_records(outcome: Outcome, identity: Record) -> list[Record]:
    """Lines for records.jsonl: one for each sound stage, one more that names a death.

    `identity` holds matrix, cell, key, block and repeat.
    """
    head = {"schema": SCHEMA, **identity}
    process = {"process_wall_s": outcome.wall_s}
    sound = [head | line | process for line in outcome.stage_lines]
    if outcome.status == "ok":
        return sound
    sound = [record for record in sound if record["stage"] != outcome.stage]
    spent_s = sum(record["wall_s"] for record in sound)
    dead = empty_record(outcome.stage, outcome.status, outcome.reason) | {
        "started": outcome.started,
        "wall_s": max(0.0, outcome.wall_s - spent_s),
        "log_tail": list(outcome.log_tail),
        **process,
    }
    return [*sound, head | dead]

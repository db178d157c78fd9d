"""Start one worker process, follow its records, end its whole group and name its death."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from bench.launching import keeper
from bench.launching.containers import Container, Ended, passed_on, without_advice
from bench.launching.deaths import (
    Events,
    Job,
    failed_stage,
    name_death,
    process_phases,
    read_events,
    sound_lines,
)
from bench.launching.limits import Watch
from bench.launching.texts import full_disk
from bench.machine import UnfitMachine
from bench.records import SCHEMA, Record, empty_record

POLL_S = 0.05
DYING_S = 2.0
LEAST_DISK_BYTES = 1 << 20
"""With less free, what a worker says of its end may not have reached the disk."""
LOG_TAIL_LINES = 20
LOG_READ_BYTES = 64 * 1024
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
LIBC = ctypes.CDLL(None, use_errno=True)
KEEPER = (sys.executable, "-I", "-S", keeper.__file__)


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
    phase: str | None = None
    """Phase of that stage, where the worker had said one."""
    launched: Mapping[str, Any] = field(default_factory=dict)
    """The container it ran in by the engine's account; empty for a process on the host."""
    node: str | None = None
    """Node of a cluster it ran on; None = this machine."""
    lost: bool = False
    """The node went away while it ran."""
    phases: Mapping[str, float] = field(default_factory=dict)
    """Its seconds beside the stages, see `bench.launching.deaths.process_phases`."""


class Interrupted(Exception):
    """The user asked to stop; the worker is dead and its unfinished repeat is not recorded."""


def run_worker(
    job: Job,
    stopped: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Events], None] = lambda events: None,
    clock: Clock = time,
) -> Outcome:
    """Run one worker to its end, leave no process it started, and say how it ended.

    Raises Interrupted when `stopped()` turns true, UnfitMachine when a full disk ended the worker:
    the next one would fare no better. Its processes are killed then too.
    """
    oom_kills_before = oom_kills(job.container)
    watched = job.container.watch() if job.container else None
    started, begin_s = datetime.now(UTC).isoformat(timespec="milliseconds"), clock.monotonic()
    with job.log.open("wb") as log:
        process = subprocess.Popen(
            [*KEEPER, str(os.getpid()), *command_line(job)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **job.env},
            preexec_fn=_keep,
        )
    events = Events()
    try:
        limit = _follow(process, job, events, begin_s, stopped, on_progress, clock)
    finally:
        ended = watched.end() if watched else Ended()
        _end(process)
    read_events(job.records, events)
    tail = without_advice(log_tail(job.log)) if watched else log_tail(job.log)
    returncode = process.returncode if ended.returncode is None else ended.returncode
    oom_killed = ended.oom_killed or oom_kills(job.container) > oom_kills_before
    status, reason = name_death(job, events, returncode, limit, oom_killed, tail)
    if status != "ok":
        refuse_full_disk(job.log.parent, reason, tail)
    end_s = clock.monotonic()
    return Outcome(
        status=status,
        reason=reason,
        stage=failed_stage(job, events),
        stage_lines=tuple(as_launched(line, ended) for line in sound_lines(job, events)),
        process=process_of(events, ended),
        started=started,
        wall_s=end_s - begin_s,
        log_tail=tail[-LOG_TAIL_LINES:],
        phase=events.phase if status != "ok" else None,
        launched=ended.launched,
        phases=process_phases(events, begin_s, end_s) if status == "ok" else {},
    )


def command_line(job: Job) -> list[str]:
    """What the keeper starts: the worker, or the client of the engine that starts it.

    In an image the worker's interpreter is the image's own.
    """
    words = [*job.command, str(job.cell_file)]
    if job.container is None:
        return words
    if words[0] == sys.executable:
        words[0] = "python"
    return job.container.command(words, passed_on(os.environ) | job.env.keys())


def process_of(events: Events, ended: Ended) -> dict[str, Any]:
    """What the worker said of itself and the image it was started in; empty before it said so."""
    said: dict[str, Any] = (events.start or {}).get("machine") or {}
    return said | {"launched": ended.launched["image"]} if said and ended.launched else said


def as_launched(line: dict[str, Any], ended: Ended) -> dict[str, Any]:
    """A stage line with the engine's account beside the worker's, so that both can be compared."""
    if not ended.launched:
        return line
    return line | {"facts": line["facts"] | {"launched": dict(ended.launched)}}


def _follow(
    process: subprocess.Popen[bytes],
    job: Job,
    events: Events,
    begin_s: float,
    stopped: Callable[[], bool],
    on_progress: Callable[[Events], None],
    clock: Clock,
) -> str | None:
    """Wait for the end; the limit that was passed if one came first."""
    watch = Watch(job, begin_s)
    while not _has_exited(process):
        if stopped():
            raise Interrupted
        read_events(job.records, events)
        if limit := watch.passed(events, clock.monotonic()):
            return limit
        on_progress(events)
        clock.sleep(POLL_S)
    return None


def _keep() -> None:
    """What the kernel shall do for the keeper: tell it of our end, give it the worker's orphans."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)


def _has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Without reaping: the pid keeps naming the group until `_end` is done."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, flags) is not None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have the keeper see off what is left: a process still dying would share the next one's
    machine. Should it fail, itself killed perhaps, the group it shares with the worker goes.
    """
    os.kill(process.pid, signal.SIGTERM)
    limit_s = time.monotonic() + keeper.DYING_S + DYING_S
    while not _has_exited(process) and time.monotonic() < limit_s:
        time.sleep(POLL_S / 10)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with suppress(ProcessLookupError):
        while time.monotonic() < limit_s:
            os.killpg(process.pid, 0)
            time.sleep(POLL_S / 10)


def refuse_full_disk(folder: Path, reason: str | None, tail: Sequence[str]) -> None:
    """Raise UnfitMachine where a worker failed for want of disk, said or too late to say so."""
    line = full_disk(reason, tail)
    if line or shutil.disk_usage(folder).free < LEAST_DISK_BYTES:
        raise UnfitMachine(
            f"machine: the disk is full ({line or folder}); free space and use --resume: what was "
            "measured is kept"
        )


def log_tail(path: Path) -> tuple[str, ...]:
    """Last lines of a log, progress bars' carriage returns taken as line ends."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_READ_BYTES))
        return tuple(file.read().decode(errors="replace").splitlines())


def oom_kills(container: Container | None = None) -> int:
    """Processes of our memory cgroup (of this kernel if there is none) killed for memory so far.

    A container has another group than ours, so for one the kernel's count is read.
    """
    for path in (*(() if container else _cgroup_counters()), Path("/proc/vmstat")):
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
    process = {"process_wall_s": outcome.wall_s, "process_phases": dict(outcome.phases)}
    process |= {"image_digest": outcome.launched.get("digest")}
    if outcome.node:
        process |= {"node": outcome.node, "node_lost": outcome.lost}
    sound = [head | line | process for line in outcome.stage_lines]
    if outcome.status == "ok":
        return sound
    sound = [record for record in sound if record["stage"] != outcome.stage]
    spent_s = sum(record["wall_s"] for record in sound)
    dead = empty_record(outcome.stage, outcome.status, outcome.reason) | {
        "started": outcome.started,
        "wall_s": max(0.0, outcome.wall_s - spent_s),
        "phase": outcome.phase,
        "log_tail": list(outcome.log_tail),
        **process,
    }
    return [*sound, head | dead]

"""Walk the schedule of one run: set-up, then every cell of every block, each a group of records."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

from bench import records
from bench.deaths import Events, Job
from bench.launch import Outcome, run_worker, stage_records
from bench.matrix import Cell, Matrix, schedule
from core.settings import Settings, StageName

ORDER: tuple[str, ...] = get_args(StageName)
UPSTREAM = ("seed", "data", "student", "eval")
"""Sections that decide the artefacts made before any teacher stage."""

MOST_FAILURES = 2
"""A cell whose first repeats all fail is given up after this many."""

Launch = Callable[[Job, Callable[[], bool], Callable[[Events], None]], Outcome]


@dataclass(frozen=True)
class Run:
    """One run folder and what is measured into it."""

    folder: Path
    matrix: Matrix
    cells: tuple[Cell, ...]
    """The cells chosen, baseline first."""
    worker: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the matrix."""
        return self.folder.absolute().parent.name

    @property
    def records_path(self) -> Path:
        """The file that is both result and resume state."""
        return self.folder / "records.jsonl"


@dataclass(frozen=True)
class Task:
    """One cell to measure in one block; the number of the block is that of the repeat."""

    block: int
    cell: Cell


@dataclass(frozen=True)
class Progress:
    """What the display needs to hear; every call returns at once."""

    expect: Callable[[int], None]
    """Number of measured processes still to come."""
    begin: Callable[[str], None]
    step: Callable[[Events], None]
    end: Callable[[str, Outcome, bool], None]
    """Label, outcome, and whether it was a measured process rather than a set-up."""


def tasks(cells: Iterable[Cell], repeats: int, done: set[records.Group]) -> list[Task]:
    """The schedule less what is measured already, and less cells that never start (repeat 0)."""
    return [
        Task(block, cell)
        for block, cell in schedule(list(cells), repeats)
        if not {(cell.key, block), (cell.key, 0)} & done
    ]


def not_started(
    run: Run, cell: Cell, status: str, reason: str, log_tail: Sequence[str] = ()
) -> list[records.Record]:
    """Rows of a cell that never starts: one for each measured stage, repeat 0, no figures."""
    head = {"schema": records.SCHEMA} | identity(run, cell, 0)
    return [
        head | records.empty_record(stage, status, reason) | {"log_tail": list(log_tail)}
        for stage in run.matrix.stages
    ]


def identity(run: Run, cell: Cell, block: int) -> records.Record:
    """The fields that say what a record is of."""
    return {
        "matrix": run.name,
        "cell": cell.name,
        "key": cell.key,
        "block": block,
        "repeat": block,
    }


def execute(
    run: Run,
    unsupported: dict[str, str],
    progress: Progress,
    stopped: Callable[[], bool],
    note_process: Callable[[dict[str, Any]], None],
    launch: Launch = run_worker,
) -> None:
    """Measure what is missing in the run folder; `unsupported` maps cell keys to reasons.

    Raises launch.Interrupted, with every finished group on the disk.
    """
    remove_private_artefacts(run.folder)
    past = records.repair(run.records_path, run.matrix.stages)
    done = records.finished(past, run.matrix.stages)

    def exclude(cell: Cell, status: str, reason: str, log_tail: Sequence[str] = ()) -> None:
        records.append(run.records_path, not_started(run, cell, status, reason, log_tail))
        done.add((cell.key, 0))

    for cell in run.cells:
        if cell.key in unsupported and (cell.key, 0) not in done:
            exclude(cell, "unsupported", unsupported[cell.key])
    todo = tasks(run.cells, run.matrix.repeats, done)
    for cell in {task.cell.key: task.cell for task in todo}.values():
        if problem := set_up(run, cell, progress, stopped, launch):
            exclude(cell, "skipped", *problem)
    while todo := tasks(run.cells, run.matrix.repeats, done):
        task = todo[0]
        progress.expect(len(todo))
        if reason := hopeless(past, task.cell):
            exclude(task.cell, "skipped", reason)
            continue
        outcome, group = measure(run, task, progress, stopped, launch)
        past += group
        done.add((task.cell.key, task.block))
        note_process(outcome.process)


def hopeless(past: Sequence[records.Record], cell: Cell) -> str | None:
    """Why a cell is not tried again: its first repeats all failed, and a hang may cost an hour."""
    own = [record for record in past if record["key"] == cell.key]
    failed = {record["repeat"]: record["status"] for record in own if record["status"] != "ok"}
    if len(failed) < MOST_FAILURES or len({record["repeat"] for record in own}) > len(failed):
        return None
    return f"not tried again: its first {len(failed)} repeats ended {', '.join(failed.values())}"


def measure(
    run: Run, task: Task, progress: Progress, stopped: Callable[[], bool], launch: Launch
) -> tuple[Outcome, list[records.Record]]:
    """One fresh process for one cell and repeat; its records are on the disk on return."""
    label = f"block {task.block} {task.cell.name}"
    job = write_job(run, task.cell, f"{file_name(task.cell)}-r{task.block}", task.block)
    progress.begin(label)
    outcome = launch(job, stopped, progress.step)
    group = stage_records(outcome, identity(run, task.cell, task.block))
    records.append(run.records_path, group)
    remove_private_artefacts(run.folder)
    progress.end(label, outcome, True)
    return outcome, group


def set_up(
    run: Run, cell: Cell, progress: Progress, stopped: Callable[[], bool], launch: Launch
) -> tuple[str, Sequence[str]] | None:
    """Make the artefacts upstream of the measured stages, once for all cells that share them.

    Returns reason and log tail of a failure. What an earlier call ended is not done again.
    """
    need = upstream_need(cell.settings, run.matrix.stages)
    if need is None:
        return None
    stem = f"set-up-{need}"
    past = run.folder / "cells" / f"{stem}.outcome.json"
    if past.exists() and (run.folder / "artefacts" / "shared").exists():
        found = json.loads(past.read_text())
    else:
        job = write_job(run, cell, stem, None)
        progress.begin(f"set-up {need}")
        outcome = launch(job, stopped, progress.step)
        progress.end(f"set-up {need}", outcome, False)
        remove_private_artefacts(run.folder)
        found = {"status": outcome.status, "reason": outcome.reason, "stage": outcome.stage}
        found["log_tail"] = outcome.log_tail
        write_whole(past, json.dumps(found))
    if found["status"] == "ok":
        return None
    reason = f"set-up failed: {found['status']} in {found['stage']}: {found['reason']}"
    return reason, found["log_tail"]


def upstream_need(settings: Settings, stages: Sequence[str]) -> str | None:
    """Name of the artefacts a cell needs from stages that are not measured; None if it needs none.

    Cells with equal names share them. The measured stages themselves make the rest.
    """
    before = ORDER[: max(ORDER.index(stage) for stage in stages)]
    missing = [stage for stage in before if stage not in stages]
    if "evaluate_all" not in stages:  # nothing else reads what a test stage made
        missing = [stage for stage in missing if not stage.endswith("_test")]
    if not missing:
        return None
    sections = [*UPSTREAM]
    for group, needed in (("teacher", ("teacher", "train")), ("distill", ("distill",))):
        if any(stage.startswith(group) for stage in missing):
            sections += needed
    chosen = settings.model_dump(mode="json", include=set(sections))
    return sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]


def write_job(run: Run, cell: Cell, stem: str, block: int | None) -> Job:
    """Write the cell file of one process, clear what a killed one left, and describe the launch.

    `block` None means the unmeasured set-up process.
    """
    cells, artefacts = run.folder.absolute() / "cells", run.folder.absolute() / "artefacts"
    cells.mkdir(exist_ok=True)
    (artefacts / stem).mkdir(parents=True)
    (artefacts / "shared").mkdir(exist_ok=True)
    job = Job(
        command=run.worker,
        cell_file=cells / f"{stem}.json",
        records=cells / f"{stem}.jsonl",
        log=cells / f"{stem}.log",
        stages=tuple(run.matrix.stages),
        timeout_s=run.matrix.timeout_s,
        prepare=block is None,
    )
    job.records.unlink(missing_ok=True)
    content = {
        "schema": records.SCHEMA,
        **identity(run, cell, block or 0),
        "stages": list(job.stages),
        "settings": cell.settings.model_dump(mode="json"),
        "changed": cell.changed,
        "records": str(job.records),
        "artefacts": str(artefacts / stem),
        "shared_artefacts": str(artefacts / "shared"),
        "warmup_steps": run.matrix.warmup_steps,
        "prepare": block is None,
    }
    write_whole(job.cell_file, json.dumps(content, indent=1))
    return job


def file_name(cell: Cell) -> str:
    """The cell's name where a file may carry it; otherwise shortened, with its key."""
    plain = re.sub(r"[^\w.=,+-]+", "_", cell.name)[:80]
    return plain if plain == cell.name else f"{plain}-{cell.key[:6]}"


def remove_private_artefacts(folder: Path) -> None:
    """Delete what repeats made for themselves; checkpoints of every repeat would fill the disk."""
    for path in (folder / "artefacts").glob("*"):
        if path.name != "shared":
            shutil.rmtree(path)


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step, so that a crash leaves the old or the new one."""
    draft = path.with_name(path.name + ".new")
    draft.write_text(text)
    draft.replace(path)

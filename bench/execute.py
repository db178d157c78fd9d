"""Walk the schedule of one run: set-up, a short trial of each cell, then every cell of every block,
each a group of records.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

from bench import preflight, records
from bench.launch import Outcome, run_worker, stage_records
from bench.launching.deaths import Events, Job, Kind
from bench.launching.starting import PROCESSES, Starter
from bench.machine import Obstacle
from bench.matrix import Cell, Matrix
from bench.schedule import budget
from bench.schedule.blocks import Task, Walk, tasks, walk
from core.settings import Settings, StageName
from core.variables import variables

ORDER: tuple[str, ...] = get_args(StageName)
UPSTREAM = ("seed", "data", "student", "eval")
"""Sections that decide the artefacts made before any teacher stage."""

PASSED = "preflight-{}.passed.json"
"""Written when a cell has passed its preflight, which is then not repeated."""

Launch = Callable[[Job, Callable[[], bool], Callable[[Events], None]], Outcome]


@dataclass(frozen=True)
class Run:
    """One run folder and what is measured into it."""

    folder: Path
    matrix: Matrix
    cells: tuple[Cell, ...]
    """The cells chosen, baseline first."""
    worker: tuple[str, ...]
    starter: Starter = PROCESSES

    @property
    def name(self) -> str:
        """Name of the matrix."""
        return self.folder.absolute().parent.name

    @property
    def records_path(self) -> Path:
        """The file that is both result and resume state."""
        return self.folder / "records.jsonl"


@dataclass(frozen=True)
class Progress:
    """What the display needs to hear; every call returns at once."""

    expect: Callable[[int], None]
    """Number of measured processes still to come."""
    begin: Callable[[str], None]
    step: Callable[[Events], None]
    end: Callable[[str, Outcome, bool], None]
    """Label, outcome, and whether it was a measured process rather than a set-up or a trial."""


def not_started(
    run: Run,
    cell: Cell,
    status: str,
    reason: str,
    log_tail: Sequence[str] = (),
    repeat: int = 0,
    stopped_by: str | None = None,
) -> list[records.Record]:
    """Rows of a repeat (0: of all of them) that never starts: one for each measured stage, without
    figures. `stopped_by`: what ended the cell early, see bench.schedule.attempts.
    """
    head = {"schema": records.SCHEMA} | identity(run, cell, repeat)
    why = {"log_tail": list(log_tail)} | ({"stopped_by": stopped_by} if stopped_by else {})
    return [head | records.empty_record(stage, status, reason) | why for stage in run.matrix.stages]


def identity(run: Run, cell: Cell, block: int, attempt: int = 0) -> records.Record:
    """The fields that say what a record is of."""
    return {
        "matrix": run.name,
        "cell": cell.name,
        "key": cell.key,
        "block": block,
        "repeat": block,
        "attempt": attempt,
    }


def execute(
    run: Run,
    obstacles: Mapping[str, Obstacle],
    untried: Mapping[str, str],
    progress: Progress,
    stopped: Callable[[], bool],
    note_process: Callable[[dict[str, Any]], None],
    launch: Launch = run_worker,
    walk: Callable[[Walk], None] = walk,
) -> None:
    """Measure what is missing in the run folder; `obstacles` maps the keys of cells that never
    start to the reasons, `untried` those of cells that need no preflight. `walk` goes through the
    blocks.

    Raises launch.Interrupted, with every finished group on the disk.
    """
    remove_private_artefacts(run.folder)
    past = budget.measured(records.repair(run.records_path, run.matrix.stages))
    done = records.finished(past, run.matrix.stages)
    purse = budget.Purse(run.matrix.budget_s, run.matrix.cell_budget_s, past)
    purse.spend(sum(sum(side.values()) for side in budget.side_seconds(run.folder)))

    def unmeasured(job: Job, *rest: Any) -> Outcome:
        outcome = launch(job, *rest)
        purse.spend(outcome.wall_s)
        return outcome

    def exclude(cell: Cell, status: str, reason: str, log_tail: Sequence[str] = ()) -> None:
        records.append(run.records_path, not_started(run, cell, status, reason, log_tail))
        done.add((cell.key, 0))

    for cell in run.cells:
        if cell.key in obstacles and (cell.key, 0) not in done:
            exclude(cell, *obstacles[cell.key])
    todo = tasks(run.cells, run.matrix.repeats, done)
    for cell in {task.cell.key: task.cell for task in todo}.values():
        if problem := set_up(run, cell, progress, stopped, unmeasured):
            exclude(cell, "skipped", *problem)
    todo = tasks(run.cells, run.matrix.repeats, done)
    due = trials(todo, {**untried, **tried(run.folder, past)})
    for number, cell in enumerate(due, start=1):
        label = f"preflight {number}/{len(due)} {cell.name}"
        if group := try_out(run, cell, label, progress, stopped, unmeasured):
            records.append(run.records_path, group)
            done.add((cell.key, 0))

    def measured(
        task: Task, limit_s: float, launch: Launch = launch
    ) -> tuple[Outcome, list[records.Record]]:
        outcome, group = measure(run, task, limit_s, progress, stopped, launch)
        note_process(outcome.process)
        return outcome, group

    walk(
        Walk(
            matrix=run.matrix,
            cells=run.cells,
            past=past,
            done=done,
            purse=purse,
            expect=progress.expect,
            measure=measured,
            keep=lambda group: records.append(run.records_path, group),
            rows=lambda cell, repeat, reason, stopped_by: not_started(
                run, cell, "skipped", reason, repeat=repeat, stopped_by=stopped_by
            ),
        )
    )


def measure(
    run: Run,
    task: Task,
    limit_s: float,
    progress: Progress,
    stopped: Callable[[], bool],
    launch: Launch,
) -> tuple[Outcome, list[records.Record]]:
    """One fresh process for one cell and repeat, and its records."""
    again = f"-again{task.attempt}" if task.attempt else ""
    label = f"block {task.block} {task.cell.name}" + (", again" if again else "")
    stem = f"{file_name(task.cell)}-r{task.block}{again}"
    job = write_job(run, task.cell, stem, "measure", task.block, attempt=task.attempt)
    progress.begin(label)
    try:
        outcome = launch(replace(job, timeout_s=limit_s), stopped, progress.step)
    finally:  # a stop included: nobody reads them again
        remove_private_artefacts(run.folder)
    progress.end(label, outcome, True)
    return outcome, stage_records(outcome, identity(run, task.cell, task.block, task.attempt))


def trials(todo: Iterable[Task], untried: Mapping[str, str]) -> list[Cell]:
    """Cells to be tried before any is measured; `untried` maps the others' keys to reasons."""
    cells = {task.cell.key: task.cell for task in todo}
    return [cell for key, cell in cells.items() if key not in untried]


def tried(folder: Path, past: Iterable[records.Record]) -> dict[str, str]:
    """Cell keys of this run that need no preflight any more, and why."""
    passed = (json.loads(path.read_text()) for path in folder.glob(f"cells/{PASSED.format('*')}"))
    return {
        **{found["key"]: "passed before" for found in passed},
        **{record["key"]: "measured before" for record in past if record["status"] == "ok"},
    }


def try_out(
    run: Run,
    cell: Cell,
    label: str,
    progress: Progress,
    stopped: Callable[[], bool],
    launch: Launch,
) -> list[records.Record]:
    """The preflight of one cell: no rows if it passed, else those that block it."""
    folder, limit_s = f"preflight-{file_name(cell)}", run.matrix.preflight_timeout_s
    spent_s = 0.0
    try:
        for task in preflight.halves(run.matrix.stages):
            half = task.removeprefix("preflight_")
            job = write_job(run, cell, f"{folder}-{half}", task, private=folder)
            left_s = max(1.0, limit_s - spent_s)
            job = replace(job, timeout_s=min(job.timeout_s, left_s))
            progress.begin(f"{label}, {half}")
            outcome = launch(job, stopped, progress.step)
            progress.end(f"{label}, {half}", outcome, False)
            if outcome.status != "ok":
                return preflight.blocked(outcome, run.matrix, identity(run, cell, 0))
            spent_s += outcome.wall_s
    finally:
        remove_private_artefacts(run.folder)
    passed = run.folder / "cells" / PASSED.format(file_name(cell))
    write_whole(passed, json.dumps({"key": cell.key, "wall_s": spent_s}))
    return []


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
        job = write_job(run, cell, stem, "prepare")
        progress.begin(f"set-up {need}")
        outcome = launch(job, stopped, progress.step)
        progress.end(f"set-up {need}", outcome, False)
        remove_private_artefacts(run.folder)
        found = {"status": outcome.status, "reason": outcome.reason, "stage": outcome.stage}
        found |= {"log_tail": outcome.log_tail, "wall_s": outcome.wall_s}
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


def write_job(
    run: Run,
    cell: Cell,
    stem: str,
    task: Kind,
    block: int = 0,
    private: str | None = None,
    attempt: int = 0,
    room_bytes: int | None = None,
) -> Job:
    """Write the cell file of one process, clear what a killed one left, and describe the launch.

    `private` names its folder of artefacts: both halves of a preflight have the same. `room_bytes`:
    memory that a probe may take, None = what it finds free.
    """
    cells, artefacts = run.folder.absolute() / "cells", run.folder.absolute() / "artefacts"
    own = artefacts / (private or stem)
    cells.mkdir(exist_ok=True)
    own.mkdir(parents=True, exist_ok=private is not None)
    (artefacts / "shared").mkdir(exist_ok=True)
    job = Job(
        command=run.worker,
        cell_file=cells / f"{stem}.json",
        records=cells / f"{stem}.jsonl",
        log=cells / f"{stem}.log",
        stages=tuple(run.matrix.stages),
        timeout_s=run.matrix.timeout_s,
        task=task,
        hang_timeout_s=run.matrix.hang_timeout_s,
        phase_timeouts_s=run.matrix.phase_timeouts_s,
        env=environment(cell.settings, own),
        container=run.starter.container(cell.settings, run.folder),
    )
    job.records.unlink(missing_ok=True)
    content = {
        "schema": records.SCHEMA,
        **identity(run, cell, block, attempt),
        "stages": list(job.stages),
        "settings": cell.settings.model_dump(mode="json"),
        "changed": cell.changed,
        "records": str(job.records),
        "artefacts": str(own),
        "shared_artefacts": str(artefacts / "shared"),
        "warmup_steps": run.matrix.warmup_steps,
        "task": task,
        "room_bytes": room_bytes,
        "variables": sorted(
            {name for one in run.cells for name in variables(one.settings.machine)}
        ),
        "gpu_given": job.container is not None and job.container.gpus,
    }
    write_whole(job.cell_file, json.dumps(content, indent=1))
    return job


def environment(settings: Settings, private: Path) -> dict[str, str]:
    """Environment of a worker beside the parent's: what the cell asks for.

    Every process compiles into a folder of its own, or the second repeat would find the first's
    code and the seconds of compiling would mean nothing.
    """
    own = {"TORCHINDUCTOR_CACHE_DIR": str(private / "inductor")}
    if settings.machine.image == "host":
        own["ILORA_BENCH_IMAGE"] = "host"  # also where this harness itself runs in an image
    return own | variables(settings.machine)


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

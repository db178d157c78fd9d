"""The parent's side of profiles: which cells get one, the process that makes it, what it left.

A profile lies in profile/<cell>/ of the run folder and nowhere else: what is not in records.jsonl
can reach no verdict, however it is read later. It is made after all measured repeats, so that none
of them runs on a machine it has warmed up.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import records
from bench.execute import (
    Launch,
    Progress,
    Run,
    file_name,
    remove_private_artefacts,
    write_job,
    write_whole,
)
from bench.launch import Outcome, run_worker
from bench.matrix import Cell
from bench.request import named

ALL = "all"
OUTCOME = "outcome.json"
"""Written last: a folder with it is not made again."""


@dataclass(frozen=True)
class Profile:
    """What one extra repeat left."""

    cell: str
    status: str
    reason: str | None
    folder: str
    """Below the run folder."""
    stages: tuple[dict[str, Any], ...]
    """As `bench.profiling` writes them; of a repeat that died, those it had finished."""
    snapshot: str | None
    """The allocator's state when memory ran out."""


def chosen(planned: Sequence[Cell], words: Iterable[str]) -> list[str]:
    """Names of the cells to profile: `all`, or each by its name or a part that only it has.

    Raises InputError for a word that fits no cell, or several.
    """
    words = list(words)
    if ALL in words:
        return [cell.name for cell in planned]
    found = {named(planned, word, "--profile") for word in words}
    return [cell.name for cell in planned if cell.name in found]


def take(
    run: Run,
    names: Sequence[str],
    progress: Progress,
    stopped: Callable[[], bool],
    launch: Launch = run_worker,
) -> None:
    """Profile the named cells that have no profile yet, one fresh process each.

    Raises launch.Interrupted; the profile at hand is then made anew when the run is resumed.
    """
    past = records.read(run.records_path)
    for cell in run.cells:
        folder = run.folder / "profile" / file_name(cell)
        if cell.name not in names or (folder / OUTCOME).exists():
            continue
        if not worth_a_try(record for record in past if record["key"] == cell.key):
            folder.mkdir(parents=True, exist_ok=True)
            reason = "no repeat of this cell ran to its end"
            write_whole(folder / OUTCOME, json.dumps({"status": "skipped", "reason": reason}))
            continue
        profile(run, cell, folder, progress, stopped, launch)


def worth_a_try(own: Iterable[records.Record]) -> bool:
    """Whether a repeat of a cell ran to its end, or out of memory: that one is for the snapshot."""
    endings: dict[int, set[str]] = {}
    for record in own:
        endings.setdefault(record["repeat"], set()).add(record["status"])
    return any(found == {"ok"} or found & {"oom_gpu", "oom_host"} for found in endings.values())


def profile(
    run: Run,
    cell: Cell,
    folder: Path,
    progress: Progress,
    stopped: Callable[[], bool],
    launch: Launch,
) -> None:
    """One process; what it left is moved out of its private artefacts before they are deleted."""
    label, stem = f"profile {cell.name}", f"profile-{file_name(cell)}"
    job = write_job(run, cell, stem, "profile")
    progress.begin(label)
    try:
        outcome = launch(job, stopped, progress.step)
        made = run.folder / "artefacts" / stem / "profile"
        made.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(exist_ok=True)
        made.rename(folder)
    finally:
        remove_private_artefacts(run.folder)
    progress.end(label, outcome, False)
    write_whole(folder / OUTCOME, json.dumps(ending(run, outcome, job.records), indent=1))


def ending(run: Run, outcome: Outcome, recorded: Path) -> dict[str, Any]:
    """How the process ended, for the report."""
    snapshot = recorded.with_suffix(".oom.pickle")
    where = f"in {outcome.stage}: {outcome.reason}"
    return {
        "status": outcome.status,
        "reason": None if outcome.status == "ok" else where,
        "wall_s": outcome.wall_s,
        "snapshot": f"cells/{snapshot.name}" if snapshot.exists() else None,
    }


def read(folder: Path, cells: Iterable[Cell], stages: Sequence[str]) -> list[Profile]:
    """The profiles of a run folder, in the order of the cells."""
    found = []
    for cell in cells:
        own = folder / "profile" / file_name(cell)
        if not (own / OUTCOME).exists():
            continue
        end = json.loads((own / OUTCOME).read_text())
        paths = [own / f"{stage}.json" for stage in stages]
        made = tuple(json.loads(path.read_text()) for path in paths if path.exists())
        where = own.relative_to(folder).as_posix()
        found.append(
            Profile(cell.name, end["status"], end["reason"], where, made, end.get("snapshot"))
        )
    return found

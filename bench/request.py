"""What the command line asks for: which matrix, cells, worker and run folder."""

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.launching.cluster import AUTO, NODE_S
from bench.launching.starting import LAUNCHERS
from bench.matrix import Cell, Matrix, load_matrix
from bench.reporting.strings import ENGLISH
from core.config import InputError, did_you_mean


@dataclass(frozen=True)
class Request:
    """The command line."""

    matrix_file: Path
    sets: tuple[str, ...]
    only: tuple[str, ...]
    repeats: int | None
    resume: str | None
    base: Path | None
    out: Path
    worker: str | None
    launcher: str | None
    max_repeats: int | None = None
    budget: str | None = None
    profile: tuple[str, ...] = ()
    objective: str | None = None
    max_memory: float | None = None
    lang: str = ENGLISH
    address: str = AUTO
    node_timeout_s: float = NODE_S


def read_earlier(request: Request) -> dict[str, Any]:
    """What the run to finish wrote about itself."""
    if request.sets or request.base or request.only:
        raise InputError(
            f"--resume {request.resume}: settings and cells are those the run began with; "
            "drop --set, --base and --only"
        )
    path = run_folder(request) / "machine.json"
    try:
        earlier: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        raise InputError(f"--resume {request.resume}: {path} is missing or damaged") from None
    return earlier


def run_folder(request: Request) -> Path:
    """The folder to resume, or a new one named after the present second."""
    runs = request.out / request.matrix_file.stem
    if request.resume is not None:
        given = Path(request.resume)
        folder = given if (given / "matrix.yaml").exists() else runs / request.resume
        if not (folder / "matrix.yaml").exists():
            known = [path.parent.name for path in runs.glob("*/matrix.yaml")]
            raise InputError(
                f"--resume {request.resume}: no run folder and no run below {runs}"
                f"{did_you_mean(request.resume, known)}"
            )
        return folder
    name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        folder = runs / f"{name}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise InputError(f"{runs}: no free run id at {name}")


def read_matrix(request: Request, earlier: dict[str, Any] | None) -> Matrix:
    """The matrix of the command line, or the resolved one of the run to finish."""
    given = {
        "repeats": request.repeats,
        "max_repeats": request.max_repeats,
        "budget_s": request.budget,
        "objective": request.objective,
        "max_memory_gib": request.max_memory,
    }
    limits = tuple(f"{key}={value}" for key, value in given.items() if value is not None)
    if earlier is not None:
        return load_matrix(run_folder(request) / "matrix.yaml", limits)
    return load_matrix(request.matrix_file, (*request.sets, *limits), request.base)


def choose(planned: list[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells named, always with the baseline: nothing can be judged without it."""
    if not only:
        return planned
    names = {named(planned, word) for word in only} | {planned[0].name}
    return [cell for cell in planned if cell.name in names]


def named(planned: Sequence[Cell], word: str, option: str = "--only") -> str:
    """The cell of that name, or the only one whose name contains the word; `option` asked for it.

    Raises InputError.
    """
    names = [cell.name for cell in planned]
    if word in names:
        return word
    found = [name for name in names if word in name]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"{option} {word}: fits {len(found)} cells; write one of {', '.join(found)}"
        )
    raise InputError(
        f"{option} {word}: no such cell{did_you_mean(word, names)}; "
        f"the cells are {', '.join(names)}"
    )


def worker_command(request: Request, earlier: dict[str, Any] | None) -> list[str]:
    """The command that gets a cell file; a resumed run keeps the one it began with."""
    if request.worker is None:
        return list(earlier["worker"]) if earlier else [sys.executable, "-m", "bench.worker"]
    command = shlex.split(request.worker)
    if not command or shutil.which(command[0]) is None:
        raise InputError(f"--worker {request.worker}: no such command")
    return command


def chosen_launcher(request: Request, earlier: dict[str, Any] | None) -> str:
    """How cells start; a resumed run keeps the way it began with."""
    before = (earlier or {}).get("containers", {}).get("launcher", "auto")
    chosen = str(request.launcher or before)
    if chosen not in LAUNCHERS:
        raise InputError(
            f"--launcher {chosen}: not one of {', '.join(LAUNCHERS)}"
            f"{did_you_mean(chosen, LAUNCHERS)}"
        )
    return chosen

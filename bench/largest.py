"""The largest batch that fits: every `auto` of a matrix, searched before its cells are measured;
`python -m bench.largest MATRIX` does the search alone.
"""

import shlex
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from bench import machine, progress
from bench.execute import Run
from bench.launching import starting
from bench.matrix import Cell, Matrix, cells, load_matrix, settings_key, with_limit_of
from bench.reporting.strings import ENGLISH, words
from bench.request import named
from bench.schedule import autos, memory_model
from bench.schedule.autos import ACTS_IN
from bench.schedule.memory_model import MOST_PROBES, Line, Probe
from bench.schedule.memory_probes import Search, Searcher, Unanswered, find
from core.config import InputError, did_you_mean


def due(matrix: Matrix, chosen: Sequence[Cell], blocked: Collection[str]) -> list[Search]:
    """The searches these cells need, in order; `blocked`: keys of cells that never start.

    Raises InputError for an `auto` that no measured stage would use.
    """
    found: dict[int, Search] = {}
    for cell in chosen:
        for setting, stand_in in autos.autos_of(cell.settings).items():
            refuse_unused(matrix, setting)
            if cell.key not in blocked:
                found.setdefault(stand_in, Search(setting, stand_in, cell))
    return list(found.values())


def refuse_unused(matrix: Matrix, setting: str) -> None:
    """Raise InputError where no measured stage would show how large a batch fits."""
    if not set(ACTS_IN[setting]) & set(matrix.stages):
        raise InputError(
            f"{setting}: auto, but no measured stage uses it ({', '.join(ACTS_IN[setting])} would):"
            " give a number, or measure one of them"
        )


def plan_lines(searches: Sequence[Search]) -> Iterator[str]:
    """What the plan says of them."""
    for search in searches:
        where = f" (in {search.where})" if search.where else ""
        yield (
            f"{search.setting}: auto{where}, searched first, at most {MOST_PROBES} short processes"
        )


# ---- the searches of a run ----


def answer(
    searcher: Searcher, searches: Sequence[Search]
) -> tuple[dict[int, int], list[dict[str, Any]]]:
    """Stand-in -> number, and how each was found, for machine.json."""
    numbers: dict[int, int] = {}
    told = []
    for search in searches:
        probes = find(searcher, search, numbers)
        number = apart(searcher.run.matrix, search, final(probes).batch, numbers)
        numbers[search.stand_in] = number
        told.append(account(search, number, probes, searcher.run.matrix))
    return numbers, told


def final(probes: Sequence[Probe]) -> Probe:
    """The probe of the number found: of those beside others the one that fits, if there are any."""
    together = [probe for probe in probes if probe.beside]
    best = memory_model.largest(together or probes)
    assert best is not None
    return best


def apart(matrix: Matrix, search: Search, number: int, numbers: Mapping[int, int]) -> int:
    """The number, one less where an `include` entry would no more be a cell of its own with it: the
    cells that have this value of the axis would take up the entry's other settings.
    """
    entry = next((e for e in matrix.include if search.stand_in in e.values()), {})
    if search.setting not in matrix.axes or set(entry) <= set(matrix.axes):
        return number
    other = matrix.without_gpu.axes if matrix.without_gpu else {}
    values = (*matrix.axes[search.setting], *other.get(search.setting, ()))
    taken = {numbers.get(value, value) for value in values}
    while number > 1 and number in taken:
        number -= 1
    return number


def account(search: Search, number: int, probes: Sequence[Probe], matrix: Matrix) -> dict[str, Any]:
    """How a number was found, as plain data."""
    line = memory_model.line_of(probe for probe in probes if not probe.beside)
    return {
        "setting": search.setting,
        "cell": search.where,
        "number": number,
        "room_bytes": probes[-1].room_bytes,
        "given": matrix.max_memory_gib is not None,
        "headroom": memory_model.HEADROOM,
        "model": None if line is None else model(line),
        "probes": [asdict(probe) | {"batch": probe.batch, "fits": probe.fits} for probe in probes],
    }


def model(line: Line) -> dict[str, Any]:
    """The line as plain data."""
    return {
        "intercept_bytes": round(line.intercept),
        "slope_bytes": round(line.slope),
        "through": [line.lower.batch, line.upper.batch],
    }


def settled(run: Run, has_gpu: bool, numbers: Mapping[int, int]) -> tuple[Run, dict[str, Cell]]:
    """The run with the found numbers in matrix and cells; key of each cell before -> cell now.

    Two cells that have become equal are one.
    """
    matrix = with_found(run.matrix, numbers)
    planned = {cell.key: cell for cell in cells(matrix, has_gpu)}
    now = {
        cell.key: planned[settings_key(autos.with_numbers(cell.settings, numbers))]
        for cell in run.cells
    }
    chosen = {cell.key: cell for cell in now.values()}
    return replace(run, matrix=matrix, cells=tuple(chosen.values())), now


def with_found(matrix: Matrix, numbers: Mapping[int, int]) -> Matrix:
    """The matrix with the found numbers; an axis keeps equal values once, and an `include` entry
    that has become a cell there is already goes.
    """
    document = autos.replaced(matrix.model_dump(), lambda value: numbers.get(value, value))
    for holder in (document, document["without_gpu"] or {}):
        for setting, values in holder.get("axes", {}).items():
            if setting in ACTS_IN:
                holder["axes"][setting] = list(dict.fromkeys(values))
    entries = document["include"]
    changed = [
        place
        for place, entry in enumerate(matrix.include)
        if any(autos.is_auto(value) and value in numbers for value in entry.values())
    ]
    kept = [place for place in range(len(entries)) if place not in changed]
    for place in changed:
        if is_sound(document | {"include": [entries[n] for n in sorted([*kept, place])]}):
            kept.append(place)
    return Matrix.model_validate(document | {"include": [entries[n] for n in sorted(kept)]})


def is_sound(document: dict[str, Any]) -> bool:
    """Whether a matrix of this content can be planned."""
    try:
        Matrix.model_validate(document)
    except ValidationError:
        return False
    return True


# ---- the command ----


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    matrix_file: Annotated[Path, typer.Argument(metavar="MATRIX", help="The matrix file.")],
    settings: Annotated[
        list[str],
        typer.Option("--setting", help="Batch size to search; default: those that are `auto`."),
    ] = [],  # noqa: B006 (typer reads the default, nothing changes it)
    cell: Annotated[
        str, typer.Option(metavar="CELL", help="Search with the other settings of this cell.")
    ] = "baseline",
    max_memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Memory it may take; default: all free.")
    ] = None,
    sets: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the matrix.")
    ] = [],  # noqa: B006
    worker: Annotated[
        str | None, typer.Option(metavar="CMD", help="Command in place of the worker.")
    ] = None,
) -> None:
    """Find the largest batch that fits in one cell of MATRIX; keeps nothing, judges nothing."""
    console = Console(highlight=False, force_terminal=sys.stdout.isatty())
    limit = () if max_memory is None else (f"max_memory_gib={max_memory}",)
    try:
        matrix = with_limit_of(load_matrix(matrix_file, (*sets, *limit)), machine.has_gpu())
        told = alone(matrix, settings, cell, shlex.split(worker or ""), console)
    except InputError as error:
        raise _ended(error, 2) from None
    except machine.UnfitMachine as error:
        raise _ended(error, 3) from None
    except Unanswered as error:
        raise _ended(error, 1) from None

    from bench.reporting.largest_section import section  # tabulate: not before it is needed

    for one in section(told, words(ENGLISH)):
        print(one["sentences"], one["probes"], sep="\n\n", end="\n\n")
    for found in told:
        print(f"{found['setting']}: {found['number']}")


def _ended(error: Exception, status: int) -> typer.Exit:
    print(error, file=sys.stderr)
    return typer.Exit(status)


def alone(
    matrix: Matrix, chosen: Sequence[str], cell_name: str, worker: Sequence[str], console: Console
) -> list[dict[str, Any]]:
    """Search in a folder that is gone afterwards; how each number was found.

    Raises InputError, UnfitMachine, Unanswered.
    """
    if worker and shutil.which(worker[0]) is None:
        raise InputError(f"--worker {shlex.join(worker)}: no such command")
    planned = cells(matrix, machine.has_gpu())
    name = named(planned, cell_name, "--cell")
    cell = next(one for one in planned if one.name == name)
    for setting in [full_name(word) for word in chosen]:
        refuse_unused(matrix, setting)
        cell = with_auto(cell, setting)
    image = cell.settings.machine.image
    starter = starting.starter("auto", [image], starting.RUN_S)
    obstacle = starter.obstacle(cell.settings) or machine.obstacle(cell.settings, machine.brief())
    if obstacle:
        raise machine.UnfitMachine(f"machine: {obstacle.reason}")
    searches = due(matrix, [cell], ())
    if not searches:
        raise InputError(f"{name}: nothing is auto; name one with --setting {', '.join(ACTS_IN)}")
    with tempfile.TemporaryDirectory(prefix="largest-") as folder, progress.shown(console) as shown:
        machine.check(Path(folder), cell.settings.machine.device != "cpu")
        command = tuple(worker) or (sys.executable, "-m", "bench.worker")
        run = Run(Path(folder), matrix, (cell,), command, starter)
        _, told = answer(Searcher(run, shown, lambda: False), searches)
    return told


def full_name(word: str) -> str:
    """The batch size that a word means. Raises InputError."""
    known = [setting for setting in ACTS_IN if f".{setting}".endswith(f".{word}")]
    if len(known) != 1:
        raise InputError(
            f"--setting {word}: not one of {', '.join(ACTS_IN)}{did_you_mean(word, ACTS_IN)}"
        )
    return known[0]


def with_auto(cell: Cell, setting: str) -> Cell:
    """The cell with `auto` for a setting."""
    section, _, name = setting.partition(".")
    document = cell.settings.model_dump()
    document[section][name] = autos.stand_in_at(setting)
    settings = type(cell.settings).model_validate(document)
    return replace(cell, settings=settings, key=settings_key(settings))


if __name__ == "__main__":
    app()

"""The main command: read a matrix, plan, check the machine, launch every cell, judge, report."""

import errno
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench import machine, plan, progress, records
from bench.execute import Run, execute, tasks, write_whole
from bench.launch import Interrupted
from bench.matrix import Cell, Matrix, cells, resolved
from bench.request import (
    Request,
    choose,
    read_earlier,
    read_matrix,
    run_folder,
    worker_command,
)
from core.config import InputError

FEWEST_REPEATS = 4
"""Below this no verdict is given."""
INTERRUPTED = 130
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""Disk full, over quota, read-only, not permitted."""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    matrix_file: Annotated[Path, typer.Argument(metavar="MATRIX", help="The matrix file.")],
    plan_only: Annotated[
        bool,
        typer.Option("--plan", help="Say what would run, how long, and what it could tell apart."),
    ] = False,
    sets: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the matrix.")
    ] = [],  # noqa: B006 (typer reads the default, nothing changes it)
    only: Annotated[
        list[str],
        typer.Option("--only", metavar="CELL", help="Measure this cell and the baseline."),
    ] = [],  # noqa: B006
    repeats: Annotated[int | None, typer.Option(help="Fresh processes for each cell.")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Finish this run (folder or run id).")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Settings file in place of the base.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("reports"),
    worker: Annotated[
        str | None, typer.Option(metavar="CMD", help="Command in place of the worker.")
    ] = None,
) -> None:
    """Measure every cell of MATRIX against its baseline; the last line is the report's path."""
    request = Request(matrix_file, tuple(sets), tuple(only), repeats, resume, base, out, worker)
    console = Console(highlight=False)
    try:
        status = run(request, plan_only, console)
    except InputError as error:
        print(error, file=sys.stderr)
        status = 2
    except machine.UnfitMachine as error:
        print(error, file=sys.stderr)
        status = 3
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"machine: {error}; what was measured is kept, see --resume", file=sys.stderr)
        status = 3
    raise typer.Exit(status)


def run(request: Request, plan_only: bool, console: Console) -> int:
    """The whole program; returns the exit status. Raises InputError, UnfitMachine."""
    earlier = read_earlier(request) if request.resume else None
    matrix = read_matrix(request, earlier)
    here = machine.brief()
    chosen = choose(cells(matrix, here["has_gpu"]), earlier["only"] if earlier else request.only)
    unsupported = {
        cell.key: reason for cell in chosen if (reason := machine.unsupported(cell.settings, here))
    }
    for line in plan_lines(request, matrix, chosen, unsupported):
        console.print(line, markup=False, soft_wrap=True)
    if plan_only:
        for problem in machine.problems_here(request.out):
            console.print(f"a run would be refused: {problem}", markup=False, soft_wrap=True)
        return 0
    machine.check(request.out)
    facts = begun(request) if earlier is None else continued(earlier)
    facts["worker"] = worker_command(request, earlier)
    facts["warnings"] = warnings(matrix, chosen, unsupported, facts)
    for warning in facts["warnings"]:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
    folder = run_folder(request)
    this = Run(folder, matrix, tuple(chosen), tuple(facts["worker"]))
    with records.locked(this.records_path):
        write_whole(folder / "matrix.yaml", resolved(matrix))
        write_whole(folder / "machine.json", json.dumps(facts, indent=1))
        finished = launch(this, unsupported, facts, console)
        status, report = judge_and_write(this, facts)
    if not finished:
        again = f"python -m bench.run {request.matrix_file} --resume {folder}"
        console.print(f"interrupted; finish with: {again}", markup=False, soft_wrap=True)
        status = INTERRUPTED
    console.print(str(report), markup=False, soft_wrap=True)
    return status


def plan_lines(
    request: Request, matrix: Matrix, chosen: list[Cell], unsupported: dict[str, str]
) -> Iterator[str]:
    """What is left to do, from the records alone."""
    done = {(key, 0) for key in unsupported}
    if request.resume is not None:
        past = records.read(run_folder(request) / "records.jsonl")
        done |= records.finished(past, matrix.stages)
    todo = tasks(chosen, matrix.repeats, done)
    history = plan.read_history(request.out / request.matrix_file.stem)
    yield from plan.lines(matrix, chosen, unsupported, todo, history)
    if not machine.has_gpu() and matrix.without_gpu is not None:
        yield "no GPU here: the values of without_gpu are used"


def begun(request: Request) -> dict[str, Any]:
    """The record of this machine and of the command that a later `--resume` needs."""
    return machine.environment() | {"command": sys.orig_argv, "only": list(request.only)}


def continued(earlier: dict[str, Any]) -> dict[str, Any]:
    """The record of the first sitting with this one noted; refuses to join different machines."""
    now = machine.environment()
    if found := machine.differences(earlier, now):
        raise machine.UnfitMachine(
            "machine: this run cannot be continued here; start a new one: " + "; ".join(found)
        )
    resumed = [*earlier.get("resumed", ()), {"recorded": now["recorded"], "git": now["git"]}]
    return earlier | {"resumed": resumed}


def warnings(
    matrix: Matrix, chosen: Sequence[Cell], unsupported: dict[str, str], facts: dict[str, Any]
) -> list[str]:
    """What will weaken the result, each with what to do."""
    found = []
    if chosen[0].key in unsupported:
        found.append(
            "the baseline cannot run here, so nothing can be judged; change the axes' first values"
        )
    if matrix.repeats < FEWEST_REPEATS:
        found.append(f"{matrix.repeats} repeats: below {FEWEST_REPEATS} every verdict is undecided")
    if facts["load_1min"] > 0.5 * facts["usable_cores"]:
        found.append(
            f"load {facts['load_1min']:.1f} on {facts['usable_cores']} cores: stop other work"
        )
    if any(sitting["git"] != facts["git"] for sitting in facts.get("resumed", ())):
        found.append(
            "the code changed between the sittings of this run; start a new one for a clean figure"
        )
    return found


def launch(this: Run, unsupported: dict[str, str], facts: dict[str, Any], console: Console) -> bool:
    """Measure what is missing; False if the user stopped it. Either way the files are whole."""

    def note_process(process: dict[str, Any]) -> None:
        if process and facts.get("process") is None:
            facts["process"] = process
            write_whole(this.folder / "machine.json", json.dumps(facts, indent=1))

    with stop_requests() as stopped, progress.shown(console) as display:
        try:
            execute(this, unsupported, display, stopped, note_process)
        except Interrupted:
            return False
    return True


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM as a question the waiting loop asks, so that they never tear a file."""
    seen: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [
        signal.signal(number, lambda number, frame: seen.append(number)) for number in signals
    ]
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def judge_and_write(this: Run, facts: dict[str, Any]) -> tuple[int, Path]:
    """Exit status and path of the report."""
    from bench import report, verdicts  # scipy and matplotlib: not before the measuring is over

    found = records.read(this.records_path)
    judgement = verdicts.judge(this.matrix, list(this.cells), found)
    path = report.write(this.folder, this.matrix, list(this.cells), found, judgement, facts)
    set_up_failed = any(str(record["reason"]).startswith("set-up failed") for record in found)
    return max(judgement.exit_status, int(set_up_failed)), path


if __name__ == "__main__":
    app()

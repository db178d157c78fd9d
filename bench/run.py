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

from bench import largest, machine, plan, preflight, progress, records
from bench.execute import Run, execute, tasks, trials, tried, write_whole
from bench.launch import Interrupted
from bench.launching import cluster, containers, starting
from bench.launching.site import Site
from bench.launching.starting import Starter
from bench.machine import Obstacle
from bench.matrix import Cell, Matrix, cells, resolved, with_limit_of
from bench.profile import profiles
from bench.reporting.strings import ENGLISH, chosen_language, words
from bench.request import (
    Request,
    choose,
    chosen_launcher,
    read_earlier,
    read_matrix,
    run_folder,
    worker_command,
)
from bench.schedule.attempts import judged
from bench.schedule.budget import measured
from core.config import InputError

FEWEST_REPEATS = 4
"""Below this no verdict is given."""
INTERRUPTED = 130
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
"""Disk full, over quota, over a limit of file size, read-only, not permitted."""
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
    max_repeats: Annotated[
        int | None, typer.Option(help="So many in all for cells that are still undecided.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Limit of the run: seconds, 30m, 2h.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(metavar="WHAT", help="The best cell has least time, memory, or both."),
    ] = None,
    max_memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Recommend no cell that needs more.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Finish this run (folder or run id).")
    ] = None,
    profile: Annotated[
        list[str],
        typer.Option(
            "--profile",
            metavar="CELL",
            help="Afterwards, look into the steps of this cell (`all`: of every cell): traces, "
            "operators, memory. Judged by nothing. With --resume also for a finished run.",
        ),
    ] = [],  # noqa: B006
    base: Annotated[Path | None, typer.Option(help="Settings file in place of the base.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("reports"),
    lang: Annotated[str, typer.Option(help="Language of the report: en or ja.")] = ENGLISH,
    worker: Annotated[
        str | None, typer.Option(metavar="CMD", help="Command in place of the worker.")
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="auto: cells with image host as processes, others in containers; docker, podman: "
            "the same with this engine; process, container: only one kind, others skipped; ray: "
            "processes on the nodes of a Ray cluster.",
        ),
    ] = None,
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Of the Ray cluster; auto: the one here.")
    ] = cluster.AUTO,
    node_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="To wait for nodes of the cluster.")
    ] = cluster.NODE_S,
) -> None:
    """Measure every cell of MATRIX against its baseline; the last line is the report's path."""
    request = Request(
        matrix_file,
        tuple(sets),
        tuple(only),
        repeats,
        resume,
        base,
        out,
        worker,
        launcher,
        max_repeats=max_repeats,
        budget=budget,
        profile=tuple(profile),
        objective=objective,
        max_memory=max_memory,
        lang=lang,
        address=address,
        node_timeout_s=node_timeout,
    )
    # Notebooks set FORCE_COLOR: Rich would then write cursor movements into a pipe.
    console = Console(highlight=False, force_terminal=sys.stdout.isatty())
    try:
        status = run(request, plan_only, console)
    except InputError as error:
        print(error, file=sys.stderr)
        status = 2
    except machine.UnfitMachine as error:
        print(error, file=sys.stderr)
        status = 3
    except largest.Unanswered as error:
        print(error, file=sys.stderr)
        status = 1
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"machine: {error}; what was measured is kept, see --resume", file=sys.stderr)
        status = 3
    raise typer.Exit(status)


def run(request: Request, plan_only: bool, console: Console) -> int:
    """The whole program; returns the exit status. Raises InputError, UnfitMachine."""
    earlier = read_earlier(request) if request.resume else None
    if chosen_launcher(request, earlier) != starting.RAY:
        return run_at(Site(), request, earlier, plan_only, console)
    with cluster.connected(request.address, request.node_timeout_s) as nodes:
        return run_at(nodes, request, earlier, plan_only, console)


def run_at(
    site: Site,
    request: Request,
    earlier: dict[str, Any] | None,
    plan_only: bool,
    console: Console,
) -> int:
    """The program, whatever the site."""
    language = chosen_language(request.lang)
    matrix = read_matrix(request, earlier)
    here = site.brief()
    matrix = with_limit_of(matrix, here["has_gpu"])
    chosen = choose(cells(matrix, here["has_gpu"]), earlier["only"] if earlier else request.only)
    if earlier is not None:
        refuse_other_settings(run_folder(request), chosen)
    profiled = profiles.chosen(chosen, [*(earlier or {}).get("profile", ()), *request.profile])
    machine.refuse_useless_variables(chosen)
    on_gpu = any(cell.settings.machine.device != "cpu" for cell in chosen)
    images = {cell.settings.machine.image for cell in chosen}
    limit_s = starting.PLAN_S if plan_only else starting.RUN_S
    starter = starting.starter(chosen_launcher(request, earlier), images, limit_s)
    site.take(chosen, earlier)
    obstacles = {
        cell.key: found
        for cell in chosen
        if (found := starter.obstacle(cell.settings) or site.obstacle(cell))
    }
    history = plan.read_history(request.out / request.matrix_file.stem)
    untried = preflight.left_out(matrix, chosen, history.process_s)
    searches = largest.due(matrix, chosen, obstacles.keys())
    if searches and starter.launcher == starting.RAY:
        raise InputError("--launcher ray: `auto` is searched on this machine; write the number")
    for line in plan_lines(request, matrix, chosen, obstacles, untried, history):
        console.print(line, markup=False, soft_wrap=True)
    if not here["has_gpu"] and matrix.without_gpu is not None:
        console.print("no GPU here: the values of without_gpu are used")
    for line in largest.plan_lines(searches):
        console.print(line, markup=False, soft_wrap=True)
    if profiled:
        line = f"then profiles of {', '.join(profiled)}: a process each, judged by nothing"
        console.print(line, markup=False, soft_wrap=True)
    if plan_only:
        for problem in site.problems(request.out, on_gpu):
            console.print(f"a run would be refused: {problem}", markup=False, soft_wrap=True)
        return 0
    site.check(request.out, on_gpu)
    now = site.environment()
    facts = begun(request, now) if earlier is None else continued(earlier, now, starter)
    facts["containers"] = starter.facts()
    facts["worker"] = worker_command(request, earlier)
    facts["profile"] = profiled
    if "calibration" not in facts:
        on_device = on_gpu and here["has_gpu"]
        facts["calibration"] = site.calibrate(facts["worker"], on_device)
    facts["warnings"] = warnings(matrix, chosen, obstacles, facts)
    facts["warnings"] += [f"not used: {node}" for node in site.left_out]
    for warning in facts["warnings"]:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
    folder = run_folder(request)
    this = Run(folder, matrix, tuple(chosen), tuple(facts["worker"]), starter)
    with records.locked(this.records_path):
        if starter.engine is not None:
            for name in containers.remove_left_behind(starter.engine, folder):
                console.print(f"removed a container of a dead run: {name}", markup=False)
        write_whole(folder / "matrix.yaml", resolved(matrix))
        write_whole(folder / "machine.json", json.dumps(facts, indent=1))
        if searches:
            settled = with_largest(this, searches, obstacles, facts, here["has_gpu"], console)
            if settled is None:
                return interrupted(request, folder, console)
            this, obstacles = settled
            untried = preflight.left_out(this.matrix, this.cells, history.process_s)
        finished = launch(this, site, obstacles, untried, facts, console)
        status, report = judge_and_write(this, facts, language)
    if not finished:
        status = interrupted(request, folder, console)
    console.print(str(report), markup=False, soft_wrap=True)
    return status


def refuse_other_settings(folder: Path, chosen: Sequence[Cell]) -> None:
    """Records of other settings would stand under the same names. Raises InputError."""
    strange = records.stranger(
        records.read(folder / "records.jsonl"), {cell.key for cell in chosen}
    )
    if strange is not None:
        raise InputError(
            f"{folder}: {strange} was measured with other settings than matrix.yaml has there now, "
            "or than this version makes of it; start a new run"
        )


def interrupted(request: Request, folder: Path, console: Console) -> int:
    """Say how to go on; the exit status."""
    again = f"python -m bench.run {request.matrix_file} --resume {folder}"
    console.print(f"interrupted; finish with: {again}", markup=False, soft_wrap=True)
    return INTERRUPTED


def with_largest(
    this: Run,
    searches: Sequence[largest.Search],
    obstacles: dict[str, Obstacle],
    facts: dict[str, Any],
    has_gpu: bool,
    console: Console,
) -> tuple[Run, dict[str, Obstacle]] | None:
    """The run with a number for each `auto`, noted in its files; None if the user stopped it."""
    with stop_requests() as stopped, progress.shown(console) as display:
        try:
            numbers, told = largest.answer(largest.Searcher(this, display, stopped), searches)
        except Interrupted:
            return None
    run, now = largest.settled(this, has_gpu, numbers)
    names = {cell.name: now[cell.key].name for cell in this.cells}
    named = [one | {"cell": names.get(one["cell"], "")} for one in told]
    facts["largest"] = [*facts.get("largest", ()), *named]
    facts["only"] = [cell.name for cell in run.cells] if facts["only"] else []
    facts["profile"] = [names[name] for name in facts["profile"]]
    write_whole(run.folder / "matrix.yaml", resolved(run.matrix))
    write_whole(run.folder / "machine.json", json.dumps(facts, indent=1))
    for one in told:
        console.print(f"{one['setting']}: {one['number']} is the largest that fits", markup=False)
    return run, {now[key].key: found for key, found in obstacles.items()}


def plan_lines(
    request: Request,
    matrix: Matrix,
    chosen: list[Cell],
    obstacles: dict[str, Obstacle],
    untried: dict[str, str],
    history: plan.History,
) -> Iterator[str]:
    """What is left to do, from the files alone."""
    done = {(key, 0) for key in obstacles}
    past: list[records.Record] = []
    if request.resume is not None:
        past = measured(records.read(run_folder(request) / "records.jsonl"))
        done |= records.finished(past, matrix.stages)
        untried = untried | tried(run_folder(request), past)
    todo = tasks(chosen, matrix.repeats, done)
    due = trials(todo, untried)
    yield from plan.lines(matrix, chosen, obstacles, todo, history, due, untried)


def begun(request: Request, now: dict[str, Any]) -> dict[str, Any]:
    """The record of the machine and of the command that a later `--resume` needs."""
    return now | {"command": sys.orig_argv, "only": list(request.only)}


def continued(earlier: dict[str, Any], now: dict[str, Any], starter: Starter) -> dict[str, Any]:
    """The record of the first sitting with this one noted; refuses to join different machines."""
    found = machine.differences(earlier, now)
    if found := found + starter.differences(earlier.get("containers") or {}):
        raise machine.UnfitMachine(
            "machine: this run cannot be continued here; start a new one: " + "; ".join(found)
        )
    resumed = [*earlier.get("resumed", ()), {"recorded": now["recorded"], "git": now["git"]}]
    return earlier | {"resumed": resumed}


def warnings(
    matrix: Matrix, chosen: Sequence[Cell], obstacles: dict[str, Obstacle], facts: dict[str, Any]
) -> list[str]:
    """What will weaken the result, each with what to do."""
    found = []
    if chosen[0].key in obstacles:
        found.append(
            "the baseline cannot run here, so nothing can be judged; change the axes' first values"
        )
    if (most := matrix.most_repeats) < FEWEST_REPEATS:
        found.append(f"{most} repeats: below {FEWEST_REPEATS} every verdict is undecided")
    if facts["load_1min"] > 0.5 * facts["usable_cores"]:
        found.append(
            f"load {facts['load_1min']:.1f} on {facts['usable_cores']} cores: stop other work"
        )
    if any(sitting["git"] != facts["git"] for sitting in facts.get("resumed", ())):
        found.append(
            "the code changed between the sittings of this run; start a new one for a clean figure"
        )
    return found


def launch(
    this: Run,
    site: Site,
    obstacles: dict[str, Obstacle],
    untried: dict[str, str],
    facts: dict[str, Any],
    console: Console,
) -> bool:
    """Measure what is missing; False if the user stopped it. Either way the files are whole."""

    noted: set[str] = set()

    def note_process(process: dict[str, Any]) -> None:
        image = process.get("launched", "host")
        if process and image not in noted:
            noted.add(image)
            facts.setdefault("process", process)
            if image != "host":
                facts.setdefault("processes", {})[image] = process
            write_whole(this.folder / "machine.json", json.dumps(facts, indent=1))

    with stop_requests() as stopped, progress.shown(console) as display:
        try:
            execute(
                this, obstacles, untried, display, stopped, note_process, site.launch, site.walk
            )
            profiles.take(this, facts["profile"], display, stopped, site.launch)
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


def judge_and_write(this: Run, facts: dict[str, Any], language: str) -> tuple[int, Path]:
    """Exit status and path of the report; the list of runs is written anew with it."""
    from bench import report, verdicts
    from bench.reporting import index  # matplotlib: not before the measuring is over

    cells, found = list(this.cells), judged(records.read(this.records_path))
    judgement = verdicts.judge(this.matrix, cells, found)
    made = profiles.read(this.folder, this.cells, this.matrix.stages)
    path = report.write(this.folder, this.matrix, cells, found, judgement, facts, made, language)
    index.write(this.folder.absolute().parents[1], words(language))
    set_up_failed = any(str(record["reason"]).startswith("set-up failed") for record in found)
    return max(judgement.exit_status, int(set_up_failed)), path


if __name__ == "__main__":
    app()

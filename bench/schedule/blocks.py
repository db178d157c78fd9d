"""The blocks of a run: who is measured in each and in what order, what is left out or repeated."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench import records
from bench.launch import Outcome
from bench.matrix import Cell, Matrix, schedule
from bench.schedule import budget
from bench.schedule.attempts import BUDGET, TOO_SLOW, due_again
from bench.schedule.stopping import turn

MOST_FAILURES = 2
"""A cell whose first repeats all fail is given up after this many."""


@dataclass(frozen=True)
class Task:
    """One cell to measure in one block; the number of the block is that of the repeat."""

    block: int
    cell: Cell
    attempt: int = 0
    """Above 0 where an earlier attempt of this repeat was disturbed."""


def tasks(cells: Iterable[Cell], repeats: int, done: set[records.Group]) -> list[Task]:
    """The schedule less what is measured already, and less cells that never start (repeat 0)."""
    return [
        Task(block, cell)
        for block, cell in schedule(list(cells), repeats)
        if not {(cell.key, block), (cell.key, 0)} & done
    ]


@dataclass(frozen=True)
class Walk:
    """What the walk through the blocks knows and may do."""

    matrix: Matrix
    cells: tuple[Cell, ...]
    past: list[records.Record]
    """All records so far; grows."""
    done: set[records.Group]
    """Repeats that need no process any more; grows."""
    purse: budget.Purse
    expect: Callable[[int], None]
    """Hears how many processes are still to come."""
    measure: Callable[..., tuple[Outcome, list[records.Record]]]
    """Runs one process: task, seconds it may take, optionally what launches it in place of the
    run's own; its records are not on the disk yet."""
    keep: Callable[[list[records.Record]], None]
    """Puts records on the disk."""
    rows: Callable[[Cell, int, str, str | None], list[records.Record]]
    """Rows of a repeat that is not measured: cell, repeat (0 = all), reason, `stopped_by`."""


def walk(w: Walk) -> None:
    """Measure what is missing, block by block."""
    for block in range(1, w.matrix.most_repeats + 1):
        if not walk_block(w, block):
            return


def walk_block(w: Walk, block: int) -> bool:
    """Measure what is missing of one block; False when a budget has no room for it."""
    ahead = turn(w.matrix, w.cells, w.past, block)
    for cell in w.cells:
        if cell.key in ahead.too_slow:
            leave_out(w, cell, block, ahead.too_slow[cell.key], TOO_SLOW)
    todo = due(w, block, ahead.members)
    if todo and (reason := w.purse.refusal([task.cell.key for task in todo])):
        for cell in ahead.members:
            leave_out(w, cell, block, reason, BUDGET)
        return False
    while todo := due(w, block, ahead.members):
        take(w, todo)
    measure_again(w, block, ahead.members)
    return True


def due(w: Walk, block: int, members: Sequence[Cell]) -> list[Task]:
    """What is missing of one block; its first cell moves on by one from block to block."""
    keys = {cell.key for cell in members}
    return [
        task
        for task in tasks(w.cells, block, w.done)
        if task.block == block and task.cell.key in keys
    ]


def take(w: Walk, todo: Sequence[Task]) -> None:
    """Measure the first of the processes due, or write down why its cell is not measured."""
    task, key = todo[0], todo[0].cell.key
    later = [t for t in tasks(w.cells, w.matrix.repeats, w.done) if t.block > task.block]
    w.expect(len(todo) + len(later))
    if reason := hopeless(w.past, task.cell):
        w.keep(w.rows(task.cell, 0, reason, None))
        w.done.add((key, 0))
    elif reason := w.purse.cell_refusal(key):
        leave_out(w, task.cell, task.block, reason, BUDGET)
    else:
        attempt(w, task, len(todo))


def measure_again(w: Walk, block: int, members: Sequence[Cell]) -> None:
    """Another attempt for the disturbed repeats of a block, as far as the budgets go."""
    cells = {cell.key: cell for cell in members}
    while again := [
        (key, number)
        for key, number in due_again(w.past, block, w.matrix.remeasures)
        if key in cells and not (w.purse.refusal([key]) or w.purse.cell_refusal(key))
    ]:
        key, number = again[0]
        w.expect(len(again))
        if not attempt(w, Task(block, cells[key], number), 1):
            return


def attempt(w: Walk, task: Task, waiting: int) -> bool:
    """One process, its records kept; False when a budget ended it, which leaves none."""
    key, most_s = task.cell.key, w.matrix.timeout_s
    limit_s = w.purse.limit_s(key, waiting)
    outcome, group = w.measure(task, most_s if limit_s is None else min(most_s, limit_s))
    w.purse.spend(outcome.wall_s, key)
    if outcome.status == "timeout" and limit_s is not None and limit_s <= outcome.wall_s < most_s:
        reason = f"a budget left {limit_s:.0f} s for this process, which were not enough"
        leave_out(w, task.cell, task.block, reason, BUDGET)
        return False
    w.keep(group)
    w.past.extend(group)
    w.done.add((key, task.block))
    return True


def leave_out(w: Walk, cell: Cell, block: int, reason: str, stopped_by: str) -> None:
    """Rows for the missing repeats of a cell from a block on. Those a budget left out stay unknown
    to this walk: they are due again when a later sitting has room.
    """
    for repeat in range(block, max(block, w.matrix.repeats) + 1):
        if not {(cell.key, repeat), (cell.key, 0)} & w.done:
            group = w.rows(cell, repeat, reason, stopped_by)
            w.keep(group)
            w.past.extend(budget.measured(group))
            w.done.add((cell.key, repeat))


def hopeless(past: Sequence[records.Record], cell: Cell) -> str | None:
    """Why a cell is not tried again: its first repeats all failed, and a hang may cost an hour."""
    own = [
        r for r in past if r["key"] == cell.key and not (r.get("stopped_by") or r.get("node_lost"))
    ]
    failed = {record["repeat"]: record["status"] for record in own if record["status"] != "ok"}
    if len(failed) < MOST_FAILURES or len({record["repeat"] for record in own}) > len(failed):
        return None
    return f"not tried again: its first {len(failed)} repeats ended {', '.join(failed.values())}"

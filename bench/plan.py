"""What a run would do, said before it starts: cells, order, time, and what it could tell apart."""

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import preflight, records
from bench.execute import Task, upstream_need
from bench.machine import Obstacle
from bench.matrix import Cell, Matrix
from bench.schedule.budget import side_seconds

ASSUMED_PROCESS_SD = 0.01
"""Standard deviation of one process's time, as a ratio, where no earlier run tells."""
RUNS_REMEMBERED = 3


@dataclass(frozen=True)
class History:
    """What earlier runs of the same matrix teach."""

    process_s: Mapping[str, float]
    """Cell key -> median seconds of one process."""
    difference_sd: float | None
    """Standard deviation over blocks of ln(cell / baseline), pooled over cells; None if unknown."""
    trial_s: Mapping[str, float] = field(default_factory=dict)
    """Cell key -> seconds of its newest preflight, both processes."""
    set_up_s: Mapping[str, float] = field(default_factory=dict)
    """Name of shared artefacts (`upstream_need`) -> seconds of making them."""

    def estimate_s(self, keys: Sequence[str]) -> float | None:
        """Seconds for these processes; a cell never run before counts as the mean of the others."""
        if not self.process_s:
            return None
        mean = statistics.fmean(self.process_s.values())
        return sum(self.process_s.get(key, mean) for key in keys)


def read_history(folder: Path) -> History:
    """Learn from the newest runs below the folder of a matrix."""
    runs = sorted(folder.glob("*/records.jsonl"))[-RUNS_REMEMBERED:]
    seconds: dict[str, list[float]] = {}
    squares, freedom = 0.0, 0
    for path in runs:
        totals = _process_seconds(records.read(path))
        for (key, _), (_, process_s, _) in totals.items():
            seconds.setdefault(key, []).append(process_s)
        for differences in _log_ratios(totals):
            squares += statistics.pvariance(differences) * len(differences)
            freedom += len(differences) - 1
    return History(
        {key: statistics.median(values) for key, values in seconds.items()},
        math.sqrt(squares / freedom) if freedom else None,
        *_side_seconds([path.parent for path in runs]),
    )


def _side_seconds(runs: Sequence[Path]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the newest preflight of each cell and of each set-up."""
    trials: dict[str, float] = {}
    set_ups: dict[str, float] = {}
    for run in runs:
        newer = side_seconds(run)
        trials, set_ups = trials | newer[0], set_ups | newer[1]
    return trials, set_ups


def _process_seconds(
    lines: Sequence[records.Record],
) -> dict[records.Group, tuple[str, float, float]]:
    """(key, repeat) -> (cell, seconds of the process, seconds of its measured stages)."""
    totals: dict[records.Group, tuple[str, float, float]] = {}
    for record in lines:
        if record["status"] == "ok":
            group = records.group_of(record)
            _, _, stages_s = totals.get(group, ("", 0.0, 0.0))
            stages_s += record["wall_s"]
            totals[group] = (record["cell"], record.get("process_wall_s", stages_s), stages_s)
    return totals


def _log_ratios(
    totals: Mapping[records.Group, tuple[str, float, float]],
) -> Iterator[list[float]]:
    """Per cell: ln(its stage seconds / the baseline's) of every repeat that has both."""
    baseline = {repeat: s for (_, repeat), (cell, _, s) in totals.items() if cell == "baseline"}
    by_key: dict[str, list[float]] = {}
    for (key, repeat), (cell, _, stages_s) in totals.items():
        if cell != "baseline" and repeat in baseline:
            by_key.setdefault(key, []).append(math.log(stages_s / baseline[repeat]))
    yield from (differences for differences in by_key.values() if len(differences) > 1)


def smallest_difference(matrix: Matrix, difference_sd: float, comparisons: int = 1) -> float | None:
    """Smallest ratio - 1 that the last look finds in four runs of five.

    `comparisons` > 1 takes the level at Holm's strictest step. None below two repeats: no spread
    is seen.
    """
    from bench.judging.intervals import ALPHA, Effect, Looks  # scipy.special, for one quantile

    repeats = matrix.most_repeats
    if repeats < 2:
        return None
    level = ALPHA / comparisons * Looks(matrix.repeats, repeats).share(repeats)
    return math.expm1(Effect(0.0, difference_sd, repeats).smallest_seen(level))


def lines(
    matrix: Matrix,
    cells: Sequence[Cell],
    obstacles: Mapping[str, Obstacle],
    todo: Sequence[Task],
    history: History,
    due: Sequence[Cell],
    untried: Mapping[str, str],
) -> Iterator[str]:
    """The plan as text, one fact per line; `due` have a preflight, `untried` have none and why."""
    numbers = {cell.key: number for number, cell in enumerate(cells, start=1)}
    yield f"{matrix.question}"
    extra = f", up to {matrix.most_repeats} where undecided" * (matrix.max_repeats is not None)
    yield (
        f"{len(cells)} cells x {matrix.repeats} repeats{extra}; stages {', '.join(matrix.stages)}"
    )
    for cell in cells:
        obstacle = obstacles.get(cell.key)
        yield f"{numbers[cell.key]:4d}  {cell.name}" + (
            f"  {obstacle.status}: {obstacle.reason}" if obstacle else ""
        )
    for block in sorted({task.block for task in todo}):
        order = [str(numbers[task.cell.key]) for task in todo if task.block == block]
        yield f"block {block}: {' '.join(order)}"
    found = (upstream_need(task.cell.settings, matrix.stages) for task in todo)
    needs = {need for need in found if need}
    yield f"{len(todo)} processes to measure, {len(needs)} set-up processes before them"
    yield from preflight.lines(matrix, cells, due, untried)
    able = [cell.key for cell in cells if cell.key not in obstacles]
    yield from _time_lines(matrix, able, todo, [cell.key for cell in due], needs, history)
    yield _difference_line(matrix, len(cells) - len(obstacles) - 1, history)


def _time_lines(
    matrix: Matrix,
    able: Sequence[str],
    todo: Sequence[Task],
    due: Sequence[str],
    needs: Collection[str],
    history: History,
) -> Iterator[str]:
    """Seconds of what is to come, as far as earlier runs tell; `able`: keys of all cells that can
    run, `due`: of those with a preflight, `needs`: set-ups.
    """
    seconds = history.estimate_s([task.cell.key for task in todo])
    if seconds is None:
        yield "time: no history; unknown until the first process is done"
    else:
        keys = {task.cell.key for task in todo}
        known = len(keys & history.process_s.keys())
        line = f"time: about {duration(seconds)} ({known} of {len(keys)} cells timed before)"
        if further := matrix.most_repeats - matrix.repeats:
            most = seconds + further * (history.estimate_s(able) or 0.0)
            line += f", up to {duration(most)} with every further repeat"
        yield (
            line
            + _beside("preflight", due, history.trial_s)
            + _beside("set-up", needs, history.set_up_s)
        )
    if matrix.budget_s is not None:
        yield f"budget: {duration(matrix.budget_s)} for the run; what does not fit is left out"


def _beside(what: str, names: Collection[str], known_s: Mapping[str, float]) -> str:
    """Seconds of the processes that are not measured."""
    if not names:
        return ""
    if not any(name in known_s for name in names):
        return f"; {what} not timed before"
    mean = statistics.fmean(known_s.values())
    return f"; {what} about {duration(sum(known_s.get(name, mean) for name in names))}"


def _difference_line(matrix: Matrix, comparisons: int, history: History) -> str:
    spread = history.difference_sd or math.sqrt(2) * ASSUMED_PROCESS_SD
    source = "from earlier runs" if history.difference_sd else "assumed: 1 % per process"
    alone = smallest_difference(matrix, spread)
    if alone is None or comparisons < 1:
        return "smallest detectable difference: none; a comparison needs a second cell and repeats"
    strict = smallest_difference(matrix, spread, comparisons * (len(matrix.stages) + 1))
    return (
        f"smallest detectable difference: {alone:.1%} for one comparison, {strict:.1%} for the "
        f"strictest of all cells and stages; spread {spread:.1%} ({source})"
    )


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"

"""What a run would do, said before it starts: cells, order, time, and what it could tell apart."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import records
from bench.execute import Task, upstream_need
from bench.matrix import Cell, Matrix

ASSUMED_PROCESS_SD = 0.01
"""Standard deviation of one process's time, as a ratio, where no earlier run tells."""
ALPHA, POWER = 0.05, 0.8
RUNS_REMEMBERED = 3


@dataclass(frozen=True)
class History:
    """What earlier runs of the same matrix teach."""

    process_s: Mapping[str, float]
    """Cell key -> median seconds of one process."""
    difference_sd: float | None
    """Standard deviation over blocks of ln(cell / baseline), pooled over cells; None if unknown."""

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
    )


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


def smallest_difference(repeats: int, difference_sd: float, comparisons: int = 1) -> float | None:
    """Smallest ratio - 1 found in four runs of five: (t(1-α/2, n-1) + t(0.8, n-1))·s/√n.

    `comparisons` > 1 takes α at Holm's strictest step. None below two repeats: no spread is seen.
    """
    from scipy.special import stdtrit  # the one quantile; all of scipy.stats would take a second

    if repeats < 2:
        return None
    quantiles = stdtrit(repeats - 1, 1 - ALPHA / comparisons / 2) + stdtrit(repeats - 1, POWER)
    return math.expm1(float(quantiles) * difference_sd / math.sqrt(repeats))


def lines(
    matrix: Matrix,
    cells: Sequence[Cell],
    unsupported: Mapping[str, str],
    todo: Sequence[Task],
    history: History,
) -> Iterator[str]:
    """The plan as text, one fact per line."""
    numbers = {cell.key: number for number, cell in enumerate(cells, start=1)}
    yield f"{matrix.question}"
    yield f"{len(cells)} cells x {matrix.repeats} repeats; stages {', '.join(matrix.stages)}"
    for cell in cells:
        reason = unsupported.get(cell.key)
        yield f"{numbers[cell.key]:4d}  {cell.name}" + (
            f"  unsupported: {reason}" if reason else ""
        )
    for block in sorted({task.block for task in todo}):
        order = [str(numbers[task.cell.key]) for task in todo if task.block == block]
        yield f"block {block}: {' '.join(order)}"
    needs = {upstream_need(task.cell.settings, matrix.stages) for task in todo} - {None}
    yield f"{len(todo)} processes to measure, {len(needs)} set-up processes before them"
    yield _time_line(todo, history)
    yield _difference_line(matrix, len(cells) - len(unsupported) - 1, history)


def _time_line(todo: Sequence[Task], history: History) -> str:
    seconds = history.estimate_s([task.cell.key for task in todo])
    if seconds is None:
        return "time: no history; unknown until the first process is done"
    known = len({task.cell.key for task in todo} & history.process_s.keys())
    all_cells = len({task.cell.key for task in todo})
    return (
        f"time: about {duration(seconds)}, set-up aside ({known} of {all_cells} cells timed before)"
    )


def _difference_line(matrix: Matrix, comparisons: int, history: History) -> str:
    spread = history.difference_sd or math.sqrt(2) * ASSUMED_PROCESS_SD
    source = "from earlier runs" if history.difference_sd else "assumed: 1 % per process"
    alone = smallest_difference(matrix.repeats, spread)
    if alone is None or comparisons < 1:
        return "smallest detectable difference: none; a comparison needs a second cell and repeats"
    strict = smallest_difference(matrix.repeats, spread, comparisons * (len(matrix.stages) + 1))
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

"""The short trial of a cell before the first measured repeat of any: when it is due, what it takes.

Two processes: one does a few steps of every phase and saves; a fresh one loads what was saved,
compares, and goes on to the stages behind. `bench.execute` starts them, `bench.worker` is them.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from bench.launch import Outcome, stage_records
from bench.launching.deaths import COMPILE, Kind
from bench.matrix import Cell, Matrix
from bench.records import SCHEMA, Record, empty_record

SHORT_S = 60.0
"""`auto`: a process of less than this is its own trial, and two more would cost as much again."""
WHOLE = ("prepare_data", "evaluate_all")
"""Stages without batches: nothing of them can be left out."""


def halves(stages: Sequence[str]) -> tuple[Kind, ...]:
    """The processes a trial of these measured stages takes; none where no stage has batches."""
    if set(stages) <= set(WHOLE):
        return ()
    if any(stage.endswith("_fit") for stage in stages):
        return ("preflight_fit", "preflight_load")
    return ("preflight_load",)


def left_out(
    matrix: Matrix, cells: Sequence[Cell], process_s: Mapping[str, float]
) -> dict[str, str]:
    """Cell key -> why it has no trial; `process_s`: seconds of a process in earlier runs."""
    if not halves(matrix.stages):
        return {cell.key: "no measured stage has batches" for cell in cells}
    if matrix.preflight == "never":
        return {cell.key: "preflight: never" for cell in cells}
    if matrix.preflight == "always":
        return {}
    short = f"under {SHORT_S:g} s for each process in earlier runs"
    return {cell.key: short for cell in cells if process_s.get(cell.key, SHORT_S) < SHORT_S}


def lines(
    matrix: Matrix, cells: Sequence[Cell], due: Sequence[Cell], reasons: Mapping[str, str]
) -> Iterator[str]:
    """What the plan says: the trials to come, and the cells without one by number and reason."""
    number = len(halves(matrix.stages))
    if due:
        yield (
            f"preflight: {number} short process{'es' if number > 1 else ''} for each of {len(due)} "
            f"cells, at most {matrix.preflight_timeout_s:g} s for each cell"
        )
    numbers = {cell.key: place for place, cell in enumerate(cells, start=1)}
    without = [(reason, numbers[key]) for key, reason in reasons.items() if key in numbers]
    for reason, places in groupby(sorted(without), key=lambda pair: pair[0]):
        yield f"no preflight for {' '.join(str(place) for _, place in places)}: {reason}"


def blocked(outcome: Outcome, matrix: Matrix, identity: Record) -> list[Record]:
    """Rows of a cell whose trial failed: the stage it died in has the status, the others wait.

    `identity` is that of repeat 0: no repeat of this cell is started.
    """
    (dead,) = stage_records(outcome, identity)
    reason = f"preflight: {outcome.reason}"
    if outcome.status == "timeout":
        reason += f" (preflight_timeout_s: {matrix.preflight_timeout_s:g} s for all of it)"
    # Endless compiling keeps its own name, wherever it is met first.
    is_compile = outcome.status == "timeout" and outcome.phase == COMPILE
    phase = COMPILE if is_compile else "preflight"
    waiting = f"preflight failed: {outcome.status} in {outcome.stage}"
    head: Record = {"schema": SCHEMA} | identity
    return [
        dead | {"phase": phase, "reason": reason},
        *(
            head | empty_record(stage, "skipped", waiting)
            for stage in matrix.stages
            if stage != outcome.stage
        ),
    ]

"""Did a cell do the baseline's work? As many rows in every stage, no time moved out of the stages.

A cell that leaves rows out, or does its work where no stage is timed, is fast for a reason that is
none.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.judging.figures import TOTAL
from bench.judging.intervals import MIN_BLOCKS, mean_interval
from bench.matrix import Cell

Record = Mapping[str, Any]
MOVED_SHARE = 0.05
"""Of the baseline's measured seconds; less than that lies in how fast files happen to load."""


def skipped_rows(
    cells: Sequence[Cell], ok: Sequence[Record], stages: Sequence[str]
) -> dict[tuple[str, str], str]:
    """(cell, stage or total) -> how its count of rows differs from the baseline's, for stages that
    only score: their work is fixed by the data, so nothing is faster that leaves some of it out.

    A fit may rightly see other rows (it stops early, `train.max_steps` counts other batches); that
    is a second difference, see `bench.proving.differences`.
    """
    found: dict[tuple[str, str], str] = {}
    for stage in (stage for stage in stages if not stage.endswith("_fit")):
        here = [record for record in ok if record["stage"] == stage]
        theirs = counted_rows(here, cells[0])
        for cell in cells[1:]:
            mine = counted_rows(here, cell)
            odd = {block for block in mine.keys() & theirs.keys() if mine[block] != theirs[block]}
            if odd:
                block = min(odd)
                text = f"{stage}: {mine[block]} rows, the baseline {theirs[block]}"
                found[cell.name, stage] = text
                found.setdefault((cell.name, TOTAL), text)
    return found


def counted_rows(records: Sequence[Record], cell: Cell) -> dict[int, int]:
    """Block -> rows that a cell worked on, where they were counted."""
    own = [record for record in records if record["key"] == cell.key]
    counts = {record["block"]: (record.get("counts") or {}).get("rows") for record in own}
    return {block: rows for block, rows in counts.items() if rows is not None}


def moved_outside(cell: Cell, baseline: Cell, ok: Sequence[Record]) -> str:
    """What a cell's processes spend outside their measured stages beyond the baseline's, where it
    is surely above a share of the measured seconds; empty where it is not. Paired by block.
    """
    mine, theirs = outside_seconds(ok, cell), outside_seconds(ok, baseline)
    pairs = [mine[block] - theirs[block] for block in mine.keys() & theirs.keys()]
    if len(pairs) < MIN_BLOCKS:
        return ""
    inside = statistics.fmean(measured_seconds(ok, baseline).values())
    mean, low, _ = mean_interval(pairs)
    if low <= 0 or mean < MOVED_SHARE * inside:
        return ""
    return f"{mean:.3g} s more outside the measured stages, which no figure here holds"


def measured_seconds(ok: Sequence[Record], cell: Cell) -> dict[int, float]:
    """Block -> seconds of all measured stages of a cell's process."""
    found: dict[int, list[float]] = {}
    for record in (record for record in ok if record["key"] == cell.key):
        found.setdefault(record["block"], []).append(record["wall_s"])
    return {block: math.fsum(walls) for block, walls in found.items()}


def outside_seconds(ok: Sequence[Record], cell: Cell) -> dict[int, float]:
    """Block -> seconds of a cell's process beside its measured stages, where they were clocked."""
    whole = {r["block"]: r.get("process_wall_s") for r in ok if r["key"] == cell.key}
    inside = measured_seconds(ok, cell)
    return {block: wall - inside[block] for block, wall in whole.items() if wall is not None}

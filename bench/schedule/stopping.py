"""Between two blocks: who takes part in the next one, and which cells are hopelessly slow."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.matrix import Cell, Matrix
from bench.schedule.attempts import judged

BLOCKS_BEFORE_STOPPING = 2
"""One value has no spread."""


@dataclass(frozen=True)
class Turn:
    """One block to come."""

    members: tuple[Cell, ...]
    """In the order of the matrix; empty = no such block."""
    too_slow: Mapping[str, str] = field(default_factory=dict)
    """Cell key -> why it is not measured from this block on."""


def turn(
    matrix: Matrix, cells: Sequence[Cell], past: Sequence[Mapping[str, Any]], block: int
) -> Turn:
    """What follows from the records of the blocks before, whenever it is asked.

    The first `repeats` blocks have all cells, later ones the baseline and each cell with a
    comparison that is undecided and that the blocks left could decide, at the present estimate.
    """
    if block > matrix.most_repeats:
        return Turn(())
    before = judged([record for record in past if record["block"] < block])
    if block <= matrix.repeats and not may_stop(matrix, block):
        return Turn(tuple(cells))
    from bench.judging.comparisons import (
        compare,  # numpy and scipy.special: not before they are needed
    )

    found = compare(matrix, cells, before)
    if block <= matrix.repeats:
        slow = too_slow(matrix, cells, found)
        return Turn(tuple(cell for cell in cells if cell.key not in slow), slow)
    left = matrix.most_repeats - block + 1
    open_cells = {
        row.cell
        for rows in found.tables.values()
        for row in rows
        if row.call == "undecided" and row.ratio is not None and row.needs and row.needs <= left
    }
    chosen = [cell for cell in cells[1:] if cell.name in open_cells]
    if any(record["block"] > block for record in past):
        # A block of the past: who sat it out has no pair there, and its hour is gone.
        took_part = {record["key"] for record in past if record["block"] == block}
        chosen = [cell for cell in cells[1:] if cell.key in took_part]
    return Turn((cells[0], *chosen) if chosen else ())


def may_stop(matrix: Matrix, block: int) -> bool:
    """Whether cells may be given up before this block."""
    return matrix.too_slow is not None and block > BLOCKS_BEFORE_STOPPING


def too_slow(matrix: Matrix, cells: Sequence[Cell], found: Any) -> dict[str, str]:
    """Cells whose whole interval on the total is `too_slow` times above that of the best cell.

    Plain 95 % intervals of both: this saves time, it claims nothing but the bound it prints.
    """
    from bench.judging.figures import TOTAL
    from bench.judging.intervals import ALPHA

    assert matrix.too_slow is not None
    rows = {row.cell: row for row in found.tables[TOTAL]}
    bounds = {
        cell: (effect.mean - effect.half_width(ALPHA), effect.mean + effect.half_width(ALPHA))
        for (cell, stage), effect in found.effects.items()
        if stage == TOTAL and effect.blocks >= BLOCKS_BEFORE_STOPPING
    }
    sound = {cell: high for cell, (_, high) in bounds.items() if counts(rows[cell])}
    best = min(sound, key=lambda cell: sound[cell], default=cells[0].name)
    best_high = min(0.0, sound.get(best, 0.0))
    name = best if best_high < 0 else cells[0].name
    return {
        cell.key: f"stopped early: at least {math.exp(low - best_high):.1f} times the time of "
        f"{name} after {rows[cell.name].repeats} repeats"
        for cell in cells[1:]
        if (low := bounds.get(cell.name, (-math.inf, 0.0))[0]) - best_high
        >= math.log(matrix.too_slow)
    }


def counts(row: Any) -> bool:
    """Whether a cell may set the mark for the others."""
    return row.in_effect is True and row.call not in ("worse quality", "skipped")

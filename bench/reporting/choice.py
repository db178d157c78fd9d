"""How the best cell was chosen, in sentences: the objective, the limit, who was turned down."""

from collections.abc import Sequence

from bench.judging.best import memory_source, too_large
from bench.judging.figures import TOTAL
from bench.judging.judgement import Judgement
from bench.matrix import Matrix
from bench.reporting.pareto import FRONT, Point
from bench.reporting.strings import Words
from bench.reporting.tables import SOURCES, code, gib

STANDINGS = {
    "above": "turned_down.above",
    "failed": "turned_down.failed",
    "undecided": "turned_down.undecided",
    "unproven": "turned_down.unproven",
    "worse quality": "turned_down.quality",
    "same": "turned_down.same",
    "skipped": "turned_down.skipped",
}
"""Why a cell with a better estimate is no choice -> its sentence."""


def chosen_by(
    matrix: Matrix, judgement: Judgement, found: Sequence[Point], say: Words
) -> list[str]:
    """One sentence each for the objective, the limit, the front, and every cell turned down."""
    said = [say(f"objective.{matrix.objective}")]
    if matrix.max_memory_gib is not None:
        said.append(limit(matrix, judgement, say))
    front = [point for point in found if point.place == FRONT]
    if len(front) > 1:
        cells = [
            say("front.cell", cell=code(p.cell), ratio=f"{p.ratio:.3f}", peak=f"{p.peak_gib:.2f}")
            for p in sorted(front, key=lambda point: point.ratio)
        ]
        said.append(say("front", cells=say("joint").join(cells)))
    return said + [
        say("turned_down", cell=code(cell), why=say(STANDINGS[standing]))
        for cell, standing in judgement.best.turned_down.items()
        if standing in STANDINGS
    ]


def limit(matrix: Matrix, judgement: Judgement, say: Words) -> str:
    """The memory limit and the cells above it."""
    rows = judgement.tables[TOTAL]
    source = memory_source(rows)
    asked = f"{matrix.max_memory_gib:g}"
    if source is None:
        return say("limit.unknown", limit=asked)
    above = [row for row in rows if too_large(row, source, matrix.max_memory_gib)]
    cells = [say("limit.cell", cell=code(row.cell), peak=gib(row.memory[source])) for row in above]
    if not cells:
        return say("limit.none", limit=asked, source=say(SOURCES[source]))
    return say("limit", limit=asked, source=say(SOURCES[source]), cells=say("joint").join(cells))

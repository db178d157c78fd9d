"""Judges a finished matrix: its comparisons, the drift of its baseline, warnings, the best cell."""

from typing import Any

from bench.judging import best, findings
from bench.judging.comparisons import compare
from bench.judging.figures import TOTAL
from bench.judging.judgement import Judgement
from bench.matrix import Cell, Matrix
from bench.schedule.attempts import judged


def judge(matrix: Matrix, cells: list[Cell], records: list[dict[str, Any]]) -> Judgement:
    """Calls for every cell and stage, proofs, quality, drift, warnings and the best cell."""
    kept = judged(records)
    found = compare(matrix, cells, kept)
    on_one_machine = len({record.get("node") for record in kept if record["repeat"]}) < 2
    trends = findings.trends(
        {
            stage: {
                block: f.seconds for (key, block), f in by_process.items() if key == cells[0].key
            }
            for stage, by_process in found.figures.items()
            if on_one_machine
        }
    )
    return Judgement(
        tables=found.tables,
        comparisons=len(found.effects),
        best=best.choose(
            matrix, cells, kept, found.figures[TOTAL], found.tables[TOTAL], found.unmeasured
        ),
        proofs=found.proofs,
        quality=found.quality,
        controls=found.controls,
        trends=trends,
        unmeasured=found.unmeasured,
        warnings=findings.warnings(
            matrix, cells, kept, found.tables, found.quality, trends, found.unmeasured
        ),
    )

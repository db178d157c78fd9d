"""What compiling cost and what it gave, for each compiled cell and stage of a report."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.judging.figures import Record
from bench.judging.judgement import Judgement
from bench.matrix import Cell, settings_key
from bench.reporting.strings import Words
from bench.reporting.tables import figure, named, table

HEAD = (
    "cell",
    "stage",
    "mode",
    "compile_s",
    "cache",
    "graphs",
    "breaks",
    "recompiles",
    "step_ms",
    "eager_ms",
    "break_even",
    "steps_here",
)
"""Columns, by their keys in the table of strings."""


def compile_table(
    judgement: Judgement,
    cells: Sequence[Cell],
    ok: Sequence[Record],
    stages: Sequence[str],
    say: Words,
) -> str:
    """One row for each cell and stage with a graph or a mode; empty where nobody compiled.

    Seconds are the median over repeats, counts those of the first; break-even steps = compile
    seconds / (eager - compiled step seconds), against the cell that differs in nothing else.
    """
    eager = {cell.name: eager_twin(cell, cells) for cell in cells}
    lines = []
    for cell in cells:
        for stage in stages:
            own = [r for r in ok if r["key"] == cell.key and r["stage"] == stage]
            seen = [r["facts"]["compile"] for r in own if (r.get("facts") or {}).get("compile")]
            if any(one.get("mode") != "off" or one.get("graphs") for one in seen):
                step_s = step_seconds(judgement, cell.name, stage)
                eager_s = step_seconds(judgement, eager[cell.name], stage)
                ran = statistics.median(
                    (r.get("counts") or {}).get("micro_batches", 0) for r in own
                )
                gained = gains(seen, step_s, eager_s, int(ran), say)
                lines.append([named(cell.name), stage, *costs(seen, say), *gained])
    return table([say(f"head.{name}") for name in HEAD], lines) if lines else ""


def eager_twin(cell: Cell, cells: Sequence[Cell]) -> str | None:
    """The cell that differs from this one in nothing but compilation, which it leaves off."""
    train = cell.settings.train.model_copy(update={"compile": "off"})
    key = settings_key(cell.settings.model_copy(update={"train": train}))
    return next((other.name for other in cells if other.key == key and other is not cell), None)


def step_seconds(judgement: Judgement, cell: str | None, stage: str) -> float | None:
    """Judged seconds of a typical micro-batch, None where the stage has no such figure."""
    rows = judgement.tables.get(stage, [])
    return next((row.step_s for row in rows if row.cell == cell), None)


def break_reasons(ok: Sequence[Record]) -> dict[str, list[str]]:
    """Why graphs broke -> the cells in which they did."""
    found: dict[str, dict[str, None]] = {}
    for record in ok:
        seen = (record.get("facts") or {}).get("compile") or {}
        for reason in seen.get("break_reasons") or []:
            found.setdefault(reason, {})[record["cell"]] = None
    return {reason: list(cells) for reason, cells in found.items()}


def costs(seen: Sequence[Mapping[str, Any]], say: Words) -> list[str]:
    """Mode, seconds, cache, graphs, breaks, recompiles."""
    first = seen[0]
    caches = dict.fromkeys(str(one["cache"]) for one in seen if one.get("cache"))
    recompiles = str(first.get("recompiles") or 0)
    if any(one.get("limit_reached") for one in seen):
        recompiles += say("compile.limit")
    return [
        str(first.get("mode")),
        figure(compile_seconds(seen)),
        ", ".join(caches) or "–",
        str(first.get("graphs") or 0),
        str(first.get("breaks") or 0),
        recompiles,
    ]


def compile_seconds(seen: Sequence[Mapping[str, Any]]) -> float:
    """Median over repeats."""
    return float(statistics.median(one.get("seconds") or 0.0 for one in seen))


def gains(
    seen: Sequence[Mapping[str, Any]],
    step_s: float | None,
    eager_s: float | None,
    ran: int,
    say: Words,
) -> list[str]:
    """Compiled and eager step in milliseconds, the steps that pay for compiling, the steps run."""
    steps = [figure(None if s is None else 1000 * s) for s in (step_s, eager_s)]
    if step_s is None or eager_s is None:
        return [*steps, "–", str(ran)]
    saved = eager_s - step_s
    needed = say("compile.never") if saved <= 0 else str(math.ceil(compile_seconds(seen) / saved))
    return [*steps, needed, str(ran)]

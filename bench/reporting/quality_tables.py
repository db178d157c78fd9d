"""The quality of a report: metrics of every cell against the baseline, and what bounds them."""

import math
from collections.abc import Iterable, Sequence

from bench.judging.control import Control
from bench.judging.figures import Record
from bench.judging.quality import Quality
from bench.reporting.strings import Words
from bench.reporting.tables import figure, named, signed, table


def quality_tables(rows: Sequence[Quality], say: Words) -> list[tuple[str, str]]:
    """(stage, table) for each stage with a quality: metrics, differences with intervals, guard."""
    stages = dict.fromkeys(row.stage for row in rows)
    return [
        (stage, quality_table([row for row in rows if row.stage == stage], say)) for stage in stages
    ]


def quality_table(rows: Sequence[Quality], say: Words) -> str:
    """One line for each cell of a stage."""
    by_cell: dict[str, dict[str, Quality]] = {}
    for row in rows:
        by_cell.setdefault(row.cell, {})[row.metric] = row
    metrics = list(dict.fromkeys(row.metric for row in rows))
    head = [say("head.cell"), say("head.guard")]
    for metric in metrics:
        head += [say.foreign(metric), say("head.difference")]
    lines = []
    for cell, found in by_cell.items():
        line = [named(cell), guard([q.call for q in found.values()], say)]
        for metric in metrics:
            line += quality_cells(found.get(metric), say)
        lines.append(line)
    return table(head, lines)


def guard(calls: Sequence[str], say: Words) -> str:
    """The worst call of a cell's metrics in words."""
    worst = next((c for c in ("worse", "missing", "open", "not worse") if c in calls), None)
    return say(f"guard.{worst.replace(' ', '_')}") if worst else "–"


def quality_cells(row: Quality | None, say: Words) -> list[str]:
    """Value and difference of one metric."""
    if row is None:
        return ["–", "–"]
    if row.difference is None or row.low is None:
        return ["–" if math.isnan(row.value) else f"{row.value:.4f}", "–"]
    known = math.isfinite(row.low)
    bounds = f"<br>({signed(row.low)}{say('to')}{signed(row.high)})" if known else ""
    return [f"{row.value:.4f}", f"{signed(row.difference)}{bounds}"]


def control_notes(found: Sequence[Control], say: Words) -> list[str]:
    """By how much the baseline's own repeats differ: nothing smaller says anything of a cell."""
    return [
        say("control.equal", stage=one.stage, metric=say.foreign(one.metric), repeats=one.repeats)
        if one.identical
        else say(
            "control.spread",
            stage=one.stage,
            metric=say.foreign(one.metric),
            repeats=one.repeats,
            spread=figure(one.spread),
        )
        for one in found
    ]


def chance(ok: Iterable[Record], say: Words) -> str:
    """recall@10 of a random ranking, where the number of ranked items was counted."""
    items = next((r["counts"]["items"] for r in ok if (r.get("counts") or {}).get("items")), None)
    if items is None:
        return ""
    return say("chance", recall=f"{min(10 / items, 1):.4f}", items=items)

"""The section of a report on one stage: its table, what belongs beside it, its loss curves."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.judging.figures import TOTAL, Record
from bench.judging.findings import Doubts
from bench.judging.judgement import BASELINE, Judgement, Verdict
from bench.matrix import Cell
from bench.reporting.headline import doubt_of
from bench.reporting.ledger import explanations
from bench.reporting.strings import Words
from bench.reporting.tables import code, stage_table


def stage_section(
    rows: Sequence[Verdict],
    judgement: Judgement,
    cells: Sequence[Cell],
    ok: Sequence[Record],
    doubts: Mapping[str, Doubts],
    say: Words,
) -> dict[str, Any]:
    """What the template shows of one stage; rows in reading order."""
    stage = rows[0].stage
    trains = stage == "teacher_fit"
    said = {row.cell: doubt for row in rows if (doubt := doubt_of(row, doubts, say))}
    notes = [note for note in [updates_note(cells, ok, say)] if trains and note]
    return {
        "name": stage,
        "title": say("stage.total") if stage == TOTAL else stage,
        "unit": rows[0].unit,
        "table": stage_table(rows, said, effective_batches(cells) if trains else {}, say),
        "drift": next((t for t in judgement.trends if t.stage == stage), None),
        "notes": notes + stage_notes(rows, say) + explanations(rows, cells, ok, say),
    }


def loss_curves(judgement: Judgement, ok: Iterable[Record], stage: str) -> dict[str, list[float]]:
    """Cell -> loss trace of its first repeat, for cells that ran what was asked, baseline first."""
    shown = [
        row.cell for row in judgement.tables[stage] if row.repeats and row.in_effect is not False
    ]
    first: dict[str, Record] = {}
    for record in ok:
        if record["stage"] == stage and record.get("losses"):
            known = first.get(record["cell"], record)
            first[record["cell"]] = min(known, record, key=lambda one: one["block"])
    return {cell: first[cell]["losses"] for cell in shown if cell in first}


def stage_notes(rows: Sequence[Verdict], say: Words) -> list[str]:
    """What the undecided cells of a stage could have shown, and the cells without figures."""
    notes = [
        say("stage.sees", cell=code(row.cell), percent=f"{100 * row.smallest:.1f}")
        if row.smallest < 1
        else say("stage.sees_little", cell=code(row.cell))
        for row in rows
        if row.call == "undecided" and row.smallest
    ]
    absent = [f"{code(row.cell)} ({row.call})" for row in rows if not row.repeats]
    if absent and rows[0].stage != TOTAL:
        notes.append(say("stage.absent", cells=say("joint").join(absent)))
    return notes


def effective_batches(cells: Sequence[Cell]) -> dict[str, str]:
    """Cell -> rows for one optimizer step, as batch × accumulation; empty where cells agree."""
    trains = {cell.name: cell.settings.train for cell in cells}
    sizes = {name: (t.batch_size, t.accumulate_grad_batches) for name, t in trains.items()}
    if len(set(sizes.values())) < 2:
        return {}
    return {name: f"{batch} × {n} = {batch * n}" for name, (batch, n) in sizes.items()}


def updates_note(cells: Sequence[Cell], ok: Iterable[Record], say: Words) -> str:
    """How many optimizer steps the cells did, where they differ: not the same training."""
    if not effective_batches(cells):
        return ""
    done: dict[str, int] = {}
    for record in ok:
        steps = (record.get("counts") or {}).get("optimizer_steps")
        if record["stage"] == "teacher_fit" and steps:
            done[record["cell"]] = steps
    common = done.get(BASELINE)
    others = [
        say("updates.of", count=n, cell=code(cell))
        for cell, n in done.items()
        if common and n != common
    ]
    return say("updates", count=common, others=say("joint").join(others)) if others else ""

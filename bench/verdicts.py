"""Judges a finished matrix: proof, quality, statistics, in this order; picks the best cell."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench import findings, proofs, quality
from bench.figures import TOTAL, Figure, Process, Record, peaks, stage_figures
from bench.intervals import ALPHA, Effect, decide, holm_levels, paired
from bench.judgement import BASELINE, Best, CellProof, Judgement, Unmeasured, Verdict
from bench.matrix import Cell, Matrix
from bench.quality import Quality

NO_RECORD = "the run ended before it"


def axis_names(matrix: Matrix, cells: Sequence[Cell]) -> list[str]:
    """Dotted settings to prove: the axes, and whatever any cell changes beside them."""
    return list(dict.fromkeys([*matrix.axes, *(name for cell in cells for name in cell.changed)]))


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted leaves."""
    leaves: dict[str, Any] = {}
    for name, value in settings.items():
        path = f"{prefix}{name}"
        leaves.update(flat(value, path + ".") if isinstance(value, dict) else {path: value})
    return leaves


def prove_all(matrix: Matrix, cells: Sequence[Cell], records: Sequence[Record]) -> list[CellProof]:
    """Every axis of every cell at the cell's own value, in every measured stage it acts in."""
    axes = axis_names(matrix, cells)
    rows = []
    for cell in cells:
        settings = cell.settings.model_dump(mode="json")
        leaves = flat(settings)
        requested = {axis: leaves[axis] for axis in axes if axis in leaves}
        own = [r for r in records if r["key"] == cell.key and r["stage"] in matrix.stages]
        found = proofs.check(requested, own, settings)
        rows += [CellProof(**vars(row), cell=cell.name) for row in found]
    return rows


def standing(
    cell: Cell, baseline: Cell, rows: Sequence[CellProof], stage: str
) -> tuple[bool | None, str]:
    """Whether a cell may be compared in a stage: True, False (not in effect), None (unproven); why.

    Both sides must run what was asked wherever they differ, and the cell must run its other axes
    too. An unknown proof of a setting that both sides share changes nothing between them.
    """
    here = [row for row in rows if stage in (row.stage, TOTAL)]
    own = [row for row in here if row.cell == cell.name]
    shared = [row for row in here if row.cell == BASELINE and row.setting in cell.changed]
    for row in [*own, *shared]:
        if row.holds is False:
            return False, f"{described(row)}: wanted {row.requested}, saw {row.observed}"
    if cell is baseline:
        return (True if any(row.holds for row in own) or not own else None), ""
    for row in [*own, *shared]:
        if row.holds is None and row.setting in cell.changed:
            return None, f"{described(row)}: {row.observed}"
    proven = {row.setting for row in own}
    if silent := [name for name in acting(cell, stage) if name not in proven]:
        return None, f"{silent[0]}: acts in none of the measured stages"
    return True, ""


def described(row: CellProof) -> str:
    """Which setting of which cell a proof row speaks of."""
    return f"{row.setting} of the baseline" if row.cell == BASELINE else row.setting


def judge(matrix: Matrix, cells: list[Cell], records: list[dict[str, Any]]) -> Judgement:
    """Calls for every cell and stage, proofs, quality, drift, warnings and the best cell."""
    stages = list(matrix.stages)
    figures = stage_figures(records, stages)
    proven = prove_all(matrix, cells, records)
    qualities = judge_quality(cells, records, stages)
    unmeasured = failures(cells, records, stages)
    tables = {
        stage: [
            measured(cell, stage, figures[stage], records, unmeasured)
            for cell in cells
            if cell is cells[0] or acting(cell, stage)
        ]
        for stage in [*stages, TOTAL]
    }
    by_name = {cell.name: cell for cell in cells}
    for rows in tables.values():
        for i, row in enumerate(rows):
            if row.repeats:
                holds, why = standing(by_name[row.cell], cells[0], proven, row.stage)
                rows[i] = replace(row, in_effect=holds, reason=why)
    effects = effects_of(tables, by_name, figures)
    p_values = [effect.p_value for effect in effects.values()]
    levels = dict(zip(effects, holm_levels(p_values), strict=True))
    for stage, rows in tables.items():
        tables[stage] = [
            called(
                row,
                effects.get((row.cell, stage)),
                levels.get((row.cell, stage), ALPHA),
                matrix.floor,
                qualities,
            )
            for row in rows
        ]
    trends = findings.trends(
        {
            stage: {
                block: f.seconds for (key, block), f in by_process.items() if key == cells[0].key
            }
            for stage, by_process in figures.items()
        }
    )
    return Judgement(
        tables=tables,
        comparisons=len(effects),
        best=best_cell(tables[TOTAL], unmeasured),
        proofs=proven,
        quality=qualities,
        trends=trends,
        unmeasured=unmeasured,
        warnings=findings.warnings(matrix, cells, records, tables, qualities, trends, unmeasured),
    )


def acting(cell: Cell, stage: str) -> list[str]:
    """The changed settings of a cell that act in a stage; all of them in the total."""
    return [name for name in cell.changed if stage == TOTAL or proofs.acts_in(name, stage)]


def effects_of(
    tables: Mapping[str, Sequence[Verdict]],
    cells: Mapping[str, Cell],
    figures: Mapping[str, Mapping[Process, Figure]],
) -> dict[tuple[str, str], Effect]:
    """(cell, stage) -> paired effect of every comparison that may be made at all."""
    effects = {}
    for stage, rows in tables.items():
        baseline = cells[rows[0].cell].key
        for row in rows[1:]:
            key = cells[row.cell].key
            pairs = [
                (figure.seconds, figures[stage][baseline, block].seconds)
                for (own, block), figure in figures[stage].items()
                if own == key and (baseline, block) in figures[stage]
            ]
            if pairs and row.in_effect is not False:
                ours, theirs = zip(*pairs, strict=True)
                effects[row.cell, stage] = paired(ours, theirs)
    return effects


def measured(
    cell: Cell,
    stage: str,
    figures: Mapping[Process, Figure],
    records: Sequence[Record],
    unmeasured: Sequence[Unmeasured],
) -> Verdict:
    """A row with a cell's own figures, its call still open; or its status where it has none."""
    own = [figure for (key, _), figure in figures.items() if key == cell.key]
    if not own:
        lost = [row for row in unmeasured if row.cell == cell.name]
        first = min(lost, key=lambda row: row.stage != stage, default=None)
        if first is None:
            return Verdict(cell.name, stage, "skipped", NO_RECORD)
        where = "" if first.stage == stage else f"in {first.stage}: "
        return Verdict(cell.name, stage, first.status, where + first.reason)
    samples = [figure.samples for figure in own if figure.samples is not None]
    ok = [r for r in records if r["key"] == cell.key and r["status"] == "ok"]
    return Verdict(
        cell.name,
        stage,
        "",
        repeats=len(own),
        unit="step" if samples else "wall",
        figure=statistics.median(figure.seconds for figure in own),
        samples=statistics.median(samples) if samples else None,
        memory=peaks([r for r in ok if stage in (r["stage"], TOTAL)]),
    )


def called(
    row: Verdict,
    effect: Effect | None,
    level: float,
    floor: float,
    qualities: Sequence[Quality],
) -> Verdict:
    """The row with its call, in the order: proof, quality, number of blocks, interval."""
    if not row.repeats:
        return row
    if effect is not None:
        row = replace(row, ratio=math.exp(effect.mean))
        if effect.blocks > 1:
            width = effect.half_width(level)
            row = replace(
                row,
                low=math.exp(effect.mean - width),
                high=math.exp(effect.mean + width),
                smallest=math.expm1(effect.smallest_seen(level)),
            )
    worse = [q for q in qualities if q.cell == row.cell and q.call == "worse"]
    if row.in_effect is False:
        return replace(row, call="not in effect")
    if row.cell == BASELINE:
        return replace(row, call="baseline")
    if row.in_effect is None:
        return replace(row, call="unproven")
    if worse:
        lost = ", ".join(f"{q.metric} {q.difference:+.4f} in {q.stage}" for q in worse)
        return replace(row, call="worse quality", reason=lost)
    call, needs = decide(effect or Effect(0.0, 0.0, 0), floor, level)
    return replace(row, call=call, needs=needs)


def judge_quality(
    cells: Sequence[Cell], records: Sequence[Record], stages: Sequence[str]
) -> list[Quality]:
    """Quality of every cell against the baseline in every stage that has any."""
    rows = []
    measured_records = [r for r in records if r["status"] == "ok"]
    ranking = {r["stage"] for r in measured_records if r.get("ranks")}
    # Losses say little beside rankings, so they stand alone only where nothing is ranked.
    for stage in [s for s in stages if s in ranking or not ranking]:
        ok = [r for r in measured_records if r["stage"] == stage]
        theirs = [r for r in ok if r["key"] == cells[0].key]
        for cell in cells:
            ours = [r for r in ok if r["key"] == cell.key]
            rows += quality.compare(cell.name, stage, ours, theirs if cell is not cells[0] else [])
    return rows


def failures(
    cells: Sequence[Cell], records: Sequence[Record], stages: Sequence[str]
) -> list[Unmeasured]:
    """Repeats that did not end `ok`, equal ones counted together; cells without any record."""
    names = {cell.key: cell.name for cell in cells}
    counts = Counter(
        (r["key"], r["stage"], r["status"], str(r.get("reason") or ""))
        for r in records
        if r["status"] != "ok" and r["key"] in names
    )
    found = [
        Unmeasured(names[key], stage, status, reason, n)
        for (key, stage, status, reason), n in counts.items()
    ]
    seen = {record["key"] for record in records}
    absent = [cell.name for cell in cells if cell.key not in seen]
    return found + [Unmeasured(n, s, "skipped", NO_RECORD, 0) for n in absent for s in stages]


def best_cell(rows: Sequence[Verdict], unmeasured: Sequence[Unmeasured]) -> Best:
    """The fastest cell called `faster` on the whole; otherwise the baseline, with the reason.

    A cell that failed even once is no choice: the next run may be the one that fails.
    """
    unsafe = {lost.cell for lost in unmeasured}
    faster = [row for row in rows if row.call == "faster" and row.ratio is not None]
    safe = [row for row in faster if row.cell not in unsafe]
    if safe:
        first = min(safe, key=lambda row: row.ratio or math.inf)
        cells = "the only cell" if len(safe) == 1 else f"the fastest of {len(safe)} cells"
        return Best(first.cell, False, f"{cells} proven faster on the whole, no failed repeat")
    others = Counter(
        "faster but with failed repeats" if row in faster else row.call
        for row in rows
        if row.cell != BASELINE
    )
    if not others:
        return Best(BASELINE, True, "the matrix holds no other cell")
    words = ", ".join(f"{n} {call}" for call, n in others.most_common())
    return Best(BASELINE, True, f"no other cell was proven faster on the whole ({words})")

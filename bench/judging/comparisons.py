"""Every cell against the baseline in every stage: figures, proofs, quality, effects, calls.

Light enough to be asked between two blocks of a run, whether another one is worth its time.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench import proofs
from bench.judging import quality
from bench.judging.control import Control, controls, floors
from bench.judging.figures import TOTAL, Figure, Process, Record, peaks, stage_figures
from bench.judging.intervals import ALPHA, Effect, Looks, decide, holm_levels, paired
from bench.judging.judgement import BASELINE, CellProof, Unmeasured, Verdict
from bench.judging.quality import Quality
from bench.judging.work import skipped_rows
from bench.matrix import Cell, Matrix
from bench.schedule.attempts import TOO_SLOW

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


@dataclass(frozen=True)
class Compared:
    """All that the statistics say of a matrix."""

    figures: Mapping[str, Mapping[Process, Figure]]
    """Measured stage or `total` -> process -> judged figure."""
    tables: dict[str, list[Verdict]]
    """Measured stage or `total` -> rows, the baseline first, cells that cannot differ left out."""
    effects: Mapping[tuple[str, str], Effect]
    """(cell, stage) -> paired effect of every comparison made."""
    proofs: list[CellProof]
    quality: list[Quality]
    controls: list[Control]
    unmeasured: list[Unmeasured]


def compare(matrix: Matrix, cells: Sequence[Cell], records: Sequence[Record]) -> Compared:
    """Proof, quality, statistics, in this order, for every cell and stage.

    `records`: one attempt of each repeat, see bench.schedule.attempts.
    """
    stages = list(matrix.stages)
    figures = stage_figures(records, stages)
    proven = prove_all(matrix, cells, records)
    control = controls(
        [r for r in records if r["key"] == cells[0].key and r["status"] == "ok"], stages
    )
    qualities = judge_quality(cells, records, stages, control)
    unmeasured = failures(cells, records, stages)
    tables = {
        stage: [
            measured(cell, cells[0], stage, figures[stage], records, unmeasured)
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
    looks = Looks(matrix.repeats, matrix.most_repeats)
    levels = levels_of(effects, looks)
    given_up = {r["key"]: str(r["reason"]) for r in records if r.get("stopped_by") == TOO_SLOW}
    skipped = skipped_rows(cells, [r for r in records if r["status"] == "ok"], stages)
    for stage, rows in tables.items():
        tables[stage] = [
            called(
                row,
                effects.get((row.cell, stage)),
                levels.get((row.cell, stage), ALPHA),
                looks,
                matrix.floor,
                qualities,
                skipped.get((row.cell, stage), ""),
                given_up.get(by_name[row.cell].key, ""),
            )
            for row in rows
        ]
    return Compared(figures, tables, effects, proven, qualities, control, unmeasured)


def levels_of(
    effects: Mapping[tuple[str, str], Effect], looks: Looks
) -> dict[tuple[str, str], float]:
    """Holm's level of each comparison, of which its present look has a share.

    A p value counts as the share of its look makes it: p / share ≤ level is what is asked.
    """
    spent = [effect.p_value / looks.share(effect.blocks) for effect in effects.values()]
    return dict(zip(effects, holm_levels(spent), strict=True))


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
    baseline: Cell,
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
    ok = [r for r in records if r["status"] == "ok" and stage in (r["stage"], TOTAL)]
    blocks = {block for key, block in figures if key == cell.key}
    tagged = {r["block"] for r in ok if r.get("tags") and r["key"] in (cell.key, baseline.key)}
    return Verdict(
        cell.name,
        stage,
        "",
        repeats=len(own),
        unit="step" if samples else "wall",
        figure=statistics.median(figure.seconds for figure in own),
        samples=statistics.median(samples) if samples else None,
        memory=peaks([r for r in ok if r["key"] == cell.key]),
        disturbed=len(blocks & tagged),
        unsteady=sum(not figure.steady for figure in own),
    )


def called(
    row: Verdict,
    effect: Effect | None,
    level: float,
    looks: Looks,
    floor: float,
    qualities: Sequence[Quality],
    skipped: str,
    given_up: str,
) -> Verdict:
    """The row with its call, in the order: proof, quality, work, number of blocks, interval."""
    if not row.repeats:
        return row
    if effect is not None:
        row = replace(row, ratio=math.exp(effect.mean))
        if effect.blocks > 1:
            at = level * looks.share(effect.blocks)
            width = effect.half_width(at)
            row = replace(
                row,
                low=math.exp(effect.mean - width),
                high=math.exp(effect.mean + width),
                smallest=math.expm1(effect.smallest_seen(at)),
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
    if other_work := skipped or unguarded(row.cell, qualities):
        return replace(row, call="unproven", reason=other_work)
    call, needs = decide(effect or Effect(0.0, 0.0, 0), floor, level, looks)
    if call == "undecided" and given_up:
        return replace(row, call="skipped", reason=given_up)
    return replace(row, call=call, needs=needs)


def unguarded(cell: str, qualities: Sequence[Quality]) -> str:
    """Why nothing guards the quality of a cell although one side of the pair was measured."""
    for gap in (q for q in qualities if q.cell == cell and q.call == "missing"):
        place = (BASELINE, gap.stage, gap.metric)
        users = [q.count for q in qualities if (q.cell, q.stage, q.metric) == place]
        theirs = f"the baseline's of {users[0]}" if users and users[0] else "the baseline's of none"
        return f"{gap.stage}: {gap.metric} of {gap.count or 'none'}, {theirs}: not comparable"
    return ""


def judge_quality(
    cells: Sequence[Cell],
    records: Sequence[Record],
    stages: Sequence[str],
    control: Sequence[Control],
) -> list[Quality]:
    """Quality of every cell against the baseline in every stage that has any."""
    rows = []
    measured_records = [r for r in records if r["status"] == "ok"]
    ranking = {r["stage"] for r in measured_records if r.get("ranks")}
    for stage in stages:
        ok = [r for r in measured_records if r["stage"] == stage]
        theirs = [r for r in ok if r["key"] == cells[0].key]
        floor = floors(control, stage)
        for cell in cells:
            ours = [r for r in ok if r["key"] == cell.key]
            others = theirs if cell is not cells[0] else []
            least = floor.get(quality.TRAINING_LOSS, 0.0)
            rows += quality.compare_training(cell.name, stage, ours, others, least)
            # Losses of a test say little beside rankings: only where nothing is ranked.
            if stage in ranking or not ranking:
                rows += quality.compare(cell.name, stage, ours, others, floor)
    return rows


def failures(
    cells: Sequence[Cell], records: Sequence[Record], stages: Sequence[str]
) -> list[Unmeasured]:
    """Repeats that did not end `ok`, equal ones counted together; cells without any record."""
    names = {cell.key: cell.name for cell in cells}
    counts = Counter(
        (r["key"], r["stage"], ending(r), str(r.get("reason") or ""))
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


def ending(record: Record) -> str:
    """The status as printed; a timeout names the phase that took too long."""
    phase = record.get("phase")
    return f"timeout({phase})" if record["status"] == "timeout" and phase else record["status"]

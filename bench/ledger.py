"""Where the time of each stage went: phases that add up to the wall, and what could shorten it."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.figures import Record
from bench.judgement import BASELINE, Judgement
from bench.tables import figure, table

TINY_SHARE = 0.005
"""Phases below this share of every stage are added up in one row."""


def ledgers(
    judgement: Judgement, ok: Sequence[Record], stages: Sequence[str]
) -> list[dict[str, Any]]:
    """The time ledger of the baseline and of the best cell: table and one sentence a stage."""
    found = []
    for cell in dict.fromkeys([BASELINE, judgement.best.cell]):
        own = [record for record in ok if record["cell"] == cell]
        by_stage = {s: rows for s in stages if (rows := [r for r in own if r["stage"] == s])}
        if by_stage:
            sentences = [bottleneck(stage, rows) for stage, rows in by_stage.items()]
            sentences += outside_stages(own)
            found.append({"cell": cell, "table": ledger(by_stage), "sentences": sentences})
    return found


def outside_stages(own: Sequence[Record]) -> list[str]:
    """What a whole process took beside its measured stages: no timer of a stage sees that."""
    whole = {r["repeat"]: r["process_wall_s"] for r in own if r.get("process_wall_s")}
    if not whole:
        return []
    inside = mean(sum(r["wall_s"] for r in own if r["repeat"] == repeat) for repeat in whole)
    process = mean(whole.values())
    return [
        f"A whole process took {figure(process)} s, of which {figure(process - inside)} s "
        f"({100 * (process - inside) / process:.0f} %) outside the measured stages: interpreter, "
        "imports, tear-down. No ratio above contains them."
    ]


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; sums of phases stay sums."""
    return statistics.fmean(values)


def mean_phases(records: Sequence[Record]) -> dict[str, float]:
    """Mean seconds of each phase over repeats, unnamed time last; they add up to the mean wall."""
    names = dict.fromkeys(name for r in records for name in r.get("phases") or {})
    phases = {n: mean((r.get("phases") or {}).get(n, 0.0) for r in records) for n in names}
    unnamed = phases.pop("unaccounted", 0.0)
    gap = mean(r["wall_s"] for r in records) - sum(phases.values()) - unnamed
    return phases | {"unaccounted": unnamed + max(gap, 0.0)}


def ledger(by_stage: Mapping[str, Sequence[Record]]) -> str:
    """Rows: phases; columns: stages; seconds and share of the stage's wall, means over repeats."""
    walls = {stage: mean(r["wall_s"] for r in rows) for stage, rows in by_stage.items()}
    phases = {stage: mean_phases(rows) for stage, rows in by_stage.items()}
    names = list(dict.fromkeys(name for found in phases.values() for name in found))
    named = [name for name in names if name != "unaccounted"]
    short = [
        name
        for name in named
        if all(phases[s].get(name, 0.0) < TINY_SHARE * walls[s] for s in walls)
    ]
    if len(short) < 2:
        short = []
    lines = [
        [name, *(spent(phases[s].get(name), walls[s]) for s in walls)]
        for name in named
        if name not in short
    ]
    if short:
        sums = {s: sum(phases[s].get(name, 0.0) for name in short) for s in walls}
        lines.append([f"{len(short)} short phases", *(spent(sums[s], walls[s]) for s in walls)])
    lines.append(["unaccounted", *(spent(phases[s]["unaccounted"], walls[s]) for s in walls)])
    lines.append(["**wall**", *(f"{figure(wall)} s" for wall in walls.values())])
    together = sum(walls.values())
    lines.append(["share of all stages", *(f"{100 * w / together:.0f} %" for w in walls.values())])
    rows = {
        s: mean((r.get("counts") or {}).get("rows", 0) for r in found)
        for s, found in by_stage.items()
    }
    lines.append(["rows", *(f"{n:.0f}" if n else "–" for n in rows.values())])
    lines.append(
        ["ms a row", *(figure(1000 * walls[s] / n) if n else "–" for s, n in rows.items())]
    )
    return table(["phase", *walls], lines)


def spent(seconds: float | None, wall: float) -> str:
    """Seconds of a phase with its share of the wall, or a dash."""
    if seconds is None or wall <= 0:
        return "–"
    return f"{seconds:.2f} s ({100 * seconds / wall:.1f} %)"


def bottleneck(stage: str, records: Sequence[Record]) -> str:
    """What a faster stage would have to shorten, and the most that loader workers could gain."""
    phases, wall = mean_phases(records), mean(r["wall_s"] for r in records)
    name, seconds = max(phases.items(), key=lambda item: item[1])
    said = f"{stage}: the largest phase is {name} ({100 * seconds / wall:.0f} % of the wall)"
    waits = [r["loader_wait_s"] for r in records if r.get("loader_wait_s") is not None]
    if waits:
        share = 100 * mean(waits) / wall
        said += f"; data wait is {share:.1f} %: loader workers can gain no more than that"
    return said + "."

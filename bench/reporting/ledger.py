"""Where the time of each stage went: phases that add up to the wall, and what could shorten it."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.judging.figures import Record
from bench.judging.judgement import BASELINE, Judgement, Verdict
from bench.matrix import Cell
from bench.profile.bottleneck import WORTH_WORKERS, sentence, shares
from bench.profile.profiles import Profile
from bench.reporting.strings import Words
from bench.reporting.tables import figure, plain, table

TINY_SHARE = 0.005
"""Phases below this share of every stage are added up in one row."""


def ledgers(
    judgement: Judgement,
    ok: Sequence[Record],
    stages: Sequence[str],
    profiles: Sequence[Profile],
    say: Words,
) -> list[dict[str, Any]]:
    """The time ledger of the baseline and of the best cell: table and one sentence a stage."""
    found = []
    for cell in dict.fromkeys([BASELINE, judgement.best.cell]):
        own = [record for record in ok if record["cell"] == cell]
        by_stage = {s: rows for s in stages if (rows := [r for r in own if r["stage"] == s])}
        if by_stage:
            looked = {s["stage"]: s for one in profiles if one.cell == cell for s in one.stages}
            sentences = [
                sentence(shares(stage, rows, looked.get(stage))) for stage, rows in by_stage.items()
            ]
            said = [told(one, say) for one in sentences if one]
            said += outside_stages(own, say)
            found.append({"cell": cell, "table": ledger(by_stage, say), "sentences": said})
    return found


def told(sentence: str, say: Words) -> str:
    """What holds the time of a stage, part by part."""
    stage, _, parts = sentence.removesuffix(".").partition(": ")
    return plain(say("ledger.holds", stage=stage, parts=say.listed(parts)))


def outside_stages(own: Sequence[Record], say: Words) -> list[str]:
    """What a whole process took beside its measured stages: no timer of a stage sees that."""
    known = {r["repeat"]: r for r in own if r.get("process_wall_s")}
    if not known:
        return []
    inside = mean(sum(r["wall_s"] for r in own if r["repeat"] == repeat) for repeat in known)
    process = mean(record["process_wall_s"] for record in known.values())
    said = say(
        "ledger.outside",
        process=figure(process),
        outside=figure(process - inside),
        percent=f"{100 * (process - inside) / process:.0f}",
    )
    phases = [record.get("process_phases") or {} for record in known.values()]
    if not all(phases):
        return [said]
    named = {name: mean(found.get(name, 0.0) for found in phases) for name in phases[0]}
    parts = say("joint").join(f"{name} {figure(seconds)} s" for name, seconds in named.items())
    return [said, say("ledger.process", parts=parts)]


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


def ledger(by_stage: Mapping[str, Sequence[Record]], say: Words) -> str:
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
        label = say("ledger.short", count=len(short))
        lines.append([label, *(spent(sums[s], walls[s]) for s in walls)])
    lines.append(["unaccounted", *(spent(phases[s]["unaccounted"], walls[s]) for s in walls)])
    lines.append([say("ledger.wall"), *(f"{figure(wall)} s" for wall in walls.values())])
    together = sum(walls.values())
    lines.append([say("ledger.share"), *(f"{100 * w / together:.0f} %" for w in walls.values())])
    rows = {
        s: mean((r.get("counts") or {}).get("rows", 0) for r in found)
        for s, found in by_stage.items()
    }
    lines.append([say("ledger.rows"), *(f"{n:.0f}" if n else "–" for n in rows.values())])
    lines.append(
        [
            say("ledger.ms_row"),
            *(figure(1000 * walls[s] / n) if n else "–" for s, n in rows.items()),
        ]
    )
    return table([say("head.phase"), *walls], lines)


OPEN_CALLS = ("same", "undecided", "slower", "unproven")


def explanations(
    rows: Sequence[Verdict], cells: Sequence[Cell], ok: Sequence[Record], say: Words
) -> list[str]:
    """Why loader workers could or could not help in a stage, where calls ask for it."""
    stage = rows[0].stage
    share = waiting(stage, ok)
    if share is None:
        return []
    swept = {cell.name for cell in cells if "train.num_workers" in cell.changed}
    open_rows = [row for row in rows if row.call in OPEN_CALLS]
    percent = f"{100 * share:.1f}"
    if share < WORTH_WORKERS:
        tried = any(row.cell in swept for row in open_rows)
        return [say("loader.idle", percent=percent)] if tried else []
    return [say("loader.wait", percent=percent)] if open_rows else []


def waiting(stage: str, ok: Sequence[Record]) -> float | None:
    """Share of the baseline's step time in a stage that went by waiting for data."""
    own = [r for r in ok if r["cell"] == BASELINE and r["stage"] == stage and r.get("steps")]
    known = [r for r in own if r.get("loader_wait_s") is not None]
    stepping = sum(step["seconds"] for r in known for step in r["steps"])
    if not stepping:
        return None
    return float(min(1.0, sum(r["loader_wait_s"] for r in known) / stepping))


def spent(seconds: float | None, wall: float) -> str:
    """Seconds of a phase with its share of the wall, or a dash."""
    if seconds is None or wall <= 0:
        return "–"
    return f"{seconds:.2f} s ({100 * seconds / wall:.1f} %)"

"""Warnings on how a run went: disturbed repeats, steps that never settled, repeats left out."""

from collections import Counter
from collections.abc import Iterable, Sequence

from bench.judging.figures import Record
from bench.judging.judgement import Finding, Verdict
from bench.schedule.attempts import BUDGET


def conduct(rows: Iterable[Verdict], records: Sequence[Record]) -> list[Finding]:
    """All of them; `records`: one attempt of each repeat."""
    return [*disturbed(records), *moved(records), *unsettled(rows), *left_out(records)]


def disturbed(records: Sequence[Record]) -> list[Finding]:
    """What disturbed the judged repeats, and how many were measured again."""
    ok = [record for record in records if record["status"] == "ok"]
    causes: dict[tuple[str, int], set[str]] = {}
    for record in ok:
        if tags := record.get("tags"):
            causes.setdefault(process(record), set()).update(t.partition(":")[0] for t in tags)
    again = {
        process(record) for record in ok if record.get("attempt") and not record.get("moved_from")
    }
    if not causes and not again:
        return []
    counts = Counter(cause for found in causes.values() for cause in found)
    measured = {process(record) for record in ok}
    text = f"repeats judged although disturbed: {len(causes)} of {len(measured)}"
    if counts:
        text += f" ({', '.join(f'{cause} {n}' for cause, n in sorted(counts.items()))})"
    if again:
        text += f"; measured again for that reason: {len(again)}"
    advice = "no figure was discarded for it; records.jsonl has the tags; quieten the machine"
    return [Finding(text, advice if causes else "")]


def moved(records: Sequence[Record]) -> list[Finding]:
    """Blocks that were begun on one node of a cluster and measured on another."""
    blocks = {r["block"]: r["moved_from"] for r in records if r.get("moved_from")}
    if not blocks:
        return []
    nodes = ", ".join(sorted(set(blocks.values())))
    text = f"blocks begun anew because a node was lost: {len(blocks)} ({nodes})"
    return [Finding(text, "nothing, unless the same cell was running each time")]


def process(record: Record) -> tuple[str, int]:
    """The repeat a record belongs to."""
    return record["key"], record["repeat"]


def unsettled(rows: Iterable[Verdict]) -> list[Finding]:
    """Stages of cells whose steps never became steady."""
    return [
        Finding(
            f"{row.cell}: the steps of {row.stage} never became steady in {row.unsteady} of "
            f"{row.repeats} repeats; all but the fewest warm-up steps were judged",
            "more rows or steps, so that warming up ends before the stage does",
        )
        for row in rows
        if row.unsteady
    ]


def left_out(records: Sequence[Record]) -> list[Finding]:
    """Repeats for which a budget had no room."""
    rows = [record for record in records if record.get("stopped_by") == BUDGET]
    repeats = {process(record) for record in rows}
    if not repeats:
        return []
    reasons = "; ".join(dict.fromkeys(str(record["reason"]) for record in rows))
    text = f"repeats left out for want of budget: {len(repeats)} ({reasons})"
    return [Finding(text, "`--resume` with a larger `--budget` measures them")]

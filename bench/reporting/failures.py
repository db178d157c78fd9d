"""What gave no figures: a table of reasons; for each failure its log and what is known of it."""

import re
from collections.abc import Sequence
from typing import Any

from bench.checkup import rules
from bench.judging.comparisons import ending
from bench.judging.figures import Record
from bench.judging.judgement import Unmeasured
from bench.reporting.strings import Words
from bench.reporting.tables import LONGEST_TEXT, code, named, plain, table

TAIL_LINES = 6
LINE_WIDTH = 160
MOST_RULES = 2
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e\x85\xa0-\uffff]")
# A report travels; the folders of the machine it was made on do not.
FOLDERS = re.compile(r"(?<![\w.:/])/(?:[\w.@+-]+/)+")


def unmeasured_table(rows: Sequence[Unmeasured], say: Words) -> str:
    """Cells or repeats without figures, stages of one reason together; empty if none."""
    merged: dict[tuple[str, str, str, int], list[str]] = {}
    for row in rows:
        merged.setdefault((row.cell, row.status, row.reason, row.repeats), []).append(row.stage)
    lines = [
        [
            named(cell),
            status,
            ", ".join(stages),
            str(n) if n else "–",
            plain(say.quoted(reason, LONGEST_TEXT)),
        ]
        for (cell, status, reason, n), stages in merged.items()
    ]
    head = [say(f"head.{name}") for name in ("cell", "status", "where", "repeats", "reason")]
    return table(head, lines) if lines else ""


def failures(
    rows: Sequence[Unmeasured], records: Sequence[Record], say: Words
) -> list[dict[str, Any]]:
    """Every kind of failure: what it was, the end of a log, and the rules that know it.

    Cells that were never started count where a rule knows their reason. A rule is told in full
    once; what a cell's later rows would only repeat is left out. A reason that the table cuts is
    told here in full.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    told: set[str] = set()
    told_of: set[tuple[str, str]] = set()
    for row in rows:
        key = (row.cell, row.status, row.reason)
        tail = log_tail(row, records)
        known = rules.matching("\n".join([row.status, row.reason, *tail]))[:MOST_RULES]
        new = [rule for rule in known if (row.cell, rule.id) not in told_of]
        long = row.reason if len(row.reason) > LONGEST_TEXT else ""
        if key in found or not (tail or new or long):
            continue
        found[key] = {
            "what": say(
                "failure.in", cell=code(row.cell), status=plain(row.status), stage=row.stage
            ),
            "reason": plain(say.quoted(long)),
            "tail": [shown(line) for line in tail if line.strip()][-TAIL_LINES:],
            "rules": [advice(rule, rule.id in told, say) for rule in new],
        }
        told |= {rule.id for rule in new}
        told_of |= {(row.cell, rule.id) for rule in new}
    return list(found.values())


def advice(rule: rules.Rule, is_told: bool, say: Words) -> str:
    """What is known of a failure, or that it stands above already."""
    if is_told:
        return say("rule.again", id=rule.id)
    return say(
        "rule",
        id=rule.id,
        cause=say.foreign(rule.cause),
        remedy=say.foreign(rule.remedy),
        command=code(rule.proof_command),
    )


def log_tail(row: Unmeasured, records: Sequence[Record]) -> Sequence[str]:
    """Last lines of the first log of these repeats that says anything."""
    return next(
        (
            record["log_tail"]
            for record in records
            if record.get("log_tail") and same_end(record, row)
        ),
        (),
    )


def same_end(record: Record, row: Unmeasured) -> bool:
    """Whether a record is one of the repeats a row counts."""
    ended = (record["cell"], ending(record), str(record.get("reason") or ""))
    return ended == (row.cell, row.status, row.reason)


def shown(line: str) -> str:
    """A line of a log without colours, control characters and folders, cut to a width."""
    clean = FOLDERS.sub("…/", ESCAPES.sub("", line)).rstrip()
    return clean if len(clean) <= LINE_WIDTH else clean[: LINE_WIDTH - 1] + "…"

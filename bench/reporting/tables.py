"""The Markdown tables of a report, and how names, foreign text and numbers are written in them."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from tabulate import tabulate

from bench.judging.figures import TOTAL, Record
from bench.judging.judgement import BASELINE, Verdict
from bench.reporting.strings import Words

GIB = 2**30
SOURCES = {
    "host_peak_bytes": "memory.host",
    "torch_allocated_peak_bytes": "memory.allocated",
    "torch_reserved_peak_bytes": "memory.reserved",
    "device_peak_bytes": "memory.device",
}
"""Memory columns: process tree on the host, torch's allocator twice, the whole device."""
WIDEST = 100
"""Ratios beyond this are printed as such."""
LONGEST_NAME, LONGEST_TEXT = 46, 160
"""Letters of a line in a table cell: of a matrix cell's name, of prose."""


def plain(text: object) -> str:
    """Foreign text made harmless for Markdown, on one line."""
    line = " ".join(str(text).split())
    line = re.sub(r"([\\`*\[\]<>|])", r"\\\1", line)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)


def code(text: object) -> str:
    """A name as Markdown code that survives inside a table."""
    line = " ".join(str(text).split()).replace("`", "'")
    return "`" + re.sub(r"\\*\|", r"\\|", line) + "`"


def named(cell: str) -> str:
    """A matrix cell's name for a table; long ones one setting to a line."""
    parts = cell.split(", ") if len(cell) > LONGEST_NAME else [cell]
    return ",<br>".join(map(code, parts))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column left, figures right; the cells are already safe."""
    body = [list(row) for row in rows]
    align = [
        "right" if all(is_figure(row[i]) for row in body) else "left" for i in range(len(head))
    ]
    align[0] = "left"
    return str(tabulate(body, head, tablefmt="pipe", disable_numparse=True, colalign=align))


def is_figure(text: str) -> bool:
    """Whether a cell holds numbers or nothing, for alignment."""
    return re.fullmatch(r"[\d\s.+()%>–-]*", re.sub(r" to |～| s\b| 秒", " ", text)) is not None


def signed(value: float | None, digits: int = 4) -> str:
    """A difference with its sign, or a dash."""
    return "–" if value is None or math.isinf(value) else f"{value:+.{digits}f}"


def interval(low: float | None, high: float | None, to: str = " to ") -> str:
    """Bounds of a ratio, or a dash."""
    if low is None or high is None:
        return "–"
    if high > WIDEST:  # two or three noisy repeats: the digits would say nothing
        return f"{low:.3f}{to}> {WIDEST}"
    return f"{low:.3f}{to}{high:.3f}"


def figure(value: float | None) -> str:
    """Three significant digits without an exponent, or a dash."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    digits = max(2 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{digits}f}"


def gib(value: int | None) -> str:
    """Bytes as GiB (1024³), or a dash."""
    return "–" if value is None else f"{value / GIB:.2f}"


def in_reading_order(tables: Mapping[str, list[Verdict]]) -> list[tuple[str, list[Verdict]]]:
    """The total first: it decides. Rows: baseline, then the fastest, then those without a ratio."""
    return [(stage, ranked(tables[stage])) for stage in [TOTAL, *(s for s in tables if s != TOTAL)]]


def ranked(rows: Iterable[Verdict]) -> list[Verdict]:
    """Baseline, compared cells by ratio, cells without one in the order of the matrix."""
    return sorted(rows, key=lambda row: (row.cell != BASELINE, row.ratio or math.inf))


def charted(rows: Iterable[Verdict]) -> list[Verdict]:
    """Rows of a chart: measured cells only, ranked."""
    return [row for row in ranked(rows) if row.repeats or row.cell == BASELINE]


def stage_table(
    rows: Sequence[Verdict], doubts: Mapping[str, str], updates: Mapping[str, str], say: Words
) -> str:
    """One row for each cell; memory sources that nobody could read have no column.

    `doubts`: cell -> what a reader must add to its verdict; `updates`: cell -> rows of one
    optimizer step, empty where cells agree in them. Of cells without figures only the table of the
    total has rows, beside a single stage they are named in a sentence.
    """
    shown = [row for row in rows if row.repeats or row.stage == TOTAL]
    sources = [s for s in SOURCES if any(s in row.memory for row in rows)]
    stepping = any(row.unit == "step" for row in rows)
    head = ["cell", *(["step_ms", "samples_s"] if stepping else ["seconds"]), "ratio", "interval"]
    head += ["update"] if updates else []
    titles = [say(f"head.{name}") for name in head]
    titles += [say("head.gib", source=say(SOURCES[source])) for source in sources]
    titles += [say("head.verdict"), say("head.effect")]
    lines = []
    for row in shown:
        figures = [*times(row, stepping), *compared(row, say)]
        figures += [updates[row.cell]] if updates else []
        figures += [gib(row.memory.get(source)) for source in sources]
        said = verdict(row, doubts.get(row.cell), say)
        lines.append([named(row.cell), *figures, said, effect(row, say)])
    return table(titles, lines)


def times(row: Verdict, stepping: bool) -> list[str]:
    """Milliseconds of a step and samples a second, or seconds."""
    if not stepping:
        return [figure(row.figure)]
    return [figure(None if row.step_s is None else 1000 * row.step_s), figure(row.samples_per_s)]


def compared(row: Verdict, say: Words) -> list[str]:
    """Ratio and interval."""
    ratio = "–" if row.ratio is None else f"{row.ratio:.3f}"
    return ["1" if row.cell == BASELINE else ratio, interval(row.low, row.high, say("to"))]


def call(row: Verdict, say: Words) -> str:
    """The call as printed: a word of the vocabulary, which is the same in every language."""
    if row.call != "undecided":
        return row.call
    return say("undecided", needs=row.needs or say("undecided.many"))


def verdict(row: Verdict, doubt: str | None, say: Words) -> str:
    """The call, and what is doubtful about the comparison."""
    said, doubts = call(row, say), [doubt] if doubt and row.repeats else []
    if row.disturbed:
        doubts.append(say("doubt.disturbed", count=row.disturbed, all=row.repeats))
    return say("doubtful", call=said, doubt=say("joint").join(doubts)) if doubts else said


def effect(row: Verdict, say: Words) -> str:
    """Whether the settings were seen at work."""
    known = {True: "effect.yes", False: "effect.no", None: "effect.unknown"}
    return say(known[row.in_effect]) if row.repeats else "–"


def memory_notes(ok: Iterable[Record], say: Words) -> list[str]:
    """Why a memory source could not be read, once for each reason."""
    reasons: dict[tuple[str, str], None] = {}
    for record in ok:
        for source, label in SOURCES.items():
            value = (record.get("memory") or {}).get(source)
            if isinstance(value, dict):
                reasons[label, str(value.get("unavailable", "no reason given"))] = None
    return [
        say("memory.unavailable", source=say(label), reason=plain(say.quoted(reason)))
        for label, reason in reasons
    ]

"""The Markdown tables of a report, and how names, foreign text and numbers are written in them."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from tabulate import tabulate

from bench.figures import TOTAL, Record
from bench.judgement import BASELINE, CellProof, Unmeasured, Verdict
from bench.matrix import Cell
from bench.quality import Quality

GIB = 2**30
SOURCES = {
    "host_peak_bytes": "host",
    "torch_allocated_peak_bytes": "torch",
    "device_peak_bytes": "device",
}
"""Memory columns: process tree on the host, torch's allocated peak, the whole device."""


def plain(text: object) -> str:
    """Foreign text made harmless for Markdown, on one line."""
    line = " ".join(str(text).split())
    line = re.sub(r"([\\`*\[\]<>|])", r"\\\1", line)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)


def code(text: object) -> str:
    """A name as Markdown code that survives inside a table."""
    line = " ".join(str(text).split()).replace("`", "'")
    return "`" + re.sub(r"\\*\|", r"\\|", line) + "`"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column left, figures right; the cells are already safe."""
    body = [list(row) for row in rows]
    align = [
        "right" if all(is_figure(row[i]) for row in body) else "left" for i in range(len(head))
    ]
    align[0] = "left"
    return str(tabulate(body, head, tablefmt="pipe", disable_numparse=True, colalign=align))


WIDEST = 100
"""Ratios beyond this are printed as such."""


def is_figure(text: str) -> bool:
    """Whether a cell holds numbers or nothing, for alignment."""
    return re.fullmatch(r"[\d\s.+()%>–-]*", re.sub(r" to | s\b", " ", text)) is not None


def signed(value: float | None, digits: int = 4) -> str:
    """A difference with its sign, or a dash."""
    return "–" if value is None or math.isinf(value) else f"{value:+.{digits}f}"


def interval(low: float | None, high: float | None) -> str:
    """Bounds of a ratio, or a dash."""
    if low is None or high is None:
        return "–"
    if high > WIDEST:  # two or three noisy repeats: the digits would say nothing
        return f"{low:.3f} to > {WIDEST}"
    return f"{low:.3f} to {high:.3f}"


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


def percent(ratio: float) -> str:
    """A time ratio as less or more time."""
    change = 100 * abs(ratio - 1)
    return f"{change:.1f} % {'less' if ratio < 1 else 'more'} time"


def in_reading_order(tables: Mapping[str, list[Verdict]]) -> list[tuple[str, list[Verdict]]]:
    """The total first: it decides. Rows: baseline, then the fastest, then those without a ratio."""
    return [(stage, ranked(tables[stage])) for stage in [TOTAL, *(s for s in tables if s != TOTAL)]]


def ranked(rows: Iterable[Verdict]) -> list[Verdict]:
    """Baseline, compared cells by ratio, cells without one in the order of the matrix."""
    return sorted(rows, key=lambda row: (row.cell != BASELINE, row.ratio or math.inf))


def charted(rows: Iterable[Verdict]) -> list[Verdict]:
    """Rows of a chart: measured cells only, ranked."""
    return [row for row in ranked(rows) if row.repeats or row.cell == BASELINE]


def stage_table(rows: Sequence[Verdict]) -> str:
    """One row for each cell; memory sources that nobody could read have no column."""
    sources = [s for s in SOURCES if any(s in row.memory for row in rows)]
    stepping = rows[0].unit == "step" or any(row.unit == "step" for row in rows)
    head = ["cell", *(["step ms", "samples/s"] if stepping else ["seconds"]), "ratio", "interval"]
    head += [f"{SOURCES[source]} GiB" for source in sources] + ["verdict", "in effect?"]
    return table(head, [stage_row(row, stepping, sources) for row in rows])


def stage_row(row: Verdict, stepping: bool, sources: Sequence[str]) -> list[str]:
    """The printed cells of one verdict."""
    times = [figure(row.figure)]
    if stepping:
        step_ms = None if row.step_s is None else 1000 * row.step_s
        times = [figure(step_ms), figure(row.samples_per_s)]
    ratio = "–" if row.ratio is None else f"{row.ratio:.3f}"
    if row.cell == BASELINE:
        ratio = "1"
    verdict = row.words
    if row.call == "undecided" and row.smallest:
        percent = f"{100 * row.smallest:.1f} % or more"
        seen = percent if row.smallest < 1 else "only more than a doubling"
        verdict += f"; this run sees {seen}"
    effect = {True: "yes", False: "no", None: "unknown"}[row.in_effect] if row.repeats else "–"
    memory = [gib(row.memory.get(source)) for source in sources]
    return [code(row.cell), *times, ratio, interval(row.low, row.high), *memory, verdict, effect]


def effective_batches(cells: Sequence[Cell]) -> str:
    """Rows for one optimizer step, where cells differ in them."""
    sizes: dict[int, list[str]] = {}
    for cell in cells:
        train = cell.settings.train
        sizes.setdefault(train.batch_size * train.accumulate_grad_batches, []).append(cell.name)
    if len(sizes) < 2:
        return ""
    others = [f"{n} for {', '.join(map(code, names))}" for n, names in list(sizes.items())[1:]]
    return f"Rows for one optimizer step: {next(iter(sizes))}, but {'; '.join(others)}."


def memory_notes(ok: Iterable[Record]) -> list[str]:
    """Why a memory source could not be read, once for each reason."""
    reasons: dict[tuple[str, str], None] = {}
    for record in ok:
        for source, label in SOURCES.items():
            value = (record.get("memory") or {}).get(source)
            if isinstance(value, dict):
                reasons[label, str(value.get("unavailable", "no reason given"))] = None
    return [f"{label} memory not available: {plain(reason)}" for label, reason in reasons]


def unmeasured_table(rows: Sequence[Unmeasured]) -> str:
    """Cells or repeats without figures, stages of one reason together; empty if none."""
    merged: dict[tuple[str, str, str, int], list[str]] = {}
    for row in rows:
        merged.setdefault((row.cell, row.status, row.reason, row.repeats), []).append(row.stage)
    head = ["cell", "status", "where", "repeats", "reason"]
    lines = [
        [code(cell), status, ", ".join(stages), str(n) if n else "–", plain(reason)]
        for (cell, status, reason, n), stages in merged.items()
    ]
    return table(head, lines) if lines else ""


def shown_proofs(cells: Sequence[Cell], rows: Iterable[CellProof]) -> list[CellProof]:
    """Proofs worth reading: the baseline's, each cell's own change, and whatever does not hold."""
    changed = {cell.name: cell.changed for cell in cells}
    return [
        row
        for row in rows
        if row.cell == BASELINE or row.setting in changed[row.cell] or row.holds is False
    ]


def proof_table(cells: Sequence[Cell], rows: Sequence[CellProof]) -> str:
    """Setting, cell, requested, observed, holds; stages that say the same share a line."""
    merged: dict[tuple[str, str, str, str, bool | None], list[str]] = {}
    for row in shown_proofs(cells, rows):
        key = (row.setting, row.cell, row.requested, row.observed, row.holds)
        merged.setdefault(key, []).append(row.stage)
    order = {row.setting: i for i, row in reversed(list(enumerate(rows)))}
    words = {True: "holds", False: "**does not hold**", None: "unknown"}
    lines = [
        [code(setting), code(cell), ", ".join(stages), plain(asked), plain(seen), words[holds]]
        for (setting, cell, asked, seen, holds), stages in sorted(
            merged.items(), key=lambda item: order[item[0][0]]
        )
    ]
    head = ["setting", "cell", "stage", "requested", "observed", "proof"]
    return table(head, lines) if lines else ""


def quality_table(rows: Sequence[Quality]) -> str:
    """One line for each cell and stage: metrics, differences with intervals, and the guard."""
    by_cell: dict[tuple[str, str], dict[str, Quality]] = {}
    for row in rows:
        by_cell.setdefault((row.stage, row.cell), {})[row.metric] = row
    metrics = list(dict.fromkeys(row.metric for row in rows))
    head = ["cell", "stage"]
    for metric in metrics:
        head += [metric, "difference (interval)"]
    lines = []
    for (stage, cell), found in by_cell.items():
        line = [code(cell), stage]
        for metric in metrics:
            line += quality_cells(found.get(metric))
        calls = [q.call for q in found.values()]
        worst = next((c for c in ("worse", "open", "not worse") if c in calls), "–")
        lines.append([*line, "loss not excluded" if worst == "open" else worst])
    return table([*head, "guard"], lines) if lines else ""


def quality_cells(row: Quality | None) -> list[str]:
    """Value and difference of one metric."""
    if row is None:
        return ["–", "–"]
    if row.difference is None or row.low is None:
        return [f"{row.value:.4f}", "–"]
    bounds = f" ({signed(row.low)} to {signed(row.high)})" if math.isfinite(row.low) else ""
    return [f"{row.value:.4f}", f"{signed(row.difference)}{bounds}"]


def chance(ok: Iterable[Record]) -> str:
    """recall@10 of a random ranking, where the number of ranked items was counted."""
    items = next((r["counts"]["items"] for r in ok if (r.get("counts") or {}).get("items")), None)
    if items is None:
        return ""
    return f"Chance level: recall@10 {min(10 / items, 1):.4f} among {items} items."

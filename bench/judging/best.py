"""The cell to recommend: least time, memory or both within a limit, as far as that is proven."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.judging.comparisons import levels_of
from bench.judging.figures import TOTAL, Figure, Process, Record
from bench.judging.intervals import Effect, Looks, decide, paired
from bench.judging.judgement import BASELINE, Best, Unmeasured, Verdict
from bench.matrix import Cell, Matrix
from bench.reporting.strings import Message

GIB = 2**30
SOURCES = ("device_peak_bytes", "torch_reserved_peak_bytes", "host_peak_bytes")
"""What memory is compared by: the first of these that every measured cell has."""
COMPARED = ("faster", "slower", "same", "undecided")
"""Calls of cells that run what was asked and are not worse in quality."""
CALLS = {"faster": "better", "slower": "worse"}


@dataclass(frozen=True)
class Evidence:
    """One cell against the baseline in what is to be least: estimate and call."""

    ratio: float
    call: str
    """better, worse, same or undecided."""


def memory_source(rows: Sequence[Verdict]) -> str | None:
    """The best source of memory that all measured cells share; None if there is none."""
    measured = [row for row in rows if row.repeats]
    shared = [s for s in SOURCES if measured and all(row.memory.get(s) for row in measured)]
    return shared[0] if shared else None


def peaks_by_process(records: Sequence[Record], source: str) -> dict[Process, int]:
    """Largest peak of a process over its measured stages, in bytes."""
    peaks: dict[Process, int] = {}
    for record in records:
        value = (record.get("memory") or {}).get(source)
        if record["status"] == "ok" and isinstance(value, int):
            process = (record["key"], record["block"])
            peaks[process] = max(value, peaks.get(process, 0))
    return peaks


def choose(
    matrix: Matrix,
    cells: Sequence[Cell],
    records: Sequence[Record],
    seconds: Mapping[Process, Figure],
    rows: Sequence[Verdict],
    unmeasured: Sequence[Unmeasured],
) -> Best:
    """The best cell for the matrix's objective and limit, or the baseline with the reason.

    `seconds`, `rows`: processes and verdicts of the total. No choice is a cell that is not proven
    better, whose quality is worse, that failed even once (the next run may be the one that fails),
    or that needs more memory than allowed. A baseline above the limit is none either: then the best
    of the cells that fit is taken, provided that its comparison is decided.
    """
    others = [row for row in rows if row.cell != BASELINE]
    if not others:
        return Best(BASELINE, True, Message("best.alone"))
    limited = matrix.max_memory_gib is not None
    source = memory_source(rows)
    if source is None and (limited or matrix.objective != "time"):
        return Best(BASELINE, True, Message("best.no_memory"), refused=limited)
    found = evidence(matrix, cells, records, seconds, others, source)
    unsafe = {lost.cell for lost in unmeasured if lost.status not in ("unsupported", "skipped")}
    above = {row.cell for row in rows if too_large(row, source, matrix.max_memory_gib)}
    verdict = {
        row.cell: standing(row, found.get(row.cell), row.cell in unsafe, row.cell in above)
        for row in others
    }
    turned_down = {
        row.cell: verdict[row.cell]
        for row in others
        if verdict[row.cell] != "better" and looks_better(row, found.get(row.cell), matrix)
    }
    if BASELINE in above:
        return instead_of_baseline(matrix, rows[0], source, found, verdict, turned_down)
    choices = [cell for cell, word in verdict.items() if word == "better"]
    within = within_limit(matrix)
    if not choices:
        tally = Counter(verdict.values())
        why = {"within": within, "tally": counted(tally, matrix.objective)}
        return Best(
            BASELINE, True, Message(f"best.kept.{matrix.objective}", why), turned_down=turned_down
        )
    best = min(choices, key=lambda cell: found[cell].ratio)
    why = {"of": one_of(len(choices), matrix.objective), "within": within}
    return Best(best, False, Message(f"best.won.{matrix.objective}", why), turned_down=turned_down)


def evidence(
    matrix: Matrix,
    cells: Sequence[Cell],
    records: Sequence[Record],
    seconds: Mapping[Process, Figure],
    rows: Sequence[Verdict],
    source: str | None,
) -> dict[str, Evidence]:
    """Cell -> how it compares in what is to be least; cells that may not be compared are absent."""
    compared = [row for row in rows if row.call in COMPARED and row.ratio is not None]
    if matrix.objective == "time":
        return {
            row.cell: Evidence(row.ratio or math.inf, CALLS.get(row.call, row.call))
            for row in compared
        }
    assert source is not None
    values = {p: float(n) for p, n in peaks_by_process(records, source).items() if p in seconds}
    if matrix.objective == "both":
        values = {process: n * seconds[process].seconds for process, n in values.items()}
    keys = {cell.name: cell.key for cell in cells}
    effects: dict[tuple[str, str], Effect] = {}
    for row in compared:
        blocks = [block for key, block in values if key == keys[row.cell]]
        pairs = [
            (values[keys[row.cell], block], values[cells[0].key, block])
            for block in blocks
            if (cells[0].key, block) in values
        ]
        if pairs:
            ours, theirs = zip(*pairs, strict=True)
            effects[row.cell, TOTAL] = paired(ours, theirs)
    looks = Looks(matrix.repeats, matrix.most_repeats)
    levels = levels_of(effects, looks)
    found = {}
    for (cell, stage), effect in effects.items():
        call, _ = decide(effect, matrix.floor, levels[cell, stage], looks)
        found[cell] = Evidence(math.exp(effect.mean), CALLS.get(call, call))
    return found


def too_large(row: Verdict, source: str | None, limit_gib: float | None) -> bool:
    """Whether the largest peak of a cell is above the limit."""
    peak = row.memory.get(source or "")
    return limit_gib is not None and peak is not None and peak > limit_gib * GIB


def standing(row: Verdict, found: Evidence | None, is_unsafe: bool, is_above: bool) -> str:
    """Why a cell is no choice, in a word, or how it compares where nothing forbids it."""
    if found is None:
        return row.call
    if is_above:
        return "above"
    if is_unsafe:
        return "failed"
    return found.call


def looks_better(row: Verdict, found: Evidence | None, matrix: Matrix) -> bool:
    """Whether the bare estimate says better by the floor; of cells not compared, that of time."""
    ratio = found.ratio if found else row.ratio if matrix.objective == "time" else None
    return ratio is not None and ratio <= 1 / (1 + matrix.floor)


def instead_of_baseline(
    matrix: Matrix,
    baseline: Verdict,
    source: str | None,
    found: Mapping[str, Evidence],
    verdict: Mapping[str, str],
    turned_down: Mapping[str, str],
) -> Best:
    """The best cell that fits where the baseline does not, or none: nothing is known to fit."""
    choices = [cell for cell, word in verdict.items() if word in ("better", "same", "worse")]
    peak = f"{baseline.memory[source or ''] / GIB:.2f}"
    why = {"peak": peak, "limit": f"{matrix.max_memory_gib:g}"}
    if not choices:
        tally = counted(Counter(verdict.values()), matrix.objective)
        refusal = Message("best.none_fits", why | {"tally": tally})
        return Best(BASELINE, True, refusal, refused=True, turned_down=turned_down)
    best = min(choices, key=lambda cell: found[cell].ratio)
    fits = Message("best.fits", why | {"of": one_of(len(choices), matrix.objective)})
    left = {cell: word for cell, word in turned_down.items() if cell != best}
    return Best(best, False, fits, turned_down=left)


def one_of(count: int, objective: str) -> Message:
    """ "the only cell" or "the fastest of 3 cells"."""
    if count == 1:
        return Message("best.only")
    return Message(f"best.first_of.{objective}", {"count": count})


def within_limit(matrix: Matrix) -> Message:
    """The limit as part of a sentence."""
    if matrix.max_memory_gib is None:
        return Message("nothing")
    return Message("best.within", {"limit": f"{matrix.max_memory_gib:g}"})


def counted(tally: Mapping[str, int], objective: str) -> list[Message]:
    """How many cells stand how, the most frequent first."""
    ordered = sorted(tally.items(), key=lambda item: -item[1])
    return [Message("tally", {"count": n, "what": word_of(what, objective)}) for what, n in ordered]


def word_of(what: str, objective: str) -> str | Message:
    """A standing as printed: the words of a verdict for time, own ones for other objectives."""
    if what in ("above", "failed"):
        return Message(f"standing.{what}")
    if what in ("better", "worse"):
        return Message(f"standing.{what}.{objective}")
    return what

"""The answer of a report in three lines: what is best, how much and how sure, what to beware of."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.judging.best import memory_source
from bench.judging.comparisons import NO_RECORD
from bench.judging.figures import TOTAL
from bench.judging.findings import Doubts
from bench.judging.intervals import MIN_BLOCKS
from bench.judging.judgement import BASELINE, Judgement, Verdict
from bench.judging.quality import GAINS
from bench.reporting.strings import Words
from bench.reporting.tables import (
    SOURCES,
    call,
    code,
    gib,
    in_reading_order,
    interval,
    plain,
    signed,
    table,
)

MOST_CAVEATS = 3
"""In the headline; all are among the warnings."""


def headline(
    judgement: Judgement,
    doubts: Mapping[str, Doubts],
    cuts: Sequence[str],
    say: Words,
) -> list[str]:
    """Three lines; `cuts`: settings that kept the work small."""
    best = judgement.best
    key = "refuse" if best.refused else "keep" if best.is_baseline else "use"
    why = plain(say.tell(best.why))
    sure = evidence(judgement, say) if best.is_baseline else gain(judgement, say)
    return [
        say(f"headline.{key}", cell=code(best.cell), why=why),
        say("headline.sure", text=sure),
        beware(judgement, doubts, cuts, say),
    ]


def gain(judgement: Judgement, say: Words) -> str:
    """What the best cell gains, takes and leaves as it is."""
    rows = {row.cell: row for row in judgement.tables[TOTAL]}
    row, baseline = rows[judgement.best.cell], rows[BASELINE]
    assert row.ratio is not None
    said = [
        say(
            "gain.time",
            change=change(row.ratio, say, "time"),
            ratio=f"{row.ratio:.3f}",
            interval=interval(row.low, row.high, say("to")),
            repeats=row.repeats,
        )
    ]
    source = memory_source(judgement.tables[TOTAL])
    if source:
        said.append(memory_change(baseline.memory[source], row.memory[source], source, say))
    said += [
        say(
            "gain.open" if q.call == "open" else "gain.not_worse",
            metric=q.metric,
            value=f"{q.value:.4f}",
            difference=signed(q.difference),
        )
        for q in judgement.quality
        if q.cell == row.cell and q.metric == "recall@10" and q.difference is not None
    ]
    return say("sentences.joint").join(said)


def change(ratio: float, say: Words, what: str) -> str:
    """A ratio as so much less or more."""
    word = "less" if ratio < 1 else "more"
    return say(f"change.{word}.{what}", percent=f"{100 * abs(ratio - 1):.1f}")


def memory_change(before: int, after: int, source: str, say: Words) -> str:
    """Peak memory of baseline and best cell, in the source that all cells share."""
    label = say(SOURCES[source])
    if gib(before) == gib(after):
        return say("gain.same_memory", source=label, peak=gib(after))
    less = change(after / before, say, "memory")
    return say("gain.memory", change=less, source=label, before=gib(before), after=gib(after))


def evidence(judgement: Judgement, say: Words) -> str:
    """How much was compared, and what could have been seen, where the baseline stays."""
    rows = [row for row in judgement.tables[TOTAL] if row.repeats >= MIN_BLOCKS]
    seen = [row.smallest for row in rows if row.smallest is not None]
    repeats = max((row.repeats for row in judgement.tables[TOTAL]), default=0)
    if not judgement.comparisons:
        return say("evidence.none")
    said = say("evidence", comparisons=judgement.comparisons, repeats=repeats)
    if not seen:
        return said
    least, most = f"{100 * min(seen):.1f}", f"{100 * max(seen):.1f}"
    could = say("evidence.sees", least=least, most=most)
    if least == most:
        could = say("evidence.sees_one", least=least)
    return say("sentences.joint").join([said, could])


def beware(
    judgement: Judgement, doubts: Mapping[str, Doubts], cuts: Sequence[str], say: Words
) -> str:
    """The gravest doubts in a few words each, those of the best cell first."""
    found = [*own_doubts(judgement, doubts, cuts, say), *others_doubts(judgement, doubts, say)]
    if not found:
        return say("beware.nothing")
    said = say("sentences.joint").join(found[:MOST_CAVEATS])
    return say("beware.more" if len(found) > MOST_CAVEATS else "beware", text=said)


def own_doubts(
    judgement: Judgement, doubts: Mapping[str, Doubts], cuts: Sequence[str], say: Words
) -> list[str]:
    """What weakens the recommendation itself."""
    best = judgement.best
    own = doubts.get(best.cell, Doubts())
    quality = [q for q in judgement.quality if q.cell == best.cell]
    few = max((row.repeats for row in judgement.tables[TOTAL]), default=0)
    ranked = any(q.metric in GAINS for q in judgement.quality)
    said: list[tuple[str, bool, dict[str, Any]]] = [
        ("beware.second", bool(own.second), {}),
        ("beware.silent", bool(own.silent), {}),
        ("beware.quality_open", any(q.call == "open" for q in quality), {}),
        ("beware.quality_unmeasured", bool(few) and not ranked, {}),
        ("beware.cut", bool(cuts), {"cuts": ", ".join(map(code, cuts))}),
        ("beware.few", 0 < few < MIN_BLOCKS, {"repeats": few, "least": MIN_BLOCKS}),
    ]
    return [say(key, **values) for key, is_so, values in said if is_so]


def others_doubts(judgement: Judgement, doubts: Mapping[str, Doubts], say: Words) -> list[str]:
    """What weakens the comparison with the others, counted."""
    best = judgement.best
    total = judgement.tables[TOTAL]
    rows = [row for stage_rows in judgement.tables.values() for row in stage_rows]
    absent = judgement.unmeasured
    lost = {row.cell for row in absent if row.status not in ("unsupported", "skipped")}
    cut_short = {row.cell for row in absent if row.reason == NO_RECORD}
    undecided = sum(row.call == "undecided" for row in rows)
    unclean = {row.cell for row in total if row.cell != best.cell and doubt_of(row, doubts, say)}
    idle = {row.cell for row in rows if row.call == "not in effect"}
    said: list[tuple[str, int, dict[str, Any]]] = [
        ("beware.not_in_effect", len(idle), {}),
        ("beware.failed", len(lost), {}),
        ("beware.interrupted", len(cut_short), {}),
        ("beware.undecided", undecided, {"comparisons": judgement.comparisons}),
        ("beware.unclean", len(unclean), {}),
    ]
    return [say(key, count=count, **values) for key, count, values in said if count]


def doubt_of(row: Verdict, doubts: Mapping[str, Doubts], say: Words) -> str:
    """What a reader must add to a row's verdict, in a few words; empty where nothing."""
    if row.ratio is None or row.cell not in doubts:
        return ""

    def here(found: Mapping[str, list[str]]) -> bool:
        return any(row.stage in (TOTAL, *stages) for stages in found.values())

    own = doubts[row.cell]
    known = [("doubt.second", here(own.second)), ("doubt.silent", here(own.silent))]
    return say("joint").join(say(key) for key, is_so in known if is_so)


def summary_table(judgement: Judgement, say: Words) -> str:
    """For each stage: how the best cell does there, and which cell is fastest there."""
    rows = []
    for stage, table_rows in in_reading_order(judgement.tables):
        own = next((row for row in table_rows if row.cell == judgement.best.cell), None)
        first = next((row for row in table_rows if row.call == "faster"), None)
        fastest = say("summary.none") if first is None else say("summary.same")
        if first is not None and first is not own:
            fastest = f"{code(first.cell)} {in_words(first, say)}"
        idle = say("summary.idle")
        rows.append([stage, idle if own is None else in_words(own, say), fastest])
    return table([say(f"head.{name}") for name in ("stage", "best", "fastest")], rows)


def in_words(row: Verdict, say: Words) -> str:
    """Ratio, interval and call in one cell."""
    if row.ratio is None:
        return call(row, say)
    return f"{row.ratio:.3f} ({interval(row.low, row.high, say('to'))}) {call(row, say)}"

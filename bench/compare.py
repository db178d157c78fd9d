"""Two runs against each other: `python -m bench.compare A B`, with an exit status for CI.

Exit status: 0 compared and no rule broken · 1 a rule of --fail-on is broken, or something that A
measured has no figure in B · 2 bad input · 3 not comparable, unless --across says so.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from bench.comparing import comparability
from bench.comparing.comparability import find_run, read_side
from bench.comparing.two_runs import Comparison, Row, compare
from bench.judging.intervals import decide
from bench.reporting.tables import code, figure, interval, plain, signed, table
from core.config import InputError, did_you_mean

What = Literal["slower", "memory", "quality"]
SOURCES = {
    "host_peak_bytes": "host",
    "torch_allocated_peak_bytes": "torch allocated",
    "torch_reserved_peak_bytes": "torch reserved",
    "device_peak_bytes": "device",
}
GIB = 2**30
NOT_COMPARABLE = 3
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Rule:
    """One `--fail-on`: what must not happen, and from which ratio - 1 on (None: the floor)."""

    what: What
    threshold: float | None = None


@app.command()
def main(
    a: Annotated[str, typer.Argument(metavar="A", help="Run folder, run id or commit: before.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same: after.")],
    across: Annotated[
        list[str],
        typer.Option(metavar="FIELD", help="Let this differ: a field of the key, a setting, all."),
    ] = [],  # noqa: B006 (typer reads the default, nothing changes it)
    fail_on: Annotated[
        list[str],
        typer.Option(metavar="RULE", help="slower, slower:5%, memory:+3% or quality: exit 1."),
    ] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("reports"),
) -> None:
    """Compare run B with run A cell by cell and stage by stage; the tables are Markdown."""
    try:
        rules = [parse_rule(text) for text in fail_on]
        before, after = (read_side(find_run(word, out)) for word in (a, b))
        found = compare(before, after, across)
    except InputError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    broken = [*lost(found), *(text for rule in rules for text in violations(found, rule))]
    print("\n".join(lines(found, broken)))
    raise typer.Exit(NOT_COMPARABLE if found.forbidden else int(bool(broken)))


def parse_rule(text: str) -> Rule:
    """`slower`, `slower:5%`, `memory:+3%`, `quality` as a rule. Raises InputError."""
    name, colon, number = text.partition(":")
    found = re.fullmatch(r"\+?(\d+(?:\.\d+)?) ?%", number)
    known = get_args(What)
    if name not in known or bool(colon) != bool(found) or (name == "quality" and colon):
        raise InputError(
            f"--fail-on {text}: no such rule{did_you_mean(name, known)}; "
            "slower, slower:5%, memory, memory:+3% or quality"
        )
    return Rule(name, float(found[1]) / 100 if found else None)  # type: ignore[arg-type]


def lost(found: Comparison) -> list[str]:
    """A guarded thing that is gone fails whatever was asked: it would pass in silence for ever."""
    return [f"gone: {cell}, {stage}: {why}" for cell, stage, why in found.vanished]


def violations(found: Comparison, rule: Rule) -> list[str]:
    """How the comparison breaks a rule, one sentence each."""
    threshold = found.floor if rule.threshold is None else rule.threshold
    if rule.what == "slower":
        return [
            f"slower: {row.cell}, {row.stage}: {math.exp(row.effect.mean):.3f} ({_bounds(row)})"
            for row in found.rows
            if row.call != "not in effect"
            and decide(row.effect, threshold, row.level)[0] == "slower"
        ]
    if rule.what == "memory":
        return [
            f"memory: {cell}, {stage}, {SOURCES[source]}: {ours / theirs - 1:+.1%}"
            for (cell, stage, source), (theirs, ours) in found.memory.items()
            if ours > theirs * (1 + threshold)
        ]
    return [
        f"quality: {one.cell}, {one.stage}, {one.metric}: "
        + (signed(one.difference) if one.call == "worse" else "not comparable")
        for one in found.quality
        if one.call in ("worse", "missing")
    ]


def lines(found: Comparison, broken: Sequence[str]) -> Iterator[str]:
    """The comparison as Markdown."""
    for label, side in (("A", found.before), ("B", found.after)):
        identified = comparability.key(comparability.identity(side))
        yield f"{label}: {side.folder}, commit {side.commit}, key {identified}"
    yield ""
    if found.differences:
        yield from _difference_lines(found)
    else:
        yield "Nothing in the comparability key differs."
    for note in found.notes:
        yield f"- {plain(note)}"
    if found.rows:
        yield from _time_lines(found)
        yield from _memory_lines(found)
        yield from _quality_lines(found)
    yield ""
    if found.forbidden:
        fields = dict.fromkeys(one.field for one in found.forbidden)
        again = " ".join(f"--across {field}" for field in fields)
        yield f"NOT COMPARABLE: {', '.join(fields)} differ; {again} compares all the same"
    for text in broken:
        yield f"FAILED: {plain(text)}"
    calls = Counter(row.call for row in found.rows)
    yield f"{len(found.rows)} comparisons: " + (
        ", ".join(f"{count} {call}" for call, count in calls.most_common()) or "none made"
    )


def _difference_lines(found: Comparison) -> Iterator[str]:
    rows = [
        [one.field, code(one.part), code(_short(one.before)), code(_short(one.after))]
        for one in found.differences
    ]
    yield table(["differs", "part", "A", "B"], rows)
    yield ""


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _bounds(row: Row) -> str:
    return interval(*row.bounds) if row.bounds else "one repeat"


def _time_lines(found: Comparison) -> Iterator[str]:
    yield ""
    if found.in_units:
        yield (
            "The machines differ: **not comparable in seconds**. Ratios are in calibrated units, "
            "each time divided by that of the machine's own kernels."
        )
        yield ""
    body = []
    for row in found.rows:
        per = "ms a sample" if row.unit == "sample" else "s"
        scale = 1000 if row.unit == "sample" else 1
        test = "paired" if row.effect.in_blocks else "unpaired"
        ratio = f"{math.exp(row.effect.mean):.3f}"
        times = [figure(row.before * scale), figure(row.after * scale), per]
        body.append(
            [code(row.cell), row.stage, *times, ratio, _bounds(row), test, plain(row.words)]
        )
    ratio_name = "calibrated ratio" if found.in_units else "ratio"
    yield table(["cell", "stage", "A", "B", "unit", ratio_name, "interval", "test", "call"], body)


def _memory_lines(found: Comparison) -> Iterator[str]:
    moved = []
    for (cell, stage, source), (theirs, ours) in found.memory.items():
        change = ours / theirs - 1
        if abs(change) > found.floor:
            peaks = f"{theirs / GIB:.3f}", f"{ours / GIB:.3f}", f"{change:+.1%}"
            moved.append([code(cell), stage, SOURCES[source], *peaks])
    yield ""
    if moved:
        yield table(["cell", "stage", "peak", "A GiB", "B GiB", "change"], moved)
    else:
        yield f"Memory: none of {len(found.memory)} peaks moved by more than {found.floor:.0%}."


def _quality_lines(found: Comparison) -> Iterator[str]:
    compared = [one for one in found.quality if one.difference is not None]
    moved = []
    for one in compared:
        if one.difference or one.call not in ("", "not worse"):
            bounds = f"{signed(one.low)} to {signed(one.high)}"
            figures = figure(one.value), signed(one.difference), bounds, one.call or "–"
            moved.append([code(one.cell), one.stage, one.metric, *figures])
    yield ""
    if moved:
        yield table(["cell", "stage", "metric", "B", "B − A", "interval", "call"], moved)
    elif compared:
        yield f"Quality: none of {len(compared)} figures moved."
    else:
        yield "Quality: nothing to compare."


if __name__ == "__main__":
    app()

"""Time against memory: which cells no other one beats in both, and the picture of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from bench.judging.best import COMPARED, GIB, memory_source, peaks_by_process
from bench.judging.figures import Record
from bench.judging.judgement import BASELINE, Verdict
from bench.matrix import Cell
from bench.reporting.charts import COLOURS, ratio_axis
from bench.reporting.labels import places
from bench.reporting.strings import Words
from bench.reporting.tables import SOURCES, ranked

FRONT, DOMINATED, OUT = "front", "dominated", "out"
FRONT_COLOUR, BEATEN_COLOUR = "#0b3d91", "#6e7781"
WIDTH, PLOT, PLOT_HEIGHT = 10.0, 5.3, 4.3
LEFT, BOTTOM = 0.75, 0.6
ROW_INCHES, LEGEND_LETTERS = 0.2, 44
LETTER_INCHES = 0.085
FAR_INCHES = 0.3
"""From here on a line joins number and point."""


@dataclass(frozen=True)
class Point:
    """One measured cell; `place` says whether anything measured beats it."""

    number: int
    cell: str
    call: str
    ratio: float
    low: float
    high: float
    peak_gib: float
    """The largest over repeats, which is what must fit."""
    least_gib: float
    place: str
    """front, dominated, or out: not comparable, or above the limit."""


def points(
    rows: Sequence[Verdict],
    cells: Sequence[Cell],
    records: Sequence[Record],
    limit_gib: float | None,
) -> list[Point]:
    """The measured cells that have a ratio, in reading order; none where memory was not read."""
    source = memory_source(rows)
    shown = [row for row in ranked(rows) if row.repeats and (row.ratio or row.cell == BASELINE)]
    if source is None or len(shown) < 2:
        return []
    names = {cell.key: cell.name for cell in cells}
    peaks: dict[str, list[float]] = {}
    for (key, _), value in peaks_by_process(records, source).items():
        if key in names:
            peaks.setdefault(names[key], []).append(value / GIB)
    ratios = {row.cell: row.ratio or 1.0 for row in shown}
    eligible = {
        row.cell
        for row in shown
        if row.call in (*COMPARED, BASELINE)
        and (limit_gib is None or max(peaks[row.cell]) <= limit_gib)
    }
    found = []
    for number, row in enumerate(shown, start=1):
        own = ratios[row.cell], max(peaks[row.cell])
        rivals = [(ratios[c], max(peaks[c])) for c in eligible if c != row.cell]
        place = DOMINATED if any(beats(rival, own) for rival in rivals) else FRONT
        place = place if row.cell in eligible else OUT
        low, high = row.low or own[0], row.high or own[0]
        least = min(peaks[row.cell])
        found.append(Point(number, row.cell, row.call, own[0], low, high, own[1], least, place))
    return found


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether one is no worse in both, and better in one."""
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def pareto_chart(
    found: Sequence[Point], source: str, limit_gib: float | None, say: Words
) -> Figure:
    """Time ratio against peak memory with whiskers, the front as a line, numbers explained beside.

    Whiskers: interval of the ratio, and the smallest peak of all repeats up to the largest.
    """
    lines = sum(len(legend(point, say)) for point in found) + 0.2 * len(found)
    tall = max(PLOT_HEIGHT + BOTTOM + 0.2, ROW_INCHES * (4 + 0.85 * lines) + 0.5)
    figure = Figure(figsize=(WIDTH, tall))
    axes = figure.add_axes(
        (LEFT / WIDTH, (tall - 0.2 - PLOT_HEIGHT) / tall, PLOT / WIDTH, PLOT_HEIGHT / tall)
    )
    frame(axes, found, limit_gib)
    front = sorted((p.ratio, p.peak_gib) for p in found if p.place == FRONT)
    axes.step(
        [ratio for ratio, _ in front],
        [peak for _, peak in front],
        where="post",
        color=FRONT_COLOUR,
        linewidth=1.2,
        alpha=0.6,
    )
    for point in found:
        draw(axes, point)
    if limit_gib is not None:
        axes.axhline(limit_gib, color="#cf222e", linewidth=1, linestyle="--")
    axes.set_xlabel(say("chart.time"))
    axes.set_ylabel(say("chart.memory", source=say(SOURCES[source])))
    axes.spines[["top", "right"]].set_visible(False)
    number_points(axes, found)
    explain(figure, found, limit_gib, tall, say)
    return figure


def frame(axes: Any, found: Sequence[Point], limit_gib: float | None) -> None:
    """Axes that hold every point; whiskers may leave them at the sides."""
    logs = [math.log(point.ratio) for point in found]
    reach = max(max(logs) - min(logs), 0.05)
    ratio_axis(axes, math.exp(min(logs) - 0.15 * reach), math.exp(max(logs) + 0.15 * reach))
    peaks = [p.peak_gib for p in found] + [p.least_gib for p in found]
    peaks += [limit_gib] if limit_gib is not None else []
    spread = max(max(peaks) - min(peaks), 0.1 * max(peaks))
    axes.set_ylim(max(min(peaks) - 0.15 * spread, 0), max(peaks) + 0.15 * spread)


def draw(axes: Any, point: Point) -> None:
    """One cell: filled on the front, grey where dominated, hollow where it is out."""
    colour = colour_of(point)
    axes.hlines(point.peak_gib, point.low, point.high, color=colour, linewidth=0.9, alpha=0.6)
    axes.vlines(
        point.ratio, point.least_gib, point.peak_gib, color=colour, linewidth=0.9, alpha=0.6
    )
    face = "white" if point.place == OUT else colour
    size = 7 if point.place == FRONT else 5
    mark = "s" if point.cell == BASELINE else "o"
    at = (point.ratio, point.peak_gib)
    axes.plot(*at, mark, color=colour, markerfacecolor=face, markersize=size, zorder=3)


def colour_of(point: Point) -> str:
    """Blue on the front, grey behind it, the colour of its call where it is out."""
    if point.place == FRONT:
        return FRONT_COLOUR
    return BEATEN_COLOUR if point.place == DOMINATED else COLOURS.get(point.call, "#cf222e")


def number_points(axes: Any, found: Sequence[Point]) -> None:
    """Each point's number near it, where it covers neither a point nor another number."""
    to_inches = axes.transData + axes.figure.dpi_scale_trans.inverted()
    spots = [tuple(to_inches.transform((p.ratio, p.peak_gib))) for p in found]
    widths = [LETTER_INCHES * len(str(point.number)) + 0.04 for point in found]
    boxes = places(spots, widths, (LEFT, LEFT + PLOT))
    for point, spot, box in zip(found, spots, boxes, strict=True):
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        far = math.dist((x, y), spot) > FAR_INCHES
        line = {"arrowstyle": "-", "color": "#8c959f", "linewidth": 0.6, "shrinkA": 5, "shrinkB": 3}
        axes.annotate(
            str(point.number),
            spot,
            (x, y),
            xycoords=axes.figure.dpi_scale_trans,
            textcoords=axes.figure.dpi_scale_trans,
            ha="center",
            va="center",
            fontsize=8,
            color=colour_of(point),
            arrowprops=line if far else None,
        )


def legend(point: Point, say: Words) -> list[str]:
    """Number, name and figures of a point, in lines that fit beside the plot."""
    parts = point.cell.split(", ") if len(point.cell) > LEGEND_LETTERS else [point.cell]
    said = say("chart.point", ratio=f"{point.ratio:.3f}", peak=f"{point.peak_gib:.2f}")
    note = f"  {point.call}" if point.place == OUT else ""
    return [*parts, f"{said}{note}"]


def explain(
    figure: Any, found: Sequence[Point], limit_gib: float | None, tall: float, say: Words
) -> None:
    """What the numbers and colours mean, right of the plot."""
    left, height = LEFT + PLOT + 0.25, tall - 0.3
    marks = [
        (FRONT_COLOUR, f"● {say('chart.front')}"),
        (BEATEN_COLOUR, f"● {say('chart.dominated')}"),
        ("#8250df", f"○ {say('chart.out')}"),
    ]
    if limit_gib is not None:
        marks.append(("#cf222e", f"– {say('chart.limit', limit=f'{limit_gib:g}')}"))
    for colour, words in marks:
        write(figure, left, height, tall, words, colour)
        height -= ROW_INCHES
    height -= 0.1
    for point in found:
        first, *rest = legend(point, say)
        write(figure, left, height, tall, f"{point.number}", colour_of(point))
        for words in [first, *rest]:
            write(figure, left + 0.25, height, tall, words, colour_of(point))
            height -= ROW_INCHES * 0.85
        height -= ROW_INCHES * 0.2


def write(figure: Any, left: float, height: float, tall: float, words: str, colour: str) -> None:
    """One line of the legend."""
    figure.text(left / WIDTH, height / tall, words, color=colour, fontsize=7.5, va="center")


def by_place(found: Sequence[Point]) -> Mapping[str, list[str]]:
    """front, dominated, out -> cells."""
    return {name: [p.cell for p in found if p.place == name] for name in (FRONT, DOMINATED, OUT)}

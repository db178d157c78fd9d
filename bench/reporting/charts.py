"""Pictures of a report as SVG text: ratios with whiskers, loss curves; byte-stable.

Text stays text, drawn by the reader's own fonts: whoever can read a Japanese page sees its charts
in Japanese, whatever fonts the machine has that made them.
"""

import io
import math
import statistics
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.judging.judgement import BASELINE, Verdict
from bench.reporting.strings import Words
from bench.reporting.tables import call, interval

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bench.report",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
}
COLOURS = {
    "faster": "#1a7f37",
    "slower": "#cf222e",
    "same": "#57606a",
    "undecided": "#bf8700",
    "worse quality": "#8250df",
    "unproven": "#0969da",
}
OTHER_COLOUR = "#8c959f"
TICKS = (
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
    0.95,
    0.98,
    1,
    1.02,
    1.05,
    1.1,
    1.25,
    1.5,
    2,
    3,
    5,
    10,
    20,
)
INCHES_PER_LETTER = 0.075
WIDTH = 10.0
ROW_HEIGHT = 0.36
LABEL_LETTERS = 38
CURVE_POINTS = 200


def ratio_chart(rows: Sequence[Verdict], floor: float, say: Words) -> Figure:
    """Horizontal bars of time / baseline time with interval whiskers, one row for each cell.

    The band is the floor: differences inside it are not worth acting on. Rows without a ratio show
    their call only.
    """
    labels = ["\n".join(textwrap.wrap(row.cell, LABEL_LETTERS)) for row in rows]
    heights = [1 + 0.45 * label.count("\n") for label in labels]
    places = [sum(heights[:i]) + heights[i] / 2 for i in range(len(rows))]
    tall = ROW_HEIGHT * sum(heights) + 0.95
    left = 0.25 + INCHES_PER_LETTER * max(len(line) for text in labels for line in text.split("\n"))
    text_width = 3.35
    figure = Figure(figsize=(WIDTH, tall))
    axes = figure.add_axes(
        (left / WIDTH, 0.6 / tall, (WIDTH - left - text_width) / WIDTH, (tall - 0.95) / tall)
    )
    axes.axvspan(1 / (1 + floor), 1 + floor, color="#d0d7de", alpha=0.6, linewidth=0)
    axes.axvline(1, color="black", linewidth=1.2)
    ends = limits(rows, floor)
    for row, place in zip(rows, places, strict=True):
        draw_row(axes, row, place, ends, say)
    ratio_axis(axes, *ends)
    axes.set_ylim(sum(heights), 0)
    axes.set_yticks(places, labels)
    axes.tick_params(axis="y", length=0, pad=7)  # an arrow fits in
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(say("chart.ratio", floor=f"{100 * floor:g}"))
    return figure


def ratio_axis(axes: Any, low: float, high: float) -> None:
    """A logarithmic axis of ratios with ticks that do not crowd."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(thinned([t for t in TICKS if low <= t <= high])))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_row(axes: Any, row: Verdict, place: float, ends: tuple[float, float], say: Words) -> None:
    """Bar from 1 to the ratio, whiskers over the interval, figures in words on the right; a whisker
    that leaves the plot at one of its ends has an arrow there.
    """
    beside = {"transform": axes.get_yaxis_transform(), "va": "center", "clip_on": False}
    if row.ratio is None:
        axes.text(1.03, place, call(row, say), color=OTHER_COLOUR, **beside)
        return
    colour = COLOURS.get(row.call, OTHER_COLOUR)
    axes.barh(place, row.ratio - 1, left=1, height=0.55, color=colour, alpha=0.75)
    words = f"{row.ratio:.3f}"
    if row.low is not None and row.high is not None:
        axes.hlines(place, row.low, row.high, color="black", linewidth=1.2)
        axes.vlines([row.low, row.high], place - 0.14, place + 0.14, color="black", linewidth=1.2)
        for end, leaves, arrow in (
            (ends[0], row.low < ends[0], "<"),
            (ends[1], row.high > ends[1], ">"),
        ):
            if leaves:
                axes.plot(end, place, arrow, color="black", markersize=5, clip_on=False)
        words += f" [{interval(row.low, row.high, ', ')}]"
    axes.text(1.03, place, f"{words}  {row.call}", color=colour, **beside)


def limits(rows: Sequence[Verdict], floor: float) -> tuple[float, float]:
    """Range of the ratio axis: all bars, and whiskers up to twice as far as the widest bar."""
    logs = [math.log(row.ratio) for row in rows if row.ratio is not None]
    reach = 2 * max([abs(value) for value in logs] + [2 * floor])
    ends = [math.log(end) for row in rows for end in (row.low, row.high) if end is not None]
    low = max(min([*logs, *ends, -2 * floor]), -reach)
    high = min(max([*logs, *ends, 2 * floor]), reach)
    margin = 0.06 * (high - low)
    return math.exp(low - margin), math.exp(high + margin)


def thinned(ticks: Sequence[float]) -> list[float]:
    """Ticks that do not crowd: around 1 first, neighbours at least 8 % of the span apart."""
    if not ticks:
        return [1]
    apart = 0.08 * math.log(max(ticks) / min(ticks))
    kept: list[float] = []
    for tick in sorted(ticks, key=lambda tick: abs(math.log(tick))):
        if all(abs(math.log(tick / other)) >= apart for other in kept):
            kept.append(tick)
    return sorted(kept)


def loss_chart(curves: Mapping[str, Sequence[float]], say: Words) -> Figure:
    """Loss over micro-batches, one line for each cell, the baseline black and in front.

    Long traces are drawn as medians of equal windows, so that noise does not hide the course.
    """
    figure = Figure(figsize=(WIDTH, 4.2))
    labels = {cell: "\n".join(textwrap.wrap(cell, LABEL_LETTERS)) for cell in curves}
    longest = max(len(line) for label in labels.values() for line in label.split("\n"))
    legend_width = 0.9 + INCHES_PER_LETTER * longest
    axes = figure.add_axes((0.07, 0.13, (WIDTH - 0.9 - legend_width) / WIDTH, 0.82))
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for index, (cell, losses) in enumerate(curves.items()):
        steps, values = windows(losses)
        if cell == BASELINE:
            axes.plot(steps, values, label=labels[cell], color="black", linewidth=1.8, zorder=3)
            continue
        line = ("-", "--", ":", "-.")[index // len(colours) % 4]
        colour = colours[index % len(colours)]
        axes.plot(steps, values, line, label=labels[cell], color=colour, linewidth=1.1)
    axes.set_xlabel(say("chart.micro_batch"))
    axes.set_ylabel(say("chart.loss"))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8)
    return figure


def windows(losses: Sequence[float]) -> tuple[list[int], list[float]]:
    """Last step and median loss of at most `CURVE_POINTS` equal windows."""
    size = math.ceil(len(losses) / CURVE_POINTS)
    starts = range(0, len(losses), size)
    return (
        [min(start + size, len(losses)) for start in starts],
        [statistics.median(losses[start : start + size]) for start in starts],
    )


def svg(figure: Figure) -> str:
    """SVG text without date, program name or random ids: equal figures give equal bytes."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # Trailing blanks of path data would trip every whitespace check of version control.
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def drawn(make: Any, *args: Any) -> str:
    """A chart as SVG text, drawn under the fixed style whatever the user's is."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        return svg(make(*args))

"""How cost grows: CPU time, peak memory and bytes against rows, items, history length and samples.

`python -m tests.perf.scaling` measures and writes `reports/scaling.md` with its charts, in ten
minutes.

Every point runs in a process of its own, one thread, its work several times: what counts is the
least CPU time (other processes can only add), what is shown beside it is the most. Peak memory is
resident memory above what the process had before; pages of mapped files count while they are in.
"""

import ctypes
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from scipy import stats

from bench.reporting.tables import table
from core import data, item_scores, llm, metrics, outputs, prompts, ranking, stages, student
from core import teacher as teaching
from core.observe import Observer
from core.overlap import Overlapped
from core.plan import GatedPrompts
from core.ranking import Queries
from core.sasrec import SASRec
from core.settings import (
    DataSettings,
    EvalSettings,
    Settings,
    StudentSettings,
    TeacherSettings,
)
from core.states import encoder_states

REPEATS = 3
PAGE = Path("reports/scaling.md")
Work = Callable[[], Any]
"""Done several times; what it returns last is the bytes it wrote, or None."""


@dataclass(frozen=True)
class Study:
    """One piece of work at several sizes; `make` builds it for a size, unmeasured."""

    name: str
    axis: str
    sizes: tuple[int, ...]
    make: Callable[[int, Path], Work]
    why: str
    """What the growth should be, and why."""


@dataclass(frozen=True)
class Point:
    """What one size cost."""

    size: int
    seconds: list[float]
    peak_bytes: int
    written_bytes: int | None = None


@dataclass(frozen=True)
class Line:
    """A straight line through logarithms: cost = c · size^slope."""

    slope: float
    low: float
    high: float
    last: float
    """Slope between the two largest sizes alone: what fixed costs bend least."""

    @classmethod
    def through(cls, sizes: list[float], costs: list[float]) -> "Line":
        """Least squares with the 95 % interval of the slope; three points at least."""
        x, y = np.log(sizes), np.log(costs)
        fit = stats.linregress(x, y)
        half = float(stats.t.ppf(0.975, len(x) - 2)) * float(fit.stderr)
        last = float((y[-1] - y[-2]) / (x[-1] - x[-2]))
        return cls(float(fit.slope), float(fit.slope) - half, float(fit.slope) + half, last)

    @property
    def straight(self) -> str:
        """Whether cost is proportional to size, in words."""
        at_last = abs(self.last - 1) <= 0.15
        if self.low - 0.02 <= 1 <= self.high + 0.02 and self.high - self.low < 0.5 and at_last:
            return "yes"
        if at_last:
            return "from the larger sizes on"
        return "no: flatter" if self.last < 1 else "no: steeper"


@dataclass
class Found:
    """A study with what was measured."""

    study: Study
    points: list[Point] = field(default_factory=list)

    def line(self, cost: Callable[[Point], float]) -> Line:
        return Line.through([p.size for p in self.points], [cost(p) for p in self.points])


def memory(name: str) -> int:
    """A line of this process's status in bytes, such as VmRSS (now) or VmHWM (the most)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {name} in the status of this process")


def measure(study: Study, size: int) -> Point:
    """One point, in a child."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_measure_here, args=(study, size, theirs))
    child.start()
    theirs.close()
    try:
        return Point(**ours.recv())
    finally:
        child.join()


def _measure_here(study: Study, size: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    ctypes.CDLL(None).malloc_trim(0)  # memory that the parent had freed would hide what is taken
    with tempfile.TemporaryDirectory() as folder:
        work = study.make(size, Path(folder))
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, seconds, written = memory("VmRSS"), [], None
        for _ in range(REPEATS):
            begun = time.process_time()
            written = work()
            seconds.append(time.process_time() - begun)
        pipe.send(asdict(Point(size, seconds, memory("VmHWM") - before, written)))


# ---- the work ----


def split_of(users: int, length: int, items: int) -> data.Prepared:
    """Random histories of one length."""
    random = np.random.default_rng(0)
    drawn = random.integers(1, items + 1, users * length).astype(np.int32)
    offsets = np.arange(users + 1, dtype=np.int64) * length
    titles = ["", *(f"Film number {i}" for i in range(items))]
    return data.Prepared(drawn, offsets, titles, np.arange(users), {}, "")


def prepare_data(rows: int, folder: Path) -> Work:
    random = np.random.default_rng(0)
    most = {"user_id": rows // 50, "item_id": 5000, "timestamp": 10**9}
    frame = pd.DataFrame({name: random.integers(0, high, rows) for name, high in most.items()})
    frame.to_parquet(folder / "rows.parquet", row_group_size=1 << 18)
    given = DataSettings(source="parquet", root=str(folder / "rows.parquet"))

    def run() -> int:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            prepared = data.prepare(given, Path(scratch))
            data.save(prepared, Path(scratch) / "split")
            files = (Path(scratch) / "split").iterdir()
            return sum(file.stat().st_size for file in files)

    return run


def student_step(items: int, length: int) -> Work:
    settings = StudentSettings(max_length=length, batch_size=32)
    model = SASRec(items, settings).train()
    batch = student.SequenceBatches(split_of(32, length + 3, items), settings, 0)[0]

    def run() -> None:
        student.training_loss(model, batch, settings).backward()
        model.zero_grad()

    return run


def scored(items: int, states: int = 64, width: int = 64) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = (states, width), (items + 1, width)
    drawn = [torch.randn(shape, generator=random) / 8 for shape in shapes]
    return [*drawn, torch.randint(1, items + 1, (states,), generator=random)]


def ranks(items: int, folder: Path) -> Work:
    states, vectors, targets = scored(items)

    def run() -> None:
        for part, scores in item_scores.in_parts(states, vectors):
            gaps, own = metrics.gaps(scores, targets[part])
            gaps[:, 1:].logsumexp(1)
            metrics.rank_by_gaps(gaps, own, targets[part])

    return torch.inference_mode()(run)


def lists(items: int, folder: Path) -> Work:
    states, vectors, _ = scored(items)

    def run() -> None:
        for _, scores in item_scores.in_parts(states, vectors):
            metrics.best(scores, 100)

    return torch.inference_mode()(run)


def loss_in_parts(items: int, folder: Path) -> Work:
    states, vectors, targets = scored(items)
    leaves = [states.requires_grad_(), vectors[1:].requires_grad_()]
    item_scores.SCORE_BYTES = 64 << 20  # in this child: parts from 43,690 items on

    def run() -> None:
        item_scores.cross_entropy(*leaves, None, targets - 1).backward()
        for leaf in leaves:
            leaf.grad = None

    return run


def evaluation(users: int, folder: Path) -> Work:
    prepared, settings = split_of(users, 50, 3706), EvalSettings()
    states, vectors, _ = scored(3706, users)

    def score(queries: Queries) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        for rows in np.split(np.arange(users), range(256, users, 256)):
            yield rows, item_scores.score(states[rows], vectors)

    return lambda: ranking.evaluate(score, prepared, "test", settings) and None


@dataclass
class Prompts:
    """A tiny teacher with prompts of one history length."""

    settings: Settings
    model: teaching.Teacher
    pieces: prompts.Pieces
    queries: Queries
    states: torch.Tensor


def tiny_teacher(samples: int, history: int) -> Prompts:
    settings = Settings(
        student=StudentSettings(max_length=history),
        teacher=TeacherSettings(llm_model_name="tiny", max_history=history),
    )
    prepared = split_of(samples, history + 1, 300)
    encoder = SASRec(prepared.num_items, settings.student)
    model = teaching.Teacher(settings, encoder, torch.device("cpu"))
    texts = [*prepared.titles, prompts.INSTRUCTION, prompts.CUE]
    pieces = prompts.tokenise(llm.load_tokenizer("tiny", texts), prepared.titles, 16)
    starts = prepared.offsets[:-1]
    queries = Queries(prepared.items, starts, starts + history, np.arange(samples))
    return Prompts(settings, model, pieces, queries, encoder_states(model.encoder, queries))


def teacher_step(history: int, folder: Path) -> Work:
    given = tiny_teacher(16, history)
    asked = prompts.prompts_of(given.queries, history, "instance")
    batch = GatedPrompts(given.states, given.pieces, asked, 16)[0]
    observer = Observer()
    given.model.train()

    def run() -> None:
        loss = teaching.training_loss(given.model, batch, given.settings, 0.0, observer)
        loss.backward()
        given.model.zero_grad()

    return run


def teacher_outputs(samples: int, folder: Path) -> Work:
    given = tiny_teacher(samples, 10)
    observer = Observer()
    observer.facts["operators"] = 0  # nothing is watched

    def said(*tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        return stages.output_columns(*tensors, kept=10)

    def run() -> int:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            writer = outputs.Writer(
                Path(place) / "o", samples=samples, top_k=10, width=given.model.width, hashes={}
            )
            with writer, Overlapped(said, writer.write) as store:
                for batch, state, scores in teaching.infer(
                    given.model, given.pieces, given.queries, given.settings, observer
                ):
                    store(batch["rows"].numpy(), scores, batch["targets"], state)
            writer.finish(np.zeros((3, given.model.width)))
            return sum(file.stat().st_size for file in (Path(place) / "o").iterdir())

    return run


MANY_ITEMS = (1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000)
STUDIES = [
    Study(
        "prepare_data from Parquet",
        "rows",
        (100_000, 300_000, 1_000_000, 3_000_000, 9_000_000),
        prepare_data,
        "two passes and a sort inside each user: proportional to rows. Below one part (2^20 rows) "
        "memory is that of the part; above it the pages of ids and times that a part touches "
        "(12 bytes a row, all of them when rows come in random order, as here) and two counts for "
        "each id. What bends the line upward: the places where rows belong leave the caches.",
    ),
    Study(
        "student step, full softmax",
        "items",
        (1_000, 4_000, 16_000, 64_000),
        lambda size, folder: student_step(size, 50),
        "products with every item and one update of the table's gradient are proportional to "
        "items; the transformer body (1,600 positions here) is the fixed cost at the left.",
    ),
    Study(
        "student step, 1,000 items",
        "history length",
        (25, 50, 100, 200, 400),
        lambda size, folder: student_step(1000, size),
        "proportional to positions, and attention (positions²) on top: slope above 1 at the right.",
    ),
    Study(
        "ranks and losses of 64 states",
        "items",
        MANY_ITEMS,
        ranks,
        "one product and a few passes over the scores: proportional to items. At 1,000 items the "
        "cost of the calls themselves shows; where the scores leave the second-level cache (at "
        "16,000 items they have 4 MB) each costs up to twice as much: that bends the line.",
    ),
    Study(
        "100 best of 64 states",
        "items",
        MANY_ITEMS,
        lists,
        "a partition is linear in items; the sort of the 100 is the fixed cost at the left, "
        "leaving the caches bends the line at the right.",
    ),
    Study(
        "cross-entropy of 64 states, forward and backward, parts of 64 MiB",
        "items",
        MANY_ITEMS,
        loss_in_parts,
        "four products where scores are made twice, in parts of the items (three below 43,690 "
        "items, where one part holds all); memory grows with the vectors and their gradient, no "
        "longer with states times items. Parts of the states, tried first, added up a gradient of "
        "all vectors for each part: slope 1.8 at the last step, 8.1 s for a million items.",
    ),
    Study(
        "evaluation, 3,706 items",
        "users",
        (500, 2_000, 8_000, 32_000),
        evaluation,
        "batches of 256 users, each alike; the histories have one entry for each interaction.",
    ),
    Study(
        "teacher step, tiny backbone, 16 prompts",
        "history length",
        (5, 10, 20, 40, 80),
        teacher_step,
        "instruction and cue are the fixed part of every prompt; tokens grow with the history, "
        "attention with its square.",
    ),
    Study(
        "teacher outputs, tiny backbone, history 10",
        "samples",
        (250, 500, 1_000, 2_000),
        teacher_outputs,
        "batches alike, one row each in the store.",
    ),
]


# ---- the page ----


HEAD = f"""\
# How cost grows

Written by `python -m tests.perf.scaling`; do not edit. Every point: a process of its own, one
thread, {REPEATS} repeats, the least CPU time (the most beside it: what a busy machine adds). Peak
memory is resident memory above what the process had before the work. A slope is that of a straight
line through the logarithms, with its 95 % interval over the sizes: 1 = proportional. The *last
step* is the slope between the two largest sizes, where fixed costs bend it least; it carries the
noise of two points only.

![CPU time](scaling-cpu.svg)

![Peak memory](scaling-memory.svg)"""


def short(number: float) -> str:
    """Three significant digits without an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def section(found: Found) -> str:
    """Text and table of one study."""
    study, mib = found.study, 1 << 20
    rows = [
        [
            f"{p.size:,}",
            short(1000 * min(p.seconds)),
            short(1000 * max(p.seconds)),
            short(1e6 * min(p.seconds) / p.size),
            short(p.peak_bytes / mib),
            "" if p.written_bytes is None else short(p.written_bytes / p.size),
        ]
        for p in found.points
    ]
    head = [
        study.axis,
        "CPU ms",
        "most of the repeats",
        f"µs for each of the {study.axis}",
        "peak MiB",
        "bytes written for each",
    ]
    line = found.line(lambda p: min(p.seconds))
    words = (
        f"Slope {line.slope:.2f} ({line.low:.2f} to {line.high:.2f}), last step {line.last:.2f}; "
        f"straight: {line.straight}. Expected: {study.why}"
    )
    return f"## {study.name}\n\n{words}\n\n{table(head, rows)}"


def summary(every: list[Found]) -> str:
    """One row for each study."""
    rows = []
    for found in every:
        cpu = found.line(lambda p: min(p.seconds))
        peak = found.line(lambda p: max(p.peak_bytes, 1))
        rows.append(
            [
                found.study.name,
                found.study.axis,
                f"{found.points[0].size:,} to {found.points[-1].size:,}",
                f"{cpu.slope:.2f} ({cpu.low:.2f} to {cpu.high:.2f})",
                f"{cpu.last:.2f}",
                cpu.straight,
                f"{peak.last:.2f}",
            ]
        )
    head = ["work", "against", "sizes", "CPU slope", "last step", "straight", "memory, last step"]
    return table(head, rows)


def page(every: list[Found]) -> str:
    """The whole page as Markdown."""
    return "\n\n".join([HEAD, summary(every), *map(section, every)]) + "\n"


def chart(every: list[Found], title: str, cost: Callable[[Point], list[float]]) -> Figure:
    """One small log-log plot for each study; bars from the least to the most."""
    columns = 3
    lines = -(-len(every) // columns)
    figure = Figure((4 * columns, 3 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, found in zip(grid, every, strict=False):
        sizes = [p.size for p in found.points]
        costs = [cost(p) for p in found.points]
        least, most = [min(each) for each in costs], [max(each) for each in costs]
        spread = [[0.0] * len(least), [b - a for a, b in zip(least, most, strict=True)]]
        axes.errorbar(sizes, least, spread, marker="o", markersize=4, capsize=3)
        axes.plot(sizes, [least[-1] * size / sizes[-1] for size in sizes], ":", color="grey")
        axes.set(xscale="log", yscale="log", xlabel=found.study.axis)
        axes.set_title(found.study.name, fontsize=8)
    for axes in list(grid)[len(every) :]:
        axes.axis("off")
    figure.suptitle(f"{title}; dotted: proportional to size")
    return figure


def write(every: list[Found], path: Path) -> None:
    """Page and charts, each renamed into place."""
    charts = {
        "cpu": chart(every, "CPU seconds", lambda p: p.seconds),
        "memory": chart(every, "Peak memory, MiB", lambda p: [max(p.peak_bytes, 1) / (1 << 20)]),
    }
    for name, figure in charts.items():
        with mpl.rc_context({"svg.hashsalt": "scaling"}):
            new = path.with_name(f"scaling-{name}.svg.new")
            figure.savefig(new, format="svg", metadata={"Date": None})
        new.replace(path.with_name(f"scaling-{name}.svg"))
    new = path.with_name(f"{path.name}.new")
    new.write_text(page(every), encoding="utf-8")
    new.replace(path)


def main(out: Path = PAGE, only: str = "") -> None:
    """Measure every study (or those with a word in their name) and write the page."""
    every = []
    for study in STUDIES:
        if only not in study.name:
            continue
        every.append(Found(study))
        for size in study.sizes:
            every[-1].points.append(measure(study, size))
            typer.echo(json.dumps({"study": study.name, **asdict(every[-1].points[-1])}))
    write(every, out)
    typer.echo(str(out))


if __name__ == "__main__":
    typer.run(main)

"""Shows how far a run is: a bar with the time left on a terminal, one line for each process."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from bench.execute import Progress
from bench.launch import Outcome
from bench.launching.deaths import Events
from bench.plan import duration

REDRAW_S = 0.5


@contextmanager
def shown(console: Console) -> Iterator[Progress]:
    """A display of one run; without a terminal only ended processes are named.

    The bar is redrawn from the waiting loop: a drawing thread would compete with the worker.
    """
    bar = Bar(
        TextColumn("{task.fields[place]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    )
    row = bar.add_task("", total=None, place="", left="")
    seconds: list[float] = []
    drawn_s = 0.0
    label = ""
    processes = 0

    def expect(count: int) -> None:
        nonlocal processes
        processes = len(seconds) + count
        bar.update(row, total=processes)

    def begin(name: str) -> None:
        nonlocal label
        label = name
        bar.update(row, place=name, refresh=True)

    def step(events: Events) -> None:
        nonlocal drawn_s
        if time.monotonic() - drawn_s >= REDRAW_S:
            drawn_s = time.monotonic()
            bar.update(row, place=f"{label}: {where(events)}", refresh=True)

    def end(name: str, outcome: Outcome, is_measured: bool) -> None:
        if not is_measured:
            console.print(f"{name}: {figures(outcome)}", markup=False, soft_wrap=True)
            return
        seconds.append(outcome.wall_s)
        number = len(seconds)
        remaining_s = statistics.fmean(seconds) * (processes - number)
        left = f"about {duration(remaining_s)} left"
        bar.update(row, completed=number, left=left, refresh=True)
        console.print(
            f"[{number}/{processes}] {name}: {figures(outcome)}; {left}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    with bar:
        yield Progress(expect, begin, step, end)


def where(events: Events) -> str:
    """The worker's place in a few words."""
    line = events.progress
    if line is None:
        return "starting"
    return f"{line.get('stage')} {line.get('phase')} {line.get('step')}"


def figures(outcome: Outcome) -> str:
    """One finished process in one line: its stages' seconds, or how and where it died."""
    stages = ", ".join(f"{line['stage']} {line['wall_s']:.2f} s" for line in outcome.stage_lines)
    if outcome.status == "ok":
        return f"ok in {outcome.wall_s:.1f} s" + (f" ({stages})" if stages else "")
    return f"{outcome.status} in {outcome.stage} after {outcome.wall_s:.1f} s: {outcome.reason}"

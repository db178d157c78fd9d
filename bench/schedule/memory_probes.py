"""Probes of a batch size: short processes through every measured stage, each walled in by the
memory it may take, and the search of one `auto` with them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import machine
from bench.execute import (
    Launch,
    Progress,
    Run,
    remove_private_artefacts,
    upstream_need,
    write_job,
)
from bench.launch import Outcome, run_worker
from bench.launching.deaths import Job
from bench.machine import UnfitMachine
from bench.matrix import Cell, Matrix, settings_key
from bench.schedule import autos, memory_model, room
from bench.schedule.memory_model import MOST_PROBES, Probe
from core.settings import Settings

GIB = 1 << 30
OUT_OF_MEMORY = ("oom_gpu", "oom_host")
SHORT_OF_MEMORY = re.compile(
    r"bad_alloc|annot allocate memory|could not create a (primitive|memory)"  # of oneDNN, the last
)
"""Further words of libraries that were refused memory; inside a wall they mean nothing else."""
PEAKS = ("device_peak_bytes", "torch_reserved_peak_bytes", "host_peak_bytes")
"""What must fit: the first of these that was read, as where the best cell is chosen."""
SEEN = {
    "train.batch_size": "largest_train_batch",
    "teacher.inference_batch_size": "largest_batch",
}
"""Setting -> fact that tells the largest batch a stage really had."""
TOGETHER = 2
"""Probes kept for trying a number beside those found before it."""


@dataclass(frozen=True)
class Search:
    """One `auto` to find, and the first cell that has it."""

    setting: str
    stand_in: int
    cell: Cell

    @property
    def where(self) -> str:
        """The cell, where it differs from the baseline in more than this setting; else empty."""
        return "" if set(self.cell.changed) <= {self.setting} else self.cell.name


class Unanswered(Exception):
    """A probe died of something else than memory; the text says of what."""


@dataclass(frozen=True)
class Searcher:
    """What probes are started with."""

    run: Run
    display: Progress
    stopped: Callable[[], bool]
    launch: Launch = run_worker


def find(searcher: Searcher, search: Search, numbers: Mapping[int, int]) -> list[Probe]:
    """All probes of one search; the last word is `memory_model.largest` of them.

    The setting is searched with every other `auto` of its cell at 1, so that the peak follows this
    one alone; then the number is tried beside those found before it (`numbers`), and half of it
    where they do not fit together. Raises Unanswered, UnfitMachine, Interrupted.
    """
    limit_bytes = allowed_bytes(searcher.run.matrix, search.cell.settings)
    others = {
        setting: numbers[stand_in]
        for setting, stand_in in autos.autos_of(search.cell.settings).items()
        if stand_in in numbers
    }

    def alone(batch: int) -> Probe:
        return attempt(searcher, search, batch, {}, limit_bytes)

    kept = TOGETHER if others else 0
    probes = memory_model.search(alone, MOST_PROBES - kept)
    best = memory_model.largest(probes)
    batch = best.batch if best else 0
    fits = bool(best) and not others
    while batch and not fits and len(probes) < MOST_PROBES:
        probe = attempt(searcher, search, batch, others, limit_bytes)
        probes.append(probe)
        fits = probe.fits
        batch = probe.batch if fits else memory_model.rounded(batch // 2)
    if not fits:
        raise UnfitMachine(refusal(search, probes, others))
    return probes


def refusal(search: Search, probes: Sequence[Probe], others: Mapping[str, int]) -> str:
    """Why there is no number."""
    last = probes[-1]
    beside = "".join(f", {setting}={number}" for setting, number in others.items())
    return (
        f"machine: {search.setting}: auto: a batch of {last.asked}{beside} does not fit into "
        f"{gib(last.room_bytes)} with {100 * memory_model.HEADROOM:g} % to spare ({last.status}"
        + (f", peak {gib(last.peak_bytes)}" if last.peak_bytes is not None else "")
        + "); free memory, raise max_memory_gib, "
        + ("give one of them a number" if others else "or take a smaller model")
    )


def allowed_bytes(matrix: Matrix, settings: Settings) -> int | None:
    """Memory a probe may take: the matrix's limit, else what this host has free; None = what a GPU
    has free, which the probe itself sees.
    """
    given = matrix.max_memory_gib
    limit_bytes = None if given is None else int(given * GIB)
    if settings.machine.device != "cpu" and machine.has_gpu():
        return limit_bytes
    free_bytes = room.host_bytes()
    return free_bytes if limit_bytes is None else min(limit_bytes, free_bytes)


def attempt(
    searcher: Searcher,
    search: Search,
    batch: int,
    others: Mapping[str, int],
    limit_bytes: int | None,
) -> Probe:
    """Try one batch size in a process of its own. Raises Unanswered, Interrupted."""
    settings = trial_settings(search.cell.settings, search.setting, batch, others)
    cell = Cell(search.cell.name, search.cell.changed, settings, settings_key(settings))
    beside = "".join(f", {setting}={number}" for setting, number in others.items())
    label = f"largest {search.setting}: {batch}{beside}"
    run = searcher.run
    if need := upstream_need(settings, run.matrix.stages):
        set_up(searcher, cell, need)
    stem = f"memory-{search.setting}={batch}-{cell.key[:6]}"
    job = write_job(run, cell, stem, "memory_probe", room_bytes=limit_bytes)
    outcome = start(searcher, label, replace(job, timeout_s=short_s(run.matrix)))
    room_bytes = outcome.process.get("room_bytes", limit_bytes)
    if room_bytes is None or not is_answer(outcome):
        raise Unanswered(broken(label, outcome, job.log))
    status = "oom_host" if is_short_of_memory(outcome) else outcome.status
    return Probe(
        asked=batch,
        status=status,
        room_bytes=room_bytes,
        peak_bytes=peak_bytes(outcome) if status == "ok" else None,
        rows=rows_seen(outcome, search.setting),
        beside=beside.removeprefix(", "),
    )


def trial_settings(
    settings: Settings, setting: str, batch: int, others: Mapping[str, int]
) -> Settings:
    """Settings with this batch size, the others found, and 1 for each `auto` that is left."""
    stand_ins = autos.autos_of(settings)
    known = {stand_ins[name]: number for name, number in others.items()}
    numbers = dict.fromkeys(stand_ins.values(), 1) | known | {stand_ins[setting]: batch}
    return autos.with_numbers(settings, numbers)


def set_up(searcher: Searcher, cell: Cell, need: str) -> None:
    """Make what the probe's stages need from earlier ones, cut as short, once for equal needs."""
    run, stem = searcher.run, f"memory-set-up-{need}"
    done = run.folder / "cells" / f"{stem}.done"
    if done.exists():
        return
    job = write_job(run, cell, stem, "memory_set_up")
    label = f"largest batch, set-up {need}"
    outcome = start(searcher, label, job)
    if outcome.status != "ok":
        raise Unanswered(broken(label, outcome, job.log))
    done.touch()


def start(searcher: Searcher, label: str, job: Job) -> Outcome:
    """One process, its artefacts removed after it."""
    searcher.display.begin(label)
    try:
        outcome = searcher.launch(job, searcher.stopped, searcher.display.step)
    finally:
        remove_private_artefacts(searcher.run.folder)
    searcher.display.end(label, outcome, False)
    return outcome


def short_s(matrix: Matrix) -> float:
    """Longest a probe may take."""
    return min(matrix.timeout_s, matrix.preflight_timeout_s)


def is_answer(outcome: Outcome) -> bool:
    """Whether a probe ended well or of its size: of memory, or by taking too long."""
    known = outcome.status in ("ok", "timeout", *OUT_OF_MEMORY)
    return known or is_short_of_memory(outcome)


def is_short_of_memory(outcome: Outcome) -> bool:
    """Whether a death that has no name for it came of refused memory."""
    said = [outcome.reason or "", *outcome.log_tail]
    return outcome.status in ("error", "killed") and any(map(SHORT_OF_MEMORY.search, said))


def broken(label: str, outcome: Outcome, log: Path) -> str:
    """What is said of a probe that gives no answer."""
    tail = "".join(f"\n    {line}" for line in outcome.log_tail[-5:])
    return f"{label}: {outcome.status} in {outcome.stage}: {outcome.reason} ({log}){tail}"


def peak_bytes(outcome: Outcome) -> int:
    """Peak of the largest stage, from the best source that every stage has."""
    for source in PEAKS:
        found = [line["memory"].get(source) for line in outcome.stage_lines]
        if found and all(isinstance(value, int) for value in found):
            return max(found)
    raise Unanswered("the probe's records hold no peak of memory")


def rows_seen(outcome: Outcome, setting: str) -> int | None:
    """Largest batch of this setting that the probe saw; None where nothing counts it."""
    seen = [line["facts"].get(SEEN.get(setting)) for line in outcome.stage_lines]
    return max((count for count in seen if isinstance(count, int)), default=None)


def gib(count: int) -> str:
    """Bytes as a reader wants them."""
    return f"{count / GIB:.2f} GiB"

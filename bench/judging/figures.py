"""The judged figure of a stage of one process: steady seconds per sample, or wall seconds."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.judging.steady import steady_start

TOTAL = "total"
"""Pseudo-stage: the sum of `wall_s` over the measured stages of one process."""
Record = Mapping[str, Any]
Process = tuple[str, int]
"""(cell key, block)."""
MEMORY = (
    "host_peak_bytes",
    "torch_allocated_peak_bytes",
    "torch_reserved_peak_bytes",
    "device_peak_bytes",
)


@dataclass(frozen=True)
class Figure:
    """The judged figure of one stage of one process."""

    seconds: float
    samples: float | None = None
    warm_up: int = 0
    """Steps left out of it."""
    steady: bool = True
    """False: the steps never became steady, and all but the fewest warm-up steps were judged."""


def steady_figure(record: Record) -> Figure | None:
    """Median seconds per sample of an optimizer step, or of a batch where nothing is trained.

    Units that contain one of `warmup_steps` are left out, those up to the detected steady start,
    and micro-batches after the last optimizer step. None when no steady unit remains, or when the
    clock was too coarse to see most of them.
    """
    units, warm_units = units_of(record.get("steps") or [], record.get("warmup_steps", 0))
    judged = [unit for unit in units[warm_units:] if sum(s["samples"] for s in unit)]
    if not judged:
        return None
    start = start_of(judged)
    figures = [per(unit, "samples") for unit in judged[start or 0 :]]
    left_out = units[:warm_units] + judged[: start or 0]
    samples = statistics.median(s["samples"] for unit in judged for s in unit)
    warm_up = sum(len(unit) for unit in left_out)
    seconds = statistics.median(figures)
    return Figure(seconds, samples, warm_up, start is not None) if seconds > 0 else None


def units_of(steps: Sequence[Record], warmup_steps: int) -> tuple[list[list[Record]], int]:
    """Steps grouped into optimizer steps, or each alone where nothing is trained; and how many of
    the groups hold a warm-up step. A group that no optimizer step ends is dropped.
    """
    trains = any(step.get("optimizer_step") for step in steps)
    units: list[list[Record]] = [[]]
    warm_units = 0
    for index, step in enumerate(steps):
        units[-1].append(step)
        if index < warmup_steps:
            warm_units = len(units)
        if not trains or step["optimizer_step"]:
            units.append([])
    return units[:-1], warm_units


def start_of(units: Sequence[Sequence[Record]]) -> int | None:
    """The first steady unit, by seconds per sample or, where batches differ in length, per token
    worked on: whichever settles first.
    """
    found = [steady_start([per(unit, "samples") for unit in units])]
    if all(sum(step.get("padded_tokens") or 0 for step in unit) for unit in units):
        found.append(steady_start([per(unit, "padded_tokens") for unit in units]))
    return min((start for start in found if start is not None), default=None)


def per(unit: Sequence[Record], what: str) -> float:
    """Seconds of a unit divided by its count of samples or tokens."""
    return float(sum(s["seconds"] for s in unit)) / float(sum(s[what] for s in unit))


def stage_figures(
    records: Sequence[Record], stages: Sequence[str]
) -> dict[str, dict[Process, Figure]]:
    """Stage or `total` -> process -> figure, of all `ok` records.

    A stage is judged by its steps only if every process has steady ones: seconds per sample of one
    cell and wall seconds of another cannot be compared.
    """
    ok: dict[str, dict[Process, Record]] = {stage: {} for stage in stages}
    for record in records:
        if record["status"] == "ok" and record["stage"] in ok:
            ok[record["stage"]][record["key"], record["block"]] = record
    found: dict[str, dict[Process, Figure]] = {}
    for stage, by_process in ok.items():
        steady = {process: steady_figure(record) for process, record in by_process.items()}
        judged = {process: figure for process, figure in steady.items() if figure}
        if len(judged) < len(steady):
            judged = {process: Figure(record["wall_s"]) for process, record in by_process.items()}
        found[stage] = judged
    complete = [p for p in ok[stages[0]] if all(p in by_process for by_process in ok.values())]
    found[TOTAL] = {p: Figure(math.fsum(ok[s][p]["wall_s"] for s in stages)) for p in complete}
    return found


def peaks(records: Iterable[Record]) -> dict[str, int]:
    """Largest value of each memory source over records; sources nobody could read are absent."""
    largest: dict[str, int] = {}
    for record in records:
        for source in MEMORY:
            value = (record.get("memory") or {}).get(source)
            if isinstance(value, int):
                largest[source] = max(value, largest.get(source, 0))
    return largest

"""The judged figure of a stage of one process: steady seconds per sample, or wall seconds."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def steady_figure(record: Record) -> Figure | None:
    """Median seconds per sample of an optimizer step, or of a batch where nothing is trained.

    Units that contain a warm-up step are left out, and micro-batches after the last optimizer step.
    None when no steady unit remains.
    """
    steps = record.get("steps") or []
    if record.get("warmup_steps", 0) >= len(steps):
        return None
    trains = any(step.get("optimizer_step") for step in steps)
    units: list[list[Record]] = [[]]
    warm_units = 0
    for index, step in enumerate(steps):
        units[-1].append(step)
        if not trains or step["optimizer_step"]:
            units.append([])
        if index + 1 == record.get("warmup_steps", 0):
            warm_units = len(units) - (0 if units[-1] else 1)
    steady = [unit for unit in units[warm_units:-1] if sum(s["samples"] for s in unit)]
    if not steady:
        return None
    figures = [sum(s["seconds"] for s in unit) / sum(s["samples"] for s in unit) for unit in steady]
    samples = statistics.median(s["samples"] for unit in steady for s in unit)
    return Figure(statistics.median(figures), samples)


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

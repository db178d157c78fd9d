"""What the samples between two moments say: peak, energy, throttling, clocks, processes; no I/O.

A sample is a dictionary: `monotonic_s` and `used_bytes` always, clocks, temperature, slowdowns and
processes in a wide one, the cumulative counters too in a forced one. A value that could not be
read is {"unavailable": reason}.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from bench.nvml import THROTTLES, Unavailable, as_json

PERIODS = 20
"""Periods of a counter below which its difference is none: either end may be one period old, so
this bounds the error at 5 %."""
ASSUMED_PERIOD_S = 0.1
"""How often the driver moves its counters where nobody saw it; 20 to 100 ms are known."""
RANGES = ("sm_mhz", "memory_mhz", "temperature_c")

Sample = Mapping[str, Any]


def device_figures(
    samples: Sequence[Sample], period_s: float | None
) -> tuple[int | Unavailable, float | Unavailable, int | Unavailable, dict[str, Any]]:
    """Peak bytes, joules, bytes of this process, and the record's `device`, of one stage.

    The first and the last sample are forced ones. `period_s`: how often the energy counter moved,
    None if nobody saw it.
    """
    first, last = samples[0], samples[-1]
    times = [sample["monotonic_s"] for sample in samples]
    gaps = [after - before for before, after in pairwise(times)]
    wide = [sample for sample in samples if "sm_mhz" in sample]
    step_s = period_s or ASSUMED_PERIOD_S
    facts = {
        "samples": len(samples),
        "interval_s": sum(gaps) / len(gaps) if gaps else 0.0,
        "longest_gap_s": max(gaps, default=0.0),
        "readings": len(wide),
        **{name: as_json(_range(wide, name)) for name in RANGES},
        "slowdowns": as_json(_slowdowns(wide)),
        "throttled_s": as_json(throttled_s(first, last, step_s)),
        "counter_period_s": step_s,
        "counter_period": "assumed" if period_s is None else "measured",
        "foreign_processes": as_json(_foreign(wide)),
    }
    return peak_bytes(samples), energy_j(first, last, step_s), own_bytes(wide), facts


def peak_bytes(samples: Sequence[Sample]) -> int | Unavailable:
    """Largest number of bytes in use.

    One failed sample leaves none: what it would have shown may have been the peak.
    """
    values = [sample["used_bytes"] for sample in samples]
    failed = [value["unavailable"] for value in values if isinstance(value, Mapping)]
    if failed:
        return Unavailable(f"{len(failed)} of {len(values)} samples failed: {failed[0]}")
    return max(values) if values else Unavailable("no sample in this time")


def energy_j(first: Sample, last: Sample, period_s: float) -> float | Unavailable:
    """Joules between two forced samples, of the whole device."""
    lasted_s = last["monotonic_s"] - first["monotonic_s"]
    moved_mj = _moved(first.get("energy_mj"), last.get("energy_mj"), lasted_s, period_s)
    if isinstance(moved_mj, Unavailable):
        return moved_mj
    return moved_mj / 1000 if moved_mj else Unavailable("the energy counter stood still")


def throttled_s(first: Sample, last: Sample, period_s: float) -> dict[str, Any] | Unavailable:
    """Seconds between two forced samples that each cause held the clocks down."""
    lasted_s = last["monotonic_s"] - first["monotonic_s"]
    begin, end = first.get("throttled_ns", {}), last.get("throttled_ns", {})
    for counters in (begin, end):
        if "unavailable" in counters:
            return Unavailable(counters["unavailable"])
    found = {}
    for name in THROTTLES:
        moved_ns = _moved(begin.get(name), end.get(name), lasted_s, period_s)
        if isinstance(moved_ns, int) and moved_ns / 1e9 > lasted_s + 2 * period_s:
            moved_ns = Unavailable(f"the counter moved {moved_ns} ns in {lasted_s:.3g} s")
        found[name] = as_json(moved_ns) if isinstance(moved_ns, Unavailable) else moved_ns / 1e9
    return found


def _moved(begin: Any, end: Any, lasted_s: float, period_s: float) -> int | Unavailable:
    """How far a counter went in this time."""
    for value in (begin, end):
        if not isinstance(value, int):
            return Unavailable(value["unavailable"] if value else "not read")
    if lasted_s < PERIODS * period_s:
        return Unavailable(
            f"too short: {lasted_s:.3g} s of a counter that moves every {period_s:.3g} s; "
            f"{PERIODS * period_s:.3g} s are needed"
        )
    if end < begin:
        return Unavailable(f"the counter went back from {begin} to {end}: the driver began anew")
    return int(end - begin)


def _range(wide: Sequence[Sample], name: str) -> list[int] | Unavailable:
    """Smallest and largest reading."""
    values = [sample[name] for sample in wide]
    known = [value for value in values if not isinstance(value, Mapping)]
    if known:
        return [min(known), max(known)]
    return Unavailable(values[0]["unavailable"] if values else "not read")


def _slowdowns(wide: Sequence[Sample]) -> dict[str, int] | Unavailable:
    """In how many readings each slowdown was in force."""
    values = [sample["slowdowns"] for sample in wide]
    known = [value for value in values if not isinstance(value, Mapping)]
    if known or not values:
        return dict(Counter(name for names in known for name in names))
    return Unavailable(values[0]["unavailable"])


# ---- processes ----


def own_bytes(wide: Sequence[Sample]) -> int | Unavailable:
    """Largest reading of the bytes of this process and its children, which counts only where NVML
    lists this process among the host's."""
    lists = _lists(wide)
    if isinstance(lists, Unavailable):
        return lists
    sums = []
    for one in lists:
        values = [process["bytes"] for process in one if process["own"]]
        failed = [value["unavailable"] for value in values if isinstance(value, Mapping)]
        if failed:
            return Unavailable(failed[0])
        sums.append(sum(values))
    return max(sums)


def _foreign(wide: Sequence[Sample]) -> list[dict[str, Any]] | Unavailable:
    """Every process of others that was seen, with its largest reading."""
    lists = _lists(wide)
    if isinstance(lists, Unavailable):
        return lists
    found: dict[int, dict[str, Any]] = {}
    for process in (process for one in lists for process in one if not process["own"]):
        seen = found.setdefault(process["pid"], dict(process))
        if isinstance(process["bytes"], int) and (
            not isinstance(seen["bytes"], int) or process["bytes"] > seen["bytes"]
        ):
            seen["bytes"] = process["bytes"]
    return [{key: one[key] for key in ("pid", "name", "bytes")} for one in found.values()]


def _lists(wide: Sequence[Sample]) -> list[list[dict[str, Any]]] | Unavailable:
    """The process lists that can be trusted: those in which this process was found."""
    lists = [sample["processes"] for sample in wide]
    failed = [one["unavailable"] for one in lists if isinstance(one, Mapping)]
    if failed:
        return Unavailable(failed[0])
    if not any(process["own"] for one in lists for process in one):
        most = max((len(one) for one in lists), default=0)
        return Unavailable(
            f"this process is not among the {most} that NVML lists: their numbers are not ours"
        )
    return lists

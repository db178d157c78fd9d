"""What must hold of the memory figures of every record, and between records; what does not is said.

Pure functions of records as `bench/README.md` describes them; every violation is a sentence.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

MIB = 1 << 20
LEAST_SAMPLES = 5
LONG_GAP_S = 1.0
"""Between two samples; a driver that held the sampler for so long may have hidden a peak."""
TOLERANCE_BYTES = 32 * MIB
"""Of device memory against itself or the allocator: small blocks the driver keeps to itself."""
RESIDUAL_BYTES = 256 * MIB
"""How far the memory beside torch's may differ: kernels of other libraries are loaded with them."""
GROWTH_BYTES, GROWTH_POINTS, EVEN_SHARE = 32 * MIB, 8, 0.2

Record = Mapping[str, Any]


def violations(record: Record) -> list[str]:
    """What cannot be right, or is not whole, in the figures of one record."""
    memory = record.get("memory") or {}
    device = record.get("device") or {}
    return [
        *_unknown_as_number(memory),
        *_order(memory),
        *_device_follows_torch(memory, device),
        *_sampling(device),
        *_allocator(memory),
        *accumulates(record),
    ]


def _unknown_as_number(memory: Mapping[str, Any]) -> list[str]:
    """No value is a reason; None, a negative number or an empty device is no figure."""
    odd = [name for name, value in memory.items() if not _is_figure(value)]
    if memory.get("device_peak_bytes") == 0:
        odd.append("device_peak_bytes")
    return [f"memory: {name} is {memory[name]}, which is no figure and no reason" for name in odd]


def _is_figure(value: Any) -> bool:
    if isinstance(value, Mapping):
        return isinstance(value.get("unavailable"), str)
    return isinstance(value, int) and not isinstance(value, bool)


def _order(memory: Mapping[str, Any]) -> list[str]:
    """Parts are no larger than their wholes, what was seen no larger than the peak."""
    pairs = (
        ("torch_allocated_peak_bytes", "torch_reserved_peak_bytes"),
        ("torch_allocated_start_bytes", "torch_allocated_peak_bytes"),
        ("torch_reserved_start_bytes", "torch_reserved_peak_bytes"),
        ("torch_reserved_end_bytes", "torch_reserved_peak_bytes"),
        ("device_start_bytes", "device_peak_bytes"),
        ("device_end_bytes", "device_peak_bytes"),
        ("device_own_bytes", "device_peak_bytes"),
    )
    known = _known(memory)
    return [
        f"memory: {small} {gib(known[small])} is above {large} {gib(known[large])}"
        for small, large in pairs
        if small in known and large in known and known[small] > known[large] + _slack(small)
    ]


def _slack(name: str) -> int:
    # The driver's list of processes and its figure of the device are not read at one moment.
    return TOLERANCE_BYTES if name == "device_own_bytes" else 0


def _device_follows_torch(memory: Mapping[str, Any], device: Mapping[str, Any]) -> list[str]:
    """Whatever torch holds of the driver, the device must show above what it held before."""
    known = _known(memory)
    reserved = known.get("torch_reserved_peak_bytes")
    seen = known.get("device_delta_peak_bytes", known.get("device_peak_bytes"))
    if reserved is None or seen is None or seen + TOLERANCE_BYTES >= reserved:
        return []
    said = f"memory: the device showed {gib(seen)} more than before while torch held "
    said += f"{gib(reserved)}: another device, another process's end, or a sampler that missed it"
    if known.get("torch_reserved_end_bytes", reserved) < reserved:
        apart_s = device.get("interval_s", 0.0)
        said += f"; torch gave memory back, so the peak may lie between two samples {apart_s:.2f} s"
        said += " apart"
    return [said]


def _sampling(device: Mapping[str, Any]) -> list[str]:
    if "samples" not in device:
        return []
    said = []
    if device["samples"] < LEAST_SAMPLES:
        said.append(f"device memory: undersampled, {device['samples']} samples in this stage")
    if device["longest_gap_s"] > LONG_GAP_S:
        said.append(
            f"device memory: no sample for {device['longest_gap_s']:.1f} s; a peak in that time "
            "was not seen"
        )
    if "v1" in device["source"]:
        said.append(f"device memory: {device['source']}")
    return said


def _allocator(memory: Mapping[str, Any]) -> list[str]:
    """The allocator emptied its cache and tried again: memory was full, and that costs time."""
    known = _known(memory)
    names = {"torch_alloc_retries": "retries", "torch_ooms": "out-of-memory errors"}
    counts = [f"{known[name]} {word}" for name, word in names.items() if known.get(name)]
    return [f"torch's allocator: {' and '.join(counts)} in this stage"] if counts else []


def accumulates(record: Record) -> list[str]:
    """Whether memory rose evenly with the rows, all through the stage.

    Compared are the medians of the last three quarters of the points (the first holds warm-up);
    what levels off is a cache that fills.
    """
    trend = record.get("memory_by_rows") or {}
    points: Sequence[Sequence[int]] = trend.get("points") or []
    if len(points) < GROWTH_POINTS:
        return []
    quarter = len(points) // 4
    parts = [points[-3 * quarter : -2 * quarter], points[-2 * quarter : -quarter]]
    parts.append(points[-quarter:])
    levels = [statistics.median(held for _, held in part) for part in parts]
    middles = [statistics.median(rows for rows, _ in part) for part in parts]
    growth = levels[2] - levels[0]
    rises = [after - before for before, after in pairwise(levels)]
    if growth <= GROWTH_BYTES or min(rises) < EVEN_SHARE * growth:
        return []
    a_row = growth / (middles[2] - middles[0])
    return [
        f"memory: accumulates, {a_row / 1024:.3g} KiB a row ({trend['source']} rose by "
        f"{gib(growth)} over {middles[2] - middles[0]:.0f} rows)"
    ]


# ---- between records ----


def not_given_back(records: Iterable[Record]) -> list[str]:
    """Workers before which a device held more, or less, than before the worker preceding them.

    A difference is a leak, or a program of somebody else that came or went. `records` in the order
    they were written: a machine's calendar may be set back, the file only grows.
    """
    by_device: dict[str, dict[tuple[str, int, int], Record]] = {}
    for record in records:
        name = (record.get("device") or {}).get("name")
        if name and "device_baseline_bytes" in _known(record.get("memory") or {}):
            worker = (record["cell"], record["repeat"], record.get("attempt", 0))
            by_device.setdefault(name, {}).setdefault(worker, record)
    said = []
    for name, workers in by_device.items():
        for worker, following in pairwise(workers):
            before, after = (
                workers[one]["memory"]["device_baseline_bytes"] for one in (worker, following)
            )
            if abs(after - before) > TOLERANCE_BYTES:
                said.append(
                    f"device {name}: {gib(after)} in use before {following[0]} repeat "
                    f"{following[1]}, {gib(before)} before {worker[0]} repeat {worker[1]}: "
                    "not given back, or of others"
                )
    return said


def uneven_residuals(records: Iterable[Record]) -> list[str]:
    """Records whose memory beside torch's differs from that of the others.

    Compared are records of one stage on one device in one image; the residual is what the device
    showed above its baseline less torch's peak of reserved memory.
    """
    groups: dict[tuple[str, str, str], list[tuple[Record, int]]] = {}
    for record in records:
        known = _known(record.get("memory") or {})
        peaks = ("device_delta_peak_bytes", "torch_reserved_peak_bytes")
        if all(name in known for name in peaks):
            name = (record.get("device") or {}).get("name", "")
            image = (record.get("facts") or {}).get("image", "")
            residual = known[peaks[0]] - known[peaks[1]]
            groups.setdefault((record["stage"], name, image), []).append((record, residual))
    said = []
    for (stage, *_), group in groups.items():
        usual = statistics.median(residual for _, residual in group)
        said += [
            f"{stage}: {gib(residual)} of device memory beside torch's in {record['cell']} repeat "
            f"{record['repeat']}, {gib(usual)} in the others: a neighbour, or another library's"
            for record, residual in group
            if abs(residual - usual) > RESIDUAL_BYTES
        ]
    return said


def _known(memory: Mapping[str, Any]) -> dict[str, int]:
    return {name: value for name, value in memory.items() if isinstance(value, int)}


def gib(count: float) -> str:
    """Bytes as a reader wants them."""
    return f"{count / (1 << 30):.2f} GiB"

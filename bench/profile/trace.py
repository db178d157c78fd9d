"""What a profiler's trace tells: seconds of each operator, how busy a device was, memory over time.

A trace is the JSON that torch.profiler exports for Perfetto; times in it are microseconds. Nothing
here needs torch, so every figure can be checked on a trace written by hand.
"""

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

US = 1e-6
STEP = "ProfilerStep"
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
MEMORY = "[memory]"
NO_OPERATOR = "(no operator)"
DTYPES = {
    "float": "float32",
    "double": "float64",
    "c10::BFloat16": "bfloat16",
    "c10::Half": "float16",
    "unsigned char": "uint8",
    "signed char": "int8",
    "int": "int32",
    "long int": "int64",
    "long": "int64",
    "bool": "bool",
}
"""Types as the profiler writes them -> torch's names."""

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Operator:
    """One operator of a profiled window."""

    name: str
    seconds: float
    """On a GPU of its kernels, otherwise of the operator less those it called."""
    share: float
    """Of the window."""
    calls: int
    dtypes: tuple[str, ...]
    """Of its tensor inputs, the commonest combination."""


@dataclass(frozen=True)
class Memory:
    """Bytes in tensors that came and went during the window."""

    peak_bytes: int
    """Largest sum, above that of the window's begin."""
    at_peak: tuple[tuple[str, int, int], ...]
    """Operator, bytes and number of the tensors alive then that it had made, largest first."""


def read(path: Path) -> dict[str, Any]:
    """The whole trace from a gzip file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        trace: dict[str, Any] = json.load(file)
    return trace


def write(path: Path, trace: Mapping[str, Any]) -> None:
    """Write a trace as a gzip file; equal traces give equal bytes."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        file.write(json.dumps(trace).encode())


# ---- time ----


def steps(events: Iterable[Event]) -> int:
    """Number of steps in the window."""
    return sum(1 for event in events if _is_step(event))


def window(events: Iterable[Event]) -> tuple[float, float]:
    """Begin and end of the profiled steps, µs; a device's work for them may end later than they.

    Raises ValueError for a trace without steps.
    """
    spans = [_span(event) for event in events if _is_step(event) or _is_device_work(event)]
    begins = [_span(event)[0] for event in events if _is_step(event)]
    if not begins:
        raise ValueError(f"a trace without {STEP} annotations")
    return min(begins), max(end for _, end in spans)


def operators(events: Sequence[Event]) -> list[Operator]:
    """All operators of the window, longest first.

    Kernels belong to the innermost operator that launched them; one launched by none stands under
    its own name.
    """
    begin, end = window(events)
    calls: Counter[str] = Counter()
    dtypes: dict[str, Counter[tuple[str, ...]]] = {}
    seconds: dict[str, float] = {}
    launched: dict[int, str] = {}
    for event, parent in _nested([event for event in events if event.get("cat") == "cpu_op"]):
        name = event["name"]
        calls[name] += parent is None or parent["name"] != name  # an overload of itself is no call
        launched[event["args"].get("External id", -1)] = name
        types = tuple(DTYPES[t] for t in event["args"].get("Input type", ()) if t in DTYPES)
        dtypes.setdefault(name, Counter())[types] += 1
    on_device = [event for event in events if _is_device_work(event)]
    for event in on_device:
        name = launched.get(event["args"].get("External id", -1), str(event["name"]))
        calls[name] += name not in dtypes
        seconds[name] = seconds.get(name, 0.0) + event["dur"] * US
    for event, own_us in _self_times(events) if not on_device else ():
        seconds[event["name"]] = seconds.get(event["name"], 0.0) + own_us * US
    whole_s = (end - begin) * US
    return [
        Operator(name, took_s, took_s / whole_s, calls[name], _commonest(dtypes.get(name)))
        for name, took_s in sorted(seconds.items(), key=lambda one: -one[1])
    ]


def device_busy(events: Sequence[Event]) -> float | None:
    """Share of the window in which the device worked on anything; None without a device."""
    spans = sorted(_span(event) for event in events if _is_device_work(event))
    if not spans:
        return None
    begin, end = window(events)
    busy, reached = 0.0, begin
    for start, stop in spans:
        busy += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return busy / (end - begin)


def _commonest(found: Counter[tuple[str, ...]] | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(found.most_common(1)[0][0])) if found else ()


def _self_times(events: Iterable[Event]) -> Iterator[tuple[Event, float]]:
    """Operators with their µs less those of the operators inside them."""
    inner: dict[int, float] = {}
    ops = [event for event in events if event.get("cat") == "cpu_op"]
    for event, parent in _nested(ops):
        if parent is not None:
            inner[id(parent)] = inner.get(id(parent), 0.0) + event["dur"]
    for event in ops:
        yield event, max(0.0, event["dur"] - inner.get(id(event), 0.0))


def _nested(events: Iterable[Event]) -> Iterator[tuple[Event, Event | None]]:
    """Events, in order of time, each with the operator of its thread that it lies in."""
    open_by_thread: dict[Any, list[Event]] = {}
    for event in sorted(events, key=lambda e: (e["ts"], -e.get("dur", 0.0))):
        stack = open_by_thread.setdefault(event["tid"], [])
        while stack and _span(stack[-1])[1] <= event["ts"]:
            stack.pop()
        yield event, stack[-1] if stack else None
        if "dur" in event:
            stack.append(event)


def _is_step(event: Event) -> bool:
    return event.get("cat") == "user_annotation" and event["name"].startswith(STEP)


def _is_device_work(event: Event) -> bool:
    return event.get("cat") in DEVICE_WORK


def _span(event: Event) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


# ---- memory ----


def memory(events: Sequence[Event]) -> Memory | None:
    """The peak of the window and what made it; of the GPU where one was used. None if nothing was
    allocated.
    """
    changes = _memory_changes(events)
    if not changes:
        return None
    ops = [event for event in events if event.get("cat") == "cpu_op"]
    chosen = {id(change) for change in changes}
    alive: dict[int, tuple[str, int]] = {}
    at_peak: dict[int, tuple[str, int]] = {}
    total = peak = 0
    rising = False
    for event, parent in _nested([*ops, *changes]):
        if id(event) not in chosen:
            continue
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        if size < 0 and rising and total > peak:
            peak, at_peak = total, dict(alive)  # copied where it may be the peak, not each time
        rising = size > 0
        total += size
        if size > 0:
            alive[address] = (parent["name"] if parent else NO_OPERATOR, size)
        else:
            alive.pop(address, None)
    if total > peak:
        peak, at_peak = total, alive
    made: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for name, size in at_peak.values():
        made[name] += size
        number[name] += 1
    return Memory(peak, tuple((name, size, number[name]) for name, size in made.most_common()))


def with_memory_track(trace: Mapping[str, Any]) -> dict[str, Any]:
    """The trace with a counter that Perfetto draws as a curve: bytes in tensors over time."""
    changes = _memory_changes(trace["traceEvents"])
    track = [
        {
            "ph": "C",
            "name": "bytes in tensors",
            "pid": event["pid"],
            "ts": event["ts"],
            "args": {"bytes": event["args"]["Total Allocated"]},
        }
        for event in changes
    ]
    return {**trace, "traceEvents": [*trace["traceEvents"], *track]}


def _memory_changes(events: Iterable[Event]) -> list[Event]:
    """Allocations and releases in order of time, on the GPU if there are any."""
    found = sorted((e for e in events if e.get("name") == MEMORY), key=lambda e: float(e["ts"]))
    cpu = 0
    on_gpu = [event for event in found if event["args"]["Device Type"] != cpu]
    return on_gpu or found

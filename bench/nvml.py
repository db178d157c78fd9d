"""Memory of one device over time: an NVML sampler in its own process, and a worker's hold on it.

`python -m bench.nvml OUT.jsonl --device UUID_OR_PCI_BUS_ID` appends one line for each sample
and one that tells source and interval. A line on its stdin asks for a sample at once, which is
answered on stdout too; it ends when stdin closes.
"""

import argparse
import contextlib
import importlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import pynvml

LIBRARY_VARIABLE = "ILORA_BENCH_NVML_LIBRARY"
"""`module:object` in place of the driver's library, below the real binding; for tests, replays."""
SHARE_OF_CORE = 0.01
SHORTEST_S, LONGEST_S = 0.05, 0.1
"""Torch keeps freed segments, so a sample in this range sees the peak of its allocator."""
POLLS_TO_TIME = 5
ANSWER_S = 10.0
"""A sampler silent for this long is given up: a driver that hangs must not hang the stage."""


@dataclass(frozen=True)
class Unavailable:
    """A figure nobody could read, and why; never 0."""

    reason: str


@dataclass(frozen=True)
class Gauge:
    """Reads the bytes in use on one device; `source` says what they contain."""

    read: Callable[[], int | Unavailable]
    source: str


@dataclass(frozen=True)
class Window:
    """What the samples between two moments say."""

    peak_bytes: int
    samples: int
    interval_s: float
    """Achieved mean distance of the samples; 0 for a single one."""


# ---- NVML ----


def ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """The value of one NVML query, or Unavailable with the reason; None counts as no value."""
    try:
        value = function(*arguments)
    except pynvml.NVMLError as error:
        return Unavailable(f"{function.__name__}: {error}")
    return Unavailable(f"{function.__name__}: no value") if value is None else value


def open_gauge(device: str) -> Gauge | Unavailable:
    """The gauge of a device named by UUID (`GPU-…`, `MIG-…`) or PCI bus id, never by a number.

    NVML counts devices in PCI order, CUDA by speed and CUDA_VISIBLE_DEVICES: numbers do not agree.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound as error:
        return Unavailable(f"no NVML library: {error}")
    except pynvml.NVMLError as error:
        return Unavailable(f"no NVML: {error}")
    by_uuid = device.startswith(("GPU-", "MIG-"))
    handle = ask(
        pynvml.nvmlDeviceGetHandleByUUID if by_uuid else pynvml.nvmlDeviceGetHandleByPciBusId,
        device,
    )
    if isinstance(handle, Unavailable):
        return Unavailable(f"no device {device}: {handle.reason}")
    newer = _used_without_reserve(handle)
    if not isinstance(newer, Unavailable):
        return Gauge(partial(_used_without_reserve, handle), "NVML memory v2, without reserved")
    older = _used_with_reserve(handle)
    if isinstance(older, Unavailable):
        return older
    return Gauge(
        partial(_used_with_reserve, handle),
        f"NVML memory v1, driver-reserved included (v2: {newer.reason})",
    )


def _used_without_reserve(handle: Any) -> int | Unavailable:
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    if isinstance(memory, Unavailable):
        return memory
    used_bytes: int = memory.total - memory.free - memory.reserved
    # Documents disagree whether `used` of v2 contains the reserve; a third answer is none at all.
    if memory.used not in (used_bytes, used_bytes + memory.reserved):
        return Unavailable(
            f"{memory.used} used, {memory.free} free and {memory.reserved} reserved "
            f"do not add up to {memory.total}"
        )
    return used_bytes


def _used_with_reserve(handle: Any) -> int | Unavailable:
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    return memory if isinstance(memory, Unavailable) else int(memory.used)


def replace_library(name: str) -> None:
    """Put the object `module:object` where the binding keeps the driver's library."""
    module, _, attribute = name.partition(":")
    pynvml.nvmlLib = getattr(importlib.import_module(module), attribute)
    pynvml._nvmlGetFunctionPointer_cache.clear()


# ---- the sampler process ----


def main() -> int:
    """Sample until stdin closes or the parent dies. Exit 3 when this machine has no such gauge."""
    parser = argparse.ArgumentParser(prog="python -m bench.nvml", description=__doc__)
    parser.add_argument("out", type=Path, help="JSON lines file to append to")
    parser.add_argument("--device", required=True, help="GPU-… or MIG-… UUID, or a PCI bus id")
    parser.add_argument("--interval", type=float, help="seconds; default: from the cost of a poll")
    arguments = parser.parse_args()
    parent = os.getppid()
    if library := os.environ.get(LIBRARY_VARIABLE):
        replace_library(library)
    gauge = open_gauge(arguments.device)
    with arguments.out.open("a", encoding="utf-8") as trace:
        if isinstance(gauge, Unavailable):
            _write({"unavailable": gauge.reason}, trace, sys.stdout)
            return 3
        poll_s = statistics.median(_timed_sample(gauge, trace) for _ in range(POLLS_TO_TIME))
        interval_s = arguments.interval or affordable_interval(poll_s)
        _write(
            {"source": gauge.source, "poll_s": poll_s, "interval_s": interval_s}, trace, sys.stdout
        )
        _sample_until_closed(gauge, interval_s, parent, trace)
    return 0


def affordable_interval(poll_s: float) -> float:
    """Seconds between polls: 1 % of a core for polling, as far as 50 to 100 ms allow."""
    return min(max(poll_s / SHARE_OF_CORE, SHORTEST_S), LONGEST_S)


def _sample_until_closed(gauge: Gauge, interval_s: float, parent: int, trace: TextIO) -> None:
    """A forked child of the parent may hold our stdin open, so the parent itself is watched too."""
    due_s = time.monotonic()
    while os.getppid() == parent:
        wait_s = max(0.0, due_s - time.monotonic())
        if select.select([0], [], [], wait_s)[0]:
            asked = os.read(0, 4096)
            if not asked:
                return
            for name in asked.decode().splitlines():
                _write({"mark": name, **_sample(gauge)}, trace, sys.stdout)
        else:
            _write(_sample(gauge), trace)
            due_s = time.monotonic() + interval_s


def _sample(gauge: Gauge) -> dict[str, Any]:
    used = gauge.read()
    value = as_json(used)
    figure = value if isinstance(value, dict) else {"used_bytes": value}
    return {"monotonic_s": time.monotonic(), **figure}


def _timed_sample(gauge: Gauge, trace: TextIO) -> float:
    """Seconds one sample takes, writing included."""
    begun = time.perf_counter()
    _write(_sample(gauge), trace)
    return time.perf_counter() - begun


def _write(line: Mapping[str, Any], *files: TextIO) -> None:
    text = json.dumps(line) + "\n"
    for file in files:
        file.write(text)
        file.flush()


# ---- the worker's side ----


def as_json(figure: int | Unavailable) -> int | dict[str, str]:
    """A figure as records hold it."""
    return {"unavailable": figure.reason} if isinstance(figure, Unavailable) else figure


def read_window(trace: Path, start_s: float, end_s: float) -> Window | Unavailable:
    """Peak of the samples with start_s ≤ time ≤ end_s of `time.monotonic`, one clock for all.

    One failed sample makes the peak unavailable: what it would have shown may have been the peak.
    """
    lines = trace.read_text(encoding="utf-8").splitlines()
    samples = [line for line in map(json.loads, lines) if "monotonic_s" in line]
    inside = [line for line in samples if start_s <= line["monotonic_s"] <= end_s]
    failed = [line["unavailable"] for line in inside if "unavailable" in line]
    if failed:
        return Unavailable(f"{len(failed)} of {len(inside)} samples failed: {failed[0]}")
    if not inside:
        return Unavailable("no sample in this time")
    times = [line["monotonic_s"] for line in inside]
    return Window(
        peak_bytes=max(line["used_bytes"] for line in inside),
        samples=len(inside),
        interval_s=(max(times) - min(times)) / max(1, len(times) - 1),
    )


class Sampler:
    """A running sampler process; whatever it misses or loses becomes an Unavailable."""

    def __init__(self) -> None:
        self.source = ""
        self._lost: Unavailable | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="ilora-bench-nvml-")
        self._trace = Path(self._folder.name) / "device_memory.jsonl"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The sampler's process, which is no part of what is measured."""
        return self._process.pid if self._process else None

    def start(self, device: str) -> Unavailable | None:
        """Start sampling a device given by UUID or PCI bus id; the reason if that is impossible."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.nvml", str(self._trace), "--device", device],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        head = self._answer()
        if isinstance(head, Unavailable):
            return head
        if "unavailable" in head:
            self._lost = Unavailable(head["unavailable"])
            return self._lost
        self.source = head["source"]
        return None

    def mark(self, name: str) -> int | Unavailable:
        """Take a sample now and wait for it; `name` (one line) says in the trace what for."""
        if self._lost is None and self._process and self._process.stdin:
            # A dead sampler has closed the pipe; reading its answer finds out why.
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(f"{name}\n".encode())
        answer = self._answer()
        if isinstance(answer, Unavailable):
            return answer
        if "unavailable" in answer:
            return Unavailable(answer["unavailable"])
        return int(answer["used_bytes"])

    def window(self, start_s: float, end_s: float) -> Window | Unavailable:
        """Peak, number and interval of the samples between two readings of `time.monotonic`."""
        return self._lost or read_window(self._trace, start_s, end_s)

    def stop(self) -> None:
        """End the process and delete its trace."""
        if self._process:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
        self._folder.cleanup()

    def _answer(self) -> dict[str, Any] | Unavailable:
        """The next line of the sampler; after one failure the sampler counts as lost for good."""
        if self._lost:
            return self._lost
        assert self._process and self._process.stdout
        waiting = select.poll()
        waiting.register(self._process.stdout, select.POLLIN)
        if not waiting.poll(ANSWER_S * 1000):
            self._lost = Unavailable(f"the sampler gave no answer in {ANSWER_S:g} s")
        elif line := self._process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        else:
            self._lost = Unavailable(f"the sampler died with status {self._process.wait()}")
        return self._lost


if __name__ == "__main__":
    sys.exit(main())

"""The process that samples one GPU while its parent runs; `sampler` is the parent's side.

`python -m bench.metering.sampler_process OUT.jsonl --device cuda:0` appends one line for each
sample. A line on its stdin asks for a sample at once, which is answered on stdout too; it ends when
stdin closes or its parent dies.
"""

import argparse
import ctypes
import json
import os
import select
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import psutil

from bench import nvml
from bench.nvml import Gauge, Unavailable, as_json

CUDA_VARIABLE = "ILORA_BENCH_CUDA_LIBRARY"
"""`module:object` in place of CUDA's driver; for tests."""
CUDA_DRIVER = "libcuda.so.1"
SHARE_OF_CORE = 0.01
SHORTEST_S = 0.05
"""Torch keeps freed segments, so a sample every 50 to 100 ms sees the peak of its allocator."""
WIDE_S = 0.5
"""Clocks and processes cost more than memory and change less."""
PERIOD_POLL_S, PERIOD_S, PERIOD_MOVES = 0.005, 0.5, 3
"""Watching the energy counter at the start: how often, for how long, and how many moves do."""


class Clock(Protocol):
    """The part of the `time` module that sampling needs; tests pass one that does not wait."""

    def monotonic(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


def main() -> int:
    """Sample until stdin closes or the parent dies. Exit 3 when this machine has no such gauge."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.metering.sampler_process", description=__doc__
    )
    parser.add_argument("out", type=Path, help="JSON lines file to append to")
    parser.add_argument(
        "--device", required=True, help="cuda:N as CUDA counts, GPU-… or MIG-… UUID, or PCI bus id"
    )
    arguments = parser.parse_args()
    parent = os.getppid()
    if library := os.environ.get(nvml.LIBRARY_VARIABLE):
        nvml.replace_library(library)
    device = cuda_uuid(arguments.device)
    gauge = device if isinstance(device, Unavailable) else nvml.open_gauge(device)
    with arguments.out.open("a", encoding="utf-8") as trace:
        if isinstance(gauge, Unavailable):
            _write(as_json(gauge), trace, sys.stdout)
            return 3
        reader = Reader(gauge, parent)
        head = {"device": gauge.device, "source": gauge.source}
        _write({**head, **reader.forced("before CUDA starts")}, trace, sys.stdout)
        _write({"counter_period_s": as_json(counter_period_s(gauge.handle))}, trace)
        _sample_until_closed(reader, parent, trace)
    return 0


def cuda_uuid(device: str) -> str | Unavailable:
    """The UUID of `cuda:N`, asked of CUDA's own driver under this very environment; any other name
    is one already. Makes no context, so it takes no device memory.
    """
    if not device.startswith("cuda:"):
        return device
    library = cuda_library()
    if isinstance(library, Unavailable):
        return library
    number, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    # The newer call knows slices of a GPU; drivers before 11.4 have only the older.
    newest = "cuDeviceGetUuid_v2" if hasattr(library, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
    calls: tuple[tuple[Any, ...], ...] = (
        ("cuInit", 0),
        ("cuDeviceGet", ctypes.byref(number), int(device.removeprefix("cuda:"))),
        (newest, ctypes.byref(raw), number),
    )
    for name, *arguments in calls:
        if code := getattr(library, name)(*arguments):
            return Unavailable(f"{name}: CUDA driver error {code}")
    return f"GPU-{uuid.UUID(bytes=bytes(raw))}"


def cuda_library() -> Any:
    """CUDA's driver library, not yet initialised, or why there is none."""
    if name := os.environ.get(CUDA_VARIABLE):
        return nvml.library_object(name)
    try:
        return ctypes.CDLL(CUDA_DRIVER)
    except OSError as error:
        return Unavailable(f"no CUDA driver: {error}")


class Reader:
    """Takes samples of one device for one worker."""

    def __init__(self, gauge: Gauge, worker: int, clock: Clock = time):
        self._gauge, self._worker, self._clock = gauge, worker, clock
        self._wide_s = -WIDE_S

    def sample(self) -> dict[str, Any]:
        """Time and bytes in use, and whatever else is due."""
        used = as_json(self._gauge.read())
        now_s = self._clock.monotonic()
        found = {"monotonic_s": now_s, "used_bytes": used}
        if now_s - self._wide_s >= WIDE_S:
            self._wide_s = now_s
            found |= nvml.conditions(self._gauge.handle)
            found["processes"] = as_json(nvml.processes(self._gauge.handle, self._is_own))
        return found

    def forced(self, name: str) -> dict[str, Any]:
        """A sample of everything, the cumulative counters included; `name` says what for."""
        self._wide_s = -WIDE_S
        counters = {
            "energy_mj": as_json(nvml.energy_mj(self._gauge.handle)),
            "throttled_ns": as_json(nvml.throttled_ns(self._gauge.handle)),
        }
        return {"mark": name, **self.sample(), **counters}

    def _is_own(self, pid: int) -> bool:
        """Whether a process is the worker or descends from it."""
        if pid == self._worker:
            return True
        try:
            return any(parent.pid == self._worker for parent in psutil.Process(pid).parents())
        except psutil.Error:
            return False


def counter_period_s(handle: Any, clock: Clock = time) -> float | Unavailable:
    """Seconds between two moves of the energy counter, watched for a moment."""
    begun_s = clock.monotonic()
    last: Any = None
    moves: list[float] = []
    while (now_s := clock.monotonic()) - begun_s < PERIOD_S and len(moves) <= PERIOD_MOVES:
        value = nvml.energy_mj(handle)
        if isinstance(value, Unavailable):
            return value
        if last is not None and value != last:
            moves.append(now_s)
        last = value
        clock.sleep(PERIOD_POLL_S)
    if len(moves) < 2:
        return Unavailable(f"the energy counter moved {len(moves)} times in {PERIOD_S} s")
    return (moves[-1] - moves[0]) / (len(moves) - 1)


def affordable_interval(poll_s: float) -> float:
    """Seconds between polls that take poll_s of a core each: 1 % of the core, at least 50 ms."""
    return max(poll_s / SHARE_OF_CORE, SHORTEST_S)


def _sample_until_closed(reader: Reader, parent: int, trace: TextIO) -> None:
    """A forked child of the parent may hold our stdin open, so the parent itself is watched too."""
    due_s, polls, spent_s = time.monotonic(), 0, time.process_time()
    while os.getppid() == parent:
        if select.select([0], [], [], max(0.0, due_s - time.monotonic()))[0]:
            asked = os.read(0, 4096)
            if not asked:
                return
            for name in asked.decode().splitlines():
                _write(reader.forced(name), trace, sys.stdout)
        else:
            _write(reader.sample(), trace)
            polls += 1
            poll_s = (time.process_time() - spent_s) / polls
            due_s = time.monotonic() + affordable_interval(poll_s)


def _write(line: Mapping[str, Any], *files: TextIO) -> None:
    text = json.dumps(line) + "\n"
    for file in files:
        file.write(text)
        file.flush()


if __name__ == "__main__":
    sys.exit(main())

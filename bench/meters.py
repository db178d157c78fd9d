"""Meters of a stage inside the worker: the step clock, and memory from three sources."""

import functools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from bench.nvml import Sampler, Unavailable, as_json
from core.observe import Step

HOST_INTERVAL_S = 0.05
HOST_SHARE_OF_CORE = 0.005
"""For looking alone; waking up costs about as much again, together below 1 % of a core."""
LEAST_SAMPLES = 5
OBSERVED = "observed_step"
NO_CUDA = Unavailable("no CUDA device")

Figures = dict[str, int | Unavailable]


class Meter(Protocol):
    """What is started before a stage and gives its figures after it."""

    warnings: list[str]

    def start(self) -> None: ...

    def stop(self) -> Figures: ...


# ---- time ----


class StepClock:
    """Seconds of each step of a stage, from the end of the step before or the begin of the phase.

    On CUDA an event is recorded at each border and read after the stage, so that timing never
    waits for the device; on the CPU it is `perf_counter`. What lies between two phases (a
    validation) belongs to no step, and the observed step, which runs under a census, is left out.
    """

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"
        self._timed: list[tuple[Any, Any, Step]] = []
        self._begun = self._now()
        self._observed = False

    def on_phase(self, name: str) -> None:
        """A phase begins, or goes on after one inside it has ended."""
        self._observed = self._observed or name == OBSERVED
        self._begun = self._now()

    def on_step(self, step: Step) -> None:
        """A step has ended; the next one begins here."""
        ended = self._now()
        if not self._observed:
            self._timed.append((self._begun, ended, step))
        self._begun, self._observed = ended, False

    def steps(self) -> list[dict[str, Any]]:
        """The steps in order, as records hold them; waits for the device."""
        if self._on_cuda:
            torch.cuda.synchronize()
        return [
            {
                "seconds": self._seconds(begun, ended),
                "samples": step.samples,
                "tokens": step.tokens,
                "padded_tokens": step.padded_tokens,
                "optimizer_step": step.optimizer_step,
            }
            for begun, ended, step in self._timed
        ]

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self, begun: Any, ended: Any) -> float:
        seconds: float = begun.elapsed_time(ended) / 1000 if self._on_cuda else ended - begun
        return seconds


# ---- memory ----


class TorchMemory:
    """Peaks of torch's caching allocator: bytes in tensors, and bytes held from the driver."""

    def __init__(self, device: torch.device):
        self.warnings: list[str] = []
        self._device = device

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)

    def stop(self) -> Figures:
        if self._device.type != "cuda":
            return dict.fromkeys(
                ("torch_allocated_peak_bytes", "torch_reserved_peak_bytes"), NO_CUDA
            )
        torch.cuda.synchronize(self._device)
        return {
            "torch_allocated_peak_bytes": torch.cuda.max_memory_allocated(self._device),
            "torch_reserved_peak_bytes": torch.cuda.max_memory_reserved(self._device),
        }


class DeviceMemory:
    """Peak of the bytes in use on the whole device, whoever uses them, from NVML."""

    def __init__(self, device: torch.device):
        self.warnings: list[str] = []
        self.sampler: Sampler | None = None
        self._device = device
        self._begun_s = 0.0

    def start(self) -> None:
        if self._device.type != "cuda":
            return
        self.sampler = Sampler()
        if self.sampler.start(device_name(self._device)) is None:
            self._begun_s = time.monotonic()
            self.sampler.mark("stage begins")

    def stop(self) -> Figures:
        if self.sampler is None:
            return {"device_peak_bytes": NO_CUDA}
        self.sampler.mark("stage ends")
        window = self.sampler.window(self._begun_s, time.monotonic())
        self.sampler.stop()
        if isinstance(window, Unavailable):
            return {"device_peak_bytes": window}
        if window.samples < LEAST_SAMPLES:
            self.warnings.append(
                f"device memory: undersampled, {window.samples} samples in this stage"
            )
        if "v1" in self.sampler.source:
            self.warnings.append(f"device memory: {self.sampler.source}")
        return {"device_peak_bytes": window.peak_bytes}


def device_name(device: torch.device) -> str:
    """The name NVML knows a CUDA device by; their numbers do not agree.

    Torch tells the UUID of the whole GPU; a MIG slice is known only from CUDA_VISIBLE_DEVICES.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if index < len(visible) and visible[index].strip().startswith("MIG-"):
        return visible[index].strip()
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


class HostMemory:
    """Peak resident bytes of this process and its descendants; shared pages count in each of them.

    A thread looks at the tree; the kernel's own high-water mark of this process, where it can be
    reset, adds the peaks between two looks.
    """

    def __init__(self, apart: int | None = None):
        self.warnings: list[str] = []
        self._apart = apart
        """A child that belongs to the harness, left out."""
        self._peak_bytes = 0
        self._exact = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="host-memory", daemon=True)

    def start(self) -> None:
        self._exact = _reset_high_water_mark()
        self._look()
        self._thread.start()

    def stop(self) -> Figures:
        died = not self._thread.is_alive()
        self._ended.set()
        self._thread.join()
        if died:
            return {"host_peak_bytes": Unavailable("the sampling thread died; see the log")}
        self._look()
        own_bytes = _high_water_mark_bytes() if self._exact else 0
        return {"host_peak_bytes": max(self._peak_bytes, own_bytes)}

    def _watch(self) -> None:
        wait_s = HOST_INTERVAL_S
        while not self._ended.wait(wait_s):
            begun = time.thread_time()
            self._look()
            # Wide trees and old kernels make a look dear: then it is taken less often.
            wait_s = max(HOST_INTERVAL_S, (time.thread_time() - begun) / HOST_SHARE_OF_CORE)

    def _look(self) -> None:
        children = _children_reader()
        pids = [os.getpid()]
        for pid in pids:  # grows while it is walked
            pids += [child for child in children(pid) if child != self._apart]
        self._peak_bytes = max(self._peak_bytes, sum(map(_resident_bytes, pids)))


@functools.cache
def _children_reader() -> Callable[[int], list[int]]:
    """The kernel's list takes microseconds; kernels without it need a walk over all processes."""
    own = Path(f"/proc/self/task/{os.getpid()}/children")
    return _listed_children if own.exists() else _searched_children


def _listed_children(pid: int) -> list[int]:
    try:
        with os.scandir(f"/proc/{pid}/task") as threads:
            paths = [f"{thread.path}/children" for thread in threads]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for path in paths for child in _read(path).split()]


def _searched_children(pid: int) -> list[int]:
    """All descendants at once for this process, none for the others."""
    if pid != os.getpid():
        return []
    return [child.pid for child in psutil.Process().children(recursive=True)]


def _resident_bytes(pid: int) -> int:
    """0 for a process that has ended meanwhile."""
    fields = _read(f"/proc/{pid}/statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


def _read(path: str) -> bytes:
    """A small file of /proc, empty if its process has ended.

    No file object: a loader worker forked meanwhile would copy its lock.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, ProcessLookupError):
        return b""
    try:
        return os.read(descriptor, 1 << 16)
    except ProcessLookupError:
        return b""
    finally:
        os.close(descriptor)


def _reset_high_water_mark() -> bool:
    """Set VmHWM to what this process holds now (proc(5), clear_refs); False where refused."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water_mark_bytes() -> int:
    lines = _read("/proc/self/status").decode().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


# ---- all of them ----


class Meters:
    """The memory meters of one stage; made running by `start`."""

    def __init__(self, device: torch.device):
        device_memory = DeviceMemory(device)
        device_memory.start()
        torch_memory = TorchMemory(device)
        torch_memory.start()
        apart = device_memory.sampler.pid if device_memory.sampler else None
        host_memory = HostMemory(apart)
        host_memory.start()
        self._running: tuple[Meter, ...] = (host_memory, torch_memory, device_memory)

    def stop(self) -> dict[str, int | dict[str, str]]:
        """The record's `memory`: bytes, or {"unavailable": reason}."""
        figures = [meter.stop() for meter in self._running]
        return {name: as_json(value) for part in figures for name, value in part.items()}

    @property
    def warnings(self) -> list[str]:
        """What a reader of the figures must know; complete after `stop`."""
        return [text for meter in self._running for text in meter.warnings]


def start(device: torch.device) -> Meters:
    """Start all memory meters before a stage on this device."""
    return Meters(device)

"""Meters of a stage inside the worker: the step clock, memory from three sources, the device."""

import os
import time
from typing import Any

import torch

from bench.metering.host import Figures, HostMemory, HostNoise, resident_bytes
from bench.metering.sampler import Sampler
from bench.metering.windows import device_figures
from bench.nvml import Unavailable, as_json
from core.observe import Step

OBSERVED, COMPILE = "observed_step", "compile"
NO_CUDA = Unavailable("no CUDA device")
NO_SAMPLER = Unavailable("no sampler runs beside this process")
STARTS = {
    "torch_allocated_start_bytes": "allocated_bytes.all.current",
    "torch_reserved_start_bytes": "reserved_bytes.all.current",
}
PEAKS = {
    "torch_allocated_peak_bytes": "allocated_bytes.all.peak",
    "torch_reserved_peak_bytes": "reserved_bytes.all.peak",
    "torch_reserved_end_bytes": "reserved_bytes.all.current",
    "torch_inactive_split_peak_bytes": "inactive_split_bytes.all.peak",
}
COUNTS = {"torch_alloc_retries": "num_alloc_retries", "torch_ooms": "num_ooms"}
"""Figure of a record -> name in torch.cuda.memory_stats."""
TREND_S, TREND_POINTS = 0.5, 128


# ---- time ----


class StepClock:
    """Seconds of each step of a stage, from the end of the step before or the begin of the phase.

    On CUDA an event is recorded at each border and read after the stage, so that timing never
    waits for the device; on the CPU it is `perf_counter`. What lies between two phases (a
    validation) belongs to no step. Left out are the observed step, which runs under a census, and
    steps in which something was compiled.
    """

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"
        self._timed: list[tuple[Any, Any, Step]] = []
        self._begun = self._now()
        self._observed = False
        self._phase = ""
        self._compiled_in: str | None = None
        """Phase that compiling last interrupted, since the last step: a validation is no step."""
        self.compile_steps = 0

    def on_phase(self, name: str) -> None:
        """A phase begins, or goes on after one inside it has ended."""
        self._observed = self._observed or name == OBSERVED
        if name == COMPILE and self._phase != COMPILE:
            self._compiled_in = self._phase
        self._phase = name
        self._begun = self._now()

    def on_step(self, step: Step) -> None:
        """A step has ended; the next one begins here."""
        ended = self._now()
        compiled = self._compiled_in == self._phase
        self.compile_steps += compiled
        if not (self._observed or compiled):
            self._timed.append((self._begun, ended, step))
        self._begun, self._observed, self._compiled_in = ended, False, None

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
    """Torch's caching allocator: bytes in tensors and bytes held from the driver, at the begin and
    at their peaks; the largest hole in its segments; how often it gave segments back or failed.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._before: dict[str, int] = {}

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_stats(self._device)

    def stop(self) -> Figures:
        if self._device.type != "cuda":
            return dict.fromkeys((*STARTS, *PEAKS, *COUNTS), NO_CUDA)
        torch.cuda.synchronize(self._device)
        before, after = self._before, torch.cuda.memory_stats(self._device)
        return {
            **{name: _known(before, key) for name, key in STARTS.items()},
            **{name: _known(after, key) for name, key in PEAKS.items()},
            **{name: after.get(key, 0) - before.get(key, 0) for name, key in COUNTS.items()},
        }


def _known(stats: dict[str, int], key: str) -> int | Unavailable:
    return stats.get(key, Unavailable(f"this torch keeps no {key}"))


class DeviceWatch:
    """The device of one worker, from before CUDA starts: its sampler, and what was in use then."""

    def __init__(self, device: torch.device, sampler: Sampler | None):
        """Waits for the sampler's first sample, then starts CUDA."""
        self.device = device
        self.sampler = sampler if device.type == "cuda" else None
        self.without = NO_CUDA if device.type != "cuda" else NO_SAMPLER
        """Why there are no figures where there is no sampler."""
        self.baseline_bytes: int | Unavailable = self.without
        self.context_bytes: int | Unavailable = self.without
        if self.sampler:
            self._begin(self.sampler)
        elif sampler:
            sampler.stop()

    def _begin(self, sampler: Sampler) -> None:
        self.baseline_bytes = _used(sampler.baseline())
        torch.cuda.synchronize(self.device)  # starts CUDA, and asks nothing of torch's allocator
        own = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        if sampler.device.startswith("GPU-") and sampler.device != own:
            sampler.give_up(f"sampled {sampler.device}, but torch runs on {own}")
        self.context_bytes = _less(_used(sampler.mark("CUDA has started")), self.baseline_bytes)

    def stop(self) -> None:
        """End the sampler; there are no figures after it."""
        if self.sampler:
            self.sampler.stop()
            self.sampler = None


class DeviceMemory:
    """The whole device during a stage, whoever uses it, from NVML: bytes in use, joules, clocks,
    temperature, what held the clocks down, processes of others.
    """

    def __init__(self, watch: DeviceWatch):
        self.energy_j: float | Unavailable = watch.without
        self.facts: dict[str, Any] = as_json(watch.without)
        self._watch = watch
        self._first: dict[str, Any] | Unavailable = watch.without

    def start(self) -> None:
        if self._watch.sampler:
            self._first = self._watch.sampler.mark("stage begins")

    def stop(self) -> Figures:
        sampler = self._watch.sampler
        last = sampler.mark("stage ends") if sampler else self._watch.without
        return {
            **self._between(self._first, last),
            "device_start_bytes": _used(self._first),
            "device_end_bytes": _used(last),
            "device_baseline_bytes": self._watch.baseline_bytes,
            "device_context_bytes": self._watch.context_bytes,
        }

    def _between(
        self, first: dict[str, Any] | Unavailable, last: dict[str, Any] | Unavailable
    ) -> Figures:
        """The figures that take all samples of the stage."""
        sampler, names = self._watch.sampler, ("peak", "delta_peak", "own")
        samples: Any = first if isinstance(first, Unavailable) else last
        if sampler and isinstance(first, dict) and isinstance(last, dict):
            samples = sampler.samples(first["monotonic_s"], last["monotonic_s"])
        if sampler is None or isinstance(samples, Unavailable):
            self.energy_j, self.facts = samples, as_json(samples)
            return {f"device_{name}_bytes": samples for name in names}
        peak, self.energy_j, own, facts = device_figures(samples, sampler.period_s)
        self.facts = {"name": sampler.device, "source": sampler.source, **facts}
        over = _less(peak, self._watch.baseline_bytes)
        return {f"device_{n}_bytes": v for n, v in zip(names, (peak, over, own), strict=True)}


def _used(sample: dict[str, Any] | Unavailable) -> int | Unavailable:
    if isinstance(sample, Unavailable):
        return sample
    used: int | dict[str, str] = sample["used_bytes"]
    return Unavailable(used["unavailable"]) if isinstance(used, dict) else used


def _less(more: int | Unavailable, less: int | Unavailable) -> int | Unavailable:
    if isinstance(more, Unavailable):
        return more
    return less if isinstance(less, Unavailable) else more - less


class MemoryTrend:
    """Memory against rows processed: what grows with the rows ends in an out-of-memory.

    On CUDA the bytes in tensors, on the CPU the resident bytes; at most one point each half second,
    and of a long stage every second, fourth, … of them.
    """

    def __init__(self, device: torch.device):
        self.points: list[tuple[int, int]] = []
        """(rows so far, bytes)"""
        self.source = "torch_allocated" if device.type == "cuda" else "host_resident"
        self._device, self._rows = device, 0
        self._wait_s, self._last_s = TREND_S, time.monotonic()

    def on_step(self, step: Step) -> None:
        self._rows += step.samples
        if (now_s := time.monotonic()) - self._last_s < self._wait_s:
            return
        self._last_s = now_s
        on_cuda = self._device.type == "cuda"
        held = torch.cuda.memory_allocated(self._device) if on_cuda else resident_bytes(os.getpid())
        self.points.append((self._rows, held))
        if len(self.points) == TREND_POINTS:
            self.points, self._wait_s = self.points[1::2], 2 * self._wait_s

    def as_json(self) -> dict[str, Any]:
        """The record's `memory_by_rows`."""
        return {"source": self.source, "points": [list(point) for point in self.points]}


# ---- all of them ----


class Meters:
    """The meters of one stage beside its clock; made running by `start`."""

    def __init__(self, watch: DeviceWatch):
        # The allocator first: it waits for the device, which a sample of the begin needs too.
        self._torch_memory = TorchMemory(watch.device)
        self._torch_memory.start()
        self._device_memory = DeviceMemory(watch)
        self._device_memory.start()
        self._host_memory = HostMemory(watch.sampler.pid if watch.sampler else None)
        self._host_memory.start()
        self._host_noise = HostNoise()

    def stop(self) -> dict[str, Any]:
        """`memory`, `energy_j`, `device` and `host` of the record."""
        memory = {
            **self._host_memory.stop(),
            **self._torch_memory.stop(),
            **self._device_memory.stop(),
        }
        return {
            "memory": {name: as_json(value) for name, value in memory.items()},
            "energy_j": as_json(self._device_memory.energy_j),
            "device": self._device_memory.facts,
            "host": {n: as_json(value) for n, value in self._host_noise.stop().items()},
        }


def start(watch: DeviceWatch) -> Meters:
    """Start all meters before a stage of the watched worker."""
    return Meters(watch)

"""Traces of NVML played below the real binding: each faulty one gives a figure or a complaint."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_nvml
import nvml_player
import pynvml
import pytest
import torch
from fake_nvml import GIB, SECOND
from nvml_player import Player, Recorder

from bench import meters, nvml
from bench.metering import invariants, noise, sampler, sampler_process
from bench.nvml import Unavailable

TRACES = Path(__file__).parent / "nvml_traces"
CUDA = torch.device("cuda", 0)
WORKER = 1000
"""Number of the worker in the traces made by hand."""
STARTED_S, BEGIN_S, APART_S = 0.75, 1.0, 1 / 16


class FakeTime:
    """Seconds that pass only in sleep."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class Replay:
    """In place of a sampler process: the same reader, in this process and in replayed time."""

    def __init__(self, clock: FakeTime, device: str):
        self.clock, self._samples = clock, list[dict[str, Any]]()
        gauge = nvml.open_gauge(device)
        assert isinstance(gauge, nvml.Gauge), gauge
        self.device, self.source, self._handle = gauge.device, gauge.source, gauge.handle
        self._reader = sampler_process.Reader(gauge, WORKER, clock)
        self.pid = 0
        self.period_s: float | None = None

    def baseline(self) -> dict[str, Any]:
        first = self._reader.forced("before CUDA starts")
        period_s = sampler_process.counter_period_s(self._handle, self.clock)
        self.period_s = period_s if isinstance(period_s, float) else None
        return first

    def mark(self, name: str) -> dict[str, Any]:
        self.clock.now_s = max(self.clock.now_s, BEGIN_S if self._samples else STARTED_S)
        self._samples.append(self._reader.forced(name))
        return self._samples[-1]

    def run(self, seconds: float) -> None:
        end_s = self.clock.now_s + seconds
        while self.clock.now_s < end_s - APART_S:
            self.clock.sleep(APART_S)
            self._samples.append(self._reader.sample())
        self.clock.now_s = end_s

    def samples(self, start_s: float, end_s: float) -> list[dict[str, Any]]:
        return [one for one in self._samples if start_s <= one["monotonic_s"] <= end_s]

    def give_up(self, reason: str) -> Unavailable:
        raise AssertionError(reason)


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Name of a trace -> the record of a stage whose device answered like that."""

    def stage(name: str) -> dict[str, Any]:
        clock = FakeTime()
        player = Player(TRACES / f"{name}.jsonl", clock)
        assert player.head["trace"] in ("made by hand, not recorded", "recorded")
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        monkeypatch.setattr(pynvml, "nvmlLib", player)
        monkeypatch.setattr(nvml, "has_host_pids", lambda: True)
        held = player.head["torch"]
        stats = {
            f"{kind}_bytes.all.{when}": value if when == "peak" else 0
            for kind, value in held.items()
            for when in ("current", "peak")
        }
        properties = SimpleNamespace(uuid=SECOND.removeprefix("GPU-"))
        for function, value in (
            ("synchronize", None),
            ("reset_peak_memory_stats", None),
            ("memory_stats", stats),
            ("get_device_properties", properties),
        ):
            monkeypatch.setattr(torch.cuda, function, lambda device, value=value: value)
        one = Replay(clock, fake_nvml.SLICE if name == "slice" else SECOND)
        watch = meters.DeviceWatch(CUDA, one)  # type: ignore[arg-type]
        running = meters.start(watch)
        one.run(player.head["stage_s"])
        record = {"stage": "s", "wall_s": player.head["stage_s"], **running.stop()}
        record["host"] = {}  # this machine's, not the trace's
        return record | {"tags": noise.tags(record), "warnings": invariants.violations(record)}

    return stage


def at(record: dict[str, Any], place: str) -> Any:
    for part in place.split("."):
        record = record[part]
    return record


QUIET = {
    "memory.device_peak_bytes": 22 * GIB,
    "memory.device_delta_peak_bytes": 43 * GIB // 2,
    "memory.device_baseline_bytes": GIB // 2,
    "memory.device_context_bytes": GIB // 2,
    "memory.device_start_bytes": GIB,
    "memory.device_end_bytes": 21 * GIB,
    "memory.device_own_bytes": 43 * GIB // 2,
    "energy_j": 4000.0,
    "device.name": SECOND,
    "device.samples": 161,
    "device.interval_s": APART_S,
    "device.sm_mhz": [1755, 1980],
    "device.temperature_c": [38, 61],
    "device.throttled_s": dict.fromkeys(nvml.THROTTLES, 0),
    "device.counter_period_s": pytest.approx(0.1, abs=0.006),
    "device.foreign_processes": [],
    "tags": [],
    "warnings": [],
}
LOST = "GPU is lost"
OTHERS = "this process is not among the 1 that NVML lists: their numbers are not ours"
EXPECTED: dict[str, dict[str, Any]] = {
    "normal": QUIET,
    "foreign_process": QUIET
    | {
        "memory.device_peak_bytes": int(22 * GIB) + int(2.1 * GIB),
        "memory.device_delta_peak_bytes": int(21.5 * GIB) + int(2.1 * GIB),
        "memory.device_end_bytes": 21 * GIB + int(2.1 * GIB),
        "device.foreign_processes": [{"pid": 4242, "name": "python3", "bytes": int(2.1 * GIB)}],
        "tags": ["foreign process: 4242 python3 2.10 GiB"],
    },
    "throttled": QUIET
    | {
        "device.throttled_s": dict.fromkeys(nvml.THROTTLES, 0) | {"power": 1.2},
        "tags": [
            "throttled: power 12 % of the stage",
            "slowed down: hw thermal in 3 of 21 readings",
        ],
    },
    "no_process_figure": QUIET
    | {
        "memory.device_own_bytes": {
            "unavailable": "NVML lists this process without a figure",
        },
    },
    "gpu_lost": {
        "memory.device_peak_bytes.unavailable": f"samples failed: nvmlDeviceGetMemoryInfo: {LOST}",
        "memory.device_delta_peak_bytes.unavailable": LOST,
        "memory.device_start_bytes": GIB,
        "memory.device_end_bytes.unavailable": LOST,
        "energy_j.unavailable": LOST,
        "device.sm_mhz": [1755, 1980],
    },
    "wrong_index": {
        "memory.device_peak_bytes": 3 * GIB,
        "warnings": [
            "memory: device_own_bytes 21.50 GiB is above device_peak_bytes 3.00 GiB",
            "memory: the device showed 0.00 GiB more than before while torch held 21.00 GiB: "
            "another device, another process's end, or a sampler that missed it; torch gave memory "
            "back, so the peak may lie between two samples 0.06 s apart",
        ],
    },
    "pid_namespace": QUIET
    | {
        "memory.device_own_bytes": {"unavailable": OTHERS},
        "device.foreign_processes": {"unavailable": OTHERS},
    },
    "short_window": {
        "memory.device_peak_bytes": 15 * GIB,
        "energy_j.unavailable": "too short: 1 s of a counter that moves every",
        "device.throttled_s": dict.fromkeys(nvml.THROTTLES),
        "warnings": [],
    },
    "old_driver": {
        "memory.device_peak_bytes": 45 * GIB // 2,
        "memory.device_delta_peak_bytes": 43 * GIB // 2,
        "memory.device_own_bytes.unavailable": "nvmlDeviceGetComputeRunningProcesses",
        "energy_j.unavailable": "Function Not Found",
        "device.throttled_s.unavailable": "Function Not Found",
        "device.slowdowns": {},
        "tags": [],
        "warnings": [
            "device memory: NVML memory v1, driver-reserved included (v2: "
            "nvmlDeviceGetMemoryInfo: Function Not Found)",
        ],
    },
    "slice": {
        "memory.device_peak_bytes": 22 * GIB,
        "memory.device_own_bytes": 43 * GIB // 2,
        "energy_j.unavailable": "Not Supported",
        "device.name": fake_nvml.SLICE,
        "device.sm_mhz.unavailable": "Not Supported",
        "device.throttled_s.unavailable": "Not Supported",
        "tags": [],
        "warnings": [],
    },
    "no_permission": {
        "memory.device_peak_bytes": 22 * GIB,
        "memory.device_own_bytes.unavailable": "Insufficient Permissions",
        "device.temperature_c.unavailable": "Insufficient Permissions",
        "device.foreign_processes.unavailable": "Insufficient Permissions",
        "energy_j": 4000.0,
        "warnings": [],
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_trace_gives_the_figure_or_the_complaint(replay: Callable, name: str) -> None:
    record = replay(name)
    for place, expected in EXPECTED[name].items():
        found = at(record, place)
        if place.endswith("unavailable"):
            assert expected in found, place
        elif place == "device.throttled_s" and name == "short_window":
            assert all("too short" in value["unavailable"] for value in found.values())
        else:
            assert found == expected, place


def test_every_trace_is_in_the_table() -> None:
    traces = {path.stem for path in TRACES.glob("*.jsonl")}
    by_hand = {
        path.stem
        for path in TRACES.glob("*.jsonl")
        if json.loads(path.open(encoding="utf-8").readline())["trace"] != "recorded"
    }
    assert by_hand == set(EXPECTED) | {"dead_sampler"}
    assert traces >= by_hand


def test_a_sampler_that_is_killed_within_the_stage_is_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TRACES.parent))
    monkeypatch.setenv(nvml.LIBRARY_VARIABLE, "nvml_player:player")
    monkeypatch.setenv(nvml_player.TRACE_VARIABLE, str(TRACES / "dead_sampler.jsonl"))
    one = sampler.Sampler(SECOND)
    assert isinstance(one.baseline(), dict)
    os.waitid(os.P_PID, one.pid, os.WEXITED | os.WNOWAIT)
    assert one.mark("stage ends") == Unavailable("the sampler died with status -9")
    one.stop()


# ---- recorder ----


def read_all(device: str) -> list[Any]:
    gauge = nvml.open_gauge(device)
    assert isinstance(gauge, nvml.Gauge)
    return [
        gauge.source,
        gauge.read(),
        nvml.conditions(gauge.handle),
        nvml.energy_mj(gauge.handle),
        nvml.throttled_ns(gauge.handle),
        nvml.processes(gauge.handle, lambda pid: pid == 100),
    ]


@pytest.mark.parametrize("kind", [fake_nvml.Telling, fake_nvml.OlderDriver, fake_nvml.OldLibrary])
def test_what_was_recorded_is_played_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: type
) -> None:
    library = kind()
    library.pids = {100: 5, 200: None}
    library.reasons, library.refused_fields = 0x80, (76,)
    monkeypatch.setattr(nvml, "has_host_pids", lambda: True)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    with (tmp_path / "t.jsonl").open("w") as file:
        monkeypatch.setattr(pynvml, "nvmlLib", Recorder(library, file))
        recorded = read_all(SECOND)
    pynvml._nvmlGetFunctionPointer_cache.clear()
    monkeypatch.setattr(pynvml, "nvmlLib", Player(tmp_path / "t.jsonl", FakeTime()))
    assert read_all(SECOND) == recorded
    assert isinstance(nvml.open_gauge(fake_nvml.FIRST), Unavailable)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_trace_of_this_machine_is_recorded_and_played(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """NVML_TRACE=FILE keeps the trace: a recorded one belongs beside those made by hand."""
    trace = Path(os.environ.get(nvml_player.TRACE_VARIABLE) or tmp_path / "recorded.jsonl")
    monkeypatch.setenv("PYTHONPATH", str(TRACES.parent))
    monkeypatch.setenv(nvml.LIBRARY_VARIABLE, "nvml_player:recorder")
    monkeypatch.setenv(nvml_player.TRACE_VARIABLE, str(trace))
    watch = meters.DeviceWatch(CUDA, sampler.start("auto"))
    running = meters.start(watch)
    block = torch.zeros(1 << 30, dtype=torch.uint8, device=CUDA)
    for _ in range(200):
        block.mul_(1).add_(1)
        torch.cuda.synchronize()
    record = {"stage": "s", "wall_s": 3.0, **running.stop()}
    watch.stop()
    peak_bytes = record["memory"]["device_peak_bytes"]
    if isinstance(peak_bytes, dict):
        pytest.skip(peak_bytes["unavailable"])
    assert invariants.violations(record) == []
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert lines[0] == {"trace": "recorded"}
    clock = FakeTime()
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(pynvml, "nvmlLib", Player(trace, clock))
    gauge = nvml.open_gauge(record["device"]["name"])
    assert isinstance(gauge, nvml.Gauge)
    clock.sleep(lines[-1]["time_s"] - lines[1]["time_s"])
    assert gauge.read() == record["memory"]["device_end_bytes"]

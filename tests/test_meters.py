"""Meters of a stage: what a step's seconds contain, and where each figure comes from."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import fake_nvml
import pytest
import torch

from bench import meters, nvml
from bench.metering import invariants, sampler, sampler_process
from bench.meters import DeviceMemory, DeviceWatch, StepClock, TorchMemory
from bench.nvml import Unavailable
from core.observe import Observer, Step

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MIB = 1 << 20


# ---- step clock ----


class FakeTime:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class FakeEvent:
    """A CUDA event of the fake time, readable only once the device was waited for."""

    time: FakeTime
    waited = False

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = self.time.now

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert FakeEvent.waited, "read before the device was waited for"
        return 1000 * (end.at - self.at)


@pytest.fixture(params=[CPU, CUDA], ids=["cpu", "cuda"])
def clock(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimpleNamespace]:
    """A step clock, an observer that drives it, and `after(seconds)`."""
    fake = FakeTime()
    monkeypatch.setattr(meters, "time", fake)
    monkeypatch.setattr(FakeEvent, "time", fake, raising=False)
    monkeypatch.setattr(FakeEvent, "waited", False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(FakeEvent, "waited", True))
    one = StepClock(request.param)

    def after(seconds: float) -> None:
        fake.now += seconds

    yield SimpleNamespace(
        steps=one.steps,
        compile_steps=lambda: one.compile_steps,
        observer=Observer(one.on_step, one.on_phase),
        after=after,
    )


def seconds(clock: SimpleNamespace) -> list[float]:
    return [round(step["seconds"], 9) for step in clock.steps()]


def test_a_step_lasts_from_the_step_before_it(clock: SimpleNamespace) -> None:
    clock.after(50)
    with clock.observer.phase("train_steps"):
        for wait in (1, 2, 4):
            clock.after(wait)
            clock.observer.step(8, 40, 64, optimizer_step=wait == 4)
    assert seconds(clock) == [1, 2, 4]
    assert clock.steps()[2] == {
        "seconds": pytest.approx(4),
        "samples": 8,
        "tokens": 40,
        "padded_tokens": 64,
        "optimizer_step": True,
    }


def test_validation_belongs_to_no_step(clock: SimpleNamespace) -> None:
    for _ in range(2):
        with clock.observer.phase("train_steps"):
            clock.after(1)
            clock.observer.step(8)
        clock.after(5)
        with clock.observer.phase("validation"):
            clock.after(100)
        clock.after(5)
    assert seconds(clock) == [1, 1]


def test_a_phase_inside_the_steps_belongs_to_no_step(clock: SimpleNamespace) -> None:
    with clock.observer.phase("train_steps"):
        clock.after(1)
        clock.observer.step(8)
        with clock.observer.phase("validation"):
            clock.after(100)
        clock.after(2)
        clock.observer.step(8)
    assert seconds(clock) == [1, 2]


def test_the_observed_step_is_left_out(clock: SimpleNamespace) -> None:
    with clock.observer.phase("train_steps"):
        for index in range(3):
            clock.after(0.25)
            with clock.observer.first_step():
                clock.after(90 if index == 0 else 1)
            clock.after(0.5)
            clock.observer.step(index)
    assert clock.observer.phases["observed_step"] >= 0
    assert seconds(clock) == [1.75, 1.75]
    assert [step["samples"] for step in clock.steps()] == [1, 2]


def test_steps_that_compiled_are_left_out_and_counted(clock: SimpleNamespace) -> None:
    """Once in the forward, twice where a backward is compiled apart."""
    with clock.observer.phase("train_steps"):
        for compiles in (1, 2, 0, 0, 1):
            clock.after(0.25)
            for _ in range(compiles):
                with clock.observer.phase("compile"):
                    clock.after(60)
                clock.after(0.5)
            clock.after(0.75)
            clock.observer.step(compiles)
    assert seconds(clock) == [1, 1]
    assert clock.compile_steps() == 3


def test_compiling_in_a_validation_spoils_no_step(clock: SimpleNamespace) -> None:
    for trainer_closes_its_phase in (True, False):
        with clock.observer.phase("train_steps"):
            clock.after(1)
            clock.observer.step(8)
            if not trainer_closes_its_phase:
                validate(clock)
            clock.after(1)
            clock.observer.step(8)
        if trainer_closes_its_phase:
            validate(clock)
    assert seconds(clock) == [1, 1, 1, 1]
    assert clock.compile_steps() == 0


def validate(clock: SimpleNamespace) -> None:
    with clock.observer.phase("validation"):
        clock.after(1)
        with clock.observer.phase("compile"):
            clock.after(60)
        clock.after(1)


def test_a_stage_without_steps_has_none(clock: SimpleNamespace) -> None:
    with clock.observer.phase("data"):
        clock.after(3)
    assert clock.steps() == []


def test_real_time_passes_on_the_cpu() -> None:
    one = StepClock(CPU)
    one.on_phase("train_steps")
    time.sleep(0.05)
    one.on_step(Step(1, 0, 0, True))
    assert 0.05 <= one.steps()[0]["seconds"] < 1


# ---- torch's allocator and the device ----

STATS = {
    "allocated_bytes.all.current": 2,
    "reserved_bytes.all.current": 3,
    "allocated_bytes.all.peak": 5,
    "reserved_bytes.all.peak": 7,
    "inactive_split_bytes.all.peak": 1,
    "num_alloc_retries": 4,
    "num_ooms": 0,
}


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CUDA device with fixed statistics; gives the list of calls made."""
    calls: list[str] = []

    def said(name: str, value: object = None) -> None:
        def call(device: torch.device | int | None = None) -> object:
            calls.append(name)
            return value

        monkeypatch.setattr(torch.cuda, name, call)

    said("synchronize")
    said("reset_peak_memory_stats")
    said("memory_stats", STATS)
    said("memory_allocated", 9)
    said("get_device_properties", SimpleNamespace(uuid=fake_nvml.SECOND.removeprefix("GPU-")))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv(nvml.LIBRARY_VARIABLE, "fake_nvml:normal")
    monkeypatch.setenv(sampler_process.CUDA_VARIABLE, "fake_nvml:cuda")
    return calls


@pytest.fixture
def watch(fake_cuda: list[str]) -> Iterator[Callable[[], DeviceWatch]]:
    """Makes watches as a worker does, and ends them with the test."""
    made: list[DeviceWatch] = []

    def make(device: torch.device = CUDA) -> DeviceWatch:
        made.append(DeviceWatch(device, sampler.start("auto")))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def test_the_allocator_is_reset_before_and_read_after_the_work(
    fake_cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = TorchMemory(CUDA)
    meter.start()
    assert fake_cuda == ["synchronize", "reset_peak_memory_stats", "memory_stats"]
    fake_cuda.clear()
    later = STATS | {
        "allocated_bytes.all.peak": 50,
        "reserved_bytes.all.peak": 70,
        "reserved_bytes.all.current": 60,
        "num_alloc_retries": 6,
    }
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: later)
    assert meter.stop() == {
        "torch_allocated_start_bytes": 2,
        "torch_reserved_start_bytes": 3,
        "torch_allocated_peak_bytes": 50,
        "torch_reserved_peak_bytes": 70,
        "torch_reserved_end_bytes": 60,
        "torch_inactive_split_peak_bytes": 1,
        "torch_alloc_retries": 2,
        "torch_ooms": 0,
    }
    assert fake_cuda[0] == "synchronize"


def test_a_statistic_another_torch_lacks_is_a_reason(
    fake_cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_ooms": 1})
    meter = TorchMemory(CUDA)
    meter.start()
    found = meter.stop()
    assert found["torch_allocated_peak_bytes"] == Unavailable(
        "this torch keeps no allocated_bytes.all.peak"
    )


def test_the_baseline_is_taken_before_cuda_starts(
    fake_cuda: list[str], watch: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(nvml.LIBRARY_VARIABLE, "fake_nvml:rising")
    one = watch()
    assert fake_cuda == ["synchronize", "get_device_properties"]
    assert 0 < one.baseline_bytes < 1 << 30
    assert one.context_bytes > 0


def test_device_memory_is_that_of_the_device_torch_uses(watch: Callable) -> None:
    meter = DeviceMemory(watch())
    meter.start()
    time.sleep(0.3)
    found = meter.stop()
    used = fake_nvml.USED[1]
    assert {name: found[name] for name in found if name != "device_own_bytes"} == {
        "device_peak_bytes": used,
        "device_delta_peak_bytes": 0,
        "device_start_bytes": used,
        "device_end_bytes": used,
        "device_baseline_bytes": used,
        "device_context_bytes": 0,
    }
    assert isinstance(found["device_own_bytes"], Unavailable)
    assert meter.facts["name"] == fake_nvml.SECOND
    assert meter.facts["samples"] >= 5
    assert 0.04 < meter.facts["interval_s"] < 0.2


def test_stages_of_a_worker_share_a_sampler_and_a_baseline(
    watch: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(nvml.LIBRARY_VARIABLE, "fake_nvml:rising")
    one = watch()
    found = []
    for _ in range(2):
        meter = DeviceMemory(one)
        meter.start()
        found.append(meter.stop())
    assert found[0]["device_baseline_bytes"] == found[1]["device_baseline_bytes"]
    assert found[0]["device_peak_bytes"] < found[1]["device_start_bytes"]


def test_another_device_than_torchs_gives_no_figure(
    watch: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sampler_process.CUDA_VARIABLE, "fake_nvml:cuda_reversed")
    meter = DeviceMemory(watch())
    meter.start()
    wrong = Unavailable(f"sampled {fake_nvml.FIRST}, but torch runs on {fake_nvml.SECOND}")
    assert meter.stop()["device_peak_bytes"] == wrong
    assert meter.energy_j == wrong
    assert meter.facts == {"unavailable": wrong.reason}


def test_a_slice_is_not_held_against_torchs_name_of_the_gpu(
    watch: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sampler_process.CUDA_VARIABLE, "fake_nvml:cuda_slice")
    meter = DeviceMemory(watch())
    meter.start()
    assert meter.stop()["device_peak_bytes"] == fake_nvml.USED[2]


def test_what_a_record_on_a_gpu_holds(watch: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nvml.LIBRARY_VARIABLE, "fake_nvml:telling")
    found = meters.start(watch()).stop()
    assert set(found) == {"memory", "energy_j", "device", "host"}
    assert found["memory"]["host_peak_bytes"] > 10 * MIB
    assert found["memory"]["torch_reserved_peak_bytes"] == 7
    assert found["memory"]["device_peak_bytes"] == fake_nvml.USED[1]
    assert "too short" in found["energy_j"]["unavailable"]
    assert found["device"]["sm_mhz"] == [1980, 1980]
    json.dumps(found, allow_nan=False)


def test_the_memory_of_a_record_where_nvml_is_absent(
    watch: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(nvml.LIBRARY_VARIABLE, "fake_nvml:absent")
    found = meters.start(watch()).stop()
    reason = {"unavailable": "no NVML library: NVML Shared Library Not Found"}
    assert found["memory"]["device_peak_bytes"] == found["device"] == found["energy_j"] == reason
    assert found["memory"]["torch_reserved_peak_bytes"] == 7


def test_the_memory_of_a_record_without_a_gpu_holds_reasons() -> None:
    found = meters.start(DeviceWatch(CPU, None)).stop()
    memory = found["memory"]
    assert memory.pop("host_peak_bytes") > 10 * MIB
    memory.pop("host_pss_bytes")
    missing = {"unavailable": "no CUDA device"}
    assert len(memory) == 15
    assert all(value == missing for value in memory.values())
    assert found["energy_j"] == found["device"] == missing


def test_a_worker_that_chose_the_cpu_ends_its_sampler(fake_cuda: list[str]) -> None:
    begun = sampler.start("auto")
    assert begun is not None
    one = DeviceWatch(CPU, begun)
    assert one.sampler is None
    assert begun._process.returncode == -9
    assert meters.start(one).stop()["device"] == {"unavailable": "no CUDA device"}


# ---- memory against rows ----


@pytest.mark.parametrize(("device", "source"), [(CPU, "host_resident"), (CUDA, "torch_allocated")])
def test_the_trend_takes_a_point_now_and_then(
    fake_cuda: list[str], monkeypatch: pytest.MonkeyPatch, device: torch.device, source: str
) -> None:
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(meters, "time", SimpleNamespace(monotonic=lambda: now.s))
    trend = meters.MemoryTrend(device)
    for _ in range(10):
        now.s += 0.2
        trend.on_step(Step(8, 0, 0, True))
    found = trend.as_json()
    assert found["source"] == source
    assert [rows for rows, _ in found["points"]] == [24, 48, 72]
    assert all(held > 0 for _, held in found["points"])


def test_a_long_trend_stays_short(fake_cuda: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(meters, "time", SimpleNamespace(monotonic=lambda: now.s))
    trend = meters.MemoryTrend(CUDA)
    for _ in range(2000):
        now.s += 1.0
        trend.on_step(Step(1, 0, 0, True))
    rows = [rows for rows, _ in trend.points]
    assert meters.TREND_POINTS // 2 <= len(rows) < meters.TREND_POINTS
    assert rows == sorted(rows)
    assert rows[0] < 64
    assert rows[-1] > 1900


# ---- a real GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_device_holds_what_torch_reserves() -> None:
    one = DeviceWatch(CUDA, sampler.start("auto"))
    running = meters.start(one)
    block = torch.zeros(1 << 30, dtype=torch.uint8, device=CUDA)
    time.sleep(0.4)
    del block
    record = {"stage": "s", "wall_s": 0.4, **running.stop()}
    one.stop()
    memory = record["memory"]
    if isinstance(memory["device_peak_bytes"], dict):
        pytest.skip(memory["device_peak_bytes"]["unavailable"])
    assert 1 << 30 <= memory["torch_allocated_peak_bytes"] <= memory["torch_reserved_peak_bytes"]
    assert invariants.violations(record) == []

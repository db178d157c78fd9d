"""Meters of a stage: what a step's seconds contain, and where each memory figure comes from."""

import mmap
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import fake_nvml
import pytest
import torch

from bench import meters, nvml
from bench.meters import DeviceMemory, HostMemory, StepClock, TorchMemory
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
        steps=one.steps, observer=Observer(one.on_step, one.on_phase), after=after
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


# ---- host memory ----

ALLOCATE = """
import sys, time
held = bytearray(200 << 20)
held[::4096] = b"x" * len(held[::4096])
print("held", flush=True)
sys.stdin.read()
"""


def child() -> subprocess.Popen[bytes]:
    one = subprocess.Popen(
        [sys.executable, "-c", ALLOCATE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert one.stdout
    assert one.stdout.readline() == b"held\n"
    return one


def end(one: subprocess.Popen[bytes]) -> None:
    one.communicate()


def touched(size_mib: int) -> mmap.mmap:
    """Resident memory of its own mapping: an allocator may hand out pages it kept from before."""
    held = mmap.mmap(-1, size_mib * MIB)
    held[::4096] = b"x" * len(held[::4096])
    return held


def peak(meter: HostMemory) -> int:
    found = meter.stop()["host_peak_bytes"]
    assert isinstance(found, int)
    return found


@pytest.fixture(params=["listed", "searched"])
def children(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to find the processes of a tree."""
    reader: Callable = getattr(meters, f"_{request.param}_children")
    if request.param == "listed" and meters._children_reader() is not reader:
        pytest.skip("this kernel lists no children")
    monkeypatch.setattr(meters, "_children_reader", lambda: reader)
    # However many processes this machine has, look at them often.
    monkeypatch.setattr(meters, "HOST_SHARE_OF_CORE", 1)


def test_a_child_that_lives_inside_the_stage_counts(children: None) -> None:
    meter = HostMemory()
    meter.start()
    before = meters._resident_bytes(meters.os.getpid())
    one = child()
    time.sleep(0.4)
    end(one)
    assert before + 200 * MIB <= peak(meter) < before + 300 * MIB


def test_a_child_of_the_harness_does_not_count(children: None) -> None:
    one = child()
    meter = HostMemory(apart=one.pid)
    meter.start()
    before = meters._resident_bytes(meters.os.getpid())
    time.sleep(0.2)
    found = peak(meter)
    end(one)
    assert found < before + 100 * MIB


def test_a_grandchild_counts() -> None:
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ALLOCATE!r}])"
    meter = HostMemory()
    meter.start()
    before = meters._resident_bytes(meters.os.getpid())
    one = subprocess.Popen(
        [sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert one.stdout
    one.stdout.readline()
    time.sleep(0.2)
    end(one)
    assert peak(meter) >= before + 200 * MIB


def test_a_peak_between_two_looks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    if not meters._reset_high_water_mark():
        pytest.skip("this kernel does not reset VmHWM")
    monkeypatch.setattr(meters, "HOST_INTERVAL_S", 60)
    before = meters._resident_bytes(meters.os.getpid())
    meter = HostMemory()
    meter.start()
    del_me = touched(200)
    del del_me
    assert peak(meter) >= before + 190 * MIB


def test_the_peak_of_an_earlier_stage_is_forgotten() -> None:
    if not meters._reset_high_water_mark():
        pytest.skip("this kernel does not reset VmHWM")
    del_me = touched(200)
    high = meters._high_water_mark_bytes()
    del del_me
    meter = HostMemory()
    meter.start()
    assert peak(meter) < high - 150 * MIB


def test_where_the_mark_cannot_be_reset_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "_reset_high_water_mark", lambda: False)
    monkeypatch.setattr(meters, "_high_water_mark_bytes", lambda: 1 << 50)
    meter = HostMemory()
    meter.start()
    assert 10 * MIB < peak(meter) < 1 << 50


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_sampling_thread_leaves_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "HOST_INTERVAL_S", 0.001)
    meter = HostMemory()
    meter.start()

    def broken() -> None:
        raise OSError("no /proc")

    monkeypatch.setattr(meter, "_look", broken)
    meter._thread.join(5)
    assert isinstance(meter.stop()["host_peak_bytes"], Unavailable)


def test_looking_costs_less_than_a_hundredth_of_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where one look is dear: it is then taken less often."""
    looks = []

    def dear_look(self: HostMemory) -> None:
        looks.append(time.thread_time())
        while time.thread_time() - looks[-1] < 0.002:
            pass

    monkeypatch.setattr(HostMemory, "_look", dear_look)
    meter = HostMemory()
    meter.start()
    begun, spent = time.perf_counter(), time.process_time()
    time.sleep(1)
    share = (time.process_time() - spent) / (time.perf_counter() - begun)
    assert len(looks) >= 3
    assert share < 0.012
    meter.stop()


# ---- torch's allocator and the device ----


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CUDA device with fixed peaks; gives the list of calls made."""
    calls: list[str] = []

    def said(name: str, value: object = None) -> None:
        def call(device: torch.device | int | None = None) -> object:
            calls.append(name)
            return value

        monkeypatch.setattr(torch.cuda, name, call)

    said("synchronize")
    said("reset_peak_memory_stats")
    said("max_memory_allocated", 5)
    said("max_memory_reserved", 7)
    said("current_device", 0)
    said("get_device_properties", SimpleNamespace(uuid=fake_nvml.SECOND.removeprefix("GPU-")))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv(nvml.LIBRARY_VARIABLE, "fake_nvml:normal")
    return calls


def test_the_allocator_is_reset_before_and_read_after_the_work(fake_cuda: list[str]) -> None:
    meter = TorchMemory(CUDA)
    meter.start()
    assert fake_cuda == ["synchronize", "reset_peak_memory_stats"]
    fake_cuda.clear()
    assert meter.stop() == {"torch_allocated_peak_bytes": 5, "torch_reserved_peak_bytes": 7}
    assert fake_cuda[0] == "synchronize"


def test_device_memory_is_that_of_the_device_torch_uses(fake_cuda: list[str]) -> None:
    meter = DeviceMemory(CUDA)
    meter.start()
    time.sleep(0.4)
    assert meter.stop() == {"device_peak_bytes": fake_nvml.USED[1]}
    assert meter.warnings == []


def test_a_stage_too_short_to_sample_is_said_to_be(fake_cuda: list[str]) -> None:
    meter = DeviceMemory(CUDA)
    meter.start()
    meter.stop()
    assert "undersampled" in meter.warnings[0]


def test_a_figure_with_the_drivers_reserve_is_said_to_have_it(
    fake_cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(nvml.LIBRARY_VARIABLE, "fake_nvml:lost_later")
    meter = DeviceMemory(CUDA)
    meter.start()
    assert meter.stop() == {"device_peak_bytes": fake_nvml.USED[1] + fake_nvml.RESERVED}
    assert "v1, driver-reserved included" in meter.warnings[-1]


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        (None, fake_nvml.SECOND),
        ("3", fake_nvml.SECOND),
        ("GPU-22222222", fake_nvml.SECOND),
        ("MIG-5c89", "MIG-5c89"),
    ],
)
def test_a_device_is_named_as_nvml_knows_it(
    fake_cuda: list[str], monkeypatch: pytest.MonkeyPatch, visible: str | None, name: str
) -> None:
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert meters.device_name(CUDA) == name
    assert meters.device_name(torch.device("cuda")) == name


def test_the_memory_of_a_record_on_a_gpu(fake_cuda: list[str]) -> None:
    running = meters.start(CUDA)
    memory = running.stop()
    assert memory.pop("host_peak_bytes") > 10 * MIB  # type: ignore[operator]
    assert memory == {
        "torch_allocated_peak_bytes": 5,
        "torch_reserved_peak_bytes": 7,
        "device_peak_bytes": fake_nvml.USED[1],
    }
    assert "undersampled" in running.warnings[0]


def test_the_memory_of_a_record_where_nvml_is_absent(
    fake_cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(nvml.LIBRARY_VARIABLE, "fake_nvml:absent")
    memory = meters.start(CUDA).stop()
    assert memory["device_peak_bytes"] == {
        "unavailable": "no NVML library: NVML Shared Library Not Found"
    }
    assert memory["torch_reserved_peak_bytes"] == 7


def test_the_memory_of_a_record_without_a_gpu_holds_reasons() -> None:
    running = meters.start(CPU)
    memory = running.stop()
    assert memory.pop("host_peak_bytes") > 10 * MIB  # type: ignore[operator]
    missing = {"unavailable": "no CUDA device"}
    assert memory == {
        "torch_allocated_peak_bytes": missing,
        "torch_reserved_peak_bytes": missing,
        "device_peak_bytes": missing,
    }
    assert running.warnings == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_device_holds_what_torch_reserves() -> None:
    running = meters.start(CUDA)
    block = torch.zeros(1 << 30, dtype=torch.uint8, device=CUDA)
    del block
    memory = running.stop()
    device_bytes = memory["device_peak_bytes"]
    if isinstance(device_bytes, dict):
        pytest.skip(device_bytes["unavailable"])
    allocated_bytes = memory["torch_allocated_peak_bytes"]
    assert 1 << 30 <= allocated_bytes <= memory["torch_reserved_peak_bytes"] <= device_bytes

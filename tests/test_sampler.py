"""The sampler process and the worker's hold on it, over fake libraries below the real binding."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_nvml
import psutil
import pynvml
import pytest
from fake_nvml import FIRST, SECOND, SLICE, USED
from hypothesis import given
from hypothesis import strategies as some

from bench import nvml
from bench.metering import sampler, sampler_process
from bench.metering.sampler import Sampler
from bench.nvml import Unavailable

ROOT = Path(__file__).parent.parent


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Names the fakes that a sampler process will load."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def use(name: str, cuda: str = "cuda") -> None:
        monkeypatch.setenv(nvml.LIBRARY_VARIABLE, f"fake_nvml:{name}")
        monkeypatch.setenv(sampler_process.CUDA_VARIABLE, f"fake_nvml:{cuda}")

    return use


@pytest.fixture
def begin() -> Iterator[Callable[..., Sampler]]:
    """Starts samplers that end with the test."""
    begun: list[Sampler] = []

    def start(device: str = "cuda:0") -> Sampler:
        begun.append(Sampler(device))
        return begun[-1]

    yield start
    for one in begun:
        one.stop()


# ---- which device ----


@pytest.mark.parametrize(
    ("device", "name"),
    [("cuda:0", SECOND), ("cuda:1", FIRST), (FIRST, FIRST), ("0000:41:00.0", "0000:41:00.0")],
)
def test_a_number_means_what_cuda_means_by_it(
    library: Callable, monkeypatch: pytest.MonkeyPatch, device: str, name: str
) -> None:
    """CUDA alone applies CUDA_VISIBLE_DEVICES and its own order; NVML's order is another."""
    monkeypatch.setenv(sampler_process.CUDA_VARIABLE, "fake_nvml:cuda")
    assert sampler_process.cuda_uuid(device) == name


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (fake_nvml.Cuda(), "cuDeviceGet: CUDA driver error 101"),
        (Unavailable("no CUDA driver: gone"), "no CUDA driver: gone"),
    ],
)
def test_a_number_nobody_knows_has_a_reason(
    monkeypatch: pytest.MonkeyPatch, driver: Any, reason: str
) -> None:
    monkeypatch.setattr(sampler_process, "cuda_library", lambda: driver)
    assert sampler_process.cuda_uuid("cuda:0") == Unavailable(reason)


def test_the_slice_that_cuda_chose_is_sampled(library: Callable, begin: Callable) -> None:
    library("normal", "cuda_slice")
    one = begin()
    head = one.baseline()
    assert one.device == SLICE
    assert head["used_bytes"] == USED[2]


def test_there_is_no_sampler_where_there_is_nothing_to_sample(
    library: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    library("normal")
    assert sampler.start("cpu") is None
    monkeypatch.delenv(sampler_process.CUDA_VARIABLE)
    monkeypatch.setattr(sampler_process, "CUDA_DRIVER", "libnone.so")
    assert sampler.start("auto") is None


# ---- how often ----


@given(some.floats(0, 10))
def test_polling_costs_a_hundredth_of_a_core(poll_s: float) -> None:
    interval_s = sampler_process.affordable_interval(poll_s)
    assert interval_s >= 0.05
    assert poll_s / interval_s <= 0.0100001


class FakeTime:
    """Seconds that pass only in sleep."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.mark.parametrize(("period_s", "seen"), [(0.02, True), (0.1, True), (0.4, False)])
def test_the_energy_counters_period_is_watched(
    monkeypatch: pytest.MonkeyPatch, period_s: float, seen: bool
) -> None:
    clock = FakeTime()
    monkeypatch.setattr(nvml, "energy_mj", lambda handle: int(clock.now_s / period_s + 1e-6))
    found = sampler_process.counter_period_s(None, clock)
    if seen:
        assert found == pytest.approx(period_s, abs=0.006)
    else:
        assert found == Unavailable("the energy counter moved 1 times in 0.5 s")


def test_a_counter_that_is_not_there_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "energy_mj", lambda handle: Unavailable("Not Supported"))
    assert sampler_process.counter_period_s(None, FakeTime()) == Unavailable("Not Supported")


def test_what_costs_more_than_memory_is_read_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of NVML called per sample, exactly."""
    calls: list[str] = []

    class Counting(fake_nvml.Telling):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith("nvml"):
                calls.append(name)
            return super().__getattribute__(name)

    clock = FakeTime()
    monkeypatch.setattr(pynvml, "nvmlLib", Counting())
    # The binding looks a function up once; here, at every call.
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer", lambda name: getattr(fake, name))
    fake = pynvml.nvmlLib
    gauge = nvml.open_gauge(SECOND)
    assert isinstance(gauge, nvml.Gauge)
    monkeypatch.setattr(nvml, "has_host_pids", lambda: True)
    reader = sampler_process.Reader(gauge, os.getppid(), clock)
    counts = []
    for _ in range(17):
        calls.clear()
        reader.sample()
        counts.append(len(calls))
        clock.sleep(0.0625)
    wide = 6  # memory, reasons, two clocks, temperature, the list of processes
    assert counts == [wide, *[1] * 7, wide, *[1] * 7, wide]
    calls.clear()
    reader.forced("now")
    assert len(calls) == wide + 2


# ---- the process ----


def command(out: Path) -> list[str]:
    return [sys.executable, "-m", "bench.metering.sampler_process", str(out), "--device", SECOND]


def test_without_a_library_the_process_says_why(library: Callable, tmp_path: Path) -> None:
    library("absent")
    done = subprocess.run(command(tmp_path / "t"), cwd=ROOT, capture_output=True, text=True)
    expected = {"unavailable": "no NVML library: NVML Shared Library Not Found"}
    assert json.loads(done.stdout) == expected
    assert json.loads((tmp_path / "t").read_text()) == expected
    assert done.returncode == 3


def test_the_process_samples_the_named_device_until_stdin_closes(
    library: Callable, tmp_path: Path
) -> None:
    library("normal")
    pipe = subprocess.PIPE
    with subprocess.Popen(command(tmp_path / "t"), cwd=ROOT, stdin=pipe, stdout=pipe) as process:
        assert process.stdin and process.stdout
        assert json.loads(process.stdout.readline())["device"] == SECOND
        time.sleep(0.5)
        process.stdin.close()
        assert process.wait(5) == 0
    samples = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()]
    used = [line["used_bytes"] for line in samples if "monotonic_s" in line]
    assert len(used) >= 5
    assert set(used) == {USED[1]}


def test_the_process_ends_with_its_parent_although_stdin_stays_open(
    library: Callable, tmp_path: Path
) -> None:
    library("normal")
    inner = " ".join(command(tmp_path / "t"))
    script = f"exec 3<&0; {inner} <&3 & echo $!; wait"
    with subprocess.Popen(
        ["sh", "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as shell:
        assert shell.stdout
        sampling = psutil.Process(int(shell.stdout.readline()))
        assert "source" in json.loads(shell.stdout.readline())
        assert sampling.is_running()
        shell.kill()
        deadline = time.monotonic() + 5
        while alive(sampling) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not alive(sampling)


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---- the worker's hold on it ----


def test_one_sampler_serves_stage_after_stage(library: Callable, begin: Callable) -> None:
    library("rising")
    one = begin()
    head = one.baseline()
    windows = []
    for _ in range(2):
        first = one.mark("begin")
        time.sleep(0.2)
        last = one.mark("end")
        windows.append(one.samples(first["monotonic_s"], last["monotonic_s"]))
    for window in windows:
        used = [sample["used_bytes"] for sample in window]
        assert len(used) >= 4
        assert used == sorted(set(used))
        assert [sample.get("mark") for sample in window][:: len(window) - 1] == ["begin", "end"]
    assert head["used_bytes"] < windows[0][0]["used_bytes"]
    assert windows[0][-1]["used_bytes"] < windows[1][0]["used_bytes"]


def test_a_forced_sample_tells_everything_and_the_period_is_measured(
    library: Callable, begin: Callable
) -> None:
    library("telling")
    one = begin()
    first = one.baseline()
    last = one.mark("end")
    assert last["sm_mhz"] == 1980
    assert last["energy_mj"] >= first["energy_mj"]
    assert last["throttled_ns"]["power"] == 0
    one.samples(0, time.monotonic())
    assert one.period_s == pytest.approx(0.02, abs=0.01)


def test_this_very_process_is_known_as_its_own(library: Callable, begin: Callable) -> None:
    if not nvml.has_host_pids():
        pytest.skip("these process numbers are not the host's")
    library("telling")
    one = begin()
    assert one.baseline()["processes"] == [
        {"pid": os.getpid(), "bytes": USED[1], "own": True, "name": None}
    ]


def test_no_library_reaches_the_worker_as_a_reason(library: Callable, begin: Callable) -> None:
    library("absent")
    one = begin()
    reason = Unavailable("no NVML library: NVML Shared Library Not Found")
    assert one.baseline() == reason
    assert one.mark("x") == reason
    assert one.samples(0, time.monotonic()) == reason


def test_a_killed_sampler_is_a_reason(library: Callable, begin: Callable) -> None:
    library("normal")
    one = begin()
    one.baseline()
    assert one.mark("x")["used_bytes"] == USED[1]
    os.kill(one.pid, 9)
    died = Unavailable("the sampler died with status -9")
    assert one.mark("y") == died
    assert one.samples(0, time.monotonic()) == died


def test_a_hanging_driver_does_not_hang_the_worker(
    library: Callable, begin: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    library("hanging")
    one = begin()
    one.baseline()
    time.sleep(0.6)
    monkeypatch.setattr(sampler, "ANSWER_S", 0.2)
    begun = time.monotonic()
    assert one.mark("x") == Unavailable("the sampler gave no answer in 0.2 s")
    assert one.mark("y") == Unavailable("the sampler gave no answer in 0.2 s")
    assert time.monotonic() - begun < 1


def test_a_sampler_leaves_nothing_behind(library: Callable) -> None:
    library("normal")
    descriptors = set(Path("/proc/self/fd").iterdir())
    one = Sampler(SECOND)
    one.baseline()
    process = psutil.Process(one.pid)
    one.stop()
    assert not alive(process)
    assert set(Path("/proc/self/fd").iterdir()) == descriptors

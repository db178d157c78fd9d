"""Device memory through the real NVML binding over a fake library, and its sampler process."""

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
from fake_nvml import FIRST, RESERVED, SECOND, SECOND_BUS, USED
from hypothesis import given
from hypothesis import strategies as some

from bench import nvml
from bench.nvml import Sampler, Unavailable, Window

ROOT = Path(__file__).parent.parent


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Puts an object into the binding's library slot, for this test."""
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    return lambda fake: monkeypatch.setattr(pynvml, "nvmlLib", fake)


@pytest.fixture
def child_library(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Names the fake that a sampler process will load."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return lambda name: monkeypatch.setenv(nvml.LIBRARY_VARIABLE, f"fake_nvml:{name}")


@pytest.fixture
def sampler() -> Iterator[Sampler]:
    one = Sampler()
    yield one
    one.stop()


def gauge(device: str) -> nvml.Gauge:
    opened = nvml.open_gauge(device)
    assert isinstance(opened, nvml.Gauge), opened
    return opened


# ---- one reading ----


@pytest.mark.parametrize(
    ("device", "used"), [(FIRST, USED[0]), (SECOND, USED[1]), (SECOND_BUS, USED[1])]
)
def test_the_named_device_is_read(library: Callable, device: str, used: int) -> None:
    library(fake_nvml.Library())
    assert gauge(device).read() == used


def test_both_meanings_of_v2_used_give_one_figure(library: Callable) -> None:
    library(fake_nvml.Inclusive())
    assert gauge(FIRST).read() == USED[0]
    assert gauge(FIRST).source == "NVML memory v2, without reserved"


@pytest.mark.parametrize(
    ("fake", "reason"),
    [(fake_nvml.OldLibrary(), "Function Not Found"), (fake_nvml.Nonsense(), "do not add up")],
)
def test_v1_replaces_an_unusable_v2_and_says_so(
    library: Callable, fake: object, reason: str
) -> None:
    library(fake)
    assert gauge(FIRST).read() == USED[0] + RESERVED
    assert "v1, driver-reserved included" in gauge(FIRST).source
    assert reason in gauge(FIRST).source


@pytest.mark.parametrize(
    ("fake", "device", "reason"),
    [
        (fake_nvml.Refusing(fake_nvml.NOT_SUPPORTED), FIRST, "Not Supported"),
        (fake_nvml.Refusing(fake_nvml.NO_PERMISSION), FIRST, "Insufficient Permissions"),
        (fake_nvml.Refusing(fake_nvml.GPU_IS_LOST), FIRST, "GPU is lost"),
        (fake_nvml.Library(), "GPU-none", "no device GPU-none: nvmlDeviceGetHandleByUUID: Not"),
        (fake_nvml.Library(), "0", "no device 0: nvmlDeviceGetHandleByPciBusId: Not Found"),
        (fake_nvml.Unloadable(fake_nvml.LIBRARY_NOT_FOUND), FIRST, "no NVML library: "),
        (fake_nvml.Unloadable(9), FIRST, "no NVML: Driver Not Loaded"),
        (object(), FIRST, "no NVML: Function Not Found"),
    ],
)
def test_what_cannot_be_read_has_a_reason(
    library: Callable, fake: object, device: str, reason: str
) -> None:
    library(fake)
    opened = nvml.open_gauge(device)
    assert isinstance(opened, Unavailable)
    assert reason in opened.reason


def test_a_gpu_lost_between_two_readings_is_not_zero(library: Callable) -> None:
    library(fake_nvml.Refusing(fake_nvml.GPU_IS_LOST, after=2))
    lost = gauge(FIRST)
    assert lost.read() == USED[0] + RESERVED
    assert lost.read() == Unavailable("nvmlDeviceGetMemoryInfo: GPU is lost")


def test_no_value_is_not_zero() -> None:
    assert isinstance(nvml.ask(lambda: None), Unavailable)
    assert nvml.ask(lambda: 0) == 0


# ---- reading a trace ----


@given(some.floats(0, 10))
def test_polling_costs_a_hundredth_of_a_core_while_a_poll_is_quick(poll_s: float) -> None:
    interval_s = nvml.affordable_interval(poll_s)
    assert 0.05 <= interval_s <= 0.1
    assert poll_s > 0.001 or poll_s / interval_s <= 0.0100001


@given(some.lists(some.integers(0, 1 << 40), min_size=1), some.data())
def test_a_window_sees_its_own_samples_only(
    tmp_path_factory: pytest.TempPathFactory, used: list[int], data: some.DataObject
) -> None:
    trace = tmp_path_factory.mktemp("trace") / "t.jsonl"
    lines = [{"monotonic_s": float(i), "used_bytes": value} for i, value in enumerate(used)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in [{"source": "s"}, *lines]))
    first = data.draw(some.integers(0, len(used) - 1))
    last = data.draw(some.integers(first, len(used) - 1))
    count = last - first + 1
    assert nvml.read_window(trace, first, last) == Window(
        max(used[first : last + 1]), count, float(count > 1)
    )


def test_a_window_without_or_with_failed_samples_has_no_peak(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    lines = [{"monotonic_s": 1.0, "used_bytes": 5}, {"monotonic_s": 2.0, "unavailable": "lost"}]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert nvml.read_window(trace, 3, 4) == Unavailable("no sample in this time")
    assert nvml.read_window(trace, 1, 2) == Unavailable("1 of 2 samples failed: lost")
    assert nvml.read_window(trace, 0, 1.5) == Window(5, 1, 0.0)


# ---- the process ----


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "bench.nvml", str(out), "--device", SECOND, *more]


def start_process(out: Path, *more: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command(out, *more), cwd=ROOT, stdin=pipe, stdout=pipe)


def test_without_a_library_the_process_says_why(child_library: Callable, tmp_path: Path) -> None:
    child_library("absent")
    done = subprocess.run(command(tmp_path / "t"), cwd=ROOT, capture_output=True, text=True)
    expected = {"unavailable": "no NVML library: NVML Shared Library Not Found"}
    assert json.loads(done.stdout) == expected
    assert json.loads((tmp_path / "t").read_text()) == expected
    assert done.returncode == 3


def test_the_process_samples_the_named_device_until_stdin_closes(
    child_library: Callable, tmp_path: Path
) -> None:
    child_library("normal")
    with start_process(tmp_path / "t", "--interval", "0.005") as process:
        assert process.stdin and process.stdout
        assert json.loads(process.stdout.readline())["interval_s"] == 0.005
        time.sleep(0.1)
        process.stdin.close()
        assert process.wait(5) == 0
    samples = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()]
    used = [line["used_bytes"] for line in samples if "monotonic_s" in line]
    assert len(used) > nvml.POLLS_TO_TIME + 5
    assert set(used) == {USED[1]}


def test_the_process_ends_with_its_parent_although_stdin_stays_open(
    child_library: Callable, tmp_path: Path
) -> None:
    child_library("normal")
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


def test_a_mark_is_a_sample_inside_the_window(child_library: Callable, sampler: Sampler) -> None:
    child_library("rising")
    assert sampler.start(SECOND) is None
    begun_s = time.monotonic()
    first, second = sampler.mark("begin"), sampler.mark("end")
    ended_s = time.monotonic()
    assert isinstance(first, int)
    assert isinstance(second, int)
    assert first < second
    time.sleep(0.15)
    window = sampler.window(begun_s, ended_s)
    assert isinstance(window, Window)
    assert window.peak_bytes == second
    assert window.samples >= 2
    later = sampler.window(ended_s, time.monotonic())
    assert isinstance(later, Window)
    assert later.peak_bytes > second


def test_no_library_reaches_the_worker_as_a_reason(
    child_library: Callable, sampler: Sampler
) -> None:
    child_library("absent")
    reason = Unavailable("no NVML library: NVML Shared Library Not Found")
    assert sampler.start(SECOND) == reason
    assert sampler.mark("x") == reason
    assert sampler.window(0, time.monotonic()) == reason


def test_a_gpu_lost_during_the_stage_leaves_no_peak(
    child_library: Callable, sampler: Sampler
) -> None:
    child_library("lost_later")
    assert sampler.start(SECOND) is None
    while isinstance(sampler.mark("again"), int):
        pass
    window = sampler.window(0, time.monotonic())
    assert isinstance(window, Unavailable)
    assert "GPU is lost" in window.reason


def test_a_killed_sampler_leaves_no_peak(child_library: Callable, sampler: Sampler) -> None:
    child_library("normal")
    assert sampler.start(SECOND) is None
    assert sampler.mark("x") == USED[1]
    assert sampler.pid is not None
    os.kill(sampler.pid, 9)
    died = Unavailable("the sampler died with status -9")
    assert sampler.mark("y") == died
    assert sampler.window(0, time.monotonic()) == died


def test_a_hanging_driver_does_not_hang_the_worker(
    child_library: Callable, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_library("hanging")
    assert sampler.start(SECOND) is None
    time.sleep(0.5)
    monkeypatch.setattr(nvml, "ANSWER_S", 0.2)
    assert sampler.mark("x") == Unavailable("the sampler gave no answer in 0.2 s")


def test_a_sampler_leaves_nothing_behind(child_library: Callable) -> None:
    child_library("normal")
    one = Sampler()
    assert one.start(SECOND) is None
    assert one.pid is not None
    process, folder = psutil.Process(one.pid), Path(one._folder.name)
    assert folder.exists()
    one.stop()
    assert not alive(process)
    assert not folder.exists()


def test_as_json_keeps_the_reason() -> None:
    figures: list[Any] = [nvml.as_json(0), nvml.as_json(Unavailable("why"))]
    assert figures == [0, {"unavailable": "why"}]

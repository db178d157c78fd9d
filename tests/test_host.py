"""The host during a stage: memory of the process tree, stolen time, swapping."""

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from bench.metering import host
from bench.metering.host import HostMemory, HostNoise
from bench.nvml import Unavailable

MIB = 1 << 20


# ---- memory of the tree ----

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
    reader: Callable = getattr(host, f"_{request.param}_children")
    if request.param == "listed" and host._children_reader() is not reader:
        pytest.skip("this kernel lists no children")
    monkeypatch.setattr(host, "_children_reader", lambda: reader)
    # However many processes this machine has, look at them often.
    monkeypatch.setattr(host, "HOST_SHARE_OF_CORE", 1)


def test_a_child_that_lives_inside_the_stage_counts(children: None) -> None:
    meter = HostMemory()
    meter.start()
    before = host.resident_bytes(os.getpid())
    one = child()
    time.sleep(0.4)
    end(one)
    assert before + 200 * MIB <= peak(meter) < before + 300 * MIB


def test_a_child_of_the_harness_does_not_count(children: None) -> None:
    one = child()
    meter = HostMemory(apart=one.pid)
    meter.start()
    before = host.resident_bytes(os.getpid())
    time.sleep(0.2)
    found = peak(meter)
    end(one)
    assert found < before + 100 * MIB


def test_a_grandchild_counts() -> None:
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ALLOCATE!r}])"
    meter = HostMemory()
    meter.start()
    before = host.resident_bytes(os.getpid())
    one = subprocess.Popen(
        [sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert one.stdout
    one.stdout.readline()
    time.sleep(0.2)
    end(one)
    assert peak(meter) >= before + 200 * MIB


def test_a_peak_between_two_looks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    if not host._reset_high_water_mark():
        pytest.skip("this kernel does not reset VmHWM")
    monkeypatch.setattr(host, "HOST_INTERVAL_S", 60)
    before = host.resident_bytes(os.getpid())
    meter = HostMemory()
    meter.start()
    del_me = touched(200)
    del del_me
    assert peak(meter) >= before + 190 * MIB


def test_the_peak_of_an_earlier_stage_is_forgotten() -> None:
    if not host._reset_high_water_mark():
        pytest.skip("this kernel does not reset VmHWM")
    del_me = touched(200)
    high = host._high_water_mark_bytes()
    del del_me
    meter = HostMemory()
    meter.start()
    assert peak(meter) < high - 150 * MIB


def test_where_the_mark_cannot_be_reset_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_reset_high_water_mark", lambda: False)
    monkeypatch.setattr(host, "_high_water_mark_bytes", lambda: 1 << 50)
    meter = HostMemory()
    meter.start()
    assert 10 * MIB < peak(meter) < 1 << 50


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_sampling_thread_leaves_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "HOST_INTERVAL_S", 0.001)
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


def test_shared_pages_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked child that only reads what it was given adds next to nothing."""
    if isinstance(host._proportional_bytes(os.getpid()), Unavailable):
        pytest.skip("this kernel has no smaps_rollup")
    held = touched(100)
    alone = HostMemory()._tree_share()
    pid = os.fork()
    if not pid:
        time.sleep(60)
    meter = HostMemory()
    resident, shared = sum(map(host.resident_bytes, meter._tree())), meter._tree_share()
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    del held
    assert isinstance(alone, int)
    assert isinstance(shared, int)
    assert shared < alone + 50 * MIB
    assert resident > shared + 80 * MIB


def test_the_share_of_a_stage_is_the_larger_of_its_ends() -> None:
    meter = HostMemory()
    meter.start()
    held = touched(200)
    found = meter.stop()
    del held
    if isinstance(found["host_pss_bytes"], Unavailable):
        pytest.skip(found["host_pss_bytes"].reason)
    before = meter._proportional_bytes
    assert isinstance(before, int)
    assert before + 190 * MIB <= found["host_pss_bytes"] <= peak_of(found) + MIB


def peak_of(found: dict[str, Any]) -> int:
    return found["host_peak_bytes"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(PermissionError(13, "Permission denied"), "smaps_rollup: Permission denied")],
)
def test_a_share_nobody_may_read_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, error: OSError, reason: str
) -> None:
    def refuse(path: str) -> bytes:
        raise error

    monkeypatch.setattr(host, "_read", refuse)
    assert host._proportional_bytes(1) == Unavailable(reason)


def test_a_process_that_has_ended_holds_nothing() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert not psutil.pid_exists(gone.pid)
    assert host._proportional_bytes(gone.pid) == 0


# ---- what others took ----


def proc(monkeypatch: pytest.MonkeyPatch, *reads: dict[str, bytes]) -> None:
    """Answers of /proc at the begin and at the end."""
    pending = [read[path] for read in reads for path in ("/proc/stat", "/proc/vmstat")]
    monkeypatch.setattr(host, "_read", lambda path: pending.pop(0))


def test_stolen_time_and_swapped_pages_are_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = {
        "/proc/stat": b"cpu  100 0 50 800 0 0 0 50 0 0\ncpu0 1 2 3",
        "/proc/vmstat": b"pswpin 10\npswpout 20\nother 1",
    }
    end = {
        "/proc/stat": b"cpu  160 0 60 820 0 0 0 60 0 0\ncpu0 1 2 3",
        "/proc/vmstat": b"pswpin 11\npswpout 23\nother 5",
    }
    proc(monkeypatch, begin, end)
    found = HostNoise().stop()
    assert found["steal_share"] == pytest.approx(0.1)
    assert found["swapped_bytes"] == 4 * os.sysconf("SC_PAGE_SIZE")


def test_what_a_kernel_does_not_count_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = {"/proc/stat": b"", "/proc/vmstat": b"nr_free_pages 5"}
    proc(monkeypatch, silent, silent)
    assert all(isinstance(value, Unavailable) for value in HostNoise().stop().values())


def test_this_machine_is_read() -> None:
    found = HostNoise().stop()
    assert isinstance(found["steal_share"], Unavailable) or 0 <= found["steal_share"] <= 1

"""The host during a stage: memory of the process tree, and what others took of the machine."""

import functools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from bench.nvml import Unavailable

HOST_INTERVAL_S = 0.05
HOST_SHARE_OF_CORE = 0.005
"""For looking alone; waking up costs about as much again, together below 1 % of a core."""

STEAL = 7
"""Place of the stolen time in a line of /proc/stat."""

Figures = dict[str, int | Unavailable]


class HostMemory:
    """Peak resident bytes of this process and its descendants; shared pages count in each of them.

    A thread looks at the tree; the kernel's own high-water mark of this process, where it can be
    reset, adds the peaks between two looks. Proportional bytes, which share those pages out, make
    the kernel walk every mapping: they are read at the begin and at the end only.
    """

    def __init__(self, apart: int | None = None):
        self._apart = apart
        """A child that belongs to the harness, left out."""
        self._peak_bytes = 0
        self._proportional_bytes: int | Unavailable = 0
        self._exact = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="host-memory", daemon=True)

    def start(self) -> None:
        self._proportional_bytes = self._tree_share()
        self._exact = _reset_high_water_mark()
        self._look()
        self._thread.start()

    def stop(self) -> Figures:
        died = not self._thread.is_alive()
        self._ended.set()
        self._thread.join()
        peak: int | Unavailable = Unavailable("the sampling thread died; see the log")
        if not died:
            self._look()
            own_bytes = _high_water_mark_bytes() if self._exact else 0
            peak = max(self._peak_bytes, own_bytes)
        return {"host_peak_bytes": peak, "host_pss_bytes": self._larger_share()}

    def _larger_share(self) -> int | Unavailable:
        begin, end = self._proportional_bytes, self._tree_share()
        if isinstance(begin, Unavailable):
            return begin
        return end if isinstance(end, Unavailable) else max(begin, end)

    def _tree_share(self) -> int | Unavailable:
        total = 0
        for pid in self._tree():
            share = _proportional_bytes(pid)
            if isinstance(share, Unavailable):
                return share
            total += share
        return total

    def _watch(self) -> None:
        wait_s = HOST_INTERVAL_S
        while not self._ended.wait(wait_s):
            begun = time.thread_time()
            self._look()
            # Wide trees and old kernels make a look dear: then it is taken less often.
            wait_s = max(HOST_INTERVAL_S, (time.thread_time() - begun) / HOST_SHARE_OF_CORE)

    def _look(self) -> None:
        self._peak_bytes = max(self._peak_bytes, self.resident_bytes())

    def resident_bytes(self) -> int:
        """Of the whole tree, now."""
        return sum(map(resident_bytes, self._tree()))

    def _tree(self) -> list[int]:
        children = _children_reader()
        pids = [os.getpid()]
        for pid in pids:  # grows while it is walked
            pids += [child for child in children(pid) if child != self._apart]
        return pids


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


def resident_bytes(pid: int) -> int:
    """Resident memory of one process; 0 if it has ended meanwhile."""
    fields = _read(f"/proc/{pid}/statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


def _proportional_bytes(pid: int) -> int | Unavailable:
    """Pss of one process (proc(5), smaps_rollup): each shared page divided by those who map it."""
    try:
        rollup = _read(f"/proc/{pid}/smaps_rollup")
    except OSError as error:
        return Unavailable(f"smaps_rollup: {error.strerror}")
    for line in rollup.splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    if Path(f"/proc/{pid}").exists() and not Path(f"/proc/{pid}/smaps_rollup").exists():
        return Unavailable("this kernel has no smaps_rollup")
    return 0  # it has ended


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


# ---- what others took ----


class HostNoise:
    """Time the hypervisor gave to others, and bytes swapped, from its making to its end."""

    def __init__(self) -> None:
        self._before = (_cpu_ticks(), _swapped_pages())

    def stop(self) -> dict[str, float | Unavailable]:
        """`steal_share` of all processors' time, `swapped_bytes` of the whole machine."""
        (ticks, pages), (ticks_now, pages_now) = self._before, (_cpu_ticks(), _swapped_pages())
        steal: float | Unavailable = Unavailable("this kernel counts no stolen time")
        if ticks and ticks_now:
            spent = [now - then for then, now in zip(ticks, ticks_now, strict=True)]
            steal = spent[STEAL] / sum(spent) if sum(spent) else 0.0
        swapped: int | Unavailable = Unavailable("this kernel counts no swapped pages")
        if pages is not None and pages_now is not None:
            swapped = (pages_now - pages) * os.sysconf("SC_PAGE_SIZE")
        return {"steal_share": steal, "swapped_bytes": swapped}


def _cpu_ticks() -> list[int]:
    """user, nice, system, idle, iowait, irq, softirq, steal (proc(5), stat); empty if unknown."""
    fields = _read("/proc/stat").split(b"\n", 1)[0].split()[1 : STEAL + 2]
    return list(map(int, fields)) if len(fields) == STEAL + 1 else []


def _swapped_pages() -> int | None:
    counts = dict(line.split() for line in _read("/proc/vmstat").decode().splitlines())
    if "pswpin" not in counts or "pswpout" not in counts:
        return None
    return int(counts["pswpin"]) + int(counts["pswpout"])

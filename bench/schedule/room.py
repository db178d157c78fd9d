"""The memory a process may take: how much there is, and a wall around one that is being tried.

A trial of too large a batch has to die itself. Left to the kernel, the machine would be short of
memory first, and the kernel might choose another process.
"""

import os
import resource
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from bench.metering.host import HostMemory

LOOK_S = 0.02
USUAL_STACK_BYTES = 8 << 20
POOLS = 2
"""Of threads, each with one for every core: those of the products and of the backward pass."""
CGROUPS = Path("/sys/fs/cgroup")
LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Limit and use of a memory cgroup, version 2 and 1."""


def host_bytes() -> int:
    """Memory of the host that is free for us: what the kernel would hand out without swapping, in
    a container no more than its own limit leaves.
    """
    left = [psutil.virtual_memory().available]
    for folder in (CGROUPS, CGROUPS / "memory"):
        for names in LIMITS:
            with suppress(OSError, ValueError):  # absent, or the word max
                limit, used = (int((folder / name).read_text()) for name in names)
                left.append(limit - used)
    return max(0, min(left))


def wall_host(limit_bytes: int, on_excess: Callable[[str], None]) -> int:
    """Keep this process and its children within `limit_bytes` of host memory; returns the limit.

    An allocation beyond it is refused (getrlimit(2), RLIMIT_DATA) and fails as it would without
    memory. The kernel counts there neither shared memory nor children, so a thread adds up what the
    whole tree holds; past the limit it calls `on_excess` with the reason, which must not return.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = limit_bytes + _stacks_bytes()
    lowered = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (lowered, lowered))
    tree = HostMemory()

    def watch() -> None:
        while (held := tree.resident_bytes()) <= limit_bytes:
            time.sleep(LOOK_S)
        on_excess(f"MemoryError: the process tree holds {held} of {limit_bytes} bytes allowed")

    threading.Thread(target=watch, name="memory-wall", daemon=True).start()
    return limit_bytes


def _stacks_bytes() -> int:
    """Stacks of the threads that torch will start: data by the kernel's count, hardly ever used."""
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    each = USUAL_STACK_BYTES if soft == resource.RLIM_INFINITY else soft
    return POOLS * len(os.sched_getaffinity(0)) * each


def wall_device(limit_bytes: int | None, device: Any) -> int:
    """Keep torch's allocator within `limit_bytes` of a CUDA device, or within what is free there
    now; returns the limit. Beyond it an allocation raises torch.OutOfMemoryError.
    """
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    room_bytes = free_bytes if limit_bytes is None else min(limit_bytes, free_bytes)
    torch.cuda.set_per_process_memory_fraction(room_bytes / total_bytes, device)
    return int(room_bytes)

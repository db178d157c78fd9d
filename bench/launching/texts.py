"""What the words of a dead worker mean: its status, or that the disk was full."""

import re
from collections.abc import Sequence

DEATH_TEXTS = (
    # The allocator's own complaint; inside gVisor, NVML cannot report and torch asserts instead
    # (google/gvisor#9700).
    (
        "oom_gpu",
        re.compile(r"CUDA out of memory|NVML_SUCCESS == r INTERNAL ASSERT FAILED|OutOfMemoryError"),
    ),
    (
        "driver",
        re.compile(
            r"CUDA driver error|CUDA error: .*operation not supported|CUDA unknown error"
            r"|CUDA driver version is insufficient|GPU is lost|fallen off the bus",
            re.IGNORECASE,
        ),
    ),
    ("import", re.compile(r"ImportError|ModuleNotFoundError|undefined symbol|No module named")),
    ("oom_host", re.compile(r"\bMemoryError\b|DefaultCPUAllocator: .*allocate memory")),
)
DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|\[Errno 27\] File too large")
SHARED_MEMORY = re.compile(r"\bshm\b|shared memory|</torch_", re.IGNORECASE)
"""Of a container, too small for loader workers: the setting's fault and not the disk's."""


def text_death(tail: Sequence[str], ruled_out: str = "") -> tuple[str, str] | None:
    """Status by the log's last traceback (or its tail), judged from the last line upwards."""
    starts = [i for i, line in enumerate(tail) if line.startswith("Traceback (most recent call")]
    for line in reversed(tail[starts[-1] :] if starts else tail):
        for status, pattern in DEATH_TEXTS:
            if status != ruled_out and pattern.search(line):
                return status, line.strip()
    return None


def full_disk(reason: str | None, tail: Sequence[str]) -> str | None:
    """The line in which a failed worker says that a disk took no more."""
    for line in [*(reason or "").splitlines(), *reversed(tail)]:
        if DISK_FULL.search(line) and not SHARED_MEMORY.search(line):
            return line.strip()
    return None

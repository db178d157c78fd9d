"""The CUDA allocator's memory as a file for torch's viewer, with history on demand, and on an
out-of-memory always.

Worker side: imports torch. On a CPU nothing is written: there the trace of a profile tells.
"""

import sys
from pathlib import Path

import torch

MOST_EVENTS = 100_000
"""Allocations and releases remembered, the newest; a step of a 7B model makes about ten thousand.
"""


def write_on_oom(device: torch.device, path: Path) -> None:
    """From now on have the allocator write its state there when it fails, before anything is freed.

    Costs nothing until then. The last failure stays: one that torch recovered from may come before.
    """
    if device.type != "cuda":
        return

    def out_of_memory(*_: int) -> None:
        try:
            torch.cuda.memory._dump_snapshot(str(path))
        except OSError as error:  # the out-of-memory is the news, not that its picture failed
            print(f"no memory snapshot: {error}", file=sys.stderr)

    # The one way torch offers; its own documentation shows it under this name.
    torch._C._cuda_attach_out_of_memory_observer(out_of_memory)  # type: ignore[attr-defined]


class History:
    """Recording of who allocated what; costs some microseconds for each allocation."""

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"

    def record(self) -> None:
        """Begin, or go on."""
        if self._on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS, stacks="python")

    def stop(self) -> None:
        """Record nothing until `record`."""
        if self._on_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)

    def save(self, path: Path) -> bool:
        """Write state and history; whether there was anything to write."""
        if self._on_cuda:
            torch.cuda.memory._dump_snapshot(str(path))
        return self._on_cuda

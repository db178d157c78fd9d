"""The real worker, except that it dies in the middle of its last stage in a chosen way.

`DYING_WORKER='{"train.lr=0.002": "killed"}'` names cells and ways; other cells are healthy.
"""

import json
import os
import signal
import sys
import time
from typing import Any

from bench import worker

honest = worker.work


def killed() -> None:
    """As by an administrator, or by a scheduler."""
    os.kill(os.getpid(), signal.SIGKILL)


def import_error() -> None:
    """A library that is there and does not fit."""
    import ctypes

    try:
        ctypes.CDLL(None).no_such_symbol  # noqa: B018 (looking it up is what fails)
    except AttributeError as error:
        raise ImportError(str(error)) from error


def host_memory() -> None:
    """The allocator's own error, for more than any address space holds."""
    import torch

    torch.empty(1 << 50, dtype=torch.uint8)


def gpu_memory() -> None:
    """What torch raises on a full GPU."""
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def crash() -> None:
    """A read from nowhere, as in a kernel built for another processor."""
    import ctypes
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


def hang() -> None:
    """A step that waits for what never comes, with a loader worker beside it."""
    import torch

    source = torch.utils.data.DataLoader(list(range(100)), num_workers=1)
    next(iter(source))
    time.sleep(3600)


def no_such_package() -> None:
    """An optional dependency that was never installed."""
    import importlib

    importlib.import_module("a_package_nobody_installed")


def silent() -> None:
    """An exit status of 0 in the middle of the work."""
    sys.stdout.flush()
    os._exit(0)


def work(cell: dict[str, Any], lines: worker.Lines) -> None:
    """Work until the second step of the last stage."""
    way = json.loads(os.environ["DYING_WORKER"]).get(cell["cell"])

    def die() -> None:
        if lines.stage == cell["stages"][-1] and lines.step == 2:
            globals()[way]()

    if way and cell["task"] == "measure":
        told = lines.progress
        lines.progress = lambda: (told(), die())[0]
    honest(cell, lines)


if __name__ == "__main__":
    worker.work = work
    sys.exit(worker.main())

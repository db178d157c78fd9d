"""Counts that are equal on every machine with the same libraries: operators, FLOPs, saved bytes,
files opened.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from perf.workloads import Work

WRITING = os.O_WRONLY | os.O_RDWR
SYNCHRONISING = "_local_scalar_dense"
"""What `.item()`, `float()` and `bool()` of a tensor end in: on a GPU each waits for the device."""


class Operators(TorchDispatchMode):
    """Counts what reaches a backend, by name; composite operators are taken apart first."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:
            taken_apart = func.decompose(*args, **(kwargs or {}))
        if taken_apart is not NotImplemented:
            return taken_apart
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(work: Work) -> dict[str, int]:
    """Every counter of one run of the work, those it keeps itself included."""
    work.run()  # what happens once only, such as the state of an optimizer, is no part of it
    saved: Counter[str] = Counter()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved["saved_bytes"] += tensor.numel() * tensor.element_size()
        return tensor

    with FlopCounterMode(display=False) as flops:
        work.run()
    with opened_for_writing() as opened, saved_tensors_hooks(pack, lambda t: t):
        work.run()
    with Operators() as operators:
        work.run()
    found = {
        "operators": operators.names.total(),
        "synchronisations": operators.names[SYNCHRONISING],
        "flops": flops.get_total_flops(),
        "opened_for_writing": opened["files"],
        **saved,
        **work.counts,
    }
    by_name = {f"operator {name}": count for name, count in sorted(operators.names.items())}
    return {name: count for name, count in found.items() if count} | by_name


_listeners: list[Counter[str]] = []


def _listen(event: str, arguments: tuple) -> None:
    if event == "open" and _listeners:
        path, _, flags = arguments
        if isinstance(path, str) and isinstance(flags, int) and flags & WRITING:
            _listeners[-1]["files"] += 1


@contextmanager
def opened_for_writing() -> Iterator[Counter[str]]:
    """How often any file is opened for writing inside the block, by Python code."""
    if not hasattr(sys, "_perf_listens"):  # an audit hook can never be taken away again
        sys._perf_listens = True
        sys.addaudithook(_listen)
    _listeners.append(Counter())
    try:
        yield _listeners[-1]
    finally:
        _listeners.pop()

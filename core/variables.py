"""The environment variables a configuration asks for; most are read when a library loads."""

import os
import sys

from core.settings import MachineSettings

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
"""The name every torch reads; the newer PYTORCH_ALLOC_CONF is ignored by some versions."""


def variables(machine: MachineSettings) -> dict[str, str]:
    """Name -> value of `machine.env` and `machine.allocator_conf`."""
    asked = dict(entry.split("=", 1) for entry in machine.env)
    if machine.allocator_conf is not None:
        asked[ALLOCATOR] = machine.allocator_conf
    return asked


def start_again_with(machine: MachineSettings) -> None:
    """Put this very command into an interpreter that has the variables, unless this one does.

    Setting them here would be too late for whatever has read its environment already.
    """
    asked = variables(machine)
    if any(os.environ.get(name) != value for name, value in asked.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **asked})

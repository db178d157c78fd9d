"""What makes figures meaningless here: variables, unread allocator names, a card in use."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from bench.metering.gpus import use
from core.settings import Settings

DISTORTING = {
    "CUDA_LAUNCH_BLOCKING": "every kernel waits for the one before",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "every tensor is a driver allocation",
    "TORCH_LOGS": "logging runs inside the timed steps",
    "TORCH_COMPILE_DEBUG": "every compiled graph is written to the disk",
    "TORCH_COMPILE_DISABLE": "train.compile has no effect",
    "TORCHDYNAMO_DISABLE": "train.compile has no effect",
    "PYTHONDEVMODE": "the interpreter checks every allocation",
    "PYTHONTRACEMALLOC": "the interpreter traces every allocation",
}
"""Variables that make every timing meaningless while set to anything but 0."""
OVERRIDING = {
    "NVIDIA_TF32_OVERRIDE": "the libraries' TF32 no longer follows train.precision",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "torch's TF32 no longer follows train.precision",
}
"""Variables that replace a setting whatever their value."""
ALLOCATOR_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
"""The name every torch reads for its CUDA allocator."""
OTHER_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
ALLOC_CONF_READ, ALLOC_CONF_WHOLE = (2, 8), (2, 10)
"""First torch that reads the other names, and first that reads expandable_segments in them."""

COMPILERS = {"C": ("CC", ("gcc", "clang")), "C++": ("CXX", ("g++",))}
"""Language -> the variable that names a compiler, and what is looked for without it."""

BUSY_BYTES = 1 << 30
"""Device memory in use before anything was started that only another program explains."""
BUSY_PERCENT = 10


def distorting(variables: Mapping[str, str]) -> list[str]:
    """Variables among these under which no figure means anything, each with its effect."""
    given = {name: value for name, value in variables.items() if value != ""}
    effects = {name: DISTORTING[name] for name in DISTORTING if given.get(name, "0") != "0"}
    effects |= {name: OVERRIDING[name] for name in OVERRIDING if name in given}
    return [f"{name}={given[name]} is set: {effect}" for name, effect in effects.items()]


def unread_allocator_variables(variables: Mapping[str, str], torch: str | None) -> list[str]:
    """Variables meant for torch's allocator that this torch (None = unknown) does not read.

    An option nobody reads once passed for the cure of a driver error (pytorch/pytorch#183387).
    """
    names = [name for name in variables if name.startswith("PYTORCH") and "ALLOC" in name]
    version = torch_version(torch)
    problems = []
    for name in sorted(set(names) - {ALLOCATOR_VARIABLE}):
        if name not in OTHER_ALLOCATOR_VARIABLES:
            what = "is not read by torch"
        elif version and version < ALLOC_CONF_READ:
            what = f"is not read by torch {torch}"
        elif version and version < ALLOC_CONF_WHOLE and "expandable_segments" in variables[name]:
            what = f"is read by torch {torch}, but its expandable_segments is ignored on CUDA"
        elif variables.get(ALLOCATOR_VARIABLE, variables[name]) != variables[name]:
            what = f"is not read where {ALLOCATOR_VARIABLE} is set"
        else:
            continue
        problems.append(f"{name} {what}; use {ALLOCATOR_VARIABLE}")
    return problems


def torch_version(text: str | None) -> tuple[int, int] | None:
    """Major and minor of a version like 2.7.1+cu126; None if there is none."""
    found = re.match(r"(\d+)\.(\d+)", text or "")
    return (int(found[1]), int(found[2])) if found else None


def busy(visible: Sequence[Mapping[str, Any]]) -> list[str]:
    """What other programs do on the GPU that a worker would take.

    Torch takes its first; among unlike cards that is the fastest, which NVML's order hides, so
    there each counts.
    """
    alike = len({gpu.get("name") for gpu in visible}) == 1
    problems = []
    for gpu in visible[:1] if alike else visible:
        now = use(gpu)
        signs = []
        if isinstance(now["processes"], list) and now["processes"]:
            signs.append(f"processes {', '.join(map(str, now['processes']))}")
        if isinstance(now["used_bytes"], int) and now["used_bytes"] > BUSY_BYTES:
            signs.append(f"{gib(now['used_bytes'])} in use")
        if isinstance(now["utilisation"], int) and now["utilisation"] > BUSY_PERCENT:
            signs.append(f"{now['utilisation']} % utilisation")
        if signs:
            problems.append(
                f"{gpu.get('name')} is busy ({'; '.join(signs)}): stop that, or choose another "
                "card with CUDA_VISIBLE_DEVICES"
            )
    return problems


def allocator_options(settings: Settings) -> str:
    """The allocator's options a cell would run with, from its settings or the environment."""
    asked = dict(entry.split("=", 1) for entry in settings.machine.env)
    if settings.machine.allocator_conf is not None:
        asked[ALLOCATOR_VARIABLE] = settings.machine.allocator_conf
    here = os.environ | asked
    return here.get(ALLOCATOR_VARIABLE) or here.get("PYTORCH_ALLOC_CONF", "")


def asks_expandable_segments(options: str) -> bool:
    """Whether allocator options like `max_split_size_mb:64,expandable_segments:True` ask for it."""
    return bool(re.search(r"expandable_segments\s*:\s*true", options, re.IGNORECASE))


def find_compiler(language: str) -> str | None:
    """Path of the compiler torch.compile would call: `C` (Triton, GPU) or `C++` (inductor, CPU)."""
    variable, names = COMPILERS[language]
    chosen = os.environ.get(variable, "").split()
    return next(filter(None, map(shutil.which, chosen[:1] or names)), None)


def gib(size_bytes: int) -> str:
    """Bytes as text in GiB."""
    return f"{size_bytes / (1 << 30):.1f} GiB"

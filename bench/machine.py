"""The machine as the parent sees it: its record, what it cannot run, why it may be unfit."""

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from bench.gpus import gpus
from core.settings import Settings

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "flash_attn",
    "accelerate",
    "pytorch-lightning",
    "tokenizers",
    "safetensors",
    "triton",
    "numpy",
    "pandas",
    "scipy",
    "pydantic",
    "nvidia-ml-py",
)
VARIABLES = (
    "CUDA",
    "NVIDIA",
    "NCCL",
    "CUBLAS",
    "PYTORCH",
    "TORCH",
    "TOKENIZERS",
    "TRANSFORMERS",
    "HF_",
    "BNB",
    "OMP",
    "MKL",
    "OPENBLAS",
    "KMP",
    "MALLOC",
    "LD_PRELOAD",
)
"""Prefixes of environment variables that can change what is measured."""
SECRETS = ("_TOKEN", "_KEY", "SECRET", "PASSWORD")

DISTORTING = {
    "CUDA_LAUNCH_BLOCKING": "every kernel waits for the one before",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "every tensor is a driver allocation",
    "TORCH_LOGS": "logging runs inside the timed steps",
}
"""Variables that make every timing meaningless while set."""

LEAST_DISK_BYTES = 1 << 30
LEAST_MEMORY_BYTES = 1 << 30
LEAST_CAPABILITY = (8, 0)
"""First CUDA capability with bfloat16 tensor cores and FlashAttention-2 kernels (Ampere)."""

Machine = dict[str, Any]


class UnfitMachine(Exception):
    """This machine must not measure now; the text says why and what to change."""


def has_gpu() -> bool:
    """Whether a worker would find a CUDA device: one is visible and torch is built for CUDA."""
    return bool(gpus()) and not _version("torch").endswith("+cpu")


def unsupported(settings: Settings, machine: Mapping[str, Any]) -> str | None:
    """Why this machine or its libraries cannot run a cell at all, None if they can.

    `machine` needs the keys `gpus`, `has_gpu` and `packages` of `environment`.
    """
    if settings.machine.image != "host":
        return container_problem()
    if settings.machine.device == "cuda" and not machine["has_gpu"]:
        return "machine.device=cuda: no usable GPU here; machine.device=cpu runs without one"
    on_gpu = machine["has_gpu"] and settings.machine.device != "cpu"
    checks = (_attention_problem, _precision_problem)
    for check in checks:
        if problem := check(settings, machine, on_gpu):
            return problem
    if settings.teacher.adapter == "qlora" and not machine["packages"].get("bitsandbytes"):
        return "teacher.adapter=qlora: bitsandbytes is not installed"
    if settings.train.trainer == "lightning" and not machine["packages"].get("pytorch-lightning"):
        return "train.trainer=lightning: pytorch-lightning is not installed"
    return None


def _attention_problem(settings: Settings, machine: Mapping[str, Any], on_gpu: bool) -> str | None:
    if settings.teacher.attn != "flash_attention_2":
        return None
    if not on_gpu:
        return "teacher.attn=flash_attention_2: it has GPU kernels only; sdpa runs here"
    if (capability := _capability(machine)) and capability < LEAST_CAPABILITY:
        return f"teacher.attn=flash_attention_2: {_too_old(capability)}; sdpa runs here"
    if not machine["packages"].get("flash_attn"):
        return "teacher.attn=flash_attention_2: flash-attn is not installed; sdpa runs here"
    return None


def _precision_problem(settings: Settings, machine: Mapping[str, Any], on_gpu: bool) -> str | None:
    precision = settings.train.precision
    if precision == "fp16-mixed" and not on_gpu:
        return "train.precision=fp16-mixed: no float16 autocast on the CPU; bf16-mixed runs here"
    if precision.startswith("bf16") and on_gpu:
        capability = _capability(machine)
        if capability and capability < LEAST_CAPABILITY:
            return f"train.precision={precision}: {_too_old(capability)}; fp16-mixed runs here"
    return None


def _capability(machine: Mapping[str, Any]) -> tuple[int, int] | None:
    """Capability of the first visible GPU, None where NVML would not say."""
    found = machine["gpus"][0].get("capability") if machine["gpus"] else None
    return (found[0], found[1]) if isinstance(found, list) else None


def _too_old(capability: tuple[int, int]) -> str:
    return f"needs CUDA capability 8.0, this GPU has {capability[0]}.{capability[1]}"


@functools.cache
def container_problem() -> str:
    """Why no cell can run inside an image here."""
    for engine in ("docker", "podman"):
        if shutil.which(engine) and _answers([engine, "info", "--format", "{{json .}}"]):
            return "containers: this version does not start workers in images yet"
    return "no container engine: neither docker nor podman answers"


def _answers(command: list[str]) -> bool:
    """Some clients exit 0 although their daemon is away, hence the error text."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=3)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and "annot connect" not in done.stderr


def brief() -> Machine:
    """The part of the environment that decides which cells can run; quick enough for a plan."""
    return {
        "has_gpu": has_gpu(),
        "gpus": [dict(gpu) for gpu in gpus()],
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def environment() -> Machine:
    """Everything about this machine that a reader of the figures may ask for; plain JSON data."""
    memory = psutil.virtual_memory()
    return brief() | {
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "os": platform.platform(),
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "load_1min": os.getloadavg()[0],
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "variables": variables(),
        "git": _git(),
    }


def variables() -> dict[str, str]:
    """Environment variables that can change what is measured; never credentials."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(VARIABLES) and not any(part in name for part in SECRETS)
    }


def check(folder: Path) -> None:
    """Raise UnfitMachine, naming every reason at once, if nothing should be measured here now."""
    if problems := problems_here(folder):
        raise UnfitMachine("\n".join(f"machine: {problem}" for problem in problems))


def problems_here(folder: Path) -> list[str]:
    """Reasons not to measure now; `folder` (or its nearest existing parent) takes the results."""
    problems = [
        f"{name}={os.environ[name]} is set: {effect}; unset it"
        for name, effect in DISTORTING.items()
        if os.environ.get(name, "0") not in ("", "0")
    ]
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < LEAST_DISK_BYTES:
        problems.append(
            f"{existing} has {_gib(free_bytes)} free; a run needs {_gib(LEAST_DISK_BYTES)}"
        )
    available_bytes = psutil.virtual_memory().available
    if available_bytes < LEAST_MEMORY_BYTES:
        problems.append(
            f"{_gib(available_bytes)} of memory free; a worker needs {_gib(LEAST_MEMORY_BYTES)}"
        )
    if not os.access(existing, os.W_OK):
        problems.append(f"{existing} cannot be written; choose another folder with --out")
    return problems


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What forbids joining figures of two moments: another machine, GPU or set of libraries."""
    fields = ("cpu", "usable_cores", "python", "packages", "has_gpu", "variables")
    found = [
        f"{field} was {earlier.get(field)}, is {now.get(field)}"
        for field in fields
        if earlier.get(field) != now.get(field)
    ]
    names = [[gpu.get("name") for gpu in side.get("gpus", [])] for side in (earlier, now)]
    if names[0] != names[1]:
        found.append(f"gpus were {names[0]}, are {names[1]}")
    return found


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.1f} GiB"


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [
        line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def _git() -> dict[str, Any] | None:
    """Commit of the measuring code and whether it was changed since; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True)
        status = subprocess.run(
            [*command, "status", "--porcelain", "--", "core", "bench"],
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    if commit.returncode or status.returncode:
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}

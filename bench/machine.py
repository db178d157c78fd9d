"""The machine as the parent sees it: its record, what it cannot run, why it may be unfit."""

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from bench.checkup.fitness import (
    allocator_options,
    asks_expandable_segments,
    busy,
    distorting,
    find_compiler,
    gib,
    unread_allocator_variables,
)
from bench.matrix import Cell
from bench.metering.gpus import driver, gpus
from core.config import InputError
from core.settings import Settings

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "flash_attn",
    "accelerate",
    "torchao",
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

LEAST_DISK_BYTES = 1 << 30
LEAST_MEMORY_BYTES = 1 << 30
SHARDING_TORCH = (2, 7)
"""First version whose `fully_shard` takes `ignored_params`."""
LEAST_CAPABILITY = (8, 0)
"""First CUDA capability with bfloat16 and TF32 products and FlashAttention-2 kernels (Ampere)."""

FLOAT8_CAPABILITY = (8, 9)
"""First with float8 products (Ada)."""

Machine = dict[str, Any]


class Obstacle(NamedTuple):
    """Why a cell is never started."""

    status: Literal["unsupported", "skipped", "timeout"]
    """Of its records: this machine cannot, it could and should not, or none that can came."""
    reason: str


class UnfitMachine(Exception):
    """This machine must not measure now; the text says why and what to change."""


def has_gpu() -> bool:
    """Whether a worker would find a CUDA device: one is visible and torch is built for CUDA."""
    return bool(gpus()) and not installed_version("torch").endswith("+cpu")


def obstacle(settings: Settings, machine: Mapping[str, Any]) -> Obstacle | None:
    """What `unsupported` says, as the reason for which a cell never starts."""
    reason = unsupported(settings, machine)
    return Obstacle("unsupported", reason) if reason else None


def unsupported(settings: Settings, machine: Mapping[str, Any]) -> str | None:
    """Why this machine or its libraries cannot run a cell at all, None if they can.

    `machine` needs the keys `gpus`, `has_gpu` and `packages` of `environment`.
    """
    if settings.machine.image != "host":  # its libraries are the image's own affair
        machine = {
            "has_gpu": bool(machine["gpus"]),
            "gpus": machine["gpus"],
            "packages": dict.fromkeys(PACKAGES, "the image's"),
        }
    if settings.machine.device == "cuda" and not machine["has_gpu"]:
        return "machine.device=cuda: no usable GPU here; machine.device=cpu runs without one"
    on_gpu = machine["has_gpu"] and settings.machine.device != "cpu"
    checks = (
        _allocator_problem,
        _attention_problem,
        _precision_problem,
        _compile_problem,
        _devices_problem,
    )
    for check in checks:
        if problem := check(settings, machine, on_gpu):
            return problem
    if settings.teacher.adapter == "qlora" and not machine["packages"].get("bitsandbytes"):
        return "teacher.adapter=qlora: bitsandbytes is not installed"
    if settings.train.trainer == "lightning" and not machine["packages"].get("pytorch-lightning"):
        return "train.trainer=lightning: pytorch-lightning is not installed"
    return None


def _allocator_problem(settings: Settings, machine: Mapping[str, Any], on_gpu: bool) -> str | None:
    """Expandable segments need virtual memory of the driver, which vGPUs and Jetsons lack."""
    if not on_gpu or not asks_expandable_segments(allocator_options(settings)):
        return None
    if driver().get("virtual_memory", ())[:1] != [False]:
        return None
    return (
        "expandable_segments: this GPU's driver maps no virtual memory (attribute 102 = 0), so the "
        "first tensor would fail with 'CUDA driver error: operation not supported'"
    )


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
    if precision == "fp8":
        return _float8_problem(machine, on_gpu)
    if precision == "tf32" and not on_gpu:
        return "train.precision=tf32: the CPU has no TF32 products; fp32 runs here"
    instead = {"tf32": "fp32", "bf16-mixed": "fp16-mixed", "bf16-true": "fp16-true"}.get(precision)
    capability = _capability(machine)
    if instead and on_gpu and capability and capability < LEAST_CAPABILITY:
        return f"train.precision={precision}: {_too_old(capability)}; {instead} runs here"
    return None


def _float8_problem(machine: Mapping[str, Any], on_gpu: bool) -> str | None:
    """Float8 products begin with Ada; torchao is an extra of its own."""
    if not on_gpu:
        return "train.precision=fp8: the CPU has no float8 products; bf16-mixed runs here"
    capability = _capability(machine)
    if capability and capability < FLOAT8_CAPABILITY:
        reason = _too_old(capability, FLOAT8_CAPABILITY)
        instead = "bf16-mixed" if capability >= LEAST_CAPABILITY else "fp16-mixed"
        return f"train.precision=fp8: {reason}; {instead} runs here"
    if not machine["packages"].get("torchao"):
        return (
            "train.precision=fp8: torchao is not installed; pip install 'ilora-bench[fp8]'; "
            "bf16-mixed runs here"
        )
    return None


def _compile_problem(settings: Settings, machine: Mapping[str, Any], on_gpu: bool) -> str | None:
    language = "C" if on_gpu else "C++"
    in_image = settings.machine.image != "host"
    if settings.train.compile == "off" or in_image or find_compiler(language):
        return None
    return f"train.compile={settings.train.compile}: no {language} compiler; off runs here"


def _devices_problem(settings: Settings, machine: Mapping[str, Any], on_gpu: bool) -> str | None:
    """Several devices are GPUs, or any number of processes on a CPU."""
    wanted, found = settings.train.devices, len(machine["gpus"])
    if settings.train.strategy == "fsdp" and (problem := _sharding_problem(settings, machine)):
        return f"train.strategy=fsdp: {problem}; ddp runs here"
    if on_gpu and wanted != "auto" and wanted > found:
        return f"train.devices={wanted}: this machine has {found} GPU{'s' * (found != 1)}"
    return None


def _sharding_problem(settings: Settings, machine: Mapping[str, Any]) -> str | None:
    """Why the frozen weights cannot be divided among processes."""
    if settings.teacher.adapter == "qlora":
        # bitsandbytes then says "quant_state is required": the parts are plain tensors.
        return "what torch gathers of a 4-bit weight has lost the constants of its blocks"
    version = str(machine["packages"].get("torch") or "0")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < SHARDING_TORCH:
        return f"torch {version} cannot leave the trained weights whole; 2.7 and newer can"
    return None


def _capability(machine: Mapping[str, Any]) -> tuple[int, int] | None:
    """Capability of the first visible GPU, None where NVML would not say."""
    found = machine["gpus"][0].get("capability") if machine["gpus"] else None
    return (found[0], found[1]) if isinstance(found, list) else None


def _too_old(capability: tuple[int, int], least: tuple[int, int] = LEAST_CAPABILITY) -> str:
    needed, found = (f"{major}.{minor}" for major, minor in (least, capability))
    return f"needs CUDA capability {needed}, this GPU has {found}"


def brief() -> Machine:
    """The part of the environment that decides which cells can run; quick enough for a plan."""
    return {
        "has_gpu": has_gpu(),
        "gpus": [dict(gpu) for gpu in gpus()],
        "packages": {name: version for name in PACKAGES if (version := installed_version(name))},
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
        "code": code_digest(),
    }


def code_digest() -> str:
    """Content address of the measured and the measuring code, 16 hexadecimal digits.

    Unlike a commit it tells changes that were never committed, and survives those of documents.
    """
    root, digest = Path(__file__).resolve().parent.parent, sha256()
    for path in sorted([*root.glob("core/*.py"), *root.glob("bench/**/*.py")]):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def variables() -> dict[str, str]:
    """Environment variables that can change what is measured; never credentials."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(VARIABLES) and not any(part in name for part in SECRETS)
    }


def check(folder: Path, on_gpu: bool = True) -> None:
    """Raise UnfitMachine, naming every reason at once, if nothing should be measured here now."""
    if problems := problems_here(folder, on_gpu):
        raise UnfitMachine("\n".join(f"machine: {problem}" for problem in problems))


def problems_here(folder: Path, on_gpu: bool = True) -> list[str]:
    """Reasons not to measure now; `folder` (or its nearest existing parent) takes the results.

    `on_gpu`: some cell would use a GPU if there is one.
    """
    problems = [f"{problem}; unset it" for problem in distorting(os.environ)]
    if on_gpu and has_gpu():
        problems += unread_allocator_variables(os.environ, installed_version("torch"))
        problems += busy(gpus())
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < LEAST_DISK_BYTES:
        problems.append(
            f"{existing} has {gib(free_bytes)} free; a run needs {gib(LEAST_DISK_BYTES)}"
        )
    available_bytes = psutil.virtual_memory().available
    if available_bytes < LEAST_MEMORY_BYTES:
        problems.append(
            f"{gib(available_bytes)} of memory free; a worker needs {gib(LEAST_MEMORY_BYTES)}"
        )
    if not os.access(existing, os.W_OK):
        problems.append(f"{existing} cannot be written; choose another folder with --out")
    return problems


def image_torch(image: str) -> str | None:
    """Version of the torch a cell of this image would load; None if only the image knows."""
    if image == "host":
        return installed_version("torch") or None
    dockerfile = Path(__file__).parent.parent / f"Dockerfile.{image}"
    if not dockerfile.is_file():
        return None
    found = re.search(r"pytorch/pytorch:(\d+\.\d+\.\d+)-cuda", dockerfile.read_text())
    return found[1] if found else None


def refuse_useless_variables(cells: Sequence[Cell]) -> None:
    """Raise InputError for variables in `machine.env` that distort timing or that nobody reads."""
    problems: dict[str, None] = {}
    for cell in cells:
        given = dict(entry.split("=", 1) for entry in cell.settings.machine.env)
        torch = image_torch(cell.settings.machine.image)
        for problem in (*distorting(given), *unread_allocator_variables(given, torch)):
            problems[f"machine.env: {problem}; take it out (cell {cell.name})"] = None
    if problems:
        raise InputError("\n".join(problems))


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


@functools.cache
def installed_version(package: str) -> str:
    """Version of an installed distribution, empty without it; nothing is imported."""
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

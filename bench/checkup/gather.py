"""The facts the doctor judges, asked of this machine; some seconds, no torch in this process."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from bench.checkup.checks import Facts
from bench.checkup.fitness import COMPILERS, busy, find_compiler
from bench.checkup.library_checks import NEEDED
from bench.checkup.probes import ISOLATION, Answer, ask
from bench.launching import engines
from bench.machine import PACKAGES, installed_version
from bench.metering.gpus import driver, gpus

ENGINE_LIMIT_S = 5.0
IMPORT_LIMIT_S = 60.0
STEP_LIMIT_S = 180.0
"""The first CUDA start and the imports of a cold disk can take a minute."""


def gather(isolate: bool) -> Facts:
    """Ask this machine everything the checks look at; some seconds."""
    visible, load = gpus(), os.getloadavg()[0]
    others = busy(visible)  # before the probes start work of their own
    versions = installed()
    engine = engines.find(engines.ENGINES, ENGINE_LIMIT_S)
    probed = ask_all(bool(visible), "flash_attn" in versions)
    steps = {}
    if isolate:
        for step in ISOLATION:
            print(f"isolate: {step.replace('_', ' ')} ...", file=sys.stderr, flush=True)
            steps[step] = ask(step, STEP_LIMIT_S)
    return Facts(
        variables=dict(os.environ),
        packages=versions,
        gpus=visible,
        driver=driver() if visible else {},
        busy=others,
        torch=probed["torch"],
        transformers=probed["transformers"],
        bitsandbytes=probed["bitsandbytes"],
        flash_attn=probed.get("flash_attn"),
        allocator=probed.get("allocator"),
        isolation=steps,
        python=sys.version_info[:2],
        base_torch=base_torch(),
        compilers={language: find_compiler(language) for language in COMPILERS},
        cpu_flags=cpu_flags(),
        engine=engine.name if isinstance(engine, engines.Engine) else None,
        no_engine="" if isinstance(engine, engines.Engine) else engine,
        toolkit=has_toolkit(),
        hub_token=has_hub_token(),
        shared_memory_bytes=free_bytes(Path("/dev/shm")),
        disk_bytes=free_bytes(Path.cwd()),
        memory_bytes=psutil.virtual_memory().available,
        cores=len(os.sched_getaffinity(0)),
        load=load,
    )  # fmt: skip


def ask_all(gpu: bool, has_flash_attn: bool) -> Mapping[str, Answer]:
    """The answers of the child processes, two at a time: they load gigabytes of libraries."""
    names = ["torch", "transformers", "bitsandbytes"]
    names += ["allocator"] * gpu + ["flash_attn"] * has_flash_attn
    print(f"asking {', '.join(names)} ...", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(
            zip(names, pool.map(lambda name: ask(name, IMPORT_LIMIT_S), names), strict=True)
        )


def installed() -> dict[str, str]:
    """Versions of the packages the checks look at."""
    names = {*PACKAGES, *NEEDED, "kernels"}
    return {name: version for name in names if (version := installed_version(name))}


def base_torch() -> str | None:
    """The torch of the interpreter below a virtual environment."""
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    base = getattr(sys, "_base_executable", sys.executable)
    try:
        done = subprocess.run([base, "-I", "-c", code], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def cpu_flags() -> frozenset[str]:
    """Feature flags of the first core."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def has_toolkit() -> bool:
    """Whether NVIDIA's container toolkit is here, as a program or as a device description."""
    programs = ("nvidia-ctk", "nvidia-container-runtime", "nvidia-container-runtime-hook")
    folders = (Path("/etc/cdi"), Path("/var/run/cdi"))
    return any(map(shutil.which, programs)) or any(
        True for folder in folders for _ in folder.glob("nvidia*")
    )


def has_hub_token() -> bool:
    """Whether the hub's client would find a token; it is not read."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    stored = Path(os.environ.get("HF_TOKEN_PATH", home / "token"))
    return stored.is_file() or any(
        os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    )


def free_bytes(folder: Path) -> int:
    """Free space of the file system that holds a folder, 0 without it."""
    return shutil.disk_usage(folder).free if folder.exists() else 0

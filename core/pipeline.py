"""The graph of stages: what each needs and may read, where its artefact lies; runs one stage."""

import ctypes
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import torch

from core import artefacts, llm, stages
from core.artefacts import Store
from core.config import InputError
from core.loop import float32_products
from core.observe import Observer
from core.readers import source_files
from core.settings import DataSettings, Settings, StageName
from core.stages import Work

STAGES: tuple[str, ...] = get_args(StageName)
FITS = ("train.trainer", "train.num_workers")


@dataclass(frozen=True)
class Stage:
    """A node of the pipeline."""

    run: Callable[[Work], None]
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    """Settings its result depends on: they are part of the artefact's address."""
    uses: tuple[str, ...] = ()
    """Settings it may see though its result does not depend on them (proved by test)."""


TEACHER = ("seed", "student", "teacher", "train", "eval", "data.batching")
# How batches are put together is no property of the ratings.
_RATINGS = tuple(f"data.{leaf}" for leaf in DataSettings.model_fields if leaf != "batching")
_TEST = ("student", "eval")
_BEFORE_TEACHER = ("prepare_data", "student_fit")
_BEFORE_TEST = (*_BEFORE_TEACHER, "teacher_fit")
_STUDENT, _DISTILL = ("seed", "student", "eval"), ("seed", "student", "distill", "eval")
PIPELINE: dict[str, Stage] = {
    "prepare_data": Stage(stages.prepare_data, (), _RATINGS),
    "student_fit": Stage(stages.student_fit, ("prepare_data",), _STUDENT, FITS),
    "student_test": Stage(stages.student_test, ("prepare_data", "student_fit"), _TEST),
    "teacher_fit": Stage(stages.teacher_fit, _BEFORE_TEACHER, TEACHER),
    "teacher_test": Stage(stages.teacher_test, _BEFORE_TEST, TEACHER),
    "teacher_outputs": Stage(stages.teacher_outputs, _BEFORE_TEST, TEACHER),
    "distill_fit": Stage(stages.distill_fit, ("prepare_data", "teacher_outputs"), _DISTILL, FITS),
    "distill_test": Stage(stages.distill_test, ("prepare_data", "distill_fit"), _TEST),
    "evaluate_all": Stage(
        stages.evaluate_all, ("student_test", "teacher_test", "distill_test"), ("eval",)
    ),
}


@dataclass(frozen=True)
class Planned:
    """A stage with its address and the folders or addresses it builds on."""

    name: str
    address: str
    upstream: dict[str, str]
    given: dict[str, Path]
    """Upstream stages replaced by a folder the settings name."""
    batches: int
    """Batches of each of its phases in a short trial; 0 = all."""


def plan(
    settings: Settings, fast_dev_run: int = 0, shortened: Sequence[str] = STAGES
) -> dict[str, Planned]:
    """Addresses of all stages under these settings, in order; runs nothing.

    `fast_dev_run` cuts every phase of the `shortened` stages to so many batches, as in Lightning:
    what they make has addresses of its own. `prepare_data` has no batches and stays whole. Raises
    InputError when source files or named checkpoints are missing.
    """
    named = {
        "teacher_fit": {"student_fit": settings.teacher.rec_model_checkpoint_path},
        "teacher_test": {"student_fit": settings.teacher.rec_model_checkpoint_path},
        "teacher_outputs": {"student_fit": settings.teacher.rec_model_checkpoint_path},
        "distill_fit": {"teacher_outputs": settings.distill.teacher_checkpoint_path},
    }
    sources = artefacts.digest(artefacts.file_states(source_files(settings.data)))
    planned: dict[str, Planned] = {}
    for name, stage in PIPELINE.items():
        given = {need: Path(path) for need, path in named.get(name, {}).items() if path}
        upstream = {
            need: artefacts.digest(_given_files(need, given[need]))
            if need in given
            else planned[need].address
            for need in stage.needs
        }
        if name == "prepare_data":
            upstream = {"sources": sources}
        batches = fast_dev_run if name in shortened and name != "prepare_data" else 0
        marked = upstream | {"fast_dev_run": str(batches)} if batches else upstream
        where = artefacts.address(name, settings, stage.reads, marked)
        planned[name] = Planned(name, where, upstream, given, batches)
    return planned


def _given_files(stage: str, folder: Path) -> dict[str, str]:
    """Files and hashes of a folder the settings name in place of a stage."""
    manifest = artefacts.read_manifest(folder)
    if manifest["stage"] != stage:
        raise InputError(f"{folder}: made by {manifest['stage']}; wanted a folder of {stage}")
    return manifest["files"]


def required(stages: Sequence[str], settings: Settings) -> list[str]:
    """The stages these need before them, in order, themselves left out."""
    planned, wanted, queue = plan(settings), set(), list(stages)
    while queue:
        stage = queue.pop()
        for need in PIPELINE[stage].needs:
            if need not in planned[stage].given and need not in wanted:
                wanted.add(need)
                queue.append(need)
    return [stage for stage in STAGES if stage in wanted and stage not in stages]


def run_stage(
    name: str,
    settings: Settings,
    store: Store,
    observer: Observer,
    *,
    planned: dict[str, Planned] | None = None,
) -> tuple[Path, bool]:
    """Find or make a stage's artefact: (folder, whether it was made now).

    Raises InputError when a stage before it has not run, or its files differ from their manifest.
    """
    planned = planned or plan(settings)
    this = planned[name]
    if done := store.find(name, this.address):
        return done, False
    inputs = inputs_of(name, store, planned)
    started, clock = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), time.perf_counter()
    with store.create(name, this.address) as folder:
        with at_work(this, settings, inputs, folder, observer) as work:
            PIPELINE[name].run(work)
        with observer.phase("seal"):
            artefacts.write_manifest(
                folder,
                {
                    "stage": name,
                    "address": this.address,
                    "upstream": this.upstream,
                    "fast_dev_run": this.batches,
                    "settings": settings.model_dump(mode="json"),
                    "started": started,
                    "wall_s": time.perf_counter() - clock,
                    "phases": dict(observer.phases),
                    "metrics": observer.metrics,
                    "facts": observer.facts,
                },
            )
    return store.root / f"{name}-{this.address}", True


def inputs_of(name: str, store: Store, planned: dict[str, Planned]) -> dict[str, Path]:
    """Folders of the stages before one, every file checked against its manifest.

    Raises InputError when one has not run, or its files differ.
    """
    inputs = {}
    for need in PIPELINE[name].needs:
        folder = planned[name].given.get(need) or store.find(need, planned[need].address)
        if folder is None:
            raise InputError(
                f"{name}: needs {need}, which has not run with these settings and this code; "
                "run it first, or all stages"
            )
        artefacts.read_manifest(folder)
        inputs[need] = folder
    return inputs


@contextmanager
def at_work(
    this: Planned, settings: Settings, inputs: dict[str, Path], folder: Path, observer: Observer
) -> Iterator[Work]:
    """The order of one stage, with this process in the state the stage runs in."""
    stage, device = PIPELINE[this.name], choose_device(settings)
    observer.facts.update(device=str(device), image=image(), container=container())
    observer.facts["torch_cuda"] = torch.version.cuda
    view: SimpleNamespace = artefacts.visible(settings, (*stage.reads, *stage.uses))
    # Only the teacher's stages read `train`: those of the students keep full fp32.
    precision = settings.train.precision if "train" in stage.reads else "fp32"
    with float32_products(precision), observer.until_end:
        yield Work(view, inputs, folder, device, observer, this.upstream, this.batches)


def choose_device(settings: Settings) -> torch.device:
    """The device of the run; `auto` takes CUDA where there is one. Raises InputError for a device
    that is not there or cannot do what `train.precision` asks for.
    """
    wanted = settings.machine.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("machine.device: cuda, but torch sees no CUDA device; use cpu or auto")
    device = torch.device(wanted)
    if settings.train.precision == "fp8" and (problem := llm.float8_problem(device)):
        raise InputError(f"train.precision: fp8: {problem}")
    return device


def prepare_process(settings: Settings) -> None:
    """Set this process up: CPU threads, and an allocator that keeps freed memory.

    glibc returns large blocks to the kernel at once by default; training asks for the same blocks
    every step and would pay for fresh pages each time.
    """
    # Notes of libraries about optional kernels and their own old names; nothing here acts on them.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    if settings.machine.threads:
        torch.set_num_threads(settings.machine.threads)
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # another C library: its own rules apply
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)


def image() -> str:
    """Name of the image this process sees itself in, `host` outside of any.

    By the variable of our Dockerfiles; other images have no name inside.
    """
    return os.environ.get("ILORA_BENCH_IMAGE") or ("unnamed" if container()["engine"] else "host")


def container() -> dict[str, str | None]:
    """Host name that this process sees and the engine whose mark it finds, None outside of any."""
    marks = {"docker": "/.dockerenv", "podman": "/run/.containerenv"}
    found = (engine for engine, mark in marks.items() if Path(mark).exists())
    return {"id": platform.node(), "engine": next(found, None)}

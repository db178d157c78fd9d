"""One extra repeat of a cell, for its reasons and not its times: traces, counts, probes, memory.

It runs every measured stage whole, as the cell's other repeats do, and looks closely at eight steps
of each: some alone on an idle device (probes), one under counters, some under torch.profiler. What
it finds lies in files of its own and never in records.jsonl, so no verdict can see it: the profiler
makes a step half as slow again, the counters several times.

Worker side: imports torch.
"""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.profile import ceilings, trace
from bench.profile.profiled import Profiled
from bench.profile.snapshots import History
from core import pipeline
from core.artefacts import Store
from core.loop import float32_products
from core.observe import Observer
from core.settings import Settings

MOST_OPERATORS = 40


def profile_cell(
    cell: dict[str, Any],
    settings: Settings,
    store: Store,
    planned: dict[str, pipeline.Planned],
    enter: Callable[[str], None],
    listening: Callable[[], Observer],
) -> None:
    """Profile all stages of a cell file into the folder `profile` of its private artefacts."""
    folder = Path(cell["artefacts"]) / "profile"
    folder.mkdir(parents=True)
    for name in cell["stages"]:
        enter(name)
        found = profile_stage(
            name, settings, store, planned, listening(), folder, cell["warmup_steps"]
        )
        (folder / f"{name}.json").write_text(json.dumps(found, indent=1))


def profile_stage(
    name: str,
    settings: Settings,
    store: Store,
    planned: dict[str, pipeline.Planned],
    said: Observer,
    folder: Path,
    warmup_steps: int,
) -> dict[str, Any]:
    """What one stage showed, its files written; every step and phase is passed on to `said`."""
    device = pipeline.choose_device(settings)
    files = {"trace": folder / f"{name}.trace.json.gz", "snapshot": folder / f"{name}.pickle"}
    begun = time.perf_counter()
    seen, dtype = watch(name, settings, store, planned, said, files, warmup_steps)
    wall_s = time.perf_counter() - begun
    gc.collect()  # the model: the ceilings need room
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with said.phase("ceilings"):
        most = ceilings_of(name, settings, dtype, device)
    with said.phase("trace"):
        window = read_trace(files["trace"])
    return {
        "stage": name,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "wall_s": wall_s,
        **seen,
        "ceilings": most,
        "window": window,
        "files": [path.name for path in files.values() if path.is_file()],
    }


def watch(
    name: str,
    settings: Settings,
    store: Store,
    planned: dict[str, pipeline.Planned],
    said: Observer,
    files: dict[str, Path],
    warmup_steps: int,
) -> tuple[dict[str, Any], str | None]:
    """Run a stage under its script: what was seen, and the dtype of most of its products."""
    device = pipeline.choose_device(settings)
    history = History(device)
    observer = Profiled(said, device, history, files, warmup_steps)
    history.record()
    try:
        pipeline.run_stage(name, settings, store, observer, planned=planned)
    finally:
        observer.script.close()
        history.stop()
        said.learnt = dict
    dtypes: dict[str, int] = observer.facts.get("gemm_dtypes") or {}
    found = {
        "probes": observer.probed,
        "counted": observer.counted,
        "backbone": asdict(observer.sizes) if observer.sizes else None,
        "missing": observer.missing(),
    }
    return found, max(dtypes, key=lambda one: dtypes[one]) if dtypes else None


def ceilings_of(
    name: str, settings: Settings, dtype: str | None, device: torch.device
) -> dict[str, Any]:
    """The ceilings for the dtype of the products that ran; a student's are those of its setting."""
    if dtype is None:
        dtype = "bfloat16" if settings.student.precision == "bf16-mixed" else "float32"
    precision = settings.train.precision if name.startswith("teacher") else "fp32"
    with float32_products(precision):
        setting = torch.get_float32_matmul_precision()
        gemm = ceilings.gemm_flops_per_s(device, getattr(torch, dtype), setting)
    return {
        "dtype": "tf32" if dtype == "float32" and precision == "tf32" else dtype,
        "gemm_flops_per_s": gemm,
        "copy_bytes_per_s": ceilings.copy_bytes_per_s(device),
    }


def read_trace(path: Path) -> dict[str, Any] | None:
    """The figures of the profiled window, and a memory track for the viewer; None without one."""
    if not path.is_file():
        return None
    found = trace.read(path)
    events = found["traceEvents"]
    begin, end = trace.window(events)
    operators, memory = trace.operators(events), trace.memory(events)
    trace.write(path, trace.with_memory_track(found))
    return {
        "steps": trace.steps(events),
        "seconds": (end - begin) * trace.US,
        "device_busy": trace.device_busy(events),
        "operators": [asdict(one) for one in operators[:MOST_OPERATORS]],
        "memory": None if memory is None else asdict(memory),
    }

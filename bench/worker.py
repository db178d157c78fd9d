"""The child process: one cell, one repeat, a record line for each stage (see bench/README.md)."""

import gc
import json
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from bench.metering import invariants, noise, sampler
from core.settings import Settings

PROGRESS_S = 0.5
COMPILE = "compile"
PREFLIGHT_BATCHES = 2
"""Of every phase; one could hide what goes wrong between two."""
MEASURING = ("measure", "memory_probe")
"""Tasks that write a record line for each stage."""
FAILURES = {
    "OutOfMemoryError": "oom_gpu",
    "MemoryError": "oom_host",
    "ImportError": "import",
    "ModuleNotFoundError": "import",
    "NonFiniteLoss": "bad_output",
    "BadCheckpoint": "bad_output",
}
"""Exception type -> status; the parent reads the text of any other."""


class Lines:
    """The record file: one JSON line each, flushed, and where the worker is right now.

    A second thread may write too, hence the lock.
    """

    def __init__(self, file: TextIO):
        self.file = file
        self.begun_s = time.monotonic()
        """When this program began, by the clock that all processes of a machine share."""
        self.stage, self.phase = "start_up", "start_up"
        self.steps: Counter[str] = Counter()
        """Steps of this stage by phase: a phase goes on counting after one inside it has ended."""
        self.learnt: dict[str, float] = {}
        """What a long phase has found out so far; goes with every progress line while it is set."""
        self.last_s = -math.inf
        self.learning: Callable[[], dict[str, float]] = dict
        """Asked for `learnt` while the phase lasts."""
        self.lock = threading.RLock()

    @property
    def step(self) -> int:
        return self.steps[self.phase]

    def write(self, kind: str, **values: Any) -> None:
        with self.lock:
            self.file.write(json.dumps({"kind": kind, **values}) + "\n")
            self.file.flush()

    def enter(self, stage: str, phase: str = "begin") -> None:
        """Another stage or phase: said at once, for a death or a time limit wants to know where."""
        with self.lock:
            if stage != self.stage:
                self.steps.clear()
            if (stage, phase) != (self.stage, self.phase):
                self.last_s = -math.inf
            self.stage, self.phase = stage, phase
            self.learnt = self.learning() if phase == COMPILE else {}
            self.progress()

    def beat(self) -> None:
        """A sign of life from a phase without steps, with what it has learnt."""
        with self.lock:
            if self.phase == COMPILE:
                self.learnt = self.learning()
                self.progress()

    def progress(self) -> None:
        """At most one line in half a second: the parent looks for a sign of life, not for a log."""
        with self.lock:  # a line late by a moment would put the worker back where it was
            if (now := time.monotonic()) - self.last_s >= PROGRESS_S:
                self.last_s = now
                place = {"stage": self.stage, "phase": self.phase, "step": self.step}
                learnt = {"learnt": self.learnt} if self.learnt else {}
                self.write("progress", time_s=time.time(), **place, **learnt)


@contextmanager
def heartbeat(lines: Lines) -> Iterator[None]:
    """Inside the block a second thread keeps saying how far compiling has come."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(PROGRESS_S):
            lines.beat()

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def main() -> int:
    cell = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with Path(cell["records"]).open("a", encoding="utf-8") as file:
        lines = Lines(file)
        try:
            with heartbeat(lines):
                work(cell, lines)
        except Exception as error:  # the text becomes the record
            import traceback

            traceback.print_exc()
            lines.write(
                "failure",
                stage=lines.stage,
                phase=lines.phase,
                status=status_of(error),
                reason=f"{type(error).__name__}: {error}",
            )
            return 1
        lines.write("end", time_s=time.time(), clock_s=time.monotonic())
    return 0


def status_of(error: Exception) -> str | None:
    """The status an exception's type decides; None leaves it to the parent and its texts."""
    for kind in type(error).__mro__:
        if kind.__name__ in FAILURES:
            return FAILURES[kind.__name__]
    return None


def work(cell: dict[str, Any], lines: Lines) -> None:
    """Set-up (`prepare`), one half of the preflight, a profile, or measurement of one cell; or the
    short trial of a batch size (`memory_probe`) and the equally short set-up before it.
    """
    settings = Settings.model_validate(cell["settings"])
    # Its first sample is to show the device before CUDA starts here.
    is_metered, is_probe = cell["task"] in MEASURING, cell["task"].startswith("memory_")
    sampled = sampler.start(settings.machine.device) if is_metered else None
    gc.disable()  # thousands of modules are about to load: collecting costs a second, frees nothing
    from bench.profile import snapshots
    from core import pipeline
    from core.artefacts import Store

    gc.enable()
    imported_s = time.monotonic()
    pipeline.prepare_process(settings)
    shared = Path(cell["shared_artefacts"])
    watch = watch_device(settings, sampled)
    here = process_facts(settings)
    if cell["task"] == "memory_probe":
        here["room_bytes"] = wall_in(cell["room_bytes"], watch.device, lines)
    clock = {"begun_s": lines.begun_s, "imported_s": imported_s, "ready_s": time.monotonic()}
    lines.write("start", time_s=time.time(), pid=os.getpid(), machine=here, clock=clock)
    if cell.get("gpu_given") and here["gpu"] is None:
        raise RuntimeError(
            f"the container was given a GPU and torch {here['torch']} with CUDA "
            f"{here['torch_cuda']} sees none; machine.device=cpu measures without one"
        )
    planned = pipeline.plan(settings, PREFLIGHT_BATCHES if is_probe else 0)
    if cell["task"] in ("prepare", "memory_set_up"):
        store = Store(shared)
        for name in pipeline.required(cell["stages"], settings):
            lines.enter(name)
            pipeline.run_stage(name, settings, store, listening(lines), planned=planned)
        return
    store = Store(Path(cell["artefacts"]), shared)
    snapshots.write_on_oom(watch.device, Path(cell["records"]).with_suffix(".oom.pickle"))
    if cell["task"] == "profile":
        from bench import profiling

        profiling.profile_cell(
            cell, settings, store, planned, lines.enter, lambda: listening(lines)
        )
        return
    if not is_metered:
        preflight(cell, settings, store, lines)
        return
    try:
        for name in cell["stages"]:
            lines.enter(name)
            lines.write("stage", **measure(name, settings, store, planned, cell, lines, watch))
    finally:
        watch.stop()


def watch_device(settings: Settings, sampled: sampler.Sampler | None) -> Any:
    """The watch on this worker's device; it starts CUDA, so it is made before anything uses it."""
    from bench import meters
    from core import pipeline

    return meters.DeviceWatch(pipeline.choose_device(settings), sampled)


def wall_in(limit_bytes: int | None, device: Any, lines: Lines) -> int:
    """Let no more memory be taken from here on than a probe may; the limit."""
    from bench.schedule import room

    if device.type == "cuda":
        return room.wall_device(limit_bytes, device)

    def die(reason: str) -> None:
        place = {"stage": lines.stage, "phase": lines.phase}
        lines.write("failure", **place, status="oom_host", reason=reason)
        os._exit(1)  # the main thread may be waiting for memory

    return room.wall_host(limit_bytes or room.host_bytes(), die)


def preflight(cell: dict[str, Any], settings: Settings, store: Any, lines: Lines) -> None:
    """One half of a short trial of the measured stages, each phase cut to a few batches.

    The first ends behind the last fit. The second is another process: it loads every checkpoint
    anew, compares, and does the stages that are left.
    """
    from core import pipeline, reload

    stages = cell["stages"]
    planned = pipeline.plan(settings, PREFLIGHT_BATCHES, stages)
    fits = [name for name in stages if name.endswith("_fit")]
    border = stages.index(fits[-1]) + 1 if fits else 0
    if cell["task"] == "preflight_load":
        for name in fits:
            lines.enter(name)
            reload.check(name, settings, store, listening(lines), planned)
    for name in stages[:border] if cell["task"] == "preflight_fit" else stages[border:]:
        lines.enter(name)
        pipeline.run_stage(name, settings, store, listening(lines), planned=planned)


def measure(
    name: str,
    settings: Settings,
    store: Any,
    planned: dict,
    cell: dict[str, Any],
    lines: Lines,
    watch: Any,
) -> dict[str, Any]:
    """Run one stage under all meters; its record line."""
    import torch

    from bench import meters
    from core import pipeline

    device = watch.device
    on_gpu = device.type == "cuda"
    clock, trend = meters.StepClock(device), meters.MemoryTrend(device)
    observer = listening(lines, clock, trend)
    running = meters.start(watch)
    started, begun = datetime.now(UTC), time.perf_counter()
    _, made = pipeline.run_stage(name, settings, store, observer, planned=planned)
    if on_gpu:
        torch.cuda.synchronize(device)
    wall_s = time.perf_counter() - begun
    metered = running.stop()
    if not made:
        raise RuntimeError(f"{name}: found finished before it was measured; nothing was timed")
    phases = {phase: seconds for phase, seconds in observer.phases.items()}
    phases["unaccounted"] = max(0.0, wall_s - math.fsum(phases.values()))
    facts = {
        **observer.facts,
        "lightning_imported": "pytorch_lightning" in sys.modules,
        "env": {name: os.environ.get(name) for name in cell.get("variables", ())},
    }
    if on_gpu:
        facts["allocator_settings"] = torch.cuda.memory._snapshot()["allocator_settings"]
    counts = {**observer.counts, "compile_steps": clock.compile_steps}
    record = {
        "stage": name,
        "status": "ok",
        "reason": None,
        "started": started.isoformat(timespec="milliseconds"),
        "wall_s": wall_s,
        "phases": phases,
        "steps": clock.steps(),
        "warmup_steps": cell["warmup_steps"],
        "counts": counts,
        **metered,
        "memory_by_rows": trend.as_json(),
        "loader_wait_s": observer.loader_wait_s if counts.get("micro_batches") else None,
        "facts": facts,
        "losses": observer.loss_trace(),
        "metrics": observer.metrics,
        "ranks": observer.ranks,
        "data_digest": data_digest(store, planned),
    }
    return record | {"tags": noise.tags(record), "warnings": invariants.violations(record)}


def data_digest(store: Any, planned: dict) -> str | None:
    """Digest of the ratings that this process was given; None where none were prepared."""
    from core.artefacts import MANIFEST

    if (folder := store.find("prepare_data", planned["prepare_data"].address)) is None:
        return None
    digest: str = json.loads((folder / MANIFEST).read_text())["facts"]["data_digest"]
    return digest


def listening(lines: Lines, clock: Any = None, trend: Any = None) -> Any:
    """An observer whose steps and phases reach the progress lines, the step clock and the trend of
    memory.
    """
    from core.observe import Observer

    def on_step(step: Any) -> None:
        if clock is not None:
            clock.on_step(step)
        if trend is not None:
            trend.on_step(step)
        lines.steps[lines.phase] += 1
        lines.progress()

    def on_phase(name: str) -> None:
        if clock is not None:
            clock.on_phase(name)
        lines.enter(lines.stage, name)

    observer = Observer(on_step, on_phase)
    lines.learning = lambda: observer.learnt()
    return observer


def process_facts(settings: Settings) -> dict[str, Any]:
    """What this very process runs on: the versions loaded, not those asked for."""
    import platform

    import torch
    import transformers

    from core import pipeline

    device = pipeline.choose_device(settings)
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_file": torch.__file__,
        "transformers": transformers.__version__,
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "threads": torch.get_num_threads(),
        "image": pipeline.image(),
    }


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Every record is on the disk. Taking an interpreter full of torch apart takes most of a second
    # that belongs to no stage, and nobody waits for what it frees.
    os._exit(status)

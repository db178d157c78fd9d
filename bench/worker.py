"""The child process: one cell, one repeat, a record line for each stage (see bench/README.md)."""

import gc
import json
import math
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from core.settings import Settings

PROGRESS_S = 0.5
FAILURES = {
    "OutOfMemoryError": "oom_gpu",
    "MemoryError": "oom_host",
    "ImportError": "import",
    "ModuleNotFoundError": "import",
    "NonFiniteLoss": "bad_output",
}
"""Exception type -> status; the parent reads the text of any other."""


class Lines:
    """The record file: one JSON line each, flushed, and where the worker is right now."""

    def __init__(self, file: TextIO):
        self.file = file
        self.stage, self.phase, self.step = "start_up", "start_up", 0
        self.last_s = -math.inf

    def write(self, kind: str, **values: Any) -> None:
        self.file.write(json.dumps({"kind": kind, **values}) + "\n")
        self.file.flush()

    def enter(self, stage: str) -> None:
        """A stage begins: said at once, or a death in its first moments would have no place."""
        self.stage, self.phase, self.step, self.last_s = stage, "begin", 0, -math.inf
        self.progress()

    def progress(self) -> None:
        """At most one line in half a second: the parent looks for a sign of life, not for a log."""
        if (now := time.monotonic()) - self.last_s >= PROGRESS_S:
            self.last_s = now
            self.write(
                "progress", time_s=time.time(), stage=self.stage, phase=self.phase, step=self.step
            )


def main() -> int:
    cell = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with Path(cell["records"]).open("a", encoding="utf-8") as file:
        lines = Lines(file)
        try:
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
        lines.write("end", time_s=time.time())
    return 0


def status_of(error: Exception) -> str | None:
    """The status an exception's type decides; None leaves it to the parent and its texts."""
    for kind in type(error).__mro__:
        if kind.__name__ in FAILURES:
            return FAILURES[kind.__name__]
    return None


def work(cell: dict[str, Any], lines: Lines) -> None:
    """Set-up (`prepare`) or measurement of one cell."""
    settings = Settings.model_validate(cell["settings"])
    gc.disable()  # thousands of modules are about to load: collecting costs a second, frees nothing
    from core import pipeline
    from core.artefacts import Store

    gc.enable()
    pipeline.prepare_process(settings)
    shared = Path(cell["shared_artefacts"])
    lines.write("start", time_s=time.time(), pid=os.getpid(), machine=process_facts(settings))
    planned = pipeline.plan(settings)
    if cell["prepare"]:
        store = Store(shared)
        for name in pipeline.required(cell["stages"], settings):
            lines.enter(name)
            pipeline.run_stage(name, settings, store, listening(lines), planned=planned)
        return
    store = Store(Path(cell["artefacts"]), shared)
    for name in cell["stages"]:
        lines.enter(name)
        lines.write("stage", **measure(name, settings, store, planned, cell, lines))


def measure(
    name: str, settings: Settings, store: Any, planned: dict, cell: dict[str, Any], lines: Lines
) -> dict[str, Any]:
    """Run one stage under all meters; its record line."""
    from bench import meters
    from core import pipeline

    device = pipeline.choose_device(settings)
    clock = meters.StepClock(device)
    observer = listening(lines, clock)
    running = meters.start(device)
    started, begun = datetime.now(UTC), time.perf_counter()
    _, made = pipeline.run_stage(name, settings, store, observer, planned=planned)
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    wall_s = time.perf_counter() - begun
    memory = running.stop()
    if not made:
        raise RuntimeError(f"{name}: found finished before it was measured; nothing was timed")
    phases = {phase: seconds for phase, seconds in observer.phases.items()}
    phases["unaccounted"] = max(0.0, wall_s - math.fsum(phases.values()))
    facts = {**observer.facts, "lightning_imported": "pytorch_lightning" in sys.modules}
    counts = dict(observer.counts)
    return {
        "stage": name,
        "status": "ok",
        "reason": None,
        "started": started.isoformat(timespec="milliseconds"),
        "wall_s": wall_s,
        "phases": phases,
        "steps": clock.steps(),
        "warmup_steps": cell["warmup_steps"],
        "counts": counts,
        "memory": memory,
        "loader_wait_s": observer.loader_wait_s if counts.get("micro_batches") else None,
        "facts": facts,
        "losses": observer.loss_trace(),
        "metrics": observer.metrics,
        "ranks": observer.ranks,
        "warnings": running.warnings,
    }


def listening(lines: Lines, clock: Any = None) -> Any:
    """An observer whose steps and phases reach the progress lines and the step clock."""
    from core.observe import Observer

    def on_step(step: Any) -> None:
        if clock is not None:
            clock.on_step(step)
        lines.step += 1
        lines.progress()

    def on_phase(name: str) -> None:
        if clock is not None:
            clock.on_phase(name)
        lines.phase, lines.step = name, 0
        lines.progress()

    return Observer(on_step, on_phase)


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

"""What the meters themselves cost: the same training with each of them on and off, block by block.

`python -m bench.overhead [MATRIX]` trains the teacher of a matrix's baseline again and again in one
process, once with each meter in every block, and prints the ratio of the time from the first to the
last training step to that without any, with its interval on this machine: wall time on a GPU, on a
CPU the CPU time of the process, which a neighbour disturbs less and which holds what a meter's
thread uses up elsewhere. The row `none` is the same again without any: what it shows is noise.

Worker side: imports torch.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import meters, worker
from bench.judging.intervals import ALPHA, decide, paired
from bench.machine import has_gpu
from bench.matrix import cells, load_matrix
from bench.metering import host, sampler
from bench.reporting.tables import table
from core import pipeline
from core.artefacts import Store
from core.observe import Observer, Step
from core.settings import Settings

STAGE, AFTER = "teacher_fit", "validation"
"""What is run; the phase that begins when its last step has ended."""
FLOOR = 0.01
"""A meter that costs less than this share of a step costs nothing."""

Meter = Callable[[torch.device, Path], Any]
"""Device and a scratch folder -> a context whose value listens to steps and phases."""


class Deaf:
    """Listens to nothing."""

    def on_step(self, step: Step) -> None: ...

    def on_phase(self, name: str) -> None: ...


@contextmanager
def none(device: torch.device, folder: Path) -> Iterator[Deaf]:
    """No meter."""
    yield Deaf()


@contextmanager
def step_clock(device: torch.device, folder: Path) -> Iterator[Any]:
    """Events or times at the border of each step."""
    yield meters.StepClock(device)


@contextmanager
def memory_by_rows(device: torch.device, folder: Path) -> Iterator[Any]:
    """Memory against rows."""
    trend: Any = meters.MemoryTrend(device)
    trend.on_phase = Deaf().on_phase
    yield trend


@contextmanager
def progress_lines(device: torch.device, folder: Path) -> Iterator[Any]:
    """The worker's signs of life, its heartbeat thread included."""
    with (folder / "lines").open("w") as file:
        lines = worker.Lines(file)
        with worker.heartbeat(lines):
            yield worker.listening(lines)


@contextmanager
def host_memory(device: torch.device, folder: Path) -> Iterator[Deaf]:
    """The thread that looks at the process tree."""
    watching = host.HostMemory()
    watching.start()
    yield Deaf()
    watching.stop()


@contextmanager
def device_sampler(device: torch.device, folder: Path) -> Iterator[Deaf]:
    """The process that samples the GPU through NVML."""
    running = sampler.start(str(device))
    if running is None:
        raise RuntimeError(f"no sampler for {device}")
    running.baseline()
    yield Deaf()
    running.stop()


@contextmanager
def all_of_them(device: torch.device, folder: Path) -> Iterator[Any]:
    """What a measured repeat has."""
    watch = meters.DeviceWatch(device, sampler.start(str(device)))
    clock, trend = meters.StepClock(device), meters.MemoryTrend(device)
    with (folder / "lines").open("w") as file:
        lines = worker.Lines(file)
        with worker.heartbeat(lines):
            running = meters.start(watch)
            yield worker.listening(lines, clock, trend)
            running.stop()
    watch.stop()


METERS: dict[str, Meter] = {
    "none": none,
    "step clock": step_clock,
    "memory by rows": memory_by_rows,
    "progress lines": progress_lines,
    "host-memory thread": host_memory,
    "NVML sampler": device_sampler,
    "all together": all_of_them,
}


def seconds_of_steps(
    settings: Settings, shared: Path, meter: Meter, planned: Mapping[str, Any]
) -> float:
    """Seconds from the end of the first training step, the observed one, to that of the last."""
    device = pipeline.choose_device(settings)
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as scratch, meter(device, Path(scratch)) as listener:

        def on_step(step: Step) -> None:
            listener.on_step(step)
            if not ends:
                ends.append(now(device))

        def on_phase(name: str) -> None:
            listener.on_phase(name)
            if name == AFTER and len(ends) == 1:
                ends.append(now(device))

        store = Store(Path(scratch) / "own", shared)
        observer = Observer(on_step, on_phase)
        pipeline.run_stage(STAGE, settings, store, observer, planned=dict(planned))
    return ends[1] - ends[0]


def now(device: torch.device) -> float:
    """The clock that is judged, with the device idle."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(
    settings: Settings, blocks: int, chosen: Mapping[str, Meter]
) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds without a meter and with each, one figure a block; the order turns with the block."""
    pipeline.prepare_process(settings)
    planned = pipeline.plan(settings)
    found: dict[str, list[float]] = {name: [] for name in ("off", *chosen)}
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder)
        for name in pipeline.required([STAGE], settings):
            pipeline.run_stage(name, settings, Store(shared), Observer(), planned=planned)
        seconds_of_steps(settings, shared, none, planned)  # the first of a process is slow
        for block in range(blocks):
            order = list(found)
            for name in order[block % len(order) :] + order[: block % len(order)]:
                meter = chosen.get(name, none)
                found[name].append(seconds_of_steps(settings, shared, meter, planned))
    return found.pop("off"), found


def report(off: list[float], on: Mapping[str, list[float]]) -> str:
    """A table: meter, ratio of the time in steps to that without, interval, what it comes to."""
    rows = []
    for name, seconds in on.items():
        effect = paired(seconds, off)
        width = effect.half_width(ALPHA) if effect.blocks > 1 else math.inf
        low, high = (math.exp(effect.mean + side) for side in (-width, width))
        call, _ = decide(effect, FLOOR)
        words = {
            "same": f"less than {100 * FLOOR:g} %",
            "slower": "slows the steps",
            "faster": "noise: nothing gets faster by a meter",
        }
        said = words.get(call, "not told apart from nothing; more blocks would tell")
        rows.append([name, f"{math.exp(effect.mean):.4f}", f"{low:.4f} to {high:.4f}", said])
    return table(["meter", "ratio", "95 % interval", "what it comes to"], rows)


def main(
    matrix: Annotated[
        Path, typer.Argument(help="Its baseline is trained; all of its data, one epoch at a time.")
    ] = Path("matrices/smoke.yaml"),
    blocks: Annotated[int, typer.Option(min=2, help="Rounds through all meters.")] = 10,
) -> None:
    """Measure what each meter costs on this machine."""
    sets = ["train.max_steps=-1", "train.max_epochs=1"]
    settings = cells(load_matrix(matrix, sets), has_gpu())[0].settings
    on_gpu = pipeline.choose_device(settings).type == "cuda"
    chosen = {name: m for name, m in METERS.items() if on_gpu or m is not device_sampler}
    begun = time.monotonic()
    off, on = measure(settings, blocks, chosen)
    print(report(off, on))
    print(
        f"\n{blocks} blocks, {sum(off) / len(off):.2f} s in the steps of a fit, "
        f"{time.monotonic() - begun:.0f} s in all"
        + ("" if on_gpu else "; no CUDA device, so no NVML sampler")
    )


if __name__ == "__main__":
    typer.run(main)

"""Where workers run: on this machine, or, as `cluster` has it, on the nodes of a cluster."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.comparing import calibration
from bench.launch import Outcome, run_worker
from bench.launching.deaths import Events, Job
from bench.machine import Machine, Obstacle, UnfitMachine
from bench.matrix import Cell
from bench.schedule import blocks


class Site:
    """This machine, as far as the main command asks."""

    def __init__(self) -> None:
        self.left_out: list[str] = []
        """Machines that are not used, each with the reason."""

    def brief(self) -> Machine:
        """What decides the cells of a matrix: `has_gpu`."""
        return machine.brief()

    def take(self, cells: Sequence[Cell], earlier: Machine | None) -> None:
        """Get hold of what these cells need, like what an earlier sitting had."""

    def obstacle(self, cell: Cell) -> Obstacle | None:
        """Why a cell cannot run."""
        return machine.obstacle(cell.settings, machine.brief())

    def problems(self, out: Path, on_gpu: bool) -> list[str]:
        """Why nothing should be measured now; `out` takes the results."""
        return machine.problems_here(out, on_gpu)

    def check(self, out: Path, on_gpu: bool) -> None:
        """Raise UnfitMachine with all of them."""
        if found := self.problems(out, on_gpu):
            raise UnfitMachine("\n".join(f"machine: {problem}" for problem in found))

    def environment(self) -> Machine:
        """The record of what measures."""
        return machine.environment()

    def calibrate(self, worker: Sequence[str], on_gpu: bool) -> dict[str, Any]:
        """How fast it is at a few fixed kernels."""
        return calibration.of_run(worker, on_gpu)

    def launch(
        self, job: Job, stopped: Callable[[], bool], on_progress: Callable[[Events], None]
    ) -> Outcome:
        """Run one worker to its end."""
        return run_worker(job, stopped, on_progress)

    def walk(self, w: blocks.Walk) -> None:
        """Measure what is missing, block after block."""
        blocks.walk(w)

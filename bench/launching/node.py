"""On a node of a Ray cluster: runs one worker after another, as on the machine of the parent.

An instance of `Node` is an actor of Ray and holds its device, so nobody else's task is there for as
long as it lives. It has a scratch folder of its own that looks like a run folder.
"""

import fcntl
import io
import json
import os
import platform
import shutil
import sys
import tarfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import Any

from bench import machine
from bench.comparing import calibration
from bench.launch import Interrupted, Outcome, run_worker
from bench.launching.deaths import Events, Job
from bench.machine import UnfitMachine
from bench.metering.gpus import gpus
from core.settings import Settings

PREFIX = "ilora-bench-node-"
CHOSEN_GPUS = "CUDA_VISIBLE_DEVICES"
LEAVING_NOTHING = ("measure", "prepare", "preflight_load")
"""Tasks whose private artefacts nobody reads; those of others go back to the parent."""


@dataclass(frozen=True)
class Order:
    """One worker to run; the paths of `job` are those of the parent's machine."""

    job: Job
    cell: Mapping[str, Any]
    """What the cell file says."""
    interpreter: str
    """The parent's; a node has its own."""
    shared: Mapping[str, Any]
    """What set-up made: name -> reference to its packed files."""
    private: bytes | None
    """What the first half of a trial left for the second, packed."""


@dataclass(frozen=True)
class Done:
    """How it ended and the files it left."""

    outcome: Outcome | None
    """None = stopped by the user."""
    unfit: str | None
    """Why this node must not measure any more."""
    records: bytes
    log: bytes
    made: Mapping[str, bytes]
    """Name -> packed files that a set-up made."""
    private: bytes | None
    """What it left in its private folder, packed, where somebody reads it."""


@dataclass(frozen=True)
class Description:
    """A node, as it sees itself."""

    host: str
    devices: tuple[str, ...]
    """GPUs it was given, by their UUID where NVML tells."""
    environment: dict[str, Any]
    """See machine.environment; the numbers of its GPUs are left out."""
    problems: tuple[str, ...]
    """Why it must not measure now."""


class Node:
    """The measuring end of a lane. Calls are few: a second thread answers while one measures."""

    def __init__(self) -> None:
        forget_what_ray_set()
        remove_left_behind()
        self.scratch = Path(mkdtemp(prefix=PREFIX))
        self.lock = (self.scratch / "lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.artefacts = self.scratch / "artefacts"
        (self.artefacts / "shared").mkdir(parents=True)
        self.events = Events()
        self.stopping = threading.Event()

    def describe(self, on_gpu: bool) -> Description:
        """What and how fit it is; `on_gpu`: some cell uses a GPU."""
        here = machine.environment()
        here["variables"] = {n: v for n, v in here["variables"].items() if n != CHOSEN_GPUS}
        devices = tuple(str(gpu.get("uuid") or gpu.get("name")) for gpu in gpus())
        problems = machine.problems_here(self.scratch, on_gpu)
        return Description(platform.node(), devices, here, tuple(problems))

    def obstacle(self, settings: Settings) -> machine.Obstacle | None:
        """Why a configuration cannot run here."""
        return machine.obstacle(settings, machine.brief())

    def calibrate(self, worker: Sequence[str], on_gpu: bool) -> dict[str, Any]:
        """See calibration.of_run."""
        return calibration.of_run(worker, on_gpu)

    def run(self, order: Order) -> Done:
        """Run one worker to its end."""
        job, own = self.prepare(order)
        self.stopping.clear()
        outcome = unfit = None
        try:
            outcome = run_worker(job, self.stopping.is_set, self.note)
        except Interrupted:
            pass
        except UnfitMachine as error:
            unfit = str(error)
        made: dict[str, bytes] = {}
        if job.task == "prepare":
            sent = order.shared.keys()
            made = {path.name: packed(path) for path in self.shared() if path.name not in sent}
        private = None if job.task in LEAVING_NOTHING else packed(own)
        shutil.rmtree(own)
        records = job.records.read_bytes() if job.records.exists() else b""
        return Done(outcome, unfit, records, job.log.read_bytes(), made, private)

    def prepare(self, order: Order) -> tuple[Job, Path]:
        """The same job with the paths of this node, its inputs in place; its private folder."""
        import ray

        job, run = order.job, order.job.cell_file.parent.parent
        own = self.artefacts / Path(order.cell["artefacts"]).name
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        held = {path.name for path in self.shared()}
        for name, reference in order.shared.items():
            if name not in held:
                unpack(ray.get(reference), self.artefacts / "shared")
        if order.private is not None:
            unpack(order.private, self.artefacts)
        cells = self.scratch / "cells"
        shutil.rmtree(cells, ignore_errors=True)
        cells.mkdir()
        here = replace(
            job,
            command=tuple(sys.executable if w == order.interpreter else w for w in job.command),
            cell_file=cells / job.cell_file.name,
            records=cells / job.records.name,
            log=cells / job.log.name,
            env={n: value.replace(str(run), str(self.scratch)) for n, value in job.env.items()},
        )
        files = {
            "records": str(here.records),
            "artefacts": str(own),
            "shared_artefacts": str(self.artefacts / "shared"),
        }
        here.cell_file.write_text(json.dumps({**order.cell, **files}))
        return here, own

    def shared(self) -> list[Path]:
        """What set-up made, as far as it is here."""
        return list_shared(self.artefacts / "shared")

    def note(self, events: Events) -> None:
        """Keep where the worker is; the parent needs no figures before the end."""
        stages = [{"stage": line.get("stage")} for line in events.stages]
        self.events = replace(events, stages=stages)

    def progress(self) -> Events:
        """Where the worker is."""
        return self.events

    def stop(self) -> None:
        """End the worker that runs."""
        self.stopping.set()

    def close(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.scratch, ignore_errors=True)


def list_shared(folder: Path) -> list[Path]:
    """Finished artefacts in a folder of shared ones."""
    return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def forget_what_ray_set() -> None:
    """Take variables out of this process that Ray put in: they are no part of the machine.

    Among them OMP_NUM_THREADS; the choice of GPUs stays. The process above has what was there.
    """
    with suppress(OSError, KeyError):
        above = Path(f"/proc/{os.environ['RAY_RAYLET_PID']}/environ").read_bytes()
        given = {entry.partition(b"=")[0].decode() for entry in above.split(b"\0")}
        for name in os.environ.keys() - given - {CHOSEN_GPUS}:
            if not name.startswith("RAY_"):
                del os.environ[name]


def remove_left_behind() -> None:
    """Remove scratch folders of actors that were killed: nobody holds their locks any more."""
    for folder in Path(gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError), (folder / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)


def packed(path: Path) -> bytes:
    """A file or folder as an archive that holds it under its name."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as file:
        file.add(path, arcname=path.name)
    return archive.getvalue()


def unpack(archive: bytes, folder: Path) -> None:
    """The opposite, into a folder."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        file.extractall(folder, filter="data")

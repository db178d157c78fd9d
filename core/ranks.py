"""Several processes that train one model together: how the others are started, joined and ended.

Lightning's own launchers do not fit a stage of a longer process: one runs the whole command again,
the others pickle or fork the model. Here every further process is this module's `main`: it gets the
stage's order, builds the same model from it and trains along. What is measured, checked and saved
is that of rank 0, the process that was there before.
"""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from core.config import InputError

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.02
PATIENCE = timedelta(days=1)
"""For each other, e.g. while rank 0 validates: whoever started the training limits its time."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class RankDied(RuntimeError):
    """Another process of the group ended early; the message has its last words."""


@dataclass(frozen=True)
class Group:
    """The processes that train one model, and which of them this one is."""

    rank: int = 0
    size: int = 1
    folder: Path = Path()
    """Where they meet; each waits for the others' `ready-RANK`."""
    others: Sequence["subprocess.Popen[bytes]"] = ()
    """Those that rank 0 started."""
    sharded: bool = False
    """Each holds a part of the frozen weights (`core.sharding`), so all must compute together."""
    asked_after: bool = False
    """Rank 0 is to compute alone once the training is over."""

    def share(self, rows: Any) -> Any:
        """This process's rows of a micro-batch; rows sorted by length are shared out evenly."""
        return rows[self.rank :: self.size]


ALONE = Group()


def facts() -> dict[str, Any]:
    """What the running process knows of its group."""
    if not dist.is_initialized():
        return {"world_size": 1, "backend": None}
    return {"world_size": dist.get_world_size(), "backend": dist.get_backend()}


def visible(device: torch.device) -> int:
    """Devices of this kind a training could use; the CPU is one."""
    return torch.cuda.device_count() if device.type == "cuda" else 1


@contextmanager
def together(work: Any) -> Iterator[Group]:
    """The group that trains this stage; inside the block its other processes live.

    `work` is a `core.stages.Work`. Raises RankDied when one of them fails, InputError for 4-bit
    weights that were to be divided.
    """
    wanted = work.settings.train.devices
    if work.settings.train.strategy == "fsdp" and work.settings.teacher.adapter == "qlora":
        raise InputError(
            "train.strategy: fsdp with teacher.adapter qlora, but what torch gathers of a 4-bit "
            "weight has lost the constants of its blocks; use ddp"
        )
    size = visible(work.device) if wanted == "auto" else wanted
    if work.group is not ALONE or size == 1:
        yield work.group
        return
    with TemporaryDirectory(prefix="ranks-") as name, shared_cores(work.device, size):
        folder = Path(name)
        sharded = work.settings.train.strategy == "fsdp"
        group = Group(0, size, folder, sharded=sharded, asked_after=bool(work.batches))
        others = [_start(replace(work, observer=None), group, rank) for rank in range(1, size)]
        try:
            yield replace(group, others=others)
            _wait(folder, others)
        except RuntimeError:
            time.sleep(POLL_S * 10)  # a broken connection is noticed before the death behind it
            _refuse_the_dead(folder, others)
            raise
        finally:
            for process in others:
                process.kill()
                process.wait()


def _start(work: Any, group: Group, rank: int) -> "subprocess.Popen[bytes]":
    """The process of one rank, its order on the way to it."""
    folder, own = group.folder, group.folder / f"rank-{rank}"
    own.mkdir()
    order = replace(work, folder=own, group=replace(group, rank=rank))
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with (folder / f"rank-{rank}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "core.ranks", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
        )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin:  # then it has died, which is found out later
        pickle.dump((torch.get_num_threads(), order), process.stdin)
    return process


def _wait(folder: Path, others: Sequence["subprocess.Popen[bytes]"]) -> None:
    """They have done as many steps as rank 0 and have nothing to write: they end by themselves."""
    for process in others:
        process.wait()
    _refuse_the_dead(folder, others)


def _refuse_the_dead(folder: Path, others: Sequence["subprocess.Popen[bytes]"]) -> None:
    for rank, process in enumerate(others, start=1):
        if process.poll():
            log = (folder / f"rank-{rank}.log").read_text(errors="replace")
            print(log, file=sys.stderr)
            last = next((line for line in reversed(log.splitlines()) if line.strip()), "no output")
            raise RankDied(f"rank {rank} of {len(others) + 1} ended early: {last.strip()}")


@contextmanager
def shared_cores(device: torch.device, size: int) -> Iterator[None]:
    """On a CPU the processes divide its cores among themselves; each would take all of them."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(max(1, before // size))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def joined(group: Group, device: torch.device) -> Iterator[None]:
    """Connected to the other processes inside the block; waits for them to be there."""
    (group.folder / f"ready-{group.rank}").touch()
    while len(list(group.folder.glob("ready-*"))) < group.size:
        _refuse_the_dead(group.folder, group.others)
        time.sleep(POLL_S)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{group.folder / 'store'}",
        rank=group.rank,
        world_size=group.size,
        timeout=PATIENCE,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def main() -> None:
    """One further process: the stage's order comes on standard input."""
    parent = int(sys.argv[1])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # it died before the kernel was asked to tell
    from core import pipeline, stages
    from core.loop import float32_products
    from core.observe import Observer
    from core.settings import MachineSettings, Settings

    threads, work = pickle.load(sys.stdin.buffer)
    pipeline.prepare_process(Settings(machine=MachineSettings(threads=threads)))
    if work.device.type == "cuda":
        torch.cuda.set_device(work.group.rank)
    observer = Observer()
    observer.facts["device"] = str(work.device)
    with float32_products(work.settings.train.precision), observer.until_end:
        stages.teacher_fit(replace(work, observer=observer))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # rank 0 waits, and taking an interpreter apart takes a second

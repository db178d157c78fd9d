"""How each cell of a run starts: as a process, in which container, or why not at all."""

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.launching import engines
from bench.launching.containers import Container
from bench.launching.engines import ENGINES, OWN_IMAGES, Engine, reference
from bench.machine import Obstacle
from bench.metering.gpus import gpus
from bench.overrides import flatten
from core.settings import Settings

RAY = "ray"
LAUNCHERS = ("auto", "process", "container", *ENGINES, RAY)
"""`auto`: cells with image `host` as processes, the others in containers of the first engine that
answers; `docker`, `podman`: the same with that engine; `process`, `container`: nothing else is
started, cells that ask for it are skipped; `ray`: processes on the nodes of a cluster."""
PLAN_S, RUN_S = 0.9, 20.0
"""Seconds an engine may take to answer: a plan does not wait for one that hangs."""


@dataclass(frozen=True)
class Starter:
    """The choice of the command line and what this machine has for it."""

    launcher: str
    engine: Engine | None = None
    problem: str = ""
    """Why there is no engine although one is needed."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Image, as the settings name it -> its digest when the run began: a tag may be moved."""

    def obstacle(self, settings: Settings) -> Obstacle | None:
        """Why a cell cannot start in the way it asks for; it is never started in another one."""
        image = settings.machine.image
        cell = f"machine.image={image}: "
        if image == "host":
            if self.launcher != "container":
                return None
            return Obstacle("skipped", f"{cell}--launcher container starts no processes")
        if self.launcher in ("process", RAY):
            return Obstacle("skipped", f"{cell}--launcher {self.launcher} starts no containers")
        if self.engine is None:
            return Obstacle("unsupported", self.problem)
        if image not in self.digests:
            return Obstacle("skipped", cell + _absent(image, self.engine.name))
        return None

    def container(self, settings: Settings, run: Path) -> Container | None:
        """The container of a cell that has no obstacle; None for a process on the host."""
        image = settings.machine.image
        if image == "host":
            return None
        assert self.engine is not None
        values = (value for _, value in flatten(settings.model_dump()))
        named = (Path(value).absolute() for value in values if isinstance(value, str) and value)
        inputs = tuple(path for path in named if path.exists())
        given = settings.machine.device != "cpu" and bool(gpus())
        return Container(self.engine, image, self.digests[image], run.absolute(), inputs, given)

    def facts(self) -> dict[str, Any]:
        """The part of the machine's record that `differences` compares."""
        engine = f"{self.engine.name} {self.engine.version}" if self.engine else None
        return {"launcher": self.launcher, "engine": engine, "images": dict(self.digests)}

    def differences(self, earlier: Mapping[str, Any]) -> list[str]:
        """What forbids joining figures of two sittings: another engine or image."""
        before, now = earlier, self.facts()
        found = []
        if before.get("engine") and now["engine"] and before["engine"] != now["engine"]:
            found.append(f"engine was {before['engine']}, is {now['engine']}")
        for image, digest in now["images"].items():
            if (was := (before.get("images") or {}).get(image, digest)) != digest:
                found.append(f"image {image} was {was}, is {digest}")
        return found


PROCESSES = Starter("auto")
"""Enough where every cell runs on the host."""


def starter(launcher: str, images: Iterable[str], limit_s: float) -> Starter:
    """Find the engine and its images, if any cell wants one, within `limit_s` seconds in all."""
    wanted = sorted(set(images) - {"host"})
    if not wanted or launcher in ("process", RAY):
        return Starter(launcher)
    end_s = time.monotonic() + limit_s
    engine = engines.find((launcher,) if launcher in ENGINES else ENGINES, limit_s)
    if isinstance(engine, str):
        return Starter(launcher, problem=engine)
    left_s = max(0.1, end_s - time.monotonic())
    with ThreadPoolExecutor(len(wanted)) as pool:
        digests = list(pool.map(lambda image: engine.digest(reference(image), left_s), wanted))
    found = {image: digest for image, digest in zip(wanted, digests, strict=True) if digest}
    return Starter(launcher, engine, digests=found)


def _absent(image: str, engine: str) -> str:
    problem = f"{engine} has no image {reference(image)}; "
    if image not in OWN_IMAGES:
        return f"{problem}{engine} pull {image}, or build it"
    return f"{problem}make image-{image}" + ("" if engine == "docker" else f" ENGINE={engine}")

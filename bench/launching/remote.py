"""The parent's end of a lane: has a node run one worker, follows it, brings its files home."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.launch import Interrupted, Outcome
from bench.launching.deaths import Events, Job
from bench.launching.node import Description, Done, Order, list_shared, packed, unpack
from bench.machine import UnfitMachine

POLL_S, ANSWER_S = 0.5, 10.0
GRACE_S = 60.0
"""A node ends a worker at its limit; one that still says nothing so long after is lost."""
REASON_CHARACTERS = 160


@dataclass
class Shared:
    """What set-up made, on its way to the nodes: each piece is put into Ray's store once."""

    references: dict[str, Any] = field(default_factory=dict)

    def of(self, run: Path) -> dict[str, Any]:
        """Name -> reference of all there is in a run folder."""
        import ray

        for path in list_shared(run / "artefacts" / "shared"):
            if path.name not in self.references:
                self.references[path.name] = ray.put(packed(path))
        return dict(self.references)


@dataclass
class Lane:
    """One device of one node, and whether it is still there."""

    name: str
    actor: Any
    description: Description
    shared: Shared
    lost: str | None = None
    """Why it is used no more."""

    def launch(
        self, job: Job, stopped: Callable[[], bool], on_progress: Callable[[Events], None]
    ) -> Outcome:
        """What launch.run_worker does, on this node; `killed` and `lost` if the node goes away.

        Raises Interrupted, UnfitMachine.
        """
        import ray

        started, begun = datetime.now(UTC).isoformat(timespec="milliseconds"), time.monotonic()
        events = Events()

        def note(found: Events) -> None:
            nonlocal events
            events = found
            on_progress(found)

        try:
            done = self.follow(job, stopped, note)
        except (ray.exceptions.RayActorError, TimeoutError) as error:
            self.lost = str(error).strip().splitlines()[0][:REASON_CHARACTERS]
            ray.kill(self.actor)
            job.log.touch()
            return Outcome(
                status="killed",
                reason=f"node lost: {self.name}: {self.lost}",
                stage=events.place,
                stage_lines=(),
                process={},
                started=started,
                wall_s=time.monotonic() - begun,
                log_tail=(),
                phase=events.phase,
                node=self.name,
                lost=True,
            )
        self.take_home(job, done)
        if done.unfit is not None:
            self.lost = done.unfit
            raise UnfitMachine(f"{self.name}: {done.unfit}")
        if done.outcome is None:
            raise Interrupted
        return replace(done.outcome, node=self.name)

    def follow(
        self, job: Job, stopped: Callable[[], bool], on_progress: Callable[[Events], None]
    ) -> Done:
        """Have the worker run and wait; raises TimeoutError when the node never answers."""
        import ray

        running = self.actor.run.remote(self.order(job))
        limit_s = time.monotonic() + job.timeout_s + GRACE_S
        asked_to_stop = False
        while not ray.wait([running], timeout=POLL_S)[0]:
            if time.monotonic() > limit_s:
                raise TimeoutError(
                    f"no answer {GRACE_S:g} s after the limit of {job.timeout_s:g} s"
                )
            if stopped() and not asked_to_stop:
                asked_to_stop, limit_s = True, time.monotonic() + GRACE_S
                self.actor.stop.remote()
            with suppress(ray.exceptions.GetTimeoutError):
                on_progress(ray.get(self.actor.progress.remote(), timeout=ANSWER_S))
        done: Done = ray.get(running)
        return done

    def order(self, job: Job) -> Order:
        """The job with all a node needs to know and to have."""
        cell, run = json.loads(job.cell_file.read_text()), job.cell_file.parent.parent
        # Only the second half of a trial finds something there; other lanes clear what is left.
        private = packed(Path(cell["artefacts"])) if job.task == "preflight_load" else None
        return Order(job, cell, sys.executable, self.shared.of(run), private)

    def take_home(self, job: Job, done: Done) -> None:
        """Put the files of an ended worker where those of one on this machine lie."""
        artefacts = job.cell_file.parent.parent / "artefacts"
        job.records.write_bytes(done.records)
        job.log.write_bytes(done.log)
        for archive in done.made.values():
            unpack(archive, artefacts / "shared")
        if done.private is not None:
            unpack(done.private, artefacts)

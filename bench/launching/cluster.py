"""`--launcher ray`: the nodes of a Ray cluster as the places where workers run.

A lane is one device of one node, held for the whole run: one timed process at a time. A block is
measured on one lane from its first cell to its last, so all its pairs are of one machine; blocks
run side by side on different lanes.
"""

import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import machine
from bench.launch import Outcome
from bench.launching.deaths import Events, Job
from bench.launching.lanes import walk_side_by_side
from bench.launching.node import Node
from bench.launching.remote import ANSWER_S, POLL_S, Lane, Shared
from bench.launching.resources import Offer, cpus_of, gpus_needed, gpus_of, nodes, offered
from bench.launching.site import Site
from bench.machine import Machine, Obstacle, UnfitMachine
from bench.matrix import Cell
from bench.schedule.blocks import Walk
from core.config import InputError

AUTO = "auto"
"""The cluster that this machine belongs to, or that RAY_ADDRESS names."""
NODE_S = 60.0
"""To wait for nodes that fit, and for those to become free."""
CONNECT_S = 5.0
MOST_TRIES = 2
"""Lanes on which a set-up or a trial is tried when it is lost with its node."""


class Cluster(Site):
    """The nodes of a cluster as the place where workers run."""

    def __init__(self, node_timeout_s: float) -> None:
        super().__init__()
        self.node_timeout_s = node_timeout_s
        self.lanes: list[Lane] = []
        self.too_large: dict[str, Obstacle] = {}
        """Cell key -> why no node has what it asks for."""

    def brief(self) -> Machine:
        """Whether cells find a GPU here: what decides the cells of a matrix."""
        return {"has_gpu": any(gpus_of(node) for node in nodes())}

    def take(self, cells: Sequence[Cell], earlier: Machine | None) -> None:
        """Take the lanes for these cells, all of one kind of machine: that of `earlier` if given,
        else the kind with most lanes. Waits for at most `node_timeout_s`.

        Raises UnfitMachine without any.
        """
        needs = {cell.key: gpus_needed(cell.settings) for cell in cells}
        self.too_large = self.wait_for_nodes(cells, needs)
        wanted = [need for key, need in needs.items() if key not in self.too_large]
        if not wanted:
            return
        offers = list(offered(max(wanted), on_cpu=0 in wanted))
        lanes = self.joined(offers, max(wanted) > 0)
        self.lanes, left = alike(lanes, earlier)
        self.left_out += left
        if not self.lanes:
            raise UnfitMachine(
                "cluster: no node can measure: " + ("; ".join(self.left_out) or "none is there")
            )

    def wait_for_nodes(self, cells: Sequence[Cell], needs: dict[str, int]) -> dict[str, Obstacle]:
        """Cells whose devices no node has by the end of the time limit; nodes may still come."""
        end_s = time.monotonic() + self.node_timeout_s
        while True:
            there = nodes()
            most = max(map(gpus_of, there), default=0)
            late = [cell for cell in cells if needs[cell.key] > most]
            if (there and not late) or time.monotonic() > end_s:
                break
            time.sleep(POLL_S)
        have = Counter(f"{cpus_of(node)} CPU, {gpus_of(node)} GPU" for node in there)
        listed = "; ".join(f"{n} × {what}" for what, n in have.items()) or "none"
        return {
            cell.key: Obstacle(
                "timeout",
                f"no node with {needs[cell.key]} GPU came within {self.node_timeout_s:g} s "
                f"(nodes: {listed})",
            )
            for cell in late
        }

    def joined(self, offers: Sequence[Offer], on_gpu: bool) -> list[Lane]:
        """The lanes that are ours within the time limit, described by their nodes."""
        import ray

        shared = Shared()
        actor: Any = ray.remote(Node)
        held = {offer.name: actor.options(**offer.options).remote() for offer in offers}
        asked = {name: one.describe.remote(on_gpu) for name, one in held.items()}
        ready, _ = ray.wait(
            list(asked.values()), num_returns=len(asked), timeout=self.node_timeout_s
        )
        lanes = []
        for name, reference in asked.items():
            problem = f"did not become free within {self.node_timeout_s:g} s"
            if reference in ready:
                try:
                    found = ray.get(reference)
                except ray.exceptions.RayError as error:
                    problem = str(error).strip().splitlines()[-1]
                else:
                    lanes.append(Lane(name, held[name], found, shared))
                    continue
            ray.kill(held[name])
            self.left_out.append(f"{name}: {problem}")
        return lanes

    def obstacle(self, cell: Cell) -> Obstacle | None:
        """Why a cell cannot run on these nodes."""
        if cell.key in self.too_large:
            return self.too_large[cell.key]
        import ray

        found: Obstacle | None = ray.get(self.lanes[0].actor.obstacle.remote(cell.settings))
        return found

    def problems(self, out: Path, on_gpu: bool) -> list[str]:
        """Of this machine, which only writes; the nodes were asked when they joined."""
        return super().problems(out, on_gpu=False)

    def environment(self) -> Machine:
        """The machine that measures: the first node's record, with the list of all."""
        if not self.lanes:
            return machine.environment() | {"nodes": {}}
        here = self.lanes[0].description.environment
        return here | {"nodes": {lane.name: lane.description.devices for lane in self.lanes}}

    def calibrate(self, worker: Sequence[str], on_gpu: bool) -> dict[str, Any]:
        """The calibration of the first node: all are alike."""
        import ray

        if not self.lanes:
            return {"unavailable": "no node"}
        found: dict[str, Any] = ray.get(self.lanes[0].actor.calibrate.remote(worker, on_gpu))
        return found

    def launch(
        self, job: Job, stopped: Callable[[], bool], on_progress: Callable[[Events], None]
    ) -> Outcome:
        """Run what is not timed on some lane; elsewhere again if it is lost with its node."""
        for _ in range(MOST_TRIES):
            outcome = self.first().launch(job, stopped, on_progress)
            if not outcome.lost:
                break
        return outcome

    def first(self) -> Lane:
        """A lane that is there. Raises UnfitMachine without any."""
        for lane in self.lanes:
            if lane.lost is None:
                return lane
        raise UnfitMachine(f"cluster: every node is lost ({self.lanes[-1].lost}); see --resume")

    def walk(self, w: Walk) -> None:
        """Walk the blocks side by side, one lane each."""
        if self.lanes:
            walk_side_by_side(w, self.lanes)

    def leave(self) -> None:
        """Give the devices back."""
        import ray

        closing = [lane.actor.close.remote() for lane in self.lanes if lane.lost is None]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=ANSWER_S)
        for lane in self.lanes:
            ray.kill(lane.actor)


@contextmanager
def connected(address: str, node_timeout_s: float) -> Iterator[Cluster]:
    """The cluster at an address inside the block.

    Raises InputError where Ray is not installed, UnfitMachine where no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise InputError(
            "--launcher ray: Ray is not installed; pip install -e '.[cluster]'"
        ) from None
    refuse_a_dead_address(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UnfitMachine(f"cluster: {address}: {error}") from error
    cluster = Cluster(node_timeout_s)
    try:
        yield cluster
    finally:
        cluster.leave()
        ray.shutdown()


def refuse_a_dead_address(address: str) -> None:
    """Ray tries an address for two minutes and then ends the process."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        raise UnfitMachine(f"cluster: {address} does not answer: {error}") from None


def alike(lanes: Sequence[Lane], earlier: Machine | None) -> tuple[list[Lane], list[str]]:
    """The lanes whose machines are alike, and why each of the others is left out.

    Figures of unlike machines may not be joined: a setting may gain on the one and lose on the
    other.
    """
    problems = {lane.name: problems_of(lane) for lane in lanes}
    fit = [lane for lane in lanes if not problems[lane.name]]
    groups = [
        [one for one in fit if not machine.differences(here(lane), here(one))] for lane in fit
    ]
    model = earlier or next((here(group[0]) for group in sorted(groups, key=len)[-1:]), {})
    for lane in fit:
        if found := machine.differences(model, here(lane)):
            problems[lane.name].append(f"unlike the others: {'; '.join(found)}")
    left = [f"{name}: {'; '.join(found)}" for name, found in problems.items() if found]
    return [lane for lane in lanes if not problems[lane.name]], left


def problems_of(lane: Lane) -> list[str]:
    """Why a lane must not measure, whatever the others are."""
    found = list(lane.description.problems)
    if here(lane)["code"] != machine.code_digest():
        found.append("other code of this harness; install the same checkout there as here")
    return found


def here(lane: Lane) -> Machine:
    """The machine of a lane."""
    return lane.description.environment

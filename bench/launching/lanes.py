"""Blocks walked side by side, each on one lane: what belongs together is measured in one place.

One thread for each lane; only one of them acts at a time, all others wait for their workers.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from bench.launch import Interrupted, Outcome
from bench.launching.deaths import Events, Job
from bench.machine import UnfitMachine
from bench.records import Record
from bench.schedule.attempts import by_attempt
from bench.schedule.blocks import Task, Walk, due, tasks, walk_block
from bench.schedule.stopping import turn

MOST_LOSSES = 2
"""A cell that was lost with its node so often is not tried on another."""


class Place(Protocol):
    """Where workers run, one at a time."""

    name: str
    lost: str | None
    """Why it is used no more."""

    def launch(
        self, job: Job, stopped: Callable[[], bool], on_progress: Callable[[Events], None]
    ) -> Outcome: ...


class PlaceLost(Exception):
    """The place of a block is gone; another has to begin the block anew."""


def walk_side_by_side(w: Walk, places: Sequence[Place]) -> None:
    """Measure what is missing, as many blocks at once as there are places.

    Raises Interrupted, and UnfitMachine when no place is left.
    """
    lanes = Lanes(w, places)
    with ThreadPoolExecutor(len(places)) as pool:
        ends = [pool.submit(lanes.serve, place) for place in places]
    problems = [error for end in ends if (error := end.exception())]
    # Interrupted may be what the others made of the first problem.
    for error in sorted(problems, key=lambda error: isinstance(error, Interrupted)):
        raise error
    if lanes.unfinished():
        raise UnfitMachine(
            "machine: every node is lost ("
            + "; ".join(f"{place.name}: {place.lost}" for place in places)
            + "); what was measured is kept, see --resume"
        )


@dataclass
class Lanes:
    """What the threads share."""

    w: Walk
    places: Sequence[Place]
    waiting: list[int] = field(init=False)
    """Blocks nobody has begun."""
    running: dict[int, str] = field(default_factory=dict)
    """Block -> place."""
    moved: dict[int, str] = field(default_factory=dict)
    """Block that was begun anew -> where it had been begun."""
    ended: bool = False
    """No block is begun any more: a budget is used up, or something went wrong."""
    broken: bool = False
    """Something went wrong, and what runs is ended."""
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.waiting = list(range(1, self.w.matrix.most_repeats + 1))

    def serve(self, place: Place) -> None:
        """Walk blocks on one place until none is left, or the place is lost."""
        with self.changed:
            well = False
            try:
                while place.lost is None and (block := self.next_block(place)) is not None:
                    with self.walking(block, place):
                        self.walk_here(block, place)
                well = True
            except UnfitMachine:
                well = place.lost is not None
                if not well:
                    raise  # of this machine, not of the node
            finally:
                if not well:
                    self.ended = self.broken = True
                self.changed.notify_all()

    def next_block(self, place: Place) -> int | None:
        """The next block for a place; waits while one that is walked might have to be begun anew.

        A block that was begun here is finished here. A block beyond `repeats` depends on what all
        before it have shown, so it waits for them.
        """
        while not self.ended:
            there = {one.name for one in self.places if one.lost is None}
            for block in self.waiting:
                home = home_of(self.w.past, block)
                if block > self.w.matrix.repeats and (self.running or block != self.waiting[0]):
                    break
                if home in (None, place.name) or home not in there:
                    return block
            if not self.running and not self.waiting:
                return None
            self.changed.wait()
        return None

    @contextmanager
    def walking(self, block: int, place: Place) -> Iterator[None]:
        """Keep the book of who walks what; a block that was not finished waits again."""
        self.waiting.remove(block)
        self.running[block] = place.name
        finished = False
        try:
            yield
            finished = True
        except PlaceLost:
            pass
        finally:
            del self.running[block]
            if not finished:
                self.waiting = sorted([*self.waiting, block])
            self.changed.notify_all()

    def walk_here(self, block: int, place: Place) -> None:
        """Walk one block on one place. Raises PlaceLost when it has to be begun anew elsewhere."""
        self.begin_anew(block, place)
        own = replace(
            self.w,
            measure=lambda task, limit_s: self.measure(place, task, limit_s),
            expect=lambda count: self.w.expect(len(self.to_come())),
        )
        if not walk_block(own, block):
            self.ended = True
        if place.lost:
            raise PlaceLost

    def begin_anew(self, block: int, place: Place) -> None:
        """A block that another place began and did not finish is due again as a whole."""
        for key, repeat in lost_repeats(self.w.past):
            if repeat == block:
                self.w.done.discard((key, repeat))
        self.give_up_the_dangerous()
        members = turn(self.w.matrix, self.w.cells, self.w.past, block).members
        home = home_of(self.w.past, block)
        if due(self.w, block, members) and home not in (None, place.name):
            self.moved[block] = str(home)
            for cell in members:
                self.w.done.discard((cell.key, block))

    def measure(self, place: Place, task: Task, limit_s: float) -> tuple[Outcome, list[Record]]:
        """One process on a place, under the number of a new attempt where there are some."""
        if place.lost:
            raise PlaceLost
        attempts = by_attempt(self.w.past).get((task.cell.key, task.block), {})
        if task.attempt in attempts:
            task = replace(task, attempt=max(attempts) + 1)

        def launch(job: Job, stopped: Callable[[], bool], *rest: Any) -> Outcome:
            with self.others_act():
                return place.launch(job, lambda: stopped() or self.broken, *rest)

        outcome, group = self.w.measure(task, limit_s, launch)
        if task.block in self.moved:
            group = [record | {"moved_from": self.moved[task.block]} for record in group]
        return outcome, group

    def to_come(self) -> list[Task]:
        """What is not measured yet, the processes that run included."""
        return tasks(self.w.cells, self.w.matrix.repeats, self.w.done)

    @contextmanager
    def others_act(self) -> Iterator[None]:
        """The opposite of holding the lock."""
        self.changed.release()
        try:
            yield
        finally:
            self.changed.acquire()

    def give_up_the_dangerous(self) -> None:
        """A cell that was lost with its node repeatedly may be the reason."""
        for cell in self.w.cells:
            lost = [r for r in self.w.past if r["key"] == cell.key and r.get("node_lost")]
            if len(lost) >= MOST_LOSSES and (cell.key, 0) not in self.w.done:
                reason = f"not tried again: lost with its node {len(lost)} times"
                self.w.keep(self.w.rows(cell, 0, reason, None))
                self.w.done.add((cell.key, 0))

    def unfinished(self) -> bool:
        """Whether places ran out before blocks did."""
        return bool(self.waiting) and not self.ended


def home_of(past: Sequence[Record], block: int) -> str | None:
    """The place on which a block was walked last."""
    found = [r.get("node") for r in past if r["block"] == block and r.get("node")]
    return found[-1] if found else None


def lost_repeats(past: Sequence[Record]) -> Iterator[tuple[str, int]]:
    """Repeats of which nothing is left but attempts that were lost with their nodes."""
    for name, attempts in by_attempt(past).items():
        if all(any(r.get("node_lost") for r in group) for group in attempts.values()):
            yield name

"""Blocks walked side by side: pairs stay on one machine, and a lost one takes no figure along."""

import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bench import records
from bench.execute import Run, execute
from bench.judging.conduct import moved
from bench.launch import Interrupted, Outcome
from bench.launching.deaths import Events, Job
from bench.launching.lanes import walk_side_by_side
from bench.machine import UnfitMachine
from bench.matrix import Matrix, cells
from bench.schedule.attempts import judged
from tests.test_execute import SILENT

BOTH_S = 20.0
"""More than two threads need to meet."""


class Place:
    """Ends every worker at once; is lost, or unfit, with the n-th it gets."""

    def __init__(self, name: str, lost_at: int = 0, unfit_at: int = 0, deadly: str = "") -> None:
        self.name, self.lost_at, self.unfit_at, self.deadly = name, lost_at, unfit_at, deadly
        self.lost: str | None = None
        self.started: list[str] = []
        self.meet: threading.Barrier | None = None

    def launch(self, job: Job, stopped: Any, on_progress: Any) -> Outcome:
        assert not self.lost, "a lost place gets no work"
        self.started.append(job.cell_file.stem)
        on_progress(Events())
        if stopped():
            raise Interrupted
        if self.meet:
            with suppress(threading.BrokenBarrierError):
                self.meet.wait(BOTH_S)
        if len(self.started) == self.unfit_at:
            self.lost = "disk full"
            raise UnfitMachine(self.lost)
        if len(self.started) == self.lost_at or (self.deadly and self.deadly in self.started[-1]):
            self.lost = "gone"
            if self.meet:
                self.meet.abort()  # the other place goes on alone
            told = ("killed", "node lost: gone", "teacher_fit", (), {}, "now", 1.0, ())
            return Outcome(*told, node=self.name, lost=True)
        lines = tuple(
            records.empty_record(stage, "ok", None) | {"started": "now", "wall_s": 1.0}
            for stage in job.stages
        )
        return Outcome("ok", None, "", lines, {}, "now", 1.0, (), node=self.name)


def a_run(tmp_path: Path, **changes: Any) -> Run:
    """Three cells, four blocks, nothing to set up or to try."""
    entries = {
        "question": "?",
        "stages": ["prepare_data"],
        "axes": {"data.seed": [0, 1, 2]},
        "repeats": 4,
        "preflight": "never",
        "too_slow": None,
    }
    matrix = Matrix.model_validate(entries | changes)
    folder = tmp_path / "m" / "run"
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, matrix, tuple(cells(matrix, False)), ("none",))


def walk(run: Run, places: Sequence[Place], stopped: Any = lambda: False) -> None:
    def nobody(*_: Any) -> Outcome:
        raise AssertionError("measured on this machine")

    untried = {cell.key: "never" for cell in run.cells}
    execute(
        run,
        {},
        untried,
        SILENT,
        stopped,
        lambda process: None,
        nobody,
        lambda w: walk_side_by_side(w, places),
    )


def nodes_by_block(run: Run) -> dict[int, list[str]]:
    """Of the attempts that are judged."""
    found: dict[int, list[str]] = {}
    for record in judged(records.read(run.records_path)):
        found.setdefault(record["block"], []).append(record["node"])
    return found


def assert_complete(run: Run) -> None:
    """Every cell has its repeats, and each block is of one node."""
    kept = [r for r in judged(records.read(run.records_path)) if r["status"] == "ok"]
    expected = {(cell.key, block): 1 for cell in run.cells for block in (1, 2, 3, 4)}
    assert Counter((r["key"], r["repeat"]) for r in kept) == expected
    assert all(len(set(nodes)) == 1 for nodes in nodes_by_block(run).values())


def test_blocks_run_side_by_side_and_each_on_one_place(tmp_path: Path) -> None:
    run, places = a_run(tmp_path), [Place("a"), Place("b")]
    meet = threading.Barrier(2)
    for place in places:
        place.meet = meet  # no worker ends before one of the other place has begun
    walk(run, places)
    assert_complete(run)
    assert [len(place.started) for place in places] == [6, 6]
    walk(run, [again := Place("a")])
    assert again.started == [], "nothing is measured twice"


@pytest.mark.parametrize("lost_at", range(1, 7))
def test_a_block_whose_place_is_lost_is_begun_anew_elsewhere(tmp_path: Path, lost_at: int) -> None:
    run, places = a_run(tmp_path), [Place("a"), Place("b", lost_at=lost_at)]
    places[0].meet = places[1].meet = threading.Barrier(2)  # they take turns
    walk(run, places)
    assert_complete(run)
    found = records.read(run.records_path)
    (row,) = [record for record in found if record["status"] != "ok"]
    assert (row["status"], row["node"], row["node_lost"]) == ("killed", "b", True)
    kept = judged(found)
    assert row not in kept, "it says nothing about its cell"
    finding = moved(kept)
    assert [one.text for one in finding] == ["blocks begun anew because a node was lost: 1 (b)"]
    walk(run, [again := Place("c")])
    assert again.started == []


def test_without_any_place_the_run_ends_and_can_be_finished_elsewhere(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    with pytest.raises(UnfitMachine, match="every node is lost"):
        walk(run, [Place("a", lost_at=5)])
    walk(run, [later := Place("b")])
    assert_complete(run)
    # Block 1 was whole; block 2 had one cell and lost the next.
    assert len(later.started) == 9
    assert nodes_by_block(run)[1] == ["a"] * 3


def test_an_unfit_place_leaves_no_row_and_its_block_goes_on_elsewhere(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    walk(run, [Place("a", unfit_at=2), Place("b")])
    assert_complete(run)
    assert {record["status"] for record in records.read(run.records_path)} == {"ok"}


def test_a_cell_that_is_lost_with_its_node_repeatedly_is_given_up(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    places = [Place(name, deadly="data.seed=1") for name in "ab"]
    places.append(Place("c"))
    walk(run, places)
    found = records.read(run.records_path)
    killers = [r for r in found if r["cell"] == "data.seed=1"]
    others = [r for r in judged(found) if r["cell"] != "data.seed=1"]
    assert Counter(r["status"] for r in others) == {"ok": 8}
    if sum(place.lost is not None for place in places) == 2:
        (row,) = [r for r in killers if r["repeat"] == 0]
        assert row["reason"] == "not tried again: lost with its node 2 times"


def test_a_stop_ends_all_places_and_leaves_whole_groups(tmp_path: Path) -> None:
    run, places = a_run(tmp_path), [Place("a"), Place("b")]
    with pytest.raises(Interrupted):
        walk(run, places, lambda: sum(len(place.started) for place in places) > 4)
    assert records.repair(run.records_path, run.matrix.stages) == records.read(run.records_path)
    walk(run, [Place("a"), Place("b")])
    assert_complete(run)


def test_a_problem_of_this_machine_ends_all_places(tmp_path: Path) -> None:
    run, places = a_run(tmp_path), [Place("a"), Place("b")]

    def failing(*_: Any) -> Outcome:
        raise OSError("disk full")

    places[0].launch = failing  # type: ignore[method-assign]
    with pytest.raises(OSError, match="disk full"):
        walk(run, places)
    assert len(places[1].started) < 12


def test_pairs_are_of_the_node_where_the_block_ended() -> None:
    """A whole attempt on another node does not replace a failed one here."""
    line = {"stage": "teacher_fit", "block": 1, "repeat": 1, "tags": []}
    base = line | {"key": "base", "status": "ok"}
    cell = line | {"key": "cell", "status": "ok"}
    found = [
        base | {"attempt": 0, "node": "a"},
        cell | {"attempt": 0, "node": "a"},
        base | {"attempt": 1, "node": "b"},
        cell | {"attempt": 1, "node": "b", "status": "oom_gpu"},
    ]
    assert judged(found) == found[2:]

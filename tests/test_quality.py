"""The quality guard on rankings and training losses, and what control pairs say of it."""

import math

import numpy as np
import pytest
from fake_launcher import FakeLauncher, a_run, measure
from hypothesis import given
from hypothesis import strategies as st
from test_blocks import OTHER

from bench.judging.control import controls, floors
from bench.judging.quality import (
    LOSS_MARGIN,
    TRAINING_LOSS,
    compare,
    compare_training,
    guard,
    last_losses,
)
from bench.verdicts import judge

FIT, TEST = "teacher_fit", "teacher_test"


def trained(losses: list[float], block: int = 1, stage: str = FIT) -> dict:
    return {"stage": stage, "block": block, "losses": losses, "ranks": None, "metrics": {}}


def falling(seed: int, steps: int = 80, lift: float = 1.0, noise: float = 0.002) -> list[float]:
    """A loss trace; equal seeds draw equal batches."""
    batches = np.random.default_rng(0).standard_normal(steps) * 0.2
    own = np.random.default_rng(seed).standard_normal(steps) * noise
    return [
        float(lift * (5 + 3 * math.exp(-i / 15)) + b + n)
        for i, (b, n) in enumerate(zip(batches, own, strict=True))
    ]


@pytest.mark.parametrize(
    ("lift", "call"),
    [(0.9, "not worse"), (1.0, "not worse"), (1.005, "not worse"), (1.02, "worse"), (1.5, "worse")],
)
def test_the_training_loss_is_guarded(lift, call):
    """Batches differ by far more than the margin; equal batches are compared with each other."""
    theirs = [trained(falling(b), b) for b in range(4)]
    ours = [trained(falling(9 + b, lift=lift), b) for b in range(4)]
    [row] = compare_training("c", FIT, ours, theirs)
    assert (row.metric, row.call) == (TRAINING_LOSS, call)
    assert row.low <= row.difference <= row.high


def test_a_difference_near_the_margin_stays_open():
    theirs = [trained(falling(1, noise=0.3))]
    ours = [trained(falling(2, noise=0.3, lift=1 + LOSS_MARGIN))]
    assert compare_training("c", FIT, ours, theirs)[0].call == "open"


def test_traces_of_different_lengths_are_compared_by_share_of_the_training():
    """Half as many steps of twice the rows: the last quarter is the last quarter."""
    theirs = [trained([10 - 0.05 * i for i in range(100)])]
    ours = [trained([10 - 0.1 * i - 0.025 for i in range(50)])]
    [row] = compare_training("c", FIT, ours, theirs)
    assert abs(row.difference) < 0.05
    assert row.call == "not worse"


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=200))
def test_the_judged_part_of_a_trace_is_its_last_quarter(trace):
    last = trace[len(trace) - max(1, len(trace) // 4) :]
    parts = last_losses(trace)
    assert len(parts) == min(8, len(last))
    assert min(last) - 1e-9 <= min(parts) <= max(parts) <= max(last) + 1e-9


def test_without_any_trace_nothing_is_said():
    assert compare_training("c", FIT, [trained([])], [trained([])]) == []
    [row] = compare_training("baseline", FIT, [trained([1.0, 2.0])], [])
    assert (row.value, row.difference, row.call) == (2.0, None, "")


@pytest.mark.parametrize(("ours", "theirs"), [([], [1.0, 2.0]), ([1.0, 2.0], [])])
def test_a_trace_of_one_side_only_guards_nothing(ours, theirs):
    [row] = compare_training("c", FIT, [trained(ours)], [trained(theirs)])
    assert (row.difference, row.call) == (None, "missing")


@pytest.mark.parametrize(
    ("ours", "theirs"), [(50, 100), (0, 100), (100, 0), (100, 50)], ids=lambda users: str(users)
)
def test_rankings_of_other_users_guard_nothing(ours, theirs):
    records = [
        {"stage": TEST, "block": 1, "ranks": [3.0] * users or None, "losses": [], "metrics": {}}
        for users in (ours, theirs)
    ]
    rows = compare("c", TEST, records[:1], records[1:])
    assert [(row.metric, row.call) for row in rows] == [
        ("recall@10", "missing"),
        ("ndcg@10", "missing"),
    ]


def test_fewer_than_two_parts_decide_nothing():
    [row] = compare_training("c", FIT, [trained([9.0])], [trained([1.0])])
    assert (row.high, row.call) == (math.inf, "open")


# ---- control pairs


def test_equal_repeats_of_the_baseline_are_said_to_be_identical():
    [control] = controls([trained(falling(1), b) for b in range(3)], [FIT, TEST])
    assert (control.stage, control.repeats, control.identical, control.spread) == (FIT, 3, True, 0)


def test_the_spread_of_the_baseline_is_the_floor():
    own = [trained(falling(b, lift=1 + 0.01 * b), b) for b in range(3)]
    found = controls(own, [FIT])
    assert not found[0].identical
    assert floors(found, FIT)[TRAINING_LOSS] == pytest.approx(0.1, rel=0.05)
    assert floors(found, TEST) == {}


def test_a_difference_below_the_floor_is_not_called():
    assert guard(-0.03, -0.02) == "worse"
    assert guard(-0.03, -0.02, floor=0.05) == "open"
    theirs = [trained(falling(b, lift=1 + 0.02 * b), b) for b in range(3)]
    ours = [trained(falling(b, lift=1.04), b) for b in range(3)]
    assert compare_training("c", FIT, ours, theirs)[0].call == "worse"
    floor = floors(controls(theirs, [FIT]), FIT)[TRAINING_LOSS]
    assert compare_training("c", FIT, ours, theirs, floor)[0].call == "open"


def test_rankings_have_a_floor_too():
    def ranked(rank: float, block: int) -> dict:
        ranks = [rank] * 50 + [100.0] * 50
        return {"stage": TEST, "block": block, "ranks": ranks, "losses": [], "metrics": {}}

    theirs = [ranked(0.0, 1), ranked(20.0, 2)]
    found = controls(theirs, [TEST])
    assert {one.metric: one.spread for one in found}["recall@10"] == 0.5
    lost = [ranked(20.0, 1), ranked(20.0, 2)]
    plain = {q.metric: q.call for q in compare("c", TEST, lost, theirs)}
    floored = {q.metric: q.call for q in compare("c", TEST, lost, theirs, floors(found, TEST))}
    assert (plain["recall@10"], floored["recall@10"]) == ("worse", "open")


# ---- whole runs


@pytest.mark.parametrize(
    ("change", "says"),
    [({"recall": 0.2}, "recall@10"), ({"lift": 0.2}, TRAINING_LOSS)],
    ids=["recall halved", "loss higher"],
)
def test_twice_as_fast_and_worse_is_worse_quality_and_never_best(tmp_path, change, says):
    run = a_run(tmp_path / "run", 2, repeats=4)
    found = measure(run, FakeLauncher(**{OTHER: {"speed": 2.0} | change}))
    judged = judge(run.matrix, list(run.cells), found)
    row = judged.tables["total"][1]
    assert (row.cell, row.call) == (OTHER, "worse quality")
    assert says in row.reason
    assert row.ratio < 0.6
    assert judged.best.is_baseline

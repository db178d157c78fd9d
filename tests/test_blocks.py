"""The walk through the blocks: who takes part, what is measured again, given up or left out."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_launcher import FakeLauncher, a_run, measure
from hypothesis import given
from hypothesis import strategies as st

from bench import records
from bench.execute import Run
from bench.matrix import Matrix, load_matrix
from bench.schedule.attempts import chosen, due_again, judged
from bench.schedule.budget import Purse, measured, seconds
from bench.verdicts import judge
from core.config import InputError

OTHER, THIRD = "train.num_workers=1", "train.num_workers=2"
TAG = "throttled: power 40 % of the stage"


def again(run: Run, **changes: Any) -> Run:
    """The same run with other limits, as a later sitting has them."""
    given = run.matrix.model_dump(exclude={"without_gpu"}) | changes
    return replace(run, matrix=Matrix.model_validate(given))


def statuses(found: list[records.Record]) -> Counter[tuple[str, int, str]]:
    return Counter(
        (r["cell"], r["repeat"], r["status"]) for r in found if r["stage"] == "teacher_fit"
    )


def calls(run: Run, found: list[records.Record]) -> dict[str, str]:
    return {row.cell: row.call for row in judge(run.matrix, list(run.cells), found).tables["total"]}


# ---- blocks after the first ones


def test_a_clear_effect_takes_no_block_more_and_an_open_one_does(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 3, repeats=4, max_repeats=8)
    launcher = FakeLauncher(**{OTHER: {"speed": 3.0, "noise": 0.005}}, every={"noise": 0.006})
    found = measure(run, launcher)
    took_part = Counter(name.partition(" ")[2] for name in launcher.started)
    assert took_part[OTHER] == 4
    assert took_part["baseline"] == took_part[THIRD] > 4
    assert calls(run, found)[OTHER] == "faster"
    assert {r["status"] for r in found} == {"ok"}


def test_a_run_where_all_is_decided_or_hopeless_ends_early(tmp_path: Path) -> None:
    decided = a_run(tmp_path / "decided", 2, repeats=4, max_repeats=8)
    launcher = FakeLauncher(every={"noise": 0.001}, **{OTHER: {"noise": 0.001, "speed": 1.3}})
    measure(decided, launcher)
    assert len(launcher.started) == 8
    hopeless = a_run(tmp_path / "hopeless", 2, repeats=4, max_repeats=6)
    launcher = FakeLauncher(every={"noise": 0.3})
    found = measure(hopeless, launcher)
    assert len(launcher.started) < 12
    assert calls(hopeless, found)[OTHER] == "undecided"


def test_without_max_repeats_there_are_no_further_blocks(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 2, repeats=4)
    launcher = FakeLauncher(every={"noise": 0.02})
    measure(run, launcher)
    assert len(launcher.started) == 8


def test_looks_make_the_interval_wider(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 2, repeats=4)
    found = measure(run, FakeLauncher(every={"noise": 0.02}))
    looked = again(run, max_repeats=8)
    (plain,), (shared,) = (
        judge(r.matrix, list(r.cells), found).tables["total"][1:] for r in (run, looked)
    )
    assert shared.ratio == plain.ratio
    assert shared.low < plain.low < plain.high < shared.high
    assert shared.smallest > plain.smallest


@pytest.mark.parametrize("cut", [5, 13, 16, 17])
def test_a_resumed_run_makes_the_same_choices(tmp_path: Path, cut: int) -> None:
    """Killed after so many processes, in the middle of blocks with few members too."""
    limits = {"repeats": 4, "max_repeats": 8}
    every = {"noise": 0.006}
    whole, broken = (a_run(tmp_path / name, 3, **limits) for name in ("whole", "broken"))
    launcher = FakeLauncher(every=every)
    wanted = measure(whole, launcher)

    class Killed(Exception):
        pass

    class Mortal(FakeLauncher):
        def __call__(self, *words: Any) -> Any:
            if len(self.started) == cut:
                raise Killed
            return super().__call__(*words)

    assert len(launcher.started) > cut
    with pytest.raises(Killed):
        measure(broken, Mortal(every=every))
    assert statuses(measure(broken, FakeLauncher(every=every))) == statuses(wanted)


def test_who_sat_out_a_block_gets_no_pair_of_another_hour(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 3, repeats=4, max_repeats=6)
    choices = {OTHER: {"noise": 0.02}, "every": {"noise": 0.005}}
    first, later = FakeLauncher(**choices), FakeLauncher(**choices)
    measure(run, first)
    measure(again(run, max_repeats=40), later)
    took_part = {name for name in first.started if OTHER in name}
    blocks = {name.split()[0] for name in first.started}
    assert len(took_part) < len(blocks), "it sat out"
    joined = {name.split()[0] for name in later.started if OTHER in name}
    assert joined
    assert joined & blocks <= {max(blocks)}, "the newest may have been cut short, so it is open"


# ---- hopelessly slow cells


def test_a_hopelessly_slow_cell_is_given_up_counted_and_shown(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 3, repeats=5)
    launcher = FakeLauncher(**{OTHER: {"speed": 0.01}})
    found = measure(run, launcher)
    assert sum(OTHER in name for name in launcher.started) == 2
    assert len(launcher.started) == 12
    lost = [r for r in found if r["cell"] == OTHER and r["status"] == "skipped"]
    assert [(r["repeat"], r["stopped_by"]) for r in lost[::2]] == [
        (n, "too_slow") for n in (3, 4, 5)
    ]
    judged_run = judge(run.matrix, list(run.cells), found)
    row = next(row for row in judged_run.tables["total"] if row.cell == OTHER)
    assert (row.call, row.repeats) == ("skipped", 2)
    assert row.reason.startswith("stopped early: at least")
    assert row.ratio == pytest.approx(100, rel=0.05)
    assert [u.repeats for u in judged_run.unmeasured if u.stage == "teacher_fit"] == [3]
    assert judged_run.exit_status == 0
    assert measure(run, FakeLauncher()) == found, "it stays given up"


def test_slow_by_less_than_the_limit_or_without_one_is_measured_to_the_end(tmp_path: Path) -> None:
    for name, limit, speed in (("near", 5.0, 0.25), ("never", None, 0.01)):
        run = a_run(tmp_path / name, 2, repeats=4, too_slow=limit)
        found = measure(run, FakeLauncher(**{OTHER: {"speed": speed}}))
        assert calls(run, found)[OTHER] == "slower"


def test_the_best_cell_sets_the_mark(tmp_path: Path) -> None:
    """Three times the baseline's time, but nine times the best cell's."""
    run = a_run(tmp_path / "run", 3, repeats=4)
    found = measure(run, FakeLauncher(**{OTHER: {"speed": 3.0}, THIRD: {"speed": 1 / 3}}))
    assert calls(run, found) == {"baseline": "baseline", OTHER: "faster", THIRD: "skipped"}
    reason = next(r["reason"] for r in found if r["status"] == "skipped")
    assert OTHER in reason


# ---- disturbed repeats


def test_a_disturbed_repeat_is_measured_again_in_its_block(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 3, repeats=4)
    launcher = FakeLauncher(**{OTHER: {"tags": [TAG], "tagged": [2]}})
    found = measure(run, launcher)
    assert [name for name in launcher.started if "'" in name] == [f"2' {OTHER}"]
    assert launcher.started.index(f"2' {OTHER}") == 6, "after the others of its block"
    kept = [r for r in judged(found) if r["cell"] == OTHER and r["repeat"] == 2]
    assert [(r["attempt"], r["tags"]) for r in kept] == [(1, [])] * 2
    judgement = judge(run.matrix, list(run.cells), found)
    assert not any(row.disturbed for row in judgement.tables["total"])
    said = next(f.text for f in judgement.warnings if "measured again" in f.text)
    assert said == "repeats judged although disturbed: 0 of 12; measured again for that reason: 1"


def test_what_stays_disturbed_is_judged_and_said(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 4, repeats=4, remeasures=2)
    launcher = FakeLauncher(**{OTHER: {"tags": [TAG]}})
    found = measure(run, launcher)
    assert sum(OTHER in name for name in launcher.started) == 4 * (1 + 2)
    judgement = judge(run.matrix, list(run.cells), found)
    rows = {row.cell: row for row in judgement.tables["total"]}
    assert (rows[OTHER].repeats, rows[OTHER].disturbed) == (4, 4)
    assert rows[THIRD].disturbed == 0
    assert any("disturbed: 4 of 16 (throttled 4)" in f.text for f in judgement.warnings)


def test_a_machine_that_is_always_disturbed_gives_results_at_no_further_cost(
    tmp_path: Path,
) -> None:
    run = a_run(tmp_path / "run", 2, repeats=4)
    launcher = FakeLauncher(every={"tags": [TAG]}, **{OTHER: {"tags": [TAG], "speed": 2.0}})
    found = measure(run, launcher)
    assert len(launcher.started) == 8
    assert calls(run, found)[OTHER] == "faster"
    rows = judge(run.matrix, list(run.cells), found).tables["total"]
    assert [row.disturbed for row in rows] == [4, 4]


def test_a_disturbed_baseline_is_told_to_every_comparison(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 3, repeats=4, remeasures=0)
    found = measure(run, FakeLauncher(baseline={"tags": [TAG], "tagged": [1, 3]}))
    rows = judge(run.matrix, list(run.cells), found).tables["total"]
    assert [row.disturbed for row in rows] == [2, 2, 2]


def attempt(number: int, status: str = "ok", tags: int = 0, key: str = "a", repeat: int = 1) -> Any:
    return {
        "key": key,
        "repeat": repeat,
        "block": repeat,
        "stage": "teacher_fit",
        "attempt": number,
        "status": status,
        "tags": [TAG] * tags,
    }


@pytest.mark.parametrize(
    ("attempts", "best"),
    [
        ([attempt(0, tags=1), attempt(1)], 1),
        ([attempt(0, tags=1), attempt(1, tags=1)], 0),
        ([attempt(0, tags=2), attempt(1, tags=1)], 1),
        ([attempt(0, tags=2), attempt(1, "oom_gpu")], 0),
        ([attempt(0, "oom_gpu"), attempt(1, "error")], 0),
    ],
)
def test_the_least_disturbed_whole_attempt_is_judged(attempts: list[Any], best: int) -> None:
    assert chosen({a["attempt"]: [a] for a in attempts}) == best
    kept = judged(attempts)
    assert attempts[best] in kept
    assert all(a in kept for a in attempts if a["status"] != "ok"), "no failure vanishes"
    assert judged(kept) == kept


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=8))
def test_no_repeat_is_ever_without_figures(tags: list[tuple[int, int]]) -> None:
    found = [
        attempt(number, tags=count, repeat=repeat)
        for repeat, counts in enumerate(tags, start=1)
        for number, count in enumerate(counts)
    ]
    assert {r["repeat"] for r in judged(found)} == {r["repeat"] for r in found}
    assert len(judged(found)) == len(tags)


def test_only_an_unusual_disturbance_is_worth_another_attempt() -> None:
    quiet = [attempt(0, key="b"), attempt(0, key="c")]
    assert due_again([attempt(0, tags=1), *quiet], 1, 1) == [("a", 1)]
    assert due_again([attempt(0, tags=1), attempt(0, key="b", tags=1), quiet[1]], 1, 1) == []
    assert due_again([attempt(0, tags=1), *quiet], 1, 0) == []
    assert due_again([attempt(0, tags=1), attempt(1, tags=1), *quiet], 1, 1) == []
    assert due_again([attempt(0, "error", tags=1), *quiet], 1, 1) == []


def test_an_attempt_torn_by_a_kill_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    stages = ("teacher_fit", "teacher_test")

    def lines(number: int, count: int) -> list[Any]:
        return [attempt(number) | {"schema": 1, "stage": stage} for stage in stages[:count]]

    records.append(path, lines(0, 2))
    records.append(path, lines(1, 1))
    assert [r["attempt"] for r in records.repair(path, stages)] == [0, 0]


# ---- budgets


def test_a_run_ends_before_the_block_its_budget_cannot_hold(tmp_path: Path) -> None:
    """A process takes about 0.9 s, a block of two 1.7 s."""
    run = a_run(tmp_path / "run", 2, repeats=5, budget_s=6)
    launcher = FakeLauncher()
    found = measure(run, launcher)
    assert launcher.spent_s <= 6
    assert len(launcher.started) == 6
    lost = statuses([r for r in found if r["status"] == "skipped"])
    assert set(lost) == {(c, n, "skipped") for c in ("baseline", OTHER) for n in (4, 5)}
    judgement = judge(run.matrix, list(run.cells), found)
    assert judgement.exit_status == 0
    assert judgement.tables["total"][1].call == "undecided"
    assert any("left out for want of budget: 4" in f.text for f in judgement.warnings)


def test_more_budget_measures_what_was_left_out(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 2, repeats=5, budget_s=6)
    measure(run, FakeLauncher())
    assert len(measured(measure(run, FakeLauncher()))) == 12, "the same budget is still used up"
    later = FakeLauncher()
    found = measure(again(run, budget_s=60), later)
    assert len(later.started) == 4
    assert {r["status"] for r in judged(found)} == {"ok"}
    assert calls(run, found)[OTHER] in ("same", "undecided")


def test_a_slow_cell_does_not_eat_the_first_repeat_of_others(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 3, repeats=4, budget_s=30)
    launcher = FakeLauncher(**{OTHER: {"speed": 0.01}})
    found = measure(run, launcher)
    assert launcher.spent_s <= 30
    ok = Counter(r["cell"] for r in found if r["status"] == "ok" and r["stage"] == "teacher_fit")
    assert ok == {"baseline": 4, THIRD: 4}
    reasons = {r["reason"] for r in found if r["cell"] == OTHER}
    assert len(reasons) == 1
    assert reasons.pop().startswith("a budget left")


def test_a_cell_budget_stops_that_cell_alone(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 3, repeats=4, cell_budget_s=3.2)
    launcher = FakeLauncher(**{OTHER: {"speed": 0.6}})
    found = measure(run, launcher)
    ok = Counter(r["cell"] for r in found if r["status"] == "ok" and r["stage"] == "teacher_fit")
    assert ok == {"baseline": 4, THIRD: 4, OTHER: 2}
    assert any("cell_budget_s" in str(r["reason"]) for r in found)


def test_a_hundred_times_slower_cell_within_a_budget(tmp_path: Path) -> None:
    """It is stopped, the rest is judged, the total stays under the budget."""
    run = a_run(tmp_path / "run", 3, repeats=5, budget_s=300)
    launcher = FakeLauncher(**{OTHER: {"speed": 0.01}, THIRD: {"speed": 2.0}})
    found = measure(run, launcher)
    assert launcher.spent_s <= 300
    assert calls(run, found)[THIRD] == "faster"
    assert calls(run, found)[OTHER] == "skipped"


def test_set_up_and_trials_are_paid_from_the_budget() -> None:
    purse = Purse(10, None, [])
    purse.spend(9)
    assert purse.refusal(["a"]) is None
    purse.spend(1, "a")
    assert (
        purse.refusal(["a"]) == "budget_s: 10 of 10 s are spent and the next block takes about 1 s"
    )


@pytest.mark.parametrize(
    ("text", "wanted"), [("90", 90), ("30m", 1800), ("1h30m", 5400), ("2h", 7200), ("1.5m", 90)]
)
def test_budgets_are_read_with_their_units(tmp_path: Path, text: str, wanted: float) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(f"question: q\nstages: [teacher_fit]\nbudget_s: {text}\n")
    assert load_matrix(path).budget_s == wanted
    assert seconds(wanted) == wanted


@pytest.mark.parametrize("text", ["soon", "0", "-5m", "30x", "m"])
def test_other_budgets_are_refused_with_their_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(f"question: q\nstages: [teacher_fit]\nbudget_s: {text}\n")
    with pytest.raises(InputError, match=r"m\.yaml:3:11: budget_s"):
        load_matrix(path)

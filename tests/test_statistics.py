"""Error rates of the rule: the simulation and its page, and whole runs of equal cells with drift.

`STATISTICS_PAGE=reports/statistics.md python -m pytest tests/test_statistics.py -m slow` writes the
page anew.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fake_launcher import FakeLauncher, a_run, measure
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.judging.intervals import (
    ALPHA,
    MIN_BLOCKS,
    ONE_LOOK,
    Effect,
    Looks,
    call_of,
    decide,
    holm_levels,
    paired,
)
from bench.simulation import (
    FLOOR,
    LOUD,
    MANY,
    QUIET,
    as_advised,
    at_fixed,
    claimed,
    markdown,
    page,
    pairs,
    with_looks,
)
from bench.verdicts import judge

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "reports/statistics.md"
TRIALS, FEW = 2000, 200
MOST_FALSE_ALARMS, LEAST_FOUND = 0.07, 0.95
HEAD = """\
# How often a verdict is wrong

Simulated, because the truth must be known. `python -m bench.simulation` prints the first three
tables (processes with AR(1) noise, outliers, a spread between them and 1 % of drift from block to
block); `python -m pytest tests/test_statistics.py -m slow` checks this page and makes the last one.
A false alarm is a `faster` or `slower` between equal cells; 7 % is the most that is accepted.

"""
RUNS_HEAD = """
## Fifty runs of equal cells

Whole runs of the harness, schedule to verdict: 4 equal cells, 2 stages, a worker that pretends,
with a spread between its processes and drift: each process of a run slower than the one before.

"""
EQUAL = {
    "0.2 % a process": {"noise": 0.005, "drift": 1.002},
    "1 % a process": {"noise": 0.01, "drift": 1.01},
}
DESIGNS = {
    "`repeats: 5`": {"repeats": 5},
    "`repeats: 4, max_repeats: 8`": {"repeats": 4, "max_repeats": 8},
}
"""Fixed blocks, and looks in between."""


# ---- the rule


@pytest.mark.parametrize("between", [QUIET, LOUD])
@pytest.mark.parametrize("blocks", [4, 5, 8])
def test_equal_cells_are_rarely_called_different(blocks, between):
    calls = at_fixed(pairs(600, blocks, 1.0, between), blocks)
    assert claimed(calls) <= MOST_FALSE_ALARMS


@pytest.mark.parametrize(("shift", "word"), [(1.05, "slower"), (1 / 1.05, "faster")])
def test_five_per_cent_are_found_at_five_blocks(shift, word):
    calls = at_fixed(pairs(600, 5, shift), 5)
    assert calls[word] / calls.total() >= LEAST_FOUND
    assert set(calls) <= {word, "undecided", "same"}


def test_the_noise_is_as_rough_as_it_claims():
    """A rule that looked at single runs, or took the steps for independent, would be fooled."""
    data = pairs(600, 5, 1.0)
    ratios = data.cell / data.baseline
    assert np.mean(np.abs(ratios[:, 0] - 1) > FLOOR) > 0.1
    assert np.median(data.cell[:, 4] / data.cell[:, 0]) == pytest.approx(math.exp(0.04), rel=0.005)


def test_the_user_s_two_numbers_decide_nothing():
    assert decide(paired([139.70], [139.44]), FLOOR) == ("undecided", 3)
    assert decide(paired([1.0], [1000.0]), FLOOR) == ("undecided", 3)


# ---- looks


@given(st.integers(1, 12), st.integers(0, 12), st.floats(1e-4, ALPHA))
def test_the_looks_spend_the_level_and_no_more(first, further, level):
    looks = Looks(first, first + further)
    spent = sum(looks.share(n) for n in range(max(first, MIN_BLOCKS), looks.last + 1))
    assert level * spent == pytest.approx(level) or looks.last < MIN_BLOCKS
    assert looks.share(looks.last) == max(
        looks.share(n) for n in range(max(first, MIN_BLOCKS), max(looks.last, MIN_BLOCKS) + 1)
    )


def test_looking_often_raises_false_alarms_and_sharing_the_level_stops_that():
    data, looks = pairs(1000, 8, 1.0, LOUD), Looks(4, 8)
    shared, _ = with_looks(data, looks, ALPHA, shared=True)
    plain, _ = with_looks(data, looks, ALPHA, shared=False)
    assert claimed(shared) <= MOST_FALSE_ALARMS < claimed(plain)


def test_a_clear_effect_stops_at_the_fourth_block():
    calls, used = with_looks(pairs(200, 8, 3.0), Looks(4, 8), ALPHA / MANY, shared=True)
    assert (calls["slower"], used) == (200, 4.0)


def test_looks_find_more_for_no_more_blocks():
    data = pairs(600, 8, 1.05)
    fixed = at_fixed(data, 5, ALPHA / MANY)
    calls, _ = with_looks(data, Looks(4, 8), ALPHA / MANY, shared=True)
    equal, used = with_looks(pairs(600, 8, 1.0), Looks(4, 8), ALPHA, shared=True)
    assert claimed(calls) > claimed(fixed) + 0.1
    assert used < 5.5
    assert claimed(equal) <= MOST_FALSE_ALARMS


def test_repeats_added_by_hand_are_looks_too():
    """Why the page sends the reader to `max_repeats`."""
    data = pairs(600, 30, 1.0, LOUD)
    assert claimed(as_advised(data, 5, 1)) > claimed(as_advised(data, 5, 0))


@settings(max_examples=60)
@given(st.floats(-0.2, 0.2), st.floats(1e-3, 0.1), st.integers(4, 7))
def test_needed_blocks_follow_the_shares_of_the_looks(mean, sd, blocks):
    looks = Looks(4, 8)
    call, needs = decide(Effect(mean, sd, blocks), FLOOR, ALPHA, looks)
    if call != "undecided" or needs is None:
        return
    calls = [
        call_of(Effect(mean, sd, n), FLOOR, ALPHA * looks.share(n))
        for n in range(blocks, blocks + needs + 1)
    ]
    assert set(calls[:-1]) == {"undecided"}
    assert calls[-1] != "undecided"


def test_one_look_is_the_plain_rule():
    assert [ONE_LOOK.share(n) for n in (4, 5, 50)] == [1, 1, 1]
    assert [Looks(5, 5).share(n) for n in (4, 5, 9)] == [1, 1, 1]


def test_holm_over_shared_levels_keeps_the_rate_of_a_whole_matrix():
    """Nine equal cells, looked at up to five times: any false alarm at all is rare."""
    random = np.random.default_rng(8)
    looks, false = Looks(4, 8), 0
    for _ in range(300):
        logs = 0.06 * random.standard_normal((MANY, looks.last))
        for blocks in range(looks.first, looks.last + 1):
            effects = [
                Effect(float(x.mean()), float(x.std(ddof=1)), blocks) for x in logs[:, :blocks]
            ]
            share = looks.share(blocks)
            levels = holm_levels([effect.p_value / share for effect in effects])
            calls = {
                call_of(effect, FLOOR, level * share)
                for effect, level in zip(effects, levels, strict=True)
            }
            if calls & {"faster", "slower"}:
                false += 1
                break
    assert false / 300 <= MOST_FALSE_ALARMS


# ---- the page


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?(?= %|\))", text)]


def words(text: str) -> str:
    return re.sub(r"[\d.:|-]+", "#", re.sub(r"[ -]+", " ", text))


def test_the_page_says_what_a_smaller_simulation_finds():
    written, _, _ = PAGE.read_text().partition("\n## Fifty runs")
    small = HEAD + page(FEW)
    for line, again in zip(written.splitlines(), small.splitlines(), strict=True):
        assert words(line) == words(again)
        if not line.startswith("|"):
            continue
        for wrote, found in zip(numbers(line), numbers(again), strict=True):
            share = min(max(wrote, found, 1.0), 50) / 100
            assert abs(wrote - found) <= 450 * math.sqrt(share * (1 - share) / FEW)


def test_the_page_admits_no_rate_above_the_accepted_one():
    lines = {
        line.split("|")[1].strip(): numbers(line)
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ")
    }
    for name in ("equal cells called faster or slower", "the same, 4 % between processes"):
        assert max(lines[name][name.count("%") :]) <= 100 * MOST_FALSE_ALARMS
    assert lines["true 5 % found"][2] >= 100 * LEAST_FOUND


# ---- whole runs


def equal_runs(folder: Path, count: int, choice: dict, design: dict) -> tuple[Counter, int]:
    """Calls of all comparisons of so many runs, and the processes they took."""
    calls: Counter[str] = Counter()
    processes = 0
    for seed in range(count):
        launcher = FakeLauncher(every=choice)
        run = a_run(folder / str(seed) / "run", 4, seed, **design)
        found = judge(run.matrix, list(run.cells), measure(run, launcher))
        calls.update(row.call for rows in found.tables.values() for row in rows[1:])
        processes += len(launcher.started)
    return calls, processes


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_runs_of_equal_cells_with_drift_claim_nothing(tmp_path, design):
    calls, _ = equal_runs(tmp_path, 8, EQUAL["1 % a process"], design)
    assert set(calls) <= {"same", "undecided"}


def equal_runs_table(folder: Path) -> str:
    lines = []
    for drift, choice in EQUAL.items():
        for name, design in DESIGNS.items():
            calls, processes = equal_runs(folder / f"{drift}{name[:12]}", 50, choice, design)
            false = calls["faster"] + calls["slower"]
            row = [drift, name, calls.total(), false, calls["same"], calls["undecided"], processes]
            lines.append([str(value) for value in row])
    head = ["drift", "design", "comparisons", "faster or slower", "same", "undecided", "processes"]
    return markdown(head, lines)


@pytest.mark.slow
def test_the_page_is_what_the_full_simulation_finds(tmp_path):
    text = HEAD + page(TRIALS) + "\n" + RUNS_HEAD + equal_runs_table(tmp_path) + "\n"
    if place := os.environ.get("STATISTICS_PAGE"):
        Path(place).write_text(text)
    assert PAGE.read_text() == text


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_command_line_claims_nothing_of_equal_cells(tmp_path, seed):
    matrix = tmp_path / "equal.yaml"
    matrix.write_text(
        "question: Are equal cells called different?\nstages: [teacher_fit, teacher_test]\n"
        f"axes: {{train.num_workers: [0, 1, 2]}}\nbase: {{seed: {seed}}}\n"
        "repeats: 4\nmax_repeats: 6\npreflight: never\n"
    )
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "bench.run", str(matrix), "--out", str(out), "--worker",
         f"{sys.executable} {ROOT / 'tests' / 'fake_worker.py'}"],
        cwd=ROOT,
        env=os.environ | {"FAKE_WORKER": json.dumps({"*": EQUAL["1 % a process"]})},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = Path(done.stdout.splitlines()[-1]).read_text()
    assert "drift" in report
    assert "| faster" not in report
    assert "| slower" not in report

"""The recommended cell: objective, memory limit, and every reason to recommend another or none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_records import GIB, REPEATS, STAGES, head, ok_record

from bench.judging.best import SOURCES, memory_source
from bench.judging.figures import TOTAL
from bench.judging.judgement import Verdict
from bench.matrix import Matrix, cells
from bench.reporting.labels import HEIGHT, MARK, overlap, places
from bench.reporting.pareto import DOMINATED, FRONT, OUT, beats, points
from bench.verdicts import judge

BF16, QLORA, EAGER = "train.precision=bf16-mixed", "teacher.adapter=qlora", "teacher.attn=eager"
LEAN_GIB, MIDDLE_GIB, ALL_GIB = 2.0, 3.3, 5.4
"""Limits of reserved memory that fit 4-bit weights, bf16 too, and every cell."""


def made(repeats=REPEATS, axes=None, **choice):
    axes = axes or {
        "train.precision": ["fp32", "bf16-mixed"],
        "teacher.adapter": ["lora", "qlora"],
        "teacher.attn": ["sdpa", "eager"],
    }
    return Matrix(question="Which?", stages=STAGES, axes=axes, repeats=repeats, **choice)


def judged(matrix, change=lambda record: record):
    """The judgement of a clean run; `change` is made to every record."""
    planned = cells(matrix, True)
    records = [
        change(ok_record(cell, block, stage))
        for block in range(matrix.repeats)
        for cell in planned
        for stage in STAGES
    ]
    return judge(matrix, planned, records)


def best(matrix, change=lambda record: record):
    return judged(matrix, change).best


def only(cell, **fields):
    """A change to the records of one cell."""
    return lambda record: record | (fields if record["cell"] == cell else {})


def with_memory(record, gib):
    """A record with so much reserved memory."""
    return record | {
        "memory": record["memory"] | {"torch_reserved_peak_bytes": round(gib * GIB)},
    }


# ---- objectives


@pytest.mark.parametrize(
    ("objective", "cell", "reason"),
    [
        ("time", BF16, "the only cell proven faster on the whole, no failed repeat"),
        ("memory", QLORA, "the leanest of 2 cells proven to need less memory, no failed repeat"),
        ("both", QLORA, "the best of 2 cells proven better in time × memory, no failed repeat"),
    ],
)
def test_each_objective_has_its_best_cell(objective, cell, reason):
    found = best(made(objective=objective))
    assert (found.cell, found.is_baseline, found.reason) == (cell, False, reason)


def test_memory_that_scatters_more_than_it_differs_decides_nothing():
    def noisy(record):
        return with_memory(record, 4 + 0.5 * (record["block"] % 3) + (record["cell"] == BF16) * 0.1)

    axes = {"train.precision": ["fp32", "bf16-mixed"]}
    found = best(made(objective="memory", axes=axes), noisy)
    assert found.is_baseline
    assert found.reason == "no other cell was proven to need less memory (1 with more memory)"
    by_chance = best(
        made(objective="memory", axes=axes),
        lambda r: with_memory(r, 4 - (r["cell"] == BF16) * (0.0, 0.9, -0.3, 0.8, 0.1)[r["block"]]),
    )
    assert by_chance.is_baseline
    assert by_chance.reason == "no other cell was proven to need less memory (1 undecided)"
    assert by_chance.turned_down == {BF16: "undecided"}


@pytest.mark.parametrize("objective", ["time", "memory", "both"])
def test_three_repeats_choose_nothing(objective):
    """Equal peaks to the byte are a point interval, yet no verdict is given below four blocks."""
    found = best(made(repeats=3, objective=objective))
    assert found.is_baseline
    assert "3 undecided" in found.reason


def test_less_memory_within_the_floor_is_the_same():
    found = best(
        made(objective="memory", axes={"train.precision": ["fp32", "bf16-mixed"]}),
        lambda r: with_memory(r, 3.96 if r["cell"] == BF16 else 4.0),
    )
    assert found.reason == "no other cell was proven to need less memory (1 same)"


# ---- what is never chosen


@pytest.mark.parametrize("objective", ["time", "memory", "both"])
def test_worse_quality_an_unseen_setting_and_a_failure_are_never_chosen(objective):
    matrix = made(objective=objective, axes={"train.precision": ["fp32", "bf16-mixed"]})
    planned = cells(matrix, True)

    def halved(record):
        ranks = record["ranks"]
        worse = ranks and [rank + 50 * (user % 2) for user, rank in enumerate(ranks)]
        return record | ({"ranks": worse} if record["cell"] == BF16 else {})

    worse = best(matrix, halved)
    assert worse.is_baseline
    assert "1 worse quality" in worse.reason
    assert best(matrix, lambda record: record | {"facts": {}}).is_baseline
    records = [ok_record(c, b, s) for b in range(REPEATS) for c in planned for s in STAGES]
    lost = [r for r in records if (r["cell"], r["block"]) != (BF16, 2)]
    lost.append(head(planned[1], 2, STAGES[0], "oom_gpu") | {"reason": "CUDA out of memory"})
    found = judge(matrix, planned, lost).best
    assert found.is_baseline
    assert found.turned_down == {BF16: "failed"}
    assert "with failed repeats" in found.reason


# ---- the limit


def test_a_cell_above_the_limit_is_refused_with_the_reason():
    def large(record):
        return with_memory(record, 9.0 if record["cell"] == BF16 else 2.0)

    free, limited = best(made(), large), best(made(max_memory_gib=8.5), large)
    assert free.cell == BF16
    assert limited.is_baseline and not limited.refused
    assert limited.turned_down == {BF16: "above"}
    assert "no other cell was proven faster on the whole within 8.5 GiB (" in limited.reason
    assert "1 above the memory limit" in limited.reason


def test_a_limit_that_all_fit_changes_only_the_words():
    found = best(made(max_memory_gib=ALL_GIB))
    assert found.cell == BF16
    assert (
        found.reason == "the only cell proven faster on the whole within 5.4 GiB, no failed repeat"
    )


def test_the_limit_itself_is_allowed():
    def exact(record):
        return with_memory(record, 3.0)

    assert best(made(max_memory_gib=3.0), exact).cell == BF16


def test_where_the_baseline_does_not_fit_the_best_that_fits_is_taken():
    """Even a slower one: the baseline would not run at all."""
    fast, lean = best(made(max_memory_gib=MIDDLE_GIB)), best(made(max_memory_gib=LEAN_GIB))
    assert (fast.cell, fast.refused) == (BF16, False)
    needs = "the baseline needs 5.35 GiB, more than the 3.3 GiB allowed"
    assert fast.reason == f"{needs}; the fastest of 2 cells that fit"
    assert (lean.cell, lean.refused) == (QLORA, False)
    assert lean.reason.endswith("the only cell that fit")


def test_where_nothing_fits_nothing_is_recommended():
    found = best(made(max_memory_gib=1.0))
    assert (found.is_baseline, found.refused) == (True, True)
    assert "more than the 1 GiB allowed, and no cell that fits is decided (3 above" in found.reason


def test_a_cell_that_fits_but_is_undecided_is_no_recommendation():
    found = best(made(repeats=3, max_memory_gib=LEAN_GIB))
    assert found.refused
    assert "1 undecided" in found.reason


def test_a_limit_without_memory_figures_is_told():
    unread = {"torch_reserved_peak_bytes": {"unavailable": "no GPU"}}

    def blind(record):
        memory = {name: {"unavailable": "nobody looked"} for name in record["memory"]} | unread
        return record | {"memory": memory}

    limited, lean = best(made(max_memory_gib=8), blind), best(made(objective="memory"), blind)
    assert limited.refused and not lean.refused
    assert "memory was read in no source that all measured cells share" in limited.reason
    assert best(made(), blind).cell == BF16


# ---- the source of memory


def row(cell, ratio=1.0, call="same", repeats=5, **memory):
    names = {"device": SOURCES[0], "reserved": SOURCES[1], "host": SOURCES[2]}
    sources = {names[name]: value for name, value in memory.items()}
    return Verdict(cell, TOTAL, call, ratio=ratio, repeats=repeats, memory=sources)


def test_the_best_source_is_one_that_all_measured_cells_share():
    whole = row("a", device=5, reserved=4, host=3)
    assert memory_source([whole, row("b", device=5, reserved=4, host=3)]) == SOURCES[0]
    assert memory_source([whole, row("b", reserved=4, host=3)]) == SOURCES[1]
    assert memory_source([whole, row("b", host=3)]) == SOURCES[2]
    assert memory_source([whole, row("b", repeats=0)]) == SOURCES[0]
    assert memory_source([whole, row("b", reserved=4), row("c", host=3)]) is None
    assert memory_source([]) is None


# ---- the front


def test_the_front_holds_what_nothing_beats():
    matrix = made(max_memory_gib=5.0)
    planned = cells(matrix, True)
    records = [ok_record(c, b, s) for b in range(REPEATS) for c in planned for s in STAGES]
    rows = judge(matrix, planned, records).tables[TOTAL]
    places = {p.cell: p.place for p in points(rows, planned, records, None)}
    assert places == {"baseline": DOMINATED, BF16: FRONT, QLORA: FRONT, EAGER: DOMINATED}
    limited = {p.cell: p.place for p in points(rows, planned, records, LEAN_GIB)}
    assert limited == {"baseline": OUT, BF16: OUT, QLORA: FRONT, EAGER: OUT}


figures = st.tuples(st.floats(0.1, 10), st.floats(0.1, 10))


@given(st.lists(figures, min_size=1, max_size=12))
def test_some_cell_is_on_every_front_and_none_beats_itself(values):
    kept = [one for one in values if not any(beats(other, one) for other in values)]
    assert kept
    assert not any(beats(one, one) for one in values)
    assert {min(values), min(values, key=lambda one: (one[1], one[0]))} <= set(kept)


spots = st.tuples(st.floats(1.0, 5.0), st.floats(1.0, 4.0))


@given(st.lists(spots, min_size=1, max_size=12) | spots.map(lambda spot: [spot] * 12))
def test_numbers_cover_neither_points_nor_each_other(spots):
    widths = [0.125 + 0.085 * (i > 8) for i in range(len(spots))]
    boxes = places(spots, widths, (0.75, 6.05))
    half = MARK / 2
    marks = [(x - half, y - half, x + half, y + half) for x, y in spots]
    for i, (box, width) in enumerate(zip(boxes, widths, strict=True)):
        assert (box[2] - box[0], box[3] - box[1]) == pytest.approx((width, HEIGHT))
        assert box[0] > 0.75 and box[2] < 6.05
        assert not any(overlap(box, other) for other in [*marks, *boxes[:i]])

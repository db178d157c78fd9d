"""The goals' measuring: sides that differ are never timed, every line can be missed, the page."""

import math
from dataclasses import replace

import pytest
import torch
from perf import found as page
from perf import goal_parts, goal_teacher, goal_trainer, goals, products, timing
from perf import world as present
from perf.equality import Unequal, equal, equal_gradients, equal_top_k
from perf.found import Found
from perf.old_way import RUNGS, ExpertLinear, metrics_of
from perf.shape_counts import counts
from perf.timing import Paired
from perf.world import World

from core.settings import SyntheticSettings

SMALL = World(
    preset="tiny",
    prompts=8,
    batch_size=4,
    max_history=4,
    synthetic=SyntheticSettings(users=30, items=60, mean_length=9),
)


@pytest.fixture(scope="module")
def world() -> World:
    return SMALL


# ---- equality before times ----


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_gives_the_present_loss_and_gradients(world, rung):
    now = world.new_teacher()
    assert "gradients" in goal_teacher.checked(world, now, goal_teacher.old(world, now, rung))


@pytest.mark.parametrize("rung", ["old way", "gate in rank space"])
def test_in_fp64_both_agree_to_rounding(world, rung):
    assert "loss" in goal_teacher.exactly_checked(world, rung)


def scale_an_expert(other) -> None:
    layer = next(m for m in other.modules() if isinstance(m, ExpertLinear))
    layer.experts.scale *= 1.01


def forget_the_router(other) -> None:
    other.router.requires_grad_(False)


def read_one_token_early(other) -> None:
    read = other.embedded
    other.embedded = lambda *given: (read(*given)[0], read(*given)[1] - 1)


@pytest.mark.parametrize("fault", [scale_an_expert, forget_the_router, read_one_token_early])
def test_a_wrong_reference_is_refused_and_never_timed(world, monkeypatch, fault):
    build = goal_teacher.old

    def faulty(world, now, rung):
        other = build(world, now, rung)
        if rung == "old way":
            fault(other)
        return other

    monkeypatch.setattr(goal_teacher, "old", faulty)
    monkeypatch.setattr(goal_teacher, "rounds", lambda *_: pytest.fail("timed"))
    (line,) = goals.measured({"training": lambda n: goal_teacher.training(world, n)}, 1)
    assert line.remark.startswith("UNEQUAL") and "not timed" in line.remark
    assert line.reached is None and line.word == "not measured"


def test_wrong_outputs_are_refused(world, monkeypatch):
    monkeypatch.setattr(goal_teacher, "rounds", lambda *_: pytest.fail("timed"))
    answer = goal_teacher.OldTeacher.answer

    def shifted(self, queries, rows):
        states, scores = answer(self, queries, rows)
        return states, scores.roll(1, 1)

    monkeypatch.setattr(goal_teacher.OldTeacher, "answer", shifted)
    with pytest.raises(Unequal, match="top-10"):
        list(goal_teacher.evaluation(world, 1))


def test_a_peer_that_trains_something_else_is_refused(world, monkeypatch):
    monkeypatch.setattr(goal_trainer, "rounds", lambda *_: pytest.fail("timed"))
    build = goal_trainer.Peer

    def other(*given):
        peer = build(*given)
        peer.item_table.data.mul_(1.01)
        return peer

    monkeypatch.setattr(goal_trainer, "Peer", other)
    with pytest.raises(Unequal, match="loss differ"):
        list(goal_trainer.trainer(world, 1))


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_a_peer_whose_adapters_have_another_scale_is_refused(world, monkeypatch, precision):
    """Also where rounding allows much."""
    monkeypatch.setattr(goal_trainer, "rounds", lambda *_: pytest.fail("timed"))
    build = goal_trainer.Peer

    def other(*given):
        peer = build(*given)
        for layer in peer.modules():
            if isinstance(getattr(layer, "scaling", None), dict):  # attention has a number
                layer.scaling["default"] *= 0.5
        return peer

    monkeypatch.setattr(goal_trainer, "Peer", other)
    with pytest.raises(Unequal):
        list(goal_trainer.trainer(replace(world, precision=precision), 1))


def test_differences_that_are_none_of_rounding():
    assert equal("x", torch.ones(3), torch.ones(3) + 1e-7).difference < 1e-6
    for wrong in (torch.ones(2), torch.full((3,), float("nan")), torch.tensor([1.0, 1.0, 1.1])):
        with pytest.raises(Unequal):
            equal("x", wrong, torch.ones(3))
    one = {"a": torch.ones(2), "b": torch.full((2,), 1e-3)}
    with pytest.raises(Unequal, match="of one side only: b"):
        equal_gradients({"a": one["a"]}, one)
    with pytest.raises(Unequal, match="gradients of b"):
        equal_gradients(one | {"b": 2 * one["b"]}, one)
    with pytest.raises(Unequal, match="no gradients"):
        equal_gradients({}, {})


def test_top_k_may_swap_ties_only():
    scores = torch.tensor([[9.0, 3.0, 2.0, 2.0, 1.0]])  # the first column is padding
    assert equal_top_k(torch.tensor([[1, 3]]), scores).difference == 0
    for wrong in ([[1, 4]], [[1, 1]], [[2, 1]]):
        with pytest.raises(Unequal):
            equal_top_k(torch.tensor(wrong), scores)


# ---- the lines ----


@pytest.mark.parametrize(
    ("goal", "lines"),
    [
        (goal_teacher.training, len(RUNGS) + 2),
        (goal_teacher.evaluation, 1),
        (goal_teacher.outputs_rate, 1),
        (goal_parts.gating, 1),
        (goal_trainer.trainer, 3),
    ],
)
def test_a_goal_of_the_teacher_is_measured(world, goal, lines):
    found = list(goal(world, 1))
    assert len(found) == lines and found[0].wanted
    assert all(math.isfinite(one.value) and one.value > 0 for one in found)
    assert all(one.spread[0] <= one.value <= one.spread[1] for one in found)


def test_causal_targets_are_counted_alike_in_both_modes(world):
    (one,) = goal_teacher.causal(replace(world, whole_users=1), 1)
    assert one.value > 1 and one.remark.startswith(f"{len(replace(world, whole_users=1).rows)} ")


def test_rankings_agree_before_they_are_timed():
    found = list(goal_parts.full_ranking(1, users=40, items=120))
    assert [one.wanted for one in found] == [10, 15, None] and all(one.equality for one in found)
    assert metrics_of([0, 7, 30], (5, 10)) == pytest.approx(
        {
            "recall@5": 1 / 3,
            "recall@10": 2 / 3,
            "ndcg@5": 1 / 3,
            "ndcg@10": (1 + 1 / math.log2(9)) / 3,
        }
    )


def test_the_gated_layer_is_judged_by_all_layers_of_a_block():
    found = list(goal_parts.gated_layer(1, {(32, 32): 4, (32, 64): 1}))
    assert [one.wanted for one in found] == [1.3, None, None, 1.8, None, None]


def test_counts_are_exact_and_of_the_form_that_was_asked_for():
    forms = {form: counts("tiny", form) for form in ("present", "stock peft", "expert axis")}
    assert forms["present"] == counts("tiny", "present")
    operators = [forms[form]["operators"] for form in forms]
    assert operators == sorted(operators) and len(set(operators)) == 3
    saved = [forms[form]["saved_bytes_per_token"] for form in forms]
    assert saved[2] > 2 * max(saved[:2]) > 0
    more = counts("tiny", "expert axis", experts=8)["saved_bytes_per_token"]
    assert more > 1.5 * saved[2], "each expert's output is saved"


def test_padding_counts_every_batching(monkeypatch):
    monkeypatch.setattr(goal_parts, "SHAPES", {"small": SMALL.synthetic})
    found = {one.goal.rpartition(", ")[2]: one for one in goal_parts.padding((8,))}
    assert found["padded"].value > found["grouped"].value > 0
    assert found["padded"].wanted is None and found["packed"].wanted == 0.05


def test_the_share_of_products_is_of_the_time_in_operators():
    left, right = torch.ones(400, 400), torch.ones(400, 400)
    assert products.share(lambda: left @ right) > 0.8
    assert products.share(left.exp) == 0
    assert 0.05 < products.share(lambda: (left @ right).exp().log().sin().sum()) < 0.95
    words = products.most(Paired(3.0, 2.9, 3.1, 5, 1.0), lambda: left @ right)
    assert words.startswith(("9", "8", "100")) and words.endswith(" if nothing else were left")


# ---- times and the page ----


def test_rounds_take_turns_and_keep_what_a_work_measured_itself():
    order, now = [], [0.0]

    def work(name, cost, own=None):
        def run():
            order.append(name)
            now[0] += cost
            return own

        return run

    works = {"a": work("a", 2.0), "b": work("b", 1.0), "c": work("c", 9.0, timing.Steady(0.5))}
    seconds = timing.rounds(works, 2, lambda: now[0])
    assert seconds == {"a": [2.0, 2.0], "b": [1.0, 1.0], "c": [0.5, 0.5]}
    assert "".join(order) == "abc" + "abc" + "cba"
    ratio = timing.paired([4.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert (ratio.median, ratio.low, ratio.high, ratio.blocks) == (3.0, 2.0, 4.0, 3)


def test_lines_are_reached_missed_or_not_measured():
    assert [
        Found("g", "a", wanted, value, at_most=at_most).word
        for wanted, value, at_most in (
            (5, 5.0, False),
            (5, 4.9, False),
            (0.2, 0.19, True),
            (0.2, 0.21, True),
            (5, None, False),
            (None, 3.0, False),
        )
    ] == ["reached", "MISSED", "reached", "MISSED", "not measured", "–"]


def test_the_page_names_command_machine_and_every_line():
    lines = [
        Found("step", "old way", 5, 8.25, spread=(8.0, 8.5), blocks=5, equality="loss 1e-7"),
        Found("count", "stock", 0.5, 0.6, at_most=True),
        Found("mode", "other", 20, remark="not built"),
    ]
    text = page.render(lines, page.Made("perf.goals", ("--blocks", "5"), goals.CLOCK))
    assert "`PYTHONPATH=tests python -m perf.goals --blocks 5`" in text
    assert "Of 3 goals: 1 reached, 1 missed, 1 not measured." in text
    assert "8.000 to 8.500" in text and "loss 1e-7" in text and "not built" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text


def test_the_command_says_by_its_status_what_came_out(monkeypatch, tmp_path):
    outcomes = {
        "reached": Found("g", "a", 2, 3.0),
        "missed": Found("g", "a", 2, 1.0),
    }

    def unequal(blocks):
        raise Unequal("loss differ")
        yield

    out = tmp_path / "report.md"
    for name, status in (("reached", 0), ("missed", 1)):
        monkeypatch.setattr(goals, "GOALS", {"g": lambda _, name=name: iter([outcomes[name]])})
        assert goals.main(["--out", str(out)]) == status
        assert out.read_text().count("| g ") == 1
    monkeypatch.setattr(goals, "GOALS", {"g": unequal})
    assert goals.main(["--out", str(out)]) == 2 and "UNEQUAL" in out.read_text()


def test_the_present_step_leaves_the_weights_alone(world):
    model = world.new_teacher()
    before = [parameter.clone() for parameter in model.trainable()]
    present.training_step(world, model)()
    same = [torch.equal(a, b) for a, b in zip(before, model.trainable(), strict=True)]
    assert all(same), "every round must do the same arithmetic"

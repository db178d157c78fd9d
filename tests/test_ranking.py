"""Queries over the split, and the evaluator against a ranking worked out user by user."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import prepared
from torch.utils._python_dispatch import TorchDispatchMode

from core import ranking
from core.ranking import Queries
from core.settings import EvalSettings

K = EvalSettings(top_k=(1, 10))


def fixed_scores(seed: int = 0) -> torch.Tensor:
    """One row of scores for each user."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(prepared().num_users, prepared().num_items + 1, generator=random)


def scorer_of(scores, batch_size: int = 7, most: int = 5):
    def score(queries):
        for rows in queries.by_length(batch_size, most):
            yield rows, scores[torch.from_numpy(queries.users[rows])].clone()

    return score


@pytest.mark.parametrize("split", ["validation", "test"])
def test_queries_are_the_history_before_each_target(split):
    cut = prepared()
    queries = ranking.held_out(cut, split)
    assert queries.users.tolist() == cut.eval_users.tolist()
    for row, user in enumerate(cut.eval_users):
        history, target = getattr(cut, split)(user)
        assert queries.targets[row] == target
        assert queries.lengths[row] == len(history)
        items, lengths = queries.newest(np.array([row]), 100)
        assert items[0, : lengths[0]].tolist() == history.tolist()


def test_the_newest_items_are_left_aligned():
    items = np.arange(1, 11, dtype=np.int32)
    queries = Queries(items, np.array([0, 0, 4]), np.array([1, 4, 9]), np.arange(3))
    found, lengths = queries.newest(np.array([2, 0, 1]), 3)
    assert found.tolist() == [[7, 8, 9], [1, 0, 0], [2, 3, 4]]
    assert lengths.tolist() == [3, 1, 3]
    assert found.dtype == np.int64
    found, _ = queries.newest(np.array([0]), 3)
    assert found.tolist() == [[1]]


def test_by_length_asks_each_query_once_and_groups_lengths():
    queries = ranking.held_out(prepared(), "test")
    batches = list(queries.by_length(9, 5))
    rows = np.concatenate(batches)
    assert sorted(rows) == list(range(len(queries)))
    assert (np.diff(np.minimum(queries.lengths[rows], 5)) >= 0).all()


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("mask_seen", [True, False])
def test_metrics_equal_a_ranking_by_hand(split, mask_seen):
    cut, scores = prepared(), fixed_scores()
    settings = K.model_copy(update={"mask_seen": mask_seen})
    found, ranks = ranking.evaluate(scorer_of(scores), cut, split, settings)
    loss = 0.0
    for row, user in enumerate(cut.eval_users):
        history, target = getattr(cut, split)(user)
        own = scores[user]
        rivals = set(range(1, cut.num_items + 1)) - {target}
        if mask_seen:
            rivals -= set(history.tolist())
        assert ranks[row] == sum(own[item] > own[target] for item in rivals)
        loss -= own[1:].log_softmax(0)[target - 1].item()  # seen items included
    ranks = np.array(ranks)
    assert found["recall@10"] == pytest.approx((ranks < 10).mean())
    gains = np.where(ranks < 10, 1 / np.log2(ranks + 2), 0)
    assert found["ndcg@10"] == pytest.approx(gains.mean(), abs=1e-6)
    assert found["loss"] == pytest.approx(loss / len(ranks), rel=1e-5)
    assert found["users"] == len(ranks)


def test_batches_do_not_matter_and_ranks_stay_in_the_order_of_users():
    scores = fixed_scores()
    one = ranking.evaluate(scorer_of(scores, 1), prepared(), "test", K)
    many = ranking.evaluate(scorer_of(scores, 1000, most=1), prepared(), "test", K)
    assert one[1] == many[1]
    assert one[0].pop("loss") == pytest.approx(many[0].pop("loss"))
    assert one[0] == many[0]


def test_chance_levels_stand_beside_the_result():
    cut = prepared()
    found, ranks = ranking.evaluate(
        scorer_of(torch.zeros(cut.num_users, cut.num_items + 1)), cut, "test",
        K.model_copy(update={"mask_seen": False}),
    )  # fmt: skip
    assert found["uniform_loss"] == pytest.approx(math.log(cut.num_items))
    assert found["loss"] == pytest.approx(found["uniform_loss"])
    assert found["chance_recall@10"] == 10 / cut.num_items
    assert set(ranks) == {(cut.num_items - 1) / 2}  # constant scores are no hit


def test_a_query_that_was_never_scored_is_an_error():
    def forgetful(queries):
        batches = list(scorer_of(fixed_scores())(queries))
        yield from batches[1:]

    with pytest.raises(ValueError, match="scores for 53 of 60 queries, 53 rows in all"):
        ranking.evaluate(forgetful, prepared(), "test", K)
    with pytest.raises(ValueError, match="scored none of 60"):
        ranking.evaluate(lambda queries: iter(()), prepared(), "test", K)


def test_a_query_that_is_scored_twice_is_an_error():
    def stammering(queries):
        for rows, scores in scorer_of(fixed_scores())(queries):
            yield rows, scores
        yield rows, scores

    with pytest.raises(ValueError, match="scores for 60 of 60 queries, 64 rows in all"):
        ranking.evaluate(stammering, prepared(), "test", K)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_an_error(bad):
    scores, cut = fixed_scores(), prepared()
    unseen = next(i for i in range(1, cut.num_items) if i not in cut.sequence(3))
    scores[3, unseen] = bad
    with pytest.raises(ValueError, match=r"rank: non-finite scores .* of 1 users"):
        ranking.evaluate(scorer_of(scores), cut, "test", K)


def test_scores_of_another_catalogue_are_an_error():
    scores = torch.zeros(prepared().num_users, prepared().num_items)
    with pytest.raises(ValueError, match=r"scores have \d+ columns, need"):
        ranking.evaluate(scorer_of(scores), prepared(), "test", K)


@pytest.mark.parametrize("bad", [0, -1, 10_000])
def test_targets_outside_the_catalogue_are_an_error(bad):
    cut = prepared()
    items = cut.items.copy()
    items[cut.offsets[5] - 1] = bad
    with pytest.raises(ValueError, match="a target lies outside"):
        ranking.evaluate(scorer_of(fixed_scores()), replace(cut, items=items), "test", K)


class Reads(TorchDispatchMode):
    """Counts what makes a host wait for a device."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero")
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_for_a_batch():
    counts = []
    for batch_size in (3, 1000):
        with Reads() as reads:
            ranking.evaluate(scorer_of(fixed_scores(), batch_size), prepared(), "test", K)
        counts.append(reads.found)
    assert counts[0] == counts[1] <= 2


def test_histories_are_all_items_before_the_targets():
    queries, rows = ranking.held_out(prepared(), "test"), np.array([5, 0, 9])
    lines, items = queries.histories(rows)
    for line, row in enumerate(rows):
        assert items[lines == line].tolist() == prepared().test(row)[0].tolist()
    assert len(lines) == queries.lengths[rows].sum()


def test_low_precision_scores_are_ranked_in_fp32():
    scores = fixed_scores()
    exact = ranking.evaluate(scorer_of(scores), prepared(), "test", K)[0]["loss"]
    low = ranking.evaluate(scorer_of(scores.bfloat16()), prepared(), "test", K)[0]["loss"]
    assert low == pytest.approx(exact, rel=1e-3)

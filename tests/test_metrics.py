"""Ranks, lists and intervals against brute force and hand-made cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.metrics import (
    best,
    best_columns_by_keys,
    best_columns_on_host,
    paired_difference,
    rank,
    summary,
    top_k,
)

FEW_SCORES = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 0.25, 1.0, 7.0])


def brute_rank(row: list[float], target: int, seen: list[int]) -> float:
    others = [i for i in range(1, len(row)) if i != target and i not in seen]
    greater = sum(row[i] > row[target] for i in others)
    return greater + sum(row[i] == row[target] for i in others) / 2


@st.composite
def rankings(draw):
    items, rows = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    finite = FEW_SCORES.filter(math.isfinite)
    scores = draw(
        st.lists(
            st.lists(finite, min_size=items + 1, max_size=items + 1), min_size=rows, max_size=rows
        )
    )
    targets = draw(st.lists(st.integers(1, items), min_size=rows, max_size=rows))
    seen = draw(
        st.lists(
            st.lists(st.integers(0, items), min_size=3, max_size=3), min_size=rows, max_size=rows
        )
    )
    return scores, targets, seen


@settings(deadline=None)
@given(rankings())
def test_rank_equals_brute_force(case):
    scores, targets, seen = case
    got = rank(torch.tensor(scores), torch.tensor(targets), torch.tensor(seen))
    wanted = [brute_rank(*row) for row in zip(scores, targets, seen, strict=True)]
    assert got.tolist() == wanted and got.dtype == torch.float32


@settings(deadline=None)
@given(st.lists(FEW_SCORES, min_size=2, max_size=12), st.data())
def test_top_k_equals_a_sort_by_score_then_id(row, data):
    order = sorted(
        (i for i in range(1, len(row)) if row[i] > -math.inf), key=lambda i: (-row[i], i)
    )
    if not order:
        return
    k = data.draw(st.integers(1, len(order)))
    ids_BK, scores_BK = top_k(torch.tensor([row, row]), k)
    assert ids_BK.tolist() == [order[:k]] * 2 and ids_BK.dtype == torch.int64
    assert scores_BK.tolist() == [[row[i] for i in order[:k]]] * 2
    assert scores_BK.dtype == torch.float32


def simple_rank(scores_BV1, targets_B, seen_BL):
    """A mask over the whole matrix, then two comparisons: what `rank` avoids."""
    masked = torch.zeros_like(scores_BV1, dtype=torch.bool).scatter_(1, seen_BL, True)
    masked[:, 0] = True
    masked.scatter_(1, targets_B[:, None], False)
    ranked = scores_BV1.masked_fill(masked, -math.inf)
    own = ranked.gather(1, targets_B[:, None])
    return (ranked > own).sum(1).float() + ((ranked == own).sum(1) - 1).float() / 2


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 300), st.integers(0, 40), st.sampled_from([2, 50, 0]))
def test_rank_equals_the_simple_form_on_real_scores_and_on_ties(seed, items, length, levels):
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(17, items + 1, generator=random)
    if levels:
        scores = (scores * levels).round() / levels
    targets = torch.randint(1, items + 1, (17,), generator=random)
    seen = torch.randint(0, items + 1, (17, length), generator=random)  # repeats, padding, targets
    assert torch.equal(rank(scores, targets, seen), simple_rank(scores, targets, seen))


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 200), st.sampled_from([1, 3, 1000]), st.data())
def test_best_equals_a_stable_sort(seed, items, levels, data):
    random = torch.Generator().manual_seed(seed)
    scores = (torch.randn(5, items + 1, generator=random) * levels).round() / levels
    scores = scores * 10.0 ** data.draw(st.integers(-44, 37))  # subnormal to huge
    k = data.draw(st.integers(1, items))
    wanted = (scores[:, 1:] + 0.0).sort(dim=1, descending=True, stable=True)
    for find in (best_columns_by_keys, best_columns_on_host):
        assert torch.equal(find(scores[:, 1:], k), wanted.indices[:, :k]), find
    ids_BK, best_BK = best(scores, k)
    assert torch.equal(ids_BK, wanted.indices[:, :k] + 1)
    assert torch.equal(best_BK, wanted.values[:, :k])


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_best_leaves_scores_that_are_not_finite_to_its_caller(bad):
    scores = torch.randn(3, 8)
    scores[1, 2:] = bad
    ids_BK, best_BK = best(scores, 4)
    assert ids_BK.shape == best_BK.shape == (3, 4)
    assert torch.equal(ids_BK[[0, 2]], best(scores[[0, 2]], 4)[0])


def test_a_single_item_with_a_non_finite_score_is_refused():
    with pytest.raises(ValueError, match="of 1 users"):
        rank(torch.tensor([[0.0, math.nan]]), torch.tensor([1]))


def test_first_and_last_item_can_win_and_be_targets():
    scores = torch.tensor([[9.0, 5.0, 1.0, 2.0], [9.0, 1.0, 2.0, 5.0]])
    assert rank(scores, torch.tensor([1, 3])).tolist() == [0, 0]
    assert rank(scores, torch.tensor([2, 1])).tolist() == [2, 2]
    assert top_k(scores, 1)[0].tolist() == [[1], [3]]


def test_constant_scores_rank_in_the_middle():
    assert rank(torch.zeros(2, 12), torch.tensor([1, 11])).tolist() == [5, 5]


def test_seen_items_are_skipped_but_never_the_target():
    scores = torch.tensor([[0.0, 4.0, 3.0, 2.0, 1.0]])
    target = torch.tensor([3])
    assert rank(scores, target).item() == 2
    assert rank(scores, target, torch.tensor([[1, 0, 0]])).item() == 1
    assert rank(scores, target, torch.tensor([[1, 3, 2]])).item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_are_counted_and_refused_unless_masked(bad):
    scores = torch.zeros(2, 6)
    scores[0, 2] = scores[1, 3] = bad
    with pytest.raises(ValueError, match=r"rank: non-finite scores .* of 2 users"):
        rank(scores, torch.tensor([1, 1]))
    scores[:, 0] = bad
    assert rank(scores, torch.tensor([1, 1]), torch.tensor([[2], [3]])).tolist() == [1.5, 1.5]


def test_a_non_finite_target_is_refused_even_when_seen():
    scores = torch.tensor([[0.0, math.nan, 1.0]])
    with pytest.raises(ValueError, match="of 1 users"):
        rank(scores, torch.tensor([1]), torch.tensor([[1]]))


@pytest.mark.parametrize("target", [0, 4, -1])
def test_targets_outside_the_id_space_are_refused(target):
    with pytest.raises(ValueError, match=r"outside 1\.\.3"):
        rank(torch.zeros(1, 4), torch.tensor([target]))


def test_low_precision_scores_are_compared_in_fp32():
    scores = torch.randn(8, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(1, 9)
    ranks = rank(scores, targets)
    assert ranks.dtype == torch.float32
    assert torch.equal(ranks, rank(scores.float(), targets))
    assert (ranks % 1 == 0.5).any(), "bf16 makes ties, which must cost half places"


def test_differences_below_fp32_are_ties():
    scores = torch.tensor([[0.0, 1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert rank(scores, torch.tensor([1])).item() == rank(scores, torch.tensor([2])).item() == 0.5


def test_long_lists_of_ties_come_in_id_order():
    scores = torch.zeros(2, 5001)
    scores[:, 4000] = 1.0
    assert top_k(scores, 3000)[0].tolist() == [[4000, *range(1, 3000)]] * 2


def test_ranking_leaves_the_scores_alone():
    scores = torch.randn(3, 5)
    before = scores.clone()
    rank(scores, torch.tensor([1, 2, 3]), torch.tensor([[4], [4], [4]]))
    assert torch.equal(scores, before)


def test_top_k_refuses_what_it_cannot_order():
    with pytest.raises(ValueError, match=r"need 1\.\.3"):
        top_k(torch.zeros(1, 4), 4)
    with pytest.raises(ValueError, match="1 rows hold NaN"):
        top_k(torch.tensor([[0.0, 1.0, -math.nan, 2.0]]), 1)
    with pytest.raises(ValueError, match="fewer items"):
        top_k(torch.tensor([[5.0, 1.0, -math.inf, 2.0]]), 3)


def test_summary_by_hand():
    figures = summary(torch.tensor([0.0, 1.0, 9.5, 10.0]), (1, 10))
    assert figures["recall@1"] == 0.25 and figures["recall@10"] == 0.75
    assert figures["hit_ratio@10"] == figures["recall@10"]
    assert figures["ndcg@1"] == 0.25
    gains = 1 + 1 / math.log2(3) + 1 / math.log2(11.5)
    assert figures["ndcg@10"] == pytest.approx(gains / 4, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=50), st.integers(1, 20))
def test_summary_equals_brute_force_and_lies_in_its_intervals(ranks, k):
    figures = summary(torch.tensor(ranks, dtype=torch.float32), [k])
    hits = [r < k for r in ranks]
    gains = [1 / math.log2(r + 2) if r < k else 0 for r in ranks]
    assert figures[f"recall@{k}"] == pytest.approx(sum(hits) / len(ranks))
    assert figures[f"ndcg@{k}"] == pytest.approx(sum(gains) / len(ranks))
    assert figures[f"hit_ratio@{k}"] == figures[f"recall@{k}"]
    for name in ("recall", "hit_ratio", "ndcg"):
        low, high = figures[f"{name}@{k}_interval"]
        assert -1e-12 <= low <= figures[f"{name}@{k}"] + 1e-12
        assert figures[f"{name}@{k}"] - 1e-12 <= high <= 1 + 1e-12
        assert low < high, "a finite number of users never makes a figure certain"


def test_wilson_interval_of_ten_in_a_hundred():
    # Textbook value for 10 successes in 100 trials.
    ranks = torch.tensor([0.0] * 10 + [50.0] * 90)
    assert summary(ranks, [10])["recall@10_interval"] == pytest.approx([0.0552, 0.1744], abs=1e-4)


def test_six_thousand_users_at_a_tenth_give_0_8_points():
    ranks = torch.tensor([0.0] * 604 + [50.0] * 5436)
    for name in ("recall@10_interval", "ndcg@10_interval"):
        low, high = summary(ranks, [10])[name]
        assert (high - low) / 2 == pytest.approx(0.0076, abs=2e-4)


def test_paired_difference_by_hand():
    a, b = torch.tensor([0.0, 0.0, 50.0, 0.0]), torch.tensor([0.0, 50.0, 50.0, 50.0])
    figures = paired_difference(a, b, 10)
    assert figures["recall@10"] == figures["ndcg@10"] == 0.5
    half = 1.959964 * math.sqrt(1 / 3) / 2
    assert figures["recall@10_interval"] == pytest.approx([0.5 - half, 1.0], abs=1e-6)
    assert paired_difference(b, a, 10)["recall@10"] == -0.5


def test_pairing_is_tighter_than_two_separate_intervals():
    random = torch.Generator().manual_seed(1)
    a = torch.randint(0, 40, (500,), generator=random).float()
    b = torch.where(torch.rand(500, generator=random) < 0.02, torch.tensor(99.0), a)
    low, high = paired_difference(a, b, 10)["recall@10_interval"]
    alone_low, alone_high = summary(a, [10])["recall@10_interval"]
    assert high - low < (alone_high - alone_low) / 2


def test_no_difference_among_few_users_is_not_certainty():
    same = torch.tensor([0.0, 30.0, 3.0])
    figures = paired_difference(same, same, 10)
    assert figures["recall@10"] == 0
    low, high = figures["recall@10_interval"]
    assert low < -0.5 and high > 0.5
    many = paired_difference(same.repeat(10_000), same.repeat(10_000), 10)["recall@10_interval"]
    assert many == pytest.approx([0, 0], abs=2e-4)


@pytest.mark.parametrize("bad", [[], [math.nan], [0.0, -1.0]])
def test_ranks_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="ranks"):
        summary(torch.tensor(bad), [10])


def test_paired_difference_wants_the_same_users():
    with pytest.raises(ValueError, match="2 against 3 users"):
        paired_difference(torch.zeros(2), torch.zeros(3), 10)

"""SASRec: causality and padding, attention against its formula, dropout from bytes."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import close

from core.sasrec import CausalAttention, Dropout, SASRec
from core.settings import StudentSettings

ITEMS = 30


def model(max_length: int = 8, **given) -> SASRec:
    torch.manual_seed(0)
    plain = {"hidden_size": 16, "num_blocks": 2, "max_length": max_length}
    found = SASRec(ITEMS, StudentSettings(**plain | given)).eval()
    with torch.no_grad():  # biases and norms away from their neutral start
        for parameter in found.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        found.item_table.weight[0] = 0
    return found


def rows(count: int, length: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randint(1, ITEMS + 1, (count, length), generator=random)


# ---- shape of time ----


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("changed", range(8))
def test_a_changed_item_leaves_earlier_states(changed, heads):
    sasrec, items = model(num_heads=heads), rows(3, 8)
    before = sasrec(items)
    other = items.clone()
    other[:, changed] = other[:, changed] % ITEMS + 1
    after = sasrec(other)
    assert torch.equal(after[:, :changed], before[:, :changed])
    for position in range(changed, 8):  # and every later state does see it
        assert not torch.allclose(after[:, position], before[:, position])


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_the_state_of_a_prefix_is_that_position_of_the_whole_row(length):
    sasrec, items = model(), rows(4, 8)
    whole = sasrec(items)
    prefix = items[:, :length]
    padded = F.pad(prefix, (0, 8 - length))
    lengths = torch.full((4,), length)
    assert close(sasrec.last_state(prefix, lengths), whole[:, length - 1])
    assert close(sasrec.last_state(padded, lengths), whole[:, length - 1])


@pytest.mark.parametrize(("heads", "blocks"), [(1, 1), (2, 1), (4, 3)])
def test_the_last_state_alone_is_that_of_the_whole_forward(heads, blocks):
    sasrec, items = model(num_heads=heads, num_blocks=blocks), rows(5, 8)
    vectors, lengths = torch.randn(ITEMS + 1, 16), torch.tensor([1, 3, 8, 8, 5])
    for given in (None, vectors):
        whole = sasrec(items, given)[torch.arange(5), lengths - 1]
        assert close(sasrec.last_state(items, lengths, given), whole)


def test_rows_of_different_length_in_one_batch_equal_one_by_one():
    sasrec = model()
    lengths = torch.tensor([1, 2, 8, 5])
    items = rows(4, 8) * (torch.arange(8) < lengths[:, None])
    together = sasrec.last_state(items, lengths)
    for row, length in enumerate(lengths):
        alone = sasrec.last_state(items[row : row + 1, :length], length[None])
        assert close(together[row : row + 1], alone)


def test_an_all_padding_row_is_finite_and_touches_no_other():
    sasrec, items = model(), rows(2, 8)
    states = sasrec(torch.cat([items, torch.zeros_like(items)]))
    assert states.isfinite().all()
    assert close(states[:2], sasrec(items))


def test_a_row_longer_than_the_window_is_refused():
    with pytest.raises(ValueError, match="rows of 9 items; at most max_length = 8"):
        model()(rows(1, 9))


def test_attention_weights_are_scaled_by_the_head_width():
    sasrec = model(num_heads=2)
    block, x = sasrec.blocks[0], torch.randn(2, 5, 16)
    query, key, value = block.in_proj(x).split(16, -1)
    mixed = []
    for head in (slice(0, 8), slice(8, 16)):
        scores = query[..., head] @ key[..., head].transpose(1, 2) / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
        mixed.append(scores.softmax(-1) @ value[..., head])
    assert close(block.attention(x), block.out_proj(torch.cat(mixed, -1)))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 2), (5, 7), (4, 12), (9, 33)])
def test_causal_attention_is_the_plain_one_with_its_gradient(batch, length):
    torch.manual_seed(0)
    qkv = torch.randn(batch, length, 24, requires_grad=True)
    wanted = F.scaled_dot_product_attention(*qkv.split(8, -1), is_causal=True)
    found = CausalAttention.apply(qkv, 0)
    weights = torch.randn_like(found)
    assert close(found, wanted)
    assert close(
        torch.autograd.grad(found, qkv, weights)[0], torch.autograd.grad(wanted, qkv, weights)[0]
    )


def test_causal_attention_with_dropout_has_the_gradient_of_its_value():
    qkv = torch.randn(5, 6, 9, dtype=torch.float64, requires_grad=True)

    def same_mask(qkv):
        torch.manual_seed(3)
        return CausalAttention.apply(qkv, 100)

    assert not torch.equal(same_mask(qkv), CausalAttention.apply(qkv, 0))
    assert torch.autograd.gradcheck(same_mask, (qkv,))


def test_causal_attention_drops_its_rate_and_keeps_the_mean():
    torch.manual_seed(0)
    qkv = torch.zeros(200, 32, 3)
    qkv[..., 2] = 1  # all weights equal and all values 1: without dropout each state is 1
    mixed = CausalAttention.apply(qkv, 64)
    first = mixed[:, 0]  # one key: kept or dropped
    assert torch.allclose(first[first != 0], torch.tensor(256 / 192))
    assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=0.13)
    assert mixed[:, 1:].mean().item() == pytest.approx(1.0, abs=0.02)


def test_padding_stays_zero_in_the_table_and_gets_no_gradient():
    assert not SASRec(ITEMS, StudentSettings()).item_table.weight[0].any()
    sasrec = model().train()
    items = rows(3, 8)
    items[:, 5:] = 0
    sasrec(items).sum().backward()
    assert not sasrec.item_table.weight[0].any()
    assert not sasrec.item_table.weight.grad[0].any()
    assert sasrec.item_table.weight.grad[items[0, 0]].any()


def test_given_item_vectors_replace_the_input_table():
    sasrec, items = model(), rows(2, 4)
    assert torch.equal(sasrec(items, sasrec.item_vectors()), sasrec(items))
    assert not torch.allclose(sasrec(items, 2 * sasrec.item_vectors()), sasrec(items))


# ---- dropout ----


@pytest.mark.parametrize("shape", [(400, 501), (3,), (1000, 7, 31)])
def test_dropout_drops_its_rate_and_keeps_the_mean(shape):
    torch.manual_seed(0)
    dropout = Dropout(0.25).train()
    x = torch.ones(shape)
    found = dropout(x)
    assert found.shape == x.shape
    assert torch.allclose(found[found != 0], torch.tensor(1 / 0.75))
    error = 4 * math.sqrt(0.25 * 0.75 / x.numel())
    assert (found == 0).float().mean().item() == pytest.approx(0.25, abs=error)
    assert found.mean().item() == pytest.approx(1.0, abs=error / 0.75)


def test_dropout_masks_differ_between_calls_and_repeat_with_the_seed():
    dropout, x = Dropout(0.5).train(), torch.ones(999)
    torch.manual_seed(0)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)
    # Neighbours come from the bytes of one draw and must not go together.
    both = ((first[:-1] == 0) & (first[1:] == 0)).float().mean().item()
    assert both == pytest.approx(0.25, abs=0.06)


def test_dropout_gradient_passes_where_the_value_did():
    torch.manual_seed(0)
    x = torch.randn(64, 64, requires_grad=True)
    found = Dropout(0.5).train()(x)
    found.sum().backward()
    assert torch.equal(x.grad != 0, found != 0)


def test_dropout_is_the_identity_when_it_has_nothing_to_do():
    x = torch.randn(5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x


def test_training_mode_is_random_and_evaluation_is_not():
    sasrec, items = model(dropout=0.5), rows(2, 8)
    assert torch.equal(sasrec(items), sasrec(items))
    sasrec.train()
    assert not torch.equal(sasrec(items), sasrec(items))

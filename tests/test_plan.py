"""Modes and batching: what may share a row or a prompt must answer as if it were alone."""

from typing import get_args

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from perf.counters import Operators
from tiny import FAMILIES, close, pieces, queries

from core import data, llm, plan, prompts, teacher
from core.observe import Observer
from core.plan import GatedPrompts, Plan
from core.prompts import Prompts, gate_queries, prompts_of
from core.settings import Batching, DataSettings, Mode, Settings
from core.states import encoder_states

MODES, BATCHINGS = get_args(Mode), get_args(Batching)
HISTORY = 5


def settings(mode: Mode = "instance", batching: Batching = "grouped", **given) -> Settings:
    found = tiny.settings(mode=mode, max_history=HISTORY, **given)
    return found.model_copy(update={"data": DataSettings(batching=batching)})


def answers(model, batches: GatedPrompts) -> dict[int, torch.Tensor]:
    """Query row -> its read-out state."""
    found = {}
    for batch in (batches[i] for i in range(len(batches))):
        states = model.read_out(batch)
        assert len(states) == len(batch["rows"])
        found |= dict(zip(batch["rows"].tolist(), states, strict=True))
    return found


def one_by_one(model, asked: Prompts) -> dict[int, torch.Tensor]:
    """Every answer from a forward of its own: the same window, ended where the answer is asked."""
    found = {}
    everything = encoder_states(model.encoder, gate_queries(asked))
    for prompt in range(len(asked)):
        for row in asked.samples(np.array([prompt])):
            alone = Prompts(
                asked.queries,
                asked.mode,
                asked.firsts[[prompt]],
                asked.queries.ends[[row]],
                np.array([row]),
                np.array([0, 1]),
            )
            # The states in the order of this prompt's own gates.
            states = everything
            if asked.mode == "causal":
                all_ends = gate_queries(asked).ends
                states = everything[np.searchsorted(all_ends, gate_queries(alone).ends)]
            found |= answers(model, GatedPrompts(states, pieces(), alone, 1))
    return found


@pytest.mark.parametrize(("family", "attn"), [*((f, "sdpa") for f in FAMILIES), ("tiny", "eager")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batching", BATCHINGS)
@torch.no_grad()
def test_answers_of_a_batch_equal_answers_alone(family, attn, mode, batching):
    """Neither neighbours in a row, nor later items, nor other copies of the cue are seen."""
    chosen = settings(mode, batching, llm_model_name=family, attn=attn)
    model = tiny.teacher(chosen)
    together = answers(model, tiny.batches(model, chosen, 16, seed=0))
    asked = prompts_of(queries(), HISTORY, mode)
    alone = one_by_one(model, asked.take(np.arange(0, len(asked), 3)))
    assert sorted(together) == list(range(len(queries()))) and len(alone) > 60
    for row, state in alone.items():
        assert close(together[row], state, 1e-4), row


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("mode", "batching"), [("instance", "packed"), ("tail", "grouped")])
def test_without_the_mask_they_would_be_seen(monkeypatch, family, mode, batching):
    """The check above can fail: with plain causal rows the answers are others."""
    chosen = settings(mode, batching, llm_model_name=family)
    model = tiny.teacher(chosen)
    right = answers(model, tiny.batches(model, chosen, 16))

    def causal_only(layout):
        length = layout.shape[-1]
        return (
            torch.ones(length, length, dtype=torch.bool).tril().expand(layout.shape[1], 1, -1, -1)
        )

    monkeypatch.setattr(teacher, "visible", causal_only)
    wrong = answers(model, tiny.batches(model, chosen, 16))
    assert sum(not close(wrong[row], right[row], 1e-2) for row in right) > len(right) / 2


@torch.no_grad()
def test_the_modes_are_three_models():
    found = {}
    for mode in MODES:
        model = tiny.teacher(settings(mode))
        found[mode] = answers(model, tiny.batches(model, settings(mode), 16))
    row = int(queries().lengths.argmax())
    for one, other in [("instance", "causal"), ("instance", "tail"), ("causal", "tail")]:
        assert not close(found[one][row], found[other][row], 0.05)


@pytest.mark.parametrize("mode", MODES)
def test_packing_changes_no_gradient(mode):
    """Of one batch, whatever row its prompts lie in."""
    found = {}
    for batching in ("grouped", "packed"):
        chosen = settings(mode, batching)
        model = tiny.teacher(chosen).train()
        batches = tiny.batches(model, chosen, 12, seed=1)
        if batching == "packed":
            rows = batches.plan.batches[0]
            assert batches[0]["ids"].shape[0] < len(rows)
        else:
            batches.plan = Plan([rows_of_packed()[mode]])
            rows = batches.plan.batches[0]
        batch = batches[0]
        assert batch["prompts"] == 12
        teacher.training_loss(model, batch, chosen, 0.1, Observer()).backward()
        found[batching] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in found["grouped"].items():
        assert gradient.any(), name
        assert close(found["packed"][name], gradient, 1e-4), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("candidates", [20, 2048])
def test_a_step_asks_the_device_nothing(mode, batching, candidates):
    """Whatever is read back ends the overlap of host and device; so would operators whose result
    has a size that only the device knows.
    """
    chosen = settings(mode, batching, train_candidates=candidates, distill_lambda=0.1)
    model = tiny.teacher(chosen).train()
    batch = tiny.batches(model, chosen, 12, seed=1)[0]
    with Operators() as operators:
        teacher.training_loss(model, batch, chosen, 0.1, Observer()).backward()
    asking = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim"}
    assert operators.names.total() > 200
    assert not asking & set(operators.names)


def rows_of_packed() -> dict[str, np.ndarray]:
    """The prompts of the first packed batch in every mode."""
    return {
        mode: plan.plan(
            prompts_of(queries(), HISTORY, mode).lengths(pieces()), "packed", 12, seed=1
        ).batches[0]
        for mode in MODES
    }


# ---- prompts that answer many ----


@limits(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.integers(1, 9),
    st.sampled_from(MODES),
    st.integers(0, 2**32 - 1),
)
def test_every_query_is_answered_once_from_what_lies_before_it(lengths, most, mode, seed):
    asked = training_queries(lengths, seed)
    found = prompts_of(asked, most, mode)
    assert sorted(found.rows) == list(range(len(asked)))
    for prompt in range(len(found)):
        first, last = found.firsts[prompt], found.lasts[prompt]
        assert 0 < last - first <= most
        for row in found.samples(np.array([prompt])):
            start, end = asked.starts[row], asked.ends[row]
            assert start <= first < end <= last, "a window of the user's own, its end inside"
            # All of a history that fits, otherwise half a window at least.
            assert end - first >= (1 if mode != "instance" else min(most, end - start))
            assert end - first >= min(end - start, max(most // 2, 1))
    if mode == "instance":
        assert len(found) == len(asked)
    elif most > 1:
        windows = sum(1 + max(0, -(-(n - most) // (most - most // 2))) for n in lengths)
        assert len(found) <= windows


def training_queries(lengths: list[int], seed: int) -> prompts.Queries:
    """Users with so many samples each, in any order."""
    sizes = np.array(lengths) + 1  # one item before the first sample
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    users = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.concatenate([np.arange(1, n + 1) for n in lengths])
    order = np.random.default_rng(seed).permutation(len(users))
    users, positions = users[order], positions[order]
    starts = offsets[users]
    items = np.ones(offsets[-1] + 1, dtype=np.int32)
    return prompts.Queries(items, starts, starts + positions, users)


@pytest.mark.parametrize("mode", MODES)
def test_lengths_foretell_the_prompts(mode):
    asked = prompts_of(queries(), HISTORY, mode)
    for prompt in range(0, len(asked), 7):
        batch = prompts.assemble(pieces(), asked, np.array([prompt]))
        assert batch["tokens"] == asked.lengths(pieces())[prompt]


# ---- plans ----


@limits(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=200),
    st.sampled_from(BATCHINGS),
    st.integers(1, 40),
    st.sampled_from([None, 0, 7]),
)
def test_every_prompt_once_and_in_a_place_of_its_own(lengths, batching, size, seed):
    lengths = np.array(lengths)
    found = plan.plan(lengths, batching, size, seed)
    assert sorted(np.concatenate(found.batches)) == list(range(len(lengths)))
    sizes = list(map(len, found.batches))
    assert sorted(sizes, reverse=True)[:-1] == [size] * (len(sizes) - 1)
    shapes = set()
    for index, batch in enumerate(found.batches):
        grid = found.grid(index, lengths)
        shapes.add((grid.rows, grid.width))
        taken = np.zeros(grid.rows * grid.width, dtype=int)
        for place, length in zip(grid.places, lengths[batch], strict=True):
            taken[place : place + length] += 1
            assert place // grid.width == (place + length - 1) // grid.width, "in one row"
        assert taken.max() == 1 and taken.sum() == lengths[batch].sum()
    if batching == "packed":
        assert len(shapes) == 1


def test_packed_rows_have_one_shape_and_answer_their_own():
    chosen = settings("instance", "packed")
    model = tiny.teacher(chosen)
    batches = tiny.batches(model, chosen, 12, seed=0)
    shapes = {tuple(batches[i]["ids"].shape) for i in range(len(batches))}
    assert len(shapes) == 1 and len(batches) > 5


WASTE = {"padded": (0.1, 0.9), "grouped": (0.0, 0.05), "packed": (0.0, 0.05)}


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("shape", ["dense", "sparse"])
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("seed", [0, None])
def test_little_is_padding(batching, shape, size, seed):
    """Dense histories near the window, sparse ones with a long tail; 12 prompts in a last batch."""
    random = np.random.default_rng(0)
    spread = {"dense": random.normal(330, 60, 20_012), "sparse": random.lognormal(4.1, 0.6, 20_012)}
    least, most = WASTE[batching]
    lengths = spread[shape].clip(20, 400).astype(np.int64)
    assert least <= waste(lengths, batching, size, seed) <= most


@pytest.mark.parametrize("batching", ["grouped", "packed"])
@pytest.mark.parametrize("mode", MODES)
def test_of_the_embedded_catalogue_a_twentieth_at_most_is_padding(batching, mode):
    given = Settings()
    found = data.prepare(given.data)
    texts = [*found.titles, prompts.INSTRUCTION, prompts.CUE]
    tokenizer = llm.load_tokenizer(given.teacher.llm_model_name, texts)
    catalogue = prompts.tokenise(tokenizer, found.titles, given.teacher.max_title_tokens)
    users, positions = data.train_samples(found)
    starts = found.offsets[users]
    asked = prompts.Queries(found.items, starts, starts + positions, users)
    lengths = prompts_of(asked, given.teacher.max_history, mode).lengths(catalogue)
    assert waste(lengths, batching, given.train.batch_size) <= 0.05


def waste(lengths: np.ndarray, batching: Batching, size: int, seed: int | None = 0) -> float:
    """Share of the cells of an epoch's batches that holds no token."""
    found = plan.plan(lengths, batching, size, seed)
    grids = [found.grid(i, lengths) for i in range(len(found))]
    return 1 - lengths.sum() / sum(grid.rows * grid.width for grid in grids)

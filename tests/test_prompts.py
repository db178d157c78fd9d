"""Prompts: pieces tokenised apart, newest items and cue kept, a slot for each, batch orders."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from tiny import pieces, prepared, queries

from core import llm, prompts
from core import plan as plans
from core.prompts import CUE, INSTRUCTION, Pieces, prompts_of
from core.ranking import Queries

BEGIN = 1
"""Beginning-of-text token of the tokenizer a preset trains."""
NASTY = ["", "A, B; C", f"x{CUE}", f"{INSTRUCTION} y", "</s><pad></s>", "", "z" * 300, "Ω 東京"]


def catalogue(titles: list[str], most: int = 16):
    tokenizer = llm.load_tokenizer("tiny", [*titles, INSTRUCTION, CUE])
    return tokenizer, prompts.tokenise(tokenizer, titles, most)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def asked(histories: list[list[int]]) -> Queries:
    """One query for each history; the target is item 1."""
    items = np.array([i for history in histories for i in [*history, 1]], dtype=np.int32)
    ends = np.cumsum([len(history) + 1 for history in histories]) - 1
    starts = ends - [len(history) for history in histories]
    return Queries(items, starts, ends, np.arange(len(histories)))


def assemble(found: Pieces, histories: Queries, max_history: int, rows: np.ndarray) -> dict:
    """A batch of prompts for samples of their own."""
    return prompts.assemble(found, prompts_of(histories, max_history, "instance"), rows)


def prompt_lengths(rows: np.ndarray) -> np.ndarray:
    return prompts_of(queries(), 4, "instance").lengths(pieces())[rows]


def by_hand(tokenizer, titles, history, max_history, max_title_tokens) -> tuple[list[int], list]:
    """A prompt and its slot positions, put together piece by piece."""
    ids, slots = [BEGIN, *encode(tokenizer, INSTRUCTION)], []
    for item in history[-max_history:]:
        ids += encode(tokenizer, " " + titles[item])[:max_title_tokens]
        slots.append(len(ids))
        ids.append(tokenizer.eos_token_id)
    return ids + encode(tokenizer, CUE), slots


@limits(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=9), min_size=1, max_size=5),
    st.integers(1, 9),
    st.sampled_from([1, 3, 16]),
)
def test_prompts_equal_those_put_together_by_hand(histories, max_history, max_title_tokens):
    tokenizer, found = catalogue(NASTY, max_title_tokens)
    batch = assemble(found, asked(histories), max_history, np.arange(len(histories)))
    width = batch["ids"].shape[1]
    slot = 0
    for row, history in enumerate(histories):
        ids, slots = by_hand(tokenizer, NASTY, history, max_history, max_title_tokens)
        padding = [0] * (width - len(ids))
        assert batch["ids"][row].tolist() == ids + padding
        assert batch["readout"][row] == row * width + len(ids) - 1
        kept = history[-max_history:]
        here = slice(slot, slot + len(kept))
        # As many slots as kept items, whatever the titles look like; oldest first.
        assert (batch["slot_positions"][here] - row * width).tolist() == slots
        assert batch["slot_items"][here].tolist() == kept
        slot += len(kept)
    assert slot == len(batch["slot_items"]) == len(batch["slot_positions"])
    assert width == batch["lengths"].max()


def test_truncation_drops_the_oldest_and_keeps_instruction_and_cue():
    tokenizer, found = catalogue(["", *(f"Film {c}" for c in "ABCDEFGH")])
    batch = assemble(found, asked([list(range(1, 9))]), 3, np.array([0]))
    text = tokenizer.decode(batch["ids"][0])
    assert "Film F" in text and "Film G" in text and "Film H" in text
    assert "Film E" not in text
    assert batch["slot_items"].tolist() == [6, 7, 8]
    assert text.endswith(CUE)
    assert INSTRUCTION in text


def test_the_read_out_is_the_last_token_of_the_cue():
    tokenizer, found = catalogue(["", "One", "Another much longer title of a film"])
    batch = assemble(found, asked([[1], [2, 2, 2]]), 5, np.arange(2))
    flat = batch["ids"].flatten()
    assert flat[batch["readout"]].tolist() == [encode(tokenizer, CUE)[-1]] * 2


def test_a_long_title_keeps_its_first_tokens():
    tokenizer, found = catalogue(["", "Alpha Beta Gamma Delta Epsilon Zeta"], 2)
    assert found.lengths[1] == 3  # two tokens and the slot
    assert found.tokens[:2].tolist() == encode(tokenizer, " Alpha Beta Gamma Delta")[:2]


def test_prompt_lengths_foretell_the_prompts():
    rows = np.arange(len(queries()))
    batch = assemble(pieces(), queries(), 4, rows)
    width = batch["ids"].shape[1]
    ends = batch["readout"] - torch.arange(len(rows)) * width
    assert prompt_lengths(rows).tolist() == (ends + 1).tolist()


def test_a_padding_id_inside_a_history_is_an_error():
    """It would leave a row with fewer item slots than items, and every later slot misplaced."""
    with pytest.raises(AssertionError, match="2 item slots for 3 kept items"):
        assemble(pieces(), asked([[3, 0, 5]]), 4, np.array([0]))


def test_counts_and_targets_describe_the_rows():
    rows = np.array([5, 0, 17])
    batch = assemble(pieces(), queries(), 4, rows)
    assert batch["rows"].tolist() == rows.tolist()
    assert batch["targets"].tolist() == queries().targets[rows].tolist()
    assert batch["samples"] == 3
    assert batch["tokens"] == prompt_lengths(rows).sum()
    assert batch["lengths"].tolist() == prompt_lengths(rows).tolist()
    assert batch["padded_tokens"] == batch["ids"].numel()


# ---- batch orders ----


def plan(seed: int | None, batch_size: int = 8) -> list[np.ndarray]:
    return list(plans.plan(prompt_lengths(slice(None)), "grouped", batch_size, seed).batches)


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 10_000])
def test_every_sample_once(seed, batch_size):
    rows = plan(seed, batch_size)
    assert sorted(np.concatenate(rows)) == list(range(len(queries())))
    assert max(map(len, rows)) <= batch_size


def test_the_seed_decides_the_training_order_and_evaluation_has_one():
    same, again, other = (np.concatenate(plan(seed)) for seed in (0, 0, 1))
    assert (same == again).all()
    assert (same != other).any()
    one, two = ({tuple(sorted(rows)) for rows in plan(seed)} for seed in (0, 1))
    assert len(one & two) < len(one) / 2  # which samples meet in a batch is drawn too
    lengths = prompt_lengths(np.concatenate(plan(None)))
    assert (np.diff(lengths) <= 0).all()  # longest first: memory is at its peak at once


def test_training_batches_are_grouped_by_length_but_in_random_order():
    batches = [prompt_lengths(rows) for rows in plan(0)]
    padded = sum(len(each) * each.max() for each in batches)
    assert 1 - sum(each.sum() for each in batches) / padded < 0.05
    longest = [each.max() for each in batches]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_the_catalogue_is_that_of_the_split():
    assert len(pieces().lengths) == prepared().num_items + 1
    assert pieces().lengths[0] == 0
    assert pieces().lengths.sum() == len(pieces().tokens)

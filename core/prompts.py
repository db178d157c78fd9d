"""Title tokens once per item, then batches of prompts assembled by index: ids, item slots, read-
out, lengths.

Shapes: R prompts of a batch, T tokens of the longest prompt, S item slots of a batch, V items.

A prompt is: instruction, then for each history item its title tokens and one item slot, then the
cue; the state of the cue's last token is read out. Pieces are tokenised apart, so a title may
contain any text. Rows are left-aligned: with a causal backbone a real token never sees the padding
to its right, so no padding mask is needed and a row's result does not depend on its neighbours.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from core.ranking import Queries

INSTRUCTION = "Films this person watched, oldest first:"
CUE = " The film watched next:"
CHUNK_BATCHES = 16
"""Batches that are sorted by length together when training."""


@dataclass(frozen=True)
class Pieces:
    """The tokenised catalogue: everything a prompt is made of."""

    tokens: np.ndarray
    """All item pieces one after the other, int32: title tokens, then one slot token for each item.
    """
    starts: np.ndarray
    """(V+1,) first token of each item's piece."""
    lengths: np.ndarray
    """(V+1,) tokens of each piece, slot included; 0 for padding."""
    instruction: np.ndarray
    cue: np.ndarray

    @property
    def fixed(self) -> int:
        """Tokens of every prompt that are not history."""
        return len(self.instruction) + len(self.cue)


def tokenise(tokenizer, titles: list[str], max_title_tokens: int) -> Pieces:
    """Tokenise the catalogue once. A longer title keeps its first `max_title_tokens`."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    # The slot's embedding is overwritten; any valid id serves.
    slot = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    pieces = [[*encode(" " + title)[:max_title_tokens], slot] for title in titles[1:]]
    lengths = np.array([0, *map(len, pieces)], dtype=np.int64)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return Pieces(
        tokens=np.array([token for piece in pieces for token in piece], dtype=np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)[:-1]]),
        lengths=lengths,
        instruction=np.array([*begin, *encode(INSTRUCTION)], dtype=np.int32),
        cue=np.array(encode(CUE), dtype=np.int32),
    )


def prompt_lengths(
    pieces: Pieces, queries: Queries, max_history: int, rows: np.ndarray
) -> np.ndarray:
    """Tokens of the prompts of some queries, (R,)."""
    items, _ = queries.newest(rows, max_history)
    return pieces.lengths[items].sum(1) + pieces.fixed


def longest(pieces: Pieces, queries: Queries, max_history: int, most: int) -> Queries:
    """The `most` queries with the longest prompts: what a short trial should need memory for."""
    lengths = prompt_lengths(pieces, queries, max_history, np.arange(len(queries)))
    return queries.take(np.argsort(-lengths, kind="stable")[:most])


def assemble(pieces: Pieces, queries: Queries, max_history: int, rows: np.ndarray) -> dict:
    """One batch of prompts for the given query rows.

    Returns ids (R, T) int64; slot_positions (S,) flat indices into R·T and slot_items (S,) the
    items shown there; readout (R,) flat indices; lengths (R,); rows (R,) the query rows; and the
    counts samples, tokens, padded_tokens. The oldest items beyond `max_history` are dropped;
    instruction and cue always stay.
    """
    items, kept = queries.newest(rows, max_history)
    shown = items[items > 0]  # row by row, oldest first
    piece_lengths = pieces.lengths[shown]
    history = pieces.lengths[items].sum(1)
    lengths = history + pieces.fixed
    width = int(lengths.max())
    ids = np.zeros((len(rows), width), dtype=np.int64)
    before, after = len(pieces.instruction), len(pieces.cue)
    ids[:, :before] = pieces.instruction
    row_starts = np.arange(len(rows)) * width
    # Flat target index of every history token: pieces of a row follow each other without gaps.
    first = np.repeat(row_starts + before, history) + _ramp(history)
    source = np.repeat(pieces.starts[shown], piece_lengths) + _ramp(piece_lengths)
    flat = ids.reshape(-1)
    flat[first] = pieces.tokens[source]
    flat[(row_starts + before + history)[:, None] + np.arange(after)] = pieces.cue
    slot_positions = first[np.cumsum(piece_lengths) - 1]
    if len(slot_positions) != kept.sum():
        raise AssertionError(f"{len(slot_positions)} item slots for {kept.sum()} kept items")
    return {
        "ids": torch.from_numpy(ids),
        "slot_positions": torch.from_numpy(slot_positions),
        "slot_items": torch.from_numpy(shown),
        "readout": torch.from_numpy(row_starts + lengths - 1),
        "lengths": torch.from_numpy(lengths),
        "rows": torch.from_numpy(rows),
        "targets": torch.from_numpy(queries.targets[rows]),
        "samples": len(rows),
        "tokens": int(lengths.sum()),
        "padded_tokens": int(ids.size),
    }


def _ramp(lengths: np.ndarray) -> np.ndarray:
    """0, 1, …, n−1 for each n, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


class PromptBatches(Dataset):
    """Batches of prompts: training order (random, length-grouped in chunks) or evaluation order (by
    length).
    """

    def __init__(
        self,
        pieces: Pieces,
        queries: Queries,
        max_history: int,
        batch_size: int,
        seed: int | None = None,
    ):
        self.pieces, self.queries, self.max_history = pieces, queries, max_history
        rows = np.arange(len(queries))
        lengths = prompt_lengths(pieces, queries, max_history, rows)
        if seed is None:
            self.plan = _batches(rows[np.argsort(-lengths, kind="stable")], batch_size)
            return
        random = np.random.default_rng(seed)
        plan = []
        for chunk in _batches(random.permutation(rows), batch_size * CHUNK_BATCHES):
            plan += _batches(chunk[np.argsort(lengths[chunk], kind="stable")], batch_size)
        self.plan = [plan[i] for i in random.permutation(len(plan))]

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict:
        return assemble(self.pieces, self.queries, self.max_history, self.plan[index])


def _batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]

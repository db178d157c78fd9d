"""Title tokens once per item, the prompts a mode asks for, and a batch of them assembled by index.

Shapes: R rows of a batch, L tokens of a row, P prompts, S samples (answers) of a batch, G gates of
a batch, I items shown, V items.

A prompt is: instruction, then for each item of a window of one user's history its title tokens and
one item slot; then what its mode adds. It answers one sample or several:

    instance  the cue; its last token is read out. One gate for the whole prompt, one sample.
    causal    nothing: the slot of an item is read out, once for every sample whose history ends
              there. The tokens of an item have the gate of the history up to it.
    tail      a copy of the cue for every sample, which sees the history up to its sample's end and
              has its sample's gate; the history has none.

Pieces are tokenised apart, so a title may contain any text. Rows are left-aligned: with a causal
backbone a real token never sees the padding to its right, so a row that holds one prompt without
copies needs no mask. Other rows need one, see `visible`.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from core.ranking import Queries
from core.settings import Mode

INSTRUCTION = "Films this person watched, oldest first:"
CUE = " The film watched next:"


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

    @cached_property
    def text(self) -> np.ndarray:
        """Item pieces, instruction and cue one after the other."""
        return np.concatenate([self.tokens, self.instruction, self.cue])


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


@dataclass(frozen=True)
class Prompts:
    """Which items each prompt shows and which queries it answers; every query is answered once."""

    queries: Queries
    mode: Mode
    firsts: np.ndarray
    """(P,) the first item shown, as an index into `queries.items`."""
    lasts: np.ndarray
    """(P,) one behind the last item shown."""
    rows: np.ndarray
    """Query rows, prompt by prompt, those of a prompt by rising length of history."""
    bounds: np.ndarray
    """(P+1,) prompt p answers rows[bounds[p]:bounds[p+1]]."""

    def __len__(self) -> int:
        return len(self.firsts)

    def samples(self, chosen: np.ndarray) -> np.ndarray:
        """Query rows that some prompts answer, prompt by prompt."""
        counts = self.bounds[chosen + 1] - self.bounds[chosen]
        return self.rows[np.repeat(self.bounds[chosen], counts) + _ramp(counts)]

    def take(self, chosen: np.ndarray) -> "Prompts":
        """Some of the prompts, in the order given, with all that they answer."""
        counts = self.bounds[chosen + 1] - self.bounds[chosen]
        bounds = np.concatenate([[0], np.cumsum(counts)])
        firsts, lasts, rows = self.firsts[chosen], self.lasts[chosen], self.samples(chosen)
        return Prompts(self.queries, self.mode, firsts, lasts, rows, bounds)

    def that_answer(self, rows: np.ndarray) -> "Prompts":
        """The prompts that answer any of some query rows."""
        answers = np.add.reduceat(np.isin(self.rows, rows), self.bounds[:-1], dtype=np.int64)
        return self.take(np.flatnonzero(answers))

    def lengths(self, pieces: Pieces) -> np.ndarray:
        """(P,) tokens of each prompt, copies of the cue included."""
        # Running sums over all items, so that no prompt is looked at one by one.
        total = np.concatenate([[0], np.cumsum(pieces.lengths[self.queries.items])])
        cues = {"instance": 1, "causal": 0, "tail": np.diff(self.bounds)}[self.mode]
        history = total[self.lasts] - total[self.firsts]
        return history + len(pieces.instruction) + cues * len(pieces.cue)


def prompts_of(queries: Queries, max_history: int, mode: Mode) -> Prompts:
    """The prompts that answer some queries, at most `max_history` items shown in each.

    `instance`: one for each query, with the newest items. In the other modes one prompt answers
    many queries of a user. A history longer than the window is covered by several that overlap by
    half, so an answer beyond the first rests on at least max_history // 2 items.
    """
    if mode == "instance":
        firsts = np.maximum(queries.starts, queries.ends - max_history)
        everyone = np.arange(len(queries))
        return Prompts(queries, mode, firsts, queries.ends, everyone, np.arange(len(queries) + 1))
    stride = max_history - max_history // 2
    window = np.maximum(0, -(-(queries.lengths - max_history) // stride))
    rows = np.lexsort((queries.ends, window, queries.starts))
    begins = np.ones(len(rows), dtype=bool)
    begins[1:] = (np.diff(queries.starts[rows]) != 0) | (np.diff(window[rows]) != 0)
    bounds = np.append(np.flatnonzero(begins), len(rows))
    lasts = queries.ends[rows][bounds[1:] - 1]
    firsts = np.maximum(queries.starts[rows][bounds[:-1]], lasts - max_history)
    return Prompts(queries, mode, firsts, lasts, rows, bounds)


def gate_queries(prompts: Prompts) -> Queries:
    """The histories whose SASRec states drive the gates, (G of the whole split).

    `causal` asks for the history up to every item shown, sorted by its end; the others for that of
    each query, in its row.
    """
    if prompts.mode != "causal":
        return prompts.queries
    queries, counts = prompts.queries, prompts.lasts - prompts.firsts
    ends = np.repeat(prompts.firsts, counts) + _ramp(counts) + 1
    owner = prompts.rows[np.repeat(prompts.bounds[:-1], counts)]
    ends, chosen = np.unique(ends, return_index=True)
    owner = owner[chosen]
    return Queries(queries.items, queries.starts[owner], ends, queries.users[owner])


def longest(pieces: Pieces, queries: Queries, max_history: int, mode: Mode, most: int) -> Queries:
    """The queries of the longest prompts, `most` prompts: what a short trial should need memory
    for.
    """
    prompts = prompts_of(queries, max_history, mode)
    chosen = np.argsort(-prompts.lengths(pieces), kind="stable")[:most]
    return queries.take(prompts.samples(chosen))


@dataclass(frozen=True)
class Grid:
    """Where the prompts of a batch lie."""

    rows: int
    width: int
    places: np.ndarray
    """(P,) flat index, into rows · width, of each prompt's first token."""
    shared: bool = False
    """Whether a row may hold several prompts, which then must not see each other."""


def one_a_row(lengths: np.ndarray) -> Grid:
    """A row for each prompt, as wide as the longest."""
    width = int(lengths.max())
    return Grid(len(lengths), width, np.arange(len(lengths)) * width)


def assemble(
    pieces: Pieces, prompts: Prompts, chosen: np.ndarray, grid: Grid | None = None
) -> dict:
    """One batch of some prompts, by default one a row.

    ids (R, L) int64; slot_positions (I,) flat indices into R·L and slot_items (I,) the items shown
    there; readout (S,) flat indices; gate_rows (R·L,) each token's row among the batch's gates, G =
    none; gate_ends (G,) where the histories behind these gates end; rows (S,) the query rows and
    their targets (S,); layout (4, R, L) for `visible`, or None where no mask is needed; lengths
    (P,), an array: tokens of a prompt as they are seen, copies of the cue side by side; and the
    counts prompts, samples, tokens, own_tokens (the same, where others do a part of the batch) and
    padded_tokens.

    Raises AssertionError when an item shown is padding.
    """
    mode, queries = prompts.mode, prompts.queries
    firsts, shown = prompts.firsts[chosen], prompts.lasts[chosen] - prompts.firsts[chosen]
    rows = prompts.samples(chosen)
    answers = prompts.bounds[chosen + 1] - prompts.bounds[chosen]
    cues = {"instance": np.ones_like(answers), "causal": 0 * answers, "tail": answers}[mode]

    # A prompt is a run of chunks: instruction, items, cues. All that follows is by chunk.
    counts = 1 + shown + cues
    prompt, rank = np.repeat(np.arange(len(chosen)), counts), _ramp(counts)
    is_item = (rank > 0) & (rank <= shown[prompt])
    is_cue = rank > shown[prompt]
    ends = firsts[prompt] + rank  # of an item chunk: one behind its item
    items = queries.items[ends[is_item] - 1].astype(np.int64)
    if not items.all():
        raise AssertionError(f"{int((items > 0).sum())} item slots for {len(items)} kept items")
    begin, after = len(pieces.instruction), len(pieces.cue)
    source = np.where(is_cue, len(pieces.tokens) + begin, len(pieces.tokens))
    source[is_item] = pieces.starts[items]
    length = np.where(is_cue, after, begin)
    length[is_item] = pieces.lengths[items]
    head = np.cumsum(counts) - counts  # the first chunk of each prompt
    behind = np.cumsum(length)
    offset = behind - length
    offset -= offset[head][prompt]
    own = behind[head + counts - 1] - behind[head] + begin
    answering = np.repeat(np.arange(len(chosen)), answers)
    last_item = head[answering] + queries.ends[rows] - firsts[answering]  # chunk, by sample
    grid = grid or one_a_row(own)
    size = grid.rows * grid.width

    # By token: chunks of a prompt follow each other without gaps.
    step = _ramp(length)
    flat = np.repeat(grid.places[prompt] + offset, length) + step
    ids = np.zeros(size, dtype=np.int64)
    ids[flat] = pieces.text[np.repeat(source, length) + step]
    chunk_end = grid.places[prompt] + offset + length - 1
    readout = chunk_end[last_item] if mode == "causal" else chunk_end[is_cue]

    if mode == "instance":
        gate_ends, gate = queries.ends[rows], prompt
    elif mode == "causal":
        gate_ends, gate = ends[is_item], np.cumsum(is_item) - 1
        gate[head] = gate[head + 1]  # the instruction goes with the first item
    else:
        gate_ends = queries.ends[rows]
        gate = np.where(is_cue, np.cumsum(is_cue) - 1, len(rows))
    gate_rows = np.full(size, len(gate_ends), dtype=np.int64)
    gate_rows[flat] = np.repeat(gate, length)

    begins, limit, copy = offset, None, np.zeros_like(rank)
    seen = own
    if mode == "tail":
        # A copy stands right behind the last item it may see, whatever lies between.
        begins = offset.copy()
        begins[is_cue] = offset[last_item] + length[last_item]
        limit = np.where(is_cue, begins - 1, size)
        copy = rank * is_cue
        seen = begins[head + counts - 1] + after
    layout = None
    if grid.shared or mode == "tail":
        layout = np.zeros((4, size), dtype=np.int32)
        layout[0] = -1
        position = np.repeat(begins, length) + step
        limits = position if limit is None else np.minimum(position, np.repeat(limit, length))
        layout[:, flat] = [np.repeat(prompt, length), position, np.repeat(copy, length), limits]
        layout = torch.from_numpy(layout.reshape(4, grid.rows, grid.width))
    return {
        "ids": torch.from_numpy(ids.reshape(grid.rows, grid.width)),
        "slot_positions": torch.from_numpy(chunk_end[is_item]),
        "slot_items": torch.from_numpy(items),
        "readout": torch.from_numpy(readout),
        "gate_rows": torch.from_numpy(gate_rows),
        "gate_ends": gate_ends,
        "layout": layout,
        "rows": torch.from_numpy(rows),
        "targets": torch.from_numpy(queries.targets[rows]),
        "prompts": len(chosen),
        "samples": len(rows),
        "tokens": int(own.sum()),
        "own_tokens": int(own.sum()),
        "padded_tokens": size,
        "lengths": seen,
    }


def visible(layout: Tensor) -> Tensor:
    """Which tokens each token may look at, (R, 1, L, L) bool, from a batch's layout (4, R, L).

    The layout holds for each token its prompt (−1 = padding), its position in it, the copy of the
    cue it belongs to (0 = none) and the last position of the shared part that it may see. Always
    explicit: of packed rows, position ids alone leak through OPT and a mask of ones through all.
    """
    prompt, position, copy, limit = layout.unsqueeze(-1)  # of queries; keys: the transposed
    key_prompt, key_position, key_copy, _ = layout.unsqueeze(-2)
    shared = (key_copy == 0) & (key_position <= limit)
    own = (key_copy == copy) & (key_position <= position)
    return ((key_prompt == prompt) & (shared | own)).unsqueeze(1)


def _ramp(lengths: np.ndarray) -> np.ndarray:
    """0, 1, …, n−1 for each n, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)

"""Which prompts meet in a micro-batch and where in it each lies: `data.batching` as plain data.

Shapes: P prompts, R rows of a batch, L tokens of a row, G gates of a batch, D width of a state.

    padded   prompts meet at random, each in a row of its own, as wide as the batch's longest
    grouped  the same, prompts of similar length together
    packed   several prompts share a row; all batches of an epoch have one shape
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.prompts import Grid, Pieces, Prompts, assemble, gate_queries, one_a_row
from core.ranks import ALONE, Group
from core.settings import Batching

CHUNK_BATCHES, CHUNK_PROMPTS = 50, 4096
"""So many batches, and prompts at least, are sorted together when training: enough to leave little
padding, few enough to keep batches random."""
ROW_TOKENS, LITTLE, TRIED_BATCHES = 512, 0.03, 64
"""Packed rows hold so many tokens at least, and more until only this share of a few batches is
padding: in longer rows attention pays for more pairs of tokens that must not see each other."""
SWAPS = 1000
"""At most, to level batches or rows."""
WIDTH_STEP = 8
"""Packed widths are multiples of it, as 16-bit matrix products like them."""


@dataclass(frozen=True)
class Plan:
    """The batches of one epoch in order."""

    batches: Sequence[np.ndarray]
    """Prompts of each batch."""
    rows: Sequence[Sequence[int]] | None = None
    """Packed: how many prompts each row of a batch holds, in their order."""
    width: int | None = None
    """Packed: tokens of every row."""

    def __len__(self) -> int:
        return len(self.batches)

    def grid(self, index: int, lengths: np.ndarray) -> Grid:
        """Where the prompts of a batch lie; `lengths`: of all prompts (P,)."""
        own = lengths[self.batches[index]]
        if self.rows is None or self.width is None:
            return one_a_row(own)
        counts = np.asarray(self.rows[index])
        row = np.repeat(np.arange(len(counts)), counts)
        behind = np.cumsum(own)
        starts = behind - own
        first = (np.cumsum(counts) - counts)[counts > 0]
        base = np.zeros(len(counts), dtype=np.int64)
        base[counts > 0] = starts[first]
        return Grid(len(counts), self.width, row * self.width + starts - base[row], shared=True)


def plan(lengths: np.ndarray, batching: Batching, batch_size: int, seed: int | None = None) -> Plan:
    """Put every prompt into one batch of at most `batch_size`; only the last may have fewer.

    Without a seed for scoring: nothing is random, the longest prompts come first.
    """
    everyone = np.arange(len(lengths))
    random = None if seed is None else np.random.default_rng(seed)
    order = everyone if random is None else random.permutation(everyone)
    if batching == "packed":
        return _packed(lengths, order, batch_size, random)
    if random is None:
        by_length = order[np.argsort(-lengths, kind="stable")]
        return Plan(_cut(order if batching == "padded" else by_length, batch_size))
    if batching == "padded":
        return Plan(_cut(order, batch_size))
    batches = []
    for chunk in _cut(order, max(batch_size * CHUNK_BATCHES, CHUNK_PROMPTS)):
        batches += _cut(chunk[np.argsort(lengths[chunk], kind="stable")], batch_size)
    return Plan([batches[i] for i in random.permutation(len(batches))])


def _packed(
    lengths: np.ndarray, order: np.ndarray, batch_size: int, random: np.random.Generator | None
) -> Plan:
    """Batches of nearly equally many tokens, dealt out of large chunks; their prompts spread over
    as many rows each.
    """
    if not len(order):
        return Plan([], [], 0)
    full = len(order) // batch_size
    chunks = max(1, full // max(CHUNK_BATCHES, CHUNK_PROMPTS // batch_size))
    if random is None:  # chunks of every length alike, out of an order of users
        order = order[np.argsort(-lengths, kind="stable")]
    rounds = order[: full * batch_size].reshape(batch_size, full)
    batches: list[np.ndarray] = []
    for first in range(chunks if full else 0):
        dealt = _deal(rounds[:, first::chunks], lengths)
        batches += dealt if random is None else [dealt[i] for i in random.permutation(len(dealt))]
    if full * batch_size < len(order):
        batches.append(order[full * batch_size :])
    count = _row_count(batches[:: -(-len(batches) // TRIED_BATCHES)], lengths)
    rows = [_spread(batch, lengths, count) for batch in batches]
    return Plan(
        [np.concatenate(spread) for spread in rows],
        [[len(row) for row in spread] for spread in rows],
        _width(rows, lengths),
    )


def _row_count(batches: list[np.ndarray], lengths: np.ndarray) -> int:
    """Rows of a batch: as many as leave little padding, or the fewest cells at all. Prompts of one
    length want a divisor of the batch.
    """
    tokens = sum(int(lengths[batch].sum()) for batch in batches)
    most = max(1, tokens // len(batches) // max(ROW_TOKENS, int(lengths.max())))
    cells = {}
    for count in range(most, 0, -1):
        width = _width([_spread(batch, lengths, count) for batch in batches], lengths)
        cells[count] = count * width * len(batches)
        if tokens > (1 - LITTLE) * cells[count]:
            return count
    return min(cells, key=lambda count: cells[count])


def _width(rows: list[list[np.ndarray]], lengths: np.ndarray) -> int:
    """Tokens of the fullest row, rounded up."""
    widest = max(int(lengths[row].sum()) for spread in rows for row in spread)
    return -(-widest // WIDTH_STEP) * WIDTH_STEP


def _deal(prompts: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Deal prompts (each, batches) in rounds, longest first, into batches of `each`: the longest of
    a round go to those that hold least.
    """
    by_length = prompts.ravel()[np.argsort(-lengths[prompts.ravel()], kind="stable")]
    rounds = by_length.reshape(prompts.shape)
    batches = np.empty(prompts.shape[::-1], dtype=prompts.dtype)
    filled = np.zeros(len(batches), dtype=np.int64)
    for place, dealt in enumerate(rounds):
        emptiest = np.argsort(filled, kind="stable")
        batches[emptiest, place] = dealt
        filled[emptiest] += lengths[dealt]
    return _levelled(list(batches), lengths)


def _spread(prompts: np.ndarray, lengths: np.ndarray, count: int) -> list[np.ndarray]:
    """Put the prompts of a batch into `count` rows, longest first, each to the row that holds
    least (Graham's rule for equal loads).
    """
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, row) for row in range(count)]
    for prompt in prompts[np.argsort(-lengths[prompts], kind="stable")].tolist():
        tokens, row = filled[0]
        rows[row].append(prompt)
        heapq.heapreplace(filled, (tokens + int(lengths[prompt]), row))
    return _levelled([np.array(row, dtype=prompts.dtype) for row in rows], lengths)


def _levelled(groups: list[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
    """Swap prompts of the fullest group and the emptiest, in place, while that levels them: the
    fullest of all decides the shape of all.
    """
    filled = np.array([lengths[group].sum() for group in groups])
    for _ in range(SWAPS):
        fullest, emptiest = groups[filled.argmax()], groups[filled.argmin()]
        gap = filled.max() - filled.min()
        moved = lengths[fullest][:, None] - lengths[emptiest]
        better = (moved > 0) & (moved < gap)
        if not better.any():
            break
        half = np.where(better, np.abs(2 * moved - gap), gap)
        one, other = np.unravel_index(half.argmin(), half.shape)
        filled[[filled.argmax(), filled.argmin()]] += [-moved[one, other], moved[one, other]]
        fullest[one], emptiest[other] = emptiest[other], fullest[one]
    return groups


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]


class GatedPrompts(Dataset):
    """The batches of one epoch, the SASRec states of their gates beside them; of a group's batches
    the own share.
    """

    def __init__(
        self,
        states_GD: Tensor,
        pieces: Pieces,
        prompts: Prompts,
        batch_size: int,
        *,
        batching: Batching = "grouped",
        seed: int | None = None,
        most: int = -1,
        group: Group = ALONE,
    ):
        """`states_GD`: of `prompts.gate_queries(prompts)`, in its order; `most` batches are kept,
        -1 = all.
        """
        self.states_GD, self.pieces, self.prompts, self.group = states_GD, pieces, prompts, group
        self.lengths = prompts.lengths(pieces)
        self.gate_ends = gate_queries(prompts).ends if prompts.mode == "causal" else None
        self.plan = plan(self.lengths, batching, batch_size, seed)
        self.batches = len(self.plan) if most == -1 else min(most, len(self.plan))

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict:
        chosen = self.plan.batches[index]
        if self.group.size > 1:
            return self._gated(self._share(chosen))
        grid = self.plan.grid(index, self.lengths)
        return self._gated(assemble(self.pieces, self.prompts, chosen, grid))

    def rows(self, index: int) -> np.ndarray:
        """Query rows that a batch answers."""
        return self.prompts.samples(self.plan.batches[index])

    def _gated(self, batch: dict) -> dict:
        ends, gates = batch.pop("gate_ends"), batch["rows"]
        if self.gate_ends is not None:
            gates = torch.from_numpy(np.searchsorted(self.gate_ends, ends))
        return batch | {"states": self.states_GD[gates]}

    def _share(self, chosen: np.ndarray) -> dict:
        """This process's part of a micro-batch, its samples and tokens counted of the whole one.

        `weight` makes the mean over the processes of (weight · mean loss of the own samples) the
        mean loss of all samples; who gets none computes one for nothing. `all_targets`: of all.
        """
        shares = [chosen[rank :: self.group.size] for rank in range(self.group.size)]
        own = self.group.share(chosen)
        everyone = self.prompts.samples(chosen)
        lengths = [self.lengths[share] for share in shares if len(share)]
        batch = assemble(self.pieces, self.prompts, own if len(own) else chosen[:1])
        answered = batch["samples"] if len(own) else 0
        return batch | {
            "weight": answered * self.group.size / len(everyone),
            "all_targets": torch.from_numpy(self.prompts.queries.targets[everyone]),
            "samples": len(everyone),
            "tokens": int(sum(each.sum() for each in lengths)),
            "padded_tokens": int(sum(each.max() * len(each) for each in lengths)),
        }

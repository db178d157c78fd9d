"""The old way of doing the guarded work, and yardsticks: tidy code that nobody optimises.

A reference gives the same result as the code under guard, by the construction that code replaced. A
yardstick gives no result: it is plain torch or numpy that strains the machine alike, so that a time
in its units means the same tomorrow on a busier machine.

Shapes: B users, T tokens, D width, K experts, R ranks of one expert, L positions, V items, Q
queries.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from core.prompts import Pieces
from core.ranking import Queries
from core.sasrec import SASRec

# ---- references ----


class ExpertLoRA(nn.Module):
    """LoRA with an expert axis, as iLoRA was released: every expert's full output is made, then
    mixed by the gate: y = W0 x + s Σ_k g_k B_k A_k x.
    """

    def __init__(self, base: nn.Linear, down_KRD: Tensor, up_KDR: Tensor, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.down_KRD, self.up_KDR = nn.Parameter(down_KRD), nn.Parameter(up_KDR)

    def forward(self, x_BTD: Tensor, gate_BK: Tensor) -> Tensor:
        """Output (B, T, D) for mixture weights of each user; adapters in their own dtype."""
        dtype = self.down_KRD.dtype
        low_BTKR = torch.einsum("btd,krd->btkr", x_BTD.to(dtype), self.down_KRD)
        experts_BTKD = torch.einsum("btkr,kdr->btkd", low_BTKR, self.up_KDR)
        mixed_BTD = (experts_BTKD * gate_BK[:, None, :, None]).sum(2)
        return self.base(x_BTD) + (self.scale * mixed_BTD).to(x_BTD.dtype)


def metrics_by_user(
    scores_BV1: np.ndarray, targets_B: Sequence[int], cutoffs: Sequence[int]
) -> dict[str, float]:
    """recall@k and ndcg@k by sorting each user's items, one user after the other; no ties."""
    hits = {k: 0.0 for k in cutoffs}
    gains = {k: 0.0 for k in cutoffs}
    for scores, target in zip(scores_BV1, targets_B, strict=True):
        order = list(np.argsort(-scores[1:]) + 1)
        place = order.index(target)
        for k in cutoffs:
            if place < k:
                hits[k] += 1
                gains[k] += 1 / np.log2(place + 2)
    users = len(targets_B)
    return {f"recall@{k}": hits[k] / users for k in cutoffs} | {
        f"ndcg@{k}": gains[k] / users for k in cutoffs
    }


@torch.no_grad()
def states_by_prefix(encoder: SASRec, queries: Queries, batch_size: int = 256) -> Tensor:
    """SASRec state of every query, (Q, D), each from a pass over its own history."""
    found = []
    for start in range(0, len(queries), batch_size):
        rows = np.arange(start, min(start + batch_size, len(queries)))
        items, lengths = queries.newest(rows, encoder.max_length)
        states = encoder(torch.from_numpy(items))
        found.append(states[torch.arange(len(rows)), torch.from_numpy(lengths - 1)])
    return torch.cat(found)


def prompts_by_row(
    pieces: Pieces, queries: Queries, max_history: int, rows: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Token ids (B, T), padded with 0, and lengths, put together token by token."""
    found = []
    for row in rows:
        start, end = int(queries.starts[row]), int(queries.ends[row])
        tokens = [int(token) for token in pieces.instruction]
        for item in queries.items[max(start, end - max_history) : end]:
            first = int(pieces.starts[item])
            tokens += [int(pieces.tokens[first + i]) for i in range(int(pieces.lengths[item]))]
        tokens += [int(token) for token in pieces.cue]
        found.append(tokens)
    width = max(map(len, found))
    padded = [tokens + [0] * (width - len(tokens)) for tokens in found]
    return torch.tensor(padded), [len(tokens) for tokens in found]


# ---- yardsticks ----


class Blocks(nn.Module):
    """A plain transformer of the guarded models' size."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 4 * width, 0.0, batch_first=True)
            for _ in range(layers)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Hidden states (B, T, D)."""
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return x_BTD


def training_yardstick(width: int, tokens: int, batches: int) -> Callable[[], None]:
    """Forward, backward and optimizer of a plain transformer."""
    torch.manual_seed(0)
    model = Blocks(width, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-30, fused=True)
    x_BTD = torch.randn(16, tokens, width)

    def run() -> None:
        for _ in range(batches):
            F.mse_loss(model(x_BTD), x_BTD).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def inference_yardstick(width: int, tokens: int, batches: int) -> Callable[[], None]:
    """Forward of a plain transformer."""
    torch.manual_seed(0)
    model, x_BTD = Blocks(width, 2), torch.randn(16, tokens, width)

    @torch.no_grad()
    def run() -> None:
        for _ in range(batches):
            model(x_BTD)

    return run


def ranking_yardstick(users: int, items: int) -> Callable[[], None]:
    """A row-wise maximum, a comparison and a sum over all scores."""
    scores_BV = torch.randn(users, items, generator=torch.Generator().manual_seed(0))

    def run() -> None:
        for rows in scores_BV.split(128):
            (rows > rows.max(1, keepdim=True).values / 2).sum(1)
            (rows == rows[:, :1]).sum(1)
            rows.logsumexp(1)

    return run


def writing_yardstick(
    folder: Path, rows: dict[str, np.ndarray], batch_size: int = 64
) -> Callable[[], None]:
    """The same rows into memory maps, in batches of scattered rows; nothing checked or kept."""
    count = len(next(iter(rows.values())))
    order = np.random.default_rng(1).permutation(count)

    def run() -> None:
        folder.mkdir(exist_ok=True)
        files = {
            name: open_memmap(folder / f"{name}.npy", "w+", values.dtype, values.shape)
            for name, values in rows.items()
        }
        for start in range(0, count, batch_size):
            chosen = order[start : start + batch_size]
            for name, values in rows.items():
                files[name][chosen] = values[chosen]
        for file in files.values():
            file.flush()

    return run

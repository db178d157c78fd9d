"""The scheme of two public implementations that no registry carries, in tidy code of our own: rows
of one fixed length, float dropout, `nn.MultiheadAttention`, plain autograd losses.

`bce`: pmixer's SASRec, one drawn negative for each position. `gbce`: gSASRec, 256 negatives of its
own for each position, each gathered, generalised cross-entropy. `softmax`: antklen's SASRec+, the
padded logits whole. Neither calls this project's code. Sources: Kang & McAuley, ICDM 2018; Petrov &
Macdonald, RecSys 2023; Klenitskiy & Vasilev, RecSys 2023.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from desk import BATCH, BLOCKS, DROPOUT, HEADS, LENGTH, TOP_K, WIDTH, Desk, Split, windows
from torch import nn
from torch.utils.data import DataLoader, Dataset

NEGATIVES = {"bce": 1, "gbce": 256, "softmax": 0}
GBCE_T = 0.75


class Rows(Dataset):
    """Left-padded inputs, targets and, drawn anew each time, negatives of one user."""

    def __init__(self, rows: list[np.ndarray], items: int, negatives: int):
        self.rows, self.items, self.negatives = rows, items, negatives

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        row = self.rows[index]
        inputs = left_padded(row[:-1])
        targets = left_padded(row[1:])
        return inputs, targets, torch.randint(1, self.items + 1, (LENGTH, self.negatives))


def left_padded(row: np.ndarray) -> torch.Tensor:
    padded = torch.zeros(LENGTH, dtype=torch.int64)
    newest = row[-LENGTH:]
    padded[LENGTH - len(newest) :] = torch.from_numpy(newest.astype(np.int64))
    return padded


class Plain(nn.Module):
    """SASRec as its authors wrote it: the query is normalised, keys and values are not."""

    def __init__(self, items: int):
        super().__init__()
        self.item_table = nn.Embedding(items + 1, WIDTH, padding_idx=0)
        self.position_table = nn.Embedding(LENGTH, WIDTH)
        self.dropout = nn.Dropout(DROPOUT)
        self.attention_norms = norms(BLOCKS)
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, HEADS, DROPOUT, batch_first=True) for _ in range(BLOCKS)
        )
        self.forward_norms = norms(BLOCKS)
        self.forwards = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, WIDTH),
                nn.Dropout(DROPOUT),
                nn.ReLU(),
                nn.Linear(WIDTH, WIDTH),
                nn.Dropout(DROPOUT),
            )
            for _ in range(BLOCKS)
        )
        self.norm = nn.LayerNorm(WIDTH, eps=1e-8)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)
        nn.init.zeros_(self.item_table.weight[0])

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """States (B, L, D)."""
        real = (items > 0)[..., None]
        x = self.item_table(items) * WIDTH**0.5 + self.position_table.weight
        x = self.dropout(x) * real
        hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        for parts in zip(
            self.attention_norms, self.attentions, self.forward_norms, self.forwards, strict=True
        ):
            attention_norm, attention, forward_norm, forward = parts
            query = attention_norm(x)
            x = query + attention(query, x, x, attn_mask=hidden, need_weights=False)[0]
            x = forward_norm(x)
            x = (x + forward(x)) * real
        return self.norm(x)


def norms(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.LayerNorm(WIDTH, eps=1e-8) for _ in range(count))


def loss_of(model: Plain, inputs, targets, negatives, variant: str) -> torch.Tensor:
    """Mean over the real positions."""
    states, real = model(inputs), targets > 0
    table = model.item_table
    if variant == "softmax":
        logits = states @ table.weight.t()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0)
    positive = (states * table(targets)).sum(-1)[real]
    negative = torch.einsum("bld,blnd->bln", states, table(negatives))[real]
    beta = 1.0
    if variant == "gbce":
        alpha = NEGATIVES["gbce"] / (table.num_embeddings - 2)
        beta = alpha * (GBCE_T * (1 - 1 / alpha) + 1 / alpha)
    return -(beta * F.logsigmoid(positive) + F.logsigmoid(-negative).sum(-1)).mean()


def main(folder: Path, seed: int, variant: str) -> None:
    torch.manual_seed(seed)
    split = Split(folder)
    train_rows = windows(split.histories(2))
    model = Plain(split.num_items)

    @torch.no_grad()
    def top(held_out: int) -> np.ndarray:
        model.eval()
        best = []
        histories = split.histories(held_out)
        for start in range(0, len(histories), BATCH):
            part = histories[start : start + BATCH]
            states = model(torch.stack([left_padded(row) for row in part]))[:, -1]
            scores = states @ model.item_table.weight.t()
            scores[:, 0] = float("-inf")
            for row, history in enumerate(part):
                scores[row, torch.from_numpy(history.astype(np.int64))] = float("-inf")
            best.append(scores.topk(TOP_K).indices.numpy())
        return np.concatenate(best)

    about = {
        "version": "own code of the scheme",
        "parameters": sum(p.numel() for p in model.parameters()),
        "digest": split.digest,
        "targets": sum(len(row) - 1 for row in train_rows),
        "steps_per_epoch": math.ceil(len(train_rows) / BATCH),
    }
    desk = Desk(top, about)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    rows = DataLoader(
        Rows(train_rows, split.num_items, NEGATIVES[variant]), batch_size=BATCH, shuffle=True
    )
    going_on = desk.begin()
    while going_on:
        for inputs, targets, negatives in rows:
            model.train()
            loss = loss_of(model, inputs, targets, negatives, variant)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            going_on = desk.step_done(int((targets > 0).sum()))
            if not going_on:
                break


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

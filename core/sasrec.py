"""SASRec: the student, and the frozen encoder that drives the teacher's gate.

Shapes: B users, L positions, D width, V items (ids 1..V, row 0 = padding).

One convention everywhere: rows are left-aligned (padding 0 on the right), so the state of a prefix
is the state at that position of the full sequence, and the user state is read at the last real
position. Source: Kang & McAuley, Self-Attentive Sequential Recommendation, ICDM 2018.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.losses import slices
from core.settings import StudentSettings


class Dropout(nn.Module):
    """Dropout whose mask is drawn as random bytes: the keep probability is a multiple of 1/256.

    A byte per element instead of a float uniform makes the mask several times cheaper on CPU.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.dropped = round(probability * 256)

    def forward(self, x: Tensor) -> Tensor:
        """Zero `dropped`/256 of the elements of `x` (any shape) and rescale the rest; identity in
        eval mode.
        """
        if not self.training or self.dropped == 0:
            return x
        keep = kept_bytes(x.shape, self.dropped, x.device)
        return x * keep.to(x.dtype).mul_(256 / (256 - self.dropped))


def kept_bytes(shape: Sequence[int], dropped: int, device: torch.device) -> Tensor:
    """Random uint8 of a shape: 0 with probability `dropped`/256, else 1."""
    numel = math.prod(shape)
    # Eight mask bytes from each 64-bit draw: the generator, not the compare, is what costs. And the
    # compare in place: a new tensor of truth values takes it ten times as long on a CPU.
    words = torch.empty((numel + 7) // 8, dtype=torch.int64, device=device).random_(-(2**63), None)
    return words.view(torch.uint8)[:numel].view(shape).ge_(dropped)


class CausalAttention(torch.autograd.Function):
    """Causal attention of one head's queries, keys and values on a CPU, a few sequences at a time.

    The scores of as many sequences as `CHUNK_SCORES` allows stay in cache from the product that
    makes them to the product that uses them; in long rows queries in the first half skip the keys
    of the second.
    """

    CHUNK_SCORES = 4 * 200**2
    LONG = 64

    @staticmethod
    def forward(ctx, qkv_BL3, dropped):
        """(B, L, 3D) to (B, L, D); `dropped`/256 of the probabilities become zero."""
        batch, length, width = qkv_BL3.shape
        query, key, value = qkv_BL3.split(width // 3, -1)
        scale, enlarge = (width // 3) ** -0.5, 256 / (256 - dropped)
        chunk = _sequences_at_once(length)
        mixed = torch.empty_like(query)
        kept = []
        for begin, end in _halves(length):
            hidden = torch.full((end - begin, end), float("-inf"), dtype=query.dtype)
            hidden.triu_(1 + begin)
            probabilities = query.new_empty(batch, end - begin, end)
            keep = kept_bytes(probabilities.shape, dropped, query.device) if dropped else None
            for rows in slices(batch, chunk):
                keys, values = key[rows, :end], value[rows, :end]
                scores = torch.baddbmm(
                    hidden, query[rows, begin:end], keys.transpose(1, 2), alpha=scale
                )
                chosen = torch.softmax(scores, -1, out=probabilities[rows])
                if dropped:
                    chosen = torch.mul(chosen, keep[rows], out=scores).mul_(enlarge)
                mixed[rows, begin:end] = chosen @ values
            kept += [probabilities, keep]
        ctx.save_for_backward(qkv_BL3, *kept)
        ctx.dropped = dropped
        return mixed

    @staticmethod
    def backward(ctx, grad_BLD):
        """Gradient of (B, L, 3D)."""
        qkv_BL3, *kept = ctx.saved_tensors
        batch, length, width = qkv_BL3.shape
        query, key, value = qkv_BL3.split(width // 3, -1)
        scale, enlarge = (width // 3) ** -0.5, 256 / (256 - ctx.dropped)
        chunk = _sequences_at_once(length)
        grad = torch.empty_like(qkv_BL3)
        grad_query, grad_key, grad_value = grad.split(width // 3, -1)
        parts = list(zip(_halves(length), kept[::2], kept[1::2], strict=True))
        # The last part has all keys: it sets their gradients, the part before adds to them.
        for (begin, end), probabilities, keep in reversed(parts):
            into = torch.Tensor.copy_ if end == length else torch.Tensor.add_
            for rows in slices(batch, chunk):
                given, chosen = grad_BLD[rows, begin:end], probabilities[rows]
                grad_chosen = given @ value[rows, :end].transpose(1, 2)
                dropped_out = chosen
                if ctx.dropped:
                    dropped_out = torch.mul(chosen, keep[rows]).mul_(enlarge)
                    grad_chosen.mul_(keep[rows]).mul_(enlarge)
                into(grad_value[rows, :end], dropped_out.transpose(1, 2) @ given)
                grad_scores = torch._softmax_backward_data(
                    grad_chosen, chosen, -1, chosen.dtype
                ).mul_(scale)
                grad_query[rows, begin:end] = grad_scores @ key[rows, :end]
                into(grad_key[rows, :end], grad_scores.transpose(1, 2) @ query[rows, begin:end])
        return grad, None


def _sequences_at_once(length: int) -> int:
    return max(1, CausalAttention.CHUNK_SCORES // length**2)


def _halves(length: int) -> list[tuple[int, int]]:
    """Bounds of the parts whose queries are taken together."""
    if length < CausalAttention.LONG:
        return [(0, length)]
    return [(0, length // 2), (length // 2, length)]


class Block(nn.Module):
    """Pre-norm transformer block: causal self-attention, then a point-wise ReLU feed-forward of
    equal width.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, eps=1e-8)
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.forward_norm = nn.LayerNorm(width, eps=1e-8)
        self.expand = nn.Linear(width, width)
        self.contract = nn.Linear(width, width)
        self.attention_dropout = Dropout(dropout)
        self.forward_dropout = Dropout(dropout)
        self.hidden_dropout = Dropout(dropout)

    def attention(self, x_BLD: Tensor) -> Tensor:
        """Causal attention. Right padding needs no mask: no real position looks to its right."""
        batch, length, width = x_BLD.shape
        head = width // self.heads
        qkv = self.in_proj(x_BLD)
        dropped = self.attention_dropout.dropped if self.training else 0
        if self.heads == 1 and not x_BLD.is_cuda:
            return self.out_proj(CausalAttention.apply(qkv, dropped))
        query, key, value = qkv.view(batch, length, 3, self.heads, head).transpose(1, 3).unbind(2)
        if x_BLD.is_cuda:
            mixed = F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropped / 256, is_causal=True
            )
        else:
            rows = torch.stack([query, key, value], 3).flatten(0, 1).flatten(2)
            mixed = CausalAttention.apply(rows, dropped).view(batch, self.heads, length, head)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Map states (B, L, D) to states (B, L, D)."""
        return self._fed_forward(x_BLD + self.attention(self.attention_norm(x_BLD)))

    def last(self, x_BLD: Tensor, last_B: Tensor) -> Tensor:
        """What `forward` gives at one position of each row, (B, D), without dropout: keys and
        values everywhere, all else at that position only.
        """
        batch, length, width = x_BLD.shape
        rows = torch.arange(batch, device=x_BLD.device)
        normed = self.attention_norm(x_BLD)
        weights, biases = self.in_proj.weight.split((width, 2 * width)), self.in_proj.bias
        query = F.linear(normed[rows, last_B], weights[0], biases[:width])
        key, value = (
            F.linear(normed, weights[1], biases[width:]).unflatten(2, (2, self.heads, -1)).unbind(2)
        )
        query = query.unflatten(1, (self.heads, -1))
        scores = torch.einsum("bhd,blhd->bhl", query, key) * query.shape[-1] ** -0.5
        later = torch.arange(length, device=x_BLD.device) > last_B[:, None]
        chosen = scores.masked_fill(later[:, None], float("-inf")).softmax(-1)
        mixed = torch.einsum("bhl,blhd->bhd", chosen.to(value.dtype), value).flatten(1)
        return self._fed_forward(x_BLD[rows, last_B] + self.out_proj(mixed))

    def _fed_forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden_dropout(F.relu(self.expand(self.forward_norm(x))))
        return x + self.forward_dropout(self.contract(hidden))


class SASRec(nn.Module):
    """Item table, learned positions, causal blocks; scores are products with the same table."""

    def __init__(self, items: int, settings: StudentSettings):
        super().__init__()
        width = settings.hidden_size
        self.max_length = settings.max_length
        self.item_table = nn.Embedding(items + 1, width, padding_idx=0)
        self.position_table = nn.Embedding(settings.max_length, width)
        self.dropout = Dropout(settings.dropout)
        self.blocks = nn.ModuleList(
            Block(width, settings.num_heads, settings.dropout) for _ in range(settings.num_blocks)
        )
        self.norm = nn.LayerNorm(width, eps=1e-8)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-normal matrices; a small item table keeps the first softmax near uniform."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)
        with torch.no_grad():
            self.item_table.weight[0].zero_()

    def item_vectors(self) -> Tensor:
        """Input vectors of all items, (V+1, D), row 0 = padding."""
        return self.item_table.weight

    def forward(self, items_BL: Tensor, item_vectors_VD: Tensor | None = None) -> Tensor:
        """States (B, L, D) for left-aligned id rows (B, L), L ≤ max_length.

        `item_vectors_VD` replaces the input table (distillation adds projected LLM embeddings to
        it). States at padded positions are finite and meaningless.
        Raises ValueError when a row is longer than `max_length`.
        """
        x_BLD = self._embedded(items_BL, item_vectors_VD)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.norm(x_BLD)

    def _embedded(self, items_BL: Tensor, item_vectors_VD: Tensor | None) -> Tensor:
        length = items_BL.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"SASRec: rows of {length} items; at most max_length = {self.max_length}"
            )
        table = self.item_vectors() if item_vectors_VD is None else item_vectors_VD
        x_BLD = F.embedding(items_BL, table, padding_idx=0) * table.shape[1] ** 0.5
        return self.dropout(x_BLD + self.position_table.weight[:length])

    def last_state(
        self, items_BL: Tensor, lengths_B: Tensor, item_vectors_VD: Tensor | None = None
    ) -> Tensor:
        """State at the last real position, (B, D); in evaluation mode the one of `forward`, at
        little more than half of its cost.
        """
        x_BLD = self._embedded(items_BL, item_vectors_VD)
        for block in self.blocks[:-1]:
            x_BLD = block(x_BLD)
        return self.norm(self.blocks[-1].last(x_BLD, lengths_B - 1))

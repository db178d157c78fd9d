"""SASRec: the student, and the frozen encoder that drives the teacher's gate.

Shapes: B users, L positions, D width, V items (ids 1..V, row 0 = padding), N supervised positions.

One convention everywhere: rows are left-aligned (padding 0 on the right), so the state of a prefix
is the state at that position of the full sequence, and the user state is read at the last real
position. Source: Kang & McAuley, Self-Attentive Sequential Recommendation, ICDM 2018; full-softmax
training after Klenitskiy & Vasilev, RecSys 2023.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        # Eight mask bytes from each 64-bit draw: the generator, not the compare, is what costs.
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(
            -(2**63), None
        )
        keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.dropped
        return x * keep.to(x.dtype).mul_(256 / (256 - self.dropped))


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
        qkv = self.in_proj(x_BLD).view(batch, length, 3, self.heads, head)
        query, key, value = (
            part.transpose(1, 2).reshape(batch * self.heads, length, head) for part in qkv.unbind(2)
        )
        if x_BLD.is_cuda:
            dropped = self.attention_dropout.dropped / 256 if self.training else 0.0
            mixed = F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropped, is_causal=True
            )
        else:
            # On CPU two batched products and a softmax beat the fused kernel at these widths.
            causal = torch.full((length, length), float("-inf"), dtype=query.dtype).triu_(1)
            scores = torch.baddbmm(causal, query, key.transpose(1, 2), alpha=head**-0.5)
            mixed = torch.bmm(self.attention_dropout(scores.softmax(-1)), value)
        mixed = mixed.view(batch, self.heads, length, head).transpose(1, 2)
        return self.out_proj(mixed.reshape(batch, length, width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Map states (B, L, D) to states (B, L, D)."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD))
        hidden = self.hidden_dropout(F.relu(self.expand(self.forward_norm(x_BLD))))
        return x_BLD + self.forward_dropout(self.contract(hidden))


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
        length = items_BL.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"SASRec: rows of {length} items; at most max_length = {self.max_length}"
            )
        table = self.item_vectors() if item_vectors_VD is None else item_vectors_VD
        x_BLD = F.embedding(items_BL, table, padding_idx=0) * table.shape[1] ** 0.5
        x_BLD = self.dropout(x_BLD + self.position_table.weight[:length])
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.norm(x_BLD)

    def last_state(self, items_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """State at the last real position, (B, D)."""
        return self(items_BL)[torch.arange(len(items_BL), device=items_BL.device), lengths_B - 1]


class _SoftmaxLoss(torch.autograd.Function):
    """Mean cross-entropy over all items, both gradients made in the forward pass, chunk by chunk.

    The (N, V) logits never exist as a whole: each chunk of rows is multiplied, normalised, turned
    into its gradient and used up while it is in cache. Products run in the states' dtype,
    everything else in fp32.
    """

    @staticmethod
    def forward(ctx, states_ND, table_VD, targets_N, chunk):
        rows, dtype = states_ND.shape[0], states_ND.dtype
        table = table_VD.to(dtype)
        grad_states = torch.empty_like(states_ND)
        grad_table = torch.zeros_like(table_VD)
        loss = torch.zeros((), dtype=torch.float32, device=states_ND.device)
        with torch.autocast(states_ND.device.type, enabled=False):
            for start in range(0, rows, chunk):
                part = slice(start, min(start + chunk, rows))
                states, targets = states_ND[part], targets_N[part, None]
                logits = (states @ table.t()).float()
                logits[:, 0] = float("-inf")  # the padding column is no candidate
                largest = logits.amax(1, keepdim=True)
                loss -= (logits.gather(1, targets) - largest).sum()
                # exp runs once over (chunk, V); its row sums divide the small factors, not the big
                # matrix.
                weights = logits.sub_(largest).exp_()
                total = weights.sum(1, keepdim=True)
                loss += total.log().sum()
                weights = weights.to(dtype)
                grad_states[part] = (weights @ table).div_(total) - table[targets[:, 0]]
                grad_table += weights.t() @ (states / total).to(dtype)
                grad_table.index_add_(0, targets[:, 0], states.float(), alpha=-1.0)
        ctx.save_for_backward(grad_states.div_(rows), grad_table.div_(rows))
        return loss / rows

    @staticmethod
    def backward(ctx, grad_loss):
        grad_states, grad_table = ctx.saved_tensors
        return grad_states * grad_loss.to(grad_states.dtype), grad_table * grad_loss, None, None


def softmax_loss(
    states_ND: Tensor, table_VD: Tensor, targets_N: Tensor, chunk: int = 512
) -> Tensor:
    """Mean full-softmax cross-entropy of N positions over items 1..V (scalar, fp32).

    Equals `F.cross_entropy(states @ table.T with column 0 = -inf, targets)`; needs (chunk, V)
    memory.
    """
    return _SoftmaxLoss.apply(states_ND, table_VD, targets_N, chunk)


def sampled_loss(
    states_ND: Tensor, table_VD: Tensor, targets_N: Tensor, negatives_M: Tensor, beta: float
) -> Tensor:
    """BCE (`beta` = 1) or gBCE with negatives shared by the batch (scalar, mean over positions).

    gBCE (Petrov & Macdonald, RecSys 2023): −[β log σ(s⁺) + Σ_j log(1 − σ(s_j))]. A negative that
    equals a row's target is left out for that row.
    """
    positive_N = (states_ND * table_VD[targets_N]).sum(-1).float()
    negative_NM = (states_ND @ table_VD[negatives_M].t()).float()
    real = negatives_M[None, :] != targets_N[:, None]
    loss_N = -beta * F.logsigmoid(positive_N) - (F.logsigmoid(-negative_NM) * real).sum(1)
    return loss_N.mean()


def gbce_beta(t: float, negatives: int, items: int) -> float:
    """β = α (t (1 − 1/α) + 1/α), α = negatives / (items − 1): t = 0 gives plain BCE, t = 1 full
    calibration.
    """
    alpha = min(negatives / max(items - 1, 1), 1.0)
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)

"""Losses of the student's states against an item table: full softmax, BCE, gBCE, sampled softmax.

Shapes: N supervised positions, D width, V items (ids 1..V, row 0 = padding), M negatives.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


class _SoftmaxLoss(torch.autograd.Function):
    """Mean cross-entropy over all items, both gradients made in the forward pass, chunk by chunk.

    The (N, V) logits never exist as a whole: each chunk of rows is multiplied, normalised, turned
    into its gradient and used up while it is in cache. Products and exponentials run in the states'
    dtype (fp32 or bf16, whose range is the same), all sums in fp32.
    """

    @staticmethod
    def forward(ctx, states_ND, table_VD, targets_N, chunk):
        dtype, rows, items = states_ND.dtype, len(states_ND), len(table_VD) - 1
        # Without the padding row, which is no candidate, and with rows of zeros behind: rows of
        # logits fill whole cache lines, or else every product and pass runs on split ones.
        table = F.pad(table_VD[1:].to(dtype), (0, 0, 0, -items % ALIGNED))
        # Both layouts of the table, and the table's gradient as (D, V): the factors' layouts decide
        # whether a CPU's products run at its full rate or at less than half of it.
        by_width = table.t().contiguous()
        grad_table = torch.zeros_like(by_width, dtype=torch.float32)
        grad_states = torch.empty_like(states_ND)
        losses = states_ND.new_empty(rows, dtype=torch.float32)
        products = states_ND.new_empty(min(chunk, rows), len(table))
        small = _exp_is_safe(states_ND, table_VD)
        with torch.autocast(states_ND.device.type, enabled=False):
            for part in slices(rows, chunk):
                states, targets = states_ND[part], targets_N[part, None] - 1
                logits = torch.mm(states, by_width, out=products[: len(states)])
                losses[part] = -logits.gather(1, targets)[:, 0].float()
                if not small:
                    largest = logits[:, :items].amax(1, keepdim=True)
                    losses[part] += largest[:, 0]
                    logits.sub_(largest)
                # exp runs once over (chunk, V); its row sums divide the small factors, not the big
                # matrix.
                weights = logits.exp_()
                total = weights[:, :items].sum(1, keepdim=True, dtype=torch.float32)
                losses[part] += total.log()[:, 0]
                # Becomes total · (probability − one-hot).
                weights.scatter_add_(1, targets, -total.to(dtype))
                grad_states[part] = (weights @ table).div_(total)
                scaled = (states / total).to(dtype).t()
                if dtype == torch.float32:
                    grad_table.addmm_(scaled, weights)
                else:
                    grad_table += scaled @ weights
        grad_table = F.pad(grad_table[:, :items].t(), (0, 0, 1, 0)).div_(rows)
        ctx.save_for_backward(grad_states.div_(rows), grad_table)
        return losses.mean()

    @staticmethod
    def backward(ctx, grad_loss):
        grad_states, grad_table = ctx.saved_tensors
        return grad_states * grad_loss.to(grad_states.dtype), grad_table * grad_loss, None, None


def _exp_is_safe(states_ND: Tensor, table_VD: Tensor) -> bool:
    """Whether no score is so large that its exp needs the row's largest score taken off first.

    |s · t| ≤ ‖s‖ ‖t‖ (Cauchy-Schwarz). On a CPU only: elsewhere the answer would halt the device.
    """
    if states_ND.device.type != "cpu":
        return False
    bound = states_ND.float().norm(dim=1).max() * table_VD.float().norm(dim=1).max()
    return bool(bound < SAFE_EXPONENT)


SAFE_EXPONENT = 40.0
"""exp(±40) and sums of it stay far inside fp32 (1e-38 to 3e38), at full relative precision."""
ALIGNED = 16
"""Elements: 64 bytes of fp32, 32 of bf16."""
CHUNK_BYTES = {"cpu": 5 * 2**18, "cuda": 2**28}
"""Logits at work at once. CPU: what stays in a core's second-level cache beside the table. In fp32
64 to 128 rows of 3,416 items were the quickest on an Intel core, where 512 rows took 1.8 times as
long (on an AMD core all from 64 to 512 were alike); in bf16 192 rows."""
SMALLEST_CHUNK = 32


def softmax_loss(
    states_ND: Tensor, table_VD: Tensor, targets_N: Tensor, chunk: int | None = None
) -> Tensor:
    """Mean full-softmax cross-entropy of N positions over items 1..V (scalar, fp32).

    Equals `F.cross_entropy(states @ table.T with column 0 = -inf, targets)`; needs (chunk, V)
    memory. `chunk` rows are at work at once; by default as many as `CHUNK_BYTES` hold. Under
    autocast its three products run in the low precision like all others, though the last norm has
    given fp32 states.
    """
    device = states_ND.device.type
    if torch.is_autocast_enabled(device):
        states_ND = states_ND.to(torch.get_autocast_dtype(device))
    if chunk is None:
        budget = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"])
        row_bytes = states_ND.element_size() * len(table_VD)
        chunk = max(SMALLEST_CHUNK, budget // row_bytes // ALIGNED * ALIGNED)
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


def sampled_softmax_loss(
    states_ND: Tensor,
    table_VD: Tensor,
    targets_N: Tensor,
    negatives_M: Tensor,
    log_expected_count_M: Tensor,
) -> Tensor:
    """Softmax over each row's target and negatives shared by the batch (scalar, fp32, mean).

    logQ correction (Bengio & Senécal, IEEE Trans. Neural Networks 19(4), 2008; Jean et al., ACL
    2015): each negative's score is lowered by the log of how often the proposal is expected to draw
    it, so that the sum over negatives estimates the full softmax's without bias,

        loss = −s⁺ + log(e^{s⁺} + Σ_{j ≠ target} e^{s_j − log E[count_j]}).

    The target is always there, so its own count is 1 and its score stays. A negative that equals a
    row's target (an accidental hit) is left out for that row.
    """
    positive_N = (states_ND * table_VD[targets_N]).sum(-1).float()
    negative_NM = (states_ND @ table_VD[negatives_M].t()).float() - log_expected_count_M
    hits = negatives_M[None, :] == targets_N[:, None]
    others_N = negative_NM.masked_fill(hits, float("-inf")).logsumexp(1)
    return (torch.logaddexp(positive_N, others_N) - positive_N).mean()


def gbce_beta(t: float, negatives: int, items: int) -> float:
    """β = α (t (1 − 1/α) + 1/α), α = negatives / (items − 1): t = 0 gives plain BCE, t = 1 full
    calibration.
    """
    alpha = min(negatives / max(items - 1, 1), 1.0)
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)


def slices(rows: int, size: int) -> Iterator[slice]:
    """Rows in turn, `size` at a time; the last has the rest."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))

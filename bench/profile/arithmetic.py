"""How much arithmetic a step of the teacher holds, and what share of the machine's peak it reached.

The count of LoRA training differs from the usual 6 N a token: frozen weights need the gradient of
their input and none of their own, so a weight costs 2 + 2 and an adapter weight 2 + 4. A token of a
row of T tokens in L layers of width d costs

    training    2 N + 2 N + 6 N_lora + 12 T d L
    inference   2 N       + 2 N_lora +  4 T d L

N counts the weights of the backbone's matrix products, embeddings and language-model head left
out. Those behind the last attention are asked for the samples' own tokens only, which are read out:
of the others nothing is wanted there. The last term is attention with all T² products (Chowdhery et
al., PaLM, 2022, appendix B); a kernel that skips what lies above the diagonal does half of them.
6 N a token would overstate LoRA by half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Backbone:
    """The sizes of a backbone that its arithmetic depends on."""

    weights: int
    """N, 4-bit weights counted as numbers."""
    lora: int
    """N_lora."""
    layers: int
    width: int
    """Heads × width of a head."""
    weights_behind: int = 0
    """Of N, those behind the last attention."""
    lora_behind: int = 0


def teacher_flops(backbone: Backbone, tokens: float, samples: float, trains: bool) -> float:
    """FLOPs that the model itself asks for on `tokens` real tokens in `samples` rows, head apart.

    Rows count with their mean length T: of rows that differ in length attention costs a little
    more.
    """
    passes = 3 if trains else 1
    frozen, adapters = (2 if trains else 1) * 2, passes * 2
    behind = frozen * backbone.weights_behind + adapters * backbone.lora_behind
    before = frozen * backbone.weights + adapters * backbone.lora - behind
    attention = passes * _attention(backbone, tokens / samples)
    return tokens * (before + attention) + samples * behind


def attention_share(backbone: Backbone, length: float, trains: bool) -> float:
    """Share of attention in that arithmetic, rows of `length` tokens; head apart."""
    row = teacher_flops(backbone, length, 1, trains)
    return (3 if trains else 1) * length * _attention(backbone, length) / row


def guessed_attention_share(length: float, width: float) -> float:
    """The same from the shape of a batch alone, T / (6 d + T): layers of a transformer hold about
    12 d² weights.
    """
    return length / (6 * width + length)


def _attention(backbone: Backbone, length: float) -> float:
    """Forward FLOPs of one token with `length` others: scores, and their mixture of values."""
    return 4 * length * backbone.width * backbone.layers


@dataclass(frozen=True)
class Rates:
    """What the probed steps of a profiled stage achieved, None where it could not be told."""

    step_s: float
    """Mean of a micro-batch, begun and ended with an idle device."""
    wait_share: float
    """Of that time spent waiting for the loader."""
    issue_share: float | None
    """Host time to issue a step / its time, loader wait apart; on a GPU only."""
    cpu_share: float
    """CPU time of the process / time of the step."""
    flops_per_s: float | None
    """All arithmetic that ran: padding and recomputation too."""
    bytes_per_s: float | None
    """Inputs and outputs of all operators, as if no cache held any."""
    flops_share: float | None
    """Of the GEMM ceiling: hardware FLOPs utilisation (HFU)."""
    bytes_share: float | None
    """Of the copy ceiling; above 1 caches helped."""
    mfu: float | None
    """Model FLOPs of real tokens / GEMM ceiling (teacher only)."""
    attention_share: float | None
    """Of the model's FLOPs (teacher only)."""


def rates(profile: Mapping[str, Any]) -> Rates | None:
    """The rates of one profiled stage (`<stage>.json` of a profile); None if no step was probed."""
    probes: Sequence[Mapping[str, Any]] = profile["probes"]
    if not probes:
        return None
    seconds = sum(probe["seconds"] for probe in probes)
    waited = sum(probe["wait_s"] for probe in probes)
    issued = sum(probe["issue_s"] for probe in probes) - waited
    flops, moved = _ran(profile, probes)
    model, attention = _model(profile, probes)
    ceilings = profile["ceilings"]
    gemm, copy = ceilings["gemm_flops_per_s"], ceilings["copy_bytes_per_s"]
    return Rates(
        step_s=seconds / len(probes),
        wait_share=waited / seconds,
        issue_share=issued / (seconds - waited) if profile["device"] != "cpu" else None,
        cpu_share=sum(probe["cpu_s"] for probe in probes) / seconds,
        flops_per_s=None if flops is None else flops / seconds,
        bytes_per_s=None if moved is None else moved / seconds,
        flops_share=None if flops is None else flops / seconds / gemm,
        bytes_share=None if moved is None else moved / seconds / copy,
        mfu=None if model is None else model / seconds / gemm,
        attention_share=attention,
    )


def _ran(
    profile: Mapping[str, Any], probes: Sequence[Mapping]
) -> tuple[float | None, float | None]:
    """FLOPs and bytes of the probed steps, from those of the one that was counted.

    They go with the tokens, padding included; where there are none, and in the head, with the rows.
    """
    counted = profile["counted"]
    if counted is None:
        return None, None
    rows = _times(probes, counted, "samples")
    tokens = _times(probes, counted, "padded_tokens") if counted["padded_tokens"] else rows
    head = _passes(profile) * counted["head_flops"] if profile["backbone"] else 0
    return (counted["flops"] - head) * tokens + head * rows, counted["bytes"] * tokens


def _model(
    profile: Mapping[str, Any], probes: Sequence[Mapping]
) -> tuple[float | None, float | None]:
    """Model FLOPs of the probed steps and the share of attention in them."""
    counted, sizes = profile["counted"], profile["backbone"]
    if counted is None or sizes is None:
        return None, None
    backbone, trains = Backbone(**sizes), profile["stage"].endswith("_fit")
    samples = sum(probe["samples"] for probe in probes)
    tokens = sum(probe["tokens"] for probe in probes)
    head = _passes(profile) * counted["head_flops"] * _times(probes, counted, "samples")
    model = teacher_flops(backbone, tokens, samples, trains) + head
    return model, attention_share(backbone, tokens / samples, trains)


def _times(probes: Sequence[Mapping], counted: Mapping[str, float], unit: str) -> float:
    """How many times the counted step's rows or tokens the probed ones had."""
    return float(sum(probe[unit] for probe in probes) / counted[unit])


def _passes(profile: Mapping[str, Any]) -> int:
    """Of a product over the data: in training its weights and its input want gradients too."""
    return 3 if profile["stage"].endswith("_fit") else 1

"""iLoRA: a per-user gate over LoRA's rank slices, inside unmodified peft layers.

Shapes: B users, D width of the SASRec state, K experts, R LoRA rank, M tokens of a batch (padding
included).

Expert k owns rows k·R/K .. (k+1)·R/K − 1 of A and those columns of B, so the mixture
y = W0 x + s Σ_k g_k B_k A_k x, s = alpha / (R/K), is one multiply between A and B (Kong et al.,
iLoRA, NeurIPS 2024): B · diag(repeat(g, R/K)) · A. It holds for dense and 4-bit layers alike,
because all call `lora_A` as a module.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from core.config import InputError
from core.settings import TeacherSettings


class ResNetRouter(nn.Module):
    """The released router: a 1-D ResNet-20 over the numbers of the state; BatchNorm ties users of a
    batch together.

    Kept to reproduce; prefer `mlp`. 90,772 parameters at K = 4.
    """

    def __init__(self, experts: int):
        super().__init__()
        self.stem = nn.Conv1d(1, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm1d(16)
        widths = (
            [(16, 16, 1)] * 3
            + [(16, 32, 2)]
            + [(32, 32, 1)] * 2
            + [(32, 64, 2)]
            + [(64, 64, 1)] * 2
        )
        self.blocks = nn.ModuleList(_ResidualBlock(*width) for width in widths)
        self.head = nn.Linear(64, experts)

    def forward(self, state_BD: Tensor) -> Tensor:
        """Logits (B, K)."""
        x = F.relu(self.stem_norm(self.stem(state_BD.unsqueeze(1))))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(-1))


class _ResidualBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.first = nn.Conv1d(before, after, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm1d(after)
        self.second = nn.Conv1d(after, after, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm1d(after)
        self.stride, self.extra = stride, after - before

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        # Parameter-free shortcut: subsample and pad the new channels with zeros.
        short = F.pad(x[..., :: self.stride], (0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(y + short)


def build_router(settings: TeacherSettings, width: int) -> nn.Module:
    """State (B, D) -> expert logits (B, K)."""
    experts = settings.num_experts
    if settings.gate == "linear":
        return nn.Linear(width, experts, bias=False)
    if settings.gate == "resnet":
        return ResNetRouter(experts)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, experts))


def gate_weights(router: nn.Module, state_BD: Tensor) -> Tensor:
    """Mixture weights (B, K), rows on the simplex; fp32 whatever the autocast region."""
    with torch.autocast(state_BD.device.type, enabled=False):
        return router(state_BD.float()).softmax(-1)


class RankGate:
    """Multiplies every adapted layer's rank-space activations by the factors bound to the running
    forward.
    """

    def __init__(self):
        self.factor_MR: Tensor | None = None
        self.calls = 0

    @contextmanager
    def bound(self, factor_MR: Tensor | None) -> Iterator[None]:
        """Use these factors inside the block; what was bound before comes back after it."""
        before, self.factor_MR = self.factor_MR, factor_MR
        try:
            yield
        finally:
            self.factor_MR = before

    def recompute_context(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """For non-reentrant checkpointing: backward recomputes with the factors of *its* forward.

        Without it a second forward before the backward silently gives wrong gradients.
        """
        return nullcontext(), self.bound(self.factor_MR)

    def hook(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """Forward hook of a `lora_A`: output (..., R) times the factors, token by token."""
        if self.factor_MR is None:
            raise RuntimeError(
                "iLoRA: a gated layer ran outside `RankGate.bound`; bind factors first"
            )
        if self.factor_MR.numel() != output.numel():
            raise RuntimeError(
                f"iLoRA: factors for {tuple(self.factor_MR.shape)}, "
                f"activations {tuple(output.shape)}: expanded batches (beams) must repeat "
                "their factors"
            )
        if not torch.compiler.is_compiling():  # traced, not called
            self.calls += 1
        # Some backbones flatten (B, T, d) to (B·T, d) before a layer; both have a row for each
        # token.
        return output * self.factor_MR.view_as(output).to(output.dtype)


def token_factors(gate_BK: Tensor, lengths_B: Tensor, width: int, rank: int) -> Tensor:
    """Factors for each token (B·width, R): K·g_k on the ranks of expert k, 0 on padding.

    peft scales by alpha/R, iLoRA by alpha/(R/K): the K makes up for it, and a uniform gate is plain
    LoRA.
    """
    experts = gate_BK.shape[1]
    factor_BR = (gate_BK * experts).repeat_interleave(rank // experts, 1)
    real_BT = torch.arange(width, device=gate_BK.device) < lengths_B[:, None]
    return (factor_BR[:, None] * real_BT[..., None]).flatten(0, 1)


def recompute_layers(backbone: nn.Module, settings: TeacherSettings, gate: RankGate) -> str | None:
    """Have layers recomputed in backward if the settings say so or, left to peft, if it does.

    Returns who switched it on: "setting", "peft" or None. peft's preparation of a 4-bit backbone
    also holds its norms, embeddings and biases in fp32.
    """
    # Never reentrant: its inner backwards would each walk into the graph of the one router.
    options = {"use_reentrant": False, "context_fn": gate.recompute_context}
    if settings.gradient_checkpointing:
        backbone.gradient_checkpointing_enable(options)
    elif settings.gradient_checkpointing is None and settings.adapter == "qlora":
        prepare_model_for_kbit_training(backbone, gradient_checkpointing_kwargs=options)
    if not any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules()):
        return None
    return "setting" if settings.gradient_checkpointing else "peft"


def add_adapters(backbone: nn.Module, settings: TeacherSettings, gate: RankGate) -> PeftModel:
    """Wrap the backbone in stock peft LoRA and hook the gate into every adapted layer.

    Raises InputError when `target_modules` names no layer of this backbone.
    """
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.target_modules),
        bias="none",
    )
    try:
        model = get_peft_model(backbone, config)
    except ValueError as error:
        raise InputError(f"teacher.target_modules: {error}") from error
    for layer in adapted_layers(model):
        layer.lora_A["default"].register_forward_hook(gate.hook)
    return model


def adapted_layers(model: nn.Module) -> list[LoraLayer]:
    """The LoRA layers of a model. Raises RuntimeError for variants that go round `lora_A` (merged,
    DoRA).
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        if layer.merged or getattr(layer, "lora_variant", {}):
            raise RuntimeError(
                "iLoRA: merged adapters and LoRA variants bypass the gate; use plain LoRA"
            )
    return layers

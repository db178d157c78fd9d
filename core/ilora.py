"""iLoRA: a per-user gate over LoRA's rank slices, inside unmodified peft layers.

Shapes: B users, D width of the SASRec state, K experts, R LoRA rank, G gates of a batch, M its
tokens (padding included).

Expert k owns rows k·R/K .. (k+1)·R/K − 1 of A and those columns of B, so the mixture
y = W0 x + s Σ_k g_k B_k A_k x, s = alpha / (R/K), is one multiply between A and B (Kong et al.,
iLoRA, NeurIPS 2024): B · diag(s · repeat(g, R/K)) · A. It holds for dense and 4-bit layers alike.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, _dynamo, nn

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
    """Holds the factors of the running forward: one row of R numbers for each token, gate and LoRA
    scale in one.
    """

    def __init__(self):
        self.factor_MR: Tensor | None = None
        self.gradient = _Sum()
        self.rows_S: Tensor | None = None
        """Whose tokens the factors are, flat indices; None: of all."""
        self.behind: RankGate | None = None
        """The gate of layers that get the read-out tokens only (`core.last_layer`)."""
        self._calls = 0

    @contextmanager
    def bound(
        self,
        factor_MR: Tensor | None,
        rows_S: Tensor | None = None,
        factor_SR: Tensor | None = None,
    ) -> Iterator[None]:
        """Use these factors inside the block, and behind it those of the tokens read out, `rows_S`;
        what was bound before comes back after it.
        """
        own = last = _State(*_differentiable(factor_MR))
        if rows_S is not None:
            last = _State(*_differentiable(factor_SR), rows_S)
            # Batches of one shape, too, are read out in more places or fewer.
            for varying in (rows_S, last.factor_MR):
                if varying is not None:
                    _dynamo.maybe_mark_dynamic(varying, 0)
        with self._holding([own, last]):
            yield

    def recompute_context(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """For non-reentrant checkpointing: backward recomputes with the factors of *its* forward.

        Without it a second forward before the backward silently gives wrong gradients.
        """
        return nullcontext(), self._holding([gate._state for gate in self._gates])

    @property
    def calls(self) -> int:
        """Layers that have asked for factors since the count began, those behind included."""
        return sum(gate._calls for gate in self._gates)

    def count_anew(self) -> None:
        """Begin the count of calls."""
        for gate in self._gates:
            gate._calls = 0

    @property
    def _gates(self) -> list["RankGate"]:
        return [self] if self.behind is None else [self, self.behind]

    @property
    def _state(self) -> "_State":
        return _State(self.factor_MR, self.gradient, self.rows_S)

    @_state.setter
    def _state(self, state: "_State") -> None:
        self.factor_MR, self.gradient, self.rows_S = state

    @contextmanager
    def _holding(self, states: Sequence["_State"]) -> Iterator[None]:
        gates = self._gates
        before = [gate._state for gate in gates]
        for gate, state in zip(gates, states, strict=False):
            gate._state = state
        try:
            yield
        finally:
            for gate, state in zip(gates, before, strict=True):
                gate._state = state

    def applied(self, low_MR: Tensor) -> Tensor:
        """Rank-space activations (M, R) times the bound factors, token by token."""
        if self.factor_MR is None:
            raise RuntimeError(
                "iLoRA: a gated layer ran outside `RankGate.bound`; bind factors first"
            )
        if self.factor_MR.shape != low_MR.shape:
            raise RuntimeError(
                f"iLoRA: factors for {tuple(self.factor_MR.shape)}, "
                f"activations {tuple(low_MR.shape)}: expanded batches (beams) must repeat "
                "their factors"
            )
        if torch.compiler.is_compiling():  # traced, not called; and a compiler sums by itself
            return low_MR * self.factor_MR.to(low_MR.dtype)
        self._calls += 1
        return _Applied.apply(low_MR, self.factor_MR, self.gradient)


class _Sum:
    """The factors' gradient of one forward while a backward runs through its layers."""

    value: Tensor | None = None


class _State(NamedTuple):
    factor_MR: Tensor | None
    gradient: _Sum
    rows_S: Tensor | None = None


def _differentiable(factor_MR: Tensor | None) -> tuple[Tensor | None, _Sum]:
    """The factors as layers take them, and where the layers' gradients are summed."""
    gradient = _Sum()
    if factor_MR is not None and factor_MR.requires_grad and torch.is_grad_enabled():
        factor_MR = _Factors.apply(factor_MR, gradient)
    return factor_MR, gradient


class _Factors(torch.autograd.Function):
    """The factors as every layer takes them; its backward comes after those of all layers."""

    @staticmethod
    def forward(ctx, factor_MR: Tensor, gradient: _Sum) -> Tensor:
        ctx.gradient = gradient
        return factor_MR.view_as(factor_MR)

    @staticmethod
    def backward(ctx, grad_MR: Tensor) -> tuple[Tensor, None]:
        ctx.gradient.value = None  # a second backward through the same graph begins anew
        return grad_MR, None


class _Applied(torch.autograd.Function):
    """low · factor, whose backward adds each layer's part of the factors' gradient where the first
    has put it: one operation a layer where autograd would take a product and a sum.
    """

    @staticmethod
    def forward(ctx, low_MR: Tensor, factor_MR: Tensor, gradient: _Sum) -> Tensor:
        ctx.save_for_backward(low_MR, factor_MR)
        ctx.gradient = gradient
        # Cast here: a cast that autograd sees would hand the sum on before it is complete.
        return low_MR * factor_MR.to(low_MR.dtype)

    @staticmethod
    def backward(ctx, grad_MR: Tensor) -> tuple[Tensor, Tensor | None, None]:
        low_MR, factor_MR = ctx.saved_tensors
        into, found = ctx.gradient, None
        if ctx.needs_input_grad[1]:
            if into.value is None:
                into.value = found = (grad_MR * low_MR).to(factor_MR.dtype)
            elif factor_MR.dtype == low_MR.dtype:
                into.value.addcmul_(grad_MR, low_MR)
            else:
                into.value.add_(grad_MR * low_MR)
        return grad_MR * factor_MR.to(grad_MR.dtype), found, None


class GatedLinear(LoraVariant):
    """How an adapted layer of peft runs with the gate: W0 x + B (f ∘ A x), f the bound factors.

    It sits in the slot that peft's layers, dense and 4-bit, keep for variants of LoRA. Three
    operators beside the base layer: A's product, the factors, and one product that also adds.
    """

    def __init__(self, gate: RankGate):
        self.gate = gate
        self.rounded: tuple[Tensor, Tensor] | None = None
        """A and B as `round_adapters` holds them; None: as they are."""

    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """Output (..., d_out) of the layer whose base layer gave `result` for `x` (..., d_in)."""
        first, second = self.rounded or (
            module.lora_A[active_adapter].weight,
            module.lora_B[active_adapter].weight,
        )
        # Some backbones flatten (B, T, d) to (B·T, d) before a layer; both have a row per token.
        x_MD = module.lora_dropout[active_adapter](x).flatten(0, -2)
        if not torch.is_autocast_enabled(x.device.type):
            x_MD = x_MD.to(first.dtype)
        low_MR = self.gate.applied(F.linear(x_MD, first))
        if result.dtype != low_MR.dtype:  # behind a norm that peft holds in fp32
            return result + F.linear(low_MR, second).view_as(result)
        # Out of place: behind a layer with a bias the in-place form makes autograd copy.
        added = torch.addmm(result.flatten(0, -2), low_MR, second.t())
        return added.view_as(result)

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("iLoRA: every instance has its own mixture; there is nothing to merge")

    merge_safe = merge_unsafe = unmerge = _refuse


class _Rounded(torch.autograd.Function):
    """All tensors in another dtype: one operation for all of them, and one for their gradients."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        return _all_in(dtype, tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_all_in(ctx.dtype, gradients)


def _all_in(dtype: torch.dtype, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    sizes = [tensor.numel() for tensor in tensors]
    parts = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device).split(sizes)
    copies = tuple(part.view(t.shape) for part, t in zip(parts, tensors, strict=True))
    torch._foreach_copy_(copies, tensors)
    return copies


def round_adapters(layers: Sequence[LoraLayer], dtype: torch.dtype | None) -> None:
    """Have the adapters of the coming forward in `dtype`; gradients reach their fp32 weights.

    Autocast does the same weight by weight, twice a layer and twice again in the backward: several
    hundred small operations a step. None leaves it to autocast.
    """
    weights = [(x.lora_A["default"].weight, x.lora_B["default"].weight) for x in layers]
    copies = None
    if dtype is not None:
        copies = _Rounded.apply(dtype, *(weight for pair in weights for weight in pair))
    for index, layer in enumerate(layers):
        pair = None if copies is None else (copies[2 * index], copies[2 * index + 1])
        layer.lora_variant["default"].rounded = pair


def token_factors(gate_GK: Tensor, gate_rows_M: Tensor, settings: TeacherSettings) -> Tensor:
    """Factors (M, R) for each token of a batch: alpha / (R/K) · g_k on the ranks of expert k.

    `gate_rows_M` names each token's row of the gates (G, K); G = no gate, the factors are 0, as on
    padding. peft would scale by alpha / R; with a uniform gate this is plain LoRA.
    """
    share = settings.lora_r // settings.num_experts
    factor_GR = (gate_GK * (settings.lora_alpha / share)).repeat_interleave(share, 1)
    # An embedding's backward sums in a fixed order, that of an index does not on a GPU.
    return F.embedding(gate_rows_M, F.pad(factor_GR, (0, 0, 0, 1)))


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
    for layer in lora_layers(model):
        if layer.lora_variant:
            raise RuntimeError("iLoRA: DoRA and other variants bypass the gate; use plain LoRA")
        layer.lora_variant["default"] = GatedLinear(gate)
        # Else peft casts the input to the adapters' precision: for fp32 adapters under autocast a
        # copy twice the size, which autocast rounds again.
        layer.cast_input_dtype_enabled = False
    return model


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Every layer that peft has adapted."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def adapted_layers(model: nn.Module) -> list[LoraLayer]:
    """The gated layers of a model. Raises RuntimeError for an adapter that goes round the gate."""
    layers = lora_layers(model)
    for layer in layers:
        if layer.merged or not isinstance(layer.lora_variant.get("default"), GatedLinear):
            raise RuntimeError(
                "iLoRA: merged adapters and LoRA variants bypass the gate; use plain LoRA"
            )
    return layers

"""Counts the arithmetic and the traffic of live operators, and reads a backbone's sizes.

Worker side: imports torch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.profile.arithmetic import Backbone
from core import last_layer

ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""Operators that write nothing."""


class Arithmetic(TorchDispatchMode):
    """FLOPs by torch's own formulas, and bytes of the inputs and outputs of every operator.

    Views move nothing. What was held in a cache, or fused in one kernel, was not moved either, so
    the bytes are an upper bound.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.bytes = 0
        self.product_bytes = 0
        """Of those, the bytes of operators that have FLOPs."""
        self.head_flops = 0
        """Of the forward outside the backbone."""
        self.inside_backbone = False
        self._formulas = {**flop_counter.flop_registry, **_further_formulas()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Inference mode hands over composite operators (linear, matmul) whole; otherwise they have
        # been taken apart already.
        with self:
            taken_apart = func.decompose(*args, **(kwargs or {}))
        if taken_apart is not NotImplemented:
            return taken_apart
        result = func(*args, **(kwargs or {}))
        moved = 0
        if not _moves_nothing(func):
            moved = sum(map(_bytes, _tensors((args, kwargs)))) + sum(map(_bytes, _tensors(result)))
            self.bytes += moved
        if formula := self._formulas.get(func.overloadpacket):
            self.product_bytes += moved
            flops = formula(*args, **(kwargs or {}), out_val=result)
            self.flops += flops
            in_backward = torch._C._current_graph_task_id() != -1
            if not (in_backward or self.inside_backbone):
                self.head_flops += flops
        return result


def _further_formulas() -> dict[Any, Any]:
    """Attention on the CPU and products with 4-bit weights, which torch's registry leaves out."""
    aten, registry = torch.ops.aten, flop_counter.flop_registry
    flash = "_scaled_dot_product_flash_attention"
    formulas = {
        getattr(aten, f"{flash}_for_cpu{end}"): registry[getattr(aten, f"{flash}{end}")]
        for end in ("", "_backward")
    }
    for name in ("gemm_4bit", "gemv_4bit"):  # there as soon as bitsandbytes is loaded
        if packed := getattr(torch.ops.bitsandbytes, name, None):
            formulas[packed] = _packed_product
    return formulas


def _packed_product(factor: Tensor, packed: Tensor, shape: list[int], *_: Any, **__: Any) -> int:
    """FLOPs of (..., K) times a 4-bit weight of `shape` (N, K)."""
    rows, outputs = factor.numel() // factor.shape[-1], shape[0]
    return 2 * rows * factor.shape[-1] * outputs


def _moves_nothing(func: Any) -> bool:
    if func.overloadpacket.__name__ in ALLOCATES:
        return True
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


def _bytes(tensor: Tensor) -> int:
    """What there is to read or write of a tensor; an expanded one is smaller than it looks."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def backbone_sizes(backbone: nn.Module) -> Backbone:
    """The sizes of a backbone with adapters, from its live layers."""
    weights, lora = _sizes([backbone])
    weights_behind, lora_behind = _sizes(last_layer.behind(backbone))
    config: Any = backbone.config
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = config.num_hidden_layers
    return Backbone(weights, lora, layers, heads * head_width, weights_behind, lora_behind)


def _sizes(parts: Sequence[nn.Module]) -> tuple[int, int]:
    """Weights of the matrix products in these modules, and those of their adapters."""
    weights = lora = 0
    for name, module in (pair for part in parts for pair in part.named_modules()):
        if isinstance(module, nn.Linear):
            size = module.in_features * module.out_features  # of 4-bit weights no shape tells
            if "lora_A." in name or "lora_B." in name:
                lora += size
            else:
                weights += size
    return weights, lora

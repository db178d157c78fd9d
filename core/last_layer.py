"""The last decoder layer behind its attention: for the tokens that are read out, and no others.

Shapes: R rows of a batch, L tokens of a row, S answers, H backbone width.

Only the read-out states leave the backbone, so the last output projection, the last feed-forward
and the final norm need these S tokens alone: exact, three quarters of a layer saved in a forward
and in its backward. The attention itself stays as it is, whatever its kernel.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from core.ilora import GatedLinear, RankGate, lora_layers


def _llama(layer: Any, hidden_RLH: Tensor, rows_S: Tensor, **options: Any) -> Tensor:
    mixed_SH, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_RLH), **options)
    hidden_SH = of(hidden_RLH, rows_S) + mixed_SH
    return hidden_SH + layer.mlp(layer.post_attention_layernorm(hidden_SH))


def _opt(
    layer: Any, hidden_RLH: Tensor, rows_S: Tensor, use_cache: bool = False, **options: Any
) -> Tensor:
    normed_RLH = layer.self_attn_layer_norm(hidden_RLH)
    mixed_SH, _ = layer.self_attn(hidden_states=normed_RLH, **options)
    hidden_SH = of(hidden_RLH, rows_S) + mixed_SH
    expanded = layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden_SH)))
    return hidden_SH + layer.fc2(expanded)


KNOWN: dict[str, tuple[Callable[..., Tensor], str, tuple[str, ...]]] = {
    "LlamaDecoderLayer": (_llama, "o_proj", ("mlp",)),
    "MistralDecoderLayer": (_llama, "o_proj", ("mlp",)),
    "Qwen2DecoderLayer": (_llama, "o_proj", ("mlp",)),
    "OPTDecoderLayer": (_opt, "out_proj", ("fc1", "fc2")),
}
"""By layer of transformers: its forward for some tokens, the projection behind its attention, and
what else comes behind. Other layers run whole."""


def of(hidden_RLH: Tensor, rows_S: Tensor) -> Tensor:
    """States (S, H) of the tokens with these flat indices."""
    return hidden_RLH.flatten(0, 1).index_select(0, rows_S)


def behind(backbone: nn.Module) -> list[nn.Module]:
    """What of the last layer comes behind its attention, the projection first; none where the layer
    is not one of `KNOWN`.
    """
    layer = _last(backbone)
    if not _known(layer):
        return []
    _, projection, others = KNOWN[type(layer).__name__]
    return [layer.self_attn.get_submodule(projection), *map(layer.get_submodule, others)]


def read_out_only(backbone: nn.Module, gate: RankGate) -> bool:
    """Have the last layer of an adapted backbone give (S, H) whenever the gate is bound with the
    tokens that are read out; whether it does.
    """
    layer = _last(backbone)
    if not _known(layer):
        return False
    parts, forward, whole = behind(backbone), KNOWN[type(layer).__name__][0], layer.forward
    gate.behind = last = RankGate()

    def chosen(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs if last.rows_S is None else (of(inputs[0], last.rows_S),)

    parts[0].register_forward_pre_hook(chosen)
    for adapted in itertools.chain.from_iterable(map(lora_layers, parts)):
        adapted.lora_variant["default"] = GatedLinear(last)

    @functools.wraps(whole)
    def run(hidden_states: Tensor, **options: Any) -> Tensor:
        if last.rows_S is None:
            return whole(hidden_states, **options)
        return forward(layer, hidden_states, last.rows_S, **options)

    layer.forward = run
    return True


def _last(backbone: nn.Module) -> Any:
    layers = next(m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m))
    return layers[-1]


def _known(layer: nn.Module) -> bool:
    # OPT-350m norms behind its parts, another sum.
    return type(layer).__name__ in KNOWN and getattr(layer, "do_layer_norm_before", True)

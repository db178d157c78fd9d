"""Operators and saved activations of a backbone's step in a real model's shape, counted on fake
tensors: nothing is computed or stored, every machine counts the same.

Shapes: B users, T tokens, H width, K experts, R ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from core import ilora, llm
from core.settings import TeacherSettings
from perf.old_way import Bound, expert_axis, rank_space

META = torch.device("meta")
USERS, TOKENS = 4, 100
LAYERS = {
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
"""All linear layers, as iLoRA adapts them."""
NO_WORK = (
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view",
    "detach",
)  # fmt: skip
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Embeddings (B, T, H), mixture weights (B, K), each token's gate (B·T,) -> hidden states."""
Form = Callable[[TeacherSettings], tuple[nn.Module, Forward]]


class DeviceOperators(TorchDispatchMode):
    """Counts operators that launch work on a device: no views, no bare allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        name = func.overloadpacket.__name__
        launching = func.namespace == "aten" and not views and name not in NO_WORK
        self.count += launching
        return func(*args, **(kwargs or {}))


def settings_for(preset: str, experts: int = 4, rank: int = 16) -> TeacherSettings:
    """Adapters of rank 16 on every linear layer of a preset."""
    family = llm.PRESETS[preset]["model_type"]
    return TeacherSettings(
        llm_model_name=preset, target_modules=LAYERS[family], lora_r=rank, num_experts=experts
    )


def _backbone(settings: TeacherSettings) -> nn.Module:
    return llm.load_backbone(settings, "bf16-true", META, seed=0)


def present(settings: TeacherSettings) -> tuple[nn.Module, Forward]:
    """`core`'s form, adapters in the backbone's dtype as `bf16-true` trains them."""
    gate = ilora.RankGate()
    model = ilora.add_adapters(_backbone(settings), settings, gate).to(torch.bfloat16)

    def forward(embeds_BTH: Tensor, gate_BK: Tensor, gate_rows_M: Tensor) -> Tensor:
        factors = ilora.token_factors(gate_BK, gate_rows_M, settings)
        with gate.bound(factors.to(embeds_BTH.dtype)):
            return _last_hidden(model, embeds_BTH)

    return model, forward


def stock(settings: TeacherSettings) -> tuple[nn.Module, Forward]:
    """Stock peft with the gate folded in by a hook, adapters in the backbone's dtype."""
    bound = Bound()
    model = rank_space(_backbone(settings), None, settings, bound).to(torch.bfloat16)
    return model, _old_forward(model, settings, bound)


def expert_form(settings: TeacherSettings) -> tuple[nn.Module, Forward]:
    """As iLoRA was released: an expert axis, adapters in fp32."""
    bound = Bound()
    adapted = ilora.add_adapters(_backbone(settings), settings, ilora.RankGate())
    model = expert_axis(_backbone(settings), adapted.float(), settings, bound)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("_KRD", "_KDR")))
    return model, _old_forward(model, settings, bound)


def _old_forward(model: nn.Module, settings: TeacherSettings, bound: Bound) -> Forward:
    def forward(embeds_BTH: Tensor, gate_BK: Tensor, gate_rows_M: Tensor) -> Tensor:
        bound.bind(gate_BK, TOKENS, settings.lora_r)
        return _last_hidden(model, embeds_BTH)

    return forward


def _last_hidden(model: nn.Module, embeds_BTH: Tensor) -> Tensor:
    # Without a mask of its own transformers looks into the positions, and here they hold nothing.
    mask = torch.empty(1, 1, TOKENS, TOKENS, dtype=embeds_BTH.dtype)
    given = {"inputs_embeds": embeds_BTH, "attention_mask": mask, "use_cache": False}
    positions = torch.arange(TOKENS).expand(USERS, -1)
    return model(**given, position_ids=positions).last_hidden_state


FORMS = {"present": present, "stock peft": stock, "expert axis": expert_form}


def counts(preset: str, form: str, experts: int = 4) -> dict[str, int]:
    """`operators` of forward and backward, and `saved_bytes_per_token` between them; weights, which
    live anyway, are not counted among the saved.
    """
    settings = settings_for(preset, experts)
    model, forward = FORMS[form](settings)
    with FakeTensorMode():
        return _counts(_fake(model).train(), forward, settings)


def _fake(model: nn.Module) -> nn.Module:
    """Fake CPU tensors in the place of meta ones: on a meta device attention is taken apart into
    products and a softmax, which neither a CPU nor a GPU does.
    """
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    given = isinstance(tensor, nn.Parameter)
                    held[name] = nn.Parameter(fake, tensor.requires_grad) if given else fake
    return model


def _counts(model: nn.Module, forward: Forward, settings: TeacherSettings) -> dict[str, int]:
    width = llm.PRESETS[settings.llm_model_name]["hidden_size"]
    embeds_BTH = torch.empty(USERS, TOKENS, width, dtype=torch.bfloat16)
    embeds_BTH.requires_grad_()  # as with trained item tokens in the prompt
    gate_BK = torch.empty(USERS, settings.num_experts, requires_grad=True)
    gate_rows_M = torch.arange(USERS).repeat_interleave(TOKENS)
    weights = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in weights:
            saved[storage] = tensor  # kept, so that no other storage takes its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), DeviceOperators() as operators:
        forward(embeds_BTH, gate_BK, gate_rows_M).backward(torch.empty_like(embeds_BTH))
    stored = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    return {
        "operators": operators.count,
        "saved_bytes_per_token": stored // (USERS * TOKENS),
    }

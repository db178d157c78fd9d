"""The gate against a loop over experts, plain peft LoRA, checkpointing, and what it refuses."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tiny import CPU, FAMILIES, close
from torch import nn

from core import ilora, llm
from core.config import InputError
from core.settings import TeacherSettings

TARGETS = {
    "tiny": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "tiny-llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "tiny-qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
EXPERTS, RANK, ALPHA, WIDTH = 4, 8, 32.0, 128
LENGTHS = torch.tensor([6, 3, 5])


def make_settings(family: str = "tiny", **given) -> TeacherSettings:
    return TeacherSettings(**{"llm_model_name": family, "target_modules": TARGETS[family]} | given)


def build(
    given: TeacherSettings, dtype: torch.dtype = torch.float32, reentrant: bool | None = None
):
    """A backbone with adapters that act; `reentrant`: checkpointed as a naive user would."""
    torch.manual_seed(0)
    gate = ilora.RankGate()
    backbone = llm.load_backbone(given, "fp32", CPU, seed=0)
    if reentrant is None:
        ilora.recompute_layers(backbone, given, gate)
    else:
        backbone.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = ilora.add_adapters(backbone, given, gate)
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    return model.to(dtype).train(), gate


def inputs(dtype: torch.dtype, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (3, 6, H) and gate logits (3, K), both leaves."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 6, WIDTH, generator=random, dtype=dtype, requires_grad=True)
    logits = torch.randn(3, EXPERTS, generator=random, dtype=dtype, requires_grad=True)
    return x, logits


def read_out(model, x: torch.Tensor) -> torch.Tensor:
    """Something of every real token, so that all gates matter."""
    hidden = model(inputs_embeds=x).last_hidden_state
    weight = torch.linspace(-1, 1, WIDTH, dtype=x.dtype)
    real = torch.arange(6) < LENGTHS[:, None]
    return (hidden @ weight)[real]


def adapters(model) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def with_loop(model, gate_BK: torch.Tensor):
    """Put y = W0 x + s Σ_k g_k B_k (A_k x), s = alpha / (R/K), in place of peft's forward."""
    share = RANK // EXPERTS
    for layer in ilora.adapted_layers(model):
        first, second = layer.lora_A["default"], layer.lora_B["default"]

        def loop(x, layer=layer, first=first, second=second):
            y = layer.base_layer(x)
            for k in range(EXPERTS):
                own = slice(k * share, (k + 1) * share)
                expert = x @ first.weight[own].t() @ second.weight[:, own].t()
                tokens = expert.shape[0] * (expert.shape[1] if expert.dim() == 3 else 1)
                g = gate_BK[:, k].repeat_interleave(tokens // 3).view(*expert.shape[:-1], 1)
                y = y + ALPHA / share * g * expert
            return y

        layer.forward = loop
    return model


def gradients(output: torch.Tensor, wrt: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weight = torch.linspace(1, 2, len(output), dtype=output.dtype)
    found = torch.autograd.grad((output * weight).square().sum(), list(wrt.values()))
    return dict(zip(wrt, found, strict=True))


def factors_of(gate_BK: torch.Tensor, lengths: torch.Tensor = LENGTHS) -> torch.Tensor:
    """Factors of rows of six tokens, one gate a row, none on padding."""
    row = torch.arange(len(gate_BK))[:, None]
    gate_rows = torch.where(torch.arange(6) < lengths[:, None], row, len(gate_BK))
    return ilora.token_factors(gate_BK, gate_rows.flatten(), make_settings())


def gated(model, gate, x, logits) -> torch.Tensor:
    factors = factors_of(logits.softmax(-1))
    with gate.bound(factors):
        return read_out(model, x)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("adapter", "dtype", "tolerance"),
    [("lora", torch.float64, 1e-12), ("lora", torch.float32, 2e-5), ("qlora", torch.float32, 2e-5)],
)
def test_the_gate_is_a_loop_over_experts(family, adapter, dtype, tolerance):
    given = make_settings(family, adapter=adapter)
    model, gate = build(given, dtype)
    assert bool(llm.four_bit_layers(model)) == (adapter == "qlora")
    x, logits = inputs(dtype)
    output = gated(model, gate, x, logits)
    found = gradients(output, {"x": x, "logits": logits, **adapters(model)})
    assert gate.calls == len(ilora.adapted_layers(model)) == 2 * len(TARGETS[family])

    looped = with_loop(build(given, dtype)[0], logits.softmax(-1))
    wanted = read_out(looped, x)
    wanted_gradients = gradients(wanted, {"x": x, "logits": logits, **adapters(looped)})
    assert close(output, wanted, tolerance)
    assert found.keys() == wanted_gradients.keys()
    for name, gradient in found.items():
        assert gradient.any(), name
        assert close(gradient, wanted_gradients[name], 10 * tolerance), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_a_uniform_gate_is_plain_peft_lora(family, adapter):
    given = make_settings(family, adapter=adapter)
    model, gate = build(given)
    x, _ = inputs(torch.float32)
    found = gated(model, gate, x, torch.zeros(3, EXPERTS))
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS[family])
    )
    plain = get_peft_model(llm.load_backbone(given, "fp32", CPU, seed=0), config).train()
    state = {name: p.data for name, p in adapters(model).items()}
    missing = plain.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert close(found, read_out(plain, x), 1e-6)


def test_the_gated_forward_is_each_users_merged_weight():
    model, gate = build(make_settings(), torch.float64)
    x, logits = inputs(torch.float64)
    layer = ilora.adapted_layers(model)[0]
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with gate.bound(factors_of(logits.softmax(-1))):
        found = layer(x)
    for user, length in enumerate(LENGTHS):
        g = (EXPERTS * logits.softmax(-1))[user].repeat_interleave(RANK // EXPERTS)
        merged = layer.base_layer.weight + ALPHA / RANK * second @ torch.diag(g) @ first
        wanted = x[user] @ merged.t() + layer.base_layer.bias
        assert close(found[user, :length], wanted[:length], 1e-12)


@pytest.mark.parametrize("chosen", range(EXPERTS))
def test_experts_without_weight_get_no_gradient(chosen):
    model, gate = build(make_settings())
    x, _ = inputs(torch.float32)
    one_hot = torch.zeros(3, EXPERTS)
    one_hot[:, chosen] = 1
    with gate.bound(factors_of(one_hot)):
        found = gradients(read_out(model, x), adapters(model))
    own = torch.zeros(RANK, dtype=torch.bool)
    own[2 * chosen : 2 * chosen + 2] = True
    for name, gradient in found.items():
        by_rank = gradient if "lora_A" in name else gradient.t()
        assert by_rank[own].any(1).all(), name
        assert not by_rank[~own].any(), name


def test_factors_belong_to_tokens_and_leave_padding_out():
    gate_BK = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0]])
    found = factors_of(gate_BK, torch.tensor([2, 6])).view(2, 6, 8)
    assert torch.allclose(found[0, 0], 16 * torch.tensor([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4]))
    assert torch.equal(found[0, 0], found[0, 1])
    assert not found[0, 2:].any()
    assert torch.equal(found[1], torch.tensor([16.0, 16, 0, 0, 0, 0, 0, 0]).expand(6, 8))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_one_sum_of_the_layers_gradients_is_what_autograd_adds_up(monkeypatch, family, low):
    """Also where the factors are held in another dtype than the activations, and a second time
    through the same graph.
    """
    found = {}
    for plain in (False, True):
        model, gate = build(make_settings(family))
        if plain:
            monkeypatch.setattr(
                gate, "applied", lambda x, gate=gate: x * gate.factor_MR.to(x.dtype)
            )
        x, logits = inputs(torch.float32)
        with torch.autocast("cpu", dtype=low, enabled=low != torch.float32):
            output = gated(model, gate, x, logits).float().square().sum()
        once = torch.autograd.grad(output, [logits, x], retain_graph=True)
        again = torch.autograd.grad(output, [logits, x])
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        found[plain] = once
    for one, other in zip(found[False], found[True], strict=True):
        assert one.any() and close(one, other, 1e-5 if low == torch.float32 else 2e-2)


# ---- checkpointing ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize("forwards", [1, 2])
def test_checkpointing_changes_no_gradient(family, adapter, forwards):
    """Two forwards, one backward: each layer is recomputed with the gate of its own forward."""
    found = {}
    for checkpointing in (False, True):
        given = make_settings(family, adapter=adapter, gradient_checkpointing=checkpointing)
        model, gate = build(given)
        parts = [inputs(torch.float32, seed) for seed in range(forwards)]
        output = torch.cat([gated(model, gate, *part) for part in parts])
        after_forward = gate.calls
        named = {
            f"{kind}{i}": t for i, p in enumerate(parts) for kind, t in zip("xg", p, strict=True)
        }
        found[checkpointing] = gradients(output, named | adapters(model))
        assert (gate.calls == 2 * after_forward) == checkpointing  # it did recompute
    for name, gradient in found[False].items():
        assert close(found[True][name], gradient, 1e-6), name


def naive_two_forwards(bound_in_backward: bool) -> dict[str, torch.Tensor]:
    """Two forwards, one backward, checkpointed without `recompute_context`."""
    model, gate = build(make_settings(gradient_checkpointing=True), reentrant=False)
    parts = [inputs(torch.float32, seed) for seed in range(2)]
    output = torch.cat([gated(model, gate, *part) for part in parts])
    if not bound_in_backward:
        return gradients(output, adapters(model))
    last = factors_of(parts[-1][1].softmax(-1).detach())
    with gate.bound(last.requires_grad_()):
        return gradients(output, adapters(model))


def test_checkpointing_without_the_context_would_be_wrong():
    """The reason for `recompute_context`: an error at best, silently wrong gradients at worst."""
    with pytest.raises(RuntimeError, match=r"outside `RankGate\.bound`"):
        naive_two_forwards(bound_in_backward=False)
    model, gate = build(make_settings())
    parts = [inputs(torch.float32, seed) for seed in range(2)]
    right = gradients(torch.cat([gated(model, gate, *p) for p in parts]), adapters(model))
    wrong = naive_two_forwards(bound_in_backward=True)
    assert max((wrong[n] - right[n]).norm() / right[n].norm() for n in right) > 0.1


def test_pefts_own_checkpointing_would_lose_the_gate():
    """The reason for handing `recompute_context` to peft's preparation of a 4-bit backbone."""
    given, gate = make_settings(adapter="qlora"), ilora.RankGate()
    backbone = prepare_model_for_kbit_training(llm.load_backbone(given, "fp32", CPU, seed=0))
    model = ilora.add_adapters(backbone, given, gate).train()
    output = gated(model, gate, *inputs(torch.float32))
    with pytest.raises(RuntimeError, match=r"outside `RankGate\.bound`"):
        output.sum().backward()


def test_factors_come_back_after_nested_blocks_and_errors():
    gate, outer, inner = ilora.RankGate(), torch.ones(1), torch.zeros(1)
    with gate.bound(outer):
        with pytest.raises(KeyError), gate.bound(inner):
            assert gate.factor_MR is inner
            raise KeyError
        assert gate.factor_MR is outer
        context = gate.recompute_context()[1]
    assert gate.factor_MR is None
    with context:
        assert gate.factor_MR is outer
    assert gate.factor_MR is None


# ---- what is refused ----


def test_a_forward_without_a_gate_is_an_error():
    model, _ = build(make_settings())
    with pytest.raises(RuntimeError, match="bind factors first"):
        read_out(model, inputs(torch.float32)[0])


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_gate_for_another_number_of_rows_is_an_error(rows):
    """One row would otherwise broadcast silently over expanded beams."""
    model, gate = build(make_settings())
    uniform = torch.full((rows, EXPERTS), 1 / EXPERTS)
    factors = factors_of(uniform, torch.full((rows,), 6))
    with gate.bound(factors), pytest.raises(RuntimeError, match="must repeat their factors"):
        read_out(model, inputs(torch.float32)[0])


def test_what_goes_round_the_gate_is_refused():
    model, _ = build(make_settings())
    assert len(ilora.adapted_layers(model)) == 12
    with pytest.raises(RuntimeError, match="nothing to merge"):
        model.merge_adapter()
    config = LoraConfig(r=8, target_modules=["q_proj"], use_dora=True)
    dora = get_peft_model(llm.load_backbone(make_settings(), "fp32", CPU, 0), config)
    with pytest.raises(RuntimeError, match="bypass the gate"):
        ilora.adapted_layers(dora)


def test_a_target_no_layer_bears_is_named():
    with pytest.raises(InputError, match=r"teacher\.target_modules: .*query_projection"):
        build(make_settings(target_modules=("query_projection",)))


def test_experts_must_divide_the_rank():
    with pytest.raises(ValueError, match="lora_r 9 is not a multiple of num_experts 4"):
        TeacherSettings(lora_r=9)


# ---- routers ----


@pytest.mark.parametrize("kind", ["linear", "mlp", "resnet"])
def test_routers_give_rows_on_the_simplex(kind):
    torch.manual_seed(0)
    router = ilora.build_router(make_settings(gate=kind), 64).eval()
    state = 30 * torch.randn(5, 64)
    found = ilora.gate_weights(router, state)
    assert found.shape == (5, EXPERTS)
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    assert close(found.sum(1), torch.ones(5), 1e-6)
    for row in range(5):  # in evaluation no row depends on its neighbours
        assert close(ilora.gate_weights(router, state[row : row + 1])[0], found[row], 1e-4)


def test_the_gate_stays_fp32_under_autocast():
    torch.manual_seed(0)
    router = ilora.build_router(make_settings(), 64)
    state = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert router(state).dtype == torch.bfloat16  # what would happen without the guard
        found = ilora.gate_weights(router, state.bfloat16())
    assert found.dtype == torch.float32
    exact = router(state.bfloat16().float()).softmax(-1)
    assert torch.equal(found, exact)
    assert (found.sum(1) - 1).abs().max() < 1e-6


def test_the_resnet_router_has_the_size_of_the_released_one():
    router = ilora.ResNetRouter(4)
    assert sum(p.numel() for p in router.parameters()) == 90_772
    assert sum(name.endswith("running_var") for name, _ in router.named_buffers()) == 19


def test_the_resnet_router_ties_users_of_a_batch_in_training():
    torch.manual_seed(0)
    router = ilora.build_router(make_settings(gate="resnet"), 64).train()
    state = torch.randn(6, 64)
    together = ilora.gate_weights(router, state)
    fewer = ilora.gate_weights(router, state[:3])
    assert not close(together[:3], fewer, 1e-3)

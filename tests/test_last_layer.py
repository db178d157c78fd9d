"""The last layer for read-out tokens only: equal to the whole, cheaper by what it skips."""

import pytest
import tiny
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.profile import counting
from core import last_layer, llm
from core.ilora import RankGate
from core.observe import Observer
from core.settings import Settings
from core.teacher import Teacher, training_loss

# Projections before and behind the attention, and of the feed-forward.
TARGETS = {
    "tiny": ("q_proj", "out_proj", "fc1", "fc2"),
    "tiny-llama": ("q_proj", "o_proj", "up_proj", "down_proj"),
    "tiny-qwen2": ("v_proj", "o_proj", "gate_proj"),
}
ROWS = [0, 5, 11, 60, 61, 62, 100, 130]


def given(family: str, **teacher) -> Settings:
    return tiny.settings(llm_model_name=family, target_modules=TARGETS[family], **teacher)


def states_and_gradients(
    model: Teacher, settings: Settings, batches: list[list[int]]
) -> dict[str, torch.Tensor]:
    """Read-out states of all batches, and the gradients after one backward for them all."""
    model.train()
    made = [tiny.batch(model, settings, rows) for rows in batches]
    found = {str(rows): model.read_out(batch) for rows, batch in zip(batches, made, strict=True)}
    losses = [training_loss(model, batch, settings, 0.1, Observer()) for batch in made]
    sum(losses).backward()
    return found | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def whole(settings: Settings) -> Teacher:
    """A teacher whose last layer runs for all tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(last_layer, "KNOWN", {})
        model = tiny.teacher(settings)
    assert not model.reads_out_only
    return model


def differing(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    assert all(value.any() for value in wanted.values())
    return [name for name, value in wanted.items() if not tiny.close(found[name], value, 2e-5)]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["instance", "causal"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_states_and_gradients_are_those_of_the_whole_layer(family, mode, attn):
    settings = given(family, mode=mode, attn=attn)
    model = tiny.teacher(settings)
    assert model.reads_out_only
    wanted = states_and_gradients(whole(settings), settings, [[0, 5, 11]])
    assert not differing(states_and_gradients(model, settings, [[0, 5, 11]]), wanted)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_recomputed_layers_read_out_the_tokens_of_their_own_forward(family):
    """Two forwards before the backward, read out in different places."""
    batches = [ROWS[:3], ROWS[3:]]
    recomputed = given(family, gradient_checkpointing=True)
    wanted = states_and_gradients(whole(given(family)), given(family), batches)
    assert not differing(
        states_and_gradients(tiny.teacher(recomputed), recomputed, batches), wanted
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gates_of_other_tokens_would_show(family, monkeypatch):
    settings = given(family)
    model, reference = tiny.teacher(settings), whole(settings)
    bound = RankGate.bound

    def shuffled(self, factor_MR, rows_S=None, factor_SR=None):
        return bound(self, factor_MR, rows_S, None if factor_SR is None else factor_SR.roll(1, 0))

    monkeypatch.setattr(RankGate, "bound", shuffled)
    found = states_and_gradients(model, settings, [ROWS])
    wrong = differing(found, states_and_gradients(reference, settings, [ROWS]))
    assert str(ROWS) in wrong


def test_no_gate_at_all_would_show():
    """The layers behind have their own factors: unbound, they are a plain LoRA."""
    settings = given("tiny")
    model = tiny.teacher(settings)
    batch = tiny.batch(model, settings, ROWS)
    gated = model.read_out(batch)
    model.gate.behind.applied = lambda low_SR: low_SR
    assert not tiny.close(model.read_out(batch), gated, 1e-3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_skipped_is_the_part_behind_for_the_other_tokens(family):
    settings = given(family)
    model, reference = tiny.teacher(settings), whole(settings)
    batch = tiny.batch(model, settings, ROWS)
    flops = []
    for one in (model, reference):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            one.read_out(batch)
        flops.append(counter.get_total_flops())
    sizes = counting.backbone_sizes(model.backbone)
    behind = sizes.weights_behind + sizes.lora_behind
    skipped = batch["padded_tokens"] - len(batch["readout"])
    assert flops[1] - flops[0] == 2 * behind * skipped > 0.2 * flops[1]


def test_without_tokens_to_read_out_all_states_come_back():
    settings = given("tiny-llama")
    model, reference = tiny.teacher(settings), whole(settings)
    embeds_RLH = torch.randn(2, 7, model.width)
    factor_MR = torch.rand(2 * 7, settings.teacher.lora_r)
    with torch.no_grad(), model.gate.bound(factor_MR), reference.gate.bound(factor_MR):
        found = model.last_hidden(embeds_RLH)
        wanted = reference.last_hidden(embeds_RLH)
    assert found.shape == (2, 7, model.width)
    assert tiny.close(found, wanted)


def test_a_layer_that_norms_behind_its_parts_runs_whole(monkeypatch):
    """As OPT-350m's does."""
    shape = llm.PRESETS["tiny"] | {"do_layer_norm_before": False}
    monkeypatch.setitem(llm.PRESETS, "tiny", shape)
    settings = given("tiny")
    model = tiny.teacher(settings)
    assert not model.reads_out_only
    assert last_layer.behind(model.backbone) == []
    batch = tiny.batch(model, settings, ROWS)
    assert model.read_out(batch).shape == (len(ROWS), model.width)
    assert counting.backbone_sizes(model.backbone).weights_behind == 0


def test_a_layer_nobody_knows_runs_whole():
    class Strange(nn.Module):
        pass

    backbone = nn.Sequential(nn.ModuleList([Strange()]))
    assert not last_layer.read_out_only(backbone, RankGate())

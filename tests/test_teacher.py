"""The teacher: padding, gates, checkpointing, precision, checkpoints, frozen parts, scores."""

import weakref
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from perf.counters import Operators
from tiny import FAMILIES, close, encoder, pieces, prepared, queries
from transformers import AutoConfig, AutoModel

from core import item_scores, states, teacher
from core.config import InputError
from core.lightning import fit_lightning
from core.loop import Fit, adamw, autocast, fit_loop
from core.observe import Observer, parameter_dtypes
from core.ranking import held_out
from core.settings import Precision

ROWS = [0, 5, 11, 60, 61, 62, 100, 130]


def build(active: bool = True, precision: str = "fp32", **given):
    settings = tiny.settings(precision, **given)
    return tiny.teacher(settings, active), settings


def weights_hash(module: torch.nn.Module) -> list[bytes]:
    return [value.detach().numpy().tobytes() for value in module.state_dict().values()]


# ---- reading out ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_a_batch_of_many_equals_batches_of_one(family, adapter):
    """Short prompts stand beside long ones: neither padding nor neighbours reach the read-out."""
    model, settings = build(llm_model_name=family, adapter=adapter)
    with torch.no_grad():
        together = tiny.batch(model, settings, ROWS)
        assert len(set(lengths_of(together).tolist())) > 3
        found = model.read_out(together)
        for row, sample in enumerate(ROWS):
            alone = model.read_out(tiny.batch(model, settings, [sample]))
            assert close(found[row], alone[0], 1e-4)


def lengths_of(batch: dict) -> torch.Tensor:
    """Tokens of each row of one prompt."""
    return batch["readout"] % batch["ids"].shape[1] + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_at_the_padded_end_would_be_another(family):
    """What the read-out index guards against."""
    model, settings = build(llm_model_name=family)
    batch = tiny.batch(model, settings, ROWS)
    short = int(lengths_of(batch).argmin())
    width = batch["ids"].shape[1]
    with torch.no_grad():
        right = model.read_out(batch)[short]
        at_the_end = dict(batch, readout=torch.arange(1, len(ROWS) + 1) * width - 1)
        wrong = model.read_out(at_the_end)[short]
    assert (wrong - right).norm() / right.norm() > 0.1


def test_the_embeddings_at_the_slots_are_projected_item_rows():
    model, settings = build()
    batch = tiny.batch(model, settings, ROWS)
    seen = {}
    model.backbone.get_base_model().register_forward_pre_hook(
        lambda module, args, options: seen.update(options), with_kwargs=True
    )
    model.read_out(batch)
    embeds = seen["inputs_embeds"].flatten(0, 1)
    vectors = model.encoder.item_table.weight[batch["slot_items"]]
    assert close(embeds[batch["slot_positions"]], model.project(vectors))
    others = torch.ones(len(embeds), dtype=torch.bool)
    others[batch["slot_positions"]] = False
    plain = model.backbone.get_input_embeddings()(batch["ids"]).flatten(0, 1)
    assert torch.equal(embeds[others], plain[others])


@torch.no_grad()
def test_gates_go_with_their_rows():
    model, settings = build()
    order = [3, 0, 7, 1, 6, 2, 5, 4]
    found = model.read_out(tiny.batch(model, settings, ROWS))
    turned = model.read_out(tiny.batch(model, settings, [ROWS[i] for i in order]))
    assert close(turned, found[order], 1e-4)
    swapped = tiny.batch(model, settings, ROWS)
    swapped["states"] = swapped["states"][order]  # the same prompts under other gates
    assert (model.read_out(swapped) - found).norm() / found.norm() > 1e-3


@torch.no_grad()
def test_every_adapted_layer_asks_the_gate_once():
    model, settings = build(gradient_checkpointing=True)
    model.read_out(tiny.batch(model, settings, ROWS))
    assert model.call_counts()["gate"] == {"forward": 4, "after_backward": 4}
    assert model.call_counts()["first_layer"] == {"forward": 1, "after_backward": 1}


def test_a_prompt_longer_than_the_backbone_takes_is_bad_input():
    model, settings = build()
    model.backbone.config.max_position_embeddings = 20
    with pytest.raises(InputError, match=r"teacher\.max_history: a prompt of \d+ tokens; .* 20"):
        model.read_out(tiny.batch(model, settings, ROWS))


# ---- training ----


def trained_gradients(model, settings, batches, precision: str = "fp32") -> dict:
    model.train()
    with autocast(precision, tiny.CPU):
        loss = sum(
            teacher.training_loss(
                model, tiny.batch(model, settings, rows), settings, 0.1, Observer()
            )
            for rows in batches
        )
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize("batches", [[ROWS], [ROWS[:3], ROWS[3:]]])
def test_checkpointing_changes_no_gradient_of_the_teacher(adapter, batches):
    plain = trained_gradients(*build(adapter=adapter), batches)
    model, settings = build(adapter=adapter, gradient_checkpointing=True)
    found = trained_gradients(model, settings, batches)
    recomputed = model.call_counts()["first_layer"]["after_backward"]
    assert recomputed == 1 + len(batches)  # the last forward, then every batch's recomputation
    for name, gradient in plain.items():
        assert gradient is not None and gradient.any(), name
        assert close(found[name], gradient, 1e-5), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_adapters_rounded_together_train_as_under_autocast(
    monkeypatch, precision, adapter, checkpointing
):
    given = {"adapter": adapter, "gradient_checkpointing": checkpointing}
    model, settings = build(precision=precision, **given)
    found = trained_gradients(model, settings, [ROWS], precision)
    monkeypatch.setattr(teacher.Teacher, "_rounded_to", lambda *_: None)
    model, settings = build(precision=precision, **given)
    wanted = trained_gradients(model, settings, [ROWS], precision)
    for name, gradient in wanted.items():
        assert found[name].dtype == torch.float32
        assert close(found[name], gradient, 1e-5), name


def test_rounding_adapters_is_one_operation_each_way():
    """And not four for every layer."""
    counted = {}
    for rounded in (True, False):
        model, settings = build(precision="bf16-mixed", target_modules=("q_proj", "fc1"))
        if not rounded:
            model._rounded_to = lambda _: None
        batch = tiny.batch(model.train(), settings, ROWS)
        with Operators() as operators, autocast("bf16-mixed", tiny.CPU):
            teacher.training_loss(model, batch, settings, 0.0, Observer()).backward()
        counted[rounded] = operators.names["_to_copy"], operators.names["_foreach_copy_"]
    layers = 4
    assert counted[True][1] == 2
    assert counted[False] == (counted[True][0] + 4 * layers, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "fp16-true"])
@pytest.mark.parametrize("batches", [[ROWS], [ROWS[:3], ROWS[3:]]])
def test_peft_recomputes_a_four_bit_backbone_and_changes_no_gradient(precision, batches):
    """Against the same preparation, with its checkpointing off."""
    given = {"precision": precision, "adapter": "qlora", "gradient_checkpointing": None}
    plain, settings = build(**given)
    plain.backbone.get_base_model().gradient_checkpointing_disable()
    wanted = trained_gradients(plain, settings, batches, precision)
    model, settings = build(**given)
    found = trained_gradients(model, settings, batches, precision)
    assert model.checkpointing_by == "peft"
    assert plain.call_counts()["first_layer"] == {"forward": 1, "after_backward": 1}
    assert model.call_counts()["first_layer"]["after_backward"] == 1 + len(batches)
    for name, gradient in wanted.items():
        assert gradient.any(), name
        assert close(found[name], gradient, 1e-5), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("adapter", "asked", "by", "prepared"),
    [
        ("qlora", None, "peft", True),
        ("qlora", True, "setting", False),
        ("qlora", False, None, False),
        ("lora", None, None, False),
        ("lora", True, "setting", False),
    ],
)
def test_only_peft_left_alone_with_four_bit_prepares_the_backbone(
    family, adapter, asked, by, prepared
):
    model, settings = build(
        precision="bf16-mixed",
        adapter=adapter,
        gradient_checkpointing=asked,
        llm_model_name=family,
    )
    frozen = parameter_dtypes(model)["frozen"]
    assert ("float32" in frozen) == prepared
    assert ("bfloat16" in frozen) != prepared
    observer = Observer()
    teacher.describe(model, observer)
    assert observer.facts["gradient_checkpointing_by"] == by
    trained_gradients(model, settings, [ROWS], "bf16-mixed")
    runs = model.call_counts()["first_layer"]
    assert runs == {"forward": 1, "after_backward": 2 if by else 1}


def test_gradients_add_up_over_micro_batches():
    whole = trained_gradients(*build(distill_lambda=0.0), [ROWS])
    halves = trained_gradients(*build(distill_lambda=0.0), [ROWS[:4], ROWS[4:]])
    for name in (n for n in whole if n != "item_table"):
        assert close(halves[name] / 2, whole[name], 1e-4), name


@pytest.mark.parametrize("gate", ["mlp", "linear"])
def test_the_router_has_no_gradient_until_the_adapters_act(gate):
    fresh, settings = build(active=False, gate=gate)
    found = trained_gradients(fresh, settings, [ROWS])
    router = {n: g for n, g in found.items() if n.startswith("router")}
    assert router
    assert not any(g.any() for g in router.values())
    assert not any(g.any() for n, g in found.items() if "lora_A" in n)
    assert all(g.any() for n, g in found.items() if "lora_B" in n)  # they start it
    found = trained_gradients(*build(gate=gate), [ROWS])
    assert all(g.any() for n, g in found.items() if n.startswith("router"))


@torch.no_grad()
def test_fresh_adapters_do_nothing():
    model, settings = build(active=False)
    batch = tiny.batch(model, settings, ROWS)
    found = model.read_out(batch)
    with model.backbone.disable_adapter():
        assert torch.equal(model.read_out(batch), found)


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize("table", [True, False])
def test_a_short_training_lowers_the_loss_and_touches_nothing_frozen(adapter, table):
    model, settings = build(active=False, adapter=adapter, use_item_embeddings_head=table)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    encoder_before = weights_hash(model.encoder)
    batch = tiny.batch(model, settings, ROWS)
    optimizer = torch.optim.AdamW(model.trainable(), lr=3e-3, weight_decay=0.1)
    losses = []
    for _ in range(12):
        model.train()
        assert not model.encoder.training  # also inside fit
        optimizer.zero_grad()
        loss = teacher.training_loss(model, batch, settings, 0.1, Observer())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert weights_hash(model.encoder) == encoder_before
    assert all(p.grad is None and not p.requires_grad for p in model.encoder.parameters())
    assert frozen
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_the_encoder_is_outside_of_optimizer_and_checkpoint():
    model, _ = build()
    own = {id(p) for p in model.encoder.parameters()}
    assert not own & {id(p) for p in model.parameters()}
    assert not any("encoder" in name for name in model.state_dict())


def test_head_table_and_encoder_table_are_two_tensors():
    model, _ = build()
    table, start = model.item_table, model.encoder.item_table.weight
    assert torch.equal(table, start)
    assert table.data_ptr() != start.data_ptr() != model.item_table_start.data_ptr()
    assert table.data_ptr() != model.item_table_start.data_ptr()
    before = start.clone()
    assert model.reverse_distance("mse").item() == 0
    with torch.no_grad():
        table.add_(1)
    assert torch.equal(model.encoder.item_table.weight, before)
    assert model.reverse_distance("mse").item() == pytest.approx(1.0)


# ---- scores and loss ----


@torch.no_grad()
def test_scores_of_the_item_head_are_products_with_projected_rows():
    model, settings = build()
    state = model.read_out(tiny.batch(model, settings, ROWS))
    found = model.scores(state)
    assert found.shape == (len(ROWS), prepared().num_items + 1)
    for item in (1, 17, prepared().num_items):
        row = model.projector(model.item_table[item] * 4)  # √16, like SASRec's own input
        assert close(found[:, item], state @ row)
    candidates = torch.tensor([3, 1, prepared().num_items])
    assert close(model.scores(state, candidates), found[:, candidates])


@torch.no_grad()
def test_the_random_head_knows_no_student_embeddings():
    model, settings = build(use_item_embeddings_head=False)
    assert not hasattr(model, "item_table")
    assert model.reverse_distance("mse") is None
    state = model.read_out(tiny.batch(model, settings, ROWS))
    found = model.scores(state)
    assert close(found, state @ model.head.weight.t() + model.head.bias)
    candidates = torch.tensor([5, 2])
    assert close(model.scores(state, candidates), found[:, candidates])


@pytest.mark.parametrize("table", [True, False])
def test_the_loss_over_the_whole_catalogue_is_cross_entropy_of_items(table):
    model, settings = build(use_item_embeddings_head=table)
    batch = tiny.batch(model, settings, ROWS)
    logits = model.scores(model.read_out(batch))
    logits[:, 0] = float("-inf")
    wanted = F.cross_entropy(logits, batch["targets"])
    with torch.no_grad():
        found = teacher.training_loss(model, batch, settings, 0.0, Observer())
    assert close(found, wanted.detach())


@pytest.mark.parametrize("changes", [{}, {"use_item_embeddings_head": False}])
@pytest.mark.parametrize("candidates", [20, 2048])
def test_the_loss_in_parts_has_the_same_gradients(monkeypatch, changes, candidates):
    found = []
    for budget in (item_scores.SCORE_BYTES, 1):
        monkeypatch.setattr(item_scores, "SCORE_BYTES", budget)
        model, settings = build(train_candidates=candidates, **changes)
        torch.manual_seed(0)
        batch = tiny.batch(model, settings, ROWS)
        loss = teacher.training_loss(model, batch, settings, 0.1, Observer())
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.trainable())])
    for whole, parts in zip(*found, strict=True):
        assert close(parts, whole)


def test_the_loss_over_candidates_holds_targets_and_uniform_negatives(monkeypatch):
    model, settings = build(train_candidates=20)
    batch = tiny.batch(model, settings, ROWS)
    seen = []
    items = model.items
    monkeypatch.setattr(model, "items", lambda ids=None: seen.append(ids) or items(ids))
    everything = set()
    for _ in range(40):
        found = teacher.training_loss(model, batch, settings, 0.0, Observer())
        ids = seen.pop()
        assert len(ids) == 20
        assert set(batch["targets"].tolist()) <= set(ids.tolist())
        everything |= set(ids.tolist())
    unique = sorted(set(ids.tolist()))
    assert len(unique) < 20, "one drawn twice counts once"
    labels = torch.tensor([unique.index(t) for t in batch["targets"].tolist()])
    wanted = model.scores(model.read_out(batch), torch.tensor(unique))
    assert close(found, F.cross_entropy(wanted, labels))
    assert everything == set(range(1, prepared().num_items + 1))  # both ends, never padding


def test_the_reverse_distance_is_added_with_its_weight():
    model, settings = build()
    batch = tiny.batch(model, settings, ROWS)
    with torch.no_grad():
        model.item_table.add_(0.5)
        without = teacher.training_loss(model, batch, settings, 0.0, Observer())
        doubled = teacher.training_loss(model, batch, settings, 2.0, Observer())
    assert close(doubled - without, 2 * 0.25, 1e-4)


def test_the_weight_of_reverse_distillation_counts_optimizer_steps():
    settings = tiny.settings(distill_lambda=0.4, distill_min_lambda=0.1)
    assert [teacher.reverse_weight(settings, n, 10) for n in (0, 5, 10, 20)] == pytest.approx(
        [0.4, 0.25, 0.1, 0.1]
    )
    own = tiny.settings(distill_lambda=0.4, distill_decay_steps=5)
    assert teacher.reverse_weight(own, 5, 1000) == pytest.approx(0.0)


# ---- states of the encoder ----


@pytest.mark.parametrize("batch_size", [1, 5, 256])
@pytest.mark.parametrize("which", ["train", "validation", "test"])
def test_encoder_states_equal_one_history_at_a_time(batch_size, which):
    model = encoder()
    asked = queries() if which == "train" else held_out(prepared(), which)
    assert (asked.lengths > model.max_length).any()
    assert (asked.lengths < model.max_length).any()
    found = states.encoder_states(model, asked, batch_size)
    assert not found.requires_grad
    for row in range(len(asked)):
        items, lengths = asked.newest(np.array([row]), model.max_length)
        alone = model.last_state(torch.from_numpy(items), torch.from_numpy(lengths))
        assert close(found[row], alone[0].detach(), 1e-4)


def test_encoder_states_run_one_row_for_many_prefixes(monkeypatch):
    model, rows = encoder(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x: rows.append(len(x)) or forward(x))
    states.encoder_states(model, queries())
    windows = np.maximum(queries().lengths - model.max_length, 0)
    assert sum(rows) == len(set(zip(queries().users, windows, strict=True)))
    assert sum(rows) < 0.7 * len(queries())


# ---- rows follow samples ----


def outputs_by_sample(model, settings, rows=None) -> dict[int, tuple]:
    found = {}
    for batch, state, scores in teacher.infer(
        model, pieces(), queries(), settings, Observer(), rows
    ):
        for i, row in enumerate(batch["rows"].tolist()):
            assert row not in found
            found[row] = (int(batch["targets"][i]), state[i], scores[i])
    return found


@pytest.fixture(scope="module")
def reference():
    """Each sample's target, state and scores in the default order."""
    model, settings = build()
    return model, outputs_by_sample(model, settings)


def test_inference_answers_every_sample_with_its_own_target(reference):
    _, found = reference
    assert sorted(found) == list(range(len(queries())))
    cut = prepared()
    for sample, (target, _, scores) in found.items():
        assert target == queries().targets[sample]
        assert scores.shape == (cut.num_items + 1,)
        assert scores.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 9, 1000])
def test_the_batch_size_does_not_matter(reference, size):
    model, wanted = reference
    some = np.arange(0, len(queries()), 7)
    found = outputs_by_sample(model, tiny.settings(inference_batch_size=size), some)
    assert sorted(found) == some.tolist()  # a resumed run asks for what is missing only
    for sample, (target, state, scores) in found.items():
        assert target == wanted[sample][0]
        assert close(state, wanted[sample][1], 1e-4)
        assert close(scores, wanted[sample][2], 1e-4)


def test_scores_above_the_budget_come_in_parts(reference, monkeypatch):
    model, wanted = reference
    columns = prepared().num_items + 1
    monkeypatch.setattr(item_scores, "SCORE_BYTES", 5 * columns * item_scores.BYTES_EACH)
    some, sizes = np.arange(0, len(queries()), 7), []
    given = tiny.settings(inference_batch_size=12)
    for batch, state, scores in teacher.infer(model, pieces(), queries(), given, Observer(), some):
        sizes.append(batch["samples"])
        assert len(batch["rows"]) == len(batch["targets"]) == len(state) == len(scores)
        for i, row in enumerate(batch["rows"].tolist()):
            assert batch["targets"][i] == wanted[row][0]
            assert close(state[i], wanted[row][1], 1e-4)
            assert close(scores[i], wanted[row][2], 1e-4)
    assert sizes[:3] == [5, 5, 2] and sum(sizes) == len(some)


def test_states_are_made_once_for_a_split_and_anew_for_other_weights_or_queries(monkeypatch):
    made = []
    compute = states.encoder_states
    monkeypatch.setattr(
        states, "encoder_states", lambda *given: made.append(given) or compute(*given)
    )
    model, kept = encoder(), teacher.States()
    first, again = (kept.of(model, held_out(prepared(), "validation")) for _ in range(2))
    assert again is first and len(made) == 1
    other = kept.of(model, held_out(prepared(), "test"))
    assert len(made) == 2 and torch.equal(other, compute(model, held_out(prepared(), "test")))
    with torch.no_grad():
        model.item_table.weight.data[3] += 1  # past the version counter of autograd
    changed = kept.of(model, held_out(prepared(), "test"))
    assert len(made) == 3 and not torch.equal(changed, other)
    items = prepared().items.copy()
    swapped = replace(held_out(prepared(), "test"), items=items[::-1].copy())
    kept.of(model, swapped)
    assert len(made) == 4


@torch.no_grad()
def test_shuffled_training_batches_carry_their_own_rows(reference):
    model, wanted = reference
    wanted_states = states.encoder_states(model.encoder, queries())
    batches = tiny.batches(model, tiny.settings(), 7, seed=3, most=5)
    assert len(batches) == 5
    for index in range(len(batches)):
        batch = batches[index]
        assert torch.equal(batch["states"], wanted_states[batch["rows"]])
        found = model.read_out(batch)
        for i, row in enumerate(batch["rows"].tolist()):
            assert batch["targets"][i] == wanted[row][0]
            assert close(found[i], wanted[row][1], 1e-4)


def test_the_scorer_asks_the_settings_for_its_batch():
    model, settings = build(inference_batch_size=13)
    model.train()  # as validation finds it
    asked, observer = held_out(prepared(), "test"), Observer()
    rows = [rows for rows, _ in teacher.scorer(model, pieces(), settings, observer)(asked)]
    assert sorted(np.concatenate(rows)) == list(range(len(asked)))
    assert observer.facts["largest_batch"] == 13 == max(map(len, rows))
    assert not model.training


# ---- item embeddings ----


def test_item_embeddings_know_neither_adapters_nor_gate():
    fresh, _ = build(active=False)
    active, settings = build()
    found = teacher.item_embeddings(active, pieces())
    assert np.array_equal(found, teacher.item_embeddings(fresh, pieces()))
    assert not found[0].any()
    assert active.gate.factor_MR is None
    # Afterwards the adapters act and are trained as before.
    gradients = trained_gradients(active, settings, [ROWS])
    assert all(g.any() for n, g in gradients.items() if "lora_" in n)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_item_embeddings_are_the_mean_over_title_tokens(batch_size):
    model, _ = build(llm_model_name="tiny-llama")
    found = teacher.item_embeddings(model, pieces(), batch_size)
    for item in (1, 8, prepared().num_items):
        start, length = pieces().starts[item], pieces().lengths[item] - 1
        ids = torch.from_numpy(pieces().tokens[start : start + length].astype(np.int64))[None]
        with torch.no_grad(), model.backbone.disable_adapter():
            hidden = model.backbone(input_ids=ids).last_hidden_state
        assert close(found[item], hidden[0].mean(0), 1e-5)


# ---- precision and 4 bit ----


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize(
    ("precision", "trainable", "frozen"),
    [
        ("fp32", {"float32"}, {"float32"}),
        ("tf32", {"float32"}, {"float32"}),
        ("bf16-mixed", {"float32"}, {"bfloat16"}),
        ("bf16-true", {"bfloat16", "float32"}, {"bfloat16"}),
        ("fp16-mixed", {"float32"}, {"float16"}),
        ("fp16-true", {"float16", "float32"}, {"float16"}),
    ],
)
def test_precision_decides_the_dtypes(adapter, precision, trainable, frozen):
    model, settings = build(precision=precision, adapter=adapter)
    found = parameter_dtypes(model)
    assert found["trainable"].keys() == trainable
    assert found["frozen"].keys() == frozen | ({"uint8"} if adapter == "qlora" else set())
    kept = {n.split(".")[0] for n, p in model.named_parameters()
            if p.requires_grad and p.dtype == torch.float32}  # fmt: skip
    if precision.endswith("-true"):
        assert kept == {"router"}  # a half-precision softmax does not sum to one
    gradients = trained_gradients(model, settings, [ROWS], precision)
    assert all(g.isfinite().all() for g in gradients.values())
    assert any(g.any() for n, g in gradients.items() if n.startswith("router"))
    with torch.no_grad(), autocast(precision, tiny.CPU):
        state = model.read_out(tiny.batch(model, settings, ROWS))
        assert model.scores(state).dtype == torch.float32
    exact, _ = build(adapter=adapter)
    with torch.no_grad():
        wanted = exact.read_out(tiny.batch(exact, settings, ROWS))
    assert close(state, wanted, 0.15)


@pytest.mark.parametrize(
    ("precision", "gemm"),
    [
        ("fp32", "float32"),
        ("tf32", "float32"),
        ("bf16-mixed", "bfloat16"),
        ("bf16-true", "bfloat16"),
        ("fp16-mixed", "float16"),
        ("fp16-true", "float16"),
    ],
)
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_the_backbone_multiplies_in_the_dtype_that_was_asked_for(precision, gemm, adapter):
    model, settings = build(precision=precision, adapter=adapter)
    observer = Observer()
    batch = tiny.batch(model, settings, ROWS)
    with observer.first_step(), autocast(precision, tiny.CPU):
        teacher.training_loss(model.train(), batch, settings, 0.0, observer)
    # Twelve products of the backbone's own linears, two of each of the four adapters.
    assert observer.facts["gemm_dtypes"] == {gemm: 20}


@pytest.mark.parametrize(
    ("precision", "adapter"),
    # fp8 needs a GPU; how it trains on a CPU that pretends is in test_float8.
    [
        *((name, "lora") for name in get_args(Precision) if name != "fp8"),
        ("fp16-true", "qlora"),
    ],
)
def test_every_precision_trains_alike_under_both_trainers(precision, adapter):
    traces = [trained(fit, precision, adapter) for fit in (fit_loop, fit_lightning)]
    assert traces[0] == traces[1]
    assert len(traces[0]) == 24
    assert np.isfinite(traces[0]).all()
    assert np.mean(traces[0][-6:]) < 0.9 * traces[0][0]


def trained(run_fit, precision: str, adapter: str) -> list[float]:
    """Losses of two epochs of twelve steps from a fresh teacher."""
    model, settings = build(active=False, precision=precision, adapter=adapter)
    observer = Observer()
    fit = Fit(
        model=model,
        batches=lambda epoch: tiny.batches(model, settings, 6, seed=epoch, most=12),
        loss=lambda batch: teacher.training_loss(model, batch, settings, 0.1, observer),
        validate=lambda: {"ndcg@10": 0.0},
        save=lambda name: None,
        optimizer=adamw(model.trainable(), 3e-3, 0.01),
        device=tiny.CPU,
        max_epochs=2,
        patience=5,
        precision=precision,
        gradient_clip_val=1.0,
    )
    run_fit(fit, observer)
    return observer.loss_trace()


@pytest.mark.parametrize("family", FAMILIES)
def test_four_bit_training_after_an_evaluation_keeps_autograd(family):
    """Validation comes before more training: it must not take 4-bit layers off the graph."""
    settings = {"llm_model_name": family, "adapter": "qlora"}
    expected = trained_gradients(*build(**settings), [ROWS])
    model, given = build(**settings)
    model.eval()
    for _ in teacher.infer(model, pieces(), queries(), given, Observer(), np.array(ROWS)):
        pass
    found = trained_gradients(model, given, [ROWS])
    for name, gradient in expected.items():
        assert close(found[name], gradient, 1e-3), name


# ---- the cache ----


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_changes_no_output(family):
    plain, settings = build(llm_model_name=family)
    cached, _ = build(llm_model_name=family, use_cache=True)
    batch = tiny.batch(plain, settings, ROWS)
    assert torch.equal(cached.read_out(batch), plain.read_out(batch))
    embeddings = [teacher.item_embeddings(model, pieces()) for model in (plain, cached)]
    assert np.array_equal(*embeddings)
    assert plain.cache is None
    assert cached.cache is not None


def test_a_cache_changes_no_gradient():
    plain = trained_gradients(*build(), [ROWS])
    found = trained_gradients(*build(use_cache=True), [ROWS])
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())


@torch.no_grad()
def test_a_cache_lives_until_the_next_forward_has_ended():
    model, settings = build(use_cache=True)
    batch = tiny.batch(model, settings, ROWS)
    model.read_out(batch)
    first, alive = weakref.ref(model.cache), []
    last_layer = model.backbone.get_base_model().decoder.layers[-1]
    last_layer.register_forward_hook(lambda *_: alive.append(first() is not None))
    model.read_out(batch)
    assert alive == [True]
    assert first() is None


def observed_step(model, settings, train: bool = True) -> dict:
    """Facts of one described step."""
    observer = Observer()
    teacher.describe(model, observer)
    batch = tiny.batch(model, settings, ROWS)
    model.train(train)
    with torch.inference_mode(not train), observer.first_step():
        loss = teacher.training_loss(model, batch, settings, 0.0, observer)
        if train:
            loss.backward()
    return observer.facts


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_cache_is_seen_by_its_bytes(train, use_cache):
    model, settings = build(use_cache=use_cache)
    width = tiny.batch(model, settings, ROWS)["ids"].shape[1]
    both_of_two_layers = 2 * 2 * len(ROWS) * width * 128 * 4
    expected = {"written_bytes": both_of_two_layers, "read": False} if use_cache else None
    assert observed_step(model, settings, train)["cache"] == expected


def test_a_backbone_that_ignores_the_cache_is_found_out():
    model, settings = build(use_cache=True)
    forward = model.backbone.forward
    model.backbone.forward = lambda **given: forward(**given | {"use_cache": False})
    assert observed_step(model, settings)["cache"] is None


# ---- facts ----


@pytest.mark.parametrize("train", [True, False])
def test_the_step_says_what_the_backbone_was_given(train):
    model, settings = build(precision="bf16-true", adapter="qlora", bnb_4bit_use_double_quant=True)
    width = tiny.batch(model, settings, ROWS)["ids"].shape[1]
    facts = observed_step(model, settings, train)
    assert facts["inputs_embeds"] == {"shape": [len(ROWS), width, 128], "dtype": "bfloat16"}
    assert facts["attention_mask"] is None
    assert facts["grad_enabled"] is train
    assert facts["training"] is train
    assert facts["quant"] == {"quant_type": "nf4", "double": True, "compute_dtype": "bfloat16"}
    assert "quant" not in observed_step(*build())


def test_a_backbone_left_in_eval_mode_is_found_out():
    """As loading leaves it: the teacher says it trains; dropout and checkpointing do nothing."""
    model, settings = build(gradient_checkpointing=True)
    model.train = lambda mode=True: None
    model.training = True
    assert not model.backbone.training
    facts = observed_step(model, settings)
    assert facts["training"] is False
    assert facts["checkpoint_calls"] == {"forward": 1, "after_backward": 1}


# ---- a backbone with another width inside ----


@pytest.fixture(scope="module")
def projecting(tmp_path_factory):
    """A folder with OPT's smaller relative's shape: 48 wide at both ends, 64 inside."""
    config = AutoConfig.for_model(
        "opt", hidden_size=64, word_embed_proj_dim=48, ffn_dim=128, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=2048, max_position_embeddings=512,
        do_layer_norm_before=False,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("projecting")
    AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_a_backbone_may_be_wider_inside_than_at_its_ends(projecting, adapter):
    given = {"llm_model_name": projecting, "adapter": adapter}
    model, settings = build(active=False, **given)
    with torch.no_grad():
        state = model.read_out(tiny.batch(model, settings, ROWS))
    assert state.shape == (len(ROWS), model.width) == (len(ROWS), 48)
    assert teacher.item_embeddings(model, pieces()).shape[1] == 48
    gradients = trained_gradients(*build(**given), [ROWS])
    assert all(gradient.any() for gradient in gradients.values())


def test_the_description_counts_what_is_there():
    model, _ = build(adapter="qlora")
    observer = Observer()
    teacher.describe(model, observer)
    facts = observer.facts
    assert facts["layers_adapted"] == facts["adapted_4bit"] == 4
    assert facts["layers_4bit"] == 12
    assert facts["attn_implementation"] == "sdpa"
    assert facts["trainable_parameters"] == sum(p.numel() for p in model.trainable())
    dense = Observer()
    teacher.describe(build()[0], dense)
    assert dense.facts["layers_4bit"] == 0
    assert dense.facts["frozen_bytes"] > facts["frozen_bytes"]


# ---- equal starts ----


def test_what_is_trained_starts_alike_whatever_the_backbone_drew():
    dense, _ = build(active=False)
    after_dense = torch.rand(3)
    packed, _ = build(active=False, adapter="qlora")
    after_packed = torch.rand(3)
    starts = dict(dense.named_parameters())
    for name, value in packed.named_parameters():
        if value.requires_grad:
            assert torch.equal(value, starts[name]), name
    assert torch.equal(after_dense, after_packed)


def test_item_token_dropout_blanks_tokens_in_training_only():
    model, settings = build(item_token_dropout=0.9)
    batch = tiny.batch(model, settings, list(range(64)))
    model.eval()
    assert torch.equal(model.read_out(batch), model.read_out(batch))
    seen = []
    model.projector.register_forward_hook(lambda module, given, made: seen.append(given[0]))
    model.train()
    torch.manual_seed(0)
    model.read_out(batch)
    blank = (seen[0] == 0).all(1).float().mean()
    assert 0.75 < blank < 1.0
    model.eval()
    model.read_out(batch)
    assert not (seen[1] == 0).all(1).any()

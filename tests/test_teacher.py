"""The teacher: padding, gates, checkpointing, precision, checkpoints, frozen parts, scores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from peft.utils import save_and_load
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, close, encoder, pieces, prepared, queries

from core import ilora, teacher
from core.config import InputError
from core.loop import autocast
from core.observe import Observer, parameter_dtypes
from core.ranking import held_out

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
        assert len(set(together["lengths"].tolist())) > 3
        found = model.read_out(together)
        for row, sample in enumerate(ROWS):
            alone = model.read_out(tiny.batch(model, settings, [sample]))
            assert close(found[row], alone[0], 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_at_the_padded_end_would_be_another(family):
    """What the read-out index guards against."""
    model, settings = build(llm_model_name=family)
    batch = tiny.batch(model, settings, ROWS)
    short = int(batch["lengths"].argmin())
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


def test_the_loss_over_candidates_holds_targets_and_uniform_negatives(monkeypatch):
    model, settings = build(train_candidates=20)
    batch = tiny.batch(model, settings, ROWS)
    seen = []
    scores = model.scores
    monkeypatch.setattr(
        model, "scores", lambda state, ids=None: seen.append(ids) or scores(state, ids)
    )
    everything = set()
    for _ in range(40):
        found = teacher.training_loss(model, batch, settings, 0.0, Observer())
        ids = seen.pop()
        assert len(ids) == len(set(ids.tolist())) <= 20
        assert set(batch["targets"].tolist()) <= set(ids.tolist())
        everything |= set(ids.tolist())
    labels = torch.tensor([ids.tolist().index(t) for t in batch["targets"].tolist()])
    assert close(found, F.cross_entropy(scores(model.read_out(batch), ids), labels))
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
    found = teacher.encoder_states(model, asked, batch_size)
    assert not found.requires_grad
    for row in range(len(asked)):
        items, lengths = asked.newest(np.array([row]), model.max_length)
        alone = model.last_state(torch.from_numpy(items), torch.from_numpy(lengths))
        assert close(found[row], alone[0].detach(), 1e-4)


def test_encoder_states_run_one_row_for_many_prefixes(monkeypatch):
    model, rows = encoder(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x: rows.append(len(x)) or forward(x))
    teacher.encoder_states(model, queries())
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


@torch.no_grad()
def test_shuffled_training_batches_carry_their_own_rows(reference):
    model, wanted = reference
    states = teacher.encoder_states(model.encoder, queries())
    batches = teacher.GatedPrompts(states, pieces(), queries(), 4, 7, seed=3, most=5)
    assert len(batches) == 5
    for index in range(len(batches)):
        batch = batches[index]
        assert torch.equal(batch["states"], states[batch["rows"]])
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
        ("bf16-mixed", {"float32"}, {"bfloat16"}),
        ("bf16-true", {"bfloat16", "float32"}, {"bfloat16"}),
    ],
)
def test_precision_decides_the_dtypes(adapter, precision, trainable, frozen):
    model, settings = build(precision=precision, adapter=adapter)
    found = parameter_dtypes(model)
    assert found["trainable"].keys() == trainable
    assert found["frozen"].keys() == frozen | ({"uint8"} if adapter == "qlora" else set())
    kept = {n.split(".")[0] for n, p in model.named_parameters()
            if p.requires_grad and p.dtype == torch.float32}  # fmt: skip
    if precision == "bf16-true":
        assert kept == {"router"}  # a bf16 softmax does not sum to one
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
    [("fp32", "float32"), ("bf16-mixed", "bfloat16"), ("bf16-true", "bfloat16")],
)
def test_the_backbone_multiplies_in_the_dtype_that_was_asked_for(precision, gemm):
    model, settings = build(precision=precision)
    observer = Observer()
    batch = tiny.batch(model, settings, ROWS)
    with observer.first_step(), autocast(precision, tiny.CPU):
        teacher.training_loss(model.train(), batch, settings, 0.0, observer)
    assert observer.facts["gemm_dtypes"].keys() == {gemm}


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


# ---- checkpoints ----


def trained(folder: Path, **given):
    """A teacher whose every trainable number was moved, saved."""
    model, settings = build(**given)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.trainable():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if given.get("gate") == "resnet":
        trained_gradients(model, settings, [ROWS])  # moves the running statistics
    teacher.save_teacher(model, folder)
    return model.eval(), settings


@torch.no_grad()
def sample_scores(model, settings) -> torch.Tensor:
    return model.scores(model.eval().read_out(tiny.batch(model, settings, ROWS)))


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize("gate", ["mlp", "resnet"])
@pytest.mark.parametrize("table", [True, False])
def test_a_checkpoint_gives_a_new_teacher_the_same_scores(tmp_path, adapter, gate, table):
    given = {"adapter": adapter, "gate": gate, "use_item_embeddings_head": table}
    model, settings = trained(tmp_path, **given)
    wanted = sample_scores(model, settings)
    fresh, _ = build(active=False, **given)
    assert not close(sample_scores(fresh, settings), wanted, 0.01)
    teacher.load_teacher(fresh, tmp_path)
    assert torch.equal(sample_scores(fresh, settings), wanted)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_checkpoint_keeps_its_dtypes(tmp_path, precision):
    model, settings = trained(tmp_path, precision=precision)
    fresh, _ = build(active=False, precision=precision)
    teacher.load_teacher(fresh, tmp_path)
    assert parameter_dtypes(fresh) == parameter_dtypes(model)
    assert torch.equal(sample_scores(fresh, settings), sample_scores(model, settings))


def write_scores(folder: str, out: str, adapter: str) -> None:
    """What a later process does with a checkpoint."""
    model, settings = build(active=False, adapter=adapter)
    teacher.load_teacher(model, Path(folder))
    np.save(out, sample_scores(model, settings).numpy())


def test_a_new_process_gives_the_same_scores(tmp_path):
    calls, wanted = [], {}
    for adapter in ("lora", "qlora"):
        wanted[adapter] = sample_scores(*trained(tmp_path / adapter, adapter=adapter))
        paths = str(tmp_path / adapter), str(tmp_path / f"{adapter}.npy")
        calls.append(f"write_scores({paths[0]!r}, {paths[1]!r}, {adapter!r})")
    here = Path(__file__).parent
    threads = "import torch; torch.set_num_threads(1)"
    subprocess.run(
        [sys.executable, "-c", f"{threads}; from test_teacher import *; {'; '.join(calls)}"],
        env={**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"},
        check=True,
    )
    for adapter, scores in wanted.items():
        assert np.array_equal(np.load(tmp_path / f"{adapter}.npy"), scores.numpy())


def test_a_checkpoint_holds_what_was_trained_and_no_base_weight(tmp_path):
    model, _ = trained(tmp_path, gate="resnet")
    adapters = load_file(tmp_path / "adapter_model.safetensors")
    assert len(adapters) == 2 * len(ilora.adapted_layers(model.backbone))
    assert all("lora_" in name for name in adapters)
    rest = load_file(tmp_path / "teacher.safetensors")
    assert {name.split(".")[0] for name in rest} == {"router", "projector", "item_table"}
    assert any(name.endswith("running_mean") for name in rest)
    trainable = sum(p.numel() * 4 for p in model.trainable())
    on_disk = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert on_disk < trainable + 60_000


def test_saving_asks_nobody_about_the_base(tmp_path, monkeypatch):
    """Left to itself, peft looks the base up on the hub at every save."""
    model, _ = build()
    model.backbone.peft_config["default"].base_model_name_or_path = "some/base"
    asked = []
    monkeypatch.setattr(
        save_and_load, "check_file_exists_on_hf_hub", lambda *a, **o: asked.append(a)
    )
    teacher.save_teacher(model, tmp_path)
    assert not asked


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "teacher.safetensors"])
def test_missing_unexpected_and_misshapen_keys_are_refused(tmp_path, file):
    trained(tmp_path)
    model, _ = build(active=False)
    whole = load_file(tmp_path / file)
    name = sorted(whole)[0]
    missing = {k: v for k, v in whole.items() if k != name}
    for broken, words in (
        (missing, "in the file absent"),
        (whole | {"added": torch.zeros(2)}, "first added: .*in the model absent"),
        (whole | {name: torch.zeros(3, 3)}, r"in the file \(3, 3\), in the model"),
    ):
        save_file(broken, tmp_path / file)
        before = weights_hash(model)
        with pytest.raises(InputError, match=f"1 keys do not fit.*{words}"):
            teacher.load_teacher(model, tmp_path)
        assert weights_hash(model) == before  # refused as a whole


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"llm_model_name": "tiny-llama"}, "llm_model_name tiny, this model tiny-llama"),
        ({"adapter": "qlora"}, "adapter lora, this model qlora"),
        ({"precision": "bf16-true"}, "dtype float32, this model bfloat16"),
    ],
)
def test_a_checkpoint_of_another_base_is_refused(tmp_path, other, named):
    trained(tmp_path)
    model, _ = build(active=False, **other)
    with pytest.raises(InputError, match=f"checkpoint of another base: .*{named}"):
        teacher.load_teacher(model, tmp_path)


def test_a_checkpoint_of_other_random_weights_is_refused(tmp_path):
    """A preset's base is drawn with the seed: the same name is another model under another seed."""
    trained(tmp_path)
    settings = tiny.settings().model_copy(update={"seed": 1})
    with pytest.raises(InputError, match="another base: weights"):
        teacher.load_teacher(tiny.teacher(settings, active=False), tmp_path)


def test_a_checkpoint_of_another_gate_or_head_is_refused(tmp_path):
    trained(tmp_path)
    for given in ({"gate": "linear"}, {"use_item_embeddings_head": False}, {"lora_r": 4}):
        model, _ = build(active=False, **given)
        with pytest.raises(InputError, match="keys do not fit"):
            teacher.load_teacher(model, tmp_path)


def test_the_fingerprint_is_readable_json(tmp_path):
    model, _ = trained(tmp_path)
    assert json.loads((tmp_path / "base.json").read_text()) == model.fingerprint


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

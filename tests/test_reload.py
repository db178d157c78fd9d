"""Short trials of every stage, and whether a checkpoint gives back the model that wrote it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import pieces, prepared, queries

from core import artefacts, checkpoints, outputs, pipeline, prompts, ranking, reload, stages
from core.artefacts import Store
from core.observe import Observer
from core.settings import EvalSettings, Settings

# `pipeline.prepare_process` silences these for a run; pytest sets the filters anew for each test.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

BASE = {
    "machine": {"threads": 1, "device": "cpu"},
    "data": {"synthetic": {"users": 60, "items": 48, "mean_length": 8}},
    "student": {"hidden_size": 16},
    "teacher": {"inference_batch_size": 8},
    "train": {"batch_size": 16, "accumulate_grad_batches": 2},
    "eval": {"batch_size": 12},
}
FITS = ("student_fit", "teacher_fit", "distill_fit")


def settings(**sections: dict) -> Settings:
    """The base with some leaves changed: `settings(teacher={"adapter": "qlora"})`."""
    return Settings.model_validate(
        {name: BASE.get(name, {}) | sections.get(name, {}) for name in {**BASE, **sections}}
    )


SETTINGS = settings()
PLANNED = pipeline.plan(SETTINGS, 2)


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Store, dict[str, Observer]]:
    """Every stage run with two batches of each phase."""
    store, observers = Store(tmp_path_factory.mktemp("short")), {}
    pipeline.prepare_process(SETTINGS)
    for name in pipeline.STAGES:
        observers[name] = Observer()
        pipeline.run_stage(name, SETTINGS, store, observers[name], planned=PLANNED)
    return store, observers


@pytest.fixture
def own(chain, tmp_path) -> Store:
    """A copy of the short artefacts that a test may damage."""
    shutil.copytree(chain[0].root, tmp_path / "own")
    return Store(tmp_path / "own")


def folder_of(store: Store, stage: str) -> Path:
    folder = store.find(stage, PLANNED[stage].address)
    assert folder is not None
    return folder


def reseal(folder: Path) -> None:
    """Make the manifest fit what a test has changed: only the model is wrong then."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    artefacts.write_manifest(folder, {k: v for k, v in manifest.items() if k != "files"})


# ---- short trials ----


def test_what_a_short_trial_makes_is_never_found_by_a_whole_run():
    whole = pipeline.plan(SETTINGS)
    moved = {name for name in pipeline.STAGES if PLANNED[name].address != whole[name].address}
    assert moved == set(pipeline.STAGES) - {"prepare_data"}
    part = pipeline.plan(SETTINGS, 2, ["teacher_fit", "teacher_test"])
    moved = {name for name in pipeline.STAGES if part[name].address != whole[name].address}
    # Below the teacher all is built on a shortened one, cut short itself or not.
    assert moved == set(pipeline.STAGES) - {"prepare_data", "student_fit", "student_test"}
    assert pipeline.plan(SETTINGS, 3)["teacher_fit"].address != PLANNED["teacher_fit"].address


def test_a_short_trial_takes_two_batches_of_every_phase(chain):
    store, observers = chain
    for name in ("student_fit", "distill_fit"):
        assert observers[name].counts["micro_batches"] <= 2
        assert observers[name].counts["optimizer_steps"] >= 1
        assert observers[name].metrics["users"] == 24
    fit = observers["teacher_fit"]
    # Two make a whole group, and a third runs on what the optimizer has changed.
    assert (fit.counts["micro_batches"], fit.counts["optimizer_steps"]) == (3, 2)
    assert (fit.counts["rows"], fit.metrics["users"]) == (48, 16)
    assert len(fit.losses) == 3
    for name, users in (("student_test", 24), ("teacher_test", 16), ("distill_test", 24)):
        assert observers[name].counts["micro_batches"] == 2
        assert observers[name].metrics["users"] == len(observers[name].ranks) == users
    assert observers["teacher_outputs"].counts["rows"] == 16
    stored = outputs.Outputs.open(folder_of(store, "teacher_outputs") / "outputs")
    assert stored.samples == 16
    items = len(stages.data.load(folder_of(store, "prepare_data") / "split").titles) - 1
    assert stored.item_embeddings.shape == (items + 1, stored.width)
    assert np.abs(stored.item_embeddings[1:17]).min(1).max() > 0
    assert not stored.item_embeddings[17:].any()
    manifest = artefacts.read_manifest(folder_of(store, "teacher_fit"))
    assert manifest["fast_dev_run"] == 2
    assert len(json.loads((folder_of(store, "teacher_fit") / "history.json").read_text())) == 1


def test_models_are_compared_on_the_users_all_of_them_ranked(chain):
    store, _ = chain
    text = (folder_of(store, "evaluate_all") / "all_evaluation_results.json").read_text()
    found = json.loads(text)
    ranks = {
        name: np.load(folder_of(store, stage) / "ranks.npy")[:16]
        for name, stage in (("student", "student_test"), ("teacher", "teacher_test"))
    }
    hits = {name: (own < 10).mean() for name, own in ranks.items()}
    difference = found["teacher"]["minus_student@10"]["recall@10"]
    assert difference == pytest.approx(hits["teacher"] - hits["student"])


def test_a_short_trial_takes_the_longest_prompts_and_histories():
    most = Settings().teacher.max_history
    lengths = prompts.prompts_of(queries(), most, "instance").lengths(pieces())
    few = prompts.longest(pieces(), queries(), most, "instance", 10)
    chosen = prompts.prompts_of(few, most, "instance").lengths(pieces())
    assert chosen.tolist() == sorted(lengths, reverse=True)[:10]
    asked = []

    def score(own: ranking.Queries):
        asked.append(own)
        yield np.arange(len(own)), torch.rand(len(own), prepared().num_items + 1)

    found, ranks = ranking.evaluate(score, prepared(), "test", EvalSettings(), most=7)
    assert len(ranks) == found["users"] == 7
    every = ranking.held_out(prepared(), "test").lengths
    assert asked[0].lengths.tolist() == sorted(every, reverse=True)[:7]


# ---- checkpoints ----


@pytest.mark.parametrize("stage", FITS)
def test_a_checkpoint_gives_back_the_model_to_the_bit(chain, stage):
    observer = Observer()
    assert reload.check(stage, SETTINGS, chain[0], observer, PLANNED) == 0.0
    assert "reload" in observer.phases
    saved = np.load(folder_of(chain[0], stage) / stages.PROBE)
    assert np.ptp(saved) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": {"adapter": "qlora"}, "train": {"precision": "bf16-mixed"}},
        {"train": {"precision": "bf16-true", "trainer": "lightning"}},
        {"teacher": {"gate": "resnet", "use_item_embeddings_head": False}},
    ],
    ids=["4-bit", "lightning", "resnet"],
)
def test_other_teachers_come_back_too(own, changes):
    given = settings(**changes)
    planned = pipeline.plan(given, 2)
    pipeline.run_stage("teacher_fit", given, own, Observer(), planned=planned)
    assert reload.check("teacher_fit", given, own, Observer(), planned) <= reload.EXACT


@pytest.mark.parametrize("stage", FITS)
def test_weights_that_changed_in_the_file_are_found_out(own, stage):
    folder = folder_of(own, stage)
    name = "teacher.safetensors" if stage == "teacher_fit" else "model.safetensors"
    state = load_file(folder / "last" / name)
    table = next(key for key in state if key.endswith(("item_table", "item_table.weight")))
    state[table] = state[table].bfloat16().float()
    save_file(state, folder / "last" / name)
    reseal(folder)
    with pytest.raises(reload.BadCheckpoint, match=rf"{stage}/last: loaded anew, the scores"):
        reload.check(stage, SETTINGS, own, Observer(), PLANNED)


def test_a_part_that_is_not_loaded_is_found_out_though_it_hardly_moved(own, monkeypatch):
    """Both models draw it with one seed: in three steps it moves less than rounding may."""
    given = settings(train={"precision": "bf16-mixed", "lr": 1e-5})
    planned = pipeline.plan(given, 2)
    pipeline.run_stage("teacher_fit", given, own, Observer(), planned=planned)
    load = checkpoints.set_peft_model_state_dict

    def without_first_matrices(model, state):
        load(model, {key: value for key, value in state.items() if "lora_A" not in key})

    monkeypatch.setattr(checkpoints, "set_peft_model_state_dict", without_first_matrices)
    with pytest.raises(reload.BadCheckpoint, match=r"teacher_fit/best: loaded anew, the scores"):
        reload.check("teacher_fit", given, own, Observer(), planned)


def test_a_checkpoint_with_a_missing_key_cannot_be_loaded(own):
    folder = folder_of(own, "teacher_fit")
    state = load_file(folder / "best" / "adapter_model.safetensors")
    del state[min(state)]
    save_file(state, folder / "best" / "adapter_model.safetensors")
    reseal(folder)
    with pytest.raises(reload.BadCheckpoint, match=r"teacher_fit/best cannot be loaded: .* absent"):
        reload.check("teacher_fit", SETTINGS, own, Observer(), PLANNED)


def test_scores_that_are_no_numbers_or_of_another_shape_never_pass():
    ones = np.ones((2, 3), dtype=np.float32)
    assert reload.difference(ones, 0.5 * ones) == 0.5
    assert not reload.difference(ones, np.nan * ones) <= reload.ROUNDED
    with pytest.raises(ValueError, match="scores of shape"):
        reload.difference(ones, ones[:1])


def test_only_full_precision_over_dense_weights_must_repeat_itself():
    assert reload.tolerance("teacher_fit", SETTINGS) == reload.EXACT
    for changes in ({"train": {"precision": "tf32"}}, {"teacher": {"adapter": "qlora"}}):
        assert reload.tolerance("teacher_fit", settings(**changes)) == reload.ROUNDED
        assert reload.tolerance("student_fit", settings(**changes)) == reload.EXACT

"""The stages: content addresses, hand-over by manifest, and every stage run for real on a catalogue
of a few dozen items.
"""

import json
import shutil
import types
import typing
from pathlib import Path

import numpy as np
import pytest
import torch

from core import artefacts, pipeline, stages
from core.artefacts import MANIFEST, Store
from core.config import InputError, leaves
from core.loop import NonFiniteLoss
from core.observe import Observer
from core.settings import Settings

# `pipeline.prepare_process` silences these for a run; pytest sets the filters anew for each test.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

TINY = {
    "machine": {"threads": 1, "device": "cpu"},
    "data": {"synthetic": {"users": 60, "items": 48, "mean_length": 8}},
    "student": {"max_epochs": 1, "hidden_size": 16},
    "train": {"max_epochs": 1, "batch_size": 16, "accumulate_grad_batches": 2},
    "distill": {"max_epochs": 1},
}
LEAVES = leaves(Settings)


def tiny(**changes) -> Settings:
    """The tiny configuration with dotted settings replaced: `tiny(**{"student.lr": 0.1})`."""
    return changed(Settings.model_validate(TINY), changes)


def changed(settings: Settings, changes: dict) -> Settings:
    tree = settings.model_dump()
    for name, value in changes.items():
        node = tree
        *sections, leaf = name.split(".")
        for section in sections:
            node = node[section]
        node[leaf] = value
    return Settings.model_validate(tree)


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Store, dict[str, Observer]]:
    """Every stage run once: the store, and what was observed."""
    store, observers = Store(tmp_path_factory.mktemp("artefacts")), {}
    pipeline.prepare_process(tiny())
    for name in pipeline.STAGES:
        observers[name] = Observer()
        _, made = pipeline.run_stage(name, tiny(), store, observers[name])
        assert made
    return store, observers


@pytest.fixture
def own(chain, tmp_path) -> Store:
    """A copy of the finished artefacts that a test may damage."""
    shutil.copytree(chain[0].root, tmp_path / "own")
    return Store(tmp_path / "own")


def found(store: Store, stage: str, settings: Settings | None = None) -> Path:
    folder = store.find(stage, pipeline.plan(settings or tiny())[stage].address)
    assert folder is not None, f"{stage} was not made"
    return folder


def run(stage: str, settings: Settings, store: Store) -> tuple[Path, Observer]:
    """Make one stage now, its neighbours reused from the store."""
    observer = Observer()
    folder, made = pipeline.run_stage(stage, settings, store, observer)
    assert made, f"{stage} was reused although it was to be made"
    return folder, observer


# ---- addresses ----


def another(name: str, kind: object, value):
    """A different value of the same type; not every one is accepted together with the rest."""
    options = [a for part in (kind, *typing.get_args(kind)) for a in typing.get_args(part)]
    words = [option for option in options if isinstance(option, str) and option != value]
    if typing.get_origin(kind) is typing.Literal:
        return words[0]
    match value:
        case bool():
            return not value
        case int():
            return 5 if value == -1 else value * 2 or 1
        case float():
            return value / 2 or 0.05
        case tuple():
            return value[:-1]
        case None:
            return 7 if int in options or int in typing.get_args(kind) else "elsewhere"
        case str():
            return value + "-other"
    raise AssertionError(f"{name}: no other value for {value!r}")


def below(stage: str) -> set[str]:
    """A stage and all that build on it."""
    affected = {stage}
    for name, node in pipeline.PIPELINE.items():
        if affected & set(node.needs):
            affected.add(name)
    return affected


NEEDS = {
    "teacher.bnb_4bit_use_double_quant": {"teacher.adapter": "qlora"},
    "train.devices": {"train.trainer": "lightning"},
    "train.strategy": {"train.trainer": "lightning", "train.devices": 2},
}
"""What else must be set before a leaf may change."""
OTHERS = {"machine.image": "cu118", "machine.env": ("A=1",)}
"""Values that no rule makes."""
GIVEN = {"teacher.rec_model_checkpoint_path", "distill.teacher_checkpoint_path"}


@pytest.mark.parametrize("leaf", sorted(set(LEAVES) - GIVEN))
def test_a_setting_moves_the_stages_that_read_it_and_no_others(leaf, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "source_files", lambda settings: [])
    settings = changed(Settings(), NEEDS.get(leaf, {}))
    value = settings
    for part in leaf.split("."):
        value = getattr(value, part)
    other = changed(settings, {leaf: OTHERS.get(leaf) or another(leaf, LEAVES[leaf], value)})
    before, after = pipeline.plan(settings), pipeline.plan(other)
    moved = {name for name in pipeline.STAGES if before[name].address != after[name].address}
    expected: set[str] = set()
    for name, stage in pipeline.PIPELINE.items():
        if any(leaf == read or leaf.startswith(f"{read}.") for read in stage.reads):
            expected |= below(name)
    assert moved == expected


@pytest.mark.parametrize(
    ("leaf", "value", "first"),
    [
        ("data.synthetic.users", 61, {"prepare_data"}),
        ("student.lr", 0.5, {"student_fit"}),
        ("teacher.attn", "eager", {"teacher_fit"}),
        ("train.precision", "bf16-mixed", {"teacher_fit"}),
        ("train.trainer", "lightning", {"teacher_fit"}),
        ("distill.lam", 0.1, {"distill_fit"}),
        ("eval.top_k", (10,), {"student_fit"}),
        ("machine.threads", 2, set()),
        ("machine.image", "cu118", set()),
        ("machine.device", "cuda", set()),
    ],
)
def test_the_first_stage_a_setting_moves(leaf, value, first):
    """Written out by hand: what a user expects to be computed again."""
    before, after = pipeline.plan(tiny()), pipeline.plan(tiny(**{leaf: value}))
    moved = [name for name in pipeline.STAGES if before[name].address != after[name].address]
    assert set(moved[:1]) == first


def test_a_changed_source_file_or_pipeline_moves_everything(tmp_path, monkeypatch):
    ratings = tmp_path / "ratings.csv"
    rows = [f"{user},{item},{item}" for user in range(4) for item in range(5)]
    ratings.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    settings = tiny(**{"data.source": "csv", "data.root": str(ratings)})
    first = pipeline.plan(settings)
    assert pipeline.plan(settings) == first
    ratings.write_text(ratings.read_text() + "4,1,1\n4,2,2\n4,3,3\n")
    second = pipeline.plan(settings)
    assert all(first[name].address != second[name].address for name in pipeline.STAGES)
    monkeypatch.setattr(artefacts, "code_digest", lambda: "edited")
    third = pipeline.plan(settings)
    assert all(second[name].address != third[name].address for name in pipeline.STAGES)


def test_a_missing_source_file_is_refused_while_planning(tmp_path):
    settings = tiny(**{"data.source": "csv", "data.root": str(tmp_path / "absent.csv")})
    with pytest.raises(InputError, match=r"absent\.csv"):
        pipeline.plan(settings)


def test_a_setting_a_stage_does_not_declare_cannot_be_read(own, monkeypatch):
    def curious(work: stages.Work) -> None:
        assert work.settings.student.lr
        assert work.settings.train.num_workers == 0
        for hidden in ("distill", "machine", "data", "teacher"):
            assert not hasattr(work.settings, hidden)
        work.settings.train.precision  # noqa: B018

    node = pipeline.PIPELINE["student_fit"]
    monkeypatch.setitem(
        pipeline.PIPELINE, "student_fit", pipeline.Stage(curious, node.needs, node.reads, node.uses)
    )
    with pytest.raises(AttributeError, match="precision"):
        pipeline.run_stage("student_fit", tiny(seed=1), own, Observer())


# ---- the chain ----


def test_the_chain_is_complete_and_measured(chain):
    store, observers = chain
    for name in pipeline.STAGES:
        manifest = artefacts.read_manifest(found(store, name))
        assert manifest["stage"] == name
        assert manifest["settings"] == tiny().model_dump(mode="json")
        assert set(manifest["upstream"]) >= set(pipeline.PIPELINE[name].needs)
        timed = sum(manifest["phases"].values())
        assert 0 < timed <= manifest["wall_s"] + 0.01 or name == "evaluate_all"
        assert manifest["facts"] == json.loads(json.dumps(observers[name].facts))
    assert not [path for path in store.root.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("stage", ["student_fit", "teacher_fit", "distill_fit"])
def test_a_fit_leaves_its_traces(chain, stage):
    store, observers = chain
    folder, observer = found(store, stage), observers[stage]
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(observer.counts["micro_batches"]))
    assert [step["loss"] for step in steps] == pytest.approx(observer.loss_trace())
    (epoch,) = json.loads((folder / "history.json").read_text())
    assert epoch["train_loss"] == pytest.approx(np.mean(observer.loss_trace()), rel=1e-5)
    assert {"recall@10", "ndcg@10", "loss"} <= set(epoch)
    assert observer.facts["trainer"] == "loop"
    assert {"train_steps", "observed_step", "validation", "checkpoint"} <= set(observer.phases)
    for name in ("best", "last"):
        assert list((folder / name).glob("*.safetensors"))


@pytest.mark.parametrize("stage", ["student_test", "teacher_test", "distill_test"])
def test_a_test_ranks_every_user(chain, stage):
    store, observers = chain
    folder = found(store, stage)
    figures = json.loads((folder / "metrics.json").read_text())
    ranks = np.load(folder / "ranks.npy")
    assert len(ranks) == figures["users"] == 60
    assert figures["recall@10"] == pytest.approx((ranks < 10).mean())
    assert observers[stage].ranks == ranks.tolist()
    assert observers[stage].counts["rows"] == 60
    lines = (folder / "test_metrics.txt").read_text().splitlines()
    assert f"test_recall@10: {figures['recall@10']:.6g}" in lines


def test_the_teacher_is_observed(chain):
    observers = chain[1]
    training, testing = observers["teacher_fit"].facts, observers["teacher_test"].facts
    for facts in (training, testing):
        assert set(facts["gemm_dtypes"]) == {"float32"}
        assert facts["attention_ops"] == {"scaled_dot_product_attention": 2}
        assert facts["gate_calls"] == facts["layers_adapted"] == 4
        assert facts["loader_workers"] == 0
        assert facts["autocast_dtype"] is None
    assert training["training"] and not testing["training"]
    assert training["saved_bytes"] > 0 == testing["saved_bytes"]
    assert training["largest_train_batch"] == 16
    counts = observers["teacher_fit"].counts
    assert counts["optimizer_steps"] == -(-counts["micro_batches"] // 2)
    outputs = observers["teacher_outputs"]
    assert outputs.counts["rows"] == counts["rows"] > 60
    assert outputs.facts["largest_batch"] == 64


def test_the_comparison_holds_three_models_and_paired_differences(chain):
    store, _ = chain
    text = (found(store, "evaluate_all") / "all_evaluation_results.json").read_text()
    rows = json.loads(text)
    assert list(rows) == ["student", "teacher", "distilled"]
    student, teacher = rows["student"], rows["teacher"]
    for k in (5, 10, 20):
        difference = teacher[f"minus_student@{k}"]
        expected = teacher[f"recall@{k}"] - student[f"recall@{k}"]
        assert difference[f"recall@{k}"] == pytest.approx(expected)
        assert student[f"recall@{k}"] == student[f"hit_ratio@{k}"]
    assert student["chance_recall@10"] == pytest.approx(10 / 47, abs=0.01)


def test_unchanged_stages_are_reused(chain):
    store, _ = chain
    for name in pipeline.STAGES:
        folder, made = pipeline.run_stage(name, tiny(), store, Observer())
        assert not made
        assert folder == found(store, name)


def test_a_later_change_reuses_the_stages_before_it(chain, tmp_path):
    """Finished stages may also lie in a shared, read-only store."""
    private = Store(tmp_path / "private", shared=chain[0].root)
    settings = tiny(**{"distill.lam": 0.3})
    assert not pipeline.run_stage("teacher_outputs", settings, private, Observer())[1]
    folder, _ = run("distill_fit", settings, private)
    assert folder.parent == private.root
    assert folder.name not in {path.name for path in chain[0].root.iterdir()}


def test_a_later_change_leads_to_other_results(own):
    folder, _ = run("student_fit", tiny(seed=1), own)
    assert weights(folder) != weights(found(own, "student_fit"))


def weights(folder: Path) -> bytes:
    return (folder / "best" / "model.safetensors").read_bytes()


# ---- variants, each at the tiny size ----


@pytest.mark.parametrize("stage", ["student_fit", "distill_fit"])
@pytest.mark.parametrize(
    ("leaf", "value"), [("train.trainer", "lightning"), ("train.num_workers", 2)]
)
def test_settings_a_stage_uses_but_does_not_read_change_nothing_it_makes(own, stage, leaf, value):
    """They are not part of the address, so the artefacts must be equal to the byte."""
    assert leaf in pipeline.PIPELINE[stage].uses
    expected = found(own, stage)
    before = {name: (expected / name).read_bytes() for name in ("history.json", "steps.jsonl")}
    before["weights"] = weights(expected)
    shutil.rmtree(expected)
    settings = tiny(**{leaf: value})
    for need in pipeline.required([stage], settings):
        # Teachers do read these settings; theirs stands in under its new address.
        address = pipeline.plan(settings)[need].address
        if own.find(need, address) is None:
            shutil.copytree(found(own, need), own.root / f"{need}-{address}")
    folder, observer = run(stage, settings, own)
    assert observer.facts["trainer"] == settings.train.trainer
    assert observer.facts["loader_workers"] == settings.train.num_workers
    assert {name: (folder / name).read_bytes() for name in before if name != "weights"} | {
        "weights": weights(folder)
    } == before


def test_a_linear_rate_warms_up_and_falls_to_zero():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    assert stages.learning_rate(optimizer, "constant", 100) is None
    schedule, rates = stages.learning_rate(optimizer, "linear", 100), []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])  # 5 % of the steps
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(2 / 95)
    assert optimizer.param_groups[0]["lr"] == 0


def test_lightning_trains_the_same_teacher(own):
    settings = tiny(**{"train.trainer": "lightning"})
    folder, observer = run("teacher_fit", settings, own)
    expected = found(own, "teacher_fit")
    for name in ("steps.jsonl", "history.json"):
        assert (folder / name).read_text() == (expected / name).read_text()
    for name in ("adapter_model.safetensors", "teacher.safetensors"):
        for checkpoint in ("best", "last"):
            here, there = folder / checkpoint / name, expected / checkpoint / name
            assert here.read_bytes() == there.read_bytes()
    plain = json.loads((expected / MANIFEST).read_text())["facts"]
    assert observer.facts["trainer"] == "lightning"
    same = ("gemm_dtypes", "attention_ops", "saved_bytes", "checkpoint_calls", "gate_calls")
    assert {k: observer.facts[k] for k in same} == {k: plain[k] for k in same}


@pytest.mark.parametrize("trainer", ["loop", "lightning"])
def test_mixed_precision_and_checkpointing_are_seen_in_the_teacher(own, trainer):
    settings = tiny(
        **{
            "train.precision": "bf16-mixed",
            "train.trainer": trainer,
            "teacher.gradient_checkpointing": True,
            "teacher.attn": "eager",
        }
    )
    _, observer = run("teacher_fit", settings, own)
    assert set(observer.facts["gemm_dtypes"]) == {"bfloat16"}
    assert observer.facts["checkpoint_calls"] == {"forward": 1, "after_backward": 2}
    assert set(observer.facts["attention_ops"]) == {"_softmax"}


def test_tf32_belongs_to_the_stages_of_the_teacher_alone(own):
    """Several stages share a process: what one of them wants is over when it ends."""
    seen = {}
    for stage in ("student_fit", "teacher_fit", "teacher_test"):
        settings = tiny(**{"train.precision": "tf32", "seed": 7})
        torch.set_float32_matmul_precision("medium")  # as if somebody had left it so
        try:
            _, observer = run(stage, settings, own)
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision("highest")
        seen[stage] = observer.facts["float32_matmul_precision"]
    assert seen == {"student_fit": "highest", "teacher_fit": "high", "teacher_test": "high"}


def test_a_teacher_with_a_random_head_runs_through(own):
    settings = tiny(**{"teacher.use_item_embeddings_head": False})
    run("teacher_fit", settings, own)
    _, observer = run("teacher_test", settings, own)
    assert 0 <= observer.metrics["recall@10"] <= 1


@pytest.mark.parametrize(
    "distill",
    [
        {"distill.mode": "reference", "distill.alpha": 0.5},
        {"distill.mode": "paper", "distill.alpha": 0.5, "distill.ed_weight": 0.0},
        {"distill.mode": "reference", "distill.bug_compat": True},
    ],
)
def test_other_distillations_run_through_and_are_tested_as_trained(own, distill):
    """A student with different input and output tables keeps both: it scores as in training."""
    settings = tiny(**distill)
    folder, fitted = run("distill_fit", settings, own)
    two_tables = settings.distill.mode == "reference" and settings.distill.ed_weight > 0
    assert (folder / "best" / "input_vectors.npy").is_file() == two_tables
    assert np.isfinite(fitted.loss_trace()).all()
    _, tested = run("distill_test", settings, own)
    model, vectors = stages.load_sasrec(
        folder / "best", prepared(own), settings, pipeline.choose_device(settings)
    )
    score = stages.student.scorer(model, settings.student, settings.eval.batch_size, vectors)
    again, _ = stages.ranking.evaluate(score, prepared(own), "validation", settings.eval)
    assert again["loss"] == pytest.approx(fitted.metrics["loss"], rel=1e-5)
    assert tested.metrics["users"] == 60


def prepared(store: Store) -> stages.data.Prepared:
    return stages.data.load(found(store, "prepare_data") / "split")


# ---- hand-over ----


def test_a_damaged_file_before_a_stage_is_refused(own):
    victim = found(own, "student_fit") / "best" / "model.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"best/model\.safetensors: contents differ"):
        pipeline.run_stage("teacher_fit", tiny(**{"train.lr": 0.1}), own, Observer())


def test_a_missing_file_before_a_stage_is_refused(own):
    (found(own, "teacher_outputs") / "outputs" / "scores.npy").unlink()
    with pytest.raises(InputError, match=r"outputs/scores\.npy: missing"):
        pipeline.run_stage("distill_fit", tiny(**{"distill.lam": 0.1}), own, Observer())


def test_a_stage_that_has_not_run_is_named(tmp_path):
    with pytest.raises(InputError, match="student_fit: needs prepare_data, which has not run"):
        pipeline.run_stage("student_fit", tiny(), Store(tmp_path), Observer())
    assert not list(tmp_path.iterdir()), "nothing is begun"


def test_required_names_what_comes_before_in_order():
    assert pipeline.required(["prepare_data"], tiny()) == []
    assert pipeline.required(["teacher_test"], tiny()) == [
        "prepare_data",
        "student_fit",
        "teacher_fit",
    ]
    assert pipeline.required(["teacher_fit", "teacher_test"], tiny()) == [
        "prepare_data",
        "student_fit",
    ]
    assert pipeline.required(["evaluate_all"], tiny()) == list(pipeline.STAGES[:-1])


def test_an_interrupted_stage_is_no_artefact_and_runs_again(own, monkeypatch):
    settings, node = tiny(seed=1), pipeline.PIPELINE["student_fit"]

    def interrupted(work: stages.Work) -> None:
        (work.folder / "half").write_text("of a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        broken = pipeline.Stage(interrupted, node.needs, node.reads, node.uses)
        patch.setitem(pipeline.PIPELINE, "student_fit", broken)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run_stage("student_fit", settings, own, Observer())
    assert own.find("student_fit", pipeline.plan(settings)["student_fit"].address) is None
    with pytest.raises(InputError, match="needs student_fit"):
        pipeline.run_stage("student_test", settings, own, Observer())
    folder, _ = run("student_fit", settings, own)
    assert artefacts.read_manifest(folder)["stage"] == "student_fit"


def test_a_training_that_diverges_is_no_artefact(own):
    settings = tiny(**{"student.lr": 1e30, "student.max_epochs": 3})
    with pytest.raises(NonFiniteLoss, match=r"step \d+: training loss is"):
        pipeline.run_stage("student_fit", settings, own, Observer())
    assert own.find("student_fit", pipeline.plan(settings)["student_fit"].address) is None


def test_teacher_outputs_go_on_where_an_interrupted_run_stopped(own, monkeypatch):
    """The stored rows are kept, and the finished folder equals an uninterrupted one."""
    whole = found(own, "teacher_outputs")
    expected = {path.name: path.read_bytes() for path in (whole / "outputs").glob("*.npy")}
    shutil.rmtree(whole)
    infer, batches = stages.teacher.infer, []

    def stopping(*args, **options):
        for number, batch in enumerate(infer(*args, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    def counting(*args, **options):
        for batch in infer(*args, **options):
            batches.append(batch)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(stages.teacher, "infer", stopping)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run_stage("teacher_outputs", tiny(), own, Observer())
    monkeypatch.setattr(stages.teacher, "infer", counting)
    folder, observer = run("teacher_outputs", tiny(), own)
    rows = len(np.load(folder / "outputs" / "log_sum_exp.npy"))
    assert observer.counts["rows"] == rows - 2 * 64
    assert len(batches) == -(-observer.counts["rows"] // 64)
    outputs = {path.name: path for path in (folder / "outputs").glob("*.npy")}
    assert outputs.keys() == expected.keys()
    for name in ("top_ids.npy", "item_embeddings.npy"):
        assert outputs[name].read_bytes() == expected[name]


# ---- checkpoints the settings name ----


def test_a_named_student_replaces_the_stage_that_makes_it(own, tmp_path):
    given = tmp_path / "my-student"
    shutil.copytree(found(own, "student_fit"), given)
    shutil.rmtree(found(own, "student_fit"))
    settings = tiny(**{"teacher.rec_model_checkpoint_path": str(given)})
    assert pipeline.required(["teacher_fit"], settings) == ["prepare_data"]
    folder, _ = run("teacher_fit", settings, own)
    run("teacher_test", settings, own)
    # The same student from another place: the same teacher.
    assert (folder / "steps.jsonl").read_text() == (
        found(own, "teacher_fit") / "steps.jsonl"
    ).read_text()


def test_another_named_student_makes_another_teacher(own, tmp_path):
    other, _ = run("student_fit", tiny(seed=5), own)
    settings = tiny(**{"teacher.rec_model_checkpoint_path": str(other)})
    own_address = pipeline.plan(tiny())["teacher_fit"].address
    assert pipeline.plan(settings)["teacher_fit"].address != own_address
    folder, _ = run("teacher_fit", settings, own)
    assert (folder / "steps.jsonl").read_text() != (
        found(own, "teacher_fit") / "steps.jsonl"
    ).read_text()


def test_named_teacher_outputs_replace_the_stage_that_makes_them(own, tmp_path):
    given = tmp_path / "my-outputs"
    shutil.copytree(found(own, "teacher_outputs"), given)
    settings = tiny(**{"distill.teacher_checkpoint_path": str(given)})
    assert pipeline.required(["distill_fit"], settings) == ["prepare_data"]
    folder, _ = run("distill_fit", settings, own)
    assert weights(folder) == weights(found(own, "distill_fit"))


@pytest.mark.parametrize("leaf", sorted(GIVEN))
def test_a_folder_that_cannot_serve_is_refused_before_any_work(own, tmp_path, leaf):
    wanted = found(own, "student_fit" if "rec_model" in leaf else "teacher_outputs")
    for name in ("empty", "damaged", "no-manifest-of-ours"):
        shutil.copytree(wanted, tmp_path / name)
    (tmp_path / "empty" / MANIFEST).unlink()
    (tmp_path / "no-manifest-of-ours" / MANIFEST).write_text('{"rows": 3}')
    victim = "steps.jsonl" if "rec_model" in leaf else "outputs/scores.npy"
    (tmp_path / "damaged" / victim).write_bytes(b"")
    folders = [tmp_path / name for name in ("absent", "empty", "damaged", "no-manifest-of-ours")]
    for folder in [*folders, found(own, "student_test")]:
        with pytest.raises(InputError, match=str(folder)):
            pipeline.plan(tiny(**{leaf: str(folder)}))
    pipeline.plan(tiny(**{leaf: str(wanted)}))


def test_a_student_of_another_size_is_refused(own, tmp_path):
    other, _ = run("student_fit", tiny(**{"student.hidden_size": 8}), own)
    settings = tiny(**{"teacher.rec_model_checkpoint_path": str(other)})
    with pytest.raises(InputError, match="does not fit the student settings"):
        pipeline.run_stage("teacher_fit", settings, own, Observer())


def test_a_device_that_is_not_there_is_bad_input():
    if not stages.torch.cuda.is_available():
        with pytest.raises(InputError, match="torch sees no CUDA device"):
            pipeline.choose_device(tiny(**{"machine.device": "cuda"}))
    assert pipeline.choose_device(tiny()).type == "cpu"


def test_the_image_is_what_the_container_says(monkeypatch):
    monkeypatch.delenv("ILORA_BENCH_IMAGE", raising=False)
    for engine, name in ((None, "host"), ("docker", "unnamed")):
        found = {"id": "somewhere", "engine": engine}
        monkeypatch.setattr(pipeline, "container", lambda found=found: found)
        assert pipeline.image() == name
    monkeypatch.setenv("ILORA_BENCH_IMAGE", "cu118")
    assert pipeline.image() == "cu118"


# ---- the store by itself ----


def test_a_store_shows_a_folder_only_when_it_is_whole(tmp_path):
    store = Store(tmp_path / "store")
    with pytest.raises(ZeroDivisionError), store.create("stage", "1") as folder:
        (folder / "data").write_text("half")
        raise ZeroDivisionError
    assert store.find("stage", "1") is None
    with store.create("stage", "1") as folder:
        assert (folder / "data").read_text() == "half", "a second try finds the first one's work"
        (folder / "data").write_text("whole")
        artefacts.write_manifest(folder, {"stage": "stage"})
    assert (store.find("stage", "1") / "data").read_text() == "whole"
    assert [path.name for path in store.root.iterdir()] == ["stage-1"]


def test_visible_settings_are_whole_sections_and_single_leaves():
    view = artefacts.visible(tiny(), ("seed", "eval", "train.trainer"))
    assert view.seed == 0
    assert view.eval == tiny().eval
    assert view.train == types.SimpleNamespace(trainer="loop")
    assert not hasattr(view, "student")

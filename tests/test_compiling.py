"""Compiling the backbone: equal losses, what is counted, what shows when steps ran uncompiled, and
the worker's words meanwhile.

Most tests only trace (backend `eager`): what is generated from a graph is torch's business, which
inputs fit it, what breaks it and how often it runs is ours.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from pydantic import ValidationError
from torch import _dynamo, nn
from torch._dynamo.callback import CallbackTrigger
from torch.fx.experimental import _config as symbolic_shapes

from bench import worker
from core import compiling, llm, pipeline, teacher
from core.artefacts import Store
from core.observe import Observer
from core.settings import Settings

# `pipeline.prepare_process` silences these for a run; pytest sets the filters anew for each test.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

ROWS = [0, 5, 11, 60, 61, 62, 100, 130]
LAYERS = 2
MODES = ("regional", "whole")
# In training the OPT of the oldest transformers draws a number before each layer and branches on
# it, which breaks its whole forward into pieces.
FAMILY = {"off": "tiny", "regional": "tiny", "whole": "tiny-llama"}


@pytest.fixture(autouse=True)
def own_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace only, and leave the compiler to other tests as it was."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    before = symbolic_shapes.use_duck_shape
    with _dynamo.config.patch({}):
        yield
    symbolic_shapes.use_duck_shape = before
    _dynamo.reset()


def build(mode: str, **given) -> tuple[teacher.Teacher, Settings]:
    settings = tiny.settings(**given)
    train = settings.train.model_copy(update={"compile": mode})
    settings = settings.model_copy(update={"train": train})  # past the validators
    return tiny.teacher(settings), settings


def train(model: teacher.Teacher, settings: Settings, observer: Observer, rows: list[int]) -> float:
    """One observed training batch, forward and backward; its loss."""
    model.train()
    with observer.first_step():
        batch = tiny.batch(model, settings, rows)
        loss = teacher.training_loss(model, batch, settings, 0.1, observer)
        loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.item()


def compiled(
    mode: str, batches: list[list[int]], prepare: Callable = lambda model: None, **given
) -> dict:
    """The fact `compile` after training on some batches, of which the first is the observed one."""
    model, settings = build(mode, **given)
    prepare(model)
    observer = Observer()
    with compiling.account(model.execution, observer):
        for rows in batches:
            train(model, settings, observer, rows)
    return observer.facts["compile"]


# ---- whole stages ----

RUN = {
    "machine": {"threads": 1, "device": "cpu"},
    "data": {"synthetic": {"users": 60, "items": 48, "mean_length": 8}},
    "student": {"max_epochs": 1, "hidden_size": 16},
    "teacher": {"inference_batch_size": 16},
    "train": {"max_epochs": 2, "batch_size": 16, "max_steps": 5, "accumulate_grad_batches": 2},
}
TEACHER = ("teacher_fit", "teacher_test", "teacher_outputs")
INFERENCES = 4
"""Batches of all users."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[..., dict[str, Observer]]:
    """Runs the stages of a teacher: what was observed in each, remembered."""
    done = {}

    def stages(
        mode: str,
        trainer: str = "loop",
        adapter: str = "lora",
        backend: str = "eager",
        family: str = "",
    ) -> dict[str, Observer]:
        family = family or FAMILY[mode]
        if (mode, trainer, adapter, backend, family) not in done:
            settings = Settings.model_validate(
                RUN
                | {"teacher": RUN["teacher"] | {"adapter": adapter, "llm_model_name": family}}
                | {"train": RUN["train"] | {"compile": mode, "trainer": trainer}}
            )
            observers = {name: Observer() for name in TEACHER}
            store = Store(tmp_path_factory.mktemp("artefacts"))
            for name in (*pipeline.required(TEACHER, settings), *TEACHER):
                pipeline.run_stage(name, settings, store, observers.get(name, Observer()))
            done[mode, trainer, adapter, backend, family] = observers
        return done[mode, trainer, adapter, backend, family]

    return stages


@pytest.mark.parametrize(
    ("mode", "trainer", "adapter"),
    [
        ("regional", "loop", "lora"),
        pytest.param("regional", "lightning", "qlora", marks=pytest.mark.slow),
        pytest.param("whole", "lightning", "lora", marks=pytest.mark.slow),
        pytest.param("whole", "loop", "qlora", marks=pytest.mark.slow),
    ],
)
def test_compiled_training_has_the_losses_of_eager_training(run, mode, trainer, adapter):
    eager = run("off", "loop", adapter, family=FAMILY[mode])
    found = run(mode, trainer, adapter)
    losses = found["teacher_fit"].loss_trace()
    assert losses == pytest.approx(eager["teacher_fit"].loss_trace(), rel=1e-4)
    assert len(set(losses)) == 10
    for stage in ("teacher_fit", "teacher_test"):
        wanted = eager[stage].metrics["loss"]
        assert found[stage].metrics["loss"] == pytest.approx(wanted, rel=1e-4)
    assert found["teacher_fit"].facts["compile"]["eager_calls"] == 0


@pytest.mark.parametrize("mode", ["regional", pytest.param("whole", marks=pytest.mark.slow)])
def test_every_call_of_each_stage_is_one_of_a_compiled_graph(run, mode):
    """Whatever the lengths: code for training, for inference, without adapters; the last layer,
    which gives read-out tokens only, has its own.
    """
    found = run(mode)
    steps = found["teacher_fit"].counts["micro_batches"] - 1  # the observed one
    outputs = found["teacher_outputs"].counts["micro_batches"] - 1
    wanted = {
        "teacher_fit": (2, 1, steps + 2 * INFERENCES),
        "teacher_test": (1, 0, INFERENCES - 1),
        "teacher_outputs": (2, 1, outputs + 1),
    }
    parts, codes = (LAYERS, 2) if mode == "regional" else (1, 1)
    for stage, (graphs, recompiles, calls) in wanted.items():
        fact = found[stage].facts["compile"]
        assert fact == {
            "mode": mode,
            "graphs": graphs * codes,
            "breaks": 0,
            "break_reasons": [],
            "recompiles": recompiles * codes,
            "limit_reached": False,
            "seconds": found[stage].phases["compile"],
            "cache": None,
            "compiled_frames": graphs * codes,
            "compiled_calls": calls * parts,
            "eager_calls": 0,
        }
        assert fact["seconds"] > 0.1, "each stage compiles for itself"


def test_without_compiling_nothing_is_compiled(run):
    for observer in run("off").values():
        fact = observer.facts["compile"]
        assert (fact["mode"], fact["graphs"], fact["seconds"]) == ("off", 0, 0.0)
        assert fact["compiled_calls"] == fact["eager_calls"] == 0
        assert "compile" not in observer.phases


@pytest.mark.parametrize("mode", ["regional", pytest.param("whole", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", TEACHER)
def test_the_observed_step_shows_what_it_shows_without_compiling(run, mode, stage):
    names = ["operators", "gemm_dtypes", "attention_ops", "saved_bytes", "gate_calls"]
    names += ["checkpoint_calls", "training", "autocast_dtype"]
    eager = run("off", family=FAMILY[mode])[stage].facts
    found = run(mode)[stage].facts
    assert {name: found[name] for name in names} == {name: eager[name] for name in names}
    assert found["operators"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_inductor_compiles_both_ways_from_an_empty_cache(run, mode, monkeypatch, tmp_path):
    eager = run("off", family=FAMILY[mode])["teacher_fit"].loss_trace()
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = run(mode, "loop", "lora", "inductor")["teacher_fit"]
    fact = found.facts["compile"]
    assert found.loss_trace() == pytest.approx(eager, rel=1e-4)
    graphs = 4 if mode == "regional" else 2
    assert (fact["cache"], fact["graphs"], fact["eager_calls"]) == ("cold", graphs, 0)
    assert fact["seconds"] > 1


# ---- layers, lengths, checkpointing ----


def test_layers_beyond_the_limit_of_recompiles_share_one_graph(monkeypatch):
    """All but the last."""
    deep = llm.PRESETS["tiny"] | {"num_hidden_layers": 10}
    monkeypatch.setitem(llm.PRESETS, "tiny", deep)
    fact = compiled("regional", [ROWS, ROWS])
    assert (fact["graphs"], fact["compiled_calls"], fact["limit_reached"]) == (2, 10, False)


@pytest.mark.parametrize(
    ("mode", "adapter"),
    [
        ("regional", "lora"),
        pytest.param("whole", "qlora", marks=pytest.mark.slow),
    ],
)
def test_compiled_checkpointing_changes_no_gradient(monkeypatch, mode, adapter):
    """Two forwards before the backward: each is recomputed with its own gates."""
    batches = [ROWS[:3], ROWS[3:]]
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    monkeypatch.setattr(compiling, "DYNAMIC", False)  # sooner compiled
    plain = gradients(*build("off", adapter=adapter), batches)
    model, settings = build(mode, adapter=adapter, gradient_checkpointing=True)
    found = gradients(model, settings, batches)
    assert model.execution.eager_calls == 0 < model.execution.compiled_calls
    for name, gradient in plain.items():
        assert gradient.any(), name
        assert tiny.close(found[name], gradient, 1e-4), name


def gradients(model: teacher.Teacher, settings: Settings, batches: list[list[int]]) -> dict:
    model.train()
    losses = [
        teacher.training_loss(model, tiny.batch(model, settings, rows), settings, 0.1, Observer())
        for rows in batches
    ]
    sum(losses).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("mode", MODES)
def test_packed_batches_are_compiled_once_for_their_shape(mode):
    """And what has other shapes runs beside it, with equal answers."""
    given = {"data": {"batching": "packed"}, "teacher": {"max_history": 4}}
    settings = Settings.model_validate(given | {"student": tiny.STUDENT.model_dump()})
    train = settings.train.model_copy(update={"compile": mode})
    chosen = settings.model_copy(update={"train": train})
    model, plain = tiny.teacher(chosen), tiny.teacher(settings)
    observer = Observer()
    with compiling.account(model.execution, observer), torch.no_grad():
        batches = tiny.batches(model, chosen, 12, seed=0)
        for batch in (batches[i] for i in range(len(batches))):
            assert tiny.close(model.read_out(batch), plain.read_out(batch), 1e-4)
        teacher.item_embeddings(model, tiny.pieces())
    facts = observer.facts["compile"]
    parts = LAYERS if mode == "regional" else 1
    assert (facts["graphs"], facts["recompiles"], facts["eager_calls"]) == (parts, 0, 0)
    assert facts["compiled_calls"] == len(batches) * parts
    assert len({len(batches[i]["readout"]) for i in range(len(batches))}) > 1


def test_compiled_checkpointing_keeps_less_for_the_backward(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager_decomp_partition")
    monkeypatch.setattr(compiling, "DYNAMIC", False)  # sooner compiled
    kept = {}
    for recomputed in (False, True):
        model, settings = build("regional", gradient_checkpointing=recomputed)
        batch = tiny.batch(model, settings, ROWS)
        kept[recomputed] = activation_bytes(model.train(), batch)
    assert kept[True] < 0.55 * kept[False]


def activation_bytes(model: teacher.Teacher, batch: dict) -> int:
    """Bytes a forward keeps for the backward, weights left out."""
    weights, sizes = {p.data_ptr() for p in model.parameters()}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.read_out(batch)
    return sum(sizes)


def test_a_cache_keeps_layers_from_sharing_code_and_is_refused():
    with pytest.raises(ValidationError, match=r"train\.compile: regional .*use_cache.* use whole"):
        Settings(train={"compile": "regional"}, teacher={"use_cache": True})
    assert compiled("regional", [ROWS, ROWS], use_cache=True)["graphs"] == LAYERS
    whole = compiled("whole", [ROWS, ROWS], use_cache=True, llm_model_name=FAMILY["whole"])
    assert whole["graphs"] == 1
    assert Settings(train={"compile": "whole"}, teacher={"use_cache": True})


# ---- what goes wrong is seen ----


def break_in(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    _dynamo.graph_break()


def test_a_break_is_counted_with_its_reason():
    def plant(model: teacher.Teacher) -> None:
        for name, module in model.backbone.named_modules():
            if name.endswith("fc1"):
                module.register_forward_hook(break_in)

    fact = compiled("regional", [ROWS, ROWS], plant)
    assert fact["breaks"] > 0
    assert fact["graphs"] > 1
    assert any("graph_break" in reason for reason in fact["break_reasons"])
    assert all("\n" not in reason and len(reason) <= 200 for reason in fact["break_reasons"])


def lengths(model: teacher.Teacher, settings: Settings) -> list[list[int]]:
    """Batches of two rows, each of another width."""
    found = {}
    for row in range(len(tiny.queries())):
        rows = [row, row]
        found.setdefault(tiny.batch(model, settings, rows)["ids"].shape[1], rows)
    return list(found.values())


def test_fixed_shapes_run_into_the_limit_and_it_shows(monkeypatch):
    batches = lengths(*build("off"))
    assert len(batches) == 4
    dynamic = compiled("regional", batches)
    assert (dynamic["graphs"], dynamic["limit_reached"], dynamic["eager_calls"]) == (2, False, 0)
    monkeypatch.setattr(compiling, "DYNAMIC", False)
    with _dynamo.config.patch(recompile_limit=2):
        fixed = compiled("regional", batches)
    assert (fixed["graphs"], fixed["recompiles"]) == (4, 2)
    assert fixed["limit_reached"]
    assert (fixed["compiled_calls"], fixed["eager_calls"]) == (2 * LAYERS, LAYERS)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_observed_inside_compiled_code_would_stop_compiling(mode):
    """The compiler steps aside for a census, for good: seen by the calls."""

    def observe_compiled(model: teacher.Teacher) -> None:
        model.execution.uncompiled = nullcontext

    fact = compiled(mode, [ROWS] * 3, observe_compiled)
    assert fact["compiled_calls"] == 0
    assert fact["eager_calls"] == 3 * LAYERS


def test_what_others_compile_is_seen_with_compiling_off():
    model, _ = build("off")
    observer = Observer()
    with compiling.account(model.execution, observer):
        torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))
    fact = observer.facts["compile"]
    assert (fact["mode"], fact["graphs"]) == ("off", 1)
    assert observer.phases["compile"] > 0


def test_a_stage_ends_its_account():
    model, settings = build("regional")
    observer = Observer()
    with pytest.raises(ZeroDivisionError), compiling.account(model.execution, observer):
        raise ZeroDivisionError
    train(model, settings, Observer(), ROWS)
    train(model, settings, Observer(), ROWS)
    assert "compile" not in observer.phases
    assert observer.facts["compile"]["graphs"] == 0


def test_two_models_of_one_stage_have_an_account_each():
    """The second model's reset of the compiler ends what the first was told."""
    observer = Observer()
    with observer.until_end:
        for _ in range(2):
            model, settings = build("regional")
            observer.until_end.enter_context(compiling.account(model.execution, observer))
            observer.facts.pop("operators", None)
            train(model, settings, observer, ROWS)
            train(model, settings, observer, ROWS)
    assert observer.phases["compile"] > 0
    assert not _dynamo.callback_handler.start_callbacks


# ---- seconds ----


def test_a_backward_compiled_later_is_time_of_compiling(monkeypatch):
    """As it is where no length varies."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    monkeypatch.setattr(compiling, "DYNAMIC", False)
    model, settings = build("regional")
    triggers, within = [], []
    observer = Observer(on_phase=within.append)

    def started(args) -> None:
        triggers.append((args.callback_trigger, within[-1]))

    with compiling.account(model.execution, observer), observer.phase("train_steps"):
        _dynamo.callback_handler.register_start_callback(started)
        train(model, settings, observer, ROWS)
        train(model, settings, observer, ROWS)
    assert set(triggers) == {
        (CallbackTrigger.DYNAMO, "compile"),
        (CallbackTrigger.LAZY_BACKWARD, "compile"),
    }
    assert within[-1] == "train_steps"
    assert observer._open == []


def test_another_thread_may_ask_how_far_compiling_has_come(monkeypatch):
    told = []

    def slow(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        time.sleep(0.05)
        asking = threading.Thread(target=lambda: told.append(observer.learnt()))
        asking.start()
        asking.join()
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", slow)
    model, settings = build("regional", llm_model_name="tiny-llama")  # two versions of a layer
    observer = Observer()
    with compiling.account(model.execution, observer):
        for _ in range(2):
            train(model, settings, observer, ROWS)
        told.append(observer.learnt())
    assert [one["graphs"] for one in told] == [0, 1, 2]
    assert told[0]["compile_s"] > 0.05
    assert told[1]["compile_s"] > told[0]["compile_s"] + 0.05
    assert told[2]["compile_s"] == observer.phases["compile"]
    assert {one["breaks"] for one in told} == {0}


# ---- the worker ----


def test_the_worker_lives_while_it_compiles(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(worker, "PROGRESS_S", 0.02)
    seen = iter(range(1000))
    path = tmp_path / "lines"
    with path.open("w") as file:
        lines = worker.Lines(file)
        observer = worker.listening(lines)
        observer.learnt = lambda: {"compile_s": 1.5, "graphs": next(seen), "breaks": 0}
        with worker.heartbeat(lines), observer.phase("train_steps"):
            time.sleep(0.1)
            with observer.phase("compile"):
                time.sleep(0.5)
            time.sleep(0.1)
    told = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["phase"] for line in told if "learnt" not in line] == ["train_steps"] * 2
    beats = [line["learnt"] for line in told if line["phase"] == "compile"]
    assert len(beats) > 5
    assert [beat["graphs"] for beat in beats] == sorted({beat["graphs"] for beat in beats})
    assert told[-1]["phase"] == "train_steps"


def test_two_threads_never_put_the_worker_back_into_a_phase(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(worker, "PROGRESS_S", 0)
    path = tmp_path / "lines"
    with path.open("w") as file:
        lines = worker.Lines(file)
        lines.learning = lambda: {"graphs": lines.steps["train_steps"]}
        with worker.heartbeat(lines):
            for step in range(300):
                lines.enter("teacher_fit", "compile")
                time.sleep(0.0002)
                lines.enter("teacher_fit", "train_steps")
                lines.steps["train_steps"] = step + 1
    told = [json.loads(line) for line in path.read_text().splitlines()]
    order = [line["learnt"]["graphs"] for line in told if line["phase"] == "compile"]
    assert order == sorted(order)
    changes = [a for a, b in pairwise(told) if a["phase"] != b["phase"]]
    assert len(changes) == 599


def test_a_record_leaves_out_and_counts_the_steps_that_compiled(monkeypatch, tmp_path: Path):
    from test_worker import Order

    order = Order(tmp_path, monkeypatch)
    settings = RUN | {"train": RUN["train"] | {"compile": "regional"}}
    assert order.run(task="prepare", settings=settings)[0] == 0
    status, lines = order.run(settings=settings)
    assert status == 0
    fit, test = (line for line in lines if line["kind"] == "stage")
    for line in (fit, test):
        assert line["counts"]["compile_steps"] == 1
        assert len(line["steps"]) == line["counts"]["micro_batches"] - 2  # the observed one too
        assert line["phases"]["compile"] == line["facts"]["compile"]["seconds"]
        assert max(step["seconds"] for step in line["steps"]) < line["phases"]["compile"]
    compiling_lines = [line for line in lines if line.get("phase") == "compile"]
    assert {line["stage"] for line in compiling_lines} == {"teacher_fit", "teacher_test"}
    assert all(set(line["learnt"]) == {"compile_s", "graphs", "breaks"} for line in compiling_lines)

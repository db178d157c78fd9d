"""The worker's side of the protocol, inside this process: which lines it writes, and when."""

import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forgetful_worker
import pytest
import torch

from bench import records, worker
from bench.launching import deaths
from core import checkpoints, pipeline, stages
from core.loop import NonFiniteLoss

# `pipeline.prepare_process` silences these for a run; pytest sets the filters anew for each test.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

SETTINGS = {
    "machine": {"threads": 1, "device": "cpu"},
    "data": {"synthetic": {"users": 60, "items": 48, "mean_length": 8}},
    "student": {"max_epochs": 1, "hidden_size": 16},
    "teacher": {"inference_batch_size": 16},
    "train": {"max_epochs": 1, "batch_size": 16, "max_steps": 6, "accumulate_grad_batches": 2},
}
MEASURED = ["teacher_fit", "teacher_test"]


class Order:
    """One cell file and its run inside this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.shared, self.private = folder / "shared", folder / "private"

    def run(self, **changes: Any) -> tuple[int, list[dict[str, Any]]]:
        """Exit status and lines of a worker with this order."""
        path = self.folder / "cell.jsonl"
        path.unlink(missing_ok=True)
        cell = {
            "cell": "baseline",
            "stages": MEASURED,
            "settings": SETTINGS,
            "records": str(path),
            "artefacts": str(self.private),
            "shared_artefacts": str(self.shared),
            "warmup_steps": 2,
            "task": "measure",
        } | changes
        order = self.folder / "cell.json"
        order.write_text(json.dumps(cell))
        self.monkeypatch.setattr(sys, "argv", ["worker", str(order)])
        status = worker.main()
        return status, [json.loads(line) for line in path.read_text().splitlines()]

    def parent(self, **changes: Any) -> tuple[deaths.Job, deaths.Events]:
        """What the parent reads of the last run."""
        job = deaths.Job(
            ("worker",),
            self.folder / "cell.json",
            self.folder / "cell.jsonl",
            self.folder / "log",
            **{"stages": tuple(MEASURED), "timeout_s": 60.0} | changes,
        )
        events = deaths.Events()
        deaths.read_events(job.records, events)
        return job, events

    def breaks(self, stage: str, error: BaseException) -> None:
        """Make a stage raise, before it has done anything."""

        def raising(work: stages.Work) -> None:
            with work.observer.phase("evaluation"):
                raise error

        node = pipeline.PIPELINE[stage]
        broken = pipeline.Stage(raising, node.needs, node.reads, node.uses)
        self.monkeypatch.setitem(pipeline.PIPELINE, stage, broken)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, list]]:
    """A set-up run: its folder, exit status and lines."""
    folder = tmp_path_factory.mktemp("set-up")
    with pytest.MonkeyPatch.context() as monkeypatch:
        status, lines = Order(folder, monkeypatch).run(task="prepare")
        yield folder, status, lines


@pytest.fixture
def order(prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Order:
    """An order whose set-up has been made."""
    shutil.copytree(prepared[0] / "shared", tmp_path / "shared")
    return Order(tmp_path, monkeypatch)


def kinds(lines: list[dict[str, Any]]) -> list[str]:
    return [line["kind"] for line in lines if line["kind"] != "progress"]


def made(folder: Path) -> set[str]:
    """Stages whose artefacts lie in a folder."""
    return {path.parent.name.rpartition("-")[0] for path in folder.glob("*/manifest.json")}


# ---- set-up and measurement ----


def test_set_up_makes_what_is_needed_and_records_no_stage(prepared) -> None:
    folder, status, lines = prepared
    assert status == 0
    assert kinds(lines) == ["start", "end"]
    assert made(folder / "shared") == {"prepare_data", "student_fit"}
    assert not (folder / "private").exists()


def test_a_measured_process_records_each_stage_once(order: Order) -> None:
    status, lines = order.run()
    assert status == 0
    assert kinds(lines) == ["start", "stage", "stage", "end"]
    assert [line["stage"] for line in lines if line["kind"] == "stage"] == MEASURED
    assert made(order.private) == set(MEASURED)
    assert made(order.shared) == {"prepare_data", "student_fit"}, "set-up is not written to"
    start = lines[0]["machine"]
    assert start["torch"] == torch.__version__
    assert (start["device"], start["threads"], start["image"]) == ("cpu", 1, pipeline.image())


def test_the_parent_finds_nothing_to_complain_of(order: Order, tmp_path: Path) -> None:
    order.run()
    job, events = order.parent()
    assert deaths.name_death(job, events, 0, False, False, ()) == ("ok", None)
    head = {"schema": records.SCHEMA, "matrix": "m", "cell": "baseline", "key": "k"}
    head |= {"block": 1, "repeat": 1}
    group = [head | line for line in deaths.sound_lines(job, events)]
    records.append(tmp_path / "records.jsonl", group)
    assert records.read(tmp_path / "records.jsonl") == group
    assert records.finished(group, MEASURED) == {("k", 1)}
    assert set(group[0]) == set(head) | set(records.empty_record("", "", None))


def test_a_stage_line_accounts_for_its_time_and_steps(order: Order) -> None:
    _, lines = order.run()
    fit, test = (line for line in lines if line["kind"] == "stage")
    for line in (fit, test):
        assert sum(line["phases"].values()) == pytest.approx(line["wall_s"], rel=1e-9)
        assert min(line["phases"].values()) >= 0
        assert sum(step["seconds"] for step in line["steps"]) < line["wall_s"]
        assert line["warmup_steps"] == 2
        assert line["memory"]["host_peak_bytes"] > 0
        assert line["loader_wait_s"] >= 0
    # Six batches, of which the first is observed and not timed.
    assert fit["counts"]["micro_batches"] == len(fit["losses"]) == 6
    assert [step["optimizer_step"] for step in fit["steps"]] == [True, False, True, False, True]
    assert fit["counts"]["optimizer_steps"] == 3
    assert test["counts"]["rows"] == len(test["ranks"]) == 60
    assert 0 <= test["metrics"]["recall@10"] <= 1


def test_what_cannot_be_known_is_no_zero(order: Order) -> None:
    """No CUDA device here, and nothing loaded in a stage without batches."""
    _, lines = order.run(stages=["prepare_data"], shared_artefacts=str(order.folder / "none"))
    line = next(line for line in lines if line["kind"] == "stage")
    assert line["loader_wait_s"] is None
    assert line["ranks"] is None
    device = {name: v for name, v in line["memory"].items() if name.startswith(("torch", "device"))}
    assert len(device) >= 3
    assert all(value == {"unavailable": "no CUDA device"} for value in device.values())


def test_a_stage_found_finished_is_refused(order: Order) -> None:
    """Nothing ran, so nothing was timed: a record of it would be a lie."""
    assert order.run()[0] == 0
    status, lines = order.run()
    assert status == 1
    assert kinds(lines) == ["start", "failure"]
    assert lines[-1]["stage"] == "teacher_fit"
    assert "teacher_fit: found finished before it was measured" in lines[-1]["reason"]


# ---- preflight ----


def test_a_trial_takes_two_batches_in_one_process_and_loads_them_in_another(order: Order) -> None:
    shared = sorted(order.shared.iterdir())
    stages = [*MEASURED, "teacher_outputs"]
    status, lines = order.run(task="preflight_fit", stages=stages)
    assert (status, kinds(lines)) == (0, ["start", "end"])
    assert made(order.private) == {"teacher_fit"}
    (fit,) = order.private.glob("teacher_fit-*")
    losses = (fit / "steps.jsonl").read_text().splitlines()
    assert len(losses) == 3, "two make a step of the optimizer, the third follows it"
    status, lines = order.run(task="preflight_load", stages=stages)
    assert (status, kinds(lines)) == (0, ["start", "end"])
    assert made(order.private) == set(stages)
    (test,) = order.private.glob("teacher_test-*")
    assert json.loads((test / "metrics.json").read_text())["users"] == 32
    told = [(line["stage"], line["phase"]) for line in lines if line["kind"] == "progress"]
    assert ("teacher_fit", "reload") in told
    assert sorted(order.shared.iterdir()) == shared, "set-up is not written to"
    assert order.run(stages=stages)[0] == 0, "what a trial made is not taken for a measured stage"


def test_a_trial_without_a_fit_goes_on_from_what_set_up_made(order: Order) -> None:
    assert order.run(task="prepare", stages=["teacher_test"])[0] == 0
    status, _ = order.run(task="preflight_load", stages=["teacher_test"])
    assert status == 0
    assert made(order.private) == {"teacher_test"}


def test_a_trial_of_the_whole_pipeline_does_all_before_the_last_fit_first(order: Order) -> None:
    stages = list(pipeline.STAGES)
    nothing = {"shared_artefacts": str(order.folder / "none"), "stages": stages}
    assert order.run(task="preflight_fit", **nothing)[0] == 0
    assert made(order.private) == set(stages[: stages.index("distill_fit") + 1])
    assert order.run(task="preflight_load", **nothing)[0] == 0
    assert made(order.private) == set(stages)


@pytest.mark.parametrize("way", ["drops_a_key", "loads_other_numbers"])
def test_a_checkpoint_that_is_not_the_model_is_bad_output(order: Order, way: str) -> None:
    order.monkeypatch.setattr(checkpoints, "save_teacher", checkpoints.save_teacher)
    order.monkeypatch.setattr(checkpoints, "load_teacher", checkpoints.load_teacher)
    getattr(forgetful_worker, way)()
    assert order.run(task="preflight_fit")[0] == 0
    assert order.run(task="preflight_load")[0] == 1
    job, events = order.parent(task="preflight_load")
    found, reason = deaths.name_death(job, events, 1, None, False, ())
    assert found == "bad_output"
    wanted = {"drops_a_key": "keys do not fit", "loads_other_numbers": "users differ by"}[way]
    assert reason is not None and reason.startswith("reload: BadCheckpoint: teacher_fit/best")
    assert wanted in reason
    assert deaths.failed_stage(job, events) == "teacher_fit"
    assert made(order.private) == {"teacher_fit"}, "no stage is tried on a wrong checkpoint"


def test_a_missing_stage_shows_in_its_trial(order: Order) -> None:
    order.breaks("teacher_test", NotImplementedError("no test step"))
    assert order.run(task="preflight_fit")[0] == 0
    status, lines = order.run(task="preflight_load")
    assert status == 1
    assert (lines[-1]["stage"], lines[-1]["phase"]) == ("teacher_test", "evaluation")


# ---- failures ----


@pytest.mark.parametrize(
    ("error", "written", "named"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "oom_gpu", "oom_gpu"),
        (MemoryError(), "oom_host", "oom_host"),
        (ImportError("flash_attn.so: undefined symbol: _ZN3"), "import", "import"),
        (ModuleNotFoundError("No module named 'x'"), "import", "import"),
        (NonFiniteLoss("step 3: training loss is nan"), "bad_output", "bad_output"),
        (RuntimeError("CUDA driver error: operation not supported"), None, "driver"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), None, "oom_host"),
        (ValueError("an ordinary mistake"), None, "error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value or "text",
)
def test_a_failure_has_the_status_of_its_exception(
    order: Order, error: Exception, written: str | None, named: str
) -> None:
    """Or no status, where the parent's reading of the text decides."""
    order.breaks("teacher_fit", error)
    status, lines = order.run()
    assert status == 1
    assert kinds(lines) == ["start", "failure"]
    failure = lines[-1]
    assert (failure["stage"], failure["phase"]) == ("teacher_fit", "evaluation")
    assert failure["status"] == written
    assert failure["reason"] == f"{type(error).__name__}: {error}"
    job, events = order.parent()
    found, reason = deaths.name_death(job, events, 1, False, False, ())
    assert found == named
    assert reason == f"evaluation: {failure['reason']}"


def test_stages_finished_before_a_failure_stay(order: Order) -> None:
    order.breaks("teacher_test", ValueError("late"))
    status, lines = order.run()
    assert status == 1
    assert kinds(lines) == ["start", "stage", "failure"]
    job, events = order.parent()
    assert [line["stage"] for line in deaths.sound_lines(job, events)] == ["teacher_fit"]
    assert deaths.failed_stage(job, events) == "teacher_test"


def test_the_place_of_a_failure_is_not_that_of_the_stage_before(order: Order) -> None:
    """A stage that dies before its first phase has no phase of another stage."""
    order.monkeypatch.setattr(pipeline.artefacts, "read_manifest", refuse_after("teacher_fit"))
    _, lines = order.run()
    failure = lines[-1]
    assert (failure["stage"], failure["phase"]) == ("teacher_test", "begin")


def refuse_after(stage: str) -> Callable[[Path], dict]:
    read = stages.artefacts.read_manifest

    def reading(folder: Path) -> dict:
        if folder.name.startswith(stage):
            raise ValueError("unreadable")
        return read(folder)

    return reading


def test_a_failed_set_up_names_the_stage_it_was_in(order: Order) -> None:
    order.breaks("student_fit", MemoryError("full"))
    status, lines = order.run(task="prepare", shared_artefacts=str(order.folder / "new"))
    assert status == 1
    assert kinds(lines) == ["start", "failure"]
    assert (lines[-1]["stage"], lines[-1]["status"]) == ("student_fit", "oom_host")


def test_an_order_that_cannot_be_read_fails_before_the_start(order: Order) -> None:
    status, lines = order.run(settings={"train": {"precision": "fp7"}})
    assert status == 1
    assert kinds(lines) == ["failure"]
    assert lines[0]["stage"] == "start_up"
    assert "fp7" in lines[0]["reason"]


def test_a_measured_stage_without_its_set_up_says_what_is_missing(order: Order) -> None:
    status, lines = order.run(shared_artefacts=str(order.folder / "none"))
    assert status == 1
    assert "teacher_fit: needs prepare_data, which has not run" in lines[-1]["reason"]


# ---- progress ----


class Clock:
    """A clock that moves when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(worker.time, "monotonic", lambda: self.now_s)


def test_progress_is_a_sign_of_life_and_not_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with (tmp_path / "lines").open("w+") as file:
        lines = worker.Lines(file)
        lines.stage = "teacher_fit"
        observer = worker.listening(lines)
        with observer.phase("train_steps"):
            for _ in range(1000):
                clock.now_s += 0.01
                observer.step(1)
        file.seek(0)
        written = [json.loads(line) for line in file]
    # Ten seconds: the first at once, then one each half second.
    assert 19 <= len(written) <= 21
    assert {line["kind"] for line in written} == {"progress"}
    assert {(line["stage"], line["phase"]) for line in written} == {("teacher_fit", "train_steps")}
    numbers = [line["step"] for line in written]
    assert numbers == sorted(numbers)
    assert numbers[-1] > 900


def test_the_begin_of_a_stage_and_of_a_phase_is_told_at_once(order: Order) -> None:
    """The parent names the place of a sudden death by the last line of progress, and times phases
    by these lines.
    """
    order.monkeypatch.setattr(worker, "PROGRESS_S", 3600)
    _, lines = order.run()
    told = [(line["stage"], line["phase"]) for line in lines if line["kind"] == "progress"]
    assert list(dict.fromkeys(stage for stage, _ in told)) == MEASURED
    for line in (line for line in lines if line["kind"] == "stage"):
        phases = [phase for stage, phase in told if stage == line["stage"]]
        assert phases[0] == "begin"
        assert set(phases[1:]) == set(line["phases"]) - {"unaccounted"}
    assert all(one != other for one, other in itertools.pairwise(told))


def test_steps_are_counted_anew_in_each_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PROGRESS_S", 0)
    phases = ("train_steps", "validation")
    with (tmp_path / "lines").open("w+") as file:
        observer = worker.listening(worker.Lines(file))
        for name in phases:
            with observer.phase(name):
                observer.step(1)
                observer.step(1)
        file.seek(0)
        told = [(line["phase"], line["step"]) for line in map(json.loads, file)]
    assert told == [(name, step) for name in phases for step in range(3)]


def test_a_phase_goes_on_counting_after_one_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PROGRESS_S", 3600)
    with (tmp_path / "lines").open("w+") as file:
        lines = worker.Lines(file)
        observer = worker.listening(lines)
        lines.learning = lambda: {"graphs": 1}
        lines.enter("teacher_fit")
        with observer.phase("train_steps"):
            observer.step(1)
            with observer.phase("compile"):
                pass
            observer.step(1)
        lines.enter("teacher_test")
        with observer.phase("train_steps"):
            pass
        file.seek(0)
        told = [(line["phase"], line["step"], line.get("learnt")) for line in map(json.loads, file)]
    assert told == [
        ("begin", 0, None),
        ("train_steps", 0, None),
        ("compile", 0, {"graphs": 1}),
        ("train_steps", 1, None),
        ("begin", 0, None),
        ("train_steps", 0, None),
    ]


def test_a_line_is_on_the_disk_when_it_is_written(tmp_path: Path) -> None:
    """The process may be killed at any moment after."""
    path = tmp_path / "lines"
    with path.open("w") as file:
        worker.Lines(file).write("start", pid=1)
        assert json.loads(path.read_text()) == {"kind": "start", "pid": 1}

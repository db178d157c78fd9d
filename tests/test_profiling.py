"""A profile: what a trace tells, the LoRA count of arithmetic, the script of a profiled stage."""

import gzip
import itertools
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench import overhead, profiling, worker
from bench.profile import ceilings, counting, profiled, snapshots, trace
from bench.profile.arithmetic import Backbone, attention_share, rates, teacher_flops
from core.observe import Observer, Step
from core.settings import Settings
from core.teacher import training_loss

CPU = tiny.CPU
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# `pipeline.prepare_process` silences these for a run; pytest sets the filters anew for each test.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

# ---- traces ----


def op(name: str, ts: float, dur: float, number: int = -1, types: tuple = ("float",)) -> dict:
    args = {"External id": number, "Input type": list(types)}
    event = {"ph": "X", "cat": "cpu_op", "name": name, "pid": 1, "tid": 1, "ts": ts, "dur": dur}
    return event | {"args": args}


def kernel(ts: float, dur: float, number: int = -1, name: str = "k") -> dict:
    event = {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": ts, "dur": dur}
    return event | {"args": {"External id": number}}


def a_step(ts: float, dur: float) -> dict:
    name = f"ProfilerStep#{int(ts)}"
    base = {"ph": "X", "cat": "user_annotation", "pid": 1, "tid": 1, "args": {}}
    return base | {"name": name, "ts": ts, "dur": dur}


def allocation(ts: float, size: int, address: int, total: int, device: int = 0) -> dict:
    args = {"Bytes": size, "Addr": address, "Total Allocated": total, "Device Type": device}
    return {"ph": "i", "name": "[memory]", "pid": 1, "tid": 1, "ts": ts, "args": args}


def test_an_operator_s_time_leaves_out_what_it_calls() -> None:
    events = [
        a_step(0, 100),
        op("aten::linear", 10, 50, types=("c10::BFloat16", "c10::BFloat16", "Scalar")),
        op("aten::mm", 20, 30),
        op("aten::mm", 70, 10),
    ]
    longest, other = trace.operators(events)
    assert (longest.name, longest.calls, longest.dtypes) == ("aten::mm", 2, ("float32",))
    assert longest.seconds == pytest.approx(40e-6)
    assert longest.share == pytest.approx(0.4)
    assert (other.seconds, other.dtypes) == (pytest.approx(20e-6), ("bfloat16",))
    assert trace.device_busy(events) is None


def test_on_a_gpu_an_operator_s_time_is_that_of_its_kernels() -> None:
    events = [
        a_step(0, 100),
        op("aten::linear", 10, 50, 1),
        op("aten::mm", 20, 5, 2),
        kernel(30, 60, 2),
        kernel(60, 60, 9, "alone"),
    ]
    found = {one.name: one for one in trace.operators(events)}
    assert set(found) == {"aten::mm", "alone"}
    assert found["aten::mm"].seconds == pytest.approx(60e-6)
    assert found["alone"].calls == 1
    # The device ends later than the step, and two kernels at a time are busy once.
    assert trace.window(events) == (0, 120)
    assert trace.device_busy(events) == pytest.approx(90 / 120)


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="without ProfilerStep"):
        trace.window([op("aten::mm", 0, 1)])


def test_memory_is_told_at_its_peak_with_the_operators_that_made_it() -> None:
    events = [
        op("aten::mm", 0, 10),
        op("aten::add", 20, 10),
        allocation(1, 400, 1, 400),
        allocation(21, 100, 2, 500),
        allocation(22, 100, 3, 600),
        allocation(25, -400, 1, 200),
        allocation(40, 50, 4, 250),
        allocation(41, -7, 99, 243),  # of before the window
    ]
    found = trace.memory(events)
    assert found is not None
    assert found.peak_bytes == 600
    assert found.at_peak == (("aten::mm", 400, 1), ("aten::add", 200, 2))


def test_memory_of_the_gpu_goes_first_and_none_is_none() -> None:
    events = [allocation(1, 4096, 1, 4096), allocation(2, 8, 2, 8, device=1)]
    found = trace.memory(events)
    assert found is not None
    assert (found.peak_bytes, found.at_peak) == (8, (("(no operator)", 8, 1),))
    assert trace.memory([op("aten::mm", 0, 10)]) is None


def test_the_memory_track_is_a_counter_of_the_viewer(tmp_path: Path) -> None:
    events = [allocation(1, 400, 1, 400), allocation(5, -400, 1, 0)]
    path = tmp_path / "trace.json.gz"
    trace.write(path, trace.with_memory_track({"traceEvents": events, "schemaVersion": 1}))
    found = trace.read(path)
    curve = [e for e in found["traceEvents"] if e["ph"] == "C"]
    assert [(e["ts"], e["args"]["bytes"]) for e in curve] == [(1, 400), (5, 0)]
    assert found["schemaVersion"] == 1
    before = path.read_bytes()
    trace.write(path, found)
    assert path.read_bytes() == before


def test_times_agree_with_the_profiler_s_own_table(tmp_path: Path) -> None:
    left = torch.randn(128, 128, requires_grad=True)
    with (
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler,
        torch.profiler.record_function("ProfilerStep#1"),
    ):
        (left @ left).relu().sum().backward()
    path = tmp_path / "trace.json.gz"
    profiler.export_chrome_trace(str(path))
    calls, own_us = Counter[str](), Counter[str]()
    for row in profiler.key_averages():  # overloads apart
        calls[row.key] += row.count
        own_us[row.key] += row.self_cpu_time_total
    found = trace.operators(trace.read(path)["traceEvents"])
    assert {"aten::mm", "aten::relu"} <= {one.name for one in found}
    for one in found:
        assert one.calls == calls[one.name]
        assert one.seconds * 1e6 == pytest.approx(own_us[one.name], abs=1)
    assert next(one for one in found if one.name == "aten::mm").dtypes == ("float32",)


# ---- arithmetic ----


def counted_step(family: str, **teacher: Any) -> tuple[Any, counting.Arithmetic, FlopCounterMode]:
    """One training step without padding, counted by us and by torch."""
    given = tiny.settings(llm_model_name=family, target_modules=("q_proj", "v_proj"), **teacher)
    model = tiny.teacher(given).train()
    lengths = tiny.queries().lengths
    rows = [int(row) for row in (lengths >= given.teacher.max_history).nonzero()[0]]
    batches = [tiny.batch(model, given, [row]) for row in rows]
    usual = max({one["tokens"] for one in batches}, key=[b["tokens"] for b in batches].count)
    same = [row for row, one in zip(rows, batches, strict=True) if one["tokens"] == usual]
    batch = tiny.batch(model, given, same[:16])
    assert batch["tokens"] == batch["padded_tokens"]
    observer = Observer()
    with FlopCounterMode(display=False) as theirs:
        training_loss(model, batch, given, 0.1, observer).backward()
    with counting.Arithmetic() as ours:
        counter_of(observer, ours)
        training_loss(model, batch, given, 0.1, observer).backward()
    return (model, batch), ours, theirs


def counter_of(observer: Observer, counter: counting.Arithmetic) -> None:
    """Tell the counter of the backbone, as a profiled stage does."""
    inner = observer.backbone

    def marked() -> Any:
        class Marked:
            def __enter__(self) -> None:
                self.inner = inner()
                self.inner.__enter__()
                counter.inside_backbone = True

            def __exit__(self, *error: Any) -> None:
                counter.inside_backbone = False
                self.inner.__exit__(*error)

        return Marked()

    observer.backbone = marked  # type: ignore[method-assign]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_lora_formula_agrees_with_the_counted_operators(family: str) -> None:
    """Within 0.1 %: the projection of the frozen item tokens wants no gradient of its input."""
    (model, batch), ours, theirs = counted_step(family, attn="eager")
    assert ours.flops == theirs.get_total_flops()
    sizes = counting.backbone_sizes(model.backbone)
    body = teacher_flops(sizes, batch["tokens"], batch["samples"], trains=True)
    assert body + 3 * ours.head_flops == pytest.approx(ours.flops, rel=0.001)
    assert body < 0.99 * ours.flops  # so the head is not idle
    usual = 6 * (sizes.weights + sizes.lora) * batch["tokens"]
    assert usual > 1.3 * body  # what 6 N a token would say of LoRA


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_fused_attention_computes_its_scores_twice(family: str) -> None:
    """Which the model does not ask for: 2 T² d more in backward, about 1 % here."""
    (model, batch), ours, theirs = counted_step(family, attn="sdpa")
    sizes = counting.backbone_sizes(model.backbone)
    tokens, samples = batch["tokens"], batch["samples"]
    asked = teacher_flops(sizes, tokens, samples, trains=True) + 3 * ours.head_flops
    again = 2 * tokens * (tokens / samples) * sizes.width * sizes.layers
    assert asked + again == pytest.approx(ours.flops, rel=0.001)
    assert theirs.get_total_flops() < asked  # torch's registry lacks the CPU's fused attention


def test_the_sizes_are_those_of_the_live_layers() -> None:
    model = tiny.teacher(tiny.settings(lora_r=8))
    found = counting.backbone_sizes(model.backbone)
    width, layers = 128, 2
    assert found == Backbone(
        weights=layers * (4 * width**2 + 2 * 4 * width**2),
        lora=layers * 2 * (2 * width * 8),
        layers=layers,
        width=width,
        weights_behind=width**2 + 2 * 4 * width**2,
        lora_behind=0,
    )


def test_4_bit_weights_count_as_numbers() -> None:
    dense = tiny.teacher(tiny.settings())
    packed = tiny.teacher(tiny.settings(adapter="qlora"))
    sizes = counting.backbone_sizes(packed.backbone)
    assert sizes == counting.backbone_sizes(dense.backbone)


@pytest.mark.parametrize(("length", "share"), [(100, 0.004), (400, 0.016)])
def test_attention_of_a_7b_model_is_what_the_cost_model_says(length: int, share: float) -> None:
    llama = Backbone(weights=6_476_005_376, lora=39_976_960, layers=32, width=4096)
    assert attention_share(llama, length, trains=False) == pytest.approx(share, rel=0.05)
    forward = teacher_flops(llama, length, 1, trains=False) / length
    assert forward == pytest.approx({100: 13.08e9, 400: 13.24e9}[length], rel=0.005)


def test_views_and_allocations_move_no_bytes() -> None:
    left, row = torch.ones(4, 8), torch.ones(1, 8)
    with counting.Arithmetic() as counter:
        left.t().reshape(-1, 4)[0].expand(100, 4)
        wide = row.expand(4, 8)
        torch.empty(1000)
    assert counter.bytes == 0
    with counting.Arithmetic() as counter:
        left + 1
        wide + left
    assert counter.bytes == (128 + 128) + (32 + 128 + 128)
    assert counter.flops == 0


def test_products_with_4_bit_weights_are_counted() -> None:
    model = tiny.teacher(tiny.settings(adapter="qlora"))
    dense = tiny.teacher(tiny.settings())
    given = tiny.settings()
    counts = []
    for one in (model, dense):
        batch = tiny.batch(one, given, [0, 1, 2])
        with torch.inference_mode(), counting.Arithmetic() as counter:
            one.read_out(batch)
        counts.append(counter.flops)
    assert counts[0] == counts[1]


def a_profile(**changes: Any) -> dict[str, Any]:
    """A profile with round figures: two probes of 0.1 s, as large as the counted step."""
    probe = {"seconds": 0.1, "issue_s": 0.06, "wait_s": 0.02, "cpu_s": 0.09}
    probe |= {"samples": 8, "tokens": 80, "padded_tokens": 100}
    counted = {"flops": 4e9, "bytes": 1e8, "head_flops": 1e9 / 3}
    counted |= {"samples": 8, "tokens": 80, "padded_tokens": 100}
    found = {
        "stage": "teacher_fit",
        "device": "cuda",
        "probes": [probe, probe],
        "counted": counted,
        "backbone": {"weights": 10**6, "lora": 10**4, "layers": 2, "width": 100},
        "ceilings": {"gemm_flops_per_s": 1e11, "copy_bytes_per_s": 1e10},
        "window": None,
    }
    return found | changes


def test_rates_are_of_the_probed_steps() -> None:
    found = rates(a_profile())
    assert found is not None
    assert found.step_s == pytest.approx(0.1)
    assert found.wait_share == pytest.approx(0.2)
    assert found.issue_share == pytest.approx(0.04 / 0.08)  # the wait for the loader issues nothing
    assert found.cpu_share == pytest.approx(0.9)
    assert found.flops_per_s == pytest.approx(4e10)
    assert found.flops_share == pytest.approx(0.4)
    assert found.bytes_share == pytest.approx(0.1)
    body = 160 * (4 * 10**6 + 6 * 10**4 + 12 * 10 * 100 * 2)
    assert found.mfu == pytest.approx((body + 2e9) / 0.2 / 1e11)


def test_the_body_goes_with_the_tokens_and_the_head_with_the_rows() -> None:
    probe = a_profile()["probes"][0] | {"padded_tokens": 200, "samples": 8}
    found = rates(a_profile(probes=[probe]))
    assert found is not None
    assert found.flops_per_s == pytest.approx((2 * 3e9 + 1e9) / 0.1)


def test_what_was_not_counted_is_unknown() -> None:
    assert rates(a_profile(probes=[])) is None
    found = rates(a_profile(device="cpu", counted=None))
    assert found is not None
    assert (found.issue_share, found.flops_share, found.mfu) == (None, None, None)
    student = rates(a_profile(stage="student_fit", backbone=None))
    assert student is not None
    assert (student.flops_share, student.mfu) == (pytest.approx(0.4), None)


def test_ceilings_are_of_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (64, 128)})
    monkeypatch.setattr(ceilings, "COPIED_BYTES", {"cpu": 1 << 20})
    seen: list[torch.dtype] = []
    mm = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda left, right, out: (seen.append(left.dtype), mm(left, right, out=out))
    )
    ceilings.gemm_flops_per_s.cache_clear()
    ceilings.copy_bytes_per_s.cache_clear()
    with profiling.float32_products("fp32"):
        rate = ceilings.gemm_flops_per_s(CPU, torch.bfloat16, "highest")
    assert set(seen) == {torch.bfloat16}
    assert 1e6 < rate < 1e15
    assert 1e6 < ceilings.copy_bytes_per_s(CPU) < 1e13
    ceilings.gemm_flops_per_s.cache_clear()
    ceilings.copy_bytes_per_s.cache_clear()


# ---- the script of a stage ----


class Stage:
    """A stage made of calls, under the script of a profile."""

    def __init__(self, folder: Path) -> None:
        self.heard: list[str] = []
        said = Observer(lambda step: self.heard.append("step"), self.heard.append)
        self.files = {"trace": folder / "a.trace.json.gz", "snapshot": folder / "a.pickle"}
        history = snapshots.History(CPU)
        self.observer = profiled.Profiled(said, CPU, history, self.files, warmup_steps=2)

    def steps(self, count: int, phase: str = "train_steps") -> None:
        """Some steps of one product each, in one phase."""
        factor = torch.ones(8, 8)
        with self.observer.phase(phase):
            for _ in range(count):
                with self.observer.first_step():
                    factor @ factor
                self.observer.step(4, 40, 50)


def test_every_step_and_phase_is_passed_on(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.steps(12)
    assert stage.heard.count("step") == 12
    assert {"train_steps", "observed_step", "trace"} <= set(stage.heard)
    # A hang limit needs the phase the stage is in, also after the trace was written.
    after = stage.heard[stage.heard.index("trace") + 1]
    assert after == "train_steps"


def test_probes_count_and_trace_follow_the_warm_up(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.steps(3)
    assert stage.observer.probed == []
    stage.steps(9)
    assert len(stage.observer.probed) == profiled.PROBES
    assert stage.observer.probed[0]["padded_tokens"] == 50
    assert stage.observer.counted is not None
    assert (stage.observer.counted["flops"], stage.observer.counted["samples"]) == (2 * 8**3, 4)
    assert stage.observer.missing() is None
    events = trace.read(stage.files["trace"])["traceEvents"]
    assert trace.steps(events) == profiled.ACTIVE
    found = {one.name: one for one in trace.operators(events)}
    assert found["aten::mm"].calls == profiled.ACTIVE
    assert not stage.files["snapshot"].exists()  # of CUDA only


def test_a_break_among_traced_steps_begins_the_trace_anew(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.steps(9)  # the trace is under way
    with stage.observer.phase("validation"):
        torch.ones(8).exp()
    assert not stage.files["trace"].exists()
    stage.steps(6)
    found = trace.operators(trace.read(stage.files["trace"])["traceEvents"])
    assert "aten::mm" in {one.name for one in found}
    assert "aten::exp" not in {one.name for one in found}


def test_a_break_within_a_probe_leaves_it_out(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    for _ in range(3 + 2):
        stage.steps(1)
        with stage.observer.phase("checkpoint"):
            pass
    assert stage.observer.probed == []


def test_a_stage_too_short_says_what_it_lacks(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.steps(6)
    stage.observer.script.close()
    assert not stage.files["trace"].exists()
    assert "6 steps: a trace needs 8 after the warm-up" in str(stage.observer.missing())


def test_validation_is_not_the_step_that_is_counted(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.steps(6)
    with stage.observer.phase("validation"), stage.observer.first_step():
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert stage.observer.counted is None
    stage.steps(1)
    assert stage.observer.counted is not None
    assert stage.observer.counted["flops"] == 2 * 8**3


# ---- a whole cell ----

SETTINGS = {
    "machine": {"threads": 1, "device": "cpu"},
    "data": {"synthetic": {"users": 60, "items": 48, "mean_length": 8}},
    "student": {"max_epochs": 1, "hidden_size": 16},
    "teacher": {"inference_batch_size": 4},
    "train": {"max_epochs": 1, "batch_size": 16, "max_steps": 12},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list, dict]]:
    """Folder, lines and stage profiles of one profiled cell."""
    folder = tmp_path_factory.mktemp("profile")
    order = {
        "cell": "baseline",
        "stages": ["teacher_fit", "teacher_test"],
        "settings": SETTINGS,
        "records": str(folder / "lines.jsonl"),
        "artefacts": str(folder / "private"),
        "shared_artefacts": str(folder / "shared"),
        "warmup_steps": 2,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "SIZES", {"cpu": (64,)})
        patch.setattr(ceilings, "COPIED_BYTES", {"cpu": 1 << 20})
        for task in ("prepare", "profile"):
            (folder / "cell.json").write_text(json.dumps(order | {"task": task}))
            patch.setattr("sys.argv", ["worker", str(folder / "cell.json")])
            assert worker.main() == 0
    ceilings.gemm_flops_per_s.cache_clear()
    ceilings.copy_bytes_per_s.cache_clear()
    lines = [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
    own = folder / "private" / "profile"
    stages = {name: json.loads((own / f"{name}.json").read_text()) for name in order["stages"]}
    yield own, lines, stages


def test_a_profiled_cell_writes_no_record(made) -> None:
    _, lines, _ = made
    assert {line["kind"] for line in lines} == {"start", "progress", "end"}


def test_each_stage_has_a_trace_that_opens(made) -> None:
    folder, _, stages = made
    for name, stage in stages.items():
        assert stage["files"] == [f"{name}.trace.json.gz"]
        with gzip.open(folder / stage["files"][0], "rt") as file:
            events = json.load(file)["traceEvents"]
        assert {"X", "C"} <= {event["ph"] for event in events}
        assert trace.steps(events) == stage["window"]["steps"] == profiled.ACTIVE


def test_the_operators_are_those_of_the_steps(made) -> None:
    _, _, stages = made
    for stage in stages.values():
        operators = {one["name"]: one for one in stage["window"]["operators"]}
        product = operators["aten::addmm"]
        assert product["dtypes"] == ["float32"]
        assert product["calls"] % profiled.ACTIVE == 0
        assert 0 < sum(one["share"] for one in operators.values()) <= 1
    fit, test = (stages[name]["window"]["operators"] for name in ("teacher_fit", "teacher_test"))
    assert any("backward" in one["name"] for one in fit)
    assert not any("backward" in one["name"] for one in test)


def test_the_figures_of_a_stage_are_plausible(made) -> None:
    _, _, stages = made
    for stage in stages.values():
        found = rates(stage)
        assert found is not None
        assert 0 <= found.wait_share < 1
        assert found.mfu is not None and found.flops_share is not None
        # Of batches without padding the two differ by what the model's count leaves out.
        assert 0.5 < found.mfu / found.flops_share < 1.05
        assert stage["window"]["memory"]["peak_bytes"] > 0
        assert stage["missing"] is None
    assert stages["teacher_fit"]["backbone"] == stages["teacher_test"]["backbone"]


# ---- snapshots ----


def test_an_out_of_memory_leaves_a_snapshot_and_stays_an_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    attached: list[Callable] = []
    monkeypatch.setattr(
        torch._C, "_cuda_attach_out_of_memory_observer", attached.append, raising=False
    )
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"state")
    )
    snapshots.write_on_oom(CPU, tmp_path / "x.pickle")
    assert attached == []
    snapshots.write_on_oom(torch.device("cuda"), tmp_path / "x.pickle")
    attached[0](0, 1, 2, 3)
    assert (tmp_path / "x.pickle").read_bytes() == b"state"

    snapshots.write_on_oom(torch.device("cuda"), tmp_path / "absent" / "x.pickle")
    attached[1](0, 1, 2, 3)
    assert "no memory snapshot" in capsys.readouterr().err


@pytest.mark.gpu
@NEEDS_CUDA
def test_a_real_out_of_memory_is_drawn(tmp_path: Path) -> None:
    device = torch.device("cuda")
    held = torch.ones(1 << 20, device=device)
    history = snapshots.History(device)
    history.record()
    snapshots.write_on_oom(device, tmp_path / "oom.pickle")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 50, device=device)
    history.stop()
    with (tmp_path / "oom.pickle").open("rb") as file:
        found = pickle.load(file)
    sizes = [block["size"] for segment in found["segments"] for block in segment["blocks"]]
    assert max(sizes) >= held.numel() * held.element_size()


@pytest.mark.gpu
@NEEDS_CUDA
def test_on_a_gpu_the_host_s_share_and_the_kernels_are_told(tmp_path: Path) -> None:
    device = torch.device("cuda")
    files = {"trace": tmp_path / "a.trace.json.gz", "snapshot": tmp_path / "a.pickle"}
    observer = profiled.Profiled(Observer(), device, snapshots.History(device), files, 2)
    factor = torch.ones(2048, 2048, device=device)
    with observer.phase("train_steps"):
        for _ in range(12):
            with observer.first_step():
                for _ in range(50):
                    factor @ factor
            observer.step(4)
    window = profiling.read_trace(files["trace"])
    assert window is not None
    assert window["device_busy"] > 0.5
    assert window["operators"][0]["name"] == "aten::mm"
    assert window["memory"]["peak_bytes"] >= factor.numel() * 4
    issued = [probe["issue_s"] / probe["seconds"] for probe in observer.probed]
    assert max(issued) < 0.9  # the device works longer than the host needs to say so
    assert files["snapshot"].is_file()


# ---- what meters cost ----


def test_every_meter_is_on_in_its_turn_and_off_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    clock = itertools.count()
    names = {id(meter): name for name, meter in overhead.METERS.items()}

    def run(settings: Any, shared: Path, meter: Any, planned: Any) -> float:
        ran.append(names[id(meter)])
        return 2.0 if names[id(meter)] == "step clock" else 1.0 + 1e-3 * next(clock) % 2e-3

    monkeypatch.setattr(overhead, "seconds_of_steps", run)
    monkeypatch.setattr(overhead.pipeline, "run_stage", lambda *args, **options: None)
    chosen = {name: overhead.METERS[name] for name in ("none", "step clock")}
    off, on = overhead.measure(tiny.settings(), 6, chosen)
    assert ran[0] == "none"  # not counted
    assert ran.count("step clock") == 6 and ran.count("none") == 1 + 2 * 6
    assert len({tuple(ran[1 + i : 4 + i]) for i in range(0, 18, 3)}) == 3  # the order turns
    rows = {row.split("|")[1].strip(): row for row in overhead.report(off, on).splitlines()[2:]}
    assert "slows the steps" in rows["step clock"]
    assert "less than 1 %" in rows["none"]


@pytest.mark.parametrize("name", [n for n in overhead.METERS if n != "NVML sampler"])
def test_each_meter_starts_listens_and_stops(name: str, tmp_path: Path) -> None:
    with overhead.METERS[name](CPU, tmp_path) as listener:
        listener.on_phase("train_steps")
        listener.on_step(Step(1, 2, 3, True))


def test_the_clock_of_steps_begins_after_the_observed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(name: str, settings: Any, store: Any, observer: Observer, planned: Any) -> None:
        for second in (5.0, 6.0, 7.0):
            times.append(second)
            observer.step(1)
        times.append(7.5)
        with observer.phase("validation"):
            pass

    times: list[float] = []
    monkeypatch.setattr(overhead.pipeline, "run_stage", stage)
    monkeypatch.setattr(overhead, "now", lambda device: times[-1])
    settings = Settings(machine={"device": "cpu"})
    assert overhead.seconds_of_steps(settings, Path(), overhead.none, {}) == 2.5

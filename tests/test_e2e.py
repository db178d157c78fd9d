"""From a matrix file to the report with the real worker: honest, deaf to a setting, and dying."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench import proofs, worker
from bench.proving import differences
from core import compiling
from core.config import load_settings
from core.settings import Settings

# `pipeline.prepare_process` silences these for a run; pytest sets the filters anew for each test.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
STAGES = ["teacher_fit", "teacher_test"]
BASE = {
    "data": {"synthetic": {"users": 100, "items": 60, "mean_length": 6}},
    "student": {"max_epochs": 1, "hidden_size": 16},
    "teacher": {"inference_batch_size": 16},
    "train": {"max_epochs": 1, "batch_size": 16, "max_steps": 6},
    "machine": {"threads": 1, "device": "cpu"},
}
# What each axis asks beside the baseline's value, and where it acts first.
ASKED: dict[str, tuple[Any, Any]] = {
    "train.precision": ("fp32", "bf16-mixed"),
    "data.batching": ("grouped", "packed"),
    "teacher.mode": ("instance", "causal"),
    "teacher.adapter": ("lora", "qlora"),
    "teacher.attn": ("sdpa", "eager"),
    "teacher.gradient_checkpointing": (False, True),
    "teacher.inference_batch_size": (16, 64),
    "train.batch_size": (16, 8),
    "train.accumulate_grad_batches": (1, 3),
    "train.num_workers": (0, 2),
    "train.trainer": ("loop", "lightning"),
    "machine.image": ("host", "elsewhere:1"),
    "machine.env": ([], ["ASKED_OF_THE_WORKER=1"]),
    "train.compile": ("off", "whole"),
    "teacher.use_cache": (False, True),
    "teacher.bnb_4bit_use_double_quant": (False, True),
}
# What a setting needs beside it, in the plain run too.
BESIDE = {"teacher.bnb_4bit_use_double_quant": {"teacher.adapter": "qlora"}}
# Proofs that need more than one process of one CPU: their own tests break them.
ELSEWHERE = {
    "machine.allocator_conf": "test_proofs.py",
    "train.devices": "test_devices.py",
    "train.strategy": "test_devices.py",
}


class Bench:
    """The command line in a folder of its own, with the real worker or one built on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"

    def run(self, axes: dict[str, list], worker: str | None = None, **choices: Any) -> Any:
        """Run a matrix of these axes, one repeat; `choices` are the worker's instructions."""
        text = {"question": "Is it in effect?", "stages": STAGES, "axes": axes, "base": BASE}
        path = self.folder / "small.yaml"
        text |= {"repeats": 1, "timeout_s": 120, "preflight": "never"}
        path.write_text(yaml.safe_dump(text, sort_keys=False))
        words = ["--worker", f"{sys.executable} {TESTS / worker}"] if worker else []
        return self.command("bench.run", path, *words, "--out", self.out, **choices)

    def command(self, module: str, *words: Any, **variables: Any) -> Any:
        chosen = {name: json.dumps(value) for name, value in variables.items()}
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, words)],
            cwd=self.folder,
            # No container engine, whatever this machine has.
            env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": "/nowhere"} | chosen,
            capture_output=True,
            text=True,
            timeout=500,
        )

    @property
    def run_folder(self) -> Path:
        return next(self.out.glob("small/*"))

    @property
    def report(self) -> str:
        return (self.run_folder / "report.md").read_text()

    def records(self) -> list[dict[str, Any]]:
        text = (self.run_folder / "records.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def settings(self, cell: str) -> dict[str, Any]:
        """What a cell was told to run in its first repeat."""
        orders = (json.loads(path.read_text()) for path in self.run_folder.glob("cells/*-r1.json"))
        return next(order["settings"] for order in orders if order["cell"] == cell)

    def proven(self, axes: dict[str, list]) -> dict[tuple[str, str, str], bool | None]:
        """(cell, setting, stage) -> whether the setting held there."""
        found = {}
        for cell in {record["cell"] for record in self.records() if record["repeat"]}:
            settings = self.settings(cell)
            asked = {name: settings[name.split(".")[0]][name.split(".")[1]] for name in axes}
            own = [record for record in self.records() if record["cell"] == cell]
            for row in proofs.check(asked, own, settings):
                found[cell, row.setting, row.stage] = row.holds
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def row_of(report: str, cell: str) -> list[str]:
    """The cells of the first table row of a matrix cell."""
    line = next(line for line in report.splitlines() if line.startswith(f"| `{cell}`"))
    return [part.strip() for part in line.strip("|").split("|")]


def check_records(records: list[dict[str, Any]]) -> None:
    """What every record of a machine without a GPU owes its reader."""
    for record in records:
        assert record["status"] == "ok", record["reason"]
        assert 0 < record["wall_s"] < record["process_wall_s"]
        assert min(record["process_phases"].values()) > -0.1
        assert record["process_phases"]["imports"] > record["process_phases"]["start_up"]
        phases = record["phases"]
        assert sum(phases.values()) == pytest.approx(record["wall_s"], rel=1e-6)
        # Beside the share, a constant: these stages last a quarter of a second.
        most_s = 0.05 + 0.05 * record["wall_s"]
        assert phases["unaccounted"] <= most_s, (record["cell"], phases)
        memory = record["memory"]
        assert memory.pop("host_peak_bytes") > 50 * 2**20, "Python with torch holds more"
        memory.pop("host_pss_bytes")
        assert {"torch_reserved_peak_bytes", "device_peak_bytes"} < set(memory)
        assert all(value == {"unavailable": "no CUDA device"} for value in memory.values())
        assert record["warnings"] == []


# ---- honest ----


def test_an_honest_run_ends_in_a_report(bench: Bench) -> None:
    axes = {"train.accumulate_grad_batches": [1, 3]}
    done = bench.run(axes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("report.md")
    check_records(bench.records())
    proven = bench.proven(axes)
    assert len(proven) == 2
    assert set(proven.values()) == {True}
    by_cell = {(r["cell"], r["stage"]): r for r in bench.records()}
    assert len(by_cell) == 4
    steps = [
        by_cell[cell, "teacher_fit"]["counts"]["optimizer_steps"]
        for cell in ("baseline", "train.accumulate_grad_batches=3")
    ]
    assert steps == [6, 2]
    assert "not in effect" not in bench.report
    assert row_of(bench.report, "train.accumulate_grad_batches=3")[-1] == "yes"


@pytest.mark.slow
def test_every_axis_holds_in_an_honest_run(bench: Bench) -> None:
    """All at once as a star, and what this machine cannot run stated as such."""
    # Compiling takes minutes here; a matrix of its own has it, and so have tests of the stages.
    asked = {name: v for name, v in ASKED.items() if name != "train.compile" and name not in BESIDE}
    axes = {name: list(values) for name, values in asked.items()}
    axes["teacher.attn"].append("flash_attention_2")
    done = bench.run(axes)
    assert done.returncode == 0, done.stdout + done.stderr
    stated = {r["cell"]: r for r in bench.records() if not r["repeat"]}
    check_records([r for r in bench.records() if r["repeat"]])
    assert {name: r["status"] for name, r in stated.items()} == {
        "teacher.attn=flash_attention_2": "unsupported",
        "machine.image=elsewhere:1": "unsupported",
    }
    reasons = [stated[name]["reason"] for name in stated]
    assert any("GPU kernels only" in reason for reason in reasons)
    assert all(reason in bench.report for reason in reasons)
    proven = bench.proven(axes)
    assert {name for name, holds in proven.items() if holds is not True} == set()
    shown = {setting for cell, setting, _ in proven if cell.startswith(setting)}
    assert shown == set(asked) - {"machine.image"}
    assert "not in effect" not in bench.report
    feed_forward(bench)


def feed_forward(bench: Bench) -> None:
    """The best cell is a settings file for the pipeline and a base for the next question."""
    best = bench.run_folder / "best.yaml"
    assert load_settings(best).data.synthetic.users == 100
    done = bench.command("core.run", best, "prepare_data")
    assert done.returncode == 0, done.stderr
    assert "[1/1] prepare_data:" in done.stdout
    done = bench.command("bench.run", bench.folder / "small.yaml", "--base", best, "--plan")
    assert done.returncode == 0, done.stderr
    assert "processes to measure" in done.stdout


# ---- deaf ----


@pytest.mark.slow
def test_a_worker_deaf_to_precision_is_found_out(bench: Bench) -> None:
    """The users' own mistake: bf16 was asked for and compared, fp32 ran twice."""
    cell = "train.precision=bf16-mixed"
    done = bench.run(
        {"train.precision": ["fp32", "bf16-mixed"]},
        "deaf_worker.py",
        DEAF_WORKER={"train.precision": "fp32"},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert {r["status"] for r in bench.records()} == {"ok"}, "it ran to its end and looks healthy"
    assert bench.settings(cell)["train"]["precision"] == "bf16-mixed"
    shown = row_of(bench.report, cell)
    assert (shown[2], shown[-2], shown[-1]) == ("–", "not in effect", "no")
    assert "wanted bfloat16 products under autocast" in bench.report
    assert "equal to the bit: loss trace" in bench.report
    best = load_settings(bench.run_folder / "best.yaml")
    assert best.train.precision == "fp32"


class Pipeline:
    """Set-up made once; measured stages run in this process under settings of choice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work("set-up", {}, prepare=True)
        self.runs = 0

    def work(self, name: str, changes: dict[str, Any], prepare: bool = False) -> list[dict]:
        settings = Settings.model_validate(BASE).model_dump(mode="json")
        for dotted, value in changes.items():
            section, leaf = dotted.split(".")
            settings[section][leaf] = value
        path = self.folder / f"{name}.jsonl"
        order = {
            "stages": [*STAGES, "teacher_outputs"],
            "settings": settings,
            "artefacts": str(self.folder / name),
            "shared_artefacts": str(self.folder / "shared"),
            "warmup_steps": 1,
            "task": "prepare" if prepare else "measure",
            "variables": ["ASKED_OF_THE_WORKER"],
            "records": str(path),
        }
        with path.open("w") as file:
            worker.work(order, worker.Lines(file))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return [line for line in lines if line["kind"] == "stage"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def plain(pipeline: Pipeline) -> Callable[[str], list[dict]]:
    """Stage lines of a setting's baseline: what runs when no wish is heard."""

    @cache
    def lines(*beside: tuple[str, Any]) -> list[dict]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            # Other tests of this process may have imported it, and the plain loop must not have.
            monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)
            return pipeline.work("plain", dict(beside))

    return lambda setting: lines(*BESIDE.get(setting, {}).items())


def proofs_of(setting: str, value: Any, lines: list[dict]) -> dict[str, bool | None]:
    """Stage -> whether a value is proven by what these stages showed."""
    section, leaf = setting.split(".")
    settings = Settings.model_validate(BASE).model_dump(mode="json")
    settings[section][leaf] = value
    return {row.stage: row.holds for row in proofs.check({setting: value}, lines, settings)}


def test_every_proof_is_tried() -> None:
    assert set(ASKED) | set(ELSEWHERE) == set(proofs.PROOFS)
    for setting, name in ELSEWHERE.items():
        assert setting in (TESTS / name).read_text(), name


@pytest.mark.parametrize("setting", sorted(ASKED))
def test_the_baseline_is_proven_and_a_deaf_pipeline_is_not(
    setting: str, plain: Callable[[str], list[dict]]
) -> None:
    """The same stages, asked for the baseline's value and for another one."""
    heard, unheard = ASKED[setting]
    lines = plain(setting)
    measured = {line["stage"] for line in lines}
    acting = {stage for stage in proofs.PROOFS[setting].stages if stage in measured}
    assert acting
    assert proofs_of(setting, heard, lines) == dict.fromkeys(acting, True)
    assert proofs_of(setting, unheard, lines) == dict.fromkeys(acting, False)


@pytest.mark.parametrize("setting", sorted(ASKED))
def test_a_setting_in_effect_is_proven_and_one_in_effect_unasked_is_not(
    setting: str,
    pipeline: Pipeline,
    plain: Callable[[str], list[dict]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The setting alone is changed: its proof turns, and no other does."""
    old, new = ASKED[setting]
    if setting != "train.trainer":
        monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)
    if setting == "machine.env":  # the parent starts the worker with it
        monkeypatch.setenv(*new[0].split("="))
    monkeypatch.setattr(compiling, "BACKEND", "eager")  # all of compiling but the machine code
    lines = pipeline.work(setting, BESIDE.get(setting, {}) | {setting: new})
    if setting == "machine.image":  # what the engine says; test_container_runs.py has real ones
        for line in lines:
            seen = {"id": line["facts"]["container"]["id"], "image": new}
            line["facts"]["launched"] = seen | {"engine": "docker", "digest": "sha256:7"}
    assert set(proofs_of(setting, new, lines).values()) == {True}
    assert set(proofs_of(setting, old, lines).values()) == {False}
    for other in set(ASKED) - {setting, *BESIDE.get(setting, {}), *BESIDE}:
        assert set(proofs_of(other, ASKED[other][0], lines).values()) == {True}, other
    for line, base in zip(lines, plain(setting), strict=True):
        found = differences.second_differences([setting], line, base)
        if (setting, line["stage"]) == ("train.batch_size", "teacher_fit"):
            # `max_steps` counts micro-batches: smaller ones hold fewer rows, which is to be told.
            assert [text.partition(":")[0] for text in found] == ["rows worked on"]
        else:
            assert found == [], line["stage"]


# ---- dying ----


@pytest.mark.slow
def test_every_death_of_the_real_worker_is_a_named_row(bench: Bench) -> None:
    ways = {
        "train.lr=0.002": ("killed", "killed", "SIGKILL"),
        "train.lr=0.003": ("import_error", "import", "undefined symbol: no_such_symbol"),
        "train.lr=0.004": ("host_memory", "oom_host", "DefaultCPUAllocator"),
        "train.lr=0.005": ("gpu_memory", "oom_gpu", "CUDA out of memory"),
        "train.lr=0.006": ("silent", "silent_exit", "exit 0 without an end record"),
    }
    rates = [0.001, *(float(cell.partition("=")[2]) for cell in ways)]
    done = bench.run(
        {"train.lr": rates},
        "dying_worker.py",
        DYING_WORKER={cell: way for cell, (way, _, _) in ways.items()},
    )
    assert done.returncode == 1, done.stderr
    found = {(r["cell"], r["stage"]): r for r in bench.records()}
    assert len(found) == 2 * (1 + len(ways))
    for cell, (_, status, text) in ways.items():
        assert found[cell, "teacher_fit"]["status"] == "ok", cell
        assert found[cell, "teacher_test"]["status"] == status, cell
        assert text in found[cell, "teacher_test"]["reason"], cell
        assert row_of(bench.report, cell)[-2] == status, cell
    assert {found["baseline", stage]["status"] for stage in STAGES} == {"ok"}

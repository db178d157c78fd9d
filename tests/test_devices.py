"""One training over several processes: the same losses and weights as in one, no process left."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file

from bench import machine
from core import pipeline, ranks, teacher
from core.artefacts import Store
from core.config import InputError
from core.observe import Observer
from core.plan import Plan
from core.ranks import Group, RankDied
from core.settings import Settings, TrainSettings
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
# Five rows to a micro-batch: the shares of two processes differ, and the epoch's last micro-batch
# has one row, so one process has none. Fewer candidates than items: they are drawn.
BASE = {
    "data": {"synthetic": {"users": 40, "items": 60, "mean_length": 9}},
    "student": {"hidden_size": 16, "num_blocks": 1, "max_length": 6, "max_epochs": 1},
    "teacher": {"max_history": 4, "train_candidates": 20},
    "machine": {"device": "cpu"},
}
TRAIN = {"trainer": "lightning", "batch_size": 5, "max_epochs": 2, "accumulate_grad_batches": 2}


def chosen(**train: Any) -> Settings:
    return Settings.model_validate(BASE | {"train": TRAIN | train})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Data and student are made once."""
    return Store(tmp_path_factory.mktemp("artefacts"))


def fitted(store: Store, settings: Settings, observer: Observer | None = None) -> Path:
    """Folder of the trained teacher."""
    planned = pipeline.plan(settings)
    for stage in ("prepare_data", "student_fit"):
        pipeline.run_stage(stage, settings, store, Observer(), planned=planned)
    observer = observer or Observer()
    return pipeline.run_stage("teacher_fit", settings, store, observer, planned=planned)[0]


def ranks_alive() -> list[psutil.Process]:
    """The further processes of this one."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "core.ranks" in child.cmdline()
    ]


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        pytest.param("auto", "DDPStrategy", id="ddp"),
        pytest.param("fsdp", "Sharded", id="fsdp", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_the_same_model_as_one(store: Store, strategy: str, name: str) -> None:
    one, two = Observer(), Observer()
    rate = 8e-4 if strategy == "auto" else 9e-4  # or the second would find the first's model
    alone = fitted(store, chosen(lr=rate), one)
    alive: list[int] = []
    two.on_step = lambda step: alive.append(len(ranks_alive()))
    threads = torch.get_num_threads()
    together = fitted(store, chosen(lr=rate, devices=2, strategy=strategy), two)
    assert set(alive) == {1} and not ranks_alive()
    assert torch.get_num_threads() == threads
    assert len(one.losses) == len(two.losses) > 80
    assert tiny.close(two.loss_trace(), one.loss_trace(), 1e-5)
    counts = ("micro_batches", "optimizer_steps", "rows", "tokens")
    assert [two.counts[name] for name in counts] == [one.counts[name] for name in counts]
    assert two.metrics["ndcg@10"] == one.metrics["ndcg@10"]
    assert two.facts["largest_train_batch"] == 3, "of five prompts, this process had three"
    files = [path.relative_to(alone) for path in sorted(alone.glob("*/*.safetensors"))]
    assert len(files) == 4
    for file in files:
        ours, theirs = load_file(together / file), load_file(alone / file)
        assert ours.keys() == theirs.keys()
        assert all(tiny.close(ours[key], theirs[key], 2e-4) for key in theirs), file
    seen = {fact: two.facts[fact] for fact in ("world_size", "backend", "strategy")}
    assert seen == {"world_size": 2, "backend": "gloo", "strategy": name}
    seen = {fact: one.facts[fact] for fact in ("world_size", "backend", "strategy")}
    assert seen == {"world_size": 1, "backend": None, "strategy": "SingleDeviceStrategy"}
    held = two.facts.get("frozen_here")
    assert held is None if strategy == "auto" else held["bytes"] < 0.8 * held["whole_bytes"]
    for file in ("steps.jsonl", "history.json"):
        assert (together / file).stat().st_size, "written once, by rank 0"
    lines = (together / "steps.jsonl").read_text().splitlines()
    assert len(lines) == len(two.losses)


@given(st.integers(1, 9), st.integers(2, 4), st.sampled_from([20, 2048]))
@hypothesis_settings(max_examples=15, deadline=None)
def test_the_mean_over_the_shares_is_the_loss_of_the_whole_batch(
    rows: int, size: int, candidates: int
) -> None:
    """And so is its gradient, also where a share has no row."""
    given = tiny.settings(train_candidates=candidates, distill_lambda=0.3)
    model = tiny.teacher(given)

    def loss_of(group: Group) -> torch.Tensor:
        batches = tiny.batches(model, given, rows, group=group)
        batches.plan = Plan([np.arange(rows) * 3])
        counts.append({n: batches[0][n] for n in ("samples", "tokens")})
        torch.manual_seed(5)
        loss = teacher.training_loss(model, batches[0], given, 0.3, Observer())
        loss.backward()
        return loss.detach()

    counts: list[dict[str, int]] = []
    whole = loss_of(ranks.ALONE)
    expected = [p.grad.clone() for p in model.trainable()]
    model.zero_grad()
    mean = sum(loss_of(Group(rank, size)) for rank in range(size)) / size
    assert tiny.close(mean, whole)
    for parameter, gradient in zip(model.trainable(), expected, strict=True):
        assert tiny.close(parameter.grad / size, gradient, 1e-4)
    assert all(each == counts[0] for each in counts)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_training(store: Store) -> None:
    def kill(step: Any) -> None:
        for process in ranks_alive():
            process.send_signal(signal.SIGKILL)

    observer = Observer(on_step=kill)
    with pytest.raises(RankDied, match="rank 1 of 2 ended early"):
        fitted(store, chosen(devices=2, lr=1e-3), observer)
    assert not ranks_alive()


def test_a_process_that_never_comes_ends_the_training(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted(store, chosen())
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RankDied, match="rank 1 of 2 ended early: no output"):
        fitted(store, chosen(devices=2, lr=2e-3))


@pytest.mark.slow
def test_the_others_end_with_rank_0(store: Store) -> None:
    def stop(step: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(store, chosen(devices=2, lr=3e-3), Observer(on_step=stop))
    assert not ranks_alive()


@pytest.mark.parametrize(
    ("train", "text"),
    [
        ({"devices": 2}, "the plain loop drives one"),
        ({"devices": "auto"}, "the plain loop drives one"),
        ({"strategy": "ddp"}, "strategy ddp needs train.devices above 1"),
        ({"trainer": "lightning", "devices": 8, "batch_size": 7}, "more than batch_size 7"),
        ({"trainer": "lightning", "devices": 2, "precision": "fp16-true"}, "use fp16-mixed"),
        (
            {"trainer": "lightning", "devices": 2, "strategy": "fsdp", "compile": "regional"},
            "which compile regional would trace",
        ),
        ({"devices": 0}, "a whole number above 0"),
        ({"devices": True}, "a whole number above 0"),
        ({"devices": 1.5}, "a whole number above 0"),
        ({"devices": "many"}, "auto"),
    ],
)
def test_what_several_devices_cannot_do_is_refused(train: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        TrainSettings.model_validate(train)


def here(gpus: int, torch_version: str = "2.7.1") -> dict[str, Any]:
    packages = {"torch": torch_version, "pytorch-lightning": "2.5", "bitsandbytes": "0.46"}
    return {"has_gpu": gpus > 0, "gpus": [{"capability": [9, 0]}] * gpus, "packages": packages}


@pytest.mark.parametrize(
    ("gpus", "devices", "strategy", "reason"),
    [
        (2, 2, "auto", None),
        (2, "auto", "ddp", None),
        (2, 4, "auto", "train.devices=4: this machine has 2 GPUs"),
        (0, 4, "ddp", None),
        (0, 2, "fsdp", None),
        (2, 2, "fsdp", None),
    ],
)
def test_a_machine_says_what_it_cannot(
    gpus: int, devices: int | str, strategy: str, reason: str | None
) -> None:
    train = {"trainer": "lightning", "devices": devices, "strategy": strategy}
    settings = Settings(train=TrainSettings.model_validate(train))
    found = machine.unsupported(settings, here(gpus))
    assert found is None if reason is None else str(found).startswith(reason)


@pytest.mark.parametrize(
    ("adapter", "version", "reason"),
    [
        ("qlora", "2.13.0", "train.strategy=fsdp: what torch gathers of a 4-bit weight has lost"),
        ("lora", "2.5.1+cu121", "train.strategy=fsdp: torch 2.5.1+cu121 cannot leave the trained"),
        ("lora", "2.13.0+cpu", None),
    ],
)
def test_weights_that_cannot_be_divided_are_unsupported(
    adapter: str, version: str, reason: str | None
) -> None:
    given = chosen(devices=2, strategy="fsdp").model_dump()
    given["teacher"]["adapter"] = adapter
    found = machine.unsupported(Settings.model_validate(given), here(0, version))
    assert found is None if reason is None else str(found).startswith(reason)


def test_4_bit_weights_are_not_divided(store: Store) -> None:
    given = chosen(devices=2, strategy="fsdp").model_dump()
    given["teacher"]["adapter"] = "qlora"
    with pytest.raises(InputError, match="lost the constants of its blocks; use ddp"):
        fitted(store, Settings.model_validate(given))


PACKED = """
import sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from core import sharding
from tests import tiny
torch.distributed.init_process_group("gloo", init_method=sys.argv[1], rank=0, world_size=1)
model = tiny.teacher(tiny.settings(adapter="qlora"))
sharding.shard(model, torch.device("cpu"), 1)
with model.gate.bound(torch.ones(3, model.adapters.lora_r)):
    model.last_hidden(torch.randn(1, 3, model.width))
"""


@pytest.mark.slow
def test_the_reason_why_4_bit_weights_are_not_divided_still_holds(tmp_path: Path) -> None:
    """Should this pass one day, the refusal can go."""
    command = [sys.executable, "-c", PACKED, f"file://{tmp_path / 'store'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "quant_state is required" in done.stderr


MATRIX = """\
question: Do two processes train faster than one?
stages: [teacher_fit, teacher_test]
base:
  data.synthetic: {users: 40, items: 60, mean_length: 9}
  student: {hidden_size: 16, num_blocks: 1, max_length: 6, max_epochs: 1}
  train: {trainer: lightning, batch_size: 8, max_epochs: 1, max_steps: 8}
  machine.device: cpu
axes:
  train.devices: [1, 2]
include:
  - {train.devices: 2, train.strategy: fsdp}
repeats: 1
preflight: always
"""


@pytest.mark.slow
def test_devices_as_an_axis_through_the_real_worker(tmp_path: Path) -> None:
    path = tmp_path / "devices.yaml"
    path.write_text(MATRIX)
    command = [sys.executable, "-m", "bench.run", str(path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "out" / "devices").glob("*/")
    found = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["status"]) for r in found] == [
        ("teacher_fit", "ok"),
        ("teacher_test", "ok"),
    ] * 2, "rank 0 alone writes"
    fits = {record["cell"]: record for record in found if record["stage"] == "teacher_fit"}
    (name,) = fits.keys() - {"baseline"}
    assert tiny.close(fits[name]["losses"], fits["baseline"]["losses"], 1e-5)
    samples = [[step["samples"] for step in fits[cell]["steps"]] for cell in fits]
    assert samples[0] == samples[1], "seconds for a sample are those of the whole micro-batch"
    report = (folder / "report.md").read_text()
    for setting, words in (
        ("train.devices", "2 processes over gloo"),
        ("train.strategy", "Sharded"),
    ):
        rows = [line for line in report.splitlines() if f"`{setting}`" in line and words in line]
        assert rows and all("holds" in row for row in rows), setting

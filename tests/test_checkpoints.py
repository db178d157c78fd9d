"""Teacher checkpoints: equal scores in a new process, no base weight, nothing that does not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from peft.utils import save_and_load
from safetensors.torch import load_file, save_file
from test_teacher import ROWS, build, trained_gradients, weights_hash
from tiny import close

from core import checkpoints, ilora
from core.config import InputError
from core.observe import parameter_dtypes


def trained(folder: Path, **given):
    """A teacher whose every trainable number was moved, saved."""
    model, settings = build(**given)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.trainable():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if given.get("gate") == "resnet":
        trained_gradients(model, settings, [ROWS])  # moves the running statistics
    checkpoints.save_teacher(model, folder)
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
    checkpoints.load_teacher(fresh, tmp_path)
    assert torch.equal(sample_scores(fresh, settings), wanted)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "fp16-true"])
def test_a_checkpoint_keeps_its_dtypes(tmp_path, precision):
    model, settings = trained(tmp_path, precision=precision)
    fresh, _ = build(active=False, precision=precision)
    checkpoints.load_teacher(fresh, tmp_path)
    assert parameter_dtypes(fresh) == parameter_dtypes(model)
    assert torch.equal(sample_scores(fresh, settings), sample_scores(model, settings))


def write_scores(folder: str, out: str, adapter: str) -> None:
    """What a later process does with a checkpoint."""
    model, settings = build(active=False, adapter=adapter)
    checkpoints.load_teacher(model, Path(folder))
    np.save(out, sample_scores(model, settings).numpy())


@pytest.mark.slow
def test_a_new_process_gives_the_same_scores(tmp_path):
    calls, wanted = [], {}
    for adapter in ("lora", "qlora"):
        wanted[adapter] = sample_scores(*trained(tmp_path / adapter, adapter=adapter))
        paths = str(tmp_path / adapter), str(tmp_path / f"{adapter}.npy")
        calls.append(f"write_scores({paths[0]!r}, {paths[1]!r}, {adapter!r})")
    here = Path(__file__).parent
    threads = "import torch; torch.set_num_threads(1)"
    subprocess.run(
        [sys.executable, "-c", f"{threads}; from test_checkpoints import *; {'; '.join(calls)}"],
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
    checkpoints.save_teacher(model, tmp_path)
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
            checkpoints.load_teacher(model, tmp_path)
        assert weights_hash(model) == before  # refused as a whole


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"llm_model_name": "tiny-llama"}, "llm_model_name tiny, this model tiny-llama"),
        ({"adapter": "qlora"}, "adapter lora, this model qlora"),
        ({"precision": "bf16-true"}, "dtype float32, this model bfloat16"),
        ({"adapter": "qlora", "bnb_4bit_use_double_quant": True}, "'double': True"),
    ],
)
def test_a_checkpoint_of_another_base_is_refused(tmp_path, other, named):
    trained(tmp_path)
    model, _ = build(active=False, **other)
    with pytest.raises(InputError, match=f"checkpoint of another base: .*{named}"):
        checkpoints.load_teacher(model, tmp_path)


def test_a_checkpoint_of_other_random_weights_is_refused(tmp_path):
    """A preset's base is drawn with the seed: the same name is another model under another seed."""
    trained(tmp_path)
    settings = tiny.settings().model_copy(update={"seed": 1})
    with pytest.raises(InputError, match="another base: weights"):
        checkpoints.load_teacher(tiny.teacher(settings, active=False), tmp_path)


def test_a_checkpoint_of_another_gate_or_head_is_refused(tmp_path):
    trained(tmp_path)
    for given in ({"gate": "linear"}, {"use_item_embeddings_head": False}, {"lora_r": 4}):
        model, _ = build(active=False, **given)
        with pytest.raises(InputError, match="keys do not fit"):
            checkpoints.load_teacher(model, tmp_path)


def test_the_fingerprint_is_readable_json(tmp_path):
    model, _ = trained(tmp_path)
    assert json.loads((tmp_path / "base.json").read_text()) == model.fingerprint

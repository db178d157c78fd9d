"""Teacher checkpoints: the trained parts and a fingerprint of the base, never base weights."""

import json
from pathlib import Path

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.config import InputError
from core.teacher import Teacher


def save_teacher(teacher: Teacher, folder: Path) -> None:
    """Write what was trained (adapters, router with buffers, projector, item head) and the base's
    fingerprint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapters = _adapter_state(teacher)
    save_file(
        {k: v.contiguous().cpu() for k, v in adapters.items()}, folder / "adapter_model.safetensors"
    )
    rest = {k: v.contiguous().cpu() for k, v in _own_state(teacher).items()}
    save_file(rest, folder / "teacher.safetensors")
    (folder / "base.json").write_text(json.dumps(teacher.fingerprint, indent=1))


def load_teacher(teacher: Teacher, folder: Path) -> None:
    """Load a checkpoint into a freshly built teacher.

    Raises InputError when the base differs, or a key or shape is missing, unexpected or different.
    """
    stored = json.loads((folder / "base.json").read_text())
    if stored != teacher.fingerprint:
        differ = [k for k in stored if stored[k] != teacher.fingerprint.get(k)]
        raise InputError(
            f"{folder}: checkpoint of another base: "
            + "; ".join(f"{k} {stored[k]}, this model {teacher.fingerprint.get(k)}" for k in differ)
        )
    adapters = load_file(folder / "adapter_model.safetensors")
    rest = load_file(folder / "teacher.safetensors")
    _exact(folder / "adapter_model.safetensors", adapters, _adapter_state(teacher))
    _exact(folder / "teacher.safetensors", rest, _own_state(teacher))
    set_peft_model_state_dict(teacher.backbone, adapters)
    teacher.load_state_dict(rest, strict=False)  # the keys were compared above


def _adapter_state(teacher: Teacher) -> dict[str, Tensor]:
    """The adapters alone. The default, "auto", would ask the hub at every save whether the
    vocabulary grew.
    """
    return get_peft_model_state_dict(teacher.backbone, save_embedding_layers=False)


def _own_state(teacher: Teacher) -> dict[str, Tensor]:
    """Router, projector and head: everything that is not the backbone."""
    return {k: v for k, v in teacher.state_dict().items() if not k.startswith("backbone.")}


def _exact(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Refuse a checkpoint whose keys or shapes are not exactly the model's."""
    wrong = sorted(
        k
        for k in found.keys() | wanted.keys()
        if k not in found or k not in wanted or found[k].shape != wanted[k].shape
    )
    if wrong:
        raise InputError(
            f"{path}: {len(wrong)} keys do not fit, first {wrong[0]}: "
            f"in the file {tuple(found[wrong[0]].shape) if wrong[0] in found else 'absent'}, "
            f"in the model {tuple(wanted[wrong[0]].shape) if wrong[0] in wanted else 'absent'}"
        )

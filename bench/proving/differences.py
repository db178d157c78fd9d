"""What differs between two cells beside the setting under test, and what should but does not.

Two cells are compared by what was observed in them, never by what they were asked.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from bench.proofs import SCORING_STAGES, acts_in
from bench.proving.model_proofs import PACKED, mode_of

Record = Mapping[str, Any]
Change = tuple[Any, Any]
"""(the baseline's value, the cell's) of a setting."""

# Shapes follow the first batch, so whatever chooses or cuts rows rightly changes them.
SHAPES = frozenset({"inputs_embeds.shape", "attention_mask", "attention_mask.shape"}) | {
    "batch_shapes",
    "length_variance",
}
ROWS = SHAPES | {"rows", "ratings"}
CHOOSING_ROWS = ("data.", "train.max_epochs", "train.max_steps")
"""Settings, or how they begin, that rightly change how many rows are worked on."""
WEIGHT_TYPES = frozenset({"param_dtypes.trainable", "param_dtypes.frozen"})
# What a setting rightly changes beside its own proof. Whatever else differs is a second difference.
EXPECTED_FACTS: dict[str, frozenset[str]] = {
    "train.precision": WEIGHT_TYPES
    | {"gemm_dtypes", "autocast_dtype", "float32_matmul_precision", "quant.compute_dtype"}
    | {"layers_float8", "frozen_bytes", "inputs_embeds.dtype", "attention_mask.dtype"},
    "train.compile": SHAPES | {"compile.mode"},
    "data.batching": SHAPES | {"attention_mask.dtype"},
    # Of `train.max_steps` batches, which are so many prompts, the samples are more.
    "teacher.mode": SHAPES | {"attention_mask.dtype", "gate_use", "micro_batches", "rows"},
    # Packing is what 4-bit means; a change of the dtypes that stay unpacked is not.
    "teacher.adapter": frozenset({"layers_4bit", "adapted_4bit", "frozen_bytes"}),
    "teacher.bnb_4bit_use_double_quant": frozenset({"quant.double", "frozen_bytes"}),
    "teacher.attn": frozenset({"attention_ops", "attn_implementation"})
    | {"attention_mask", "attention_mask.shape", "attention_mask.dtype"},
    "teacher.gradient_checkpointing": frozenset({"checkpoint_calls"}),
    "teacher.use_cache": frozenset({"cache"}),
    "teacher.inference_batch_size": SHAPES | {"largest_batch", "micro_batches"},
    "teacher.lora_r": frozenset({"trainable_parameters"}),
    "teacher.max_history": SHAPES,
    "teacher.max_title_tokens": SHAPES,
    "teacher.target_modules": WEIGHT_TYPES
    | {"layers_adapted", "adapted_4bit", "gate_calls", "trainable_parameters"},
    "train.accumulate_grad_batches": frozenset({"optimizer_steps", "accumulate_grad_batches_seen"}),
    "train.batch_size": SHAPES | {"largest_train_batch", "micro_batches", "optimizer_steps"},
    "train.num_workers": frozenset({"loader_workers"}),
    "train.trainer": frozenset({"trainer", "lightning_imported"}),
    # Each process sees its own rows of a batch.
    "train.devices": SHAPES | {"world_size", "backend", "strategy"},
    "train.strategy": frozenset({"strategy", "frozen_here"}),
    "machine.image": frozenset({"image", "torch_cuda"}),
    "machine.allocator_conf": frozenset({"allocator_settings", "env"}),
    "machine.env": frozenset({"allocator_settings", "env"}),
    "machine.device": frozenset({"device"}),
    "seed": SHAPES | {"ratings"},
}
# Results of nearly any change, names of one process, and what another fact tells better.
CONSEQUENCES = frozenset(
    {
        "operators",
        "saved_bytes",
        "epochs",
        "gpu_kernels",
        "container",
        "launched",
        "gradient_checkpointing_by",
    }
)
# Facts compared part by part, and the parts that are settings rather than results.
PARTS: dict[str, tuple[str, ...]] = {
    "param_dtypes": ("trainable", "frozen"),
    "quant": ("quant_type", "double", "compute_dtype"),
    "inputs_embeds": ("shape", "dtype"),
    "attention_mask": ("shape", "dtype"),
    "compile": ("mode",),
    "cache": (),
}
LABELS = {
    "ratings": "digest of the ratings:",
    "rows": "rows worked on:",
    "warmup": "steps left out as warm-up:",
    "gemm_dtypes": "matrix products in",
    "param_dtypes.trainable": "trained weights held in",
    "param_dtypes.frozen": "frozen weights that are not packed held in",
    "quant.double": "constants of 4-bit blocks quantised:",
    "quant.compute_dtype": "4-bit layers compute in",
    "attention_ops": "attention by",
    "attention_mask": "attention mask given:",
    "attention_mask.shape": "attention mask of shape",
    "attention_mask.dtype": "attention mask in",
    "inputs_embeds.shape": "inputs of the backbone of shape",
    "inputs_embeds.dtype": "inputs of the backbone in",
    "cache": "keys and values kept:",
    "gate_use": "mode of the teacher:",
    "compile.mode": "compilation:",
    "checkpoint_calls": "gradient checkpointing{by}: each layer runs",
}


def second_differences(changed: Iterable[str], cell: Record, baseline: Record) -> list[str]:
    """Observed differences between two records of one stage that the change does not explain.

    Only facts that both records hold are compared: a fact of one side only proves no difference.
    """
    expected = set(CONSEQUENCES)
    for name in changed:
        expected |= ROWS if name.startswith(CHOOSING_ROWS) else frozenset()
        expected |= EXPECTED_FACTS.get(name, frozenset())
    ours, theirs = compared(seen_in(cell)), compared(seen_in(baseline))
    found = []
    for name in sorted((ours.keys() & theirs.keys()) - expected):
        mine, other = ours[name], theirs[name]
        if mine != other:
            label = LABELS.get(name, f"{name}:").format(by=by_whom(cell, baseline))
            found.append(f"{label} {described(mine)}, baseline {described(other)}")
    return found


def seen_in(record: Record) -> dict[str, Any]:
    """The facts of a record, with the ratings it was given, how many rows its stage worked on and
    what it leaves out.
    """
    more = {
        "ratings": str(record.get("data_digest") or "")[:12] or None,
        "rows": (record.get("counts") or {}).get("rows"),
        "warmup": record.get("warmup_steps"),
    }
    known = {name: value for name, value in more.items() if value is not None}
    return {**(record.get("facts") or {}), **known}


def by_whom(cell: Record, baseline: Record) -> str:
    """Who switched checkpointing on where it was not the setting."""
    sides = [record["facts"].get("gradient_checkpointing_by") for record in (cell, baseline)]
    return " (switched on by peft)" if "peft" in sides else ""


def compared(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts reduced to what two cells must share, grouped ones part by part."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        if name in PARTS and isinstance(value, Mapping):
            found |= {f"{name}.{part}": essence(part, value.get(part)) for part in PARTS[name]}
            value = "yes"
        found[name] = essence(name, value)
    return found


def essence(name: str, value: Any) -> Any:
    """A fact without what may differ by itself: dtypes and operators by name, not by count."""
    if value is None:
        return "none"
    if name in ("gemm_dtypes", "attention_ops", "trainable", "frozen"):
        return tuple(sorted(key for key, n in value.items() if n and key != PACKED))
    if name == "gate_use":
        return mode_of(value)
    if name == "checkpoint_calls" and value.get("forward"):
        return f"×{value.get('after_backward', 0) / value['forward']:g}"
    return value


def described(value: Any) -> str:
    """A compared fact in words."""
    if isinstance(value, tuple):
        return " + ".join(described(part) for part in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={described(part)}" for key, part in value.items()) or "none"
    return str(value)


# Where an effect must show: a bit-identical loss trace or byte-equal peak means nothing happened.
EXPECTED_EFFECTS: dict[str, tuple[str, ...]] = {
    "data.batching": ("losses",),
    "teacher.mode": ("losses", "peak"),
    "train.precision": ("losses", "peak"),
    "teacher.adapter": ("losses", "peak"),
    "teacher.attn": ("losses",),
    "teacher.bnb_4bit_use_double_quant": ("losses", "peak"),
    "teacher.gradient_checkpointing": ("peak",),
    "teacher.use_cache": ("peak",),
    "train.accumulate_grad_batches": ("losses",),
    "teacher.inference_batch_size": ("peak",),
    "train.batch_size": ("losses", "peak"),
    "teacher.lora_r": ("losses", "peak"),
    "machine.allocator_conf": ("reserved",),
}
PEAKS = {
    "peak": ("torch_allocated_peak_bytes", "peak of allocated memory"),
    "reserved": ("torch_reserved_peak_bytes", "peak of reserved memory"),
}
# Bytes of a number and of the weights, as they decide the peak.
STORED_ALIKE = (
    {"fp32", "tf32"},
    {"bf16-mixed", "fp16-mixed", "fp8"},
    {"bf16-true", "fp16-true"},
)


def expected_effects(setting: str, change: Change, record: Record) -> set[str]:
    """What must move in a stage when a setting goes from the baseline's value to the cell's."""
    effects = set(EXPECTED_EFFECTS.get(setting, ()))
    if setting == "train.precision":
        if any(alike.issuperset(change) for alike in STORED_ALIKE):
            effects.discard("peak")
        on_gpu = str((record.get("facts") or {}).get("device")).startswith("cuda")
        if set(change) == {"fp32", "tf32"} and not on_gpu:
            effects.discard("losses")  # a CPU may have no TF32 to round to
    if setting == "teacher.gradient_checkpointing" and None in change:
        return set()  # peft decides, and may decide as the baseline did
    if setting == "teacher.use_cache" and record["stage"] not in SCORING_STAGES:
        return set()  # training keeps the same keys and values for its backward pass anyway
    return effects


def no_effect(changes: Mapping[str, Change], cell: Record, baseline: Record) -> list[str]:
    """What is identical to the bit between two records of one stage but should have moved."""
    acting = {name: change for name, change in changes.items() if acts_in(name, cell["stage"])}
    expected = [expected_effects(name, change, cell) for name, change in acting.items()]
    effects = set().union(*expected)
    found = []
    if "losses" in effects and cell.get("losses") and cell["losses"] == baseline.get("losses"):
        found.append("loss trace")
    for effect, (source, words) in PEAKS.items():
        mine, other = ((record.get("memory") or {}).get(source) for record in (cell, baseline))
        if effect in effects and isinstance(mine, int) and mine > 0 and mine == other:
            found.append(words)
    return found

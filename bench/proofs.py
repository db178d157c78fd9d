"""Compares each requested setting with what one live step showed, and lists what else differs.

A proof answers True (seen), False (seen otherwise) or None (nothing seen): an empty census never
proves anything.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Facts = Mapping[str, Any]
SCORING_STAGES = ("teacher_test", "teacher_outputs")
TEACHER_STAGES = ("teacher_fit", *SCORING_STAGES)
FIT_STAGES = ("student_fit", "teacher_fit", "distill_fit")
# Rotary position angles are multiplied in float32 on purpose, once for each forward of the backbone
# (recomputation may repeat it); every other product must run in the dtype that was asked for.
FLOAT32_EXCEPTIONS = 2
# 4-bit weights are stored as packed bytes: their dtype says nothing about the precision that runs.
PACKED = "uint8"


@dataclass(frozen=True)
class Proved:
    """One comparison: `holds` is True, False, or None for unknown."""

    holds: bool | None
    requested: str
    observed: str


@dataclass(frozen=True)
class Proof:
    """The stages a setting acts in and the check of its value against the facts of one stage."""

    stages: tuple[str, ...]
    check: Callable[[Any, Facts, Mapping[str, Any]], Proved]


@dataclass(frozen=True)
class ProofRow:
    """One line of the proof table: one setting of one cell in one stage, all repeats together."""

    setting: str
    stage: str
    requested: str
    observed: str
    holds: bool | None


def counted(numbers: Mapping[str, int]) -> str:
    """`{"float32": 2, "bfloat16": 36}` as "36 bfloat16, 2 float32", the most frequent first."""
    found = sorted(((n, name) for name, n in numbers.items() if n), key=lambda x: (-x[0], x[1]))
    return ", ".join(f"{n} {name}" for n, name in found) or "none"


def missing(facts: Facts, *names: str) -> str | None:
    """The first of the named facts that was not observed, or None when all were."""
    return next((name for name in names if facts.get(name) is None), None)


def unknown(requested: str, what: str) -> Proved:
    """The proof of a setting whose fact was not observed."""
    return Proved(None, requested, f"{what} not observed")


def prove_precision(value: str, facts: Facts, settings: Mapping[str, Any]) -> Proved:
    """Operand dtypes of the backbone's products; autocast and parameter dtypes must agree."""
    dtype = {"fp32": "float32", "fp16-mixed": "float16"}.get(value, "bfloat16")
    mixed = value.endswith("-mixed")
    requested = f"{dtype} products" + (" under autocast" if mixed else ", autocast off")
    products = {name: n for name, n in (facts.get("gemm_dtypes") or {}).items() if n}
    if not products:
        return unknown(requested, "matrix products of the backbone")
    parameters = facts.get("param_dtypes") or {}
    trainable, frozen = parameters.get("trainable") or {}, parameters.get("frozen") or {}
    autocast = autocast_of(facts, products, trainable)
    others = {name: n for name, n in products.items() if name != dtype}
    allowed = 0 if value == "fp32" else FLOAT32_EXCEPTIONS
    right = set(others) <= {"float32"} and sum(others.values()) <= allowed
    right = right and products.get(dtype, 0) > sum(others.values())
    right = right and (autocast in (dtype, "unknown") if mixed else autocast in ("off", "unknown"))
    if mixed:
        right = right and set(trainable) <= {"float32"}
    if value == "bf16-true":
        right = right and set(frozen) <= {dtype, PACKED}
    observed = f"{counted(products)} products, autocast {autocast}"
    for kind, dtypes in (("trainable", trainable), ("frozen", frozen)):
        observed += f", {kind} {counted(dtypes)}" if dtypes else ""
    # 16-bit products alone do not tell autocast from 16-bit weights.
    silent = right and autocast == "unknown" and value != "fp32"
    return Proved(None if silent else right, requested, observed)


def autocast_of(facts: Facts, products: Mapping[str, int], trainable: Mapping[str, int]) -> str:
    """The autocast dtype of the observed step, "off", or "unknown".

    Where it was not read, 16-bit products of adapters whose weights are all float32 give it away.
    """
    if "autocast_dtype" in facts:
        return facts["autocast_dtype"] or "off"
    if not trainable:
        return "unknown"
    running = max(products, key=lambda name: products[name])
    return running if set(trainable) == {"float32"} and running != "float32" else "off"


def prove_adapter(value: str, facts: Facts, settings: Mapping[str, Any]) -> Proved:
    """`qlora`: every adapted linear is 4-bit; `lora`: none is; the gate ran in each of them."""
    bits = "4-bit" if value == "qlora" else "unquantised"
    requested = f"{bits} base of every adapted layer, gate in each"
    if name := missing(facts, "layers_adapted", "layers_4bit", "gate_calls"):
        return unknown(requested, name)
    adapted, packed, gated = facts["layers_adapted"], facts["layers_4bit"], facts["gate_calls"]
    # bitsandbytes also packs linears that carry no adapter; those alone would prove nothing.
    packed_adapted = facts.get("adapted_4bit", min(packed, adapted))
    observed = f"{packed_adapted} of {adapted} adapted layers 4-bit ({packed} in all)"
    observed += f", gate in {gated}"
    if facts.get("frozen_bytes") is not None:
        observed += f", frozen weights {facts['frozen_bytes'] / 2**20:.1f} MiB"
    right = packed_adapted == adapted if value == "qlora" else packed == 0
    return Proved(adapted > 0 and right and gated == adapted, requested, observed)


ATTENTION_OPERATORS = {
    "eager": "_softmax",
    "sdpa": "scaled_dot_product_attention",
    "flash_attention_2": "flash_attn",
}


def prove_attention(value: str, facts: Facts, settings: Mapping[str, Any]) -> Proved:
    """The operators that ran decide, whatever name the configuration carries."""
    requested = f"{ATTENTION_OPERATORS[value]} operators only"
    seen = {name: n for name, n in (facts.get("attention_ops") or {}).items() if n}
    if not seen:
        return unknown(requested, "attention operators")
    observed = f"{counted(seen)}; configured {facts.get('attn_implementation') or 'unknown'}"
    return Proved(set(seen) == {ATTENTION_OPERATORS[value]}, requested, observed)


def prove_checkpointing(value: bool, facts: Facts, settings: Mapping[str, Any]) -> Proved:
    """The first layer's first sub-module runs once for each forward, twice when recomputed."""
    requested = "first sub-module runs " + ("twice" if value else "once")
    calls = facts.get("checkpoint_calls") or {}
    forward, after = calls.get("forward"), calls.get("after_backward")
    if not forward or after is None:
        return unknown(requested, "calls of the first sub-module")
    observed = f"{forward} after forward, {after} after backward"
    return Proved(after == forward * (2 if value else 1), requested, observed)


def prove_workers(value: int, facts: Facts, settings: Mapping[str, Any]) -> Proved:
    """As many loader processes alive as asked for."""
    requested = f"{value} loader processes"
    if missing(facts, "loader_workers"):
        return unknown(requested, "loader processes")
    seen = facts["loader_workers"]
    return Proved(seen == value, requested, f"{seen} alive")


def prove_accumulation(value: int, facts: Facts, settings: Mapping[str, Any]) -> Proved:
    """Optimizer steps = ceil(micro-batches / n) of each epoch, and the longest group is n long.

    The number of epochs trained is a count where the worker gives one; otherwise the last group of
    each of up to `max_epochs` epochs may have been short.
    """
    requested = f"{value} micro-batch{'es' * (value > 1)} for one optimizer step"
    if name := missing(facts, "micro_batches", "optimizer_steps"):
        return unknown(requested, name)
    micro, steps = facts["micro_batches"], facts["optimizer_steps"]
    if not micro:
        return unknown(requested, "micro_batches")
    epochs = facts.get("epochs") or settings.get("train", {}).get("max_epochs") or 1
    longest = facts.get("longest_group")
    fewest = math.ceil(micro / value)
    right = fewest <= steps < fewest + epochs and longest in (None, value)
    observed = f"{steps} optimizer steps in {micro} micro-batches"
    if longest is not None:
        observed += f", at most {longest} for one step"
    return Proved(right, requested, observed)


def prove_inference_batch(value: int, facts: Facts, settings: Mapping[str, Any]) -> Proved:
    """The largest batch the backbone saw is n, or all rows where there are fewer."""
    requested = f"batches of {value} rows"
    if missing(facts, "largest_batch"):
        return unknown(requested, "largest batch")
    largest, rows = facts["largest_batch"], facts.get("rows")
    observed = f"largest batch {largest}" + (f" of {rows} rows" if rows else "")
    return Proved(largest == min(value, rows or value), requested, observed)


def prove_trainer(value: str, facts: Facts, settings: Mapping[str, Any]) -> Proved:
    """The class that drove the steps; the plain loop must not even have imported Lightning."""
    if missing(facts, "trainer"):
        return unknown(value, "trainer")
    imported = facts.get("lightning_imported")
    right = facts["trainer"] == value and not (value == "loop" and imported)
    observed = f"{facts['trainer']}" + (", Lightning imported" if imported else "")
    return Proved(right, value, observed)


def prove_image(value: str, facts: Facts, settings: Mapping[str, Any]) -> Proved:
    """The image tag read inside the running process (`host` = no container)."""
    if missing(facts, "image"):
        return unknown(value, "image")
    image = str(facts["image"])
    return Proved(image.rpartition(":")[2] == value, value, image)


PROOFS: dict[str, Proof] = {
    "train.precision": Proof(TEACHER_STAGES, prove_precision),
    "teacher.adapter": Proof(TEACHER_STAGES, prove_adapter),
    "teacher.attn": Proof(TEACHER_STAGES, prove_attention),
    "teacher.gradient_checkpointing": Proof(("teacher_fit",), prove_checkpointing),
    "teacher.inference_batch_size": Proof(SCORING_STAGES, prove_inference_batch),
    "train.accumulate_grad_batches": Proof(("teacher_fit",), prove_accumulation),
    "train.num_workers": Proof((*FIT_STAGES, *SCORING_STAGES), prove_workers),
    "train.trainer": Proof(FIT_STAGES, prove_trainer),
    "machine.image": Proof((*FIT_STAGES, *SCORING_STAGES), prove_image),
}

# What a setting rightly changes beside its own proof. Whatever else differs is a second difference.
EXPECTED_FACTS: dict[str, frozenset[str]] = {
    "train.precision": frozenset({"gemm_dtypes", "autocast_dtype", "param_dtypes", "frozen_bytes"}),
    "teacher.adapter": frozenset({"layers_4bit", "adapted_4bit", "param_dtypes", "frozen_bytes"}),
    "teacher.attn": frozenset({"attention_ops", "attn_implementation"}),
    "teacher.gradient_checkpointing": frozenset({"checkpoint_calls"}),
    "teacher.inference_batch_size": frozenset({"largest_batch", "micro_batches"}),
    "train.accumulate_grad_batches": frozenset({"optimizer_steps", "accumulate_grad_batches_seen"}),
    "train.num_workers": frozenset({"loader_workers"}),
    "train.trainer": frozenset({"trainer", "lightning_imported"}),
    "machine.image": frozenset({"image"}),
    "train.batch_size": frozenset({"largest_train_batch", "micro_batches", "optimizer_steps"}),
    "teacher.lora_r": frozenset({"trainable_parameters"}),
    "teacher.target_modules": frozenset(
        {"layers_adapted", "adapted_4bit", "gate_calls", "param_dtypes", "trainable_parameters"}
    ),
    "machine.device": frozenset({"device"}),
}
# Results of nearly any change, not settings that could have changed by themselves.
CONSEQUENCES = frozenset({"operators", "saved_bytes", "epochs"})

# Where an effect must show: a bit-identical loss trace or byte-equal peak means nothing happened.
EXPECTED_EFFECTS: dict[str, tuple[str, ...]] = {
    "train.precision": ("losses", "peak"),
    "teacher.adapter": ("losses", "peak"),
    "teacher.attn": ("losses",),
    "teacher.gradient_checkpointing": ("peak",),
    "train.accumulate_grad_batches": ("losses",),
    "teacher.inference_batch_size": ("peak",),
    "train.batch_size": ("losses", "peak"),
    "teacher.lora_r": ("losses", "peak"),
}


def acts_in(setting: str, stage: str) -> bool:
    """Whether a setting acts in a stage; a setting without a proof is taken to act everywhere."""
    return setting not in PROOFS or stage in PROOFS[setting].stages


def facts_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Facts and counts of a record in one mapping, with the longest group of micro-batches."""
    facts = {**(record.get("counts") or {}), **(record.get("facts") or {})}
    steps = record.get("steps") or []
    if any(step.get("optimizer_step") for step in steps):
        # The observed first batch is not among the steps; it opened the first group unless it was
        # an optimizer step itself.
        stepped = sum(bool(step.get("optimizer_step")) for step in steps)
        run = max((facts.get("micro_batches") or 0) - len(steps), 0)
        if (facts.get("optimizer_steps") or 0) > stepped:
            run = 0
        groups = []
        for step in steps:
            run += 1
            if step.get("optimizer_step"):
                groups.append(run)
                run = 0
        facts["longest_group"] = max(groups)
    return facts


def check(
    requested: Mapping[str, Any],
    records: Iterable[Mapping[str, Any]],
    settings: Mapping[str, Any] | None = None,
) -> list[ProofRow]:
    """Prove every requested value of one cell in every stage its `ok` records cover.

    `requested`: dotted setting -> value; `settings`: the cell's full settings, nested. One False
    repeat is enough for False; without any repeat that saw the fact the answer is None.
    """
    stages: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["status"] == "ok":
            stages.setdefault(record["stage"], []).append(facts_of(record))
    rows = []
    for setting, value in requested.items():
        for stage, repeats in stages.items():
            if not acts_in(setting, stage):
                continue
            if setting not in PROOFS:
                rows.append(ProofRow(setting, stage, str(value), "no proof for this setting", None))
                continue
            found = [PROOFS[setting].check(value, facts, settings or {}) for facts in repeats]
            # Worst first: a repeat that contradicts decides, then one that confirms, then silence.
            worst = min(found, key=lambda one: {False: 0, True: 1, None: 2}[one.holds])
            rows.append(ProofRow(setting, stage, worst.requested, worst.observed, worst.holds))
    return rows


def essence(name: str, value: Any) -> Any:
    """A fact reduced to what two cells must share: dtypes and operators by name, not by count."""
    if value is None:
        return "none"
    if name in ("gemm_dtypes", "attention_ops"):
        return tuple(sorted(key for key, n in value.items() if n))
    if name == "param_dtypes":
        return tuple((kind, tuple(sorted(dtypes))) for kind, dtypes in sorted(value.items()))
    if name == "checkpoint_calls" and value.get("forward"):
        return f"recomputed ×{value.get('after_backward', 0) / value['forward']:g}"
    return value


def described(value: Any) -> str:
    """A compared fact in words."""
    if isinstance(value, tuple):
        return " + ".join(described(part) for part in value) or "none"
    return str(value)


def second_differences(
    changed: Iterable[str], cell: Mapping[str, Any], baseline: Mapping[str, Any]
) -> list[str]:
    """Observed differences between two records of one stage that the change does not explain.

    Only facts that both records hold are compared: a fact of one side only proves no difference.
    """
    expected = CONSEQUENCES.union(*(EXPECTED_FACTS.get(name, frozenset()) for name in changed))
    ours, theirs = cell.get("facts") or {}, baseline.get("facts") or {}
    found = []
    for name in sorted((ours.keys() & theirs.keys()) - expected):
        mine, other = essence(name, ours[name]), essence(name, theirs[name])
        if mine != other:
            found.append(f"{name}: {described(mine)}, baseline {described(other)}")
    return found


def no_effect(
    changed: Sequence[str], cell: Mapping[str, Any], baseline: Mapping[str, Any]
) -> list[str]:
    """What is identical to the bit between two records of one stage but should have moved."""
    stage = cell["stage"]
    acting = [name for name in changed if acts_in(name, stage)]
    effects = {effect for name in acting for effect in EXPECTED_EFFECTS.get(name, ())}
    found = []
    if "losses" in effects and cell.get("losses") and cell["losses"] == baseline.get("losses"):
        found.append("loss trace")
    if "peak" in effects:
        mine, other = (
            (record.get("memory") or {}).get("torch_allocated_peak_bytes")
            for record in (cell, baseline)
        )
        if isinstance(mine, int) and mine > 0 and mine == other:
            found.append("peak of allocated memory")
    return found

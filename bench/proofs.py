"""Compares each requested setting with what one live step showed: the table of all proofs.

A proof answers True (seen), False (seen otherwise) or None (nothing seen): an empty census never
proves anything.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.proving import model_proofs as model
from bench.proving import process_proofs as process
from bench.proving.proved import Facts, Proved, Settings

SCORING_STAGES = ("teacher_test", "teacher_outputs")
TEACHER_STAGES = ("teacher_fit", *SCORING_STAGES)
FIT_STAGES = ("student_fit", "teacher_fit", "distill_fit")
STEPPING_STAGES = (*FIT_STAGES, *SCORING_STAGES)


@dataclass(frozen=True)
class Proof:
    """The stages a setting acts in and the check of its value against the facts of one stage."""

    stages: tuple[str, ...]
    check: Callable[[Any, Facts, Settings], Proved]


@dataclass(frozen=True)
class ProofRow:
    """One line of the proof table: one setting of one cell in one stage, all repeats together."""

    setting: str
    stage: str
    requested: str
    observed: str
    holds: bool | None


PROOFS: dict[str, Proof] = {
    "train.precision": Proof(TEACHER_STAGES, model.prove_precision),
    "train.compile": Proof(TEACHER_STAGES, model.prove_compile),
    "data.batching": Proof(TEACHER_STAGES, model.prove_batching),
    "teacher.mode": Proof(TEACHER_STAGES, model.prove_mode),
    "teacher.adapter": Proof(TEACHER_STAGES, model.prove_adapter),
    "teacher.bnb_4bit_use_double_quant": Proof(TEACHER_STAGES, model.prove_double_quant),
    "teacher.attn": Proof(TEACHER_STAGES, model.prove_attention),
    "teacher.gradient_checkpointing": Proof(("teacher_fit",), model.prove_checkpointing),
    "teacher.use_cache": Proof(TEACHER_STAGES, model.prove_cache),
    "teacher.inference_batch_size": Proof(SCORING_STAGES, process.prove_inference_batch),
    "train.batch_size": Proof(("teacher_fit",), process.prove_train_batch),
    "train.accumulate_grad_batches": Proof(("teacher_fit",), process.prove_accumulation),
    "train.num_workers": Proof(STEPPING_STAGES, process.prove_workers),
    "train.trainer": Proof(FIT_STAGES, process.prove_trainer),
    "train.devices": Proof(("teacher_fit",), process.prove_devices),
    "train.strategy": Proof(("teacher_fit",), process.prove_strategy),
    "machine.image": Proof(STEPPING_STAGES, process.prove_image),
    "machine.allocator_conf": Proof(STEPPING_STAGES, process.prove_allocator),
    "machine.env": Proof(STEPPING_STAGES, process.prove_environment),
}


def acts_in(setting: str, stage: str) -> bool:
    """Whether a setting acts in a stage; a setting without a proof is taken to act everywhere."""
    return setting not in PROOFS or stage in PROOFS[setting].stages


def facts_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Facts and counts of a record in one mapping, with what its steps tell.

    `steady_steps`: steps after the warm-up, in none of which anything was compiled; `unclocked`:
    micro-batches that are not among the steps; `longest_group`: see there.
    """
    facts = {**(record.get("counts") or {}), **(record.get("facts") or {})}
    steps = record.get("steps") or []
    if "warmup_steps" in record:
        facts["steady_steps"] = max(len(steps) - record["warmup_steps"], 0)
    stepped = sum(bool(step.get("optimizer_step")) for step in steps)
    if stepped:
        facts["unclocked"] = max((facts.get("micro_batches") or 0) - len(steps), 0)
        # The observed first batch is not among the steps; it opened the first group unless it was
        # an optimizer step itself. Where more is missing, nobody knows from which group.
        opened = facts["unclocked"] == 1 and (facts.get("optimizer_steps") or 0) <= stepped
        facts["longest_group"] = longest_group(steps, int(opened))
    return facts


def longest_group(steps: Iterable[Mapping[str, Any]], before: int) -> int:
    """The most micro-batches of one optimizer step; `before` of the first group are not listed."""
    longest, run = 0, before
    for step in steps:
        run += 1
        if step.get("optimizer_step"):
            longest, run = max(longest, run), 0
    return longest


def check(
    requested: Mapping[str, Any],
    records: Iterable[Mapping[str, Any]],
    settings: Settings | None = None,
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

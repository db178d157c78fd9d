"""One sentence a stage on what holds its time, and so on what cannot change it.

It explains a `same`: a setting that acts on a small share of the time cannot show. Every record
knows its phases and the wait for the loader; a profile adds what the steps themselves are made of.
Pure functions: known shares give a known sentence.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.judging.figures import Record
from bench.profile.arithmetic import guessed_attention_share, rates

STEPPING = ("train_steps", "evaluation", "outputs", "steps")
"""Phases made of steps."""
LARGE_PHASE = 0.5
WORTH_WORKERS = 0.02
"""The usual floor: a smaller gain is not worth acting on."""
DATA_BOUND = 0.1
HOST_BOUND = 0.9
FILLED = 0.5
"""Of a ceiling; below half of both a step is made of something else than work for the machine."""
NO_PROCESSOR = 0.7
"""CPU time / time of a step below which something kept the process waiting."""
LITTLE_ATTENTION = 0.02
"""Of the time, or of the arithmetic; that alone may deceive: a bad kernel is slow at little of it.
"""
FUSED = ("scaled_dot_product", "flash_attn")
ATTENTION = (*FUSED, "softmax", "aten::bmm")
"""Parts of the names of its operators; nothing else in the models here has batched products. Eager
attention has masks, scalings and copies beside them, which look like anybody's."""


@dataclass(frozen=True)
class Shares:
    """What is known of a stage; None = unknown."""

    stage: str
    stepping: float | None = None
    """Of the wall in phases made of steps."""
    phase: tuple[str, float] | None = None
    """The largest other phase with its share of the wall."""
    wait: float | None = None
    """Of a step spent waiting for the loader (of the wall, where no step was probed)."""
    issue: float | None = None
    """Host time to issue a step / its time; on a GPU only."""
    cpu: float | None = None
    """CPU time of the process / time of a step; on a CPU only."""
    flops: float | None = None
    """Of the GEMM ceiling."""
    traffic: float | None = None
    """Of the copy ceiling."""
    operator: tuple[str, float] | None = None
    """The longest operator with its share of the profiled steps."""
    attention: float | None = None
    """Of the arithmetic."""
    attention_time: float | None = None
    """Of the traced steps, in the operators known to be its own."""
    fused: bool = False
    """Those are all of it."""
    guessed: bool = False
    """The share of attention is a guess from the batch's shape."""


def shares(stage: str, records: Sequence[Record], profile: Record | None = None) -> Shares:
    """The shares of a stage: means over the records of one cell, and its profile if it has one."""
    known = _of_records(stage, records)
    measured = rates(profile) if profile else None
    if profile is None or measured is None:
        return Shares(**known)
    operators = (profile["window"] or {}).get("operators") or []
    longest = max(operators, key=lambda one: float(one["seconds"]), default=None)
    known |= {
        "wait": measured.wait_share,
        "issue": measured.issue_share,
        "cpu": measured.cpu_share if profile["device"] == "cpu" else None,
        "flops": measured.flops_share,
        "traffic": measured.bytes_share,
        "operator": (longest["name"], longest["share"]) if longest else None,
    }
    if measured.attention_share is not None:
        known |= {"attention": measured.attention_share, "guessed": False}
        known["attention_time"] = attention_time(operators) if operators else None
        known["fused"] = any(part in one["name"] for one in operators for part in FUSED)
    return Shares(**known)


def attention_time(operators: Sequence[Record]) -> float:
    """Share of the traced steps in the operators of attention."""
    return sum(
        float(one["share"]) for one in operators if any(part in one["name"] for part in ATTENTION)
    )


def _of_records(stage: str, records: Sequence[Record]) -> dict[str, Any]:
    """What ordinary records tell."""
    known: dict[str, Any] = {"stage": stage}
    if not records:
        return known
    wall_s = statistics.fmean(record["wall_s"] for record in records)
    names = {name for record in records for name in record.get("phases") or {}}
    phases = {
        name: statistics.fmean(record["phases"].get(name, 0.0) for record in records) / wall_s
        for name in sorted(names)
    }
    others = [(name, share) for name, share in phases.items() if name not in STEPPING]
    known["stepping"] = sum(phases.get(name, 0.0) for name in STEPPING)
    known["phase"] = max(others, key=lambda one: one[1], default=None)
    waits = [r["loader_wait_s"] for r in records if r.get("loader_wait_s") is not None]
    if waits:
        known["wait"] = min(1.0, statistics.fmean(waits) / wall_s)
    shape = _batch_shape(records[0])
    if shape:
        _, length, width = shape
        known |= {"attention": guessed_attention_share(length, width), "guessed": True}
    return known


def _batch_shape(record: Record) -> Sequence[int] | None:
    """Rows, tokens and width of the observed step's embeddings; None where no backbone ran."""
    found: Mapping[str, Any] = (record.get("facts") or {}).get("inputs_embeds") or {}
    shape: Sequence[int] | None = found.get("shape")
    return shape if shape and len(shape) == 3 else None


def sentence(known: Shares) -> str:
    """What holds the time of the stage, then what cannot change it; empty if nothing is known."""
    parts = (_elsewhere(known), _holds(known), _wait(known), _attention(known))
    said = [part for part in parts if part]
    return f"{known.stage}: {'; '.join(said)}." if said else ""


def _elsewhere(known: Shares) -> str:
    """What most of the wall goes to, if not to steps."""
    if known.phase is None or known.phase[1] < LARGE_PHASE or known.stepping is None:
        return ""
    name, share = known.phase
    return (
        f"{percent(share)} of the wall is {name}, so faster steps can gain "
        f"{percent(known.stepping)} at most"
    )


def _holds(known: Shares) -> str:
    """The first of these that holds the steps: the loader, the host, products, traffic."""
    if known.wait is not None and known.wait >= DATA_BOUND:
        return "data-bound: the steps wait for their batches"
    if known.issue is not None and known.issue >= HOST_BOUND:
        return (
            f"host-bound: issuing the operators takes {percent(known.issue)} of a step, so kernels "
            "and dtypes cannot matter; fewer operators or larger batches can"
        )
    if known.flops is None or known.traffic is None:
        return _phases(known)
    if max(known.flops, known.traffic) >= FILLED:
        return _filled(known.flops, known.traffic)
    return _unfilled(known)


def _phases(known: Shares) -> str:
    if known.phase is None or known.stepping is None or _elsewhere(known):
        return ""
    name, share = known.phase
    return (
        f"steps are {percent(known.stepping)} of the wall, the largest part beside them is {name} "
        f"with {percent(share)}"
    )


def _filled(flops: float, traffic: float) -> str:
    if flops >= traffic:
        return f"compute-bound: products run at {percent(flops)} of the measured GEMM peak"
    return (
        f"memory-bound: tensors move at {percent(traffic)} of the measured copy rate, products run "
        f"at {percent(flops)} of the GEMM peak"
    )


def _unfilled(known: Shares) -> str:
    said = (
        f"bound by neither products ({percent(known.flops)} of the measured GEMM peak) nor traffic "
        f"({percent(known.traffic)} of the copy rate): small operators, casts or waiting"
    )
    if known.cpu is not None and known.cpu < NO_PROCESSOR:
        said += f", and the process ran for {percent(known.cpu)} of the time only"
    if known.operator:
        name, share = known.operator
        said += f"; the longest operator, {name}, takes {percent(share)}"
    return said


def _wait(known: Shares) -> str:
    if known.wait is None:
        return ""
    if known.wait < WORTH_WORKERS:
        return f"loader wait {percent(known.wait)}: workers cannot help"
    return f"loader wait {percent(known.wait)}: workers can gain no more than that"


def _attention(known: Shares) -> str:
    """That a kernel cannot matter is claimed of a measured time only, and only of a whole one."""
    if known.attention is None:
        return ""
    about = "about " if known.guessed else ""
    said = f"attention is {about}{percent(known.attention)} of the arithmetic"
    if known.attention_time is None:
        is_little = known.attention < LITTLE_ATTENTION
        return f"{said}: little to gain, unless its kernel is a bad one" if is_little else said
    least = "" if known.fused else "at least "
    said += f" and {least}{percent(known.attention_time)} of the time"
    is_little = known.fused and known.attention_time < LITTLE_ATTENTION
    return f"{said}: its kernel cannot matter here" if is_little else said


def percent(share: float | None) -> str:
    """A share with one digit where a whole number would say too little."""
    if share is None:
        return "an unknown share"
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.5 or value == 0 else f"{value:.1f} %"

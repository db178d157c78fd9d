"""Proofs of the settings that act around the model: loader, trainer, batches, and the process."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bench.proving.proved import (
    Facts,
    Proved,
    Settings,
    mebibytes,
    missing,
    several,
    together,
    unknown,
)

ALLOCATOR_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
STRATEGIES = {
    "none": "SingleDeviceStrategy",
    "auto": "DDPStrategy",
    "ddp": "DDPStrategy",
    "fsdp": "Sharded",
}
"""The class of Lightning's strategy."""
IMAGE_CUDA = {"cu118": "11.8", "cu121": "12.1"}


def prove_workers(value: int, facts: Facts, settings: Settings) -> Proved:
    """As many loader processes alive as asked for."""
    requested = f"{value} loader processes"
    if missing(facts, "loader_workers"):
        return unknown(requested, "loader processes")
    seen = facts["loader_workers"]
    return Proved(seen == value, requested, f"{seen} alive")


def prove_accumulation(value: int, facts: Facts, settings: Settings) -> Proved:
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
    right = fewest <= steps < fewest + epochs
    if longest is not None:
        # Steps in which something was compiled are not clocked, and each may shorten one group.
        right &= longest == value or (longest < value and facts.get("unclocked", 0) > 1)
    observed = f"{steps} optimizer steps in {micro} micro-batches"
    if longest is not None:
        observed += f", at most {longest} for one step"
    return Proved(right, requested, observed)


def prove_inference_batch(value: int, facts: Facts, settings: Settings) -> Proved:
    """The largest batch the backbone saw is n, or all rows where there are fewer."""
    requested = f"batches of {value} rows"
    if missing(facts, "largest_batch"):
        return unknown(requested, "largest batch")
    largest, rows = facts["largest_batch"], facts.get("rows")
    observed = f"largest batch {largest}" + (f" of {rows} rows" if rows else "")
    return Proved(largest == min(value, rows or value), requested, observed)


def prove_train_batch(value: int, facts: Facts, settings: Settings) -> Proved:
    """The largest micro-batch of training has n rows, in each of several processes its share of
    them; fewer only where every epoch is one batch, so that there are no more rows.
    """
    requested = f"batches of {value} rows"
    if missing(facts, "largest_train_batch"):
        return unknown(requested, "largest training batch")
    largest, batches = facts["largest_train_batch"], facts.get("micro_batches")
    share = -(-value // (facts.get("world_size") or 1))
    train = settings.get("train") or {}
    is_whole = batches and batches <= train.get("max_epochs", 0) and train.get("max_steps") != 1
    observed = f"largest batch {largest}" + (f" in {batches} batches" if batches else "")
    return Proved(largest == share or (largest < share and bool(is_whole)), requested, observed)


def prove_trainer(value: str, facts: Facts, settings: Settings) -> Proved:
    """The class that drove the steps; the plain loop must not even have imported Lightning."""
    if missing(facts, "trainer"):
        return unknown(value, "trainer")
    imported = facts.get("lightning_imported")
    right = facts["trainer"] == value and not (value == "loop" and imported)
    observed = f"{facts['trainer']}" + (", Lightning imported" if imported else "")
    return Proved(right, value, observed)


def prove_devices(value: int | str, facts: Facts, settings: Settings) -> Proved:
    """As many processes in the group that trains as devices were asked for."""
    requested = "all devices" if value == "auto" else several(int(value), "process", "es")
    names = ("world_size", "visible_devices") if value == "auto" else ("world_size",)
    if name := missing(facts, *names):
        return unknown(requested, name)
    seen, wanted = facts["world_size"], facts["visible_devices"] if value == "auto" else value
    backend = facts.get("backend")
    observed = several(seen, "process", "es") + (f" over {backend}" if backend else "")
    return Proved(seen == wanted and (wanted == 1 or bool(backend)), requested, observed)


def prove_strategy(value: str, facts: Facts, settings: Settings) -> Proved:
    """The class that shared the work out; under fsdp this process holds a part of the weights."""
    if missing(facts, "strategy"):
        return unknown(value, "strategy")
    alone = facts.get("world_size") == 1
    right = facts["strategy"] == STRATEGIES["none" if alone and value == "auto" else value]
    observed = str(facts["strategy"])
    if held := facts.get("frozen_here"):
        right &= (held["bytes"] < held["whole_bytes"]) == (value == "fsdp")
        whole = mebibytes(held["whole_bytes"])
        observed += f", {mebibytes(held['bytes'])} of {whole} frozen weights here"
    elif value == "fsdp":
        return unknown(value, "frozen weights of this process")
    return Proved(right, value, observed)


def prove_image(value: str, facts: Facts, settings: Settings) -> Proved:
    """The container the worker was in is the one the engine ran, of that image and with its CUDA.

    A second environment inside an image hides the image's torch: the name alone proves no CUDA.
    """
    requested = f"{value} with CUDA {IMAGE_CUDA[value]}" if value in IMAGE_CUDA else value
    if missing(facts, "image"):
        return unknown(requested, "image")
    image, cuda = str(facts["image"]), facts.get("torch_cuda")
    launched, inside = facts.get("launched") or {}, (facts.get("container") or {}).get("id")
    holds: list[bool | None] = []
    if value == "host":
        holds += [image in ("host", "unnamed"), not launched]
    else:
        holds += [launched.get("image") == value, bool(inside) and launched.get("id") == inside]
    if value in IMAGE_CUDA:  # other images have no name and no CUDA that is known here
        right_cuda = str(cuda).startswith(IMAGE_CUDA[value]) if "torch_cuda" in facts else None
        holds += [image == value, right_cuda]
    named = f"inside named {image}" + (f", torch with CUDA {cuda}" if cuda else "")
    return Proved(together(holds), requested, f"{_ran(launched, inside)}; {named}")


def _ran(launched: Mapping[str, Any], inside: str | None) -> str:
    """The engine's account of the container, with the worker's where that is another."""
    if not launched:
        return "no container"
    digest = launched["digest"].removeprefix("sha256:")[:12]
    text = f"{launched['engine']} ran {launched['image']} ({digest}) as {launched['id']}"
    return text if launched["id"] == inside else f"{text}, the worker was in {inside}"


def prove_allocator(value: str | None, facts: Facts, settings: Settings) -> Proved:
    """What torch's CUDA allocator reports of itself holds every option that was asked for.

    Left alone (None) any report holds: it is shown, for a variable set outside acts on all cells.
    """
    requested = value or "as the environment says"
    if missing(facts, "allocator_settings"):
        return unknown(requested, "settings of the CUDA allocator")
    reported = facts["allocator_settings"]
    if value is None:
        text = reported.get(ALLOCATOR_VARIABLE) if isinstance(reported, Mapping) else reported
        return Proved(True, requested, str(text or "no option set"))
    asked = options(value)
    seen = {name: reported_option(name, reported) for name in asked}
    observed = ",".join(f"{name}:{'not set' if v is None else v}" for name, v in seen.items())
    return Proved(all(same(seen[name], asked[name]) for name in asked), requested, observed)


def options(text: str) -> dict[str, str]:
    """`a:1,b:[x:2,y:3]` as name -> value; a comma inside brackets parts nothing."""
    parts = re.split(r",(?![^\[]*\])", text.replace(" ", ""))
    pairs = (part.partition(":") for part in parts if part)
    return {name: value for name, _, value in pairs}


def reported_option(name: str, reported: Mapping[str, Any] | str) -> Any:
    """One option as the allocator has it; the text it was given, where it reports no value."""
    if isinstance(reported, str):
        return options(reported).get(name)
    if name == "max_split_size_mb" and "max_split_size" in reported:
        size = reported["max_split_size"]
        return size // 2**20 if size > 0 else None
    value = reported.get(name)
    if value is None or isinstance(value, Mapping | list):
        return options(str(reported.get(ALLOCATOR_VARIABLE) or "")).get(name)
    return value


def same(seen: Any, asked: str) -> bool:
    """Whether a reported value is the one asked for: 0.8 is "0.80", True is "True"."""
    if str(seen) == asked:
        return True
    try:
        return not isinstance(seen, bool) and float(seen) == float(asked)
    except (TypeError, ValueError):
        return False


def prove_environment(value: Sequence[str], facts: Facts, settings: Settings) -> Proved:
    """Each variable has the value that was asked for; one that only other cells set is unset."""
    asked = dict(entry.split("=", 1) for entry in value)
    requested = ", ".join(value) or "no variable set"
    if missing(facts, "env"):
        return unknown(requested, "environment")
    seen = {n: v for n, v in facts["env"].items() if n in asked or n != ALLOCATOR_VARIABLE}
    if unread := [name for name in asked if name not in seen]:
        return unknown(requested, unread[0])
    observed = ", ".join(f"{n} unset" if v is None else f"{n}={v}" for n, v in seen.items())
    right = all(seen[name] == asked.get(name) for name in seen)
    return Proved(right, requested, observed or "no variable set")

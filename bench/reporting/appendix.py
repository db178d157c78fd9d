"""The end of a report: what was cut, the machine, how to repeat it, and the settings to use."""

import shlex
from collections.abc import Mapping
from typing import Any

from bench.judging.comparisons import flat
from bench.judging.judgement import Judgement
from bench.matrix import Cell, Matrix
from bench.reporting.strings import LANGUAGES, Words
from bench.reporting.tables import figure, gib, plain, table
from core import config

ALL = {"data.limit_data_rows": -1, "data.limit_eval_users": -1, "train.max_steps": -1}
"""Settings that cut the work, with the value that cuts nothing."""
UNTOLD = (
    "packages",
    "variables",
    "command",
    "worker",
    "warnings",
    "only",
    "profile",
    "largest",
    "resumed",
    "pid",
    "calibration",
)
"""Parts of machine.json too long or too private to the machine for the report."""


def best_settings(best: Cell, judgement: Judgement, name: str) -> str:
    """A complete settings file of the best cell, with the reason on its first line."""
    reason = " ".join(judgement.best.reason.split())
    head = f"# Best cell of {name}: {best.name} ({reason}).\n"
    limits = cuts(best)
    if limits:
        head += f"# Measured with {', '.join(limits)}; -1 means all.\n"
    return head + config.dump(best.settings)


def cuts(cell: Cell) -> list[str]:
    """Settings that kept the work small; empty list = nothing was cut."""
    leaves = flat(cell.settings.model_dump(mode="json"))
    return [f"{name}={leaves[name]}" for name, whole in ALL.items() if leaves[name] != whole]


def machine_table(machine: Mapping[str, Any], say: Words) -> str:
    """The machine in short: plain values, each GPU, the libraries in one line."""
    lines = []
    gpus = machine.get("gpus") or []
    for name, value in flat({key: v for key, v in machine.items() if key != "gpus"}).items():
        if not any(part in UNTOLD for part in name.split(".")) and is_short(value):
            lines.append([name, readable(name, value)])
    for index, gpu in enumerate(gpus):
        words = [f"{k} {readable(k, v)}" for k, v in gpu.items() if not isinstance(v, dict)]
        lines.append([f"gpu {index}", ", ".join(words)])
    return table([say("head.what"), say("head.value")], lines) if lines else ""


def listings(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and content of what is too long for the table: variables, packages, the kernels that
    say how fast the machine was.
    """
    kernels = (machine.get("calibration") or {}).get("kernels") or {}
    timed = {name: f"{figure(1000 * one['seconds'])} ms" for name, one in kernels.items()}
    found = {name: machine.get(name) for name in ("variables", "packages")} | {"calibration": timed}
    return [
        (name, ", ".join(f"{k} {v}" for k, v in of.items())) for name, of in found.items() if of
    ]


def is_short(value: Any) -> bool:
    """Whether a value says something and fits a table cell."""
    return value not in (None, "", []) and len(str(value)) <= 120


def readable(name: str, value: Any) -> str:
    """A value as text, bytes as GiB."""
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{gib(value)} GiB"
    if isinstance(value, float):
        return figure(value)
    return plain(".".join(map(str, value)) if isinstance(value, list) else value)


def commands(
    machine: Mapping[str, Any], name: str, folder: str, matrix: Matrix, say: Words, has_best: bool
) -> list[tuple[str, str]]:
    """(what for, command) pairs that repeat, extend and use the result."""
    started = list(machine.get("command") or [])
    again = f"python -m bench.run matrices/{name}.yaml"
    if "-m" in started:
        again = shlex.join(["python", *started[started.index("-m") :]])
    more = f"python -m bench.run matrices/{name}.yaml --resume {shlex.quote(folder)}"
    other = next(language for language in LANGUAGES if language != say.language)
    option = "--repeats" if matrix.max_repeats is None else "--max-repeats"
    repeats = matrix.most_repeats + 3
    found = [
        (say("command.again"), again),
        (say("command.more", repeats=repeats), f"{more} {option} {repeats}"),
        (say("command.language"), f"python -m bench.report {shlex.quote(folder)} --lang {other}"),
    ]
    if has_best:
        found.append((say("command.use"), f"python -m core.run {shlex.quote(folder)}/best.yaml"))
    return found

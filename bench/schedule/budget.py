"""What a run and each of its cells may still spend, in seconds of processes."""

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from bench.records import Record
from bench.schedule.attempts import BUDGET

UNITS_S = {"h": 3600, "m": 60, "s": 1}
WRITTEN = r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?"


def seconds(value: Any) -> Any:
    """`90`, `30m`, `1h30m` as seconds; what is no such text is left for the type to refuse."""
    found = re.fullmatch(WRITTEN, value.strip()) if isinstance(value, str) else None
    if found is None or not any(found.groups()):
        return value
    parts = zip(found.groups(), UNITS_S.values(), strict=True)
    return sum(float(number) * unit for number, unit in parts if number)


Duration = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(seconds),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}]},
        mode="validation",
    ),
]
"""Seconds, or text like 30m, 2h, 1h30m."""


def measured(records: Iterable[Record]) -> list[Record]:
    """Records without the rows of repeats that a budget left out: those are due when there is
    room again.
    """
    return [record for record in records if record.get("stopped_by") != BUDGET]


def side_seconds(run_folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the preflight of each cell, by key, and of each set-up, by name; those that went
    well.
    """
    trials, set_ups = {}, {}
    for path in run_folder.glob("cells/preflight-*.passed.json"):
        found = json.loads(path.read_text())
        trials[found["key"]] = found.get("wall_s", 0.0)
    for path in run_folder.glob("cells/set-up-*.outcome.json"):
        found = json.loads(path.read_text())
        if found["status"] == "ok":
            need = path.name.removeprefix("set-up-").removesuffix(".outcome.json")
            set_ups[need] = found.get("wall_s", 0.0)
    return trials, set_ups


class Purse:
    """Seconds spent by a run, all sittings together, and what is left of its budgets."""

    def __init__(self, total_s: float | None, cell_s: float | None, past: Iterable[Record]):
        self.total_s, self.cell_s = total_s, cell_s
        self.spent_s = 0.0
        self.processes: dict[str, list[float]] = {}
        """Cell key -> seconds of its measured processes."""
        walls = {
            (r["key"], r["repeat"], r.get("attempt", 0)): r.get("process_wall_s") or 0.0
            for r in past
        }
        for (key, repeat, _), wall_s in walls.items():
            self.spend(wall_s, key if repeat else None)

    def spend(self, wall_s: float, key: str | None = None) -> None:
        """A process has ended; `key`: the cell it measured, None for set-up and trials."""
        self.spent_s += wall_s
        if key is not None:
            self.processes.setdefault(key, []).append(wall_s)

    def refusal(self, keys: Sequence[str]) -> str | None:
        """Why these processes are not started: they would not end in time, judged by the median of
        the cell's own so far (a cell that never ran is given its chance).
        """
        if self.total_s is None:
            return None
        expected = sum(statistics.median(self.processes.get(key, [0.0])) for key in keys)
        if self.spent_s < self.total_s and self.spent_s + expected <= self.total_s:
            return None
        return f"budget_s: {self.spent_s:.0f} of {self.total_s:g} s are spent" + (
            f" and the next block takes about {expected:.0f} s" if expected else ""
        )

    def cell_refusal(self, key: str) -> str | None:
        """Why a cell is not started again: its own budget would not do."""
        if self.cell_s is None or not (own := self.processes.get(key)):
            return None
        if sum(own) + statistics.median(own) <= self.cell_s:
            return None
        return f"cell_budget_s: {sum(own):.0f} of {self.cell_s:g} s are spent"

    def limit_s(self, key: str, waiting: int) -> float | None:
        """Longest the next process of a cell may take; None without a budget.

        Before a cell has run its cost is unknown: it may take an even share of what is left for
        the `waiting` cells of this block, itself included, so that none eats the others' first
        repeat.
        """
        own = self.processes.get(key, [])
        limits = []
        if self.total_s is not None:
            left_s = self.total_s - self.spent_s
            limits.append(left_s if own else left_s / waiting)
        if self.cell_s is not None:
            limits.append(self.cell_s - sum(own))
        return max(1.0, min(limits)) if limits else None

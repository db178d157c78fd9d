"""The accepted figures: read, compared, and written only on request; no torch."""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.machine import environment, installed_version

LIBRARIES = ("torch", "transformers", "peft", "numpy", "safetensors")
TOLERATED = 0.85
"""Share of an accepted ratio that a later one must exceed: work 30 % slower shows 0.77 of it, the
same work on a busy machine 0.92 and more."""
ALIKE = 0.1
"""Two measurements of the same work on a busy machine differ by less."""
COMMAND = "make perf-accept"
CPUINFO = Path("/proc/cpuinfo")
Counters = dict[str, int]


class DamagedBaseline(Exception):
    """The baseline file is not what was accepted."""


@dataclass(frozen=True)
class Baseline:
    """What was accepted, where it was made, and under which id."""

    machine_class: str = ""
    made_with: Mapping[str, str] = field(default_factory=dict)
    counters: Mapping[str, Counters] = field(default_factory=dict)
    ratios: Mapping[str, dict[str, float]] = field(default_factory=dict)
    """Name -> `ratio` as accepted, `at_least` what later ones must exceed."""
    accepted: str = ""

    @property
    def id(self) -> str:
        """Day of acceptance and content."""
        return f"{self.accepted}-{self.digest}"

    @property
    def digest(self) -> str:
        """8 hexadecimal digits over everything accepted."""
        content = [self.machine_class, dict(self.made_with), self.counters, self.ratios]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

    def text(self) -> str:
        """As it stands in the file."""
        content: dict[str, Any] = {"id": self.id, "accepted": self.accepted}
        content |= {"machine_class": self.machine_class, "made_with": dict(self.made_with)}
        content |= {"ratios": self.ratios, "counters": self.counters}
        return json.dumps(content, indent=1) + "\n"

    @property
    def guarded(self) -> list[str]:
        """Every name that must be measured."""
        return [*self.counters, *self.ratios]


def read(path: Path) -> Baseline | None:
    """The accepted baseline, None where there is none. Raises DamagedBaseline."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        found = Baseline(
            content["machine_class"],
            content["made_with"],
            content["counters"],
            content["ratios"],
            content["accepted"],
        )
        stated = content["id"]
    except (ValueError, KeyError) as error:
        raise DamagedBaseline(f"{path}: {error!r}; {COMMAND} makes a new one") from None
    if stated != found.id:
        raise DamagedBaseline(
            f"{path}: says it is {stated}, its content is {found.id}; it was edited. Take the "
            f"committed one back, or {COMMAND}"
        )
    return found


def made_now(
    counters: Mapping[str, Counters],
    ratios: Mapping[str, float],
    machine: str,
    before: Baseline | None,
) -> Baseline:
    """The baseline that these figures would make.

    A ratio that lies near the accepted one stays what it was: many small losses, each accepted
    along with something else, would otherwise add up unseen.
    """
    kept = before.ratios if before and before.machine_class == machine else {}
    limits = {}
    for name, ratio in sorted(ratios.items()):
        was = kept.get(name)
        if was and abs(ratio / was["ratio"] - 1) <= ALIKE:
            limits[name] = was
        else:
            limits[name] = {"ratio": round(ratio, 3), "at_least": round(TOLERATED * ratio, 3)}
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    return Baseline(machine, libraries(), dict(sorted(counters.items())), limits, today)


def difference(before: Baseline | None, after: Baseline) -> str:
    """What accepting would change, as a unified diff of the file."""
    old = before.text().splitlines() if before else []
    lines = difflib.unified_diff(old, after.text().splitlines(), "accepted", "now", "", "", 2, "")
    return "\n".join(lines)


def libraries() -> dict[str, str]:
    """Versions that decide how many operators something takes."""
    return {name: installed_version(name) for name in LIBRARIES}


def machine_class() -> str:
    """What must be alike for ratios of times to be: processor, cores, torch. Virtual machines give
    processors of different generations one name, so the generation is told too.
    """
    here = environment()
    told = CPUINFO.read_text(encoding="utf-8") if CPUINFO.is_file() else ""
    numbers = re.findall(r"^(?:cpu family|model)\s*: (\d+)", told, re.MULTILINE)[:2]
    processor = " ".join([here["cpu"], *(["/".join(numbers)] if numbers else [])])
    return f"{processor}, {here['usable_cores']} cores, torch {installed_version('torch')}"


def changes(accepted: Counters, found: Counters) -> Iterator[str]:
    """Each counter that is not what was accepted, the totals first."""
    for name in dict.fromkeys([*accepted, *found]):
        before, now = accepted.get(name, 0), found.get(name, 0)
        if before != now:
            yield f"{name}: {before} -> {now} ({now - before:+d})"


def finite(ratio: float) -> bool:
    """Whether a ratio says anything."""
    return math.isfinite(ratio) and ratio > 0

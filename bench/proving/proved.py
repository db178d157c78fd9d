"""One comparison of what a setting asks with what was seen, and how observations are worded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Facts = Mapping[str, Any]
"""What one live step showed, by name."""
Settings = Mapping[str, Any]
"""All settings of a cell, nested."""


@dataclass(frozen=True)
class Proved:
    """One comparison: `holds` is True, False, or None for unknown."""

    holds: bool | None
    requested: str
    observed: str


def unknown(requested: str, what: str) -> Proved:
    """The proof of a setting whose fact was not observed."""
    return Proved(None, requested, f"{what} not observed")


def missing(facts: Facts, *names: str) -> str | None:
    """The first of the named facts that was not observed, or None when all were."""
    return next((name for name in names if facts.get(name) is None), None)


def together(parts: Iterable[bool | None]) -> bool | None:
    """Several answers as one: a contradiction decides, then a silence."""
    answers = list(parts)
    if False in answers:
        return False
    return None if None in answers else True


def counted(numbers: Mapping[str, int]) -> str:
    """`{"float32": 2, "bfloat16": 36}` as "36 bfloat16, 2 float32", the most frequent first."""
    found = sorted(((n, name) for name, n in numbers.items() if n), key=lambda x: (-x[0], x[1]))
    return ", ".join(f"{n} {name}" for n, name in found) or "none"


def several(number: int, word: str, ending: str = "s") -> str:
    """`1 break`, `2 breaks`."""
    return f"{number} {word}{ending * (number != 1)}"


def mebibytes(number: int) -> str:
    """Bytes as MiB (1024²)."""
    return f"{number / 2**20:.1f} MiB"

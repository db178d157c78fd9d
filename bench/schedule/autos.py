"""`auto` in place of a batch size: numbers that stand in for it until the largest is found.

Settings hold numbers only. So every `auto` of a matrix file becomes a number of its own that no
machine has room for; cells are planned and named with it, and before any is measured it is replaced
by what the search has found (bench.largest).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from zlib import crc32

from core.config import Node
from core.settings import Settings

AUTO = "auto"
FIRST_STAND_IN = 1 << 40
ACTS_IN = {
    "student.batch_size": ("student_fit",),
    "train.batch_size": ("teacher_fit",),
    "teacher.inference_batch_size": ("teacher_fit", "teacher_test", "teacher_outputs"),
    "distill.batch_size": ("distill_fit",),
    "eval.batch_size": ("student_fit", "student_test", "distill_fit", "distill_test"),
}
"""Setting that may be `auto` -> the stages whose memory it decides, in the order of searching."""
SECTIONS = (("base",), ("axes",), ("include",), ("without_gpu", "base"), ("without_gpu", "axes"))
"""Where it may stand. An `exclude` has to name values that are known."""


def is_auto(value: Any) -> bool:
    """Whether a number of a matrix or of settings stands for `auto`."""
    return isinstance(value, int) and value >= FIRST_STAND_IN


def stand_in(root: Node) -> None:
    """Replace every `auto` of a matrix file that stands for a batch size; what is another setting's
    or not allowed stays for the type to refuse.
    """
    for section in SECTIONS:
        node: Node | None = root
        for key in section:
            node = node.value.get(key) if node and isinstance(node.value, dict) else None
        for name, places, scalar in _scalars(node) if node else ():
            known = [leaf for leaf in ACTS_IN if f".{leaf}".endswith(f".{name}")]
            if scalar.value == AUTO and len(known) == 1:
                # Of its place alone: a resumed run must give a cell the key it had.
                scalar.value = str(stand_in_at(" ".join((*section, *known, *places))))


def stand_in_at(place: str) -> int:
    """The number for the `auto` of one place."""
    return FIRST_STAND_IN + crc32(place.encode())


def _scalars(
    node: Node, name: str = "", places: tuple[str, ...] = ()
) -> Iterator[tuple[str, tuple[str, ...], Node]]:
    """Every scalar below a node with its dotted name, and its places in the lists around it."""
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            yield from _scalars(child, f"{name}.{key}".removeprefix("."), places)
    elif isinstance(node.value, list):
        for place, child in enumerate(node.value):
            yield from _scalars(child, name, (*places, str(place)))
    else:
        yield name, places, node


def written(text: str) -> str:
    """The YAML text of a matrix with `auto` for every number that stands in for it."""
    return re.sub(r"\b\d{13}\b", lambda found: AUTO if is_auto(int(found[0])) else found[0], text)


def autos_of(settings: Settings) -> dict[str, int]:
    """Setting -> its stand-in, of settings that still have some, in the order of searching."""
    values = {leaf: value_of(settings, leaf) for leaf in ACTS_IN}
    return {leaf: value for leaf, value in values.items() if is_auto(value)}


def value_of(settings: Settings, leaf: str) -> Any:
    """The value of a dotted setting."""
    section, _, name = leaf.partition(".")
    return getattr(getattr(settings, section), name)


def replaced(value: Any, number_of: Callable[[int], Any]) -> Any:
    """Plain data with `number_of` of every stand-in in its place."""
    if isinstance(value, dict):
        return {key: replaced(inner, number_of) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [replaced(inner, number_of) for inner in value]
    return number_of(value) if is_auto(value) else value


def with_numbers(settings: Settings, numbers: Mapping[int, int]) -> Settings:
    """Settings with the found numbers; a stand-in without one stays."""
    document = replaced(settings.model_dump(), lambda value: numbers.get(value, value))
    return Settings.model_validate(document)

"""Settings that a matrix names by nested, dotted or short names, checked against `Settings`.

Mistakes are raised as pydantic's own errors with the path of the very value, also for axis values
that are checked against the types of another model, so that `core.config` can name their place.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Annotated, Any, NoReturn

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from bench.schedule.autos import AUTO, is_auto
from core import config
from core.config import Location, did_you_mean
from core.settings import Settings

_REFUSED = "refused"


@cache
def setting_leaves() -> dict[str, Any]:
    """Dotted name -> type of everything that can be set or swept."""
    return config.leaves(Settings)


@cache
def _adapter(leaf: str) -> TypeAdapter[Any]:
    return TypeAdapter(setting_leaves()[leaf], config=ConfigDict(allow_inf_nan=False))


@cache
def _value_list() -> TypeAdapter[list[Any]]:
    return TypeAdapter(Annotated[list[Any], Field(min_length=1)])


def problem(text: str, location: Location = (), kind: str = _REFUSED) -> InitErrorDetails:
    """One mistake at `location`; `kind` NO_SUCH_SETTING points at the key instead of the value."""
    error = PydanticCustomError(kind, "{text}", {"text": text})
    return InitErrorDetails(type=error, loc=location, input=None)


def refuse(problems: list[InitErrorDetails]) -> NoReturn:
    """Raise all `problems` in a way that keeps their locations below the field being read."""
    raise ValidationError.from_exception_data("Matrix", problems)


def _below(detail: ErrorDetails, location: Location) -> InitErrorDetails:
    """The same error, seen from the field that holds `location`."""
    place = (*location, *detail["loc"])
    if detail["type"] in (_REFUSED, config.NO_SUCH_SETTING):
        return problem(detail["msg"], place, detail["type"])
    context = detail.get("ctx", {})
    return InitErrorDetails(type=detail["type"], loc=place, input=detail["input"], ctx=context)


def leaf_name(name: str) -> str:
    """The dotted leaf of `Settings` that `name` means: itself, or the only leaf that ends so."""
    if name in setting_leaves():
        return name
    ends = [leaf for leaf in setting_leaves() if leaf.endswith(f".{name}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        text = f"fits {len(ends)} settings; write one of {', '.join(ends)}"
    elif any(leaf.startswith(f"{name}.") for leaf in setting_leaves()):
        text = "is a group of settings; name one of them"
    else:
        text = f"no such setting{did_you_mean(name, setting_leaves())}"
    refuse([problem(text, kind=config.NO_SUCH_SETTING)])


def flatten(given: dict[str, Any], above: Location = ()) -> Iterator[tuple[Location, Any]]:
    """Every entry of nested mappings with its path; no setting is itself a mapping."""
    for key, value in given.items():
        if isinstance(value, dict):
            yield from flatten(value, (*above, key))
        else:
            yield (*above, key), value


def _by_leaf(given: Any, read: Callable[[str, Any], Any]) -> Any:
    """Nested, dotted or short names -> {dotted leaf: read(leaf, value)}; all mistakes at once."""
    if not isinstance(given, dict):
        return given  # pydantic says what is wrong with it
    found: dict[str, Any] = {}
    problems: list[InitErrorDetails] = []
    for location, value in flatten(given):
        try:
            leaf = leaf_name(".".join(str(part) for part in location))
            if leaf in found:
                refuse([problem(f"{leaf} is given twice", kind=config.NO_SUCH_SETTING)])
            found[leaf] = None
            found[leaf] = read(leaf, value)
        except ValidationError as error:
            problems += [_below(detail, location) for detail in error.errors()]
    if problems:
        refuse(problems)
    return found


def _value(leaf: str, given: Any) -> Any:
    return _adapter(leaf).validate_python(given)


def _values(leaf: str, given: Any) -> tuple[Any, ...]:
    """The values of one axis: at least one, each of the leaf's type, no two equal."""
    found: list[Any] = []
    problems: list[InitErrorDetails] = []
    for place, text in enumerate(_value_list().validate_python(given)):
        try:
            value = _value(leaf, text)
        except ValidationError as error:
            problems += [_below(detail, (place,)) for detail in error.errors()]
            continue
        if value in found:
            problems.append(problem(f"{show(value)} is already a value of this axis", (place,)))
        found.append(value)
    if problems:
        refuse(problems)
    return tuple(found)


def nested(given: Any) -> Any:
    """Dotted keys of a Python mapping as nesting (files arrive nested)."""
    return nest(flatten(given)) if isinstance(given, dict) else given


def nest(entries: Iterator[tuple[Location, Any]]) -> dict[str, Any]:
    """Entries by path -> nested mappings; a later entry of the same path wins."""
    tree: dict[str, Any] = {}
    for location, value in entries:
        *groups, name = ".".join(str(part) for part in location).split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return tree


def _axes(given: Any) -> Any:
    return _by_leaf(given, _values)


def _overrides(given: Any) -> Any:
    return _by_leaf(given, _value)


Axes = Annotated[dict[str, tuple[Any, ...]], BeforeValidator(_axes)]
Overrides = Annotated[dict[str, Any], BeforeValidator(_overrides)]
Entry = Annotated[Overrides, Field(min_length=1)]


def show(value: Any) -> str:
    """A value as YAML would show it, for names of cells and messages."""
    if isinstance(value, tuple):
        return f"[{', '.join(show(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return AUTO if is_auto(value) else str(value)

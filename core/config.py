"""YAML files to checked models and back; all mistakes at once, each with file, line and column."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from core.nodes import (
    Document,
    InputError,
    Node,
    Place,
    did_you_mean,
    empty,
    labelled,
    last_part,
    plain,
    put,
    read,
)
from core.settings import Settings

__all__ = [
    "Document",
    "InputError",
    "Node",
    "check",
    "did_you_mean",
    "dump",
    "leaves",
    "load",
    "load_settings",
    "put",
    "read",
]

Model = TypeVar("Model", bound=BaseModel)
Location = tuple[int | str, ...]
NO_SUCH_SETTING = "no_such_setting"
"""Error type of a validator that refuses a *key*; every other error points at the value."""


def load(path: Path, model: type[Model], sets: Sequence[str] = ()) -> Model:
    """Read the YAML file `path` as a `model`; raises InputError with all mistakes.

    Each of `sets` is `dotted.key=value` and replaces that node before anything is checked.
    """
    document = read(path)
    for option in sets:
        put(document, option)
    return check(document, model)


def load_settings(path: Path | None, sets: Sequence[str] = ()) -> Settings:
    """Read a settings file (None: the defaults) and apply `sets`; raises as `load`."""
    if path is not None:
        return load(path, Settings, sets)
    document = Document(empty(Place("settings")))
    for option in sets:
        put(document, option)
    return check(document, Settings)


def dump(model: BaseModel) -> str:
    """YAML text of `model` with every field, such that reading it again gives an equal model."""
    data = model.model_dump(mode="json")
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def leaves(model_type: type[BaseModel]) -> dict[str, Any]:
    """Dotted name -> annotation with constraints, of every field that is no group of fields."""
    found: dict[str, Any] = {}
    for name, info in model_type.model_fields.items():
        section = _section(info.annotation)
        if section is None:
            annotation = info.annotation
            found[name] = Annotated[annotation, *info.metadata] if info.metadata else annotation
        else:
            found |= {f"{name}.{inner}": kind for inner, kind in leaves(section).items()}
    return found


def check(document: Document, model: type[Model]) -> Model:
    """The `model` that `document` describes; raises InputError with all mistakes."""
    mistakes = list(document.mistakes)
    try:
        checked = model.model_validate(plain(document.root))
    except ValidationError as error:
        names = _names(model)
        mistakes += [_mistake(detail, document.root, names) for detail in error.errors()]
    if mistakes:
        raise InputError(f"{place}: {text}" for place, text in dict.fromkeys(sorted(mistakes)))
    return checked


_WRONG_TYPE = {
    "int_parsing": "is not a whole number",
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "int_parsing_size": "is too large",
    "float_parsing": "is not a number",
    "float_type": "is not a number",
    "finite_number": "is not a finite number",
    "bool_parsing": "is not true or false",
    "bool_type": "is not true or false",
    "string_type": "is not text",
    "tuple_type": "is not a list",
    "list_type": "is not a list",
    "dict_type": "is not a mapping",
    "model_type": "is not a mapping",
    "string_too_short": "is empty; something must be given",
    "too_short": "is empty; something must be given",
}
_LIMITS = {
    "greater_than_equal": ("ge", "is less than"),
    "greater_than": ("gt", "is not more than"),
    "less_than_equal": ("le", "is more than"),
    "less_than": ("lt", "is not less than"),
}


def _mistake(detail: ErrorDetails, root: Node, names: list[str]) -> tuple[Place, str]:
    """Place and text of one pydantic error."""
    node, kind, path = _find(root, detail["loc"]), detail["type"], _dotted(detail["loc"])
    given, context = _given(node), detail.get("ctx", {})
    place = node.place
    if kind == "extra_forbidden":
        place, text = node.key_place, f"no such setting{did_you_mean(path, names)}"
    elif kind == NO_SUCH_SETTING:
        place, text = node.key_place, detail["msg"]
    elif kind == "missing":
        text = "is missing; it must be given"
    elif kind == "literal_error":
        options = re.findall("'([^']*)'", context["expected"])
        text = f"{given} is not one of {', '.join(options)}"
    elif kind in _WRONG_TYPE:
        text = f"{given} {_WRONG_TYPE[kind]}"
    elif kind in _LIMITS:
        limit, words = _LIMITS[kind]
        text = f"{given} {words} {context[limit]:g}"
    else:  # a refused combination, or the words of a validator of our own
        text = detail["msg"].removeprefix("Value error, ")
        place = _culprit(node, text).place
    return place, labelled(path, text)


def _find(node: Node, location: Location) -> Node:
    """The deepest node on the way to `location`; unwritten parts are skipped (short axis names)."""
    rest = location
    while rest:
        taken, child = 1, None
        if isinstance(node.value, dict):
            joined = (".".join(map(str, rest[:count])) for count in range(1, len(rest) + 1))
            found = ((count, key) for count, key in enumerate(joined, start=1) if key in node.value)
            taken, key = next(found, (1, ""))
            child = node.value.get(key)
        elif isinstance(node.value, list) and isinstance(rest[0], int):
            child = node.value[rest[0]] if rest[0] < len(node.value) else None
        node, rest = child or node, rest[taken:]
    return node


def _culprit(node: Node, text: str) -> Node:
    """The first entry of a refused group that the reason names, else the group."""
    entries = node.value.items() if isinstance(node.value, dict) else ()
    return next((child for key, child in entries if names_setting(text, key)), node)


def names_setting(text: str, leaf: str) -> bool:
    """Whether the reason `text` speaks of the setting `leaf` (its last part)."""
    return re.search(rf"\b{re.escape(last_part(leaf))}\b", text) is not None


def _given(node: Node) -> str:
    if isinstance(node.value, str):
        return repr(node.value)
    if node.value is None:
        return "nothing"
    return "a list" if isinstance(node.value, list) else "a mapping"


def _dotted(location: Location) -> str:
    """`('axes', 'teacher', 'attn', 1)` -> `axes.teacher.attn[1]`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".")


def _names(model: type[BaseModel]) -> list[str]:
    """Every key that may be written: leaves, and the groups that hold them."""
    names = list(leaves(model))
    groups = {
        ".".join(name.split(".")[:depth])
        for name in names
        for depth in range(1, name.count(".") + 1)
    }
    return names + sorted(groups)


def _section(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line, everything else in blocks."""


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    plain = not any(isinstance(value, dict) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=plain)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # YAML's own line breaks that Python's are not: PyYAML would write and read them as a blank
    breaks = any(character in text for character in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)

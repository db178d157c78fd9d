"""JSON Schemas of matrix and settings files, for editors; `python -m bench.schemas` writes them."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bench.matrix import Matrix
from bench.overrides import setting_leaves
from bench.schedule.autos import ACTS_IN, AUTO
from core.settings import Settings


def matrix_schema() -> dict[str, Any]:
    """JSON Schema of a matrix file: leaves by dotted name, axes also by short name; batch sizes may
    be `auto`.
    """
    document = _schema(Matrix)
    for leaf in ACTS_IN:
        _allow_auto(document, leaf)
    properties = document["properties"]
    whole = {leaf: {"$ref": _pointer(leaf)} for leaf in setting_leaves()}
    ends = [leaf.rpartition(".")[2] for leaf in setting_leaves()]
    short = {
        end: ref for ref, end in zip(whole.values(), ends, strict=True) if ends.count(end) == 1
    }
    groups = document["$defs"]["Settings"]["properties"]
    base = _object(groups | whole)
    every = whole | short
    axes = _object({name: {"type": "array", "items": every[name], "minItems": 1} for name in every})
    document["$defs"] |= {"Base": base, "Axes": axes, "Entry": _object(every)}
    properties["base"] = {"$ref": "#/$defs/Base"}
    properties["axes"] = {"$ref": "#/$defs/Axes"}
    for name in ("include", "exclude"):
        properties[name]["items"] = {"$ref": "#/$defs/Entry"}
    instead = document["$defs"]["WithoutGpu"]["properties"]
    instead |= {"base": {"$ref": "#/$defs/Base"}, "axes": {"$ref": "#/$defs/Axes"}}
    return document


def write_schemas(folder: Path) -> None:
    """Write `matrix.schema.json` and `settings.schema.json` into `folder`."""
    for name, document in (("matrix", matrix_schema()), ("settings", _schema(Settings))):
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        (folder / f"{name}.schema.json").write_text(text, encoding="utf-8")


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _allow_auto(document: dict[str, Any], leaf: str) -> None:
    """Let the description of `leaf` take the word beside its number."""
    *groups, name = _pointer(leaf).removeprefix("#/").split("/")
    holder = document
    for group in groups:
        holder = holder[group]
    known = holder[name]
    about = {key: known.pop(key) for key in ("default", "title") if key in known}
    holder[name] = {"anyOf": [known, {"const": AUTO}], **about}


def _pointer(leaf: str) -> str:
    """Where the schema of `Settings` describes `leaf`."""
    *groups, name = leaf.split(".")
    model: type[BaseModel] = Settings
    for group in groups:
        inner = model.model_fields[group].annotation
        assert isinstance(inner, type)
        model = inner
    return f"#/$defs/{model.__name__}/properties/{name}"


if __name__ == "__main__":
    write_schemas(Path("matrices"))

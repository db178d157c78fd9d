"""YAML text as a tree of nodes that remember where they stand.

Scalars keep their written form, so that the *type* of a setting decides what they mean: `12.10`
stays "12.10" for text, `no` stays "no", and `1e-4` is a number. Only a plain `null`, `~` or nothing
at all is None. A dotted key is the same as nesting: `train.lr: 1` is `train: {lr: 1}`.
"""

import difflib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

NULLS = ("", "~", "null", "Null", "NULL")


class InputError(Exception):
    """Bad input; `messages` holds every mistake, `str()` is one per line."""

    def __init__(self, messages: str | Iterable[str]) -> None:
        self.messages = [messages] if isinstance(messages, str) else list(messages)
        super().__init__("\n".join(self.messages))


class Place(NamedTuple):
    """Where something was written: a file position, or a command-line option (line 0)."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass
class Node:
    """One YAML value with the places of the value and of the key that leads to it."""

    value: "dict[str, Node] | list[Node] | str | None"
    place: Place
    key_place: Place


@dataclass
class Document:
    """A file as a tree of nodes, and the mistakes met while reading it (duplicate keys, tags)."""

    root: Node
    mistakes: list[tuple[Place, str]] = field(default_factory=list)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """` (did you mean x?)` with the nearest of `options`, or nothing.

    A name whose last part exists elsewhere is most likely in the wrong group, so those come first.
    """
    names = [name for name in options if not word.startswith(f"{name}.")]
    same = [name for name in names if last_part(name) == last_part(word)]
    nearest = _by_likeness(word, same) or difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    if not nearest:
        close = difflib.get_close_matches(
            last_part(word), {last_part(name) for name in names}, n=1, cutoff=0.7
        )
        nearest = _by_likeness(word, [name for name in names if last_part(name) in close])
    if not nearest:
        return ""
    *others, final = nearest[:4]
    return f" (did you mean {', '.join(others) + ' or ' if others else ''}{final}?)"


def read(path: Path) -> Document:
    """Read `path` as a tree of nodes; raises InputError if it is no readable YAML."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = did_you_mean(path.name, sorted(other.name for other in path.parent.glob("*.y*ml")))
        raise InputError(f"{path}: no such file{near}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text") from None
    return _parse(text, lambda line, column: Place(str(path), line, column))


def put(document: Document, option: str, inside: Sequence[str] = ()) -> None:
    """Replace the node below `inside` that `option` (`dotted.key=value`, value in YAML) names."""
    key, equals, text = option.partition("=")
    place = Place(f"--set {option}")
    if not equals or not key.strip():
        raise InputError(f"{place}: no value is given; write --set dotted.key=value")
    given = _parse(text, lambda line, column: place)
    document.mistakes += given.mistakes
    *parents, name = [*inside, *key.strip().split(".")]
    node = document.root
    for parent in parents:
        if not isinstance(node.value, dict):
            return  # the file itself has no mapping here; `check` says so
        child = node.value.get(parent)
        if child is None or not isinstance(child.value, dict):
            child = node.value[parent] = empty(place)
        node = child
    if isinstance(node.value, dict):
        present = node.value.get(name)
        value = given.root.value if text.strip() else None
        node.value[name] = Node(value, place, present.key_place if present else place)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse aliases: what a file says must stand where it is read."""
        if self.check_event(yaml.AliasEvent):
            problem = "aliases are not read; write the value out"
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return super().compose_node(parent, index)


def _parse(text: str, place: Callable[[int, int], Place]) -> Document:
    try:
        loader = _Loader(text)
        raw = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = place(mark.line + 1, mark.column + 1) if mark else place(1, 1)
        raise InputError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position].split("\n")
        where = place(len(before), len(before[-1]) + 1)
        raise InputError(f"{where}: not valid YAML: {error.reason}") from None
    if raw is None:
        return Document(empty(place(1, 1)))
    builder = _Builder(place)
    return Document(builder.node(raw), builder.mistakes)


class _Builder:
    """Turns PyYAML's nodes into ours and collects what YAML would let pass."""

    def __init__(self, place: Callable[[int, int], Place]) -> None:
        self.mistakes: list[tuple[Place, str]] = []
        self._place = place

    def node(self, raw: yaml.Node, key: yaml.Node | None = None, path: str = "") -> Node:
        here = self._where(raw)
        if not raw.tag.startswith("tag:yaml.org,2002:"):
            self.mistakes.append(
                (here, labelled(path, f"the tag {raw.tag} is not read; remove it"))
            )
        value: dict[str, Node] | list[Node] | str | None
        if isinstance(raw, yaml.MappingNode):
            value = self._entries(raw, path)
        elif isinstance(raw, yaml.SequenceNode):
            value = [self.node(item, None, f"{path}[{n}]") for n, item in enumerate(raw.value)]
        else:
            written = str(raw.value)
            is_plain = isinstance(raw, yaml.ScalarNode) and raw.style is None
            value = None if is_plain and written in NULLS else written
        return Node(value, here, self._where(key) if key else here)

    def _entries(self, raw: yaml.MappingNode, path: str) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        seen: dict[str, Place] = {}
        for key, item in raw.value:
            here = self._where(key)
            if not isinstance(key, yaml.ScalarNode):
                self.mistakes.append((here, labelled(path, "a key must be a name")))
                continue
            name = str(key.value)
            dotted = f"{path}.{name}" if path else name
            if name in seen:
                self.mistakes.append((here, _twice(dotted, seen[name])))
                continue
            seen[name] = here
            node = self.node(item, key, dotted)
            head, *inner = name.split(".")
            for part in reversed(inner):
                node = Node({part: node}, node.place, node.key_place)
            self._merge(entries, head, node, path)
        return entries

    def _merge(self, entries: dict[str, Node], name: str, node: Node, path: str) -> None:
        """Join `train: {lr: 1}` with `train.batch_size: 2`; the same leaf in both is a mistake."""
        dotted = f"{path}.{name}" if path else name
        present = entries.setdefault(name, node)
        if present is node:
            return
        if isinstance(present.value, dict) and isinstance(node.value, dict):
            for inner, child in node.value.items():
                self._merge(present.value, inner, child, dotted)
        else:
            self.mistakes.append((node.key_place, _twice(dotted, present.key_place)))

    def _where(self, raw: yaml.Node) -> Place:
        return self._place(raw.start_mark.line + 1, raw.start_mark.column + 1)


def empty(place: Place) -> Node:
    """A mapping without entries."""
    return Node({}, place, place)


def plain(node: Node) -> Any:
    """The same tree without places."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def _twice(dotted: str, first: Place) -> str:
    return f"{dotted}: given twice{f' (first in line {first.line})' if first.line else ''}"


def _by_likeness(word: str, names: list[str]) -> list[str]:
    def unlikeness(name: str) -> tuple[int, float]:
        pairs = zip(word, name, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return -shared, -difflib.SequenceMatcher(None, word, name).ratio()

    return sorted(names, key=unlikeness)


def last_part(name: str) -> str:
    """`train.lr` -> `lr`."""
    return name.rpartition(".")[2]


def labelled(path: str, text: str) -> str:
    """`path: text`, or `text` alone where the whole file is meant."""
    return f"{path}: {text}" if path else text

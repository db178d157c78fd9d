"""The words of a report in each language, from one table; sentences of others by their English."""

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from core.config import InputError, did_you_mean

LANGUAGES = ("en", "ja")
ENGLISH = LANGUAGES[0]
NOTHING: Mapping[str, Any] = MappingProxyType({})
LIST = "list"
"""Placeholder of a recognised sentence that holds several of them, parted by "; "."""
TEXT = "text"
"""Placeholder that holds a sentence of its own."""

SHAPES = {"count": r"\d+", "stage": r"\w+", "stages": r"[\w, ]+"}
"""What these placeholders may hold; any other holds anything."""


class Message(NamedTuple):
    """A sentence that has no language yet: its key in the table and what it speaks of."""

    key: str
    values: Mapping[str, Any] = NOTHING


@cache
def table() -> dict[str, Any]:
    """The table as it is written: `said` by key, `recognised` in order; each in all languages."""
    text = (files("bench") / "templates" / "strings.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


@cache
def words(language: str) -> "Words":
    """The table of one language."""
    return Words(language)


class Words:
    """What a report says in one language."""

    def __init__(self, language: str) -> None:
        self.language = language
        self.said = {key: entry[language] for key, entry in table()["said"].items()}
        self.recognised = (
            [(pattern(one[ENGLISH]), one[language]) for one in table()["recognised"]]
            if language != ENGLISH
            else []
        )

    def __call__(self, key: str, /, **values: Any) -> str:
        """The text of a key with its placeholders filled."""
        return str(self.said[key].format(**{n: self.tell(v) for n, v in values.items()}))

    def tell(self, value: Any) -> Any:
        """A message, or a list of them, in this language; any other value as it is."""
        if isinstance(value, Message):
            return self(value.key, **value.values)
        return self("joint").join(map(self.tell, value)) if isinstance(value, list) else value

    def foreign(self, text: str) -> str:
        """A sentence of another module in this language; as it is where the table knows it not."""
        return self._recognise(text) or text

    def quoted(self, text: str, letters: int | None = None) -> str:
        """The same for texts of records: sentences nothing recognises stand in quotation marks.

        `letters`: the most to show of it.
        """
        known = self._recognise(text)
        if known or " " not in text:
            return cut(known or text, letters)
        return self("quoted", text=cut(text, letters))

    def listed(self, text: str) -> str:
        """Several sentences parted by "; ", each for itself."""
        return self("sentences.joint").join(self.foreign(part) for part in text.split("; "))

    def _recognise(self, text: str) -> str | None:
        if not text or self.language == ENGLISH:
            return None
        for known, own in self.recognised:
            if found := known.fullmatch(text):
                return str(own.format(**self._values(found.groupdict())))
        return None

    def _values(self, found: Mapping[str, str]) -> dict[str, str]:
        ways = {LIST: self.listed, TEXT: self.quoted}
        return {name: ways.get(name, str)(value) for name, value in found.items()}


def chosen_language(word: str) -> str:
    """The language of `--lang`. Raises InputError."""
    if word not in LANGUAGES:
        raise InputError(
            f"--lang {word}: not one of {', '.join(LANGUAGES)}{did_you_mean(word, LANGUAGES)}"
        )
    return word


def cut(text: object, letters: int | None) -> str:
    """Text on one line, of so many letters at most, an ellipsis in place of the rest."""
    line = " ".join(str(text).split())
    return line if letters is None or len(line) <= letters else line[: letters - 1].rstrip() + "…"


def pattern(sentence: str) -> re.Pattern[str]:
    """What recognises a sentence of the table; doubled braces stand for single ones."""
    parts = re.split(r"(?<!\{)\{(\w+)\}(?!\})", sentence)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"(?P<{part}>{SHAPES.get(part, '.+?')})"
        else:
            parts[i] = re.escape(part.replace("{{", "{").replace("}}", "}"))
    return re.compile("".join(parts), re.DOTALL)

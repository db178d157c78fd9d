"""Artefacts addressed by content and handed over by manifest: an unchanged stage is never
recomputed, a changed one never finds the old result.

The address of a stage is the hash of the code of `core`, the settings the stage may read, the state
of the source files and the addresses of the stages before it. A stage is only given the settings it
declares, so a setting that is missing from the address cannot be read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from core.config import InputError
from core.settings import Settings

MANIFEST = "manifest.json"


def visible(settings: Settings, reads: Sequence[str]) -> SimpleNamespace:
    """The settings a stage may read: whole sections ("student") or single leaves ("train.trainer").

    Anything else is absent, so reading it is an AttributeError and not a stale artefact.
    """
    view: dict[str, Any] = {}
    for name in reads:
        section, _, leaf = name.partition(".")
        if not leaf:
            view[section] = getattr(settings, section)
        else:
            part = view.setdefault(section, SimpleNamespace())
            setattr(part, leaf, getattr(getattr(settings, section), leaf))
    return SimpleNamespace(**view)


def address(
    stage: str, settings: Settings, reads: Sequence[str], upstream: Mapping[str, str]
) -> str:
    """Content address of a stage's artefact, 16 hexadecimal digits."""
    text = settings.model_dump(mode="json")
    chosen = {}
    for name in sorted(reads):
        section, _, leaf = name.partition(".")
        chosen[name] = text[section][leaf] if leaf else text[section]
    return digest(
        {"stage": stage, "code": code_digest(), "settings": chosen, "upstream": dict(upstream)}
    )


def digest(value: Any) -> str:
    """16 hexadecimal digits over canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@cache
def code_digest() -> str:
    """Hash of the sources of `core`: a changed pipeline makes new artefacts."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return digest({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})


def file_states(paths: Sequence[Path]) -> list[list]:
    """Name, size and modification time of source files: what tells a changed data set without
    reading it.
    """
    return [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(paths)]


class Store:
    """Folders `<stage>-<address>`: new ones appear whole under `root`, finished ones may also lie
    in `shared`.
    """

    def __init__(self, root: Path, shared: Path | None = None):
        self.root, self.shared = root, shared
        root.mkdir(parents=True, exist_ok=True)

    def find(self, stage: str, address: str) -> Path | None:
        """The finished artefact, or None."""
        for base in filter(None, (self.root, self.shared)):
            if (folder := base / f"{stage}-{address}").joinpath(MANIFEST).is_file():
                return folder
        return None

    @contextmanager
    def create(self, stage: str, address: str) -> Iterator[Path]:
        """A working folder that becomes the artefact when the block ends well.

        It keeps its name between tries of one address, so a stage may continue what an interrupted
        one left.
        """
        partial = self.root / f".{stage}-{address}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
        final = self.root / f"{stage}-{address}"
        shutil.rmtree(final, ignore_errors=True)  # without a manifest: not an artefact
        partial.rename(final)


def write_manifest(folder: Path, entries: Mapping[str, Any]) -> None:
    """Seal a folder: what made it, and a hash of every file in it."""
    files = {
        str(p.relative_to(folder)): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()
    }
    write_json(folder / MANIFEST, {**entries, "files": files})


def read_manifest(folder: Path) -> dict:
    """The manifest of an artefact, after checking every file against its hash.

    Raises InputError naming the first file that is missing or differs.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: no {MANIFEST} here; wanted the folder of a finished stage")
    try:
        manifest = json.loads(path.read_text())
        files, _ = manifest["files"], manifest["stage"]
    except (ValueError, KeyError):
        raise InputError(f"{path}: not a stage's; wanted the folder of a finished stage") from None
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise InputError(
                f"{file}: missing; the manifest beside it lists it. Delete {folder} and run again"
            )
        if file_hash(file) != expected:
            raise InputError(
                f"{file}: contents differ from the manifest. Delete {folder} and run again"
            )
    return manifest


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename: never half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)

"""Whether the figures of two runs may be compared: what identifies a run, and where two differ."""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench import records
from bench.comparing import calibration
from bench.matrix import Cell, Matrix, cells, load_matrix
from bench.overrides import flatten
from bench.records import Record
from bench.request import choose
from bench.schedule.attempts import judged
from core.config import InputError, did_you_mean

HARDWARE = ("gpu", "cpu", "speed")
"""Fields in which two machines differ; across them seconds mean nothing."""
FIELDS = ("code", "data", "settings", "packages", "image", "variables", "driver", *HARDWARE)
ANOTHER_SPEED = 1.3
"""Machines of equal names whose typical calibration kernel differs by more are not one machine:
throttled, shared with others, or a virtual machine of another size. On two shared cores under load
the typical kernel of six calibrations stayed within 1.1; that of copying alone did not."""
SHORTEST_COMMIT = 4


@dataclass(frozen=True)
class Side:
    """One of the two runs, as its folder tells."""

    folder: Path
    machine: Mapping[str, Any]
    matrix: Matrix
    cells: Sequence[Cell]
    records: Sequence[Record]
    """One attempt of each repeat."""

    def of(self, cell: Cell) -> list[Record]:
        """The records of one of its cells."""
        return [record for record in self.records if record["cell"] == cell.name]

    @property
    def commit(self) -> str:
        """Short commit of the measuring code, marked where files had been changed since."""
        git = self.machine.get("git") or {}
        return str(git.get("commit", "unknown"))[:9] + (" with changes" if git.get("dirty") else "")


class Pair(NamedTuple):
    """The same cell in both runs."""

    before: Cell
    after: Cell

    @property
    def name(self) -> str:
        """Name of the cell; both where the runs call equal settings differently."""
        if self.before.name == self.after.name:
            return self.before.name
        return f"{self.before.name} = {self.after.name}"


class Difference(NamedTuple):
    """One part of one field of the comparability key that is not alike."""

    field: str
    part: str
    before: Any
    after: Any


def find_run(word: str, out: Path) -> Path:
    """The run folder that a word names: a folder, its records, a run id, or the start of a commit,
    of which the newest run counts. Raises InputError.
    """
    given = Path(word)
    if given.suffix == ".jsonl":
        given = given.parent
    if (given / "records.jsonl").is_file():
        return given
    known = sorted(out.glob("*/*/records.jsonl"), key=lambda path: path.parent.name)
    folders = [path.parent for path in known]
    found = [folder for folder in folders if folder.name == word or _made_by(folder, word)]
    matrices = sorted({folder.parent.name for folder in found})
    if len(matrices) > 1:
        raise InputError(
            f"{word}: has runs of {len(matrices)} matrices ({', '.join(matrices)}); give a folder"
        )
    if not found:
        raise InputError(
            f"{word}: no run folder, and no run id or commit of a run below {out}"
            f"{did_you_mean(word, [folder.name for folder in folders])}"
        )
    return found[-1]


def _made_by(folder: Path, commit: str) -> bool:
    if len(commit) < SHORTEST_COMMIT or not (folder / "machine.json").is_file():
        return False
    git = json.loads((folder / "machine.json").read_text()).get("git") or {}
    return str(git.get("commit", "")).startswith(commit)


def read_side(folder: Path) -> Side:
    """A run from its folder. Raises InputError when a file is missing or not readable any more."""
    try:
        machine = json.loads((folder / "machine.json").read_text())
    except (OSError, ValueError):
        raise InputError(f"{folder / 'machine.json'}: missing or damaged") from None
    matrix = load_matrix(folder / "matrix.yaml")
    chosen = choose(cells(matrix, bool(machine.get("has_gpu"))), machine.get("only") or ())
    return Side(folder, machine, matrix, chosen, judged(records.read(folder / "records.jsonl")))


def pairs(before: Side, after: Side) -> list[Pair]:
    """Cells of equal settings; of those left over, cells of equal names."""
    by_key = {cell.key: cell for cell in after.cells}
    equal = {cell.key for cell in before.cells} & by_key.keys()
    by_name = {cell.name: cell for cell in after.cells if cell.key not in equal}
    found = []
    for cell in before.cells:
        other = by_key[cell.key] if cell.key in equal else by_name.get(cell.name)
        if other is not None:
            found.append(Pair(cell, other))
    return found


def identity(side: Side) -> dict[str, dict[str, Any]]:
    """What must be alike for seconds to be comparable: field -> part -> value."""
    machine, process = side.machine, side.machine.get("process") or {}
    gpus = machine.get("gpus") or []
    loaded = {name: process.get(name) for name in ("torch", "torch_cuda", "transformers")}
    return {
        "code": _code(machine),
        "data": _data(side),
        "settings": {cell.name: cell.key for cell in side.cells}
        | {"matrix.warmup_steps": side.matrix.warmup_steps},
        "packages": {**(machine.get("packages") or {}), "python": machine.get("python")}
        | {f"{name} of the worker": version for name, version in loaded.items()},
        "image": {**(machine.get("containers") or {}).get("images", {})}
        | {"of the worker": process.get("image")},
        "variables": dict(machine.get("variables") or {}),
        "gpu": {"gpus": [[gpu.get("name"), gpu.get("memory_bytes")] for gpu in gpus]},
        "cpu": {name: machine.get(name) for name in ("cpu", "usable_cores")},
        "driver": {"driver": sorted({str(gpu.get("driver")) for gpu in gpus})},
    }


def _code(machine: Mapping[str, Any]) -> dict[str, Any]:
    """The sources' own digest; of runs older than it the commit, which hides changes since."""
    worker = list(machine.get("worker") or [])[1:]  # the interpreter's path says nothing
    if "code" in machine:
        return {"sources": machine["code"], "worker": worker}
    git = machine.get("git") or {}
    return {"commit": git.get("commit"), "changed since": git.get("dirty"), "worker": worker}


def _data(side: Side) -> dict[str, Any]:
    """Digest of the prepared ratings, by cell only where cells differ in it."""
    digests = {
        record["cell"]: record["data_digest"]
        for record in side.records
        if record.get("data_digest")
    }
    return {"digest": None} if not digests else _shortened(digests)


def _shortened(digests: Mapping[str, str]) -> dict[str, Any]:
    if len(set(digests.values())) == 1:
        return {"digest": next(iter(digests.values()))[:16]}
    return {cell: digest[:16] for cell, digest in digests.items()}


def key(identified: Mapping[str, Mapping[str, Any]]) -> str:
    """The comparability key: 16 hexadecimal digits over all fields."""
    text = json.dumps(identified, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(before: Side, after: Side, common: Sequence[Pair]) -> list[Difference]:
    """Every part in which the two runs are not alike, in the order of `FIELDS`."""
    ours, theirs = identity(before), identity(after)
    ours["settings"], theirs["settings"] = _settings(before, after, common)
    found = [
        Difference(field, part, mine.get(part), other.get(part))
        for field in FIELDS
        for mine, other in [(ours.get(field, {}), theirs.get(field, {}))]
        for part in dict.fromkeys([*mine, *other])
        if mine.get(part) != other.get(part)
    ]
    return found + _speed(before, after)


def _settings(
    before: Side, after: Side, common: Sequence[Pair]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Leaves that any pair of cells does not share, with both values."""
    sides: tuple[dict[str, Any], dict[str, Any]] = (
        {"matrix.warmup_steps": before.matrix.warmup_steps},
        {"matrix.warmup_steps": after.matrix.warmup_steps},
    )
    for pair in common:
        ours, theirs = (dict(flatten(cell.settings.model_dump(mode="json"))) for cell in pair)
        for location in dict.fromkeys([*ours, *theirs]):
            if ours.get(location) != theirs.get(location):
                name = ".".join(map(str, location))
                sides[0][name], sides[1][name] = ours.get(location), theirs.get(location)
    return sides


def _speed(before: Side, after: Side) -> list[Difference]:
    """The typical calibration kernel at another speed, though nothing else tells two machines."""
    ratios = calibration.slower_by(
        before.machine.get("calibration"), after.machine.get("calibration")
    )
    if not ratios:
        return []
    typical = statistics.median(ratios.values())
    if max(typical, 1 / typical) <= ANOTHER_SPEED:
        return []
    return [Difference("speed", "calibration kernels", "1", f"{typical:.2f} x the time")]


def unrecorded(before: Side, after: Side) -> list[str]:
    """Fields about which neither run says anything, so that nobody knows whether they differ."""
    ours, theirs = identity(before), identity(after)
    told = {"code": ("sources", "commit"), "data": tuple(ours["data"]), "cpu": ("cpu",)}
    return [
        field
        for field, parts in told.items()
        if not any(side[field].get(part) for side in (ours, theirs) for part in parts)
    ]


def allowed(across: Sequence[str], found: Sequence[Difference]) -> list[Difference]:
    """The differences that `--across` does not name. Raises InputError for words that name none.

    A word is a field, a dotted setting, or `all`.
    """
    for word in across:
        settings = {one.part for one in found if one.field == "settings"}
        if word not in ("all", *FIELDS, *settings) and "." not in word:
            raise InputError(
                f"--across {word}: no field of the key{did_you_mean(word, FIELDS)}; "
                f"all, {', '.join(FIELDS)} or a dotted setting"
            )
    if "all" in across:
        return []
    return [
        one
        for one in found
        if one.field not in across and not (one.field == "settings" and one.part in across)
    ]


def factors(found: Sequence[Difference]) -> list[str]:
    """What differs, each cause once: fields, and of the settings every leaf."""
    return list(dict.fromkeys(one.part if one.field == "settings" else one.field for one in found))

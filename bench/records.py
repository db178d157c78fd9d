"""Records on disk: a JSON line per cell, repeat and stage; append-only, readable after a crash."""

import fcntl
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.config import InputError

SCHEMA = 1
"""Version written into every line; raised whenever the meaning of a field changes."""

Record = dict[str, Any]
Group = tuple[str, int]
"""(cell key, repeat): the lines of one worker process, appended together."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the records of a run for one parent process; a kill of the parent releases them.

    Raises InputError when another process is still measuring this run.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{path}: another process is measuring this run; wait for it or stop it first"
            ) from None
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a parent process is measuring this run at the moment."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def append(path: Path, group: Sequence[Record]) -> None:
    """Append all lines of one group with a single write and wait until they are on the disk.

    Raises ValueError for a figure that is not finite: JSON has no word for it; OSError when the
    disk is full, the file being what it was before.
    """
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in group)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    size = os.fstat(descriptor).st_size
    try:
        _write_all(descriptor, text.encode())
        os.fsync(descriptor)
    except OSError as error:
        os.ftruncate(descriptor, size)
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    """A signal may shorten a write; `repair` removes what a crash left of it."""
    while data:
        data = data[os.write(descriptor, data) :]


def read(path: Path) -> list[Record]:
    """All records of a file; a torn last line, left by a crash, is dropped.

    Raises InputError for a line in the middle that is no record, and for another schema version.
    """
    return [record for record, _ in _lines(path)]


def repair(path: Path, stages: Sequence[str]) -> list[Record]:
    """Cut a torn last line or an incomplete last group off the file and return what remains.

    Groups are appended one at a time, so only the last one can be incomplete.
    """
    lines = _lines(path)
    records = [record for record, _ in lines]
    if records and not is_complete(last := last_group(records), stages):
        lines = lines[: -len(last)]
    end = lines[-1][1] if lines else 0
    if path.exists() and path.stat().st_size > end:
        os.truncate(path, end)
    return [record for record, _ in lines]


def last_group(records: Sequence[Record]) -> list[Record]:
    """The trailing records of one worker process."""
    size = 0
    while size < len(records) and process_of(records[-1 - size]) == process_of(records[-1]):
        size += 1
    return list(records[len(records) - size :])


def group_of(record: Record) -> Group:
    """The repeat a record belongs to; repeat 0 = rows of a cell that never started."""
    return (record["key"], record["repeat"])


def process_of(record: Record) -> tuple[str, int, int]:
    """The worker process: a disturbed repeat is attempted more than once."""
    return (*group_of(record), record.get("attempt", 0))


def is_complete(group: Iterable[Record], stages: Sequence[str]) -> bool:
    """Whether a group says how its process ended: a failure, or `ok` for every measured stage."""
    statuses = {record["stage"]: record["status"] for record in group}
    never_started = {"unsupported", "skipped"}
    if any(status not in never_started | {"ok"} for status in statuses.values()):
        return True
    return set(stages) <= set(statuses)


def finished(records: Iterable[Record], stages: Sequence[str]) -> set[Group]:
    """Groups that must not be measured again."""
    groups: dict[Group, list[Record]] = {}
    for record in records:
        groups.setdefault(group_of(record), []).append(record)
    return {name for name, group in groups.items() if is_complete(group, stages)}


def stranger(records: Iterable[Record], keys: Collection[str]) -> str | None:
    """A cell that has records of other settings than any of `keys`; None where all belong."""
    return next((record["cell"] for record in records if record["key"] not in keys), None)


def empty_record(stage: str, status: str, reason: str | None) -> Record:
    """A stage line without figures: the cell never started, or died there."""
    return {
        "stage": stage,
        "status": status,
        "reason": reason,
        "started": None,
        "wall_s": None,
        "phases": {},
        "steps": [],
        "warmup_steps": 0,
        "counts": {},
        "memory": {},
        "energy_j": None,
        "device": {},
        "host": {},
        "memory_by_rows": {},
        "loader_wait_s": None,
        "facts": {},
        "losses": [],
        "metrics": {},
        "ranks": None,
        "data_digest": None,
        "tags": [],
        "warnings": [],
    }


def nonfinite(value: Any, where: str = "") -> str | None:
    """Dotted place of the first NaN or infinity inside nested JSON data, None if all is finite."""
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{where} is {value}"
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    for name, child in children:
        if found := nonfinite(child, f"{where}.{name}" if where else str(name)):
            return found
    return None


def _lines(path: Path) -> list[tuple[Record, int]]:
    """(record, offset of its end) for every whole line."""
    data = path.read_bytes() if path.exists() else b""
    pairs: list[tuple[Record, int]] = []
    end = 0
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        end += len(line)
        is_last = end == len(data)
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except ValueError:
            if is_last:
                break
            raise InputError(
                f"{path}:{number}: no JSON record; the file was edited or damaged"
            ) from None
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            found = record.get("schema") if isinstance(record, dict) else type(record).__name__
            raise InputError(
                f"{path}:{number}: record schema {found}; this version reads schema {SCHEMA}"
            )
        pairs.append((record, end))
    return pairs

"""Tables of ratings to a leave-one-out split: ids 1..N, user sequences, training samples.

Shapes: U users, R interactions, N items, S samples. Item id 0 is padding everywhere; ids 1..N
follow the sorted original ids.
"""

import hashlib
import json
import mmap
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.lib.format import open_memmap

from core.config import InputError
from core.readers import PART_ROWS, READERS, as_numbers
from core.settings import DataSettings

ARRAYS = ("items", "offsets", "eval_users")


@dataclass(frozen=True, eq=False)
class Prepared:
    """One prepared split; user rows are 0..U-1 in the order of the sorted original user ids."""

    items: np.ndarray
    """(R,) int32: item ids of all users, one user after the other, oldest first."""
    offsets: np.ndarray
    """(U+1,) int64: user u owns items[offsets[u]:offsets[u+1]]."""
    titles: list[str]
    """N+1 titles by item id; titles[0] = "" is padding."""
    eval_users: np.ndarray
    """Sorted user rows (int64) that validation and test rank."""
    cut: dict[str, int]
    """Rows and users read, dropped and kept, for the report."""
    digest: str
    """sha256 of sequences and titles."""

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        return len(self.titles) - 1

    def sequence(self, user: int) -> np.ndarray:
        """All items of a user, oldest first."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def train_sequence(self, user: int) -> np.ndarray:
        """All but the last two items: nothing else of the user may be trained on."""
        return self.sequence(user)[:-2]

    def validation(self, user: int) -> tuple[np.ndarray, int]:
        """History before the last but one item, and that item."""
        return self.sequence(user)[:-2], int(self.sequence(user)[-2])

    def test(self, user: int) -> tuple[np.ndarray, int]:
        """History before the last item (the validation item is part of it), and that item."""
        return self.sequence(user)[:-1], int(self.sequence(user)[-1])


class Names:
    """The original ids of a column: how often each occurs, and its place among the sorted ones.

    Whole numbers sort as such, also where all are written as text; other text by code point.
    """

    def __init__(self):
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._texts: dict[str, int] = {}
        self.rows = 0

    def add(self, column: pd.Series) -> None:
        """Count the ids of some rows."""
        self.rows += len(column)
        if column.dtype == np.int64:
            self._pending.append(np.unique(column.to_numpy(), return_counts=True))
            if len(self._pending) > 16:
                self._pending = [self._merged()]
            return
        codes, found = pd.factorize(column)
        for name, count in zip(found, np.bincount(codes, minlength=len(found)), strict=True):
            self._texts[name] = self._texts.get(name, 0) + int(count)

    def _merged(self) -> tuple[np.ndarray, np.ndarray]:
        names, where = np.unique(
            np.concatenate([names for names, _ in self._pending]), return_inverse=True
        )
        counts = np.zeros(len(names), dtype=np.int64)
        np.add.at(counts, where, np.concatenate([counts for _, counts in self._pending]))
        return names, counts

    def close(self) -> np.ndarray:
        """All ids are counted: sort them. How often each occurs, (N,) int64."""
        if self._pending and self._texts:
            raise InputError("ids are whole numbers in one file and text in another; make them one")
        if self._texts:
            texts = list(self._texts)
            names = as_numbers(texts)
            order = np.argsort(names, kind="stable")
            self.sorted = names[order]
            self._index = pd.Index(np.array(texts, dtype=object)[order])
            return np.array(list(self._texts.values()), dtype=np.int64)[order]
        self.sorted, counts = self._merged()
        return counts

    def codes(self, column: pd.Series) -> np.ndarray:
        """Place of each row's id among the sorted ones."""
        if column.dtype == np.int64:
            return np.searchsorted(self.sorted, column.to_numpy())
        codes, found = pd.factorize(column)
        return self._index.get_indexer(found)[codes]


def prepare(settings: DataSettings, scratch: Path | None = None) -> Prepared:
    """Read `data.source` and cut it leave-one-out; ties in time keep the order of the file.

    Two passes over the rows: count the ids, then put each row where its user's rows belong, as in
    a counting sort. What has one entry for each row lies in files of the folder `scratch`, if one
    is given, else in memory. Raises InputError when files are missing or malformed, or when the
    limits leave nobody.
    """
    interactions, catalogue = READERS[settings.source](settings)
    parts = interactions if callable(interactions) else lambda: iter([interactions])
    users, items = Names(), Names()
    for part in parts():
        users.add(part["user"])
        items.add(part["item"])
    if users.rows == 0:
        raise InputError(
            f"data.source: {settings.source} has no interactions; one row is one user, item, time"
        )
    lengths = users.close()
    items.close()
    titles, untitled = _titles(items.sorted, catalogue)
    long_enough = np.flatnonzero(lengths >= settings.min_interactions)
    kept = _draw_rows(long_enough, lengths, settings)
    eval_users = _draw_eval_users(len(kept), settings)
    offsets = np.concatenate([[0], np.cumsum(lengths[kept])]).astype(np.int64)
    sequences = _sequences(parts(), users, items, kept, offsets, scratch)
    cut = {
        "rows_read": users.rows,
        "users_read": len(lengths),
        "items": len(items.sorted),
        "items_without_title": untitled,
        "users_too_short": len(lengths) - len(long_enough),
        "rows_kept": len(sequences),
        "users_kept": len(kept),
        "eval_users": len(eval_users),
    }
    return Prepared(
        sequences, offsets, titles, eval_users, cut, _digest(sequences, offsets, titles)
    )


def _sequences(
    parts: Iterable[pd.DataFrame],
    users: Names,
    items: Names,
    kept: np.ndarray,
    offsets: np.ndarray,
    scratch: Path | None,
) -> np.ndarray:
    """Item ids of the kept users, (R,) int32: one user after the other, oldest first."""
    row_of_user = np.full(len(users.sorted), -1)
    row_of_user[kept] = np.arange(len(kept))
    free = offsets[:-1].copy()  # next free place of each user
    sequences = _array(scratch, "sequences", offsets[-1], np.int32)
    times = None
    for part in parts:
        rows = row_of_user[users.codes(part["user"])]
        order = np.argsort(rows, kind="stable")
        order = order[np.searchsorted(rows[order], 0) :]  # without the users that are left out
        rows = rows[order]
        counts = np.bincount(rows, minlength=len(kept))
        first = np.cumsum(counts) - counts
        places = np.arange(len(rows)) + (free - first)[rows]
        free += counts
        found = part["time"].to_numpy()
        if times is None:
            times = _array(scratch, "times", offsets[-1], found.dtype)
        if found.dtype != times.dtype:
            raise InputError(f"timestamps are {times.dtype} and {found.dtype}; make them one type")
        sequences[places] = items.codes(part["item"])[order] + 1
        times[places] = found[order]
        _give_back(sequences, times)
    for start, stop in _blocks(offsets):
        rows = slice(offsets[start], offsets[stop])
        of_user = np.repeat(np.arange(start, stop), np.diff(offsets[start : stop + 1]))
        sequences[rows] = sequences[rows][np.lexsort((times[rows], of_user))]
        _give_back(sequences, times)
    return sequences


def _blocks(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Users in runs of about `PART_ROWS` interactions, [start, stop)."""
    start = 0
    while start < len(offsets) - 1:
        stop = int(np.searchsorted(offsets, offsets[start] + PART_ROWS, "right")) - 1
        stop = max(start + 1, stop)
        yield start, stop
        start = stop


def _array(scratch: Path | None, name: str, length: int, dtype: np.dtype | type) -> np.ndarray:
    if scratch is None:
        return np.empty(length, dtype)
    return open_memmap(scratch / f"{name}.npy", "w+", dtype, (int(length),))


def _give_back(*arrays: np.ndarray) -> None:
    """Let the process hold no pages of files; the kernel keeps and writes them as it can."""
    for array in arrays:
        if isinstance(array, np.memmap):
            array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def train_samples(prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """Every training target with at least one item before it: user_row and position, (S,) int64.

    Sample id s asks for `sequence(user_row[s])[position[s]]` given everything before it.
    """
    samples = np.maximum(np.diff(prepared.offsets) - 3, 0)
    user_row = np.repeat(np.arange(prepared.num_users, dtype=np.int64), samples)
    first = np.repeat(np.cumsum(samples) - samples, samples)
    return user_row, np.arange(len(user_row), dtype=np.int64) - first + 1


def _titles(item_names: np.ndarray, catalogue: pd.DataFrame) -> tuple[list[str], int]:
    """Titles by new id, and how many items had to keep their original id as title."""
    names = catalogue["item"].astype(str)
    if names.duplicated().any():
        raise InputError(
            f"items table: item {names[names.duplicated()].iloc[0]} twice; one row for each item"
        )
    by_name = dict(zip(names, catalogue["title"].astype(str), strict=True))
    wanted = [str(name) for name in item_names]
    return ["", *(by_name.get(name, name) for name in wanted)], sum(
        n not in by_name for n in wanted
    )


def _draw_rows(users: np.ndarray, lengths: np.ndarray, settings: DataSettings) -> np.ndarray:
    """Users kept, sorted: drawn whole until `limit_data_rows` interactions are reached."""
    if not len(users):
        shortest = settings.min_interactions
        raise InputError(
            f"data.min_interactions: no user has {shortest} interactions (most: {lengths.max()}); "
            "leave-one-out needs at least three"
        )
    if settings.limit_data_rows == -1:
        return users
    drawn = np.random.default_rng([settings.seed, 0]).permutation(users)
    enough = np.searchsorted(np.cumsum(lengths[drawn]), settings.limit_data_rows) + 1
    return np.sort(drawn[:enough])


def _draw_eval_users(num_users: int, settings: DataSettings) -> np.ndarray:
    everyone = np.arange(num_users, dtype=np.int64)
    if settings.limit_eval_users == -1:
        return everyone
    drawn = np.random.default_rng([settings.seed, 1]).permutation(everyone)
    return np.sort(drawn[: settings.limit_eval_users])


def _digest(items: np.ndarray, offsets: np.ndarray, titles: list[str]) -> str:
    digest = hashlib.sha256()
    for array, dtype in ((items, "<i4"), (offsets, "<i8")):
        for start in range(0, len(array), PART_ROWS):
            digest.update(np.ascontiguousarray(array[start : start + PART_ROWS], dtype))
            _give_back(array)
    digest.update(json.dumps(titles).encode())
    return digest.hexdigest()


def save(prepared: Prepared, folder: Path) -> None:
    """Write the split as a new folder; it appears complete or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in ARRAYS:
        np.save(partial / f"{name}.npy", getattr(prepared, name))
    facts = {"digest": prepared.digest, "cut": prepared.cut, "titles": prepared.titles}
    (partial / "prepared.json").write_text(json.dumps(facts), encoding="utf-8")
    partial.rename(folder)


def load(folder: Path) -> Prepared:
    """Read what `save` wrote, the items as a map of their file; InputError when it is not there or
    not what was written.
    """
    try:
        facts = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
        items = np.load(folder / "items.npy", mmap_mode="r")
        offsets, eval_users = (np.load(folder / f"{name}.npy") for name in ARRAYS[1:])
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: not there; wanted a folder of prepared data") from None
    except ValueError as error:  # cut short
        raise InputError(f"{folder}: {error}; delete it and prepare again") from None
    if _digest(items, offsets, facts["titles"]) != facts["digest"]:
        raise InputError(
            f"{folder}: its contents differ from its digest; delete it and prepare again"
        )
    # As a plain array: every slice of the other kind costs a Python call.
    plain = np.asarray(items)
    return Prepared(plain, offsets, facts["titles"], eval_users, facts["cut"], facts["digest"])


if __name__ == "__main__":
    from core.download import main

    main()

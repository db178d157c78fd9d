"""Tables of ratings to a leave-one-out split: ids 1..N, user sequences, training samples.

Shapes: U users, R interactions, N items, S samples. Item id 0 is padding everywhere; ids 1..N
follow the sorted original ids.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from core.config import InputError
from core.readers import READERS
from core.settings import DataSettings


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


def prepare(settings: DataSettings) -> Prepared:
    """Read `data.source` and cut it leave-one-out; ties in time keep the order of the file.

    Raises InputError when files are missing or malformed, or when the limits leave nobody.
    """
    interactions, catalogue = READERS[settings.source](settings)
    if interactions.empty:
        raise InputError(
            f"data.source: {settings.source} has no interactions; one row is one user, item, time"
        )
    users, user_names = pd.factorize(interactions["user"], sort=True)
    items, item_names = pd.factorize(interactions["item"], sort=True)
    titles, untitled = _titles(item_names, catalogue)
    order = np.lexsort((interactions["time"].to_numpy(), users))
    lengths = np.bincount(users, minlength=len(user_names))

    long_enough = np.flatnonzero(lengths >= settings.min_interactions)
    kept = _draw_rows(long_enough, lengths, settings)
    eval_users = _draw_eval_users(len(kept), settings)
    rows = order[np.isin(users[order], kept)]
    sequences = (items[rows] + 1).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths[kept])]).astype(np.int64)
    cut = {
        "rows_read": len(interactions),
        "users_read": len(user_names),
        "items": len(item_names),
        "items_without_title": untitled,
        "users_too_short": len(user_names) - len(long_enough),
        "rows_kept": len(sequences),
        "users_kept": len(kept),
        "eval_users": len(eval_users),
    }
    return Prepared(
        sequences, offsets, titles, eval_users, cut, _digest(sequences, offsets, titles)
    )


def train_samples(prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """Every training target with at least one item before it: user_row and position, (S,) int64.

    Sample id s asks for `sequence(user_row[s])[position[s]]` given everything before it.
    """
    samples = np.maximum(np.diff(prepared.offsets) - 3, 0)
    user_row = np.repeat(np.arange(prepared.num_users, dtype=np.int64), samples)
    first = np.repeat(np.cumsum(samples) - samples, samples)
    return user_row, np.arange(len(user_row), dtype=np.int64) - first + 1


def _titles(item_names: pd.Index, catalogue: pd.DataFrame) -> tuple[list[str], int]:
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
    digest = hashlib.sha256(items.astype("<i4").tobytes())
    digest.update(offsets.astype("<i8").tobytes())
    digest.update(json.dumps(titles).encode())
    return digest.hexdigest()


def save(prepared: Prepared, folder: Path) -> None:
    """Write the split as a new folder; it appears complete or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    arrays = {
        "items": prepared.items,
        "offsets": prepared.offsets,
        "eval_users": prepared.eval_users,
    }
    np.savez(partial / "sequences.npz", **arrays)
    facts = {"digest": prepared.digest, "cut": prepared.cut, "titles": prepared.titles}
    (partial / "prepared.json").write_text(json.dumps(facts), encoding="utf-8")
    partial.rename(folder)


def load(folder: Path) -> Prepared:
    """Read what `save` wrote; InputError when it is not there or not what was written."""
    try:
        facts = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
        with np.load(folder / "sequences.npz") as arrays:
            items, offsets, eval_users = (arrays[n] for n in ("items", "offsets", "eval_users"))
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: not there; wanted a folder of prepared data") from None
    if _digest(items, offsets, facts["titles"]) != facts["digest"]:
        raise InputError(
            f"{folder}: its contents differ from its digest; delete it and prepare again"
        )
    return Prepared(items, offsets, facts["titles"], eval_users, facts["cut"], facts["digest"])


if __name__ == "__main__":
    from core.download import main

    main()

"""Tables that are never held as a whole: the split of one sorted in memory, in bounded memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as checks
from hypothesis import strategies as st

from core import data, readers
from core.config import InputError
from core.settings import DataSettings

ROOT = Path(__file__).parent.parent
KINDS = {
    "numbers": lambda ids: ids,
    "text": lambda ids: [f"é{i}" for i in ids],
    "numbers as text": lambda ids: [str(i) for i in ids],
    "nearly numbers": lambda ids: [f"0{i}" for i in ids],
}


def by_sorting(frame: pd.DataFrame, least: int = 3) -> tuple[np.ndarray, np.ndarray, list]:
    """Sequences, offsets and names by sorting one frame, as tables in memory would be."""
    users, user_names = pd.factorize(frame["user_id"], sort=True)
    items, item_names = pd.factorize(frame["item_id"], sort=True)
    lengths = np.bincount(users, minlength=len(user_names))
    order = np.lexsort((frame["timestamp"].to_numpy(), users))
    kept = np.flatnonzero(lengths >= least)
    rows = order[np.isin(users[order], kept)]
    return items[rows] + 1, np.concatenate([[0], np.cumsum(lengths[kept])]), list(item_names)


def table(rows: int, kind: str, seed: int, times=np.int64) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    users, items = random.integers(0, 12, rows), random.integers(0, 30, rows)
    return pd.DataFrame(
        {
            "user_id": KINDS[kind](users),
            "item_id": KINDS[kind](items),
            "timestamp": random.integers(0, 4, rows).astype(times),
        }
    )


@checks(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(40, 120),
    st.sampled_from(sorted(KINDS)),
    st.integers(0, 10**6),
    st.integers(1, 50),
    st.integers(1, 4),
    st.sampled_from([np.int64, np.float64]),
)
def test_parts_give_the_split_of_one_sorted_table(
    tmp_path_factory, rows, kind, seed, part, files, times
):
    folder = tmp_path_factory.mktemp("large")
    frame = table(rows, kind, seed, times)
    (folder / "parts" / "deeper").mkdir(parents=True)
    (folder / "scratch").mkdir()
    for number, own in enumerate(np.array_split(np.arange(rows), files)):
        where = "deeper/" if number % 2 else ""
        frame.iloc[own].to_parquet(folder / "parts" / f"{where}part{number}.parquet")
    listed = readers.parquet_files(str(folder / "parts"))
    whole = pd.concat([pd.read_parquet(path) for path in listed], ignore_index=True)
    whole.to_parquet(folder / "one.parquet")
    if kind.startswith("numbers"):
        whole = whole.astype({"user_id": int, "item_id": int})
    sequences, offsets, names = by_sorting(whole)
    for root, scratch in (("parts", folder / "scratch"), ("one.parquet", None)):
        with pytest.MonkeyPatch.context() as patch:
            for module in (readers, data):
                patch.setattr(module, "PART_ROWS", part)
            given = DataSettings(source="parquet", root=str(folder / root))
            prepared = data.prepare(given, scratch)
        assert prepared.items.tolist() == sequences.tolist()
        assert prepared.offsets.tolist() == offsets.tolist()
        assert prepared.titles[1:] == [str(name) for name in names]
        assert prepared.cut["rows_read"] == rows
        assert prepared.digest == data._digest(sequences, offsets, prepared.titles)


def test_csv_parquet_and_limits_agree(tmp_path):
    frame = table(400, "text", 1)
    frame.to_csv(tmp_path / "r.csv", index=False)
    frame.to_parquet(tmp_path / "r.parquet", row_group_size=50)
    found = [
        data.prepare(
            DataSettings(source=kind, root=str(tmp_path / f"r.{kind}"), **limits, seed=3)
        ).digest
        for limits in ({"limit_data_rows": 120}, {"min_interactions": 35}, {})
        for kind in ("csv", "parquet")
    ]
    assert found[0] == found[1] != found[2] == found[3] != found[4] == found[5]


def test_the_split_is_a_map_of_its_file(tmp_path):
    table(400, "numbers", 2).to_parquet(tmp_path / "r.parquet")
    prepared = data.prepare(DataSettings(source="parquet", root=str(tmp_path / "r.parquet")))
    data.save(prepared, tmp_path / "split")
    loaded = data.load(tmp_path / "split")
    assert isinstance(loaded.items.base, np.memmap) and not loaded.items.flags.writeable
    assert np.array_equal(loaded.items, prepared.items)
    whole = (tmp_path / "split" / "items.npy").read_bytes()
    (tmp_path / "split" / "items.npy").write_bytes(whole[:-4])
    with pytest.raises(InputError, match="delete it and prepare again"):
        data.load(tmp_path / "split")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item_id": [0.5] * 9}, "item ids are fractions"),
        ({"user_id": [None, *"abcdefgh"]}, "row 1: no value for user"),
        ({"timestamp": [*["2024-01-01"] * 7, "soon", "2024-01-01"]}, "row 8: timestamp 'soon'"),
        ({"timestamp": [*range(5), None, *range(3)]}, "row 6: no value for time"),
        ({"title": ["x"] * 9, "user_id": None}, "columns item_id, timestamp, title; wanted"),
        ({"timestamp": [0.5] * 9}, "timestamps are int64 and float64"),
        ({"item_id": list("abcdefghi")}, "whole numbers in one file and text in another"),
    ],
)
def test_wrong_parts_are_named_with_file_and_row(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(readers, "PART_ROWS", 3)
    good = pd.DataFrame({"user_id": [1] * 9, "item_id": range(9), "timestamp": range(9)})
    good.to_parquet(tmp_path / "a.parquet")
    wrong = good.assign(**changes).dropna(axis=1, how="all")
    wrong.to_parquet(tmp_path / "b.pq")
    with pytest.raises(InputError, match=message) as failure:
        data.prepare(DataSettings(source="parquet", root=str(tmp_path)))
    if "one file" not in message and "int64" not in message:
        assert "b.pq" in str(failure.value)


def test_a_folder_without_tables_is_named(tmp_path):
    (tmp_path / "_metadata.parquet").write_bytes(b"")
    (tmp_path / ".part.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"no \.parquet or \.pq file in"):
        readers.source_files(DataSettings(source="parquet", root=str(tmp_path)))


def test_every_file_of_the_folder_is_part_of_the_address(tmp_path):
    for name in ("b", "a"):
        table(40, "numbers", 0).to_parquet(tmp_path / f"{name}.parquet")
    files = readers.source_files(DataSettings(source="parquet", root=str(tmp_path)))
    assert [path.name for path in files] == ["a.parquet", "b.parquet"]


MEMORY = """\
import resource, sys
from pathlib import Path
from core import data
from core.settings import DataSettings
given = DataSettings(source=sys.argv[1], root=sys.argv[2], min_interactions=3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data.prepare(given, Path(sys.argv[3]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Five million rows: a frame of them has 120 MB, its codes and order another 160."""
    random = np.random.default_rng(0)
    grown = []
    for rows in (1_500_000, 6_000_000):
        columns = {"user_id": rows // 100, "item_id": 5000, "timestamp": 10**9}
        frame = {name: random.integers(0, most, rows) for name, most in columns.items()}
        path = tmp_path / f"{rows}.parquet"
        pd.DataFrame(frame).to_parquet(path, row_group_size=1 << 18)
        del frame
        command = [sys.executable, "-c", MEMORY, "parquet", str(path), str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        grown.append(int(done.stdout))
    assert grown[1] - grown[0] < 40 << 20, grown

"""Readers, leave-one-out split, limits, saving and the downloader of `core.data`."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from core import data, download, readers
from core.config import InputError
from core.settings import DataSettings

TITLES = {
    "ml-1m": 'Tick::Tock, the "Café" (1999)',
    "ml-100k": 'Café, "Tock" (1999)',
    "ml-latest-small": 'Null, "Café" & 東京 (1999)',
}
TITLES["ml-latest"] = TITLES["ml-latest-small"]
RATINGS = [(7, 20, 5), (7, 3, 4), (7, 100, 6), (2, 3, 1), (2, 20, 1), (2, 3000, 1)]
"""(user, item, time) in file order; user 2 has one time for all, user 7 is not in order of time."""


def write_layout(source: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    titles = {3: TITLES[source], 20: "Plain (2000)", 100: "NA", 3000: "None"}
    if source == "ml-1m":
        ratings = "".join(f"{u}::{i}::5::{t}\n" for u, i, t in RATINGS)
        (folder / "ratings.dat").write_text(ratings)
        movies = "".join(f"{i}::{title}::Drama\n" for i, title in titles.items())
        (folder / "movies.dat").write_text(movies, encoding="latin-1")
    elif source == "ml-100k":
        ratings = "".join(f"{u}\t{i}\t5\t{t}\n" for u, i, t in RATINGS)
        (folder / "u.data").write_text(ratings)
        movies = "".join(f"{i}|{title}|01-Jan-1999||url|0|1\n" for i, title in titles.items())
        (folder / "u.item").write_text(movies, encoding="latin-1")
    else:
        table = pd.DataFrame(RATINGS, columns=["userId", "movieId", "timestamp"])
        table.assign(rating=5.0).to_csv(folder / "ratings.csv", index=False)
        movies = pd.DataFrame({"movieId": list(titles), "title": list(titles.values())})
        movies.assign(genres="Drama").to_csv(folder / "movies.csv", index=False)


def write_table(path: Path, rows: list[tuple]) -> DataSettings:
    pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).to_csv(path, index=False)
    return DataSettings(source="csv", root=str(path))


@pytest.mark.parametrize("source", ["ml-1m", "ml-100k", "ml-latest-small", "ml-latest"])
@pytest.mark.parametrize("inside_parent", [True, False])
def test_movielens_layouts(tmp_path, source, inside_parent):
    write_layout(source, tmp_path / source if inside_parent else tmp_path)
    settings = DataSettings(source=source, root=str(tmp_path))

    interactions, _ = readers.READERS[source](settings)
    assert list(interactions.columns) == ["user", "item", "time"]
    assert interactions.to_numpy().tolist() == [list(row) for row in RATINGS]

    prepared = data.prepare(settings)
    assert prepared.titles == ["", TITLES[source], "Plain (2000)", "NA", "None"]
    assert prepared.sequence(0).tolist() == [1, 2, 4]  # user 2: a tie keeps the order of the file
    assert prepared.sequence(1).tolist() == [1, 2, 3]  # user 7: by time
    assert prepared.items.dtype == np.int32


def test_latin1_title_with_a_line_break_byte(tmp_path):
    write_layout("ml-1m", tmp_path)
    (tmp_path / "movies.dat").write_bytes(b"3::Wait\x85 (1999)::Drama\r\n20::B::Drama\r\n")
    titles = data.prepare(DataSettings(source="ml-1m", root=str(tmp_path))).titles
    assert titles[1:3] == ["Wait\x85 (1999)", "B"]


@pytest.mark.parametrize("source", ["ml-1m", "ml-100k", "ml-latest-small", "ml-latest"])
def test_missing_movielens_file_says_which_and_how(tmp_path, source):
    with pytest.raises(InputError) as failure:
        data.prepare(DataSettings(source=source, root=str(tmp_path)))
    text = str(failure.value)
    assert str(tmp_path / source) in text
    assert readers.OFFICIAL_PAGE in text
    command = f"python -m core.data {source} --root {tmp_path}"
    assert (command in text) == (source != "ml-latest")


@pytest.mark.parametrize(
    "line", ["1::2::3", "1::2::3::4::5", "1::two::3::4", "1::2::3::", "1::2.5::3::4"]
)
def test_malformed_line_is_named(tmp_path, line):
    write_layout("ml-1m", tmp_path)
    with (tmp_path / "ratings.dat").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=r"ratings\.dat:7: .*wanted user, item, rating, time"):
        data.prepare(DataSettings(source="ml-1m", root=str(tmp_path)))


def test_empty_and_titleless_files_are_named(tmp_path):
    write_layout("ml-1m", tmp_path)
    (tmp_path / "movies.dat").write_text("3::A::Drama\nnonsense\n")
    with pytest.raises(InputError, match=r"movies\.dat:2: 'nonsense'"):
        data.prepare(DataSettings(source="ml-1m", root=str(tmp_path)))
    (tmp_path / "ratings.dat").write_text("")
    with pytest.raises(InputError, match=r"ratings\.dat: no interactions"):
        data.prepare(DataSettings(source="ml-1m", root=str(tmp_path)))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_own_tables_with_text_ids(tmp_path, kind):
    rows = [("ann", "b07", 3), ("ann", "007", 1), ("ann", "7", 2), ("bob", "7", 1)]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    titles = pd.DataFrame({"item_id": ["7", "b07", "unused"], "title": ["Seven", "NA", "x"]})
    root, items = tmp_path / f"ratings.{kind}", tmp_path / f"items.{kind}"
    if kind == "csv":
        frame.assign(extra=1).to_csv(root, index=False)
        titles.to_csv(items, index=False)
    else:
        frame.to_parquet(root)
        titles.to_parquet(items)
    settings = DataSettings(source=kind, root=str(root), items_file=str(items))
    prepared = data.prepare(settings)
    assert prepared.titles == ["", "007", "Seven", "NA"]  # "007" is not 7, and has no title
    assert prepared.sequence(0).tolist() == [1, 2, 3]
    assert prepared.cut["items_without_title"] == 1
    assert prepared.cut["users_too_short"] == 1


def test_whole_numbers_sort_as_numbers_and_titles_default_to_ids(tmp_path):
    settings = write_table(tmp_path / "r.csv", [(1, 100, 1), (1, 20, 2), (1, 3, 3)])
    assert data.prepare(settings).titles == ["", "3", "20", "100"]


def test_dates_are_times(tmp_path):
    days = ["2024-03-01", "2024-01-01T10:00:00", "2024-01-01"]
    settings = write_table(tmp_path / "r.csv", [("u", n, day) for n, day in enumerate(days)])
    assert data.prepare(settings).sequence(0).tolist() == [3, 2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,item_id,timestamp\n1,2,3\n", "columns user, item_id, timestamp; wanted user_id"),
        ("user_id,item_id,timestamp\n1,2,3\n1,,3\n", "row 2: no value for item"),
        ("user_id,item_id,timestamp\n1,2,3\n1,2\n", "row 2: no value for time"),
        ("user_id,item_id,timestamp\n1,2,3\n1,2,3,4\n", "Expected 3 fields in line 3, saw 4"),
        ("user_id,item_id,timestamp\n1,2,3,4\n", "rows longer than the header"),
        (
            "user_id,item_id,timestamp\n1,2,soon\n",
            "row 1: timestamp 'soon'; wanted numbers or ISO 8601",
        ),
        ("user_id,item_id,timestamp\n", "no interactions"),
        ("", "No columns to parse"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, text, message):
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        data.prepare(DataSettings(source="csv", root=str(tmp_path / "r.csv")))


def test_other_wrong_inputs_are_refused(tmp_path):
    settings = write_table(tmp_path / "r.csv", [(1, n, n) for n in range(3)])
    with pytest.raises(InputError, match="wanted a Parquet table"):
        data.prepare(settings.model_copy(update={"source": "parquet"}))
    with pytest.raises(InputError, match=r"no file .*want the table file itself"):
        data.prepare(settings.model_copy(update={"root": str(tmp_path)}))
    (tmp_path / "items.csv").write_text("item_id,title\n1,A\n1,B\n")
    with pytest.raises(InputError, match="item 1 twice"):
        data.prepare(settings.model_copy(update={"items_file": str(tmp_path / "items.csv")}))
    pd.DataFrame({"user_id": [1], "item_id": [0.5], "timestamp": [1]}).to_parquet(tmp_path / "f")
    with pytest.raises(InputError, match="item ids are fractions"):
        data.prepare(DataSettings(source="parquet", root=str(tmp_path / "f")))


def frame_source(monkeypatch, rows: list[tuple[int, int, int]]) -> None:
    """Let `data.source: synthetic` be these rows."""
    frame = pd.DataFrame(rows, columns=["user", "item", "time"])
    items = pd.DataFrame({"item": frame["item"].unique()})
    items["title"] = [f"title {item}" for item in items["item"]]
    monkeypatch.setitem(readers.READERS, "synthetic", lambda settings: (frame, items))


interaction_tables = st.lists(
    st.tuples(st.integers(0, 4), st.integers(-3, 12), st.integers(0, 3)), min_size=15, max_size=60
).filter(lambda rows: any(sum(row[0] == user for row in rows) >= 3 for user in range(5)))


@given(rows=interaction_tables)
def test_leave_one_out(rows):
    with pytest.MonkeyPatch.context() as monkeypatch:
        frame_source(monkeypatch, rows)
        prepared = data.prepare(DataSettings())

    originals = sorted({item for _, item, _ in rows})
    assert prepared.num_items == len(originals)
    assert prepared.titles[1:] == [f"title {item}" for item in originals]
    users = sorted({user for user, _, _ in rows})
    users = [user for user in users if sum(row[0] == user for row in rows) >= 3]
    assert prepared.num_users == len(users)
    for row, user in enumerate(users):
        mine = [(time, n, item) for n, (u, item, time) in enumerate(rows) if u == user]
        ids = [originals.index(item) + 1 for _, _, item in sorted(mine)]
        assert prepared.sequence(row).tolist() == ids
        assert prepared.train_sequence(row).tolist() == ids[:-2]
        history, target = prepared.validation(row)
        assert (history.tolist(), target) == (ids[:-2], ids[-2])
        history, target = prepared.test(row)
        assert (history.tolist(), target) == (ids[:-1], ids[-1])
    # Items of users who are too short still count: the catalogue is that of the whole file.
    assert prepared.items.min() >= 1
    assert prepared.items.max() <= prepared.num_items


@given(rows=interaction_tables)
def test_train_samples_are_the_train_prefixes(rows):
    with pytest.MonkeyPatch.context() as monkeypatch:
        frame_source(monkeypatch, rows)
        prepared = data.prepare(DataSettings())
    user_row, position = data.train_samples(prepared)
    wanted = [
        (user, target)
        for user in range(prepared.num_users)
        for target in range(1, len(prepared.train_sequence(user)))
    ]
    assert list(zip(user_row.tolist(), position.tolist(), strict=True)) == wanted


def many_users(monkeypatch) -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 12, size=60)
    rows = [(user, int(rng.integers(40)), n) for user in range(60) for n in range(lengths[user])]
    frame_source(monkeypatch, rows)


@pytest.mark.parametrize("limit", [1, 50, 117, 10_000])
def test_limit_data_rows_draws_whole_users(monkeypatch, limit):
    many_users(monkeypatch)
    whole = data.prepare(DataSettings())
    part = data.prepare(DataSettings(limit_data_rows=limit))
    sequences = [part.sequence(user).tolist() for user in range(part.num_users)]
    everyone = [whole.sequence(user).tolist() for user in range(whole.num_users)]
    assert all(sequence in everyone for sequence in sequences)
    assert part.titles == whole.titles
    assert part.cut["rows_kept"] == len(part.items) == sum(map(len, sequences))
    assert part.cut["rows_read"] == whole.cut["rows_read"] > whole.cut["rows_kept"]
    if limit >= len(whole.items):
        assert part.digest == whole.digest
    else:
        longest = max(map(len, sequences))
        assert limit <= len(part.items) < limit + longest


def test_limits_follow_the_seed(monkeypatch):
    many_users(monkeypatch)
    draws = [data.prepare(DataSettings(limit_data_rows=100, seed=seed)) for seed in (0, 0, 1)]
    assert draws[0].digest == draws[1].digest != draws[2].digest
    users = [data.prepare(DataSettings(limit_eval_users=7, seed=s)).eval_users for s in (0, 0, 1)]
    assert np.array_equal(users[0], users[1])
    assert not np.array_equal(users[0], users[2])
    assert len(set(users[0].tolist())) == 7
    assert (np.diff(users[0]) > 0).all()


def test_eval_users_never_exceed_the_users(monkeypatch):
    many_users(monkeypatch)
    prepared = data.prepare(DataSettings(limit_eval_users=1000))
    assert prepared.eval_users.tolist() == list(range(prepared.num_users))


@pytest.mark.parametrize(
    "limit", [{"limit_data_rows": 0}, {"limit_eval_users": 0}, {"limit_data_rows": -2}]
)
def test_limits_that_keep_nothing_are_no_settings(limit):
    with pytest.raises(ValidationError):
        DataSettings(**limit)


def test_users_too_short_for_the_limit_are_refused(monkeypatch):
    many_users(monkeypatch)
    with pytest.raises(InputError, match=r"min_interactions: no user has 500 .*\(most: 11\)"):
        data.prepare(DataSettings(min_interactions=500))


def test_digest_depends_on_order_and_titles_only(tmp_path):
    rows = [(1, 5, 1), (1, 6, 1), (1, 7, 2), (1, 8, 3)]
    first = data.prepare(write_table(tmp_path / "a.csv", rows))
    later = data.prepare(write_table(tmp_path / "b.csv", [(9, i, t + 1000) for _, i, t in rows]))
    assert later.digest == first.digest
    swapped = data.prepare(write_table(tmp_path / "c.csv", [rows[1], rows[0], *rows[2:]]))
    assert swapped.digest != first.digest
    (tmp_path / "items.csv").write_text("item_id,title\n5,A\n")
    settings = write_table(tmp_path / "a.csv", rows)
    titled = data.prepare(settings.model_copy(update={"items_file": str(tmp_path / "items.csv")}))
    assert titled.digest != first.digest
    # Frozen: a changed digest means that results are no longer comparable with older ones.
    assert first.digest.startswith("1473df673d195685")


def test_save_and_load(monkeypatch, tmp_path):
    many_users(monkeypatch)
    prepared = data.prepare(DataSettings(limit_eval_users=5))
    data.save(prepared, tmp_path / "deep" / "split")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["split"]
    loaded = data.load(tmp_path / "deep" / "split")
    assert loaded.digest == prepared.digest
    assert loaded.cut == prepared.cut
    assert loaded.titles == prepared.titles
    for name in ("items", "offsets", "eval_users"):
        left, right = getattr(loaded, name), getattr(prepared, name)
        assert left.dtype == right.dtype
        assert np.array_equal(left, right)


def test_interrupted_save_leaves_no_split(monkeypatch, tmp_path):
    many_users(monkeypatch)
    prepared = data.prepare(DataSettings())
    with monkeypatch.context() as broken:
        broken.setattr(data.json, "dumps", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            data.save(prepared, tmp_path / "split")
    with pytest.raises(InputError, match="not there"):
        data.load(tmp_path / "split")
    data.save(prepared, tmp_path / "split")
    assert data.load(tmp_path / "split").digest == prepared.digest


def test_load_refuses_changed_contents(monkeypatch, tmp_path):
    many_users(monkeypatch)
    data.save(data.prepare(DataSettings()), tmp_path / "split")
    facts = tmp_path / "split" / "prepared.json"
    facts.write_text(facts.read_text().replace("title 3", "title 8"))
    with pytest.raises(InputError, match="differ from its digest"):
        data.load(tmp_path / "split")


@pytest.fixture
def site(tmp_path) -> Path:
    """A folder with the archive of ml-1m and its checksum, as the official site has them."""
    folder = tmp_path / "site"
    write_layout("ml-1m", folder / "ml-1m")
    with zipfile.ZipFile(folder / "ml-1m.zip", "w") as archive:
        for path in (folder / "ml-1m").iterdir():
            archive.write(path, f"ml-1m/{path.name}")
    digest = hashlib.md5((folder / "ml-1m.zip").read_bytes()).hexdigest()
    (folder / "ml-1m.zip.md5").write_text(f"MD5 (ml-1m.zip) = {digest}\n")
    return folder


def test_download_unpacks_what_the_reader_reads(site, tmp_path):
    root = tmp_path / "data"
    assert download.download("ml-1m", root, site.as_uri()) == root / "ml-1m"
    assert [path.name for path in root.iterdir()] == ["ml-1m"]
    assert data.prepare(DataSettings(source="ml-1m", root=str(root))).num_users == 2
    with pytest.raises(InputError, match="is there already"):
        download.download("ml-1m", root, site.as_uri())


@pytest.mark.parametrize("fault", ["sum", "no sum", "archive", "absent"])
def test_failed_download_leaves_nothing_and_says_what_to_do(site, tmp_path, fault):
    if fault == "sum":
        (site / "ml-1m.zip.md5").write_text("0" * 32)
    elif fault == "no sum":
        (site / "ml-1m.zip.md5").write_text("<html>not found</html>")
    elif fault == "archive":
        (site / "ml-1m.zip").write_bytes(b"half")
        digest = hashlib.md5(b"half").hexdigest()
        (site / "ml-1m.zip.md5").write_text(digest)
    else:
        (site / "ml-1m.zip").unlink()
    root = tmp_path / "data"
    with pytest.raises(InputError) as failure:
        download.download("ml-1m", root, site.as_uri())
    assert readers.OFFICIAL_PAGE in str(failure.value)
    assert f"unpack it as {root / 'ml-1m'}" in str(failure.value)
    assert list(root.iterdir()) == []


def test_unknown_set_is_refused(tmp_path):
    with pytest.raises(InputError, match="'ml-1n': wanted one of ml-1m"):
        download.download("ml-1n", tmp_path)


def test_terms_name_the_binding_text():
    for name in readers.DOWNLOADABLE:
        assert f"{name}-README" in download.terms(name)
        assert "research" in download.terms(name)


def test_command_without_network_ends_in_one_sentence_and_status_2(tmp_path):
    # Port 9 of this machine refuses at once: as good as no network.
    proxies = {"https_proxy": "http://127.0.0.1:9", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "core.data", "ml-1m", "--root", str(tmp_path)]
    done = subprocess.run(command, env=proxies, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "ml-1m-README.txt" in done.stdout
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"unpack it as {tmp_path / 'ml-1m'}" in done.stderr
    assert list(tmp_path.iterdir()) == []

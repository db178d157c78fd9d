"""Teacher outputs on disk: order, resumption, and rows by sample id."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import outputs
from core.config import InputError
from core.outputs import Outputs, Writer

SAMPLES, TOP_K, WIDTH, ITEMS = 23, 4, 6, 50
HASHES = {"model": "m1", "data": "d1"}
ITEM_EMBEDDINGS = np.arange((ITEMS + 1) * WIDTH, dtype=np.float32).reshape(-1, WIDTH)


def make_rows(sample_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Rows that are a function of their sample id alone."""
    rng = [np.random.default_rng(int(sample)) for sample in sample_ids]
    ids = [r.permutation(ITEMS)[:TOP_K] + 1 for r in rng]
    return {
        "top_ids": np.array(ids).reshape(-1, TOP_K),
        "scores": np.array([-np.sort(-r.normal(size=TOP_K)) for r in rng]).reshape(-1, TOP_K),
        "log_sum_exp": np.array([r.normal() for r in rng]),
        "target_log_prob": np.array([-r.random() for r in rng]),
        "embedding": np.array([r.normal(size=WIDTH) for r in rng]).reshape(-1, WIDTH),
    }


def writer(folder, **changes) -> Writer:
    shape = {"samples": SAMPLES, "top_k": TOP_K, "width": WIDTH, "hashes": HASHES}
    return Writer(folder, **{**shape, **changes})


def write(open_writer: Writer, sample_ids: np.ndarray, **changes) -> None:
    open_writer.write(sample_ids, **{**make_rows(sample_ids), **changes})


def write_all(folder, **changes) -> Outputs:
    with writer(folder, **changes) as out:
        write(out, np.arange(SAMPLES))
        out.finish(ITEM_EMBEDDINGS)
    return Outputs.open(folder)


@given(st.permutations(range(SAMPLES)), st.integers(1, SAMPLES), st.permutations(range(SAMPLES)))
def test_rows_follow_their_sample_id_whatever_the_order(tmp_path_factory, written, batch, read):
    folder = tmp_path_factory.mktemp("outputs") / "teacher"
    with writer(folder, embedding_dtype="float32") as out:
        for start in range(0, SAMPLES, batch):
            write(out, np.array(written[start : start + batch]))
        out.finish(ITEM_EMBEDDINGS)
    rows = Outputs.open(folder).rows(np.array(read))
    for name, wanted in make_rows(np.array(read)).items():
        assert np.array_equal(rows[name], wanted.astype(rows[name].dtype)), name


def test_types_shapes_and_manifest(tmp_path):
    opened = write_all(tmp_path / "teacher")
    rows = opened.rows(np.array([5, 5]))
    types = {name: str(array.dtype) for name, array in rows.items()}
    assert types == {
        "top_ids": "int32",
        "scores": "float32",
        "log_sum_exp": "float32",
        "target_log_prob": "float32",
        "embedding": "float16",
    }
    assert (opened.samples, opened.top_k, opened.width) == (SAMPLES, TOP_K, WIDTH)
    assert opened.hashes == HASHES
    assert np.array_equal(opened.item_embeddings, ITEM_EMBEDDINGS)
    manifest = json.loads((tmp_path / "teacher" / "manifest.json").read_text())
    assert manifest["order"] == "score descending, item id ascending"
    assert manifest["completed"] == [[0, SAMPLES]]
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize("bad", [[-1], [SAMPLES], [0, SAMPLES + 5]])
def test_missing_sample_is_an_error(tmp_path, bad):
    opened = write_all(tmp_path / "teacher")
    with pytest.raises(ValueError, match="no sample"):
        opened.rows(np.array(bad))
    with pytest.raises(ValueError, match="wanted integers"):
        opened.rows(np.array([1.0]))


def test_interrupted_writing_continues(tmp_path):
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "teacher") as out:
        write(out, np.array([0, 1, 2, 9]))
        raise KeyboardInterrupt
    assert not (tmp_path / "teacher").exists()
    with pytest.raises(InputError, match="no manifest"):
        Outputs.open(tmp_path / "teacher")
    manifest = json.loads((tmp_path / ".teacher.partial" / "manifest.json").read_text())
    assert manifest["completed"] == [[0, 3], [9, 10]]

    with writer(tmp_path / "teacher") as out:
        left = out.missing()
        assert left.tolist() == [3, 4, 5, 6, 7, 8, *range(10, SAMPLES)]
        write(out, left)
        out.finish(ITEM_EMBEDDINGS)
    rows = Outputs.open(tmp_path / "teacher").rows(np.arange(SAMPLES))
    assert np.array_equal(rows["top_ids"], make_rows(np.arange(SAMPLES))["top_ids"])


@pytest.mark.parametrize(
    "change", [{"hashes": {"model": "m2", "data": "d1"}}, {"top_k": 3}, {"samples": 24}]
)
def test_partial_outputs_of_something_else_are_replaced(tmp_path, change):
    with writer(tmp_path / "teacher") as out:
        write(out, np.arange(10))
    with writer(tmp_path / "teacher", **change) as out:
        assert len(out.missing()) == change.get("samples", SAMPLES)


def test_rows_that_a_killed_process_wrote_are_claimed_only_once_on_disk(tmp_path, monkeypatch):
    manifest = tmp_path / ".teacher.partial" / "manifest.json"
    killed = writer(tmp_path / "teacher")
    write(killed, np.arange(5))
    assert json.loads(manifest.read_text())["completed"] == []
    monkeypatch.setattr(outputs, "CHECKPOINT_BYTES", 0)
    write(killed, np.arange(5, 8))
    assert json.loads(manifest.read_text())["completed"] == [[0, 8]]
    monkeypatch.setattr(outputs, "CHECKPOINT_BYTES", 1 << 30)
    monkeypatch.setattr(outputs, "CHECKPOINT_S", 0.0)
    write(killed, np.arange(8, 9))
    assert json.loads(manifest.read_text())["completed"] == [[0, 9]]


def test_finish_refuses_gaps_and_wrong_item_embeddings(tmp_path):
    with writer(tmp_path / "teacher") as out:
        write(out, np.arange(1, SAMPLES))
        with pytest.raises(ValueError, match="1 samples missing, the first is 0"):
            out.finish(ITEM_EMBEDDINGS)
        write(out, np.array([0]))
        with pytest.raises(ValueError, match=r"wanted \(V\+1, 6\)"):
            out.finish(ITEM_EMBEDDINGS[:, :3])
        with pytest.raises(ValueError, match="not finite"):
            out.finish(np.full_like(ITEM_EMBEDDINGS, np.nan))
    assert not (tmp_path / "teacher").exists()


def test_finished_outputs_are_never_overwritten(tmp_path):
    write_all(tmp_path / "teacher")
    with pytest.raises(FileExistsError):
        writer(tmp_path / "teacher")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.array([[1.0, 2.0, 0.5, 0.1]])}, "not in order"),
        ({"scores": np.zeros((1, 4)), "top_ids": np.array([[1, 2, 4, 3]])}, "not in order"),
        ({"scores": np.zeros((1, 4)), "top_ids": np.array([[1, 2, 2, 3]])}, "not in order"),
        ({"scores": np.full((1, 4), np.nan)}, "scores: not finite"),
        ({"log_sum_exp": np.array([np.inf])}, "log_sum_exp: not finite"),
        ({"embedding": np.full((1, WIDTH), 1e5)}, "embedding: not finite as float16"),
        ({"top_ids": np.array([[1.0, 2.0, 3.0, 4.0]])}, "ids must be integers"),
        ({"top_ids": np.array([[0, 1, 2, 3]])}, "0 is padding"),
        ({"target_log_prob": np.zeros(2)}, r"target_log_prob is \(2,\); wanted \(1,\)"),
    ],
)
def test_bad_rows_are_refused_and_not_counted(tmp_path, changes, message):
    with writer(tmp_path / "teacher") as out:
        with pytest.raises(ValueError, match=message):
            write(out, np.array([3]), **changes)
        assert 3 in out.missing()


def test_ties_in_order_of_id_are_accepted(tmp_path):
    with writer(tmp_path / "teacher") as out:
        write(out, np.array([3]), scores=np.zeros((1, 4)), top_ids=np.array([[1, 2, 4, 9]]))
        assert 3 not in out.missing()


def test_outputs_of_another_model_or_split_are_refused(tmp_path):
    write_all(tmp_path / "teacher")
    Outputs.open(tmp_path / "teacher", {"data": "d1"})
    with pytest.raises(InputError, match="made with data d1; this run has data d2"):
        Outputs.open(tmp_path / "teacher", {"data": "d2"})


def test_damaged_outputs_are_refused(tmp_path):
    write_all(tmp_path / "teacher")
    scores = tmp_path / "teacher" / "scores.npy"
    whole = scores.read_bytes()
    scores.write_bytes(whole[:-8])
    with pytest.raises(InputError, match="make the outputs again"):
        Outputs.open(tmp_path / "teacher")
    np.save(scores, np.zeros((SAMPLES, TOP_K + 1), dtype=np.float32))
    with pytest.raises(InputError, match="its manifest says"):
        Outputs.open(tmp_path / "teacher")
    scores.unlink()
    with pytest.raises(InputError, match="make the outputs again"):
        Outputs.open(tmp_path / "teacher")


def test_full_disk_is_an_error_before_anything_is_computed(tmp_path):
    with pytest.raises(OSError, match=r"need \d+ bytes of disk"):
        writer(tmp_path / "teacher", width=1 << 50)


def test_space_is_claimed_at_the_start(tmp_path):
    with writer(tmp_path / "teacher", width=100_000):
        embedding = (tmp_path / ".teacher.partial" / "embedding.npy").stat()
    assert embedding.st_blocks * 512 >= embedding.st_size > SAMPLES * 200_000


def test_memory_stays_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "CHECKPOINT_BYTES", 1 << 20)
    samples, width, batch = 40_000, 1024, 500
    scores = np.tile(np.arange(TOP_K, 0, -1), (batch, 1))
    ids = np.tile(np.arange(1, TOP_K + 1), (batch, 1))
    embedding, ones = np.ones((batch, width), dtype=np.float16), np.ones(batch)
    with writer(tmp_path / "teacher", samples=samples, width=width) as out:
        before = resident_bytes()
        for start in range(0, samples, batch):
            out.write(np.arange(start, start + batch), ids, scores, ones, ones, embedding)
        grown = resident_bytes() - before
    assert grown < 20 << 20  # of 80 MiB written


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@given(st.integers(0, SAMPLES - 1), st.integers(1, SAMPLES))
def test_following_ids_are_written_in_one_piece(first, count):
    ids = np.arange(first, min(first + count, SAMPLES))
    assert outputs._slice_of(ids) == slice(ids[0], ids[-1] + 1)
    if len(ids) > 1:
        for other in (ids[::-1], np.append(ids, ids[0])):
            assert isinstance(outputs._slice_of(other), np.ndarray)

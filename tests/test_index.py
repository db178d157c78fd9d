"""The list of runs: from the run folders alone, whole or not at all, whatever lies in them."""

import json
from pathlib import Path

import pytest
from synthetic_records import MACHINE, MATRIX, all_records, report_cells

from bench.matrix import resolved
from bench.reporting import index
from bench.reporting.strings import words
from bench.verdicts import judge

EN = words("en")
BEST = "`train.precision=bf16-mixed`,<br>`teacher.inference_batch_size=256`"


@pytest.fixture(scope="module")
def told() -> dict:
    judged = judge(MATRIX, report_cells(), all_records())
    return index.summary(MATRIX, judged, MACHINE, "teacher_speed")


def run(out: Path, name: str, summary: object = None) -> None:
    """A run folder, with a summary if a report was made."""
    folder = out / name
    folder.mkdir(parents=True)
    (folder / "matrix.yaml").write_text(resolved(MATRIX))
    if summary is not None:
        text = summary if isinstance(summary, str) else json.dumps(summary)
        (folder / index.SUMMARY).write_text(text)


def rows(path: Path) -> list[list[str]]:
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_run_is_one_row_with_its_answer_and_a_link(tmp_path: Path, told: dict) -> None:
    name = "teacher_speed/20261120-181530"
    run(tmp_path, name, told)
    (row,) = rows(index.write(tmp_path, EN))
    assert row[0] == "2026-11-20 18:15"
    assert row[1] == (f"[{name}]({name}/report.md)")
    assert row[2] == MATRIX.question
    assert row[3] == BEST
    assert row[4].startswith("0.743 (0.736 to 0.749")
    assert row[5] == "5.35 → 3.19 GiB reserved"
    assert row[6] == "13 of 23 measured"


def test_the_newest_comes_first_and_none_is_left_out(tmp_path: Path, told: dict) -> None:
    run(tmp_path, "b/20261119-000000", told)
    run(tmp_path, "a/20261121-000000", told | {"answer": "kept", "best": "baseline"})
    run(tmp_path, "a/20261118-000000")
    run(tmp_path, "c/20261120-000000", '{"torn')
    run(tmp_path, "d/20261117-000000", told | {"answer": "refused", "ratio": None})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").write_text("no run")
    found = rows(index.write(tmp_path, EN))
    assert [row[1].strip("[").partition("]")[0] for row in found] == [
        "a/20261121-000000",
        "c/20261120-000000",
        "b/20261119-000000",
        "a/20261118-000000",
        "d/20261117-000000",
    ]
    assert [row[2] for row in found if row[0] == "–"] == [
        "no report: not ended, or of an older version"
    ] * 2
    assert (found[0][3], found[0][5]) == ("keep the baseline", "5.35 GiB reserved")
    assert (found[4][3], found[4][4]) == ("none can be recommended", "–")


def test_equal_folders_give_equal_bytes_and_nothing_else_is_written(
    tmp_path: Path, told: dict
) -> None:
    run(tmp_path, "a/20261121-000000", told)
    before = sorted(tmp_path.rglob("*"))
    first = index.write(tmp_path, EN).read_bytes()
    assert index.write(tmp_path, EN).read_bytes() == first
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "index.md"])


def test_a_failed_write_leaves_the_old_list(
    tmp_path: Path, told: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, "a/20261121-000000", told)
    old = index.write(tmp_path, EN).read_text()
    run(tmp_path, "a/20261122-000000", told)

    def full(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        index.write(tmp_path, EN)
    assert (tmp_path / "index.md").read_text() == old


def test_no_run_is_said_so_and_japanese_is_japanese(tmp_path: Path, told: dict) -> None:
    assert "None yet." in index.write(tmp_path, EN).read_text()
    run(tmp_path, "a/20261121-000000", told | {"question": "a | b * " + 30 * "c d "})
    text = index.write(tmp_path, words("ja")).read_text()
    assert text.startswith("# 計測一覧\n")
    row = text.splitlines()[4]
    assert "0.736～0.749" in row
    assert r"| a \| b \* c d " in row
    assert "…" in row, "a long question is cut"

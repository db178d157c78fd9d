"""Two commits measured in turns: their blocks are pairs, the other checkout is gone afterwards."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import in_turn
from bench.in_turn import Side, Stopped

ROOT = Path(__file__).resolve().parent.parent
FAKE = f"{sys.executable} {ROOT / 'tests' / 'fake_worker.py'}"


def worktrees() -> str:
    listed = ["git", "-C", str(ROOT), "worktree", "list", "--porcelain"]
    return subprocess.run(listed, capture_output=True, text=True, check=True).stdout


def ask(*words: str, out: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.in_turn", *words, "--out", str(out), "--worker", FAKE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_blocks_of_two_checkouts_alternate_and_are_paired(tmp_path):
    status, text = ask("HEAD", "matrices/smoke.yaml", "--blocks", "2", out=tmp_path)
    assert status == 0, text
    order = [line.rpartition(": ")[2] for line in text.splitlines() if " of 2: " in line]
    assert order == ["before", "after", "after", "before"]
    assert "| paired |" in text and "unpaired" not in text
    kept = (tmp_path / "comparison.md").read_text()
    assert kept in text and "| paired |" in kept
    assert len(list(tmp_path.glob("*/smoke/*/records.jsonl"))) == 2
    assert "in_turn-" not in worktrees()


def test_what_is_no_commit_is_refused_before_anything_runs(tmp_path):
    status, text = ask("no-such-commit", "matrices/smoke.yaml", out=tmp_path)
    assert status == 2 and "COMMIT no-such-commit" in text and not list(tmp_path.iterdir())


def test_a_run_that_cannot_go_on_ends_both(tmp_path):
    status, text = ask("HEAD", "matrices/no_such.yaml", out=tmp_path)
    assert status == 2 and "before: bench.run ended with status 2" in text
    assert "in_turn-" not in worktrees()


def test_a_failed_cell_does_not_stop_the_turns_and_an_unfit_machine_does(tmp_path, monkeypatch):
    statuses = iter([1, 3])
    asked = []

    def run(words, **given):
        asked.append((words, given["env"]["PYTHONPATH"]))
        return subprocess.CompletedProcess(words, next(statuses), f"x\n{tmp_path}/run/report.md\n")

    monkeypatch.setattr(in_turn.subprocess, "run", run)
    side = Side("before", tmp_path, tmp_path / "out")
    side.measure("m.yaml", 1, ["--only", "baseline"])
    assert side.folder == tmp_path / "run" and asked[0][1] == str(tmp_path)
    with pytest.raises(Stopped, match="status 3"):
        side.measure("m.yaml", 2, ["--only", "baseline"])
    assert "--only" in asked[0][0] and "--only" not in asked[1][0]
    assert asked[1][0][-2:] == ["--resume", str(tmp_path / "run")]


def test_one_block_makes_no_pairs():
    done = CliRunner().invoke(in_turn.app, ["HEAD", "m.yaml", "--blocks", "1"])
    assert done.exit_code == 2

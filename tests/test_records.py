"""Records survive torn writes, refuse foreign files, and tell what is finished."""

import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import records
from core.config import InputError

STAGES = ("teacher_fit", "teacher_test")


def group(key: str, repeat: int, statuses: dict[str, str]) -> list[records.Record]:
    return [
        {"schema": 1, "key": key, "repeat": repeat, "stage": stage, "status": status, "wall_s": 1.5}
        for stage, status in statuses.items()
    ]


OK = {stage: "ok" for stage in STAGES}


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    records.append(path, group("a", 1, OK))
    records.append(path, group("b", 1, OK))
    assert records.read(path) == group("a", 1, OK) + group("b", 1, OK)


def test_nothing_that_json_cannot_say_is_written(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    bad = group("a", 1, OK)
    bad[1]["wall_s"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        records.append(path, bad)
    assert not path.exists()


def test_a_full_disk_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the group is on the disk when there is no more room."""
    path = tmp_path / "records.jsonl"
    records.append(path, group("a", 1, OK))
    before = path.read_bytes()
    write = os.write

    def half(descriptor: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match=r"No space left on device: .*records\.jsonl") as raised:
        records.append(path, group("b", 1, OK))
    assert raised.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    monkeypatch.undo()
    records.append(path, group("b", 1, OK))
    assert records.read(path) == group("a", 1, OK) + group("b", 1, OK)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(min_value=0))
def test_repair_keeps_exactly_the_complete_groups(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    """Cut the file at any byte, as a crash inside a write would."""
    path = tmp_path_factory.mktemp("cut") / "records.jsonl"
    groups = [group("a", 1, OK), group("b", 1, {"start_up": "killed"}), group("a", 2, OK)]
    ends = [0]
    for one in groups:
        records.append(path, one)
        ends.append(path.stat().st_size)
    cut %= ends[-1] + 1
    path.write_bytes(path.read_bytes()[:cut])
    whole = sum(end <= cut for end in ends[1:])
    expected = [record for one in groups[:whole] for record in one]
    assert records.repair(path, STAGES) == expected
    records.append(path, group("c", 1, OK))
    assert records.read(path) == expected + group("c", 1, OK)


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("{torn\n" + json.dumps(group("a", 1, OK)[0]) + "\n")
    with pytest.raises(InputError, match=r"records\.jsonl:1"):
        records.read(path)


@pytest.mark.parametrize("line", ['{"schema": 2}', "{}", "[]"])
def test_another_schema_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match="reads schema 1"):
        records.read(path)


def test_finished_are_failures_whole_groups_and_cells_that_never_start() -> None:
    lines = [
        *group("whole", 1, OK),
        *group("half", 1, {"teacher_fit": "ok"}),
        *group("dead", 1, {"teacher_fit": "ok", "teacher_test": "oom_gpu"}),
        *group("early", 1, {"start_up": "import"}),
        *group("never", 0, dict.fromkeys(STAGES, "unsupported")),
        *group("torn", 0, {"teacher_fit": "skipped"}),
    ]
    done = records.finished(lines, STAGES)
    assert done == {("whole", 1), ("dead", 1), ("early", 1), ("never", 0)}


def test_nonfinite_names_the_place() -> None:
    assert records.nonfinite({"losses": [1.0, 2], "metrics": {}}) is None
    assert records.nonfinite({"losses": [1.0, float("inf")]}) == "losses.1 is inf"


def _hold(path: Path, held: "multiprocessing.synchronize.Event") -> None:
    with records.locked(path):
        held.set()
        held_for_ever = multiprocessing.Event()
        held_for_ever.wait(60)


def test_a_run_has_one_parent_and_a_killed_one_frees_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "lock", held))
    other.start()
    assert held.wait(10)
    with pytest.raises(InputError, match="another process"), records.locked(tmp_path / "lock"):
        pass
    other.kill()
    other.join()
    with records.locked(tmp_path / "lock"):
        pass

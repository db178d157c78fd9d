"""The largest batch that fits: the search on known laws of memory, `auto` in a matrix, and both
from outside with a fake and with the real worker.
"""

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_run import FAKE, ROOT, SMALL, Bench, environment, wait_for

from bench import largest
from bench.execute import Run
from bench.matrix import Cell, Matrix, cells, load_matrix, resolved, settings_key, with_limit_of
from bench.proofs import PROOFS
from bench.schedule import autos, room
from bench.schedule.memory_model import (
    FIRST,
    MOST,
    MOST_PROBES,
    NOISE_BYTES,
    Probe,
    rounded,
    search,
    target_bytes,
)
from bench.schedule.memory_model import largest as largest_of
from core.config import InputError

GIB, MIB = 1 << 30, 1 << 20
Law = Callable[[int], float]


# ---- the search on laws of memory ----


def tried(law: Law, room_bytes: int, rows: int | None = None) -> list[Probe]:
    """What a search does where batches need memory by a law."""

    def attempt(batch: int) -> Probe:
        real = batch if rows is None else min(batch, rows)
        seen = None if rows is None else real
        peak_bytes = int(law(real))
        if peak_bytes > room_bytes:
            return Probe(batch, "oom_host", room_bytes)
        return Probe(batch, "ok", room_bytes, peak_bytes, rows=seen)

    probes = search(attempt)
    asked = [probe.asked for probe in probes]
    assert 1 <= len(asked) <= MOST_PROBES
    assert len(set(asked)) == len(asked), "a batch was tried twice"
    return probes


def answer_of(probes: list[Probe]) -> int:
    best = largest_of(probes)
    return best.batch if best else 0


rooms = st.integers(1, 100).map(lambda gib: gib * GIB)
shares = st.floats(0.05, 0.7)
"""Of the room, what the model needs without any batch."""
answers = st.floats(1, 5000)
"""The largest batch that the law lets fit."""


def affine(room_bytes: int, share: float, answer: float) -> tuple[float, float]:
    """Intercept and slope such that `answer` just leaves the head-room."""
    intercept = share * room_bytes
    return intercept, (target_bytes(room_bytes) - intercept) / answer


def least(answer: float, slope: float) -> float:
    """What must be found at least: all but a step, or half where the first probes show no slope."""
    return (0.8 if 15 * slope > 2 * NOISE_BYTES else 0.45) * int(answer) - 1


@given(rooms, shares, answers)
def test_an_affine_law_is_met_to_within_a_step(room: int, share: float, answer: float) -> None:
    a, b = affine(room, share, answer)
    probes = tried(lambda batch: a + b * batch, room)
    assert least(answer, b) <= answer_of(probes) <= answer


def test_three_processes_are_enough_for_an_affine_law() -> None:
    """The users' own LoRA figures: 12.9 GiB + 0.641 GiB for each sample, 80 GiB."""
    probes = tried(lambda batch: (12.9 + 0.641 * batch) * GIB, 80 * GIB)
    assert [probe.batch for probe in probes] == [1, 16, 92]
    assert all(probe.fits for probe in probes)
    assert probes[2].expected_bytes == pytest.approx((12.9 + 0.641 * 92) * GIB, abs=MIB)


@given(rooms, shares, answers, st.lists(st.integers(-8, 8), min_size=6, max_size=6))
def test_noise_costs_little(room: int, share: float, answer: float, noise: list[int]) -> None:
    """Each process some MiB more or less, and segments of 2 MiB."""
    a, b = affine(room, share, answer)
    shakes = iter(noise)
    probes = tried(
        lambda batch: 2 * MIB * round((a + b * batch + next(shakes) * MIB) / (2 * MIB)), room
    )
    found = largest_of(probes)
    assert found is None or found.fits
    slack = 20 * MIB / b  # what the noise alone is worth
    assert least(answer, b) * 0.9 - slack <= answer_of(probes) <= answer + slack


@given(
    rooms,
    shares,
    st.floats(17, 300),
    st.floats(0.02, 1.0),
    st.floats(0.1, 2.0),
)
def test_a_cliff_is_found_to_within_a_step(
    room: int, share: float, answer: float, where: float, height: float
) -> None:
    """A step is an eighth of what the model promised, the first batch that did not fit."""
    a, b = affine(room, share, answer)
    cliff = max(17, int(where * answer))

    def law(batch: int) -> float:
        return a + b * batch + (height * room if batch >= cliff else 0)

    assume(15 * b > 2 * NOISE_BYTES)  # the slope is seen at once, so enough probes are left
    probes = tried(law, room)
    misfits = [probe.batch for probe in probes if not probe.fits]
    batches = range(1, int(answer) + 2)
    truth = max(batch for batch in batches if int(law(batch)) <= target_bytes(room))
    step = max(misfits, default=8) / 8 + 1
    assert truth / (1 + 1 / 8) - step <= answer_of(probes) <= truth


def test_a_plain_cliff_step_by_step() -> None:
    """A kernel with another work space from 83 on: 4 GiB more."""
    probes = tried(lambda batch: (500 + 10 * batch + 4000 * (batch >= 83)) * MIB, 2 * GIB)
    assert [(probe.batch, probe.status) for probe in probes] == [
        (1, "ok"),
        (16, "ok"),
        (128, "oom_host"),
        (72, "ok"),
        (100, "oom_host"),
        (86, "oom_host"),
    ]
    assert 82 - answer_of(probes) <= 128 / 8


@given(rooms, st.floats(0.01, 0.89))
def test_a_constant_law_ends_at_the_largest_batch_tried(room: int, share: float) -> None:
    assert answer_of(tried(lambda batch: share * room, room)) == MOST


@given(rooms, shares, answers, st.integers(1, 10_000))
def test_no_batch_is_larger_than_the_rows(
    room: int, share: float, answer: float, rows: int
) -> None:
    a, b = affine(room, share, answer)
    probes = tried(lambda batch: a + b * batch, room, rows)
    assert min(least(answer, b), 0.85 * rows - 1) <= answer_of(probes) <= min(answer, rows)
    ended = [probe for probe in probes if probe.asked > rows and probe.status == "ok"]
    assert len(ended) <= 1, "the rows had ended"


@given(rooms, st.floats(0.91, 3.0))
def test_what_fails_at_one_is_tried_once(room: int, share: float) -> None:
    probes = tried(lambda batch: share * room, room)
    assert [probe.batch for probe in probes] == [FIRST]
    assert largest_of(probes) is None


@given(st.integers(1, MOST))
def test_rounding_loses_at_most_a_sixteenth(batch: int) -> None:
    assert 15 * batch / 16 <= rounded(batch) <= batch
    assert rounded(rounded(batch)) == rounded(batch)


# ---- auto in a matrix ----

AUTO = """\
question: q?
stages: [teacher_fit, teacher_test]
base: {teacher: {inference_batch_size: auto}}
axes:
  teacher.adapter: [lora, qlora]
  train.batch_size: [32, auto]
include:
  - {adapter: qlora, train.batch_size: auto}
"""


def load(folder: Path, text: str = AUTO, *sets: str) -> Matrix:
    path = folder / "matrix.yaml"
    path.write_text(text)
    return load_matrix(path, sets)


def names(matrix: Matrix) -> list[str]:
    return [cell.name for cell in cells(matrix, True)]


def numbered(matrix: Matrix, *numbers: int) -> Matrix:
    """The matrix with these numbers for its searches, in their order."""
    due = largest.due(matrix, cells(matrix, True), ())
    found = {one.stand_in: number for one, number in zip(due, numbers, strict=True)}
    return largest.with_found(matrix, found)


def test_each_auto_is_searched_in_the_first_cell_that_has_it(tmp_path: Path) -> None:
    matrix = load(tmp_path)
    assert names(matrix) == [
        "baseline",
        "teacher.adapter=qlora",
        "train.batch_size=auto",
        "teacher.adapter=qlora, train.batch_size=auto",
    ]
    due = largest.due(matrix, cells(matrix, True), ())
    assert [(one.setting, one.cell.name) for one in due] == [
        ("teacher.inference_batch_size", "baseline"),
        ("train.batch_size", "train.batch_size=auto"),
        ("train.batch_size", "teacher.adapter=qlora, train.batch_size=auto"),
    ]
    assert list(largest.plan_lines(due)) == [
        "teacher.inference_batch_size: auto, searched first, at most 6 short processes",
        "train.batch_size: auto, searched first, at most 6 short processes",
        "train.batch_size: auto (in teacher.adapter=qlora, train.batch_size=auto), searched first, "
        "at most 6 short processes",
    ]


def test_numbers_take_the_place_of_auto(tmp_path: Path) -> None:
    matrix = numbered(load(tmp_path), 96, 200, 320)
    assert names(matrix) == [
        "baseline",
        "teacher.adapter=qlora",
        "train.batch_size=200",
        "teacher.adapter=qlora, train.batch_size=320",
    ]
    assert {cell.settings.teacher.inference_batch_size for cell in cells(matrix, True)} == {96}
    assert "batch_size: auto" not in resolved(matrix)


def test_numbers_that_are_there_already_make_no_second_cell(tmp_path: Path) -> None:
    lean = {"teacher.adapter": "qlora", "train.batch_size": 48}
    text = AUTO + "  - {adapter: qlora, train.batch_size: 48}\n"
    matrix = numbered(load(tmp_path, text), 96, 32, 48)
    assert names(matrix) == [
        "baseline",
        "teacher.adapter=qlora",
        "teacher.adapter=qlora, train.batch_size=48",
    ]
    assert matrix.axes["train.batch_size"] == (32,)
    assert matrix.include == (lean,)


def test_a_cell_of_its_own_stays_one(tmp_path: Path) -> None:
    """With a number that an axis has too, an `include` entry would be added to those cells."""
    text = AUTO.replace("adapter: qlora, train", "train.lr: 0.5, train")
    matrix = load(tmp_path, text)
    *_, search = largest.due(matrix, cells(matrix, True), ())
    assert search.cell.name == "train.batch_size=auto, train.lr=0.5"
    axis = {matrix.axes["train.batch_size"][1]: 200}
    assert largest.apart(matrix, search, 200, axis) == 199
    assert largest.apart(matrix, search, 199, axis) == 199
    assert largest.apart(matrix, search, 32, axis) == 31
    found = largest.with_found(matrix, axis | {search.stand_in: 199})
    assert "train.batch_size=199, train.lr=0.5" in names(found)


def test_an_auto_not_searched_keeps_its_cell_in_the_resolved_matrix(tmp_path: Path) -> None:
    """Its cell cannot run here; a resumed run must know it again."""
    matrix = load(tmp_path)
    before = cells(matrix, True)
    blocked = [cell.key for cell in before if cell.settings.teacher.adapter == "qlora"]
    due = largest.due(matrix, before, blocked)
    assert len(due) == 2
    found = largest.with_found(matrix, {one.stand_in: 48 for one in due})
    again = load(tmp_path, resolved(found))
    assert [cell.key for cell in cells(again, True)] == [cell.key for cell in cells(found, True)]
    left = largest.due(again, cells(again, True), ())
    assert [one.cell.name for one in left] == ["teacher.adapter=qlora, train.batch_size=auto"]


def test_values_of_a_machine_without_a_gpu_are_searched_there_only(tmp_path: Path) -> None:
    text = AUTO + "without_gpu: {base: {inference_batch_size: 8}, max_memory_gib: 1}\n"
    matrix = load(tmp_path, text)
    due = largest.due(matrix, cells(matrix, False), ())
    assert {one.setting for one in due} == {"train.batch_size"}
    assert with_limit_of(matrix, False).max_memory_gib == 1
    assert with_limit_of(matrix, True).max_memory_gib is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: {train.lr: auto}", "'auto' is not a number"),
        ("base: {train.max_epochs: auto}", "'auto' is not a whole number"),
        ("axes: {batch_size: [1, auto]}", "axes.batch_size: fits 4 settings"),
        (
            "axes: {train.batch_size: [1, 2]}\nexclude: [{train.batch_size: auto}]",
            "exclude[0].train.batch_size: 'auto' is not a whole number",
        ),
        ("axes: {train.batch_size: auto}", "is not a list"),
    ],
)
def test_auto_is_for_batch_sizes_where_they_can_be_searched(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load(tmp_path, f"question: q?\nstages: [teacher_fit]\n{text}\n")


def test_an_auto_that_nothing_measured_would_use_is_refused(tmp_path: Path) -> None:
    matrix = load(tmp_path, AUTO, "stages=[student_fit]")
    with pytest.raises(InputError, match=r"auto, but no measured stage uses it"):
        largest.due(matrix, cells(matrix, True), ())


def test_the_names_of_searchable_settings_are_settings() -> None:
    base = Matrix.model_validate({"question": "q?", "stages": ["teacher_fit"]}).base
    for setting in autos.ACTS_IN:
        assert isinstance(autos.value_of(base, setting), int)


def test_a_settled_run_maps_every_cell(tmp_path: Path) -> None:
    matrix = load(tmp_path)
    planned = tuple(cells(matrix, True))
    due = largest.due(matrix, planned, ())
    run = Run(tmp_path, matrix, planned, ("worker",))
    found, now = largest.settled(run, True, {one.stand_in: 32 for one in due})
    assert [cell.name for cell in found.cells] == ["baseline", "teacher.adapter=qlora"]
    assert [now[cell.key].name for cell in planned] == [
        "baseline",
        "teacher.adapter=qlora",
        "baseline",
        "teacher.adapter=qlora",
    ]
    assert all(cell.key == settings_key(cell.settings) for cell in found.cells)
    assert isinstance(found.cells[0], Cell)


@pytest.mark.parametrize(
    ("batches", "train", "holds"),
    [
        (2, {"max_epochs": 2, "max_steps": -1}, True),  # each epoch is one batch of all rows
        (10, {"max_epochs": 2, "max_steps": -1}, False),
        (1, {"max_epochs": 1, "max_steps": 1}, False),  # cut after one: nobody knows
    ],
)
def test_a_batch_of_all_rows_is_in_effect(batches: int, train: dict[str, int], holds: bool) -> None:
    facts = {"largest_train_batch": 333, "micro_batches": batches}
    prove = PROOFS["train.batch_size"].check
    assert prove(500, facts, {"train": train}).holds is holds
    assert prove(300, facts, {"train": train}).holds is False


# ---- from outside, with a fake worker ----

LAW = {
    "law": {"mib": 500, "each_mib": {"train.batch_size": 10}, "cliff": {"from": 83, "mib": 4000}}
}
SEARCHED = SMALL.replace("data.seed: [0, 1]", "train.batch_size: [16, auto]") + (
    "preflight: never\nmax_memory_gib: 2\n"
)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def search_files(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("cells/memory-*.jsonl"))


@pytest.mark.slow
def test_a_run_searches_first_then_measures_and_never_searches_again(bench: Bench) -> None:
    matrix = bench.matrix(SEARCHED)
    planned = bench.run(matrix, "--plan")
    assert "train.batch_size: auto, searched first, at most 6 short processes" in planned.stdout
    assert not bench.out.exists()
    done = bench.run(matrix, every=LAW)
    assert done.returncode == 0, done.stderr
    (folder,) = bench.folders()
    assert {r["cell"] for r in bench.records()} == {"baseline", "train.batch_size=72"}
    assert "train.batch_size: [16, 72]" in (folder / "matrix.yaml").read_text()
    (account,) = json.loads((folder / "machine.json").read_text())["largest"]
    assert [probe["asked"] for probe in account["probes"]] == [1, 16, 128, 72, 100, 86]
    assert [p["status"] for p in account["probes"]].count("oom_host") == 3
    report = (folder / "report.md").read_text()
    assert "train.batch_size = 72: the largest batch found" in report
    assert len(search_files(folder)) == 7  # one of them the set-up
    times = {path: path.stat().st_mtime_ns for path in folder.glob("cells/memory-*")}
    more = bench.run(matrix, "--resume", folder, "--repeats", 3, every=LAW)
    assert more.returncode == 0, more.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.glob("cells/memory-*")} == times
    assert "train.batch_size = 72: the largest batch found" in (folder / "report.md").read_text()
    assert len(bench.records()) == 12


@pytest.mark.slow
def test_only_and_profile_know_the_cell_by_its_new_name(bench: Bench) -> None:
    text = SEARCHED.replace("axes:", "axes:\n  train.lr: [0.1, 0.2]")
    done = bench.run(bench.matrix(text), "--only", "train.batch_size=auto", every=LAW)
    assert done.returncode == 0, done.stderr
    assert {r["cell"] for r in bench.records()} == {"baseline", "train.batch_size=72"}
    (folder,) = bench.folders()
    assert bench.run(bench.folder / "small.yaml", "--resume", folder).returncode == 0
    assert {r["cell"] for r in bench.records()} == {"baseline", "train.batch_size=72"}


def test_two_numbers_are_tried_together(bench: Bench) -> None:
    """Each alone fits, both do not: the second is halved."""
    text = SMALL.replace("axes:", "base: {train.batch_size: auto}\naxes:").replace(
        "data.seed: [0, 1]", "inference_batch_size: [auto, 8]"
    )
    law: dict[str, Any] = {"mib": 500}
    law["each_mib"] = {"train.batch_size": 5, "teacher.inference_batch_size": 4}
    text += "preflight: never\nmax_memory_gib: 2\n"
    done = bench.run(bench.matrix(text), every={"law": law})
    assert done.returncode == 3, done.stdout
    assert "does not fit into 2.00 GiB" in done.stderr
    assert "give one of them a number" in done.stderr
    law |= {"each_mib": {"train.batch_size": 5, "teacher.inference_batch_size": 0}, "rows": 384}
    done = bench.run(bench.matrix(text), every={"law": law})
    assert done.returncode == 0, done.stderr
    accounts = json.loads((bench.folders()[-1] / "machine.json").read_text())["largest"]
    assert [account["setting"] for account in accounts] == [
        "train.batch_size",
        "teacher.inference_batch_size",
    ]
    assert accounts[1]["number"] == 384
    assert accounts[1]["probes"][-1]["beside"] == f"train.batch_size={accounts[0]['number']}"


def test_what_does_not_fit_at_all_is_an_unfit_machine(bench: Bench) -> None:
    done = bench.run(bench.matrix(SEARCHED), "--max-memory", "0.5", every=LAW)
    assert done.returncode == 3
    assert "train.batch_size: auto: a batch of 1 does not fit into 0.50 GiB" in done.stderr


def test_a_probe_that_dies_of_something_else_is_a_failure_and_no_answer(bench: Bench) -> None:
    done = bench.run(bench.matrix(SEARCHED), every=LAW | {"memory_probe": "raise"})
    assert done.returncode == 1
    assert "largest train.batch_size: 1: error in teacher_test" in done.stderr
    assert "an ordinary mistake" in done.stderr
    resumed = bench.run(bench.matrix(SEARCHED), "--resume", bench.folders()[-1], every=LAW)
    assert resumed.returncode == 0, resumed.stderr
    assert {r["cell"] for r in bench.records()} == {"baseline", "train.batch_size=72"}


def test_a_stop_in_the_search_is_finished_by_resume(bench: Bench) -> None:
    matrix = bench.matrix(SEARCHED)
    parent = bench.start(matrix, every=LAW | {"memory_probe": "hang"})
    wait_for(lambda: any("batch_size" in path for f in bench.folders() for path in search_files(f)))
    (folder,) = bench.folders()
    parent.terminate()
    out, err = parent.communicate(timeout=20)
    assert parent.returncode == 130, err
    assert f"--resume {folder}" in out
    assert not (folder / "records.jsonl").read_text()
    done = bench.run(matrix, "--resume", folder, every=LAW)
    assert done.returncode == 0, done.stderr
    assert {r["cell"] for r in bench.records()} == {"baseline", "train.batch_size=72"}


def command(*words: Any, **choices: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.largest", *map(str, words)],
        cwd=ROOT,
        env=environment(choices),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_searches_any_batch_size_of_any_cell(bench: Bench) -> None:
    matrix = bench.matrix(SMALL)
    words = [matrix, "--setting", "train.batch_size", "--max-memory", 2, "--worker", FAKE]
    done = command(*words, every=LAW)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "train.batch_size: 72"
    assert "| 128 " in done.stdout
    lean = {"law": {"mib": 100, "each_mib": {"train.batch_size": 5}}}
    done = command(*words, "--cell", "seed=1", every=LAW, data__seed=1, **{"data__seed=1": lean})
    assert done.stdout.splitlines()[-1] == "train.batch_size: 336", done.stderr
    assert not bench.out.exists()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "baseline: nothing is auto; name one with --setting"),
        (["--setting", "train.batchsize"], 2, "did you mean train.batch_size?"),
        (["--setting", "distill.batch_size"], 2, "no measured stage uses it"),
        (["--cell", "nowhere"], 2, "--cell nowhere: no such cell"),
        (["--setting", "train.batch_size", "--max-memory", "0.1"], 3, "a batch of 1 does not fit"),
    ],
)
def test_the_command_says_what_is_wrong(
    bench: Bench, words: list[str], status: int, message: str
) -> None:
    done = command(bench.matrix(SMALL), *words, "--worker", FAKE, every=LAW)
    assert done.returncode == status, done.stderr
    assert message in done.stderr


# ---- the wall, and the real worker ----

WALLED = """
import os, subprocess, sys, time
from bench.schedule import room

def died(reason):
    print("excess", reason, flush=True)
    os._exit(7)

room.wall_host(200 << 20, died)
kind = sys.argv[1]
if kind == "own":
    try:
        held = bytearray(400 << 20)
    except MemoryError:
        print("refused")
if kind == "shared":
    import mmap
    held = mmap.mmap(-1, 400 << 20)
    held.write(bytes(1 << 20) * 1)
    for start in range(0, 400 << 20, 1 << 20):
        held[start : start + (1 << 20)] = b"x" * (1 << 20)
        time.sleep(0.001)
if kind == "child":
    code = "import time; held = b'x' * (150 << 20); time.sleep(8)"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    children = [subprocess.Popen([sys.executable, "-c", code], **quiet) for _ in range(2)]
    time.sleep(10)
if kind == "little":
    held = bytearray(50 << 20)
    time.sleep(0.2)
print("end")
"""


@pytest.mark.parametrize(
    ("kind", "said", "status"),
    [
        ("own", "refused\nend\n", 0),
        ("shared", "excess MemoryError: the process tree holds", 7),
        ("child", "excess MemoryError: the process tree holds", 7),
        ("little", "end\n", 0),
    ],
)
def test_the_wall_holds(kind: str, said: str, status: int) -> None:
    """Memory of its own is refused; what the kernel does not count there is looked for."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WALLED), kind],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout.startswith(said), done.stderr
    assert done.returncode == status


@pytest.mark.parametrize(
    ("limit_gib", "share", "room_gib"), [(None, 0.75, 60), (20, 0.25, 20), (70, 0.75, 60)]
)
def test_the_allocator_of_a_gpu_is_walled_in(
    monkeypatch: pytest.MonkeyPatch, limit_gib: int | None, share: float, room_gib: int
) -> None:
    """60 of 80 GiB are free there: no limit promises more."""
    import torch

    set_to: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda part, device: set_to.append(part)
    )
    limit_bytes = None if limit_gib is None else limit_gib * GIB
    assert room.wall_device(limit_bytes, torch.device("cuda")) == room_gib * GIB
    assert set_to == [share]


def test_a_container_has_no_more_than_its_own_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "CGROUPS", tmp_path)
    free = room.host_bytes()
    assert 0 < free < psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert room.host_bytes() > MIB
    (tmp_path / "memory.max").write_text(f"{300 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{100 * MIB}\n")
    assert room.host_bytes() == 200 * MIB
    (tmp_path / "memory.current").write_text(f"{400 * MIB}\n")
    assert room.host_bytes() == 0


REAL = """\
question: q?
stages: [teacher_fit, teacher_test, teacher_outputs]
base:
  data.synthetic: {users: 200, items: 100, mean_length: 6}
  student: {max_epochs: 1, hidden_size: 16}
  teacher: {inference_batch_size: 16}
  train: {max_epochs: 1}
  machine: {threads: 1, device: cpu}
"""


@pytest.mark.slow
def test_the_real_worker_is_searched_and_walled_in(bench: Bench) -> None:
    """The number is of a probe that ended; twice as much dies in the wall, and nothing else."""
    matrix = bench.matrix(REAL)
    done = command(matrix, "--setting", "train.batch_size", "--max-memory", 0.9)
    assert done.returncode == 0, done.stderr
    number = int(done.stdout.splitlines()[-1].split(": ")[1])
    assert 16 < number < 400
    assert f"train.batch_size = {number}: the largest batch found that leaves 10 %" in done.stdout
    searched = bench.matrix(REAL + "axes: {train.batch_size: [auto, 400]}\nmax_memory_gib: 0.7\n")
    planned = load_matrix(searched)
    cell = cells(planned, False)[0]
    (due,) = largest.due(planned, [cell], ())
    run = Run(bench.out / "m" / "r", planned, (cell,), (sys.executable, "-m", "bench.worker"))
    run.folder.mkdir(parents=True)
    from bench.execute import Progress
    from bench.schedule.memory_probes import Searcher, attempt

    quiet = Progress(*(lambda *_: None,) * 4)
    probe = attempt(Searcher(run, quiet, lambda: False), due, 400, {}, int(0.7 * GIB))
    assert (probe.status, probe.fits, probe.peak_bytes) == ("oom_host", False, None)

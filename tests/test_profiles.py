"""Profiles from outside: which cells get one, that no verdict sees it, what the report shows."""

import json
from pathlib import Path

import pytest
from fake_worker import stage_profile
from test_run import Bench, bench  # noqa: F401 (a fixture)

from bench.matrix import Matrix, cells
from bench.profile import profiles
from bench.reporting.profile_section import section
from bench.reporting.strings import words
from core.config import InputError

FIT, TEST = "teacher_fit", "teacher_test"


@pytest.fixture(scope="module")
def planned():
    axes = {"train.batch_size": [32, 64], "teacher.attn": ["sdpa", "eager"]}
    matrix = Matrix.model_validate({"question": "?", "stages": [FIT], "axes": axes})
    return cells(matrix, False)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], []),
        (["all"], ["baseline", "train.batch_size=64", "teacher.attn=eager"]),
        (["eager", "baseline"], ["baseline", "teacher.attn=eager"]),
        (["eager", "teacher.attn=eager"], ["teacher.attn=eager"]),
    ],
)
def test_cells_are_chosen_by_name_part_or_all(planned, words, names) -> None:
    assert profiles.chosen(planned, words) == names


def test_a_word_that_fits_no_cell_is_told_with_the_cells_there_are(planned) -> None:
    with pytest.raises(InputError, match=r"--profile train.batch_size=65: .*did you mean"):
        profiles.chosen(planned, ["train.batch_size=65"])


def without_times(folder: Path) -> list[dict]:
    lines = (folder / "records.jsonl").read_text().splitlines()
    moving = ("started", "process_wall_s", "process_phases")
    return [{k: v for k, v in json.loads(line).items() if k not in moving} for line in lines]


@pytest.fixture
def profiled(bench: Bench) -> Path:  # noqa: F811
    done = bench.run(bench.matrix(), "--profile", "all", **{"data__seed=1": {"profile": "oom_gpu"}})
    assert done.returncode == 0, done.stderr  # a profile that fails takes nothing from a verdict
    assert "then profiles of baseline, data.seed=1" in done.stdout
    assert "profile data.seed=1: oom_gpu in teacher_fit" in done.stdout
    order = [done.stdout.index(text) for text in ("block 2 baseline", "profile baseline: ok")]
    assert order == sorted(order)
    return bench.folders()[0]


def test_a_profile_changes_no_record(bench: Bench, profiled: Path) -> None:  # noqa: F811
    """Neither its lines nor the figures of the measured repeats."""
    done = bench.run(bench.matrix(name="plain"))
    assert done.returncode == 0, done.stderr
    plain = next((bench.out / "plain").iterdir())
    found = [record | {"matrix": "plain"} for record in without_times(profiled)]
    assert found == without_times(plain)


def test_the_report_links_what_was_made_and_says_what_was_not(profiled: Path) -> None:
    text = (profiled / "report.md").read_text()
    assert "### Profile of `baseline`" in text
    for stage in (FIT, TEST):
        link = f"profile/baseline/{stage}.trace.json.gz"
        assert f"({link})" in text
        assert (profiled / link).read_bytes() == b"trace"
    assert "| `aten::mm` " in text
    assert "oom\\_gpu" in text or "oom_gpu: in teacher" in text
    assert sorted(path.name for path in (profiled / "artefacts").iterdir()) == ["shared"]
    # The one that died had finished no more than its first stage.
    broken = {path.name for path in (profiled / "profile" / "data.seed=1").iterdir()}
    assert f"{FIT}.json" in broken and f"{TEST}.json" not in broken


@pytest.mark.slow
def test_a_finished_run_takes_a_profile_and_makes_it_once(bench: Bench) -> None:  # noqa: F811
    matrix = bench.matrix()
    bench.run(matrix)
    (folder,) = bench.folders()
    before = (folder / "records.jsonl").read_bytes()
    again = bench.run(matrix, "--resume", folder.name, "--profile", "seed")
    assert again.returncode == 0, again.stderr
    assert "profile data.seed=1: ok" in again.stdout
    assert (folder / "records.jsonl").read_bytes() == before
    assert [path.name for path in (folder / "profile").iterdir()] == ["data.seed=1"]
    third = bench.run(matrix, "--resume", folder.name)
    assert "profile data.seed=1: ok" not in third.stdout
    assert "### Profile of `data.seed=1`" in (folder / "report.md").read_text()


def test_a_cell_that_never_ran_is_not_profiled(bench: Bench) -> None:  # noqa: F811
    broken = {"data__seed=1": {"mode": "raise"}}
    done = bench.run(bench.matrix(), "--profile", "all", **broken)
    assert done.returncode == 1
    (folder,) = bench.folders()
    end = json.loads((folder / "profile" / "data.seed=1" / profiles.OUTCOME).read_text())
    assert end == {"status": "skipped", "reason": "no repeat of this cell ran to its end"}
    assert "no repeat of this cell ran to its end" in (folder / "report.md").read_text()


def test_a_cell_out_of_memory_is_profiled_for_its_snapshot(bench: Bench) -> None:  # noqa: F811
    both = {"mode": "oom_gpu", "profile": "oom_gpu"}
    bench.run(bench.matrix(), "--profile", "seed", **{"data__seed=1": both})
    (folder,) = bench.folders()
    end = json.loads((folder / "profile" / "data.seed=1" / profiles.OUTCOME).read_text())
    assert end["status"] == "oom_gpu"


def test_bad_words_stop_before_anything_is_written(bench: Bench) -> None:  # noqa: F811
    done = bench.run(bench.matrix(), "--profile", "sed=2")
    assert done.returncode == 2
    assert "--profile sed=2: no such cell" in done.stderr
    assert not bench.out.exists()


# ---- the section ----


def entry(**changes):
    stage = stage_profile(FIT) | changes
    made = profiles.Profile("baseline", "ok", None, "profile/baseline", (stage,), None)
    return section([made], [], words("en"))[0]


def test_the_section_tells_rates_operators_and_memory() -> None:
    found = entry()
    (row,) = [line for line in found["rates"].splitlines() if line.startswith(f"| {FIT}")]
    cells_of_row = [cell.strip() for cell in row.strip("|").split("|")]
    # 6 GFLOP in 0.1 s of 100 GFLOP/s; 2 GB/s of 10; the host's issue time is a GPU's affair.
    assert cells_of_row[1:4] == ["100", "1.0 %", "–"]
    assert cells_of_row[6:8] == ["0.0600", "60 %"]
    assert cells_of_row[9:11] == ["2.00", "20 %"]
    assert found["ceilings"] == "0.100 TFLOP/s for float32 products, 10.0 GB/s for copies"
    (stage,) = found["stages"]
    assert "`aten::mm` | 40 % |" in " ".join(stage["operators"].split())
    assert "60 %" in stage["operators"].splitlines()[-1]  # the rest
    assert "64.0 MiB" in stage["memory"] and "48.0 MiB in 12 tensors" in stage["memory"]
    assert "compute-bound" in stage["sentence"]
    assert stage["files"] == [(f"{FIT}.trace.json.gz", f"profile/baseline/{FIT}.trace.json.gz")]


def test_a_stage_without_a_trace_says_why() -> None:
    (stage,) = entry(window=None, files=[], missing="6 steps: a trace needs 8")["stages"]
    assert (stage["operators"], stage["memory"]) == ("", "")
    assert stage["missing"] == "6 steps: a trace needs 8"


def test_a_stage_without_steps_has_no_rates() -> None:
    assert entry(probes=[], window=None, counted=None)["rates"] == ""

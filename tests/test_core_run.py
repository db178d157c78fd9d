"""`python -m core.run`: the whole pipeline from a file to the comparison, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from core import run
from core.config import load_settings
from core.settings import StageName

ROOT = Path(__file__).parents[1]
TINY = """\
machine: {threads: 1, device: cpu}
data: {synthetic: {users: 60, items: 48, mean_length: 8}}
student: {max_epochs: 1, hidden_size: 16}
train: {max_epochs: 1, batch_size: 16}
distill: {max_epochs: 1}
"""
STAGES = list(get_args(StageName))

# `pipeline.prepare_process` silences these for a run; pytest sets the filters anew for each test.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def shell(*words, cwd: Path) -> subprocess.CompletedProcess:
    """The command in a process of its own, as typed."""
    command = [sys.executable, "-m", "core.run", *map(str, words)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(cwd), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def here(*words):
    """The command inside this process, where torch is loaded already."""
    return CliRunner().invoke(run.app, [str(word) for word in words])


def folder_of(output: str, base: Path) -> Path:
    """The run folder, which the last line names."""
    return base / output.splitlines()[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """One complete run, and the folder it was started in."""
    base = tmp_path_factory.mktemp("run")
    (base / "tiny.yaml").write_text(TINY)
    done = shell("tiny.yaml", cwd=base)
    assert done.returncode == 0, done.stderr
    return base, done


def test_the_whole_pipeline_ends_in_a_comparison_of_three_models(whole):
    base, done = whole
    assert done.stderr == ""
    for number, stage in enumerate(STAGES, 1):
        assert f"[{number}/9] {stage}: " in done.stdout
    folder = folder_of(done.stdout, base)
    assert folder.parent == base / "runs"
    rows = json.loads((folder / "all_evaluation_results.json").read_text())
    assert list(rows) == ["student", "teacher", "distilled"]
    table = [line.split() for line in done.stdout.splitlines() if line.startswith(" ")]
    shown = {words[0]: words[1:] for words in table if words}
    for name, row in rows.items():
        figures = [
            f"{row[f'{metric}@{k}']:.4f}" for k in (5, 10, 20) for metric in ("recall", "ndcg")
        ]
        assert shown[name][:6] == figures
    difference = rows["distilled"]["minus_student@10"]
    low, high = difference["recall@10_interval"]
    expected = [f"{difference['recall@10']:+.4f}", f"[{low:+.4f},", f"{high:+.4f}]"]
    assert shown["distilled"][6:] == expected
    assert shown["chance"][1] == f"{rows['student']['chance_recall@10']:.4f}"


def test_the_table_fits_eighty_columns(whole):
    lines = whole[1].stdout.splitlines()
    assert all(len(line) <= 80 for line in lines if line.startswith(" "))
    assert "…" not in whole[1].stdout


def test_the_run_folder_says_what_ran(whole):
    base, done = whole
    folder = folder_of(done.stdout, base)
    assert load_settings(folder / "settings.yaml") == load_settings(base / "tiny.yaml")
    made = json.loads((folder / "run.json").read_text())["stages"]
    assert list(made) == STAGES
    for name, entry in made.items():
        assert entry["wall_s"] > 0
        manifest = json.loads((base / entry["artefact"] / "manifest.json").read_text())
        assert manifest["stage"] == name


def test_a_second_run_reuses_everything_and_shows_the_same(whole, monkeypatch):
    base, done = whole
    monkeypatch.chdir(base)
    again = here("tiny.yaml")
    assert again.exit_code == 0, again.output
    assert again.output.count("unchanged, reused") == 9
    first, second = folder_of(done.stdout, base), folder_of(again.output, base)
    assert first != second
    name = "all_evaluation_results.json"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    entries = json.loads((second / "run.json").read_text())["stages"].values()
    assert {entry["wall_s"] for entry in entries} == {None}


def test_a_changed_setting_runs_what_depends_on_it(whole, monkeypatch):
    monkeypatch.chdir(whole[0])
    done = here("tiny.yaml", "--set", "distill.lam=0.3")
    assert done.exit_code == 0, done.output
    reused = [line.split()[1][:-1] for line in done.output.splitlines() if "reused" in line]
    assert reused == STAGES[:6]


def test_single_stages_run_in_order_and_build_on_what_is_there(whole, monkeypatch):
    monkeypatch.chdir(whole[0])
    done = here("tiny.yaml", "distill_test", "distill_fit", "--set", "distill.lr=0.01")
    assert done.exit_code == 0, done.output
    lines = [x for x in done.output.splitlines() if x.startswith("[") and ": epoch" not in x]
    assert [line.split(":")[0] for line in lines] == ["[1/2] distill_fit", "[2/2] distill_test"]
    assert "reused" not in done.output
    assert "recall@10" in lines[1] and "ndcg@10" in lines[1]
    assert "epoch 1/" in done.output and "min left" in done.output


def test_a_stage_without_the_ones_before_it_is_bad_input(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    done = here(tmp_path / "tiny.yaml", "teacher_fit", "--out", tmp_path / "runs")
    assert done.exit_code == 2
    assert "teacher_fit: prepare_data comes before and has not run" in done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["artefacts"]


def test_every_mistake_is_named_with_its_place_and_nothing_starts(tmp_path):
    """In a process of its own: this is also what a shell script sees."""
    (tmp_path / "bad.yaml").write_text("train:\n  percision: fp32\nstudent:\n  lr: fast\n")
    done = shell("bad.yaml", "--set", "teacher.atn=sdpa", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert "bad.yaml:2:3: train.percision: no such setting (did you mean train.precision?)" in lines
    assert any(line.startswith("bad.yaml:4:7: student.lr: 'fast'") for line in lines)
    assert (
        "--set teacher.atn=sdpa: teacher.atn: no such setting (did you mean teacher.attn?)" in lines
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["techer_fit"],
            "techer_fit: neither a settings file nor a stage (did you mean teacher_fit?)",
        ),
        (["tiny.yaml", "other.yaml"], "other.yaml: neither a settings file nor a stage"),
        (["absent.yaml"], "absent.yaml"),
        (["tiny.yaml", "--set", "data.source=csv", "--set", "data.root=none.csv"], "none.csv"),
        (
            ["tiny.yaml", "--set", "teacher.rec_model_checkpoint_path=none"],
            "none: no manifest.json",
        ),
        (["tiny.yaml", "--set", "teacher.lora_r=6"], "lora_r 6 is not a multiple of num_experts 4"),
    ],
)
def test_bad_input_is_refused_before_any_work(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    done = here(*words)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not list(tmp_path.glob("runs/2*")), "no run folder is begun"


def test_an_interrupt_keeps_finished_stages_and_says_so(tmp_path, monkeypatch):
    from core import pipeline, stages

    def interrupted(work: stages.Work) -> None:
        raise KeyboardInterrupt

    node = pipeline.PIPELINE["student_fit"]
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = (tmp_path / "tiny.yaml", "prepare_data", "student_fit", "--out", tmp_path / "runs")
    with monkeypatch.context() as patch:
        patch.setitem(
            pipeline.PIPELINE,
            "student_fit",
            pipeline.Stage(interrupted, node.needs, node.reads, node.uses),
        )
        stopped = here(*words)
    assert stopped.exit_code == 130
    assert "the same command goes on from there" in " ".join(stopped.output.split())
    done = here(*words)
    assert done.exit_code == 0, done.output
    assert "prepare_data: unchanged, reused" in done.output
    assert "student_fit: unchanged" not in done.output


def test_runs_begun_in_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run.time, "strftime", lambda *_: "20260101-000000")
    names = [run._new_folder(tmp_path).name for _ in range(3)]
    assert names == ["20260101-000000", "20260101-000000-2", "20260101-000000-3"]


def test_help_names_the_stages_argument():
    done = here("--help")
    assert done.exit_code == 0
    assert "the whole pipeline" in done.output


def test_a_dry_run_tries_every_stage_and_keeps_nothing(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    out = tmp_path / "runs"
    for _ in range(2):  # again, not reused
        done = here(tmp_path / "tiny.yaml", "--fast-dev-run", 2, "--out", out)
        assert done.exit_code == 0, done.output
        lines = done.output.splitlines()
        assert [line.split()[1][:-1] for line in lines[:-1]] == STAGES
        loaded = [line.split()[1][:-1] for line in lines if "give the model back" in line]
        assert loaded == ["student_fit", "teacher_fit", "distill_fit"]
        assert lines[-1] == "dry run: 9 stages, 2 batches of each phase; nothing is kept"
        assert not list(out.iterdir())


def test_a_dry_run_of_one_stage_tries_those_before_it_too(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = (tmp_path / "tiny.yaml", "student_test", "--fast-dev-run", 1)
    done = here(*words, "--out", tmp_path / "runs")
    assert done.exit_code == 0, done.output
    tried = [line.split()[1][:-1] for line in done.output.splitlines()[:-1]]
    assert tried == ["prepare_data", "student_fit", "student_test"]


def test_a_dry_run_meets_the_missing_last_stage_in_seconds(tmp_path, monkeypatch):
    from core import pipeline, stages

    def missing(work: stages.Work) -> None:
        raise NotImplementedError("no test step")

    node = pipeline.PIPELINE["distill_test"]
    broken = pipeline.Stage(missing, node.needs, node.reads, node.uses)
    monkeypatch.setitem(pipeline.PIPELINE, "distill_test", broken)
    (tmp_path / "tiny.yaml").write_text(TINY.replace("max_epochs: 1", "max_epochs: 1000"))
    done = here(tmp_path / "tiny.yaml", "--fast-dev-run", 2, "--out", tmp_path / "runs")
    assert isinstance(done.exception, NotImplementedError)
    assert "[7/9] distill_fit" in done.output
    assert not list((tmp_path / "runs").iterdir())


def test_a_dry_run_of_no_batches_is_bad_input():
    assert here("--fast-dev-run", 0).exit_code == 2

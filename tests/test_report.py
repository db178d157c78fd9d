"""The report as a pure function: golden files, escaping, what it says first, and the settings file.

After a wanted change: `UPDATE_GOLDEN=1 python -m pytest tests/test_report.py`, then read the diff.
The SVG files are those of the matplotlib pinned in constraints.txt.
"""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_records import MACHINE, MATRIX, all_records, ok_record, report_cells

from bench.ledger import ledger, mean_phases
from bench.report import render, write
from bench.tables import code, figure, plain, table
from bench.verdicts import judge
from core.config import load_settings

GOLDEN = Path(__file__).parent / "golden" / "report"
FOLDER = "reports/teacher_speed/20261120-181530"


def report_files(records=None, cells=None, machine=MACHINE):
    records = all_records() if records is None else records
    cells = cells or report_cells()
    return render(MATRIX, cells, records, judge(MATRIX, cells, records), machine, FOLDER)


@pytest.fixture(scope="module")
def files():
    return report_files()


@pytest.fixture(scope="module")
def text(files):
    return files["report.md"]


def section(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_golden_files(files):
    if os.environ.get("UPDATE_GOLDEN") == "1":
        GOLDEN.mkdir(parents=True, exist_ok=True)
        for stale in GOLDEN.iterdir():
            stale.unlink()
        for name, content in files.items():
            (GOLDEN / name).write_text(content, encoding="utf-8")
    assert {path.name for path in GOLDEN.iterdir()} == set(files)
    for name, content in files.items():
        assert (GOLDEN / name).read_text(encoding="utf-8") == content, name


def test_equal_records_give_equal_bytes_in_any_order_of_writing(files):
    assert report_files() == files
    assert (
        report_files(records=list(reversed(all_records())))["ratio-total.svg"]
        == (files["ratio-total.svg"])
    )


def test_the_answer_comes_first(text):
    first = text.split("\n")[2]
    best = "train.precision=bf16-mixed, teacher.inference_batch_size=256"
    assert first.startswith(f"**Use `{best}`:**")
    assert re.search(r"\d+\.\d % less time .* \(ratio 0\.\d+, interval 0\.\d+ to 0\.\d+\)", first)
    order = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert order == [
        "Warnings",
        "Time and memory",
        "Cells and repeats without figures",
        "Proofs",
        "Quality",
        "Where the time went",
        "What was cut",
        "Machine",
        "How to repeat",
    ]


def test_every_status_and_reason_is_told(text):
    lost = section(text, "Cells and repeats without figures")
    for status in [
        "oom_gpu",
        "oom_host",
        "timeout",
        "killed",
        "driver",
        "import",
        "silent_exit",
        "bad_output",
        "error",
        "unsupported",
        "skipped",
    ]:
        assert f"| {status} " in lost
    assert "no container engine" in lost


def test_a_cell_not_in_effect_has_no_ratio_and_no_bar(files):
    timed = section(files["report.md"], "Time and memory")
    rows = [
        line for line in timed.splitlines() if line.startswith("| `train.precision=fp16-mixed`")
    ]
    assert len(rows) == 4
    for row in rows:
        assert not re.search(r"[01]\.\d{3}", row)
        assert "| not in effect " in row
    bars = files["ratio-teacher_fit.svg"].count("fill: #1a7f37; opacity: 0.75")
    assert bars == 2


def test_unavailable_memory_is_a_reason_and_never_zero(text):
    assert "device memory not available: NVML: not supported inside this sandbox." in text
    assert "device GiB" not in text
    assert "0.00 |" not in section(text, "Time and memory")


def test_the_report_reads_no_clock_and_names_no_draft(files):
    for content in files.values():
        assert "<dc:date>" not in content
        assert "matplotlib.org" not in content.replace("http://matplotlib.org/", "")


def test_best_settings_are_complete_and_load(files, tmp_path):
    path = tmp_path / "best.yaml"
    path.write_text(files["best.yaml"])
    cell = next(cell for cell in report_cells() if "bf16-mixed, " in cell.name)
    assert load_settings(path) == cell.settings
    assert files["best.yaml"].startswith(f"# Best cell of teacher_speed: {cell.name} (")


def test_without_a_winner_the_baseline_is_kept_with_the_reason():
    cells = [cell for cell in report_cells() if "bf16" not in cell.name and "=256" not in cell.name]
    names = {cell.name for cell in cells}
    kept = report_files([r for r in all_records() if r["cell"] in names], cells)
    first = kept["report.md"].split("\n")[2]
    assert first.startswith("**Keep the baseline:** no other cell was proven faster on the whole (")
    assert "2 slower" in first
    assert "# Best cell of teacher_speed: baseline (no other cell" in kept["best.yaml"]


def test_a_run_without_any_figure_still_gives_a_report():
    empty = report_files([])["report.md"]
    assert "**Keep the baseline:**" in empty
    assert "No stage was measured." in empty
    assert "the run ended before it" in section(empty, "Cells and repeats without figures")


def test_quality_is_told_to_be_missing():
    records = [record | {"ranks": None, "metrics": {}} for record in all_records()]
    silent = report_files(records)["report.md"]
    assert "Not measured: no stage of this matrix ranks users." in section(silent, "Quality")
    assert "Quality was not measured" in section(silent, "Warnings")


def test_write_replaces_whole_files(tmp_path):
    folder = tmp_path / "reports" / "teacher_speed" / "20261120-181530"
    folder.mkdir(parents=True)
    (folder / "ratio-distill_fit.svg").write_text("of an earlier report")
    cells, records = report_cells(), all_records()
    judgement = judge(MATRIX, cells, records)
    assert write(folder, MATRIX, cells, records, judgement, MACHINE) == folder / "report.md"
    assert {path.name for path in folder.iterdir()} == set(report_files())
    expected = render(MATRIX, cells, records, judgement, MACHINE, folder.as_posix())
    assert (folder / "report.md").read_text() == expected["report.md"]


def test_links_of_the_report_exist(files, text):
    linked = re.findall(r"\]\(([^)]+\.svg)\)", text)
    assert set(linked) == {name for name in files if name.endswith(".svg")}


@given(st.text(st.sampled_from("\\|`<*_ \n\x1bab"), max_size=12) | st.text(max_size=40))
def test_foreign_text_stays_in_its_cell(foreign):
    lines = table(["a", "b"], [[code(foreign), plain(foreign)]]).splitlines()
    assert len(lines) == 3
    for line in lines:
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.00123456, "0.00123"),
        (1.5, "1.50"),
        (139.44, "139"),
        (5e4, "50000"),
    ],
)
def test_figures_have_three_digits(value, words):
    assert figure(value) == words


def test_the_ledger_adds_up_and_shows_what_nobody_named():
    cell = report_cells()[0]
    record = ok_record(cell, 0, "teacher_fit")
    record = record | {"wall_s": 10.0, "phases": {"train_steps": 6.0, "unaccounted": 1.0}}
    phases = mean_phases([record])
    assert sum(phases.values()) == pytest.approx(10.0)
    lines = ledger({"teacher_fit": [record]})
    assert re.search(r"unaccounted +\| 4\.00 s \(40\.0 %\)", lines)

"""The report as a pure function: golden files, escaping, what it says first, tables that fit.

After a wanted change: `UPDATE_GOLDEN=1 python -m pytest tests/test_report.py`, then read the diff.
The SVG files are those of the matplotlib pinned in constraints.txt.
"""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_records import (
    COMPILE_S,
    FIT,
    MACHINE,
    MATRIX,
    REPEATS,
    SECONDS_PER_SAMPLE,
    STAGES,
    all_records,
    ok_record,
    report_cells,
)
from typer.testing import CliRunner

from bench.matrix import Matrix, cells, resolved
from bench.report import app, render, write
from bench.reporting.failures import TAIL_LINES, shown
from bench.reporting.ledger import ledger, mean_phases
from bench.reporting.page import anchor, page
from bench.reporting.strings import words
from bench.reporting.tables import LONGEST_TEXT, code, figure, plain, table
from bench.verdicts import judge
from core.config import load_settings

GOLDEN = Path(__file__).parent / "golden" / "report"
FOLDER = Path("reports/teacher_speed/20261120-181530")
SAY = words("en")


def report_files(records=None, cells=None, language="en", **choice):
    """The synthetic run's report; `choice`: fields of the matrix to replace."""
    records = all_records() if records is None else records
    cells, matrix = cells or report_cells(), MATRIX.model_copy(update=choice)
    judged = judge(matrix, cells, records)
    return render(matrix, cells, records, judged, MACHINE, FOLDER, (), language)


def small_report(axes, change=lambda record: record, **base):
    """The report of a clean run of a few cells; `change` is made to every record."""
    base.setdefault("teacher", {})
    matrix = Matrix(question="Does it help?", stages=STAGES, axes=axes, base=base, repeats=REPEATS)
    planned = cells(matrix, True)
    records = [
        change(ok_record(cell, block, stage))
        for block in range(REPEATS)
        for cell in planned
        for stage in STAGES
    ]
    return render(matrix, planned, records, judge(matrix, planned, records), MACHINE, FOLDER)[
        "report.md"
    ]


def rows_of(text, cell):
    """The printed cells of every table row that starts with a matrix cell's name."""
    whole = text.replace("`,<br>`", ", ")
    lines = [line for line in whole.splitlines() if line.startswith(f"| `{cell}`")]
    return [[part.strip() for part in line.strip("|").split(" |")] for line in lines]


@pytest.fixture(scope="module")
def files():
    return report_files()


@pytest.fixture(scope="module")
def japanese():
    return report_files(language="ja")


@pytest.fixture(scope="module")
def text(files):
    return files["report.md"]


def section(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_golden_files(files, japanese):
    """All but the HTML page, which is the Markdown and the pictures once more."""
    kept = {name: text for name, text in files.items() if name != "report.html"}
    kept["report.ja.md"] = japanese["report.md"]
    if os.environ.get("UPDATE_GOLDEN") == "1":
        GOLDEN.mkdir(parents=True, exist_ok=True)
        for stale in GOLDEN.iterdir():
            stale.unlink()
        for name, content in kept.items():
            (GOLDEN / name).write_text(content, encoding="utf-8")
    assert {path.name for path in GOLDEN.iterdir()} == set(kept)
    for name, content in kept.items():
        assert (GOLDEN / name).read_text(encoding="utf-8") == content, name


def test_equal_records_give_equal_bytes_in_any_order_of_writing(files):
    assert report_files() == files
    turned = report_files(records=list(reversed(all_records())))
    for name in ("ratio-total.svg", "pareto.svg", "summary.json"):
        assert turned[name] == files[name]


def test_the_answer_comes_first_and_in_three_lines(text):
    lines = text.split("\n")
    best = "train.precision=bf16-mixed, teacher.inference_batch_size=256"
    assert lines[2].startswith(f"- **Use `{best}`:** the fastest of 3 cells proven faster")
    assert re.match(r"- \*\*How much, how sure:\*\* \d+\.\d % less time than", lines[3])
    assert re.search(r"\(ratio 0\.\d+, 95 % interval 0\.\d+ to 0\.\d+, 5 repeats\)", lines[3])
    assert "40.4 % less memory at the peak (reserved 5.35 → 3.19 GiB)" in lines[3]
    assert "recall@10 0.1075, not worse" in lines[3]
    assert lines[4].startswith("- **Beware:** measured on a part of the work (`data.limit_data_ro")
    assert lines[4].endswith("more under [Warnings](#warnings).")
    assert lines[5] == ""
    order = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert order == [
        "Warnings",
        "Time and memory",
        "Cells and repeats without figures",
        "Proofs",
        "Quality",
        "Where the time went",
        "Compilation",
        "What was cut",
        "Machine",
        "How to repeat",
    ]


def table_cells(text):
    """Every line of every cell of every table."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    parts = [re.split(r"(?<!\\)\|", row) for row in rows if not set(row) <= set("|:- ")]
    return [line.strip() for row in parts for cell in row for line in cell.split("<br>")]


def test_no_table_cell_is_too_long(text):
    assert max(map(len, table_cells(text))) <= LONGEST_TEXT
    longest = "x" * 30 + " and " + "y " * 200
    long = [r | {"reason": longest} if r["status"] == "oom_gpu" else r for r in all_records()]
    lost = section(report_files(long)["report.md"], "Cells and repeats without figures")
    assert max(map(len, table_cells(lost))) <= LONGEST_TEXT
    assert longest.strip() in lost, "in full below the table"


def test_long_proofs_stand_in_full_below_their_table(text):
    proofs = section(text, "Proofs")
    shown, _, full = proofs.partition("<details><summary>Proofs too long for the table: ")
    seen = "25 float32 products, autocast off, trainable 30 float32, frozen 60 float32"
    assert seen not in shown and seen in full
    assert "**does not hold**" in shown and "**does not hold**" in full
    assert full.count("</details>") == 1


def test_names_of_many_settings_take_a_line_each():
    axes = {
        "teacher.inference_batch_size": [64, 256],
        "teacher.gradient_checkpointing": [False, True],
        "train.precision": ["fp32", "bf16-mixed"],
    }
    matrix = Matrix(question="?", stages=STAGES, axes=axes, design="grid", repeats=REPEATS)
    planned = cells(matrix, True)
    records = [ok_record(c, b, s) for b in range(REPEATS) for c in planned for s in STAGES]
    made = render(matrix, planned, records, judge(matrix, planned, records), MACHINE, FOLDER)
    timed = section(made["report.md"], "Time and memory")
    assert (
        "| `teacher.inference_batch_size=256`,<br>`teacher.gradient_checkpointing=true`,"
        "<br>`train.precision=bf16-mixed` |"
    ) in timed
    assert max(map(len, table_cells(timed))) <= 60


def test_every_status_and_reason_is_told(text):
    lost = section(text, "Cells and repeats without figures")
    for status in [
        "oom_gpu",
        "oom_host",
        "timeout(compile)",
        "timeout(train_steps)",
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
    assert bars == 3


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
    first, second = kept["report.md"].split("\n")[2:4]
    assert first.startswith(
        "- **Keep the baseline:** no other cell was proven faster on the whole ("
    )
    assert "2 slower, 2 with failed repeats" in first
    assert re.search(r"comparisons over 5 repeats; total times that differ by \d", second)
    assert "# Best cell of teacher_speed: baseline (no other cell" in kept["best.yaml"]


def test_one_cell_alone_has_one_smallest_difference():
    text = small_report({"train.num_workers": [0, 2]})
    assert text.count("would have been seen") == 1
    assert "(steadiest cell)" not in text and "% would have been seen" in text


def test_a_run_without_any_figure_still_gives_a_report():
    empty = report_files([])["report.md"]
    assert "**Keep the baseline:**" in empty
    assert "nothing could be compared" in empty
    assert "No stage was measured." in empty
    assert "the run ended before it" in section(empty, "Cells and repeats without figures")


def test_quality_is_told_to_be_missing():
    records = [record | {"ranks": None, "metrics": {}} for record in all_records()]
    silent = report_files(records)["report.md"]
    assert "Ranking not measured: no stage of this matrix ranks users." in section(
        silent, "Quality"
    )
    assert "Quality was not measured" in section(silent, "Warnings")


def test_write_replaces_whole_files_and_removes_what_is_stale(tmp_path):
    folder = tmp_path / "reports" / "teacher_speed" / "20261120-181530"
    folder.mkdir(parents=True)
    (folder / "ratio-distill_fit.svg").write_text("of an earlier report")
    cells, records = report_cells(), all_records()
    judgement = judge(MATRIX, cells, records)
    assert write(folder, MATRIX, cells, records, judgement, MACHINE) == folder / "report.md"
    assert {path.name for path in folder.iterdir()} == set(report_files())
    expected = render(MATRIX, cells, records, judgement, MACHINE, folder)
    assert (folder / "report.md").read_text() == expected["report.md"]
    refusing = MATRIX.model_copy(update={"max_memory_gib": 0.1})
    write(folder, refusing, cells, records, judge(refusing, cells, records), MACHINE)
    assert not (folder / "best.yaml").exists(), "no settings file where nothing is recommended"


def test_a_run_folder_gives_its_report_again(tmp_path):
    """From the files alone, the same bytes; other choices and languages on request."""
    folder = tmp_path / "teacher_speed" / "20261120-181530"
    folder.mkdir(parents=True)
    (folder / "matrix.yaml").write_text(resolved(MATRIX))
    (folder / "machine.json").write_text(json.dumps(MACHINE))
    lines = [json.dumps(record) + "\n" for record in all_records()]
    (folder / "records.jsonl").write_text("".join(lines))
    found = CliRunner().invoke(app, [str(folder)])
    assert found.exit_code == 0, found.output
    assert found.output.splitlines()[-1] == str(folder / "report.md")
    cells, records = report_cells(), all_records()
    expected = render(MATRIX, cells, records, judge(MATRIX, cells, records), MACHINE, folder)
    assert {p.name: p.read_text() for p in folder.iterdir() if p.name in expected} == expected
    assert not (tmp_path / "index.md").exists(), "a folder of runs has a list already"
    words = [str(folder), "--lang", "ja", "--objective", "memory", "--max-memory", "4"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert "**推奨は `teacher.adapter=qlora`：**" in (folder / "report.md").read_text()


def test_records_of_another_version_keep_the_report_they_have(tmp_path):
    (tmp_path / "matrix.yaml").write_text(resolved(MATRIX))
    (tmp_path / "machine.json").write_text(json.dumps(MACHINE | {"git": {"commit": "0123456789"}}))
    old = ok_record(report_cells()[0], 0, FIT) | {"key": "of-older-settings"}
    (tmp_path / "records.jsonl").write_text(json.dumps(old) + "\n")
    (tmp_path / "report.md").write_text("as it was")
    found = CliRunner().invoke(app, [str(tmp_path)])
    assert found.exit_code == 2
    assert "baseline was measured with other settings than this version has" in found.output
    assert "make it with the code of commit 012345678" in found.output
    assert (tmp_path / "report.md").read_text() == "as it was"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--lang", "jp"], "--lang jp: not one of en, ja"),
        (["--objective", "speed"], "objective: 'speed' is not one of time, memory, both"),
        (["--max-memory", "-1"], "max_memory_gib"),
    ],
)
def test_bad_choices_are_told_in_one_line(tmp_path, words, complaint):
    (tmp_path / "matrix.yaml").write_text(resolved(MATRIX))
    (tmp_path / "machine.json").write_text(json.dumps(MACHINE))
    (tmp_path / "records.jsonl").write_text("")
    found = CliRunner().invoke(app, [str(tmp_path), *words])
    assert found.exit_code == 2
    assert complaint in found.output
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize("language", ["en", "ja"])
def test_links_and_anchors_of_the_report_lead_somewhere(files, japanese, language):
    made = files if language == "en" else japanese
    links = re.findall(r"\]\(([^)]+)\)", made["report.md"])
    linked = {link for link in links if link.endswith(".svg")}
    assert linked == {name for name in made if name.endswith(".svg")}
    headings = re.findall(r"^#+ (.*)$", made["report.md"], re.MULTILINE)
    anchors = {link[1:] for link in links if link.startswith("#")}
    assert len(anchors) >= 8
    assert anchors <= {anchor(heading) for heading in headings}
    assert anchors <= set(re.findall(r' id="([^"]+)"', made["report.html"]))


# ---- the page


def test_the_page_needs_nothing_else(files):
    page = files["report.html"]
    assert page.count("<svg ") == sum(name.endswith(".svg") for name in files)
    for foreign in ("<script", "<img", "<link", "@import", "<?xml", "<!DOCTYPE svg", "src="):
        assert foreign not in page
    assert re.findall(r"https?://(?!www\.w3\.org)[^\"' ]+", page) == []
    assert "prefers-color-scheme: dark" in page
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names)), "charts on one page share no names"
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([\w.-]+)"', page))
    assert used <= set(names)


def test_the_page_says_what_the_markdown_says(files):
    page = files["report.html"]
    assert page.count("<table>") == len(re.findall(r"^\|:?-", files["report.md"], re.MULTILINE))
    assert page.count("<details>") == page.count("</details>") == 2
    assert "<title>teacher_speed: Which setting makes" in page
    assert 'lang="ja"' in report_files(language="ja")["report.html"]


@given(st.text(max_size=60) | st.text(st.sampled_from("<>&\"'`\\*[]()!|_ script/"), max_size=30))
def test_foreign_text_makes_no_tag_on_the_page(foreign):
    markdown = f"# {plain(foreign)}\n\n- {plain(foreign)} {code(foreign)}\n"
    tags = set(re.findall(r"<(/?\w+)", page(markdown, {}, "en").partition("<body>")[2]))
    assert tags <= {f"{end}{name}" for end in ("", "/") for name in
                    ("h1", "ul", "li", "code", "em", "strong", "body", "html")}  # fmt: skip


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
    lines = ledger({"teacher_fit": [record]}, SAY)
    assert re.search(r"unaccounted +\| 4\.00 s \(40\.0 %\)", lines)


# ---- more than one difference, and none


QLORA = {"teacher.adapter": ["lora", "qlora"]}
LEFT_TO_PEFT = {
    "teacher": {"gradient_checkpointing": None},
    "train": {"precision": "bf16-mixed"},
}


def test_what_peft_switched_on_stands_in_verdict_headline_and_warnings():
    """The users' comparison of QLoRA with LoRA, in which checkpointing changed unasked."""
    text = small_report(QLORA, **LEFT_TO_PEFT)
    recomputed = "gradient checkpointing (switched on by peft): each layer runs ×2, baseline ×1"
    upcast = "frozen weights that are not packed held in float32, baseline bfloat16"
    told = section(text, "Warnings")
    assert (
        "- teacher.adapter=qlora: more than the setting under test differs: "
        f"{recomputed} (teacher_fit); {upcast} (teacher_fit, teacher_test, teacher_outputs)"
    ) in told
    assert "`matrices/qlora_checkpointing.yaml` asks that question" in told
    rows = rows_of(section(text, "Time and memory"), "teacher.adapter=qlora")
    assert len(rows) == 4
    assert {row[-2] for row in rows} == {"slower; **more than the setting differs**"}
    head = text.split("\n\n")[1]
    assert "other cells compared in more than one difference, or none: 1" in head


def test_a_winner_with_a_second_difference_carries_its_caveat():
    def faster(record):
        if record["cell"] == "baseline":
            return record
        steps = [step | {"seconds": 0.5 * step["seconds"]} for step in record["steps"]]
        return record | {"steps": steps, "wall_s": 0.5 * record["wall_s"]}

    text = small_report(QLORA, faster, **LEFT_TO_PEFT)
    best, _, doubts = text.split("\n\n")[1].splitlines()
    assert "**Use `teacher.adapter=qlora`:**" in best
    assert doubts.startswith(
        "- **Beware:** the recommended cell differs from the baseline in more than its setting"
    )
    assert "compared in more than one difference" not in doubts
    told = section(text, "Warnings")
    assert "gradient checkpointing (switched on by peft): each layer runs ×2, baseline ×1" in told


def test_an_equalised_comparison_has_no_caveat():
    equal = {"teacher": {"gradient_checkpointing": True}}

    def by_setting(record):
        facts = record["facts"] | {"gradient_checkpointing_by": "setting"}
        return record | {"facts": facts}

    text = small_report(QLORA, by_setting, **equal)
    assert "more than the setting" not in text
    assert "more than its setting" not in text


def test_an_effect_that_fails_to_show_is_told_beside_the_verdict():
    text = small_report(
        {"teacher.attn": ["sdpa", "eager"]}, lambda record: record | {"losses": [1.0, 0.5]}
    )
    rows = rows_of(section(text, "Time and memory"), "teacher.attn=eager")
    marked = ["no effect visible" in row[-2] for row in rows]
    assert marked == [True, True, True, True]


# ---- loader wait


def test_low_loader_wait_explains_why_workers_change_nothing(text):
    said = "Loader wait was 0.4 % of the baseline's step time: more workers cannot help."
    assert section(text, "Time and memory").count(said) == 3
    assert "Loader wait" not in small_report({"teacher.attn": ["sdpa", "eager"]})


def test_high_loader_wait_is_told_wherever_something_stays_slow():
    def waiting(record):
        return record | {"loader_wait_s": 0.35 * sum(s["seconds"] for s in record["steps"])}

    slow = small_report({"teacher.attn": ["sdpa", "eager"]}, waiting)
    said = "Loader wait was 35.0 % of the baseline's step time: loader workers can gain that much"
    assert section(slow, "Time and memory").count(said) == 3
    assert "more workers cannot help" not in slow
    all_faster = small_report({"train.precision": ["fp32", "bf16-mixed"]}, waiting)
    assert "Loader wait" not in all_faster


# ---- compilation


def test_compiling_is_paid_back_or_never(text):
    rows = rows_of(section(text, "Compilation"), "train.compile=regional")
    assert [row[1] for row in rows] == list(STAGES)
    fit, tested, _ = rows
    compiled_ms, eager_ms = float(fit[8]), float(fit[9])
    assert eager_ms == pytest.approx(1000 * 32 * SECONDS_PER_SAMPLE[FIT], rel=0.03)
    paid = 1000 * COMPILE_S[FIT] / (eager_ms - compiled_ms)
    assert int(fit[10]) == pytest.approx(paid, rel=0.1)
    assert tested[10] == "never"
    assert fit[2:8] == ["regional", "14.2", "cold", "2", "1", "1"]
    broke = r"- Graph break: data-dependent \| branch on \`len\` (`train.compile=regional`)"
    assert broke in section(text, "Compilation")


def test_without_compiling_there_is_no_such_section():
    assert "## Compilation" not in small_report({"teacher.attn": ["sdpa", "eager"]})


def test_the_limit_of_recompiles_is_not_in_effect_and_shown():
    def limited(record):
        seen = record["facts"]["compile"] | {"limit_reached": record["cell"] != "baseline"}
        return record | {"facts": record["facts"] | {"compile": seen}}

    text = small_report({"train.compile": ["off", "regional"]}, limited)
    cell = "train.compile=regional"
    assert {row[-2] for row in rows_of(section(text, "Time and memory"), cell)} == {"not in effect"}
    assert rows_of(section(text, "Compilation"), cell)[0][7] == "1, **limit reached**"


def test_a_compiled_cell_is_compared_with_its_eager_twin():
    """In a grid the baseline differs in more than compilation."""
    axes = {"train.precision": ["fp32", "bf16-mixed"], "train.compile": ["off", "regional"]}
    matrix = Matrix(question="?", stages=STAGES, axes=axes, design="grid", repeats=REPEATS)
    planned = cells(matrix, True)
    records = [ok_record(c, b, s) for b in range(REPEATS) for c in planned for s in STAGES]
    judged = judge(matrix, planned, records)
    text = render(matrix, planned, records, judged, MACHINE, FOLDER)["report.md"]
    both = "train.precision=bf16-mixed, train.compile=regional"
    (fit, *_) = rows_of(section(text, "Compilation"), both)
    twin = next(r for r in judged.tables[FIT] if r.cell == "train.precision=bf16-mixed")
    assert float(fit[9]) == pytest.approx(1000 * twin.step_s, rel=0.01)


# ---- effective batch


def test_rows_of_an_update_and_the_updates_done_are_told_where_they_differ(text):
    rows = rows_of(section(text, "Time and memory"), "train.accumulate_grad_batches=4")
    fit = next(row for row in rows if "32 × 4 = 128" in row)
    assert "worse quality" in fit
    assert (
        "Optimizer steps done in teacher_fit: 24 in the baseline, "
        "6 with `train.accumulate_grad_batches=4`."
    ) in text
    same = small_report({"teacher.attn": ["sdpa", "eager"]})
    assert "rows an update" not in same
    assert "Optimizer steps done" not in same


# ---- failures


def test_a_known_failure_stands_under_its_log(text):
    lost = section(text, "Cells and repeats without figures")
    block = lost[lost.index("`teacher.lora_r=32`, import") :].split("\n\n")
    assert block[1] == "    ImportError: …/flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9"
    assert block[2].startswith("D7: ")
    assert "*Try:* install the wheel" in block[2]
    compiling = lost[lost.index("`train.compile=whole`, timeout(compile)") :].split("\n\n")
    assert compiling[1] == (
        "    W1120 torch/_dynamo function: forward\n    last reason: lengths differ"
    )
    assert compiling[2].startswith("D18: ")


def test_a_rule_is_told_in_full_once_and_not_again_of_a_row_that_waited():
    oom = {"status": "oom_gpu", "reason": "CUDA out of memory", "log_tail": ["CUDA out of memory"]}
    waits = {"status": "skipped", "reason": "preflight failed: silent_exit in teacher_fit"}
    silent = {"status": "silent_exit", "reason": "preflight: exit 0 without an end record"}
    changes = {
        ("teacher.attn=eager", FIT): oom,
        ("teacher.lora_r=16", FIT): oom,
        ("train.trainer=lightning", FIT): silent,
        ("train.trainer=lightning", STAGES[1]): waits,
    }
    records = [r | changes.get((r["cell"], r["stage"]), {}) for r in all_records()]
    lost = section(report_files(records)["report.md"], "Cells and repeats without figures")
    assert lost.count("D25: one step is too large") == 1
    assert lost.count("D25: as above.") == 2
    assert "`train.trainer=lightning`, silent_exit in teacher_fit:" in lost
    assert "`train.trainer=lightning`, skipped" not in lost


def test_nothing_known_is_no_block(text):
    assert "`train.accumulate_grad_batches=8`, killed" not in text


def test_a_log_travels_without_folders_colours_and_excess():
    assert shown('  File "/srv/me/core/loop.py", line 3') == '  File "…/loop.py", line 3'
    assert shown("see https://example.org/a/b and core/loop.py") == (
        "see https://example.org/a/b and core/loop.py"
    )
    assert shown("\x1b[31mred\x1b[0m\x07") == "red"
    assert len(shown("x" * 500)) == 160
    record = next(r for r in all_records() if r["cell"] == "train.batch_size=128")
    long = [
        r | {"log_tail": ["x"] * 40} if r["cell"] == record["cell"] else r for r in all_records()
    ]
    assert (
        section(report_files(long)["report.md"], "Cells and repeats without figures").count(
            "    x\n"
        )
        == TAIL_LINES
    )

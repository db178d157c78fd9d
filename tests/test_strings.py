"""Every text of a report has both languages, and nothing English slips into a Japanese one."""

import ast
import re
import string
from pathlib import Path

import pytest
from synthetic_records import (
    FIT,
    MACHINE,
    MATRIX,
    STAGES,
    all_records,
    report_cells,
)

from bench.checkup import rules
from bench.judging.comparisons import NO_RECORD
from bench.proofs import PROOFS
from bench.proving import differences
from bench.report import render
from bench.reporting.strings import LANGUAGES, Message, Words, chosen_language, table, words
from bench.verdicts import judge
from core.config import InputError

ROOT = Path(__file__).parent.parent
SAY = words("ja")
FOLDER = Path("reports/teacher_speed/20261120-181530")
CODES = set(
    re.findall(
        r"\w+",
        """faster slower same undecided unproven baseline, worse quality, not in effect
        oom_gpu oom_host timeout killed driver import silent_exit bad_output error unsupported
        skipped compile train_steps teacher_fit teacher_test teacher_outputs start_up total GiB
        NVIDIA container toolkit""",
    )
)
"""Words of the vocabulary, and names, which are the same in every language."""


def entries():
    said = [(key, entry) for key, entry in table()["said"].items()]
    return said + [(entry["en"], entry) for entry in table()["recognised"]]


def placeholders(text):
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


@pytest.mark.parametrize(("key", "entry"), entries(), ids=lambda value: str(value)[:40])
def test_both_languages_say_everything_with_the_same_placeholders(key, entry):
    assert set(entry) == set(LANGUAGES)
    assert placeholders(entry["en"]) == placeholders(entry["ja"])
    assert "" not in placeholders(entry["en"]), "a placeholder has a name"
    assert bool(entry["en"]) == bool(entry["ja"])


def sources():
    paths = [*ROOT.glob("bench/**/*.py"), *ROOT.glob("bench/templates/*.j2")]
    return "\n".join(path.read_text() for path in paths)


def test_every_key_that_is_said_is_in_the_table():
    said = set(re.findall(r"\bsay\(\s*\"([^\"]+)\"", sources()))
    said |= set(re.findall(r"\bMessage\(\s*\"([^\"]+)\"", sources()))
    assert len(said) > 100
    assert said <= set(table()["said"])


def test_a_key_nobody_says_is_no_part_of_the_table():
    text = sources()
    written = set(re.findall(r"[\"']([a-z_]+(?:\.[a-z_]+)*)[\"']", text))
    made = set(re.findall(r"f\"([a-z_.]+)\.\{", text))  # say(f"head.{name}")
    unused = {
        key
        for key in table()["said"]
        if key not in written and not any(key.startswith(f"{stem}.") for stem in made)
    }
    assert not unused


def sentences(module):
    """What a module's `Finding`s say, with 7 in place of every value."""
    tree = ast.parse(next(ROOT.glob(f"bench/**/{module}.py")).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [call for call in calls if getattr(call.func, "id", "") == "Finding"]
    for argument in [argument for call in found for argument in call.args]:
        if isinstance(argument, ast.Constant) and argument.value:
            yield argument.value
        if isinstance(argument, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else "7" for part in argument.values
            )


@pytest.mark.parametrize("text", [*sentences("findings"), *sentences("conduct")])
def test_a_warning_has_a_japanese_form(text):
    """Give a new sentence one in bench/templates/strings.yaml, under `recognised`."""
    if len(re.findall("[a-z]{2,}", text)) > 2:  # else it is put together of others
        assert SAY.foreign(text) != text


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.id)
def test_every_known_failure_is_explained_in_japanese(rule):
    for text in (rule.cause, rule.remedy):
        assert SAY.foreign(text) != text
        assert not leaked(SAY.foreign(text))


@pytest.mark.parametrize("label", [*differences.LABELS.values(), "loader_workers:"])
def test_a_difference_has_a_japanese_form(label):
    for by in ("", " (switched on by peft)"):
        said = SAY.foreign(f"{label.format(by=by)} bfloat16, baseline float32 (teacher_fit)")
        assert "baseline は float32" in said
        assert said.endswith("（teacher_fit）")
        assert not leaked(said)


# ---- what is said


def test_messages_are_told_with_those_inside_them():
    tally = [Message("tally", {"count": n, "what": "slower"}) for n in (2, 3)]
    why = {"within": Message("best.within", {"limit": "8"}), "tally": tally}
    kept = Message("best.kept.time", why)
    assert words("en").tell(kept) == (
        "no other cell was proven faster on the whole within 8 GiB (2 slower, 3 slower)"
    )
    assert SAY.tell(kept) == (
        "8 GiB 以内で全体として速いと確認できたセルは他にない（slower 2 件、slower 3 件）"
    )


def test_sentences_are_recognised_from_the_most_special_on():
    assert SAY.foreign(NO_RECORD) == "その前に計測が終了した"
    assert SAY.foreign("a=1: not in effect: train.precision: wanted x y, saw z") == (
        "a=1：not in effect（設定が反映されていない）：train.precision：要求「x y」、観測「z」"
    )
    assert SAY.foreign("preflight failed: driver in teacher_fit") == (
        "事前確認に失敗：「driver in teacher_fit」"
    )
    assert SAY.foreign("teacher_fit: nobody knows this (3 records)") == (
        "teacher_fit：「nobody knows this」（3 件）"
    )


def test_what_nobody_knows_stays_as_it_is_or_stands_in_quotation_marks():
    assert SAY.foreign("never heard of it") == "never heard of it"
    assert SAY.quoted("never heard of it") == "「never heard of it」"
    assert SAY.quoted("never heard of it", 9) == "「never he…」"
    assert SAY.quoted("lightning") == "lightning"
    assert words("en").quoted("never heard of it") == "never heard of it"


def test_english_leaves_sentences_alone():
    for entry in table()["recognised"]:
        assert words("en").foreign(entry["en"]) == entry["en"]


def test_an_unknown_language_is_refused():
    assert [chosen_language(word) for word in LANGUAGES] == list(LANGUAGES)
    with pytest.raises(InputError, match="--lang jp: not one of en, ja"):
        chosen_language("jp")


# ---- no English in a Japanese report


def leaked(text):
    """Runs of three and more English words outside code, quotations and names."""
    for known in (
        r"^( {4}|```).*$",  # logs
        r"`[^`]*`",
        r"「[^」]*」",
        r"\]\([^)]*\)",
        r"<[^>]*>",
        r"!\[[^\]]*\]",
    ):
        text = re.sub(known, " ¦ ", text, flags=re.MULTILINE)
    runs = re.findall(r"(?:(?<![\w.=/-])[A-Za-z][\w']+[ ,;:]+){2,}[A-Za-z][\w']+", text)
    return [run for run in runs if set(re.findall(r"[\w']+", run)) - CODES]


ALLOWED = (MATRIX.question,)
"""The user's own words."""


@pytest.mark.parametrize("choice", [{}, {"max_memory_gib": 0.1}, {"objective": "both"}])
def test_no_english_sentence_leaks_into_a_japanese_report(choice):
    files = japanese(all_records(), **choice)
    text = files["report.md"].replace(ALLOWED[0], "")
    # Fenced commands, and the tables of machine and packages, hold names only.
    text = re.sub(r"^```\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert leaked(text) == []
    for name, svg in files.items():
        if name.endswith(".svg"):
            said = [re.sub("&#x27;", "'", one) for one in re.findall(r"<text[^>]*>([^<]+)", svg)]
            assert leaked("\n".join(said)) == [], name


def test_a_run_without_figures_leaks_nothing_either():
    assert leaked(japanese([])["report.md"].replace(ALLOWED[0], "")) == []


def test_a_leak_would_be_seen():
    strange = [
        record | {"warnings": []} if record["stage"] == FIT else record for record in all_records()
    ]
    text = japanese(strange)["report.md"].replace("警告", "there is something here", 1)
    assert leaked(text)
    assert leaked("値は the same as before だった")
    assert not leaked("判定は not in effect で、`the same as before` は「as it was written」")


def japanese(records, **choice):
    cells, matrix = report_cells(), MATRIX.model_copy(update=choice)
    judged = judge(matrix, cells, records)
    return render(matrix, cells, records, judged, MACHINE, FOLDER, (), "ja")


def test_stages_and_settings_keep_their_names():
    text = japanese(all_records())["report.md"]
    for name in (*STAGES, *(set(PROOFS) & set(MATRIX.axes))):
        assert name in text
    assert isinstance(SAY, Words)

"""Records and judgement as Markdown, HTML, SVG and a settings file: a pure function, one writer.

Nothing in `render` reads a clock, a machine or a model: equal records give equal bytes. The command
`python -m bench.report RUN_FOLDER` makes the report of a finished run anew from its files.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Environment, PackageLoader, StrictUndefined

from bench import verdicts
from bench.comparing.comparability import Side, read_side
from bench.judging.best import memory_source
from bench.judging.figures import TOTAL, Record
from bench.judging.findings import UNACCOUNTED, doubts
from bench.judging.judgement import Judgement
from bench.judging.quality import GAINS, LOSS_MARGIN, MARGIN
from bench.matrix import Cell, Matrix, load_matrix
from bench.profile import profiles
from bench.profile.profiles import Profile
from bench.records import stranger
from bench.reporting import charts, index, largest_section, page
from bench.reporting.appendix import best_settings, commands, cuts, listings, machine_table
from bench.reporting.choice import chosen_by
from bench.reporting.compiles import break_reasons, compile_table
from bench.reporting.failures import failures, unmeasured_table
from bench.reporting.headline import headline, summary_table
from bench.reporting.ledger import ledgers
from bench.reporting.page import anchor
from bench.reporting.pareto import Point, pareto_chart, points
from bench.reporting.profile_section import section
from bench.reporting.proof_tables import long_proofs, merged_proofs, proof_table, shown_proofs
from bench.reporting.quality_tables import chance, control_notes, quality_tables
from bench.reporting.stage_section import loss_curves, stage_section
from bench.reporting.strings import ENGLISH, Words, chosen_language, words
from bench.reporting.tables import charted, code, in_reading_order, memory_notes, plain
from bench.schedule.attempts import judged
from core.config import InputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
SECTIONS = ("warnings", "stages", "pareto", "unmeasured", "proofs", "quality", "ledger", "repeat")
"""Those that the line below the headline leads to."""


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="A run that has ended.")],
    lang: Annotated[str, typer.Option(help="Language of the report: en or ja.")] = ENGLISH,
    objective: Annotated[
        str | None,
        typer.Option(metavar="WHAT", help="The best cell has least time, memory, or both."),
    ] = None,
    max_memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Recommend no cell that needs more.")
    ] = None,
) -> None:
    """Make the report of a run anew from its files; the last line is its path."""
    try:
        language = chosen_language(lang)
        side = read_side(folder)
        refuse_other_settings(side)
        asked = {"objective": objective, "max_memory_gib": max_memory}
        given = [f"{name}={value}" for name, value in asked.items() if value is not None]
        matrix = load_matrix(folder / "matrix.yaml", given)
    except InputError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    cells, found = list(side.cells), judged(side.records)
    judgement = verdicts.judge(matrix, cells, found)
    made = profiles.read(folder, tuple(cells), matrix.stages)
    folder = folder if folder.parent.name else folder.absolute()
    path = write(folder, matrix, cells, found, judgement, dict(side.machine), made, language)
    if (folder.resolve().parents[1] / index.NAME).exists():
        index.write(folder.resolve().parents[1], words(language))
    print(path)


def refuse_other_settings(side: Side) -> None:
    """A report of records that belong to no cell would be one of nothing. Raises InputError."""
    strange = stranger(side.records, {cell.key for cell in side.cells})
    if strange is not None:
        raise InputError(
            f"{side.folder}: {strange} was measured with other settings than this version has; "
            f"read its report as it is, or make it with the code of commit {side.commit}"
        )


def write(
    folder: Path,
    matrix: Matrix,
    cells: list[Cell],
    records: list[dict[str, Any]],
    judgement: Judgement,
    machine: dict[str, Any],
    profiles: Sequence[Profile] = (),
    language: str = ENGLISH,
) -> Path:
    """Write the report into a run folder, each file whole; the report's path.

    What an earlier report had and this one has not is removed.
    """
    files = render(matrix, cells, records, judgement, machine, folder, profiles, language)
    for stale in [*folder.glob("*.svg"), folder / "best.yaml"]:
        if stale.name not in files:
            stale.unlink(missing_ok=True)
    for name, text in files.items():
        draft = folder / f"{name}.new"
        draft.write_text(text, encoding="utf-8")
        draft.replace(folder / name)
    return folder / "report.md"


def render(
    matrix: Matrix,
    cells: Sequence[Cell],
    records: Sequence[Record],
    judgement: Judgement,
    machine: Mapping[str, Any],
    folder: Path,
    profiles: Sequence[Profile] = (),
    language: str = ENGLISH,
) -> dict[str, str]:
    """File name -> text of the whole report; `folder` is only named, in title and commands."""
    say = words(language)
    ok = [record for record in records if record["status"] == "ok"]
    name = folder.parent.name or "matrix"
    found = points(judgement.tables[TOTAL], cells, ok, matrix.max_memory_gib)
    curves = {str(stage): loss_curves(judgement, ok, stage) for stage in matrix.stages}
    files = pictures(matrix, judgement, found, curves, say)
    best = next(cell for cell in cells if cell.name == judgement.best.cell)
    doubtful = doubts(cells, ok)
    recommended = not judgement.best.refused
    shared = judged_parts(matrix, cells, ok, records, judgement, say)
    files["report.md"] = (
        environment()
        .get_template("report.md.j2")
        .render(
            shared,
            say=say,
            name=name,
            matrix=matrix,
            base=cells[0].settings,
            contents=contents(say),
            headline=headline(judgement, doubtful, cuts(best), say),
            machine_warnings=machine.get("warnings") or [],
            stages=[
                stage_section(rows, judgement, cells, ok, doubtful, say)
                | {"curves": bool(curves.get(stage))}
                for stage, rows in in_reading_order(judgement.tables)
            ],
            pareto=found,
            choice=chosen_by(matrix, judgement, found, say),
            ledgers=ledgers(judgement, ok, matrix.stages, profiles, say),
            profiles=section(profiles, ok, say),
            largest=largest_section.section(machine.get("largest") or [], say),
            cuts=cuts(best),
            machine=machine_table(machine, say),
            listings=listings(machine),
            commands=commands(machine, name, folder.as_posix(), matrix, say, recommended),
        )
    )
    files["report.html"] = page.page(files["report.md"], files, language)
    told = index.summary(matrix, judgement, machine, name)
    files[index.SUMMARY] = json.dumps(told, indent=1) + "\n"
    if recommended:
        files["best.yaml"] = best_settings(best, judgement, name)
    return files


def judged_parts(
    matrix: Matrix,
    cells: Sequence[Cell],
    ok: Sequence[Record],
    records: Sequence[Record],
    judgement: Judgement,
    say: Words,
) -> dict[str, Any]:
    """The tables of all stages together, by their names in the template."""
    proofs = merged_proofs(cells, judgement.proofs)
    return {
        "summary": summary_table(judgement, say),
        "comparisons": judgement.comparisons,
        "warnings": judgement.warnings,
        "memory_notes": memory_notes(ok, say),
        "unmeasured": unmeasured_table(judgement.unmeasured, say),
        "failures": failures(judgement.unmeasured, records, say),
        "proofs": proof_table(proofs, say),
        "long_proofs": long_proofs(proofs, say),
        "proofs_left_out": len(judgement.proofs) - len(shown_proofs(cells, judgement.proofs)),
        "quality": quality_tables(judgement.quality, say),
        "ranked": any(row.metric in GAINS for row in judgement.quality),
        "margin": f"{MARGIN:g}",
        "loss_margin": f"{100 * LOSS_MARGIN:g}",
        "chance": chance(ok, say),
        "controls": control_notes(judgement.controls, say),
        "compiles": compile_table(judgement, cells, ok, matrix.stages, say),
        "break_reasons": break_reasons(ok),
        "unaccounted": f"{100 * UNACCOUNTED:g}",
    }


def pictures(
    matrix: Matrix,
    judgement: Judgement,
    found: Sequence[Point],
    curves: Mapping[str, dict[str, list[float]]],
    say: Words,
) -> dict[str, str]:
    """File name -> SVG."""
    drawn = {
        f"ratio-{stage}.svg": charts.drawn(charts.ratio_chart, charted(rows), matrix.floor, say)
        for stage, rows in judgement.tables.items()
    }
    drawn |= {
        f"loss-{stage}.svg": charts.drawn(charts.loss_chart, lines, say)
        for stage, lines in curves.items()
        if lines
    }
    source = memory_source(judgement.tables[TOTAL])
    if found and source:
        limit = matrix.max_memory_gib
        drawn["pareto.svg"] = charts.drawn(pareto_chart, found, source, limit, say)
    return drawn


def environment() -> Environment:
    """The templates with the filters that make foreign text harmless."""
    made = Environment(
        loader=PackageLoader("bench"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"code": code, "plain": plain}
    return made


def contents(say: Words) -> str:
    """Links to the sections, in one line."""
    titles = [say(f"section.{name}") for name in SECTIONS]
    return " · ".join(f"[{one}](#{anchor(one)})" for one in titles)


if __name__ == "__main__":
    app()

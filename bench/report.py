"""Records and judgement as Markdown, SVG and a settings file: a pure function, then one writer.

Nothing here reads a clock, a machine or a model: equal records give equal bytes.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bench import charts
from bench.figures import TOTAL, Record
from bench.findings import UNACCOUNTED
from bench.judgement import BASELINE, Judgement, Verdict
from bench.ledger import ledgers
from bench.matrix import Cell, Matrix
from bench.quality import MARGIN
from bench.tables import (
    SOURCES,
    chance,
    charted,
    code,
    effective_batches,
    gib,
    in_reading_order,
    interval,
    memory_notes,
    percent,
    plain,
    proof_table,
    quality_table,
    shown_proofs,
    signed,
    stage_table,
    table,
    unmeasured_table,
)
from bench.verdicts import flat
from core import config

ALL = {"data.limit_data_rows": -1, "data.limit_eval_users": -1, "train.max_steps": -1}
"""Settings that cut the work, with the value that cuts nothing."""
UNTOLD = ("packages", "variables", "command", "worker", "warnings", "only", "resumed", "pid")
"""Parts of machine.json too long or too private to the machine for the report."""


def write(
    folder: Path,
    matrix: Matrix,
    cells: list[Cell],
    records: list[dict[str, Any]],
    judgement: Judgement,
    machine: dict[str, Any],
) -> Path:
    """Write report, charts and best.yaml into a run folder, each file whole; the report's path."""
    files = render(matrix, cells, records, judgement, machine, folder.as_posix())
    for stale in folder.glob("*.svg"):
        if stale.name not in files:
            stale.unlink()
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
    folder: str,
) -> dict[str, str]:
    """File name -> text of the whole report; `folder` is only printed in commands."""
    ok = [record for record in records if record["status"] == "ok"]
    name = folder.split("/")[-2] if "/" in folder else "matrix"
    curves: dict[str, Any] = {stage: loss_curves(judgement, ok, stage) for stage in matrix.stages}
    files: dict[str, str] = {
        f"ratio-{stage}.svg": charts.drawn(charts.ratio_chart, charted(rows), matrix.floor)
        for stage, rows in judgement.tables.items()
    }
    files |= {
        f"loss-{stage}.svg": charts.drawn(charts.loss_chart, lines)
        for stage, lines in curves.items()
        if lines
    }
    environment = Environment(
        loader=PackageLoader("bench"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "plain": plain}
    best = next(cell for cell in cells if cell.name == judgement.best.cell)
    files["report.md"] = environment.get_template("report.md.j2").render(
        name=name,
        matrix=matrix,
        headline=headline(judgement),
        summary=summary_table(judgement),
        warnings=judgement.warnings,
        machine_warnings=machine.get("warnings") or [],
        comparisons=judgement.comparisons,
        stages=[
            {
                "name": stage,
                "title": "All measured stages together" if stage == TOTAL else stage,
                "unit": rows[0].unit,
                "table": stage_table(rows),
                "drift": next((t for t in judgement.trends if t.stage == stage), None),
                "curves": bool(curves.get(stage)),
            }
            for stage, rows in in_reading_order(judgement.tables)
        ],
        effective_batches=effective_batches(cells),
        memory_notes=memory_notes(ok),
        unmeasured=unmeasured_table(judgement.unmeasured),
        proofs=proof_table(cells, judgement.proofs),
        proofs_left_out=len(judgement.proofs) - len(shown_proofs(cells, judgement.proofs)),
        quality=quality_table(judgement.quality),
        margin=f"{MARGIN:g}",
        chance=chance(ok),
        ledgers=ledgers(judgement, ok, matrix.stages),
        unaccounted=f"{100 * UNACCOUNTED:g}",
        cuts=cuts(best, ok),
        machine=machine_table(machine),
        commands=commands(machine, name, folder, matrix.repeats),
    )
    files["best.yaml"] = best_settings(best, judgement, name)
    return files


def best_settings(best: Cell, judgement: Judgement, name: str) -> str:
    """A complete settings file of the best cell, with the reason on its first line."""
    reason = " ".join(judgement.best.reason.split())
    head = f"# Best cell of {name}: {best.name} ({reason}).\n"
    limits = cuts(best, [])
    if limits:
        head += f"# Measured with {', '.join(limits)}; -1 means all.\n"
    return head + config.dump(best.settings)


def headline(judgement: Judgement) -> list[str]:
    """The answer in sentences: which cell, how much time, what it costs."""
    rows = {row.cell: row for row in judgement.tables[TOTAL]}
    best = judgement.best
    if best.is_baseline:
        return [f"**Keep the baseline:** {plain(best.reason)}."]
    row, other = rows[best.cell], rows[BASELINE]
    assert row.ratio is not None
    said = [
        f"**Use {code(best.cell)}:** {percent(row.ratio)} than the baseline over all measured "
        f"stages (ratio {row.ratio:.3f}, interval {interval(row.low, row.high)}); "
        f"{plain(best.reason)}."
    ]
    if costs := [
        f"{label} {gib(other.memory[source])} → {gib(row.memory[source])} GiB"
        f" ({100 * (row.memory[source] / other.memory[source] - 1):+.0f} %)"
        for source, label in SOURCES.items()
        if row.memory.get(source) and other.memory.get(source)
    ]:
        said.append(f"Peak memory: {', '.join(costs)}.")
    said += [
        f"Quality in {q.stage}: {q.metric} {q.value:.4f}, {signed(q.difference)} against the "
        f"baseline (interval {signed(q.low)} to {signed(q.high)}: "
        f"{'a loss is not excluded' if q.call == 'open' else q.call})."
        for q in judgement.quality
        if q.cell == best.cell and q.metric == "recall@10" and q.difference is not None
    ]
    return said


def summary_table(judgement: Judgement) -> str:
    """For each stage: how the best cell does there, and which cell is fastest there."""
    rows = []
    for stage, table_rows in in_reading_order(judgement.tables):
        own = next((row for row in table_rows if row.cell == judgement.best.cell), None)
        faster = [row for row in table_rows if row.call == "faster"]
        first = faster[0] if faster else None
        rows.append(
            [
                stage,
                "does not act here" if own is None else in_words(own),
                "none proven"
                if first is None
                else "the same"
                if first is own
                else f"{code(first.cell)} {in_words(first)}",
            ]
        )
    return table(["stage", "best cell", "fastest in this stage"], rows)


def in_words(row: Verdict) -> str:
    """Ratio, interval and call in one cell."""
    if row.ratio is None:
        return row.words
    return f"{row.ratio:.3f} ({interval(row.low, row.high)}) {row.words}"


def loss_curves(judgement: Judgement, ok: Iterable[Record], stage: str) -> dict[str, list[float]]:
    """Cell -> loss trace of its first repeat, for cells that ran what was asked, baseline first."""
    shown = [
        row.cell for row in judgement.tables[stage] if row.repeats and row.in_effect is not False
    ]
    first: dict[str, Record] = {}
    for record in ok:
        if record["stage"] == stage and record.get("losses"):
            known = first.get(record["cell"], record)
            first[record["cell"]] = min(known, record, key=lambda one: one["block"])
    return {cell: first[cell]["losses"] for cell in shown if cell in first}


def cuts(cell: Cell, ok: Iterable[Record]) -> list[str]:
    """Settings that kept the work small, and epochs; empty list = nothing was cut."""
    leaves = flat(cell.settings.model_dump(mode="json"))
    found = [f"{name}={leaves[name]}" for name, whole in ALL.items() if leaves[name] != whole]
    if found and ok:
        found.append(f"train.max_epochs={leaves['train.max_epochs']}")
    return found


def machine_table(machine: Mapping[str, Any]) -> str:
    """The machine in short: plain values, the first GPU, the libraries in one line."""
    lines = []
    gpus = machine.get("gpus") or []
    for name, value in flat({key: v for key, v in machine.items() if key != "gpus"}).items():
        if not any(part in UNTOLD for part in name.split(".")) and is_short(value):
            lines.append([name, readable(name, value)])
    for index, gpu in enumerate(gpus):
        words = [f"{k} {readable(k, v)}" for k, v in gpu.items() if not isinstance(v, dict)]
        lines.append([f"gpu {index}", ", ".join(words)])
    lines += [
        [name, plain(", ".join(f"{k} {v}" for k, v in machine[name].items()))]
        for name in ("variables", "packages")
        if machine.get(name)
    ]
    return table(["what", "value"], lines) if lines else ""


def is_short(value: Any) -> bool:
    """Whether a value says something and fits a table cell."""
    return value not in (None, "", []) and len(str(value)) <= 120


def readable(name: str, value: Any) -> str:
    """A value as text, bytes as GiB."""
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{gib(value)} GiB"
    return plain(".".join(map(str, value)) if isinstance(value, list) else value)


def commands(
    machine: Mapping[str, Any], name: str, folder: str, repeats: int
) -> list[tuple[str, str]]:
    """(what for, command) pairs that repeat, extend and use the result."""
    started = list(machine.get("command") or [])
    again = f"python -m bench.run matrices/{name}.yaml"
    if "-m" in started:
        again = shlex.join(["python", *started[started.index("-m") :]])
    more = f"python -m bench.run matrices/{name}.yaml --resume {shlex.quote(folder)}"
    return [
        ("measure again", again),
        (f"add repeats to this run (here {repeats + 3} in all)", f"{more} --repeats {repeats + 3}"),
        (
            "run the pipeline with the best cell",
            f"python -m core.run {shlex.quote(folder)}/best.yaml",
        ),
    ]

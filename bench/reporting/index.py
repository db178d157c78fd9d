"""The list of all runs, `index.md` in the folder of runs, from what lies in the run folders."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bench.judging.best import memory_source
from bench.judging.figures import TOTAL
from bench.judging.judgement import BASELINE, Judgement
from bench.matrix import Matrix
from bench.reporting.strings import Words, cut
from bench.reporting.tables import SOURCES, gib, interval, named, plain, table

NAME = "index.md"
SUMMARY = "summary.json"
"""In each run folder, written with its report."""
LONGEST_QUESTION = 90


def summary(
    matrix: Matrix, judgement: Judgement, machine: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """The answer of one run in figures, for the list of runs and for programs."""
    best = judgement.best
    rows = {row.cell: row for row in judgement.tables[TOTAL]}
    row, baseline = rows[best.cell], rows[BASELINE]
    source = memory_source(judgement.tables[TOTAL])
    return {
        "matrix": name,
        "question": matrix.question,
        "recorded": machine.get("recorded"),
        "best": best.cell,
        "answer": "refused" if best.refused else "kept" if best.is_baseline else "use",
        "reason": best.reason,
        "objective": matrix.objective,
        "max_memory_gib": matrix.max_memory_gib,
        "ratio": row.ratio,
        "low": row.low,
        "high": row.high,
        "memory_source": source,
        "baseline_bytes": baseline.memory.get(source) if source else None,
        "best_bytes": row.memory.get(source) if source else None,
        "cells": len(rows),
        "measured": sum(bool(row.repeats) for row in rows.values()),
        "repeats": max(row.repeats for row in rows.values()),
        "exit_status": judgement.exit_status,
    }


def write(out: Path, say: Words) -> Path:
    """Rewrite the list, whole or not at all; its path."""
    path = out / NAME
    draft = out / f".{NAME}.{os.getpid()}"
    draft.write_text(render(read(out), say), encoding="utf-8")
    draft.replace(path)
    return path


def read(out: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """(folder below `out`, summary) of every run, the newest first; None = no report was made."""
    found = []
    for folder in {path.parent for path in out.glob("*/*/matrix.yaml")}:
        try:
            told = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            told = None
        found.append((folder.relative_to(out).as_posix(), told))
    return sorted(found, key=lambda run: (run[0].rpartition("/")[2], run[0]), reverse=True)


def render(runs: Sequence[tuple[str, dict[str, Any] | None]], say: Words) -> str:
    """The list as Markdown."""
    names = ("date", "run", "question", "answer", "time", "memory", "cells")
    head = [say(f"head.{name}") for name in names]
    lines = [line(folder, told, say) for folder, told in runs]
    text = table(head, lines) if lines else say("index.none")
    return f"# {say('index.title')}\n\n{text}\n\n{say('index.note')}\n"


def line(folder: str, told: Mapping[str, Any] | None, say: Words) -> list[str]:
    """One run."""
    if told is None:
        return ["–", plain(folder), say("index.no_report"), *["–"] * 4]
    date = str(told["recorded"] or "–")[:16].replace("T", " ")
    link = f"[{plain(folder)}]({quote(folder)}/report.md)"
    answer = named(told["best"]) if told["answer"] == "use" else say(f"index.{told['answer']}")
    cells = say("index.cells", measured=told["measured"], cells=told["cells"])
    question = plain(cut(told["question"], LONGEST_QUESTION))
    return [date, link, question, answer, time(told, say), memory(told, say), cells]


def time(told: Mapping[str, Any], say: Words) -> str:
    """Ratio of the best cell with its interval."""
    if told["ratio"] is None:
        return "–"
    return f"{told['ratio']:.3f} ({interval(told['low'], told['high'], say('to'))})"


def memory(told: Mapping[str, Any], say: Words) -> str:
    """Peak of baseline and best cell."""
    before, after = told["baseline_bytes"], told["best_bytes"]
    if before is None or after is None:
        return "–"
    source = say(SOURCES[told["memory_source"]])
    if told["answer"] != "use":
        return f"{gib(before)} GiB {source}"
    return f"{gib(before)} → {gib(after)} GiB {source}"

"""The proofs of a report: what was asked, what was seen, and whether both agree."""

from collections.abc import Iterable, Sequence

from bench.judging.judgement import BASELINE, CellProof
from bench.matrix import Cell
from bench.reporting.strings import Words
from bench.reporting.tables import code, named, plain, table

LONGEST = 48
"""Letters of what a proof asked or saw in the table; the rest stands below it."""


def shown_proofs(cells: Sequence[Cell], rows: Iterable[CellProof]) -> list[CellProof]:
    """Proofs worth reading: the baseline's, each cell's own change, and whatever does not hold."""
    changed = {cell.name: cell.changed for cell in cells}
    return [
        row
        for row in rows
        if row.cell == BASELINE or row.setting in changed[row.cell] or row.holds is False
    ]


ProofLine = tuple[CellProof, list[str]]
"""A proof and the stages that say the same of it."""


def merged_proofs(cells: Sequence[Cell], rows: Sequence[CellProof]) -> list[ProofLine]:
    """Proofs worth reading by setting; stages that say the same share a line."""
    merged: dict[tuple[str, str, str, str, bool | None], ProofLine] = {}
    for row in shown_proofs(cells, rows):
        key = (row.setting, row.cell, row.requested, row.observed, row.holds)
        merged.setdefault(key, (row, []))[1].append(row.stage)
    order = {row.setting: i for i, row in reversed(list(enumerate(rows)))}
    return sorted(merged.values(), key=lambda line: order[line[0].setting])


def proof_table(found: Sequence[ProofLine], say: Words) -> str:
    """Setting, cell, stage, requested, observed, holds; long texts cut."""
    stages = list(dict.fromkeys(stage for _, here in found for stage in here))
    lines = [
        [
            code(row.setting),
            named(row.cell),
            say("proof.all_stages") if len(stages) == len(here) > 1 else ", ".join(here),
            plain(say.quoted(row.requested, LONGEST)),
            plain(say.quoted(row.observed, LONGEST)),
            proof_word(row, say),
        ]
        for row, here in found
    ]
    head = ["setting", "cell", "stage", "requested", "observed", "proof"]
    return table([say(f"head.{name}") for name in head], lines) if lines else ""


def proof_word(row: CellProof, say: Words) -> str:
    """Whether a proof holds."""
    return say({True: "proof.holds", False: "proof.fails", None: "proof.unknown"}[row.holds])


def long_proofs(found: Sequence[ProofLine], say: Words) -> list[str]:
    """The proofs that the table cuts, in full."""
    return [
        say(
            "proof.long",
            setting=code(row.setting),
            cell=code(row.cell),
            stages=", ".join(here),
            requested=plain(say.quoted(row.requested)),
            observed=plain(say.quoted(row.observed)),
            word=proof_word(row, say),
        )
        for row, here in found
        if max(len(row.requested), len(row.observed)) > LONGEST
    ]

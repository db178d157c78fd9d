"""One run judged against another, cell by cell and stage by stage, with the words of a verdict."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import proofs
from bench.comparing import calibration, comparability
from bench.comparing.between import Gap, calibrated, gap, interleaved
from bench.comparing.comparability import HARDWARE, Difference, Pair, Side
from bench.judging import quality
from bench.judging.control import controls, floors
from bench.judging.figures import MEMORY, TOTAL, Figure, Process, peaks, stage_figures
from bench.judging.intervals import MIN_BLOCKS, decide, holm_levels
from bench.judging.quality import Quality
from bench.overrides import flatten
from bench.reporting.tables import signed
from core.config import InputError

Sides = tuple[Side, Side]


@dataclass(frozen=True)
class Row:
    """One cell in one stage of both runs; figures are medians over repeats, ratio = B / A."""

    cell: str
    stage: str
    unit: str
    """"sample": seconds of one, "stage": seconds of the whole."""
    before: float
    after: float
    effect: Gap
    level: float
    call: str
    needs: int | None = None
    reason: str = ""

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Interval of the ratio; None from a single repeat."""
        if self.effect.blocks < 2:
            return None
        width = self.effect.half_width(self.level)
        return math.exp(self.effect.mean - width), math.exp(self.effect.mean + width)

    @property
    def words(self) -> str:
        """The call as printed."""
        if self.call == "undecided" and not self.reason:
            return f"undecided (needs {self.needs or 'over 1000'} more)"
        return f"{self.call} ({self.reason})" if self.reason else self.call


@dataclass(frozen=True)
class Comparison:
    """Everything two runs say about each other."""

    before: Side
    after: Side
    differences: Sequence[Difference]
    forbidden: Sequence[Difference]
    """The differences nobody allowed."""
    in_units: bool
    """Times are divided by those of the machines' own kernels."""
    rows: Sequence[Row]
    quality: Sequence[Quality]
    memory: Mapping[tuple[str, str, str], tuple[int, int]]
    """(cell, stage, source) -> peaks of both runs."""
    vanished: Sequence[tuple[str, str, str]]
    """(cell, stage, why): what the first run measured and the second did not."""
    notes: Sequence[str]

    @property
    def floor(self) -> float:
        """Smallest ratio - 1 worth acting on in either run."""
        return max(self.before.matrix.floor, self.after.matrix.floor)


def compare(before: Side, after: Side, across: Sequence[str]) -> Comparison:
    """Judge the second run against the first. Raises InputError where they share nothing."""
    common = comparability.pairs(before, after)
    stages = [stage for stage in before.matrix.stages if stage in after.matrix.stages]
    if not common or not stages:
        raise InputError(
            f"{before.folder} and {after.folder}: no {'stage' if common else 'cell'} in common"
        )
    differences = comparability.differences(before, after, common)
    forbidden = comparability.allowed(across, differences)
    ratios = calibration.slower_by(
        before.machine.get("calibration"), after.machine.get("calibration")
    )
    other_machine = any(one.field in HARDWARE for one in differences)
    in_units = other_machine and bool(ratios)
    notes = _notes(differences, ratios, other_machine)
    if unknown := comparability.unrecorded(before, after):
        notes.append(f"recorded by neither run, so it may differ unseen: {', '.join(unknown)}")
    rows: list[Row] = []
    qualities: list[Quality] = []
    readable = in_units and all(one.field in (*HARDWARE, "driver") for one in forbidden)
    if readable or not forbidden:
        qualities = judge_quality(common, before, after, stages)
        rows = judge(common, before, after, stages, qualities, ratios if in_units else {})
        if rows and not any(row.effect.in_blocks for row in rows):
            notes.append(
                "the blocks of the two runs do not alternate in time, so the test is unpaired and "
                "drift from one sitting to the other counts as a difference: measure again in turn "
                "before acting on a few per cent"
            )
    return Comparison(
        before,
        after,
        differences,
        forbidden,
        in_units,
        rows,
        qualities,
        memory(common, before, after, stages),
        vanished(common, before, after),
        notes,
    )


def _notes(
    differences: Sequence[Difference], ratios: Mapping[str, float], other_machine: bool
) -> list[str]:
    """What weakens the comparison."""
    factors = comparability.factors(differences)
    notes = []
    if len(factors) > 1:
        notes.append(
            f"{len(factors)} factors differ ({', '.join(factors)}): no change below can be laid to "
            "one of them alone"
        )
    if ratios:
        listed = ", ".join(f"{name} x{ratio:.2f}" for name, ratio in ratios.items())
        notes.append(f"time of the calibration kernels, B / A: {listed}")
    elif other_machine:
        notes.append(
            "the machines differ and no calibration is recorded for both: not comparable in seconds"
        )
    return notes


def judge(
    common: Sequence[Pair],
    before: Side,
    after: Side,
    stages: Sequence[str],
    qualities: Sequence[Quality],
    ratios: Mapping[str, float],
) -> list[Row]:
    """A row for every cell and stage, and the total, that have figures in both runs.

    With `ratios` of the calibration kernels the effects are in calibrated units.
    """
    sides = (before, after)
    in_blocks = interleaved(before.records, after.records)
    drafts: list[tuple[Pair, str, Gap, str, tuple[float, float]]] = []
    for stage, by_process in common_figures(common, sides, stages).items():
        for pair in common:
            theirs, ours = (_blocks(by_process, f"{side}:{pair.name}") for side in (0, 1))
            if not theirs or not ours:
                continue
            effect = gap(_seconds(theirs), _seconds(ours), in_blocks)
            if machines := calibration.machine_range(ratios, _dtypes(pair, sides, stage)):
                effect = calibrated(effect, machines)
            medians = (_median(theirs), _median(ours))
            unit = "sample" if next(iter(ours.values())).samples else "stage"
            drafts.append((pair, stage, effect, unit, medians))
    levels = holm_levels([effect.p_value for _, _, effect, _, _ in drafts])
    floor = max(before.matrix.floor, after.matrix.floor)
    rows = []
    for (pair, stage, effect, unit, medians), level in zip(drafts, levels, strict=True):
        call, needs, reason = _call(pair, sides, stage, effect, floor, level, qualities)
        rows.append(Row(pair.name, stage, unit, *medians, effect, level, call, needs, reason))
    return rows


def common_figures(
    common: Sequence[Pair], sides: Sides, stages: Sequence[str]
) -> Mapping[str, Mapping[Process, Figure]]:
    """Stage -> (side:cell, block) -> figure; both runs are judged alike, by steps or by seconds."""
    marked = [
        {**record, "key": f"{number}:{pair.name}"}
        for number, side in enumerate(sides)
        for pair in common
        for record in side.of(pair[number])
    ]
    return stage_figures(marked, stages)


def _blocks(by_process: Mapping[Process, Figure], name: str) -> dict[int, Figure]:
    return {block: found for (key, block), found in by_process.items() if key == name}


def _seconds(side: Mapping[int, Figure]) -> dict[int, float]:
    return {block: found.seconds for block, found in side.items()}


def _median(side: Mapping[int, Figure]) -> float:
    return statistics.median(found.seconds for found in side.values())


def _dtypes(pair: Pair, sides: Sides, stage: str) -> list[str]:
    """Dtypes of the products that a stage ran on either side; students' are fp32."""
    seen: Counter[str] = Counter()
    for side, cell in zip(sides, pair, strict=True):
        for record in side.of(cell):
            if stage in (record["stage"], TOTAL):
                seen.update((record.get("facts") or {}).get("gemm_dtypes") or {})
    return list(seen) or ["float32"]


def _call(
    pair: Pair,
    sides: Sides,
    stage: str,
    effect: Gap,
    floor: float,
    level: float,
    qualities: Sequence[Quality],
) -> tuple[str, int | None, str]:
    """Call, repeats needed and reason in the order of verdicts: proof, quality, work, interval."""
    holds, why = standing(pair, sides, stage)
    if holds is not True:
        return ("unproven" if holds is None else "not in effect"), None, why
    if lost_quality := [one for one in qualities if one.cell == pair.name and one.call == "worse"]:
        parts = [f"{one.metric} {signed(one.difference)} in {one.stage}" for one in lost_quality]
        return "worse quality", None, ", ".join(parts)
    if other_work := unlike(pair, sides, stage, qualities):
        return "unproven", None, other_work
    call, needs = decide(effect, floor, level)
    if call == "undecided" and effect.blocks >= MIN_BLOCKS and effect.slack > math.log1p(floor):
        return call, None, "the machines' kernels disagree by more than the floor"
    return call, needs, ""


def standing(pair: Pair, sides: Sides, stage: str) -> tuple[bool | None, str]:
    """Whether both runs did what the cell asks: True, False (one did not), None (seen on one side
    only); and why. What neither side could see changes nothing between them.
    """
    seen = []
    for side, cell, label in zip(sides, pair, "AB", strict=True):
        settings = cell.settings.model_dump(mode="json")
        leaves = {".".join(map(str, place)): value for place, value in flatten(settings)}
        asked = dict.fromkeys([*side.matrix.axes, *cell.changed])
        rows = proofs.check({name: leaves[name] for name in asked}, side.of(cell), settings)
        here = [row for row in rows if stage in (row.stage, TOTAL)]
        for row in here:
            if row.holds is False:
                return False, f"{label}: {row.setting}: wanted {row.requested}, saw {row.observed}"
        seen.append({(row.setting, row.stage): row.holds for row in here})
    for place in seen[0].keys() & seen[1].keys():
        if seen[0][place] != seen[1][place]:
            return None, f"{place[0]} was seen in one run only"
    return True, ""


def unlike(pair: Pair, sides: Sides, stage: str, qualities: Sequence[Quality]) -> str:
    """Why the second run did other work than the first, or nothing says how well; else empty."""
    for one in qualities:
        if one.cell == pair.name and one.call == "missing":
            return f"{one.stage}: {one.metric} is not comparable"
    for scored in dict.fromkeys(r["stage"] for r in sides[0].of(pair.before)):
        if scored.endswith("_fit") or stage not in (scored, TOTAL):
            continue
        theirs, ours = (
            {n for r in side.of(cell) if r["stage"] == scored if (n := rows_of(r)) is not None}
            for side, cell in zip(sides, pair, strict=True)
        )
        if theirs and ours and theirs != ours:
            return f"{scored}: {said_of(ours)} rows, before {said_of(theirs)}"
    return ""


def rows_of(record: Mapping[str, Any]) -> int | None:
    """Rows that a measured stage worked on."""
    return (record.get("counts") or {}).get("rows") if record["status"] == "ok" else None


def said_of(rows: set[int]) -> str:
    """One count, or the several that repeats had."""
    return " or ".join(map(str, sorted(rows)))


def judge_quality(
    common: Sequence[Pair], before: Side, after: Side, stages: Sequence[str]
) -> list[Quality]:
    """Rankings and training losses of every cell against those of the first run, whose own repeats
    say how much is chance; losses of a test only where nothing is ranked.
    """
    rows: list[Quality] = []
    ok = [[r for r in side.records if r["status"] == "ok"] for side in (before, after)]
    ranking = {r["stage"] for side in ok for r in side if r.get("ranks")}
    for pair in common:
        past, present = (
            [r for r in side if r["cell"] == cell.name] for side, cell in zip(ok, pair, strict=True)
        )
        control = controls(past, stages)
        for stage in stages:
            theirs, ours = ([r for r in side if r["stage"] == stage] for side in (past, present))
            floor = floors(control, stage)
            least = floor.get(quality.TRAINING_LOSS, 0.0)
            rows += quality.compare_training(pair.name, stage, ours, theirs, least)
            if stage in ranking or not ranking:
                rows += quality.compare(pair.name, stage, ours, theirs, floor)
    return rows


def memory(
    common: Sequence[Pair], before: Side, after: Side, stages: Sequence[str]
) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(cell, stage, source) -> largest peaks of both runs, where both could read the source."""
    found = {}
    for pair in common:
        for stage in stages:
            theirs, ours = (
                peaks(r for r in side.of(cell) if r["stage"] == stage and r["status"] == "ok")
                for side, cell in zip((before, after), pair, strict=True)
            )
            for source in MEMORY:
                if theirs.get(source) and source in ours:
                    found[pair.name, stage, source] = (theirs[source], ours[source])
    return found


def vanished(common: Sequence[Pair], before: Side, after: Side) -> list[tuple[str, str, str]]:
    """(cell, stage, why) of everything the first run measured and the second did not."""
    partners = {pair.before.name: pair.after for pair in common}
    found = []
    measured = dict.fromkeys((r["cell"], r["stage"]) for r in before.records if r["status"] == "ok")
    for cell, stage in measured:
        partner = partners.get(cell)
        if partner is None:
            found.append((cell, stage, "no such cell in B"))
            continue
        own = after.of(partner)
        if any(r["stage"] == stage and r["status"] == "ok" for r in own):
            continue
        failed = [r for r in own if r["status"] != "ok"]
        last = min(failed, key=lambda r: r["stage"] != stage, default=None)
        why = f"{last['status']}: {last['reason']}" if last else "not measured in B"
        found.append((cell, stage, why))
    return found

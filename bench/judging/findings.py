"""Warnings as values: what a reader must know before acting on a report, and what to try next."""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy import stats

from bench.judging.conduct import conduct
from bench.judging.figures import TOTAL, Record
from bench.judging.intervals import ALPHA, decide, paired
from bench.judging.judgement import BASELINE, Finding, Trend, Unmeasured, Verdict
from bench.judging.quality import GAINS, LOSS_MARGIN, MARGIN, TRAINING_LOSS, Quality
from bench.judging.work import moved_outside
from bench.matrix import Cell, Matrix
from bench.metering import invariants
from bench.proving import differences

UNACCOUNTED = 0.05
"""Share of a stage's wall time that may lie outside every named phase."""
OVERBOOKED = 0.01
"""Share by which the phases may exceed the wall: two clocks are read one after the other."""
FEWEST_BLOCKS_FOR_TREND = 3
MOST_ALIKE = 3
"""Sentences of one kind that are told each for itself."""
FEWEST_COPIED = 3
"""Steps below which equal times may be chance."""
OF_STEPS = ("faster", "slower", "same")
STEPS_LEAVE_OUT = "the ledger says where the rest of the stage goes; act on the total"
NOT_RUNNING = {
    ("not in effect", False): "the setting never reached the model; fix that before reading its "
    "figures",
    ("unproven", None): "no claim is made for it; add a proof, or rerun where the fact can be "
    "observed",
    ("unproven", True): "no claim is made for it; let it do the baseline's work, then compare",
}
"""(call, setting seen at work) -> what to do."""


def trends(figures: Mapping[str, Mapping[int, float]]) -> list[Trend]:
    """Fitted drift of the baseline in every stage; `figures`: stage -> block -> judged seconds."""
    found = []
    for stage, by_block in figures.items():
        if len(by_block) < FEWEST_BLOCKS_FOR_TREND:
            continue
        blocks = sorted(by_block)
        fit = stats.linregress(blocks, [math.log(by_block[block]) for block in blocks])
        p_value = 1.0 if math.isnan(fit.pvalue) else float(fit.pvalue)
        ratio = math.exp(float(fit.slope) * (blocks[-1] - blocks[0]))
        found.append(Trend(stage, ratio, p_value, len(blocks)))
    return found


def warnings(
    matrix: Matrix,
    cells: Sequence[Cell],
    records: Sequence[Record],
    tables: Mapping[str, Sequence[Verdict]],
    qualities: Sequence[Quality],
    drifts: Sequence[Trend],
    unmeasured: Sequence[Unmeasured],
) -> list[Finding]:
    """All warnings of a matrix, the ones that void a result first."""
    rows = [row for table in tables.values() for row in table]
    ok = [record for record in records if record["status"] == "ok"]
    return [
        *settings_not_running(rows),
        *failed(unmeasured),
        *unclean(cells, ok),
        *quality_gaps(ok, qualities),
        *drifted(drifts, matrix.floor),
        *copied(ok),
        *changed_data(ok),
        *steps_against_stage(tables, cells, ok, matrix.floor),
        *ledger_gaps(ok),
        *memory_contradictions(ok),
        *judged_by_wall(tables, ok),
        *too_few_repeats(rows, matrix),
        *conduct(rows, records),
        *from_records(ok),
    ]


def settings_not_running(rows: Iterable[Verdict]) -> list[Finding]:
    """Cells that did not run what was asked, then cells nothing proves; one line a reason."""
    found = []
    for call in ("not in effect", "unproven"):
        reasons = {(r.cell, r.reason, r.in_effect): None for r in rows if r.call == call}
        found += [
            Finding(f"{cell}: {call}: {reason}", NOT_RUNNING[call, in_effect])
            for cell, reason, in_effect in reasons
        ]
    return found


def failed(unmeasured: Iterable[Unmeasured]) -> list[Finding]:
    """How many cells lost repeats to failures."""
    lost = [row for row in unmeasured if row.status not in ("unsupported", "skipped")]
    if not lost:
        return []
    statuses = Counter(row.status for row in lost)
    words = ", ".join(status if n == 1 else f"{n} × {status}" for status, n in statuses.items())
    return [
        Finding(
            f"repeats failed in {len({row.cell for row in lost})} cells: {words}",
            "reasons are under the tables, logs in `cells/`",
        )
    ]


FIGURES = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Doubts:
    """What makes a cell's ratio more, or less, than that of its setting; each with its stages."""

    second: dict[str, list[str]] = field(default_factory=dict)
    """Observed differences to the baseline that the change does not explain."""
    silent: dict[str, list[str]] = field(default_factory=dict)
    """What should have moved and is equal to the bit."""


def doubts(cells: Sequence[Cell], ok: Sequence[Record]) -> dict[str, Doubts]:
    """Cell -> second differences and missing effects, from records paired by stage and block."""
    baseline = {(r["stage"], r["block"]): r for r in ok if r["key"] == cells[0].key}
    found = {}
    for cell in cells[1:]:
        changes = {n: (value_of(cells[0], n), value) for n, value in cell.changed.items()}
        second: dict[str, dict[str, None]] = {}
        silent: dict[str, dict[str, None]] = {}
        own = [r for r in ok if r["key"] == cell.key]
        for record in own:
            other = baseline.get((record["stage"], record["block"]))
            if other is None:
                continue
            for text in differences.second_differences(cell.changed, record, other):
                second.setdefault(text, {})[record["stage"]] = None
            for text in differences.no_effect(changes, record, other):
                silent.setdefault(text, {})[record["stage"]] = None
        if "machine.image" in cell.changed and own:
            second["whole image, so library versions too"] = dict.fromkeys(r["stage"] for r in own)
        if moved := moved_outside(cell, cells[0], ok):
            second[moved] = {TOTAL: None}
        if second or silent:
            found[cell.name] = Doubts(
                {text: list(stages) for text, stages in second.items()},
                {text: list(stages) for text, stages in silent.items()},
            )
    return found


def value_of(cell: Cell, setting: str) -> Any:
    """The value of a dotted setting in a cell."""
    return functools.reduce(getattr, setting.split("."), cell.settings)


def unclean(cells: Sequence[Cell], ok: Sequence[Record]) -> list[Finding]:
    """Comparisons of more than one difference, and of none, cell by cell."""
    found = []
    for cell, doubt in doubts(cells, ok).items():
        if doubt.second:
            text = f"{cell}: more than the setting under test differs: {by_stage(doubt.second)}"
            found.append(Finding(text, equalising(doubt.second)))
        if doubt.silent:
            text = f"{cell}: no effect visible: equal to the bit: {by_stage(doubt.silent)}"
            found.append(Finding(text, "check that the setting reaches the model"))
    return found


def equalising(second: Iterable[str]) -> str:
    """How to compare one difference at a time."""
    together = "the ratio is that of all of them together; "
    if any("peft" in text for text in second):
        return (
            together + "set `teacher.gradient_checkpointing` to true or false in both cells "
            "(`matrices/qlora_checkpointing.yaml` asks that question)"
        )
    return together + "equalise the rest"


def by_stage(found: Mapping[str, Iterable[str]]) -> str:
    """What was found, each with the stages it was found in."""
    return "; ".join(f"{text} ({', '.join(stages)})" for text, stages in found.items())


def quality_gaps(ok: Sequence[Record], qualities: Sequence[Quality]) -> list[Finding]:
    """Quality that was not measured, or measured too coarsely to exclude a loss."""
    if ok and not any(row.metric in GAINS for row in qualities):
        text = "Quality was not measured: no stage of this matrix ranks users"
        return [Finding(text, "add `teacher_test` to `stages` before acting on a speed-up")]
    found = []
    still_open = [row for row in qualities if row.call == "open"]
    if ranked := {row.cell: None for row in still_open if row.metric in GAINS}:
        text = f"A quality loss above {MARGIN:g} is not excluded for: {'; '.join(ranked)}"
        found.append(Finding(text, "evaluate more users (`data.limit_eval_users: -1`)"))
    if trained := {row.cell: None for row in still_open if row.metric == TRAINING_LOSS}:
        text = f"A training loss {100 * LOSS_MARGIN:g} % higher is not excluded for: "
        found.append(Finding(text + "; ".join(trained), "train longer (`train.max_steps`)"))
    return found


def drifted(drifts: Iterable[Trend], floor: float) -> list[Finding]:
    """Stages in which the baseline itself became faster or slower during the run."""
    return [
        Finding(
            f"The baseline drifted by {100 * (trend.ratio - 1):+.1f} % over {trend.blocks} blocks "
            f"of {trend.stage}",
            "pairing by block removes a smooth drift; look for heat, clocks or other users",
        )
        for trend in drifts
        if trend.p_value < ALPHA and abs(math.log(trend.ratio)) >= math.log1p(floor)
    ]


def ledger_gaps(ok: Sequence[Record]) -> list[Finding]:
    """Stages whose named phases leave out more than 5 % of the wall, or claim more than the whole
    of it; the worst share of each. The gap is counted, not believed: no phase may name itself so.
    """
    worst: dict[str, float] = {}
    over: dict[str, float] = {}
    for record in ok:
        share = 1 - named_seconds(record) / max(record["wall_s"], 1e-9)
        worst[record["stage"]] = max(share, worst.get(record["stage"], 0.0))
        over[record["stage"]] = max(-share, over.get(record["stage"], 0.0))
    return [
        Finding(
            f"{stage}: up to {100 * share:.0f} % of the wall lies outside every named phase",
            "step figures are not affected; whole-stage figures hold unnamed work",
        )
        for stage, share in worst.items()
        if share > UNACCOUNTED
    ] + [
        Finding(
            f"{stage}: the phases add up to {100 * (1 + share):.0f} % of the wall: some time is "
            "counted twice, or the wall is not the stage's",
            "trust neither the ledger nor the whole-stage figures of it",
        )
        for stage, share in over.items()
        if share > OVERBOOKED
    ]


def named_seconds(record: Record) -> float:
    """Seconds of a stage that its phases name."""
    phases = record.get("phases") or {}
    return math.fsum(seconds for name, seconds in phases.items() if name != "unaccounted")


def memory_contradictions(ok: Sequence[Record]) -> list[Finding]:
    """Figures of device memory that cannot all be right when records are held together."""
    advice = "close other programs on the device, or read the figures as theirs too"
    found = []
    for said in (invariants.not_given_back(ok), invariants.uneven_residuals(ok)):
        found += [Finding(text, advice) for text in said[:MOST_ALIKE]]
        if more := len(said) - MOST_ALIKE:
            found += [Finding(f"further ones of this kind: {more}", "")] * (more > 0)
    return found


def changed_data(ok: Sequence[Record]) -> list[Finding]:
    """Cells whose repeats were given different ratings: they are no repeats of one measurement."""
    digests: dict[str, set[str]] = {}
    for record in ok:
        if record.get("data_digest"):
            digests.setdefault(record["cell"], set()).add(record["data_digest"])
    odd = [cell for cell, found in digests.items() if len(found) > 1]
    if not odd:
        return []
    text = f"the ratings changed between the repeats of: {'; '.join(odd)}"
    return [Finding(text, "start a new run on data that stays as it is")]


def steps_against_stage(
    tables: Mapping[str, Sequence[Verdict]],
    cells: Sequence[Cell],
    ok: Sequence[Record],
    floor: float,
) -> list[Finding]:
    """Cells whose steps say one thing and whose whole stage another: time went where no step is,
    or into the few steps that a median does not see.
    """
    keys = {cell.name: cell.key for cell in cells}
    walls = {(r["key"], r["stage"], r["block"]): r["wall_s"] for r in ok}
    found: dict[str, list[str]] = {}
    for stage, rows in tables.items():
        for row in (one for one in rows if one.unit == "step" and one.call in OF_STEPS):
            pairs = [
                (wall, walls[keys[BASELINE], stage, block])
                for (key, of, block), wall in walls.items()
                if (key, of) == (keys[row.cell], stage) and (keys[BASELINE], stage, block) in walls
            ]
            effect = paired(*zip(*pairs, strict=True))
            whole, _ = decide(effect, floor)
            if whole in ("faster", "slower") and whole != row.call:
                ratio = f"{stage} (whole stage {math.exp(effect.mean):.3f}, steps {row.ratio:.3f})"
                text = f"{row.cell}: {whole} as a whole stage, though not by its steps"
                found.setdefault(text, []).append(ratio)
    return [Finding(f"{text}: {'; '.join(of)}", STEPS_LEAVE_OUT) for text, of in found.items()]


def copied(ok: Sequence[Record]) -> list[Finding]:
    """Processes whose times are equal to the bit: no clock does that twice."""
    known: dict[tuple[str, tuple[float, ...]], set[tuple[str, int]]] = {}
    for record in ok:
        times = tuple(step["seconds"] for step in record.get("steps") or []) or (record["wall_s"],)
        if len(times) >= FEWEST_COPIED:
            name = (record["cell"], record["block"])
            known.setdefault((record["stage"], times), set()).add(name)
    return [
        Finding(
            f"{stage}: {len(names)} processes have step times equal to the bit, of "
            f"{'; '.join(sorted({cell for cell, _ in names}))}: copied, not measured",
            "measure again with a worker that does the work",
        )
        for (stage, _), names in known.items()
        if len(names) > 1
    ]


def judged_by_wall(tables: Mapping[str, Sequence[Verdict]], ok: Sequence[Record]) -> list[Finding]:
    """Stages that have steps, but too few of them somewhere, so that the whole stage was judged."""
    stepping = {record["stage"] for record in ok if record.get("steps")}
    return [
        Finding(
            f"{stage}: too few steady steps in at least one cell; judged by its whole wall time",
            "more rows or epochs, or fewer `warmup_steps`",
        )
        for stage, rows in tables.items()
        if stage != TOTAL
        and stage in stepping
        and any(r.repeats and r.unit == "wall" for r in rows)
    ]


def too_few_repeats(rows: Sequence[Verdict], matrix: Matrix) -> list[Finding]:
    """How many repeats would decide the open comparisons."""
    needs = [row.needs for row in rows if row.call == "undecided"]
    if not needs:
        return []
    known = [need for need in needs if need is not None]
    hopeless = len(needs) - len(known)
    text = f"undecided comparisons: {len(needs)}"
    if hopeless:
        text += (
            f", {hopeless} of them lie on the floor and no sensible number of repeats decides them"
        )
    if not known:
        return [Finding(text, "treat those as equal")]
    key = "repeats" if matrix.max_repeats is None else "max_repeats"
    ran = max(matrix.repeats, *(row.repeats for row in rows))
    counts = sorted(ran + need for need in known)
    advice = f"`{key}: {counts[0]}` decides the first"
    if counts[-1] > counts[0]:
        advice += f", `{key}: {counts[-1]}` all {len(known)}"
    return [Finding(text, advice + ", if spread and estimate stay; the run resumes")]


def from_records(ok: Sequence[Record]) -> list[Finding]:
    """What the workers wrote themselves and what no record's figures may say; sentences that
    differ in their figures only are told once, with the first one's.
    """
    alike: dict[str, list[str]] = {}
    for record in ok:
        for said in dict.fromkeys(
            [*(record.get("warnings") or []), *invariants.violations(record)]
        ):
            text = f"{record['stage']}: {said}"
            alike.setdefault(FIGURES.sub("#", text), []).append(text)
    return [
        Finding(f"{first} ({len(all_)} record{'s' * (len(all_) > 1)})", "")
        for all_ in alike.values()
        for first in all_[:1]
    ]

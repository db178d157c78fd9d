"""The section of a report on profiles: what the steps of a cell are made of, and where the traces
lie.

Pure functions of `bench.profile.profiles` and of records.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.judging.figures import Record
from bench.profile import bottleneck
from bench.profile.arithmetic import Rates, rates
from bench.profile.profiles import Profile
from bench.reporting.ledger import told
from bench.reporting.strings import Words
from bench.reporting.tables import code, figure, plain, table

TOP, PLACES = 8, 3
MIB = 1 << 20


def section(profiles: Sequence[Profile], ok: Sequence[Record], say: Words) -> list[dict[str, Any]]:
    """One entry for each profiled cell, what the template shows of it."""
    return [
        {
            "cell": profile.cell,
            "trouble": trouble(profile, say),
            "snapshot": profile.snapshot,
            "ceilings": ceilings(profile.stages, say),
            "rates": rates_table(profile.stages, say),
            "stages": [
                stage_entry(stage, profile.folder, own(ok, profile.cell, stage["stage"]), say)
                for stage in profile.stages
            ],
        }
        for profile in profiles
    ]


def own(ok: Sequence[Record], cell: str, stage: str) -> list[Record]:
    """The ordinary records of a cell's stage."""
    return [record for record in ok if (record["cell"], record["stage"]) == (cell, stage)]


def trouble(profile: Profile, say: Words) -> str:
    """How a profile that did not end well ended; empty for one that did."""
    return (
        ""
        if profile.status == "ok"
        else plain(f"{profile.status}: {say.quoted(str(profile.reason))}")
    )


def stage_entry(
    stage: Mapping[str, Any], folder: str, records: Sequence[Record], say: Words
) -> dict[str, Any]:
    """Sentence, operators, memory and files of one stage."""
    window = stage["window"]
    return {
        "name": stage["stage"],
        "sentence": told(
            bottleneck.sentence(bottleneck.shares(stage["stage"], records, stage)), say
        ),
        "operators": operator_table(window, say) if window else "",
        "steps": window["steps"] if window else 0,
        "memory": memory_line(window["memory"], say) if window and window["memory"] else "",
        "missing": say.quoted(stage["missing"] or ""),
        "files": [(name, f"{folder}/{name}") for name in stage["files"]],
    }


def rates_table(stages: Sequence[Mapping[str, Any]], say: Words) -> str:
    """One row for each stage: what its probed steps reached."""
    found = [(stage, rates(stage)) for stage in stages]
    lines = [[stage["stage"], *row(stage, known)] for stage, known in found if known]
    head = ["stage", "step_ms", "wait", "issue", "cpu", "busy", "tflops", "hfu", "mfu", "traffic"]
    titles = [say(f"head.{name}") for name in [*head, "copy_rate", "attention"]]
    return table(titles, lines) if lines else ""


def row(stage: Mapping[str, Any], found: Rates) -> list[str]:
    """The figures of one stage."""
    busy = (stage["window"] or {}).get("device_busy")
    return [
        figure(1000 * found.step_s),
        share(found.wait_share),
        share(found.issue_share),
        share(found.cpu_share),
        share(busy),
        scaled(found.flops_per_s, 1e12),
        share(found.flops_share),
        share(found.mfu),
        scaled(found.bytes_per_s, 1e9),
        share(found.bytes_share),
        share(found.attention_share),
    ]


def share(value: float | None) -> str:
    """Per cent, or a dash."""
    return "–" if value is None else bottleneck.percent(value)


def scaled(value: float | None, unit: float) -> str:
    """A rate in its unit, or a dash."""
    return figure(None if value is None else value / unit)


def ceilings(stages: Sequence[Mapping[str, Any]], say: Words) -> str:
    """What the machine gave in the same process, each dtype once."""
    found = {one["ceilings"]["dtype"]: one["ceilings"] for one in stages}
    said = [
        say("profile.gemm", dtype=dtype, rate=figure(one["gemm_flops_per_s"] / 1e12))
        for dtype, one in found.items()
    ]
    copy = [
        say("profile.copy", rate=figure(one["copy_bytes_per_s"] / 1e9)) for one in found.values()
    ]
    return say("joint").join([*said, *copy[:1]])


def operator_table(window: Mapping[str, Any], say: Words) -> str:
    """The operators that took longest, and all others in one row."""
    steps = window["steps"]
    shown = window["operators"][:TOP]
    lines = [
        [
            code(one["name"]),
            share(one["share"]),
            figure(1000 * one["seconds"] / steps),
            f"{one['calls'] / steps:.0f}",
            ", ".join(one["dtypes"]) or "–",
        ]
        for one in shown
    ]
    left = 1 - sum(one["share"] for one in shown)
    rest = say("profile.rest")
    rest_ms = 1000 * left * window["seconds"] / steps
    lines.append([rest, share(max(0.0, left)), figure(max(0.0, rest_ms)), "–", "–"])
    head = ("operator", "share", "ms_step", "calls_step", "dtypes")
    return table([say(f"head.{name}") for name in head], lines)


def memory_line(memory: Mapping[str, Any], say: Words) -> str:
    """The peak inside the traced steps and what it was made of."""
    parts = [
        say("profile.part", name=name, size=f"{size / MIB:.1f}", count=count)
        for name, size, count in memory["at_peak"][:PLACES]
    ]
    peak = f"{memory['peak_bytes'] / MIB:.1f}"
    return say("profile.memory", peak=peak, parts=plain(say("joint").join(parts)))

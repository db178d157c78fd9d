"""The page a run of the guard writes: what was measured, what was accepted, what differs."""

from typing import TYPE_CHECKING

from bench.reporting.tables import code, plain, table

if TYPE_CHECKING:
    from perf.plugin import Ledger

HEAD = """\
# Speed of the pipeline's own code

Written by `make perf`; do not edit. Counters are exact: any change fails until it is accepted with
`make perf-accept`, which shows the difference. Ratios are reference time / time of the guarded
work, measured in turns in one process: above 1 the guarded work is the quicker one. The lower bound
of the 95 % interval must exceed the limit, 0.85 of the accepted ratio. A *reference* gives the same
result the old way; a *yardstick* is plain torch or numpy that strains the machine alike, so its
ratio tells whether the work became slower, not whether it is fast. The code is in `tests/perf`.
"""
OPERATOR = "operator "


def render(ledger: "Ledger") -> str:
    """Markdown of one session."""
    accepted = ledger.accepted
    parts = [HEAD, f"Baseline: {accepted.id if accepted else 'none'}. Machine: {ledger.machine}."]
    if ledger.complaints:
        parts += ["## Failed", "\n".join(f"- {plain(text)}" for text in ledger.complaints)]
    else:
        count = len(ledger.counters), len(ledger.ratios)
        parts.append("All of {} groups of counters and {} ratios hold.".format(*count))
    parts += ["## Ratios of times", _ratios(ledger), "## Counters", _counters(ledger)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _ratios(ledger: "Ledger") -> str:
    limits = ledger.accepted.ratios if ledger.accepted else {}
    rows = []
    for name, found in sorted(ledger.ratios.items()):
        limit = limits.get(name, {})
        bounds = f"{found.low:.2f} to {found.high:.2f}"
        known = [f"{limit[key]:.2f}" if limit else "–" for key in ("ratio", "at_least")]
        call = "holds" if limit and found.holds(limit["at_least"]) else "FAILS"
        figures = [f"{found.ratio:.2f}", bounds, *known, str(found.blocks)]
        rows.append([code(name), *figures, f"{found.milliseconds:.1f}", call])
    rows += [
        [code(name), *["–"] * 6, plain(f"not judged: {why}")]
        for name, why in sorted(ledger.unjudged.items())
    ]
    head = [
        "guarded work / reference",
        "ratio",
        "interval",
        "accepted",
        "limit",
        "blocks",
        "ms",
        "",
    ]
    return table(head, rows) if rows else "None was measured."


def _counters(ledger: "Ledger") -> str:
    accepted = ledger.accepted.counters if ledger.accepted else {}
    rows = []
    for name, found in sorted(ledger.counters.items()):
        known = accepted.get(name, {})
        kinds = sum(counter.startswith(OPERATOR) for counter in found)
        for counter in dict.fromkeys([*known, *found]):
            before, now = known.get(counter, 0), found.get(counter, 0)
            if not counter.startswith(OPERATOR) or before != now:
                change = "" if before == now else f"CHANGED {now - before:+d}"
                rows.append([code(name), counter, str(before), str(now), change])
        if kinds:
            rows.append([code(name), "kinds of operators", "", str(kinds), ""])
    return table(["work", "counter", "accepted", "now", ""], rows)

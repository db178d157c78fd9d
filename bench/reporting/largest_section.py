"""The section of a report on batch sizes that were `auto`: how each number was found.

A pure function of what `bench.largest` noted in machine.json.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.reporting.strings import Words
from bench.reporting.tables import gib, table

MIB = 1 << 20


def section(accounts: Sequence[Mapping[str, Any]], say: Words) -> list[dict[str, str]]:
    """One entry for each search: its sentences and the table of its probes."""
    return [
        {"sentences": " ".join(sentences(one, say)), "probes": probe_table(one, say)}
        for one in accounts
    ]


def sentences(one: Mapping[str, Any], say: Words) -> list[str]:
    """The answer and its peak, the model behind it, and where rows or slope ended."""
    ended = next(p for p in reversed(one["probes"]) if p["fits"] and p["batch"] >= one["number"])
    where = say("largest.where", cell=one["cell"]) if one["cell"] else ""
    room = say("largest.given" if one["given"] else "largest.free", room=gib(one["room_bytes"]))
    found = [
        say(
            "largest.found",
            setting=one["setting"],
            number=one["number"],
            where=where,
            percent=f"{100 * one['headroom']:g}",
            room=room,
            peak=gib(ended["peak_bytes"]),
        )
    ]
    if model := one["model"]:
        low, high = model["through"]
        slope = f"{model['slope_bytes'] / MIB:.2f}"
        base = gib(model["intercept_bytes"])
        found.append(say("largest.model", base=base, slope=slope, low=low, high=high))
    else:
        found.append(say("largest.flat"))
    if ended["batch"] < ended["asked"]:
        found.append(say("largest.rows", rows=ended["batch"]))
    return found


def probe_table(one: Mapping[str, Any], say: Words) -> str:
    """One row for each probe, in order."""
    heads = [say(f"head.{name}") for name in ("batch", "predicted_gib", "peak_gib", "outcome")]
    rows = [
        [
            str(probe["asked"]) + (f" ({probe['beside']})" if probe["beside"] else ""),
            gib(probe["expected_bytes"]),
            gib(probe["peak_bytes"]),
            outcome(probe, say),
        ]
        for probe in one["probes"]
    ]
    return table(heads, rows)


def outcome(probe: Mapping[str, Any], say: Words) -> str:
    """How a probe ended: whether it fits, or its status."""
    if probe["status"] != "ok":
        return str(probe["status"])
    return say("largest.fits" if probe["fits"] else "largest.above")

"""Disturbed repeats: which are measured once more, and which attempt of a repeat is judged.

The choice looks at the tags of the records alone, never at their figures, so it favours no cell.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Repeat = tuple[str, int]
"""(cell key, repeat)."""
BUDGET, TOO_SLOW = "budget", "too_slow"
"""`stopped_by` of rows of repeats that were left out."""
ORDINARY_SHARE = 0.5
"""Where more repeats than that are disturbed, the disturbance is how this machine is."""


def by_attempt(records: Iterable[Record]) -> dict[Repeat, dict[int, list[Record]]]:
    """Repeat -> attempt (0 = the first) -> records, of repeats that were measured."""
    found: dict[Repeat, dict[int, list[Record]]] = {}
    for record in records:
        if record["repeat"] and not record.get("stopped_by"):
            attempts = found.setdefault((record["key"], record["repeat"]), {})
            attempts.setdefault(record.get("attempt", 0), []).append(record)
    return found


def tags_of(attempt: Iterable[Record]) -> list[str]:
    """Everything that disturbed one process."""
    return [tag for record in attempt for tag in record.get("tags") or []]


def chosen(attempts: Mapping[int, Sequence[Record]], home: str | None = None) -> int:
    """The attempt to judge: whole before failed, then the least disturbed, then the first.

    So a repeat has its figures however noisy the machine is. Those of `home`, the node of a cluster
    where the block was measured to its end, come before all: pairs are of one machine.
    """

    def rank(number: int) -> tuple[bool, bool, int, int]:
        own = attempts[number]
        elsewhere = own[0].get("node") != home
        return elsewhere, any(r["status"] != "ok" for r in own), len(tags_of(own)), number

    return min(attempts, key=rank)


def judged(records: Sequence[Any]) -> list[Any]:
    """One attempt of each repeat; failures of the others stay, for they are failures of the cell,
    unless its node was lost under it.

    Of the rows of a repeat that was left out the last stays, if it was not measured later.
    """
    repeats = by_attempt(records)
    last = {(r["key"], r["repeat"], r["stage"]): r for r in records if r.get("stopped_by")}
    homes = {r["block"]: r["node"] for r in records if r.get("node")}
    choice = {name: chosen(own, homes.get(name[1])) for name, own in repeats.items()}

    def stays(record: Record) -> bool:
        name = (record["key"], record["repeat"])
        if record.get("stopped_by"):
            return name not in repeats and record is last[*name, record["stage"]]
        is_chosen = record.get("attempt", 0) == choice.get(name, 0)
        return is_chosen or (record["status"] != "ok" and not record.get("node_lost"))

    return [record for record in records if stays(record)]


def due_again(past: Sequence[Record], block: int, most: int) -> list[tuple[str, int]]:
    """(cell key, attempt) of repeats of a block to measure once more, each at most `most` times.

    None while more than half of all repeats so far are disturbed: another attempt would be too.
    """
    repeats = by_attempt(past)
    noisy = {
        name
        for name, attempts in repeats.items()
        if tags_of(attempts[chosen(attempts)])
        and all(record["status"] == "ok" for record in attempts[chosen(attempts)])
    }
    first = [name for name, attempts in repeats.items() if tags_of(attempts[min(attempts)])]
    if len(first) > ORDINARY_SHARE * len(repeats):
        return []
    return [
        (key, len(repeats[key, repeat]))
        for key, repeat in sorted(noisy)
        if repeat == block and len(repeats[key, repeat]) <= most
    ]

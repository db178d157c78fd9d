"""What was measured for one goal, and the page of all of them; no torch."""

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from bench.machine import environment, installed_version
from bench.reporting.tables import plain, table
from perf.timing import Paired

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")
HEAD = """\
# Speed goals, measured side by side

Written by `{command}`; do not edit. Each line sets the present code against another way of doing
the same: same weights, prompts, targets, rank, dtype, optimizer and real tokens. Loss, gradients
and top-k of both sides are compared first, and a pair that differs is not timed. Times are
{clock}, both sides in turns, every second block in reverse
order; a ratio is the median of the blocks' ratios, with the smallest and the largest beside it.
Counts are exact and made without computing anything. *Products and attention* is their part of the
time inside torch's operators on the present side; what Python does between them comes on top, so
the ratio that would be left without all the rest is an upper bound. The ways compared with are in
`tests/perf/old_way.py`, `tests/perf/reference.py` and `tests/perf/trainer_peer.py`.
"""


@dataclass(frozen=True)
class Found:
    """One line: a goal, what it is set against, what came out."""

    goal: str
    against: str
    wanted: float | None
    """The ratio that is wanted; None for a line that only explains another."""
    value: float | None = None
    """Median ratio, or count; None where nothing could be measured."""
    at_most: bool = False
    """Whether less is better."""
    spread: tuple[float, float] | None = None
    blocks: int = 0
    milliseconds: float | None = None
    equality: str = ""
    remark: str = ""

    @property
    def reached(self) -> bool | None:
        """None where there is nothing to reach or nothing was measured."""
        if self.wanted is None or self.value is None:
            return None
        return self.value <= self.wanted if self.at_most else self.value >= self.wanted

    @property
    def word(self) -> str:
        """As the page says it."""
        if self.wanted is None:
            return "–"
        return {True: "reached", False: "MISSED", None: "not measured"}[self.reached]


def timed(goal: str, against: str, wanted: float | None, ratio: Paired, **more) -> Found:
    """The line of a ratio of times."""
    return Found(
        goal,
        against,
        wanted,
        ratio.median,
        spread=(ratio.low, ratio.high),
        blocks=ratio.blocks,
        milliseconds=ratio.milliseconds,
        **more,
    )


def cells(one: Found) -> list[str]:
    """The line's columns."""
    bound = "" if one.wanted is None else f"{'≤' if one.at_most else '≥'} {one.wanted:g}"
    value = "–" if one.value is None else f"{one.value:.3f}"
    spread = f"{one.spread[0]:.3f} to {one.spread[1]:.3f}" if one.spread else ""
    own = "" if one.milliseconds is None else f"{one.milliseconds:.1f}"
    notes = "; ".join(filter(None, [one.equality, one.remark]))
    return [plain(one.goal), plain(one.against), bound, value, spread, str(one.blocks or ""), own,
            one.word, plain(notes)]  # fmt: skip


@dataclass(frozen=True)
class Made:
    """How a page came about."""

    program: str
    arguments: tuple[str, ...]
    clock: str
    """Whose seconds the times are."""
    device: str = ""
    """That did the work, where it was not the processor."""

    @property
    def command(self) -> str:
        """The command that makes the page."""
        return " ".join([f"PYTHONPATH=tests python -m {self.program}", *self.arguments])


def render(found: Sequence[Found], made: Made, left: Sequence[str] = ()) -> str:
    """The page: what was reached, the lines of each goal; `left`: goals not yet measured."""
    here = environment()
    versions = ", ".join(f"{name} {installed_version(name)}" for name in PACKAGES)
    git = here["git"] or {}
    commit = str(git.get("commit", "unknown"))[:9] + (" with changes" if git.get("dirty") else "")
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    judged = [one for one in found if one.wanted is not None]
    counts = {word: sum(one.word == word for one in judged) for word in
              ("reached", "MISSED", "not measured")}  # fmt: skip
    head = [
        "work",
        "against",
        "goal",
        "ratio",
        "smallest to largest",
        "blocks",
        "own ms",
        "",
        "notes",
    ]
    parts = [
        HEAD.format(command=made.command, clock=made.clock),
        f"Measured {now} UTC, commit {commit}, {made.device or here['cpu'] + ', one thread'}, load "
        f"{here['load_1min']:.1f} on {here['usable_cores']} cores; {platform.system()}, Python "
        f"{sys.version.split()[0]}, {versions}.",
        "Of {} goals: {}.".format(
            len(judged), ", ".join(f"{n} {word.lower()}" for word, n in counts.items())
        ),
        *([f"**Not finished**: {', '.join(left)} were not measured."] if left else []),
        table(head, [cells(one) for one in found]),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"

"""How often the rule of the verdicts errs, simulated; `python -m bench.simulation` prints it.

Processes as they are measured: steps with AR(1) noise (0.6) and 2 % outliers of 1.8 times, a spread
between processes, and 1 % of drift from block to block; cells interleaved in blocks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from tabulate import tabulate

from bench.judging.intervals import ALPHA, ONE_LOOK, Looks, call_of, decide, paired

Floats = NDArray[np.float64]
FLOOR = 0.02
STEPS, CORRELATION, STEP_SD = 60, 0.6, 0.02
OUTLIERS, OUTLIER_FACTOR = 0.02, 1.8
DRIFT = 0.01
QUIET, LOUD = 0.01, 0.04
"""Standard deviation between processes of one cell: of a good machine, and of a shared one."""
MANY = 9
"""Comparisons of a matrix, of which Holm's strictest step is shown."""
FIXED = (4, 5, 6, 8, 10)
SHIFTS = {"3 %": 1.03, "5 %": 1.05, "10 %": 1.1}
SEED = 20


@dataclass(frozen=True)
class Pairs:
    """Figures of a cell and the baseline, each (trials, blocks)."""

    cell: Floats
    baseline: Floats


def process_medians(
    random: np.random.Generator, trials: int, blocks: int, shift: float, between: float
) -> Floats:
    """Median step of fresh processes, (trials, blocks); `shift`: true ratio of the times."""
    shocks = STEP_SD * random.standard_normal((trials, blocks, STEPS))
    noise = np.zeros_like(shocks)
    for i in range(1, STEPS):
        noise[..., i] = CORRELATION * noise[..., i - 1] + shocks[..., i]
    outliers = np.where(random.random(shocks.shape) < OUTLIERS, OUTLIER_FACTOR, 1.0)
    process = between * random.standard_normal((trials, blocks, 1))
    drift = DRIFT * np.arange(blocks)[:, None]
    medians: Floats = np.median(shift * outliers * np.exp(noise + process + drift), axis=-1)
    return medians


def pairs(trials: int, blocks: int, shift: float, between: float = QUIET) -> Pairs:
    """Simulated runs of one cell and the baseline."""
    random = np.random.default_rng(SEED)
    cell = process_medians(random, trials, blocks, shift, between)
    return Pairs(cell, process_medians(random, trials, blocks, 1.0, between))


def at_fixed(data: Pairs, blocks: int, level: float = ALPHA) -> Counter[str]:
    """Calls after so many blocks, looked at once."""
    return Counter(
        call_of(paired(ours, theirs), FLOOR, level) for ours, theirs in rows(data, blocks)
    )


def with_looks(data: Pairs, looks: Looks, level: float, shared: bool) -> tuple[Counter[str], float]:
    """Calls and mean number of blocks of a run that stops when decided, or when the blocks left
    cannot decide it. `shared`: the looks share the level, as they do in the product.
    """
    calls: Counter[str] = Counter()
    used = 0
    for ours, theirs in rows(data, looks.last):
        for blocks in range(looks.first, looks.last + 1):
            effect = paired(ours[:blocks], theirs[:blocks])
            call, needs = decide(effect, FLOOR, level, looks if shared else ONE_LOOK)
            if call != "undecided" or needs is None or needs > looks.last - blocks:
                break
        calls[call] += 1
        used += blocks
    return calls, used / len(data.cell)


def as_advised(data: Pairs, first: int, sittings: int) -> Counter[str]:
    """Calls where a user adds what `undecided (needs k more)` asks for, so many times at most."""
    calls: Counter[str] = Counter()
    for ours, theirs in rows(data, data.cell.shape[1]):
        blocks = first
        for _ in range(sittings + 1):
            call, needs = decide(paired(ours[:blocks], theirs[:blocks]), FLOOR)
            if needs is None or blocks + needs > len(ours):
                break
            blocks += needs
        calls[call] += 1
    return calls


def rows(data: Pairs, blocks: int) -> list[tuple[Sequence[float], Sequence[float]]]:
    """One pair of figure lists for each trial."""
    cut = (side[:, :blocks].tolist() for side in (data.cell, data.baseline))
    return list(zip(*cut, strict=True))


def claimed(calls: Counter[str]) -> float:
    """Share of trials called faster or slower."""
    return (calls["faster"] + calls["slower"]) / calls.total()


def fixed_table(trials: int) -> list[list[str]]:
    """Error rates and power of a fixed number of blocks."""
    equal = pairs(trials, max(FIXED), 1.0)
    loud = pairs(trials, max(FIXED), 1.0, LOUD)
    lines: list[list[Any]] = [
        ["equal cells called faster or slower", *(claimed(at_fixed(equal, n)) for n in FIXED)],
        ["the same, 4 % between processes", *(claimed(at_fixed(loud, n)) for n in FIXED)],
        ["equal cells called same", *(at_fixed(equal, n)["same"] / trials for n in FIXED)],
    ]
    for level, what in ((ALPHA, "found"), (ALPHA / MANY, f"found, strictest of {MANY}")):
        for name, shift in SHIFTS.items():
            data = pairs(trials, max(FIXED), shift)
            lines.append(
                [f"true {name} {what}", *(claimed(at_fixed(data, n, level)) for n in FIXED)]
            )
    return [[str(name), *(percent(share) for share in shares)] for name, *shares in lines]


def looks_table(trials: int) -> list[list[str]]:
    """Five fixed blocks against four to eight, with looks that share the level or do not."""
    looks = Looks(4, 8)
    lines = []
    for name, shift, between in (
        ("equal cells", 1.0, QUIET),
        ("equal cells, 4 % between processes", 1.0, LOUD),
        *((f"true {name}", shift, QUIET) for name, shift in SHIFTS.items()),
        ("true 3 times", 3.0, QUIET),
    ):
        data = pairs(trials, looks.last, shift, between)
        line = [name]
        for level in (ALPHA, ALPHA / MANY):
            fixed = at_fixed(data, 5, level)
            line += [f"{percent(claimed(fixed))} · {percent(fixed['same'] / trials)}"]
            for shared in (True, False):
                calls, used = with_looks(data, looks, level, shared)
                both = f"{percent(claimed(calls))} · {percent(calls['same'] / trials)}"
                line.append(f"{both} ({used:.1f})")
        lines.append(line)
    return lines


def advice_table(trials: int) -> list[list[str]]:
    """False alarms of adding repeats by hand, as `undecided (needs k more)` says."""
    return [
        [
            f"{100 * between:.0f} % between processes",
            *(
                percent(claimed(as_advised(pairs(trials, 30, 1.0, between), 5, sittings)))
                for sittings in range(4)
            ),
        ]
        for between in (QUIET, LOUD)
    ]


def percent(share: float) -> str:
    """A share in per cent, one decimal below ten."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def page(trials: int) -> str:
    """All tables as Markdown."""
    sets = f"One comparison, {trials} simulated runs for each figure, floor {100 * FLOOR:g} %."
    looked = ["5 fixed", "4 to 8, shared", "4 to 8, not shared"]
    return "\n\n".join(
        [
            "## A fixed number of blocks",
            sets,
            markdown(["", *(f"n = {n}" for n in FIXED)], fixed_table(trials)),
            "## Stopping early, adding blocks (`max_repeats`)",
            "Called faster or slower · called same (mean blocks). A look after each block from the "
            "4th on, the run ends when the comparison is decided or the blocks left cannot decide "
            "it. *Shared*, the product's rule: half of the level for all looks before the last "
            "together, half for the last. *Not shared*: the full level at every look. "
            f"Left one comparison, right the strictest of {MANY}.",
            markdown(
                ["", *looked, *(f"{name} (of {MANY})" for name in looked)], looks_table(trials)
            ),
            "## Adding repeats by hand (`--resume --repeats`)",
            "Equal cells called faster or slower when a run of 5 is given what `undecided (needs k "
            "more)` asks for, up to 30 blocks in all. These looks share nothing: `max_repeats` is "
            "the honest way.",
            markdown(["", *(f"{n} times" for n in range(4))], advice_table(trials)),
        ]
    )


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column left."""
    align = ["left", *["right"] * (len(head) - 1)]
    return str(tabulate(lines, head, tablefmt="pipe", disable_numparse=True, colalign=align))


def main(
    trials: Annotated[int, typer.Option(help="Simulated runs for each figure.")] = 2000,
) -> None:
    """Print how often verdicts are wrong, and what differences are found, as Markdown."""
    print(page(trials))


if __name__ == "__main__":
    typer.run(main)

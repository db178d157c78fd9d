"""One command for all goals of speed: measures, writes `reports/goals.md`.

`PYTHONPATH=tests python -m perf.goals [NAME ...]`; names choose some goals, and then the page goes
to standard output. Exit status: 0 all that was measured is reached, 1 something is missed, 2 a pair
of sides turned out unequal, so it was not timed.
"""

import gc
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from core.settings import SyntheticSettings
from perf import found as page
from perf import goal_parts, goal_teacher, goal_trainer
from perf.equality import Unequal
from perf.found import Found
from perf.world import World

BLOCKS, PAGE = 5, Path("reports/goals.md")
WORLD, LONG = World(), World(max_history=50)
ONE_USER = World(
    max_history=50,
    whole_users=1,
    synthetic=SyntheticSettings(users=20, items=2400, mean_length=100),
)
Goal = Callable[[int], Iterator[Found]]
GOALS: Mapping[str, Goal] = {
    "shapes": lambda blocks: goal_parts.shapes(),
    "padding": lambda blocks: goal_parts.padding(),
    "ranking": goal_parts.full_ranking,
    "layer": goal_parts.gated_layer,
    "outputs": lambda blocks: goal_teacher.outputs_rate(WORLD, blocks),
    "gating": lambda blocks: goal_parts.gating(WORLD, blocks),
    "evaluation": lambda blocks: goal_teacher.evaluation(WORLD, blocks),
    "training": lambda blocks: goal_teacher.training(WORLD, blocks),
    "trainer": lambda blocks: goal_trainer.trainer(WORLD, blocks),
    "causal": lambda blocks: goal_teacher.causal(ONE_USER, blocks),
    "long": lambda blocks: goal_teacher.training(LONG, blocks),
    "long evaluation": lambda blocks: goal_teacher.evaluation(LONG, blocks),
}
CLOCK = "the process's own processor seconds on one thread"


def measured(goals: Mapping[str, Goal], blocks: int) -> Iterator[Found]:
    """The lines of the goals, one after the other; a pair that is not equal becomes a line too."""
    for name, goal in goals.items():
        try:
            for one in goal(blocks):
                print("  ".join(page.cells(one)), file=sys.stderr, flush=True)
                yield one
        except Unequal as error:
            yield Found(name, "", float("inf"), remark=f"UNEQUAL: {error}")
        if torch.cuda.is_available():  # the next models want the memory
            gc.collect()
            torch.cuda.empty_cache()


def parser(prog: str, description: str, names: Iterable[str], out: Path) -> ArgumentParser:
    """The command line of a set of goals."""
    found = ArgumentParser(prog=prog, description=description)
    found.add_argument("names", nargs="*", choices=[[], *names], help="some goals only")
    found.add_argument("--blocks", type=int, default=BLOCKS)
    found.add_argument("--out", type=Path, help=f"page; {out}, and of some goals the console")
    return found


def main(arguments: list[str]) -> int:
    """Measure and write; the exit status."""
    given = parser("perf.goals", __doc__, GOALS, PAGE).parse_args(arguments)
    torch.set_num_threads(1)
    return measure(GOALS, given, PAGE, page.Made("perf.goals", tuple(arguments), CLOCK))


def measure(goals: Mapping[str, Goal], given: Namespace, page_file: Path, made: page.Made) -> int:
    """Measure the goals asked for and write the page; the exit status."""
    chosen = {name: goal for name, goal in goals.items() if not given.names or name in given.names}
    out = given.out or (None if given.names else page_file)
    found: list[Found] = []
    for number, name in enumerate(chosen, 1):  # the page grows, for a whole run takes long
        found += measured({name: chosen[name]}, given.blocks)
        text = page.render(found, made, list(chosen)[number:])
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            partial = out.with_name(f".{out.name}.partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(out)
    print(out or text)
    if any("UNEQUAL" in one.remark for one in found):
        return 2
    return int(any(one.reached is False for one in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Faults planted into the guarded code, to see that the guard finds them: `-p perf.plants`.

The environment variable PERF_PLANT names them: `operator` adds one to every training step of the
teacher, `slow` makes every step of every training loop take 30 % longer.
"""

import os
from collections.abc import Iterator

from perf.timing import own_seconds

SHARE = 0.3


def pytest_collection_finish() -> None:
    plants = {"operator": add_operator, "slow": slow_down}
    for name in filter(None, os.environ.get("PERF_PLANT", "").split(",")):
        plants[name]()


def add_operator() -> None:
    """A forgotten multiplication in the teacher's loss."""
    from core import teacher

    original = teacher.training_loss
    teacher.training_loss = lambda *given: 1.0 * original(*given)


def slow_down() -> None:
    """Work that nobody wants after each step, for 30 % of the step's time."""
    from core import loop

    original = loop.delivered

    def delivered(*given) -> Iterator[dict]:
        for batch in original(*given):
            begun = own_seconds()
            yield batch
            until = own_seconds() + SHARE * (own_seconds() - begun)
            while own_seconds() < until:
                pass

    loop.delivered = delivered

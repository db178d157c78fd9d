"""How a contender is told what to do: one JSON command a line on its standard input, one answer a
line on its standard output; CPU seconds and peak memory are measured here, alike for all.

Runs in a peer's own interpreter too, so it imports nothing but the standard library and numpy.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TOP_K = 10
LENGTH, WIDTH, BLOCKS, HEADS, DROPOUT, BATCH = 200, 64, 2, 1, 0.1, 128
"""The model and the batch that all contenders share."""


class Split:
    """The rows every contender trains on and is asked for, out of a folder of `core.data.save`."""

    def __init__(self, folder: Path):
        self.items, self.offsets = (np.load(folder / f"{n}.npy") for n in ("items", "offsets"))
        facts = json.loads((folder / "prepared.json").read_text())
        self.num_items, self.digest = len(facts["titles"]) - 1, facts["digest"]

    def histories(self, held_out: int) -> list[np.ndarray]:
        """Each user's items but the newest `held_out`, oldest first: 2 = train part and validation
        history, 1 = test history.
        """
        starts, ends = self.offsets[:-1], self.offsets[1:] - held_out
        return [self.items[a:b] for a, b in zip(starts, ends, strict=True)]

    def targets(self, held_out: int) -> np.ndarray:
        """The item each user is asked for, (U,)."""
        return self.items[self.offsets[1:] - held_out]


def windows(histories: list[np.ndarray]) -> list[np.ndarray]:
    """Training rows: the newest `LENGTH` next-item pairs of everyone who has one."""
    return [row[-LENGTH - 1 :] for row in histories if len(row) >= 2]


class Desk:
    """Answers commands until the next step is wanted, then gives the control back to whatever
    loop trains.

    Commands: `{"do": "train", "steps": n}`, `{"do": "top", "held_out": 1 | 2, "to": path}` and
    `{"do": "stop"}`.
    """

    def __init__(self, top: Callable[[int], np.ndarray], about: dict[str, Any]):
        """`top(held_out)` gives the ten best unseen items of every user, (U, 10), ids from 1."""
        self.top, self.about = top, about
        # Libraries print what they like: answers get the true standard output for themselves.
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.wanted = self.steps = self.targets = 0
        self.begun = 0.0

    def begin(self) -> bool:
        """Everything is loaded: tell what stands ready and wait; False = stop."""
        self._answer(self.about)
        return self._serve()

    def step_done(self, targets: int) -> bool:
        """A step on so many real targets has ended; True = take another, False = stop."""
        self.steps += 1
        self.targets += targets
        if self.steps < self.wanted:
            return True
        seconds = time.process_time() - self.begun
        self._answer({"cpu_s": seconds, "steps": self.steps, "targets": self.targets})
        return self._serve()

    def over(self) -> None:
        """The loop has taken its last step: tell how many of the wanted ones it took, rank on."""
        while True:
            seconds = time.process_time() - self.begun
            self._answer({"cpu_s": seconds, "steps": self.steps, "targets": self.targets})
            if not self._serve():
                return

    def _serve(self) -> bool:
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "train":
                self.wanted, self.steps, self.targets = command["steps"], 0, 0
                self.begun = time.process_time()
                return True
            if command["do"] == "stop":
                break
            begun = time.process_time()
            best = self.top(command["held_out"])
            seconds = time.process_time() - begun
            np.save(command["to"], best)
            self._answer({"cpu_s": seconds, "users": len(best)})
        return False

    def _answer(self, answer: dict[str, Any]) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(answer | {"peak_rss_mib": peak}), file=self.out, flush=True)

"""Ratios of full ranking and of teacher outputs, guarded: results are equal before any time."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from core import outputs, stages
from core import teacher as teaching
from core.overlap import Overlapped
from perf import workloads
from perf.full_ranking import Ranked

pytestmark = pytest.mark.perf
# Small enough for a core's cache: what others do with the memory would move one side alone. The
# full size is a goal of its own (`perf.goals`).
USERS, ITEMS = 64, 400


@pytest.mark.parametrize("way", ["list", "sorting", "counting"])
def test_full_ranking_against_a_loop_over_users(guard, way):
    work = Ranked.drawn(USERS, ITEMS)
    before = getattr(work, f"by_{way}_loop")
    # A product with one user's state and with a batch's round differently: near ties may swap.
    difference = np.abs(np.array(work.now()) - np.array(before()))
    assert (difference == 0).mean() > 0.98 and difference.max() <= 1
    guard.ratio(f"full ranking / {way} loop over users", before, work.now)


def test_outputs_against_the_forward_alone(guard):
    """What making and storing outputs adds; 1 = nothing."""
    given = tiny.settings(inference_batch_size=64)
    model, queries = tiny.teacher(given), tiny.queries()
    observer = workloads.unobserved()

    def forward() -> None:
        for _ in teaching.infer(model, tiny.pieces(), queries, given, observer):
            pass

    def outputs_too() -> None:
        with tempfile.TemporaryDirectory(dir=workloads_folder()) as folder:
            writer = outputs.Writer(
                Path(folder) / "o", samples=len(queries), top_k=10, width=model.width, hashes={}
            )
            said = functools.partial(stages.output_columns, kept=10)
            with writer, Overlapped(said, writer.write) as store, torch.inference_mode():
                for batch, state, scores in teaching.infer(
                    model, tiny.pieces(), queries, given, observer
                ):
                    store(batch["rows"].numpy(), scores, batch["targets"], state)

    guard.ratio("forward alone / outputs", forward, outputs_too)


def workloads_folder() -> str | None:
    """In memory where there is such a place: a disk's moods would decide."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None

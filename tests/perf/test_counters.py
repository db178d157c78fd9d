"""Exact counters of the guarded work: operators, FLOPs, saved bytes, batches, padding, files."""

from typing import get_args

import pytest

from core.settings import Batching
from perf import shape_counts, workloads
from perf.counters import counted
from perf.goal_parts import planned_tokens
from perf.world import World

pytestmark = pytest.mark.perf
IN_MEMORY = {
    "teacher_fit": workloads.teacher_fit,
    "teacher_inference": workloads.teacher_inference,
    "student_fit": workloads.student_fit,
    "ranking": workloads.ranking_of_users,
}
ON_DISK = {
    "outputs_writing": workloads.outputs_writing,
    "checkpoint_writing": workloads.checkpoint_writing,
}


@pytest.mark.parametrize("name", IN_MEMORY)
def test_counters(name, guard):
    guard.counters(name, counted(IN_MEMORY[name]()))


@pytest.mark.parametrize("name", ON_DISK)
def test_counters_of_files(name, guard, tmp_path):
    guard.counters(name, counted(ON_DISK[name](tmp_path / "files")))


@pytest.mark.parametrize("form", shape_counts.FORMS)
def test_counters_of_opt_125m(form, guard):
    guard.counters(f"opt-125m shape, {form}", shape_counts.counts("opt-125m", form))


def test_counters_of_llama_2_7b(guard):
    guard.counters("llama-2-7b shape, present", shape_counts.counts("llama-2-7b", "present"))


@pytest.mark.parametrize("batching", get_args(Batching))
def test_counters_of_padding(batching, guard):
    tokens = planned_tokens(World(preset="tiny"), 16, batching)
    guard.counters(f"tokens of an epoch, {batching}", tokens)

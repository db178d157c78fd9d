"""Exact counters of the guarded work: operators, FLOPs, saved bytes, batches, padding, files."""

import pytest

from perf import workloads
from perf.counters import counted

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

"""What a GPU is to run, seen through on the processor: the tests' own step, and the script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from perf import on_gpu
from test_hot_step import Step

SCRIPT = Path(__file__).with_name("run.sh")
CPU = torch.device("cpu")


def run(out: Path, *parts: str, **variables: str) -> subprocess.CompletedProcess:
    given = os.environ | {"PYTHON": sys.executable, **variables}
    return subprocess.run([SCRIPT, out, *parts], env=given, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("given", "operands"),
    [
        ({"precision": "bf16-mixed"}, "bfloat16"),
        ({"precision": "fp32", "batching": "packed"}, "float32"),
        ({"precision": "fp32", "adapter": "qlora"}, "float32"),
    ],
)
def test_the_step_of_the_gpu_tests_trains(given, operands):
    step = Step(device=CPU, **given)
    assert set(step.observed()["gemm_dtypes"]) == {operands}
    losses = [float(step.run(step.batches[0])) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_without_a_gpu_the_goals_are_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="no CUDA device; --rehearse"):
        on_gpu.main([])


def test_an_unknown_part_is_refused(tmp_path):
    done = run(tmp_path, "godls")
    assert done.returncode == 2
    assert "no part godls" in done.stderr


@pytest.mark.slow
def test_the_whole_script_can_be_rehearsed(tmp_path):
    done = run(tmp_path, "tests", "goals", "large", "pipeline", SCALE="6", BLOCKS="1")
    said = done.stdout + done.stderr
    for name in ("goals.md", "large.md"):
        text = (tmp_path / name).read_text()
        assert "UNEQUAL" not in text, text
        assert "Not finished" not in text, said
    assert "== pipeline: exit 0" in said, said
    assert list(tmp_path.glob("pipeline/*/report.md")), said

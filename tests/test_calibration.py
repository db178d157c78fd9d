"""The kernels that tell a machine's speed: measured in a child, in turns, and read as ratios."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from bench.comparing import calibration

ROOT = Path(__file__).resolve().parent.parent
FAKE = f"{sys.executable} {ROOT / 'tests' / 'fake_worker.py'}"


class Clock:
    """Seconds that pass only when a kernel says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_child_measures_every_kernel():
    found = calibration.measure("cpu")
    assert found["device"] == "cpu" and found["threads"] == 1
    assert set(found["kernels"]) == {
        "gemm_float32", "gemm_bfloat16", "copy", "small_kernels", "interpreter"
    }  # fmt: skip
    for kernel in found["kernels"].values():
        assert 1e-6 < kernel["seconds"] < 1
        assert kernel["rounds"] >= calibration.LEAST_ROUNDS and kernel["spread"] >= 0


def test_a_child_that_cannot_gives_a_reason():
    assert "KeyError" in calibration.measure("abacus")["unavailable"]
    assert calibration.measure("cpu", limit_s=0.01) == {"unavailable": "no answer within 0.01 s"}


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-6, calibration.MOST_ROUNDS), (3.0, 5)])
def test_kernels_take_turns_after_a_first_call_that_does_not_count(seconds, rounds):
    clock, order = Clock(), []

    def kernel(name: str, cost: float) -> None:
        clock.now += 100 * cost if order.count(name) == 0 else cost
        order.append(name)

    found = calibration.timed(
        {"a": lambda: kernel("a", seconds), "b": lambda: kernel("b", 2 * seconds)}, clock
    )
    assert order == ["a", "b"] * (rounds + 1)
    assert found["a"]["seconds"] == pytest.approx(seconds, rel=1e-3)
    assert found["b"]["seconds"] == pytest.approx(2 * seconds, rel=1e-3)
    assert found["a"]["rounds"] == rounds and found["a"]["spread"] == pytest.approx(0, abs=1e-3)


def test_another_program_in_the_workers_place_is_not_calibrated(monkeypatch):
    monkeypatch.setattr(calibration, "measure", lambda device: {"device": device})
    own = [sys.executable, "-m", "bench.worker"]
    assert calibration.of_run(own, on_gpu=False) == {"device": "cpu"}
    assert calibration.of_run(own, on_gpu=True) == {"device": "cuda"}
    assert "unavailable" in calibration.of_run(FAKE.split(), on_gpu=False)


def kernels(**seconds: float) -> dict:
    return {"device": "cpu", "kernels": {name: {"seconds": s} for name, s in seconds.items()}}


def test_ratios_need_two_calibrations_of_one_kind():
    before, after = (
        kernels(copy=1.0, gemm_float32=2.0, old=1.0),
        kernels(copy=3.0, gemm_float32=4.0),
    )
    assert calibration.slower_by(before, after) == {"copy": 3.0, "gemm_float32": 2.0}
    assert calibration.slower_by(before, {"unavailable": "no torch"}) == {}
    assert calibration.slower_by(None, after) == {}
    assert calibration.slower_by(before, after | {"device": "cuda"}) == {}


def test_only_products_in_the_dtypes_that_ran_count():
    ratios = {"gemm_float32": 2.0, "gemm_bfloat16": 9.0, "copy": 1.5}
    low, high = calibration.machine_range(ratios, ["float32"])
    assert (math.exp(low), math.exp(high)) == pytest.approx((1.5, 2.0))
    low, high = calibration.machine_range(ratios, ["bfloat16", "float32"])
    assert (math.exp(low), math.exp(high)) == pytest.approx((1.5, 9.0))
    assert calibration.machine_range({}, ["float32"]) is None


def test_a_run_stores_it_once_and_a_plan_does_not_wait_for_it(tmp_path):
    matrix = tmp_path / "small.yaml"
    matrix.write_text("question: Does it?\nstages: [teacher_test]\nrepeats: 1\naxes: {seed: [0]}\n")
    command = [sys.executable, "-m", "bench.run", str(matrix), "--out", str(tmp_path / "out")]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60}
    planned = subprocess.run([*command, "--plan"], **options)
    assert planned.returncode == 0 and not list(tmp_path.glob("out/*/*"))
    done = subprocess.run([*command, "--worker", FAKE], **options)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("out/small/*/machine.json")
    found = json.loads(path.read_text())
    assert found["calibration"] == {"unavailable": "--worker replaces the measured program"}
    assert len(found["code"]) == 16

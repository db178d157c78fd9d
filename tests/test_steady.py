"""Where warming up ends, on made-up traces whose truth is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.judging.figures import steady_figure
from bench.judging.steady import steady_start


def trace(seed: int, count: int, noise: float, slow: int = 0, factor: float = 10.0) -> list[float]:
    """Steps of about one second, the first `slow` ones `factor` times as long."""
    random = np.random.default_rng(seed)
    steps = np.exp(noise * random.standard_normal(count))
    steps[:slow] *= factor
    return [float(x) for x in steps]


def record(seconds: list[float], warmup_steps: int = 0, tokens: list[int] | None = None) -> dict:
    steps = [
        {
            "seconds": x,
            "samples": 1,
            "padded_tokens": tokens[i] if tokens else 8,
            "optimizer_step": False,
        }
        for i, x in enumerate(seconds)
    ]
    return {"steps": steps, "warmup_steps": warmup_steps}


@settings(max_examples=80)
@given(st.integers(0, 10_000), st.integers(20, 300), st.floats(0, 0.02))
def test_five_slow_steps_are_left_out_and_the_rest_tells_the_truth(seed, count, noise):
    figure = steady_figure(record(trace(seed, count, noise, slow=5)))
    assert figure.steady
    assert figure.warm_up >= 5
    # Two per cent, and what the median of the trace itself may miss.
    assert abs(figure.seconds - 1) <= 0.02 + 4 * noise / math.sqrt(count - 5)


@given(st.integers(1, 300), st.floats(1e-6, 1e3))
def test_a_constant_trace_loses_nothing(count, value):
    figure = steady_figure(record([value] * count))
    assert (figure.warm_up, figure.steady) == (0, True)
    assert figure.seconds == pytest.approx(value)


def test_a_noisy_steady_trace_loses_little():
    lost = [steady_start(trace(seed, 60, 0.1)) for seed in range(200)]
    assert None not in lost
    assert sum(lost) / len(lost) < 3


@pytest.mark.parametrize("slope", [0.99, 1.01])
def test_a_trace_that_never_settles_is_said_to(slope):
    figure = steady_figure(record([slope**i for i in range(100)], warmup_steps=2))
    assert (figure.steady, figure.warm_up) == (False, 2)


def test_a_slow_decay_is_waited_for():
    decay = [1 + 4 * math.exp(-i / 6) for i in range(80)]
    figure = steady_figure(record(decay))
    assert figure.steady
    assert 10 < figure.warm_up < 40
    assert figure.seconds == pytest.approx(1, rel=0.02)


def test_the_fewest_warm_up_steps_are_always_left_out():
    assert steady_figure(record([1.0] * 20, warmup_steps=3)).warm_up == 3


def test_batches_sorted_by_length_are_no_warming_up():
    """Longest first: seconds per sample fall to the end, seconds per token do not."""
    tokens = [200 - i for i in range(100)]
    figure = steady_figure(record([0.01 * n for n in tokens], tokens=tokens))
    assert (figure.steady, figure.warm_up) == (True, 0)


def test_too_few_steps_to_tell_count_as_steady():
    assert steady_start([9.0, 1.0, 1.0, 1.0, 1.0]) == 0
    assert steady_start([0.0] * 20) == 0

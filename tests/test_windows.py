"""What the samples of a stage say: peaks, energy, throttling, ranges, processes; or why nothing."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from bench.metering import windows
from bench.metering.windows import device_figures
from bench.nvml import THROTTLES, Unavailable

WIDE = {"sm_mhz": 1000, "memory_mhz": 2000, "temperature_c": 40, "slowdowns": [], "processes": []}
OWN = {"pid": 1, "bytes": 7, "own": True, "name": None}
FOREIGN = {"pid": 2, "bytes": 3, "own": False, "name": "python"}


def sample(at_s: float, used: Any = 5, **more: Any) -> dict[str, Any]:
    return {"monotonic_s": at_s, "used_bytes": used, **more}


def forced(at_s: float, energy_mj: Any = 0, power_ns: Any = 0, **more: Any) -> dict[str, Any]:
    counters = dict.fromkeys(THROTTLES, 0) | {"power": power_ns}
    return sample(at_s, energy_mj=energy_mj, throttled_ns=counters, **WIDE) | more


def facts(*samples: dict[str, Any], period_s: float | None = 0.02) -> dict[str, Any]:
    return device_figures(samples, period_s)[-1]


@given(some.lists(some.integers(0, 1 << 40), min_size=2), some.floats(0.01, 1))
def test_the_peak_is_the_largest_sample(used: list[int], apart_s: float) -> None:
    samples = [forced(i * apart_s) | {"used_bytes": value} for i, value in enumerate(used)]
    peak, _, _, found = device_figures(samples, None)
    assert peak == max(used)
    assert found["samples"] == len(used)
    assert found["interval_s"] == pytest.approx(apart_s)
    assert found["longest_gap_s"] == pytest.approx(apart_s)


def test_one_failed_sample_leaves_no_peak() -> None:
    samples = [forced(0), sample(1, {"unavailable": "lost"}), forced(2)]
    assert windows.peak_bytes(samples) == Unavailable("1 of 3 samples failed: lost")
    assert windows.peak_bytes([]) == Unavailable("no sample in this time")


def test_a_silent_time_is_seen() -> None:
    found = facts(forced(0), sample(1), sample(8), forced(9))
    assert found["longest_gap_s"] == 7


# ---- counters ----


@given(some.floats(0.001, 100), some.floats(0.001, 1), some.integers(1, 10**9))
def test_energy_is_a_difference_over_a_window_that_is_long_enough(
    lasted_s: float, period_s: float, moved_mj: int
) -> None:
    joules = windows.energy_j(forced(0, 1000), forced(lasted_s, 1000 + moved_mj), period_s)
    if lasted_s < 20 * period_s:
        assert isinstance(joules, Unavailable)
        assert joules.reason.startswith("too short: ")
    else:
        assert joules == pytest.approx(moved_mj / 1000)


@pytest.mark.parametrize(
    ("begin", "end", "reason"),
    [
        (5, 5, "stood still"),
        (5, 4, "went back from 5 to 4"),
        ({"unavailable": "Not Supported"}, 5, "Not Supported"),
        (5, {"unavailable": "GPU is lost"}, "GPU is lost"),
        (None, 5, "not read"),
    ],
)
def test_energy_without_a_sound_counter_is_a_reason(begin: Any, end: Any, reason: str) -> None:
    joules = windows.energy_j(forced(0, begin), forced(100, end), 0.02)
    assert isinstance(joules, Unavailable)
    assert reason in joules.reason


def test_the_period_of_a_counter_nobody_saw_is_assumed_and_said_to_be() -> None:
    short = facts(forced(0), forced(1.9), period_s=None)
    assert (short["counter_period_s"], short["counter_period"]) == (0.1, "assumed")
    assert "too short" in short["throttled_s"]["power"]["unavailable"]
    long = facts(forced(0), forced(1.9), period_s=0.05)
    assert long["counter_period"] == "measured"
    assert long["throttled_s"]["power"] == 0


def test_throttling_is_seconds_of_the_stage() -> None:
    found = facts(forced(0, power_ns=5), forced(10, power_ns=1_200_000_005))
    assert found["throttled_s"] == dict.fromkeys(THROTTLES, 0) | {"power": 1.2}


def test_a_counter_that_ran_for_longer_than_the_stage_is_no_time() -> None:
    """Another unit, or another counter."""
    found = facts(forced(0), forced(10, power_ns=10_500_000_000))
    assert found["throttled_s"]["power"] == {
        "unavailable": "the counter moved 10500000000 ns in 10 s"
    }


def test_counters_a_driver_lacks_are_one_reason() -> None:
    lacking = {"throttled_ns": {"unavailable": "Function Not Found"}}
    assert facts(forced(0) | lacking, forced(10) | lacking)["throttled_s"] == {
        "unavailable": "Function Not Found"
    }


# ---- ranges ----


def test_clocks_are_told_as_a_range_over_what_was_read() -> None:
    no = {"unavailable": "no"}
    found = facts(
        forced(0), forced(1) | {"sm_mhz": 1500, "temperature_c": no}, sample(2), forced(3)
    )
    assert found["sm_mhz"] == [1000, 1500]
    assert found["temperature_c"] == [40, 40]
    assert found["readings"] == 3


def test_clocks_nobody_read_are_a_reason() -> None:
    no = {"sm_mhz": {"unavailable": "Not Supported"}, "slowdowns": {"unavailable": "why"}}
    found = facts(forced(0) | no, forced(1) | no)
    assert found["sm_mhz"] == {"unavailable": "Not Supported"}
    assert found["slowdowns"] == {"unavailable": "why"}


def test_slowdowns_are_counted() -> None:
    hot = {"slowdowns": ["hw_thermal"]}
    assert facts(forced(0), forced(1) | hot, forced(2) | hot)["slowdowns"] == {"hw_thermal": 2}


# ---- processes ----


def figures_of(*lists: Any) -> tuple[Any, Any]:
    samples = [forced(i) | {"processes": one} for i, one in enumerate(lists)]
    _, _, own, found = device_figures(samples, None)
    return own, found["foreign_processes"]


def test_processes_are_told_with_their_largest_reading() -> None:
    own, foreign = figures_of([OWN], [OWN | {"bytes": 9}, FOREIGN], [OWN, FOREIGN | {"bytes": 8}])
    assert own == 9
    assert foreign == [{"pid": 2, "name": "python", "bytes": 8}]


def test_lists_without_this_process_are_believed_in_nothing() -> None:
    own, foreign = figures_of([FOREIGN], [FOREIGN])
    assert own == Unavailable(
        "this process is not among the 1 that NVML lists: their numbers are not ours"
    )
    assert foreign == {"unavailable": own.reason}


def test_this_process_without_a_figure_leaves_the_foreign_ones() -> None:
    own, foreign = figures_of([OWN | {"bytes": {"unavailable": "none"}}, FOREIGN])
    assert own == Unavailable("none")
    assert [one["pid"] for one in foreign] == [2]


def test_lists_nobody_may_read_are_a_reason() -> None:
    refused = {"unavailable": "Insufficient Permissions"}
    own, foreign = figures_of(refused, refused)
    assert own == Unavailable("Insufficient Permissions")
    assert foreign == refused

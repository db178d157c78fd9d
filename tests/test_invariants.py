"""What must hold of a record's memory, and what is said of disturbances: every break is told."""

import copy
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as some

from bench.metering import invariants, noise
from bench.metering.invariants import not_given_back, uneven_residuals, violations

GIB, MIB = 1 << 30, 1 << 20
WITHOUT = {"unavailable": "no CUDA device"}
THROTTLED = {"power": 0.0, "thermal": 0.0}


def example() -> dict[str, Any]:
    """One sound record: 20 GiB of torch's and half a GiB beside it, over half a GiB of before."""
    memory = {
        "host_peak_bytes": GIB,
        "torch_allocated_start_bytes": 0,
        "torch_reserved_start_bytes": 0,
        "torch_allocated_peak_bytes": 18 * GIB,
        "torch_reserved_peak_bytes": 20 * GIB,
        "torch_reserved_end_bytes": 20 * GIB,
        "torch_alloc_retries": 0,
        "torch_ooms": 0,
        "device_peak_bytes": 21 * GIB,
        "device_delta_peak_bytes": 41 * GIB // 2,
        "device_start_bytes": GIB,
        "device_end_bytes": 21 * GIB,
        "device_baseline_bytes": GIB // 2,
        "device_own_bytes": 20 * GIB,
    }
    device = {
        "name": "GPU-1",
        "source": "NVML memory v2, without reserved",
        "samples": 200,
        "readings": 20,
        "interval_s": 0.05,
        "longest_gap_s": 0.06,
        "throttled_s": dict(THROTTLED),
        "slowdowns": {},
        "foreign_processes": [],
    }
    return {
        "stage": "teacher_fit",
        "cell": "baseline",
        "repeat": 1,
        "started": "2026-01-01T00:00:00.000",
        "wall_s": 10.0,
        "facts": {"image": "host"},
        "memory": memory,
        "device": device,
        "host": {"steal_share": 0.0, "swapped_bytes": 0},
    }


@some.composite
def sound(draw: some.DrawFn) -> dict[str, Any]:
    """Records of a GPU in which everything agrees."""
    baseline = draw(some.integers(0, GIB))
    reserved = draw(some.integers(0, 80 * GIB))
    allocated = draw(some.integers(0, reserved))
    peak = baseline + reserved + draw(some.integers(1, GIB))
    record = example()
    record["memory"] |= {
        "torch_allocated_start_bytes": draw(some.integers(0, allocated)),
        "torch_reserved_start_bytes": draw(some.integers(0, reserved)),
        "torch_allocated_peak_bytes": allocated,
        "torch_reserved_peak_bytes": reserved,
        "torch_reserved_end_bytes": draw(some.integers(0, reserved)),
        "device_peak_bytes": peak,
        "device_delta_peak_bytes": peak - baseline,
        "device_start_bytes": draw(some.integers(0, peak)),
        "device_end_bytes": draw(some.integers(0, peak)),
        "device_baseline_bytes": baseline,
        "device_own_bytes": draw(some.one_of(some.integers(0, peak), some.just(WITHOUT))),
    }
    record["device"] |= {
        "samples": draw(some.integers(5, 10**6)),
        "longest_gap_s": draw(some.floats(0, 1)),
    }
    return record


def changed(*places: tuple[str, str, Any]) -> dict[str, Any]:
    record = example()
    for part, name, value in places:
        record[part] = copy.copy(record[part]) | {name: value}
    return record


# ---- of one record ----


@given(sound())
def test_nothing_is_said_of_a_sound_record(record: dict[str, Any]) -> None:
    assert violations(record) == []


@given(sound())
def test_nothing_is_said_of_what_nobody_could_read(record: dict[str, Any]) -> None:
    """The reasons stand in the record; a machine without a GPU violates nothing."""
    record["memory"] = dict.fromkeys(record["memory"], WITHOUT)
    record["device"] = WITHOUT
    assert violations(record) == []
    assert noise.tags(record) == []


@given(sound(), some.integers(1, GIB))
def test_less_on_the_device_than_torch_holds_is_said(record: dict[str, Any], less: int) -> None:
    memory = record["memory"]
    least = memory["torch_reserved_peak_bytes"] - invariants.TOLERANCE_BYTES
    memory["device_delta_peak_bytes"] = least - less
    (said,) = violations(record)
    assert "the device showed" in said


@given(sound(), some.sampled_from(["reserved", "start", "end"]), some.integers(1, GIB))
def test_a_part_above_its_whole_is_said(record: dict[str, Any], which: str, more: int) -> None:
    memory = record["memory"]
    if which == "reserved":
        memory["torch_allocated_peak_bytes"] = memory["torch_reserved_peak_bytes"] + more
    else:
        memory[f"device_{which}_bytes"] = memory["device_peak_bytes"] + more
    (said,) = violations(record)
    assert " is above " in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([("memory", "host_peak_bytes", None)], "host_peak_bytes is None, which is no figure"),
        ([("memory", "torch_ooms", 1.5)], "torch_ooms is 1.5, which is no figure"),
        (
            [("memory", name, 0) for name in ("device_peak_bytes", "device_start_bytes")]
            + [("memory", "device_end_bytes", 0), ("memory", "device_own_bytes", WITHOUT)],
            "device_peak_bytes is 0, which is no figure and no reason",
        ),
        ([("device", "samples", 4)], "undersampled, 4 samples in this stage"),
        ([("device", "longest_gap_s", 3.21)], "no sample for 3.2 s; a peak in that time"),
        ([("device", "source", "NVML memory v1, and why")], "NVML memory v1, and why"),
        (
            [("memory", "torch_alloc_retries", 2), ("memory", "torch_ooms", 1)],
            "torch's allocator: 2 retries and 1 out-of-memory errors in this stage",
        ),
        ([("memory", "device_own_bytes", 22 * GIB)], "device_own_bytes 22.00 GiB is above"),
    ],
)
def test_each_break_is_a_sentence(changes: list, said: str) -> None:
    (found,) = violations(changed(*changes))
    assert said in found


def test_a_peak_that_torch_gave_back_may_lie_between_two_samples() -> None:
    short = ("memory", "device_delta_peak_bytes", 10 * GIB)
    (kept,) = violations(changed(short))
    (given_back,) = violations(changed(short, ("memory", "torch_reserved_end_bytes", 9 * GIB)))
    assert "between two samples" not in kept
    assert "between two samples 0.05 s apart" in given_back


# ---- memory against rows ----


def trend(*held: float) -> dict[str, Any]:
    points = [[64 * (i + 1), int(value)] for i, value in enumerate(held)]
    return {"memory_by_rows": {"source": "torch_allocated", "points": points}}


@given(some.integers(8, 128), some.integers(1, 1000), some.data())
def test_what_grows_with_the_rows_accumulates(
    count: int, a_step_mib: int, data: some.DataObject
) -> None:
    """Whatever a step leaves behind, noise of a tenth of it included."""
    assume(a_step_mib * (count // 2) > 40)
    wobble = data.draw(some.lists(some.floats(-0.1, 0.1), min_size=count, max_size=count))
    held = [GIB + a_step_mib * MIB * (i + wobble[i]) for i in range(count)]
    (said,) = invariants.accumulates(trend(*held))
    a_row = float(said.split("accumulates, ")[1].split(" KiB")[0])
    assert a_row == pytest.approx(a_step_mib * 1024 / 64, rel=0.25)


@given(some.lists(some.integers(0, 31 * MIB), min_size=1, max_size=128))
def test_what_stays_within_a_band_does_not(held: list[int]) -> None:
    assert invariants.accumulates(trend(*held)) == []


@given(some.integers(8, 128), some.floats(0.02, 0.25), some.integers(1, 100))
def test_a_cache_that_fills_does_not(count: int, level_at: float, gib: int) -> None:
    """It rises in the first quarter and stays."""
    held = [gib * GIB * min(1.0, i / (count * level_at)) for i in range(count)]
    assert invariants.accumulates(trend(*held)) == []


def test_a_single_jump_does_not() -> None:
    assert invariants.accumulates(trend(*[GIB] * 20, *[9 * GIB] * 20)) == []


# ---- between records ----


def workers(*baselines: Any, **more: Any) -> list[dict[str, Any]]:
    found = []
    for number, baseline in enumerate(baselines):
        for stage in ("teacher_fit", "teacher_test"):
            record = changed(("memory", "device_baseline_bytes", baseline))
            started = f"2026-01-01T00:0{number}:00"
            found.append(record | {"cell": f"c{number}", "stage": stage, "started": started})
    return found


def test_what_a_worker_leaves_behind_is_seen_by_the_next() -> None:
    said = not_given_back(workers(GIB, GIB + 20 * MIB, 3 * GIB, 3 * GIB))
    assert said == [
        "device GPU-1: 3.00 GiB in use before c2 repeat 1, 1.02 GiB before c1 repeat 1: "
        "not given back, or of others"
    ]


def test_a_calendar_set_back_moves_no_worker() -> None:
    records = workers(GIB, GIB, 3 * GIB, 3 * GIB)
    for record in records:
        record["started"] = "2026-01-01T00:0" + str(9 - int(record["cell"][1])) + ":00"
    (said,) = not_given_back(records)
    assert "3.00 GiB in use before c2 repeat 1, 1.00 GiB before c1" in said


def test_devices_are_not_held_against_each_other() -> None:
    records = workers(GIB, 3 * GIB)
    for record in records[2:]:
        record["device"] = record["device"] | {"name": "GPU-2"}
    assert not_given_back(records) == []
    assert not_given_back(workers(GIB, WITHOUT, GIB)) == []


def test_memory_beside_torchs_is_about_equal() -> None:
    records = workers(0, 0, 0)
    assert uneven_residuals(records) == []
    records[2]["memory"] = records[2]["memory"] | {"device_delta_peak_bytes": 23 * GIB}
    (said,) = uneven_residuals(records)
    assert said.startswith("teacher_fit: 3.00 GiB of device memory beside torch's in c1 repeat 1")
    records[2]["facts"] = {"image": "cu118"}
    assert uneven_residuals(records) == []


# ---- tags ----


@pytest.mark.parametrize(
    ("change", "tags"),
    [
        (("device", "throttled_s", {"power": 1.2, "thermal": WITHOUT}), ["throttled: power 12 %"]),
        (("device", "throttled_s", {"sync_boost": 0.05}), []),
        (("device", "throttled_s", WITHOUT), []),
        (("device", "slowdowns", {"hw_thermal": 3}), ["slowed down: hw thermal in 3 of 20"]),
        (
            ("device", "foreign_processes", [{"pid": 7, "name": "python", "bytes": 2 * GIB}]),
            ["foreign process: 7 python 2.00 GiB"],
        ),
        (
            ("device", "foreign_processes", [{"pid": 7, "name": None, "bytes": WITHOUT}]),
            ["foreign process: 7 (no name) of unknown size"],
        ),
        (
            ("memory", "device_baseline_bytes", 2 * GIB),
            ["device in use before this process: 2.00 GiB"],
        ),
        (("host", "steal_share", 0.07), ["stolen: 7 % of the processors' time"]),
        (("host", "steal_share", 0.01), []),
        (("host", "swapped_bytes", GIB), ["swapped: 1.00 GiB during the stage"]),
        (("host", "swapped_bytes", WITHOUT), []),
    ],
)
def test_a_disturbance_is_a_tag(change: tuple[str, str, Any], tags: list[str]) -> None:
    found = noise.tags(changed(change))
    assert len(found) == len(tags)
    assert all(one.startswith(tag) for one, tag in zip(found, tags, strict=True))
    assert noise.tags(example()) == []


def test_a_record_of_a_cell_that_never_ran_is_quiet() -> None:
    assert noise.tags({"memory": {}, "device": {}, "wall_s": None}) == []
    assert violations({"memory": {}, "device": {}, "memory_by_rows": {}}) == []

"""Readings of one device through the real NVML binding over a fake library."""

from collections.abc import Callable
from typing import Any

import fake_nvml
import pynvml
import pytest
from fake_nvml import FIRST, RESERVED, SECOND, SECOND_BUS, SLICE, USED

from bench import nvml
from bench.nvml import Unavailable


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Puts an object into the binding's library slot, for this test."""
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    return lambda fake: monkeypatch.setattr(pynvml, "nvmlLib", fake)


def gauge(device: str) -> nvml.Gauge:
    opened = nvml.open_gauge(device)
    assert isinstance(opened, nvml.Gauge), opened
    return opened


# ---- one reading ----


@pytest.mark.parametrize(
    ("device", "used"),
    [
        (FIRST, USED[0]),
        (SECOND, USED[1]),
        (SECOND_BUS, USED[1]),
        (SLICE, USED[2]),
        ("GPU-" + SLICE.removeprefix("MIG-"), USED[2]),
    ],
)
def test_the_named_device_is_read(library: Callable, device: str, used: int) -> None:
    library(fake_nvml.Library())
    assert gauge(device).read() == used


def test_both_meanings_of_v2_used_give_one_figure(library: Callable) -> None:
    library(fake_nvml.Inclusive())
    assert gauge(FIRST).read() == USED[0]
    assert gauge(FIRST).source == "NVML memory v2, without reserved"


@pytest.mark.parametrize(
    ("fake", "reason"),
    [(fake_nvml.OldLibrary(), "Function Not Found"), (fake_nvml.Nonsense(), "do not add up")],
)
def test_v1_replaces_an_unusable_v2_and_says_so(
    library: Callable, fake: object, reason: str
) -> None:
    library(fake)
    assert gauge(FIRST).read() == USED[0] + RESERVED
    assert "v1, driver-reserved included" in gauge(FIRST).source
    assert reason in gauge(FIRST).source


@pytest.mark.parametrize(
    ("fake", "device", "reason"),
    [
        (fake_nvml.Refusing(fake_nvml.NOT_SUPPORTED), FIRST, "Not Supported"),
        (fake_nvml.Refusing(fake_nvml.NO_PERMISSION), FIRST, "Insufficient Permissions"),
        (fake_nvml.Refusing(fake_nvml.GPU_IS_LOST), FIRST, "GPU is lost"),
        (fake_nvml.Library(), "GPU-none", "no device GPU-none: nvmlDeviceGetHandleByUUID: Not"),
        (fake_nvml.Library(), "0", "no device 0: nvmlDeviceGetHandleByPciBusId: Not Found"),
        (fake_nvml.Unloadable(fake_nvml.LIBRARY_NOT_FOUND), FIRST, "no NVML library: "),
        (fake_nvml.Unloadable(9), FIRST, "no NVML: Driver Not Loaded"),
        (object(), FIRST, "no NVML: Function Not Found"),
    ],
)
def test_what_cannot_be_read_has_a_reason(
    library: Callable, fake: object, device: str, reason: str
) -> None:
    library(fake)
    opened = nvml.open_gauge(device)
    assert isinstance(opened, Unavailable)
    assert reason in opened.reason


def test_a_gpu_lost_between_two_readings_is_not_zero(library: Callable) -> None:
    library(fake_nvml.Refusing(fake_nvml.GPU_IS_LOST, after=2))
    lost = gauge(FIRST)
    assert lost.read() == USED[0] + RESERVED
    assert lost.read() == Unavailable("nvmlDeviceGetMemoryInfo: GPU is lost")


def test_a_function_an_old_driver_lacks_is_a_reason(library: Callable) -> None:
    """The binding has an error of its own for some, which is no NVMLError."""
    library(fake_nvml.Library())
    found = nvml.ask(pynvml.nvmlDeviceGetComputeRunningProcesses, gauge(FIRST).handle)
    assert isinstance(found, Unavailable)
    assert "nvmlDeviceGetComputeRunningProcesses: " in found.reason


def test_no_value_is_not_zero() -> None:
    assert isinstance(nvml.ask(lambda: None), Unavailable)
    assert nvml.ask(lambda: 0) == 0


def test_a_slice_is_known_by_the_name_nvml_gives_it(library: Callable) -> None:
    library(fake_nvml.Library())
    assert gauge("GPU-" + SLICE.removeprefix("MIG-")).device == SLICE
    assert gauge(FIRST).device == FIRST


def test_as_json_keeps_the_reason() -> None:
    figures: list[Any] = [nvml.as_json(0), nvml.as_json(Unavailable("why"))]
    assert figures == [0, {"unavailable": "why"}]


# ---- clocks and counters ----


@pytest.mark.parametrize("kind", [fake_nvml.Telling, fake_nvml.OlderDriver])
def test_conditions_are_read_under_either_name(library: Callable, kind: type) -> None:
    fake = kind()
    fake.reasons = 0x04 | 0x40  # a power cap, which the counters tell better, and heat
    library(fake)
    assert nvml.conditions(gauge(FIRST).handle) == {
        "sm_mhz": 1980,
        "memory_mhz": 3201,
        "temperature_c": 41,
        "slowdowns": ["hw_thermal"],
    }


def test_conditions_nobody_can_read_are_reasons(library: Callable) -> None:
    library(fake_nvml.Library())
    found = nvml.conditions(gauge(FIRST).handle)
    assert all("Function Not Found" in value["unavailable"] for value in found.values())


def test_counters_are_told_one_by_one(library: Callable) -> None:
    fake = fake_nvml.Telling()
    fake.throttled_ns[74], fake.refused_fields = 7_000, (76,)
    library(fake)
    found = nvml.throttled_ns(gauge(FIRST).handle)
    assert isinstance(found, dict)
    assert found["power"] == 7_000
    assert found["thermal"] == 0
    assert found["sync_boost"] == {"unavailable": "Not Supported"}


def test_a_counter_of_another_type_is_no_number(library: Callable) -> None:
    fake = fake_nvml.Telling()
    library(fake)
    field = pynvml.c_nvmlFieldValue_t(fieldId=74, valueType=pynvml.NVML_VALUE_TYPE_DOUBLE)
    assert nvml._value(field) == Unavailable("field 74 is of type 0, no whole number")
    field.valueType, field.value.ullVal = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT, (9 << 32) + 5
    assert nvml._value(field) == 5


# ---- processes ----


@pytest.fixture
def pids(library: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Lists the processes of a fake as a worker with pid 100 sees them."""

    def listed(held: dict[int, int | None], on_host: bool = True) -> Any:
        fake = fake_nvml.Telling()
        fake.pids = held
        library(fake)
        monkeypatch.setattr(nvml, "has_host_pids", lambda: on_host)
        return nvml.processes(gauge(FIRST).handle, lambda pid: pid == 100)

    return listed


def test_processes_are_ours_or_foreign(pids: Callable) -> None:
    assert pids({100: 5, 200: 6}) == [
        {"pid": 100, "bytes": 5, "own": True, "name": None},
        {"pid": 200, "bytes": 6, "own": False, "name": "python3"},
    ]


def test_a_process_without_a_figure_is_no_zero(pids: Callable) -> None:
    (only,) = pids({100: None})
    assert only["bytes"] == {"unavailable": "NVML lists this process without a figure"}


def test_in_a_namespace_of_its_own_no_process_is_believed(pids: Callable) -> None:
    found = pids({100: 5}, on_host=False)
    assert isinstance(found, Unavailable)
    assert "container" in found.reason


@pytest.mark.parametrize(("number", "is_host"), [(4026531836, True), (4026532441, False)])
def test_the_hosts_namespace_has_a_number_of_its_own(
    monkeypatch: pytest.MonkeyPatch, number: int, is_host: bool
) -> None:
    monkeypatch.setattr(nvml.Path, "readlink", lambda path: nvml.Path(f"pid:[{number}]"))
    assert nvml.has_host_pids() is is_host

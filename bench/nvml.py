"""One GPU through NVML: bytes, clocks, counters, processes; each a value or why there is none."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import pynvml

LIBRARY_VARIABLE = "ILORA_BENCH_NVML_LIBRARY"
"""`module:object` in place of the driver's library, below the real binding; for tests, replays."""
INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO of linux/proc_ns.h: the namespace whose numbers the driver knows."""

# Only ids that no release of nvml.h has moved. Those of CLOCKS_EVENT_REASON_*_SLOWDOWN went from
# 251 to 269: a binding of another age than the driver would read its neighbour's counter.
THROTTLES = {
    "power": pynvml.NVML_FI_DEV_PERF_POLICY_POWER,
    "thermal": pynvml.NVML_FI_DEV_PERF_POLICY_THERMAL,
    "sync_boost": pynvml.NVML_FI_DEV_PERF_POLICY_SYNC_BOOST,
    "board_limit": pynvml.NVML_FI_DEV_PERF_POLICY_BOARD_LIMIT,
    "reliability": pynvml.NVML_FI_DEV_PERF_POLICY_RELIABILITY,
}
"""Why clocks were held down -> field id of the cumulative counter, nanoseconds."""
SLOWDOWNS = {
    "sw_thermal": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
    "hw_thermal": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "hw_power_brake": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
}
"""What only the present reasons tell reliably -> its bit."""
VALUE_MEMBERS = {
    pynvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
    pynvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
}


@dataclass(frozen=True)
class Unavailable:
    """A figure nobody could read, and why; never 0."""

    reason: str


@dataclass(frozen=True)
class Gauge:
    """Reads the bytes in use on one device; `source` says what they contain."""

    device: str
    """UUID or PCI bus id as NVML knows it."""
    handle: Any
    read: Callable[[], int | Unavailable]
    source: str


def as_json(figure: Any) -> Any:
    """A figure as records hold it: itself, or {"unavailable": reason}."""
    return {"unavailable": figure.reason} if isinstance(figure, Unavailable) else figure


def ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """The value of one NVML query, or Unavailable with the reason; None counts as no value."""
    try:
        value = function(*arguments)
    # The second is no kind of the first: what the binding makes of a function an old driver lacks.
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError) as error:
        return Unavailable(f"{function.__name__}: {error}")
    return Unavailable(f"{function.__name__}: no value") if value is None else value


def library_object(name: str) -> Any:
    """What `module:object` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def replace_library(name: str) -> None:
    """Put the object `module:object` where the binding keeps the driver's library."""
    pynvml.nvmlLib = library_object(name)
    pynvml._nvmlGetFunctionPointer_cache.clear()


# ---- the device and its memory ----


def open_gauge(device: str) -> Gauge | Unavailable:
    """The gauge of a device named by UUID (`GPU-…`, `MIG-…`) or PCI bus id, never by a number.

    NVML counts devices in PCI order, CUDA by speed and CUDA_VISIBLE_DEVICES: numbers do not agree.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound as error:
        return Unavailable(f"no NVML library: {error}")
    except pynvml.NVMLError as error:
        return Unavailable(f"no NVML: {error}")
    handle = _handle(device)
    if isinstance(handle, Unavailable) and device.startswith("GPU-"):
        # CUDA tells the id of a slice as it tells that of a GPU; NVML marks it.
        slice_name = "MIG-" + device.removeprefix("GPU-")
        slice_handle = _handle(slice_name)
        if not isinstance(slice_handle, Unavailable):
            device, handle = slice_name, slice_handle
    if isinstance(handle, Unavailable):
        return Unavailable(f"no device {device}: {handle.reason}")
    newer = _used_without_reserve(handle)
    if not isinstance(newer, Unavailable):
        read = partial(_used_without_reserve, handle)
        return Gauge(device, handle, read, "NVML memory v2, without reserved")
    older = _used_with_reserve(handle)
    if isinstance(older, Unavailable):
        return older
    return Gauge(
        device,
        handle,
        partial(_used_with_reserve, handle),
        f"NVML memory v1, driver-reserved included (v2: {newer.reason})",
    )


def _handle(device: str) -> Any:
    if device.startswith(("GPU-", "MIG-")):
        return ask(pynvml.nvmlDeviceGetHandleByUUID, device)
    return ask(pynvml.nvmlDeviceGetHandleByPciBusId, device)


def _used_without_reserve(handle: Any) -> int | Unavailable:
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    if isinstance(memory, Unavailable):
        return memory
    used_bytes: int = memory.total - memory.free - memory.reserved
    # Documents disagree whether `used` of v2 contains the reserve; a third answer is none at all.
    if memory.used not in (used_bytes, used_bytes + memory.reserved):
        return Unavailable(
            f"{memory.used} used, {memory.free} free and {memory.reserved} reserved "
            f"do not add up to {memory.total}"
        )
    return used_bytes


def _used_with_reserve(handle: Any) -> int | Unavailable:
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    return memory if isinstance(memory, Unavailable) else int(memory.used)


# ---- what else a device tells ----


def conditions(handle: Any) -> dict[str, Any]:
    """Clocks in MHz, temperature in °C and the slowdowns in force, as records hold them."""
    reasons = ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    if isinstance(reasons, Unavailable):  # its name before driver 535
        reasons = ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    if not isinstance(reasons, Unavailable):
        reasons = [name for name, bit in SLOWDOWNS.items() if reasons & bit]
    readings = {
        "sm_mhz": ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        "memory_mhz": ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        "temperature_c": ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        "slowdowns": reasons,
    }
    return {name: as_json(value) for name, value in readings.items()}


def energy_mj(handle: Any) -> int | Unavailable:
    """Millijoules since the driver was loaded; a counter that moves in steps."""
    value: int | Unavailable = ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
    return value


def throttled_ns(handle: Any) -> dict[str, Any] | Unavailable:
    """Nanoseconds so far that each of THROTTLES has held the clocks down, as records hold them."""
    fields = ask(pynvml.nvmlDeviceGetFieldValues, handle, list(THROTTLES.values()))
    if isinstance(fields, Unavailable):
        return fields
    return {name: as_json(_value(field)) for name, field in zip(THROTTLES, fields, strict=True)}


def _value(field: Any) -> int | Unavailable:
    if field.nvmlReturn:
        return Unavailable(str(pynvml.NVMLError(field.nvmlReturn)))
    member = VALUE_MEMBERS.get(field.valueType)
    if member is None:
        return Unavailable(f"field {field.fieldId} is of type {field.valueType}, no whole number")
    return int(getattr(field.value, member))


def processes(handle: Any, is_own: Callable[[int], bool]) -> list[dict[str, Any]] | Unavailable:
    """Programs that compute on the device: pid, bytes, whether `is_own(pid)`, name of a foreign
    one.

    The driver counts processes by the host's numbers, whoever asks: Unavailable where ours are
    others.
    """
    if not has_host_pids():
        return Unavailable(
            "NVML knows processes by the host's numbers, and a container has numbers of its own"
        )
    listed = ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    if isinstance(listed, Unavailable):
        return listed
    found = []
    for one in listed:
        no_figure = Unavailable("NVML lists this process without a figure")
        used = no_figure if one.usedGpuMemory is None else one.usedGpuMemory
        own = is_own(one.pid)
        name = None if own else _process_name(one.pid)
        found.append({"pid": one.pid, "bytes": as_json(used), "own": own, "name": name})
    return found


def has_host_pids() -> bool:
    """Whether this process counts processes as the host's kernel does."""
    try:
        return str(Path("/proc/self/ns/pid").readlink()) == INITIAL_PID_NAMESPACE
    except OSError:
        return False


def _process_name(pid: int) -> str | None:
    name = ask(pynvml.nvmlSystemGetProcessName, pid)
    return None if isinstance(name, Unavailable) else PurePath(name).name

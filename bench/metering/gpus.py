"""The GPUs a worker would see, as NVML and the CUDA driver tell of them; no torch."""

import ctypes
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VIRTUAL_MEMORY = 102
"""CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED of cuda.h."""
USE = ("used_bytes", "utilisation", "processes")


@functools.cache
def gpus() -> tuple[Mapping[str, Any], ...]:
    """Visible GPUs with name, memory, driver and capability as far as NVML tells.

    A sandbox may hide NVML while CUDA works; then the device files alone are listed.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
        return _visible(tuple({"name": str(path), "nvml": str(error)} for path in devices))
    try:
        count = pynvml.nvmlDeviceGetCount()
        return _visible(tuple(_describe_gpu(pynvml, index) for index in range(count)))
    finally:
        pynvml.nvmlShutdown()


def _describe_gpu(pynvml: Any, index: int) -> dict[str, Any]:
    """Every call may be refused (MIG, containers, old drivers): then the reason is the value."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    calls = {
        "name": lambda: pynvml.nvmlDeviceGetName(handle),
        "uuid": lambda: pynvml.nvmlDeviceGetUUID(handle),
        "memory_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).total,
        "capability": lambda: list(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        "driver": pynvml.nvmlSystemGetDriverVersion,
        "sm_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
    }
    facts: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            facts[name] = call()
        except pynvml.NVMLError as error:
            facts[name] = {"unavailable": str(error)}
    return facts


def _visible(
    devices: tuple[dict[str, Any], ...],
) -> tuple[Mapping[str, Any], ...]:
    """Apply CUDA_VISIBLE_DEVICES; as in CUDA, the first entry that names no device ends the list.

    CUDA numbers devices by speed and NVML by bus, so numbers are only counted, UUIDs are matched.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return devices
    seen: list[Mapping[str, Any]] = []
    for entry in (part.strip() for part in chosen.split(",")):
        if entry.isdecimal() and int(entry) < len(devices):
            seen.append(devices[int(entry)])
        elif entry.startswith(("GPU-", "MIG-")):
            matches = [gpu for gpu in devices if str(gpu.get("uuid", "")).startswith(entry)]
            seen += matches or devices[:1]
        else:
            break
    return tuple(seen)


def use(gpu: Mapping[str, Any]) -> dict[str, Any]:
    """What one of `gpus` is doing now: bytes in use, utilisation in percent, compute processes.

    Each is `{"unavailable": reason}` where NVML keeps it back; inside a container it knows the
    processes of the host only, by the host's numbers.
    """
    import pynvml

    from bench import nvml

    uuid = gpu.get("uuid")
    if not isinstance(uuid, str):
        reason = str(gpu.get("nvml", "no UUID"))
        return {name: {"unavailable": reason} for name in USE}
    gauge = nvml.open_gauge(uuid)
    if isinstance(gauge, nvml.Unavailable):
        return {name: nvml.as_json(gauge) for name in USE}
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        rates = nvml.ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
        # Without its suffix the binding raises an error of no NVML kind on older drivers.
        running = nvml.ask(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, handle)
        if isinstance(running, nvml.Unavailable):
            running = nvml.ask(pynvml.nvmlDeviceGetComputeRunningProcesses_v2, handle)
        used_bytes = gauge.read()
    finally:
        pynvml.nvmlShutdown()
    lost = nvml.Unavailable
    return {
        "used_bytes": nvml.as_json(used_bytes),
        "utilisation": nvml.as_json(rates) if isinstance(rates, lost) else rates.gpu,
        "processes": nvml.as_json(running)
        if isinstance(running, lost)
        else sorted(one.pid for one in running),
    }


@functools.cache
def driver() -> Mapping[str, Any]:
    """`read_driver` of this machine's driver; it makes no context, so it takes no device memory."""
    try:
        return read_driver(ctypes.CDLL("libcuda.so.1"))
    except OSError as error:
        return {"unavailable": str(error)}


def read_driver(library: Any) -> Mapping[str, Any]:
    """Newest CUDA of the driver and, for each visible device, whether it maps virtual memory.

    `library` has the functions of libcuda. A refused call is `{"unavailable": reason}`.
    """
    try:
        _call(library, "cuInit", 0)
        version, count = ctypes.c_int(), ctypes.c_int()
        _call(library, "cuDriverGetVersion", ctypes.byref(version))
        _call(library, "cuDeviceGetCount", ctypes.byref(count))
        supported = [_virtual_memory(library, ordinal) for ordinal in range(count.value)]
    except DriverError as error:
        return {"unavailable": str(error)}
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return {"cuda": cuda, "virtual_memory": supported}


class DriverError(Exception):
    """A call of libcuda that returned an error code."""


def _virtual_memory(library: Any, ordinal: int) -> bool:
    device, value = ctypes.c_int(), ctypes.c_int()
    _call(library, "cuDeviceGet", ctypes.byref(device), ordinal)
    _call(library, "cuDeviceGetAttribute", ctypes.byref(value), VIRTUAL_MEMORY, device)
    return bool(value.value)


def _call(library: Any, name: str, *arguments: Any) -> None:
    try:
        code = getattr(library, name)(*arguments)
    except AttributeError:
        raise DriverError(f"{name}: this driver has no such call") from None
    if code:
        raise DriverError(f"{name}: CUDA driver error {code}")

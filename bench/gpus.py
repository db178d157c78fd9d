"""The GPUs a worker would see, as NVML tells of them; no torch."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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

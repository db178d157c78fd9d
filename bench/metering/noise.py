"""Tags of a record: what others, or the machine itself, did to the figures of a stage."""

from collections.abc import Mapping
from typing import Any

from bench.metering.invariants import gib

THROTTLED_SHARE = 0.01
"""Of the stage; below it lies the clocks' ordinary play at their limit."""
STEAL_SHARE = 0.02
SWAPPED_BYTES = 16 << 20
BASELINE_BYTES = 1 << 30
"""In use before CUDA started, which only another program explains."""

Record = Mapping[str, Any]


def tags(record: Record) -> list[str]:
    """What disturbed this stage, one short text each; empty for a quiet machine or one that does
    not tell (its record then holds the reasons).
    """
    device = record.get("device") or {}
    return [
        *_throttled(device, record.get("wall_s") or 0.0),
        *_slowed(device),
        *_foreign(device, record.get("memory") or {}),
        *_host(record.get("host") or {}),
    ]


def _throttled(device: Mapping[str, Any], wall_s: float) -> list[str]:
    seconds = device.get("throttled_s") or {}
    shares = {
        cause: value / wall_s
        for cause, value in seconds.items()
        if isinstance(value, float) and wall_s > 0
    }
    return [
        f"throttled: {cause.replace('_', ' ')} {100 * min(1.0, share):.0f} % of the stage"
        for cause, share in shares.items()
        if share >= THROTTLED_SHARE
    ]


def _slowed(device: Mapping[str, Any]) -> list[str]:
    seen = device.get("slowdowns") or {}
    return [
        f"slowed down: {cause.replace('_', ' ')} in {count} of {device['readings']} readings"
        for cause, count in seen.items()
        if isinstance(count, int)
    ]


def _foreign(device: Mapping[str, Any], memory: Mapping[str, Any]) -> list[str]:
    found = device.get("foreign_processes") or []
    said = []
    for one in found if isinstance(found, list) else []:
        held = gib(one["bytes"]) if isinstance(one["bytes"], int) else "of unknown size"
        said.append(f"foreign process: {one['pid']} {one['name'] or '(no name)'} {held}")
    baseline = memory.get("device_baseline_bytes")
    if isinstance(baseline, int) and baseline > BASELINE_BYTES:
        said.append(f"device in use before this process: {gib(baseline)}")
    return said


def _host(host: Mapping[str, Any]) -> list[str]:
    said = []
    steal, swapped = host.get("steal_share"), host.get("swapped_bytes")
    if isinstance(steal, float) and steal >= STEAL_SHARE:
        said.append(f"stolen: {100 * steal:.0f} % of the processors' time went to other guests")
    if isinstance(swapped, int) and swapped >= SWAPPED_BYTES:
        said.append(f"swapped: {gib(swapped)} during the stage")
    return said

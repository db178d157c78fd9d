"""The most this machine gives in this very process: matrix products in a dtype, and copies.

Worker side: imports torch.
"""

import functools
import time
from collections.abc import Callable

import torch

SIZES = {"cuda": (4096, 8192), "cpu": (512, 1024, 2048)}
"""Widths of square products; which is fastest depends on the machine."""
COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
"""More than any cache holds."""
BUDGET_S = 1.0
"""For one size; twice the width takes eight times as long, so a larger one may be left out."""
ROUNDS = 5


@functools.cache
def gemm_flops_per_s(device: torch.device, dtype: torch.dtype, precision: str) -> float:
    """FLOP/s of the fastest square product.

    `precision` is that of float32 products (`torch.set_float32_matmul_precision`), as it stands
    when this is called.
    """
    assert precision == torch.get_float32_matmul_precision()
    best = 0.0
    for size in SIZES[device.type]:
        begun = time.perf_counter()
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        result = torch.empty_like(left)
        seconds = _fastest(lambda: torch.mm(left, right, out=result), device)  # noqa: B023
        best = max(best, 2 * size**3 / seconds)
        if 8 * (time.perf_counter() - begun) > BUDGET_S:
            break
    return best


@functools.cache
def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read plus bytes written a second by a copy within the device's memory."""
    source = torch.ones(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES[device.type] / _fastest(lambda: target.copy_(source), device)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some rounds, after one for nothing."""
    times = []
    for _ in range(1 + ROUNDS):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times[1:])

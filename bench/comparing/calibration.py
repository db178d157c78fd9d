"""How fast this machine is at a few fixed kernels: what lets runs of two machines be read together.

`python -m bench.comparing.calibration DEVICE` measures in a process of its own, for about a
second after the imports, and prints one JSON line; the parent only asks and imports no torch.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

LIMIT_S = 120.0
"""The first CUDA start and the imports from a cold disk can take a minute."""
BUDGET_S = 1.0
LEAST_ROUNDS, MOST_ROUNDS = 5, 200
SMALL_KERNELS = 200
LOOPS = 20_000
SIZES = {"cpu": (384, 16 << 20), "cuda": (4096, 256 << 20)}
"""Device -> width of the square products, bytes copied."""
OWN_WORKER = ["-m", "bench.worker"]

Kernel = Callable[[], object]
Calibration = dict[str, Any]
"""`device`, `threads`, `torch` and `kernels`: name -> `seconds` (first decile, for what disturbs a
fixed kernel only makes it slower), `spread` (median / first decile - 1), `rounds`; or `unavailable`
with the reason."""


def of_run(worker: Sequence[str], on_gpu: bool) -> Calibration:
    """The calibration that belongs to a run: none where another program stands in for the worker.

    `on_gpu`: some cell would use a GPU.
    """
    if list(worker[1:]) != OWN_WORKER:
        return {"unavailable": "--worker replaces the measured program"}
    return measure("cuda" if on_gpu else "cpu")


def measure(device: str, limit_s: float = LIMIT_S) -> Calibration:
    """Time the kernels on `device` (`cpu` or `cuda`) in a child process."""
    command = [sys.executable, "-m", "bench.comparing.calibration", device]
    root = Path(__file__).parents[2]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"unavailable": f"no answer within {limit_s:g} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return {"unavailable": last.strip()}
    found: Calibration = json.loads(lines[-1])
    return found


def kernels(device: str) -> dict[str, Kernel]:
    """The kernels by name; each call does the same work and has ended when it returns."""
    import torch

    width, copied_bytes = SIZES[device]
    dtypes = [torch.float32, torch.bfloat16] + [torch.float16] * (device == "cuda")
    source = torch.ones(copied_bytes // 4, device=device)
    target, small = torch.empty_like(source), torch.ones(8, device=device)

    def product(dtype: torch.dtype) -> Kernel:
        square = torch.ones(width, width, device=device, dtype=dtype)
        return lambda: square @ square

    def launches() -> None:
        for _ in range(SMALL_KERNELS):
            torch.add(small, small)

    found: dict[str, Kernel] = {f"gemm_{str(d).removeprefix('torch.')}": product(d) for d in dtypes}
    found |= {"copy": lambda: target.copy_(source), "small_kernels": launches}
    if device == "cuda":
        found = {
            name: _synchronised(kernel, torch.cuda.synchronize) for name, kernel in found.items()
        }
    return found | {"interpreter": _interpret}


def _synchronised(kernel: Kernel, wait: Kernel) -> Kernel:
    def both() -> None:
        kernel()
        wait()

    return both


def _interpret() -> int:
    """Names, attributes, numbers and a dictionary: what a training loop asks of Python."""
    table: dict[int, int] = {}
    for number in range(LOOPS):
        table[number & 255] = table.get(number & 127, 0) + number
    return len(table)


def timed(found: Mapping[str, Kernel], clock: Callable[[], float]) -> dict[str, dict[str, Any]]:
    """Seconds of each kernel. They take turns, so that a slow moment meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for kernel in found.values():  # the first call compiles, allocates and wakes clocks
        kernel()
    started = clock()
    for round_ in range(MOST_ROUNDS):
        if round_ >= LEAST_ROUNDS and clock() - started > BUDGET_S:
            break
        for name, kernel in found.items():
            begun = clock()
            kernel()
            seconds[name].append(clock() - begun)
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(seconds: Sequence[float]) -> dict[str, Any]:
    tenths = statistics.quantiles(seconds, n=10)
    return {"seconds": tenths[0], "spread": tenths[4] / tenths[0] - 1, "rounds": len(seconds)}


def slower_by(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> dict[str, float]:
    """Kernel -> its time in one calibration / its time in another; empty unless both are of the
    same kind of device.
    """
    if not before or not after or before.get("device") != after.get("device"):
        return {}
    ours, theirs = after.get("kernels", {}), before.get("kernels", {})
    return {
        name: ours[name]["seconds"] / theirs[name]["seconds"] for name in theirs if name in ours
    }


def machine_range(ratios: Mapping[str, float], dtypes: Sequence[str]) -> tuple[float, float] | None:
    """Logarithms of the smallest and largest ratio over the kernels that a stage resembles.

    `dtypes`: of the products the stage ran; products in another are no likeness. None without any.
    """
    unlike = {f"gemm_{name}" for name in ("float32", "bfloat16", "float16") if name not in dtypes}
    logs = [math.log(ratio) for name, ratio in ratios.items() if name not in unlike]
    return (min(logs), max(logs)) if logs else None


def main() -> None:
    device = sys.argv[1]
    import torch

    torch.set_num_threads(1)  # two threads on shared cores wait for each other
    print(
        json.dumps(
            {
                "device": device,
                "threads": 1,
                "torch": torch.__version__,
                "kernels": timed(kernels(device), time.perf_counter),
            }
        )
    )


if __name__ == "__main__":
    main()

"""A worker's hold on the process that samples its GPU: start it, force a sample, read, end it."""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.metering.sampler_process import cuda_library
from bench.nvml import Unavailable

ANSWER_S = 10.0
"""A sampler silent for this long is given up: a driver that hangs must not hang the stage."""


class Sampler:
    """A running sampler process; whatever it misses or loses becomes an Unavailable."""

    def __init__(self, device: str):
        """Begin to sample `cuda:N` or a device given by UUID or PCI bus id; waits for nothing."""
        self.device = self.source = ""
        self.period_s: float | None = None
        self._lost: Unavailable | None = None
        # A file without a name: not even a kill leaves it behind.
        self._trace = tempfile.TemporaryFile()  # noqa: SIM115
        out = f"/dev/fd/{self._trace.fileno()}"
        self._read_bytes, self._rest = 0, b""
        self._samples: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.metering.sampler_process", out, "--device", device],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=[self._trace.fileno()],
        )

    @property
    def pid(self) -> int:
        """The sampler's process, which is no part of what is measured."""
        return self._process.pid

    def baseline(self) -> dict[str, Any] | Unavailable:
        """The first sample, taken before this process could use the device; waits for it."""
        head = self._answer()
        if isinstance(head, Unavailable):
            return head
        if "unavailable" in head:
            return self.give_up(head["unavailable"])
        self.device, self.source = head["device"], head["source"]
        return head

    def mark(self, name: str) -> dict[str, Any] | Unavailable:
        """Take a forced sample now and wait for it; `name` (one line) says what for."""
        if self._lost is None and self._process.stdin:
            # A dead sampler has closed the pipe; reading its answer finds out why.
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(f"{name}\n".encode())
        return self._answer()

    def samples(self, start_s: float, end_s: float) -> list[dict[str, Any]] | Unavailable:
        """The samples with start_s ≤ time ≤ end_s of `time.monotonic`, one clock for all processes.

        What came before start_s is forgotten.
        """
        if self._lost:
            return self._lost
        trace = self._trace.fileno()
        new = os.pread(trace, os.fstat(trace).st_size - self._read_bytes, self._read_bytes)
        self._read_bytes += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in map(json.loads, lines):
            if "monotonic_s" in line:
                self._samples.append(line)
            elif isinstance(line.get("counter_period_s"), float):
                self.period_s = line["counter_period_s"]
        self._samples = [line for line in self._samples if line["monotonic_s"] >= start_s]
        return [line for line in self._samples if line["monotonic_s"] <= end_s]

    def give_up(self, reason: str) -> Unavailable:
        """Count the sampler as lost for good."""
        self._lost = Unavailable(reason)
        return self._lost

    def stop(self) -> None:
        """End the process; one that the driver holds is left to whoever ends this process."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(ANSWER_S)
        for pipe in (self._process.stdin, self._process.stdout, self._trace):
            assert pipe is not None
            pipe.close()

    def _answer(self) -> dict[str, Any] | Unavailable:
        """The next line of the sampler; after one failure the sampler counts as lost for good."""
        if self._lost:
            return self._lost
        assert self._process.stdout
        waiting = select.poll()
        waiting.register(self._process.stdout, select.POLLIN)
        if not waiting.poll(ANSWER_S * 1000):
            return self.give_up(f"the sampler gave no answer in {ANSWER_S:g} s")
        if line := self._process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(ANSWER_S)
        return self.give_up(f"the sampler died with status {self._process.returncode}")


def start(device: str) -> Sampler | None:
    """A sampler for a worker with this `machine.device`, which has not imported torch yet.

    None where there is nothing to sample: on the CPU, and without CUDA's driver.
    """
    if device == "cpu" or isinstance(cuda_library(), Unavailable):
        return None
    return Sampler("cuda:0")

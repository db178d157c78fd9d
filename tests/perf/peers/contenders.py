"""Who takes part, how each is installed and started, and the conversation with it."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "ARROW")}
KEPT_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""glibc keeps freed memory instead of giving it back and asking anew, page by page, for every large
tensor. It helps those most who make the largest ones.
"""
TORCH = next(
    line
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.startswith("torch==")
)


@dataclass(frozen=True)
class Contender:
    """One implementation in one configuration."""

    name: str
    script: str
    variant: str
    loss: str = "full softmax"
    packages: tuple[str, ...] = ()
    """What its interpreter needs; none = this project's interpreter."""
    environment: dict[str, str] = field(default_factory=dict)
    note: str = ""
    precision: str = "fp32"
    """A peer is set beside this project's student of the same precision."""


SETTINGS = str(ROOT / "matrices/settings/ml-1m-student.yaml")
REPLAY = ("replay-rec[torch]==0.22.0", "pyarrow")
RECTOOLS = ("rectools[torch]==0.19.0",)
BF16 = "bf16-mixed"
OWN = Contender("this student", "own_peer.py", SETTINGS, environment=KEPT_MEMORY)
OWN_BF16 = replace(OWN, name=f"{OWN.name}, {BF16}", precision=BF16)
CONTENDERS = (
    OWN,
    OWN_BF16,
    Contender(
        "this student, default allocator", "own_peer.py", SETTINGS, note="beside stock peers"
    ),
    Contender("RePlay SasRec, stock", "replay_peer.py", "stock", packages=REPLAY),
    Contender(
        "RePlay SasRec, tuned",
        "replay_peer.py",
        "bucket",
        packages=REPLAY,
        environment=KEPT_MEMORY,
        note="length buckets, trimmed batches, allocator",
    ),
    Contender(
        f"RePlay SasRec, tuned, {BF16}",
        "replay_peer.py",
        "trimmed",
        packages=REPLAY,
        environment=KEPT_MEMORY,
        note="trimmed batches, allocator; its length buckets fail under autocast",
        precision=BF16,
    ),
    Contender("RecTools SASRecModel, stock", "rectools_peer.py", "stock", packages=RECTOOLS),
    Contender(
        "RecTools SASRecModel, tuned",
        "rectools_peer.py",
        "stock",
        packages=RECTOOLS,
        environment=KEPT_MEMORY,
        note="allocator",
    ),
    Contender(
        "SASRec+ scheme, tuned",
        "plain_peer.py",
        "softmax",
        environment=KEPT_MEMORY,
        note="allocator",
    ),
    Contender("pmixer scheme", "plain_peer.py", "bce", "BCE, 1 negative", environment=KEPT_MEMORY),
    Contender(
        "gSASRec scheme", "plain_peer.py", "gbce", "gBCE, 256 negatives", environment=KEPT_MEMORY
    ),
)
LEFT_OUT = {
    "RecBole 1.2.1 SASRec": "trains one target a sequence (an epoch is 987,000 samples), so it has "
    "no batch equal to the others'; beside current numpy and setuptools it does not import",
    "RecTools 0.19 FlatSASRecNet": "another model: its feed-forward is four times as wide, and it "
    "comes without loss and training loop",
}


class Unable(Exception):
    """A contender cannot take part; the message says why."""


def interpreter(contender: Contender, home: Path) -> Path:
    """The Python that runs it, made and filled first where it is missing.

    Raises Unable with the end of what the installer said.
    """
    if not contender.packages:
        return Path(sys.executable)
    folder = home / contender.packages[0].partition("[")[0]
    python = folder / "bin/python"
    if not (folder / "complete").is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        # torch first and exactly pinned: a range would pull a build with gigabytes of CUDA.
        for packages in ((TORCH,), (TORCH, *contender.packages)):
            done = subprocess.run(
                [python, "-m", "pip", "install", "--quiet", *packages],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise Unable(f"does not install: {done.stderr.strip()[-300:]}")
        (folder / "complete").touch()
    return python


class Running:
    """A started contender at its desk."""

    def __init__(self, command: Sequence[str | Path], environment: dict[str, str], log: IO[str]):
        self.log = log
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | ONE_THREAD | environment,
        )
        self.about = self._answer()

    def train(self, steps: int) -> dict[str, Any]:
        """Take so many optimizer steps."""
        return self._ask({"do": "train", "steps": steps})

    def top(self, held_out: int, to: Path) -> tuple[dict[str, Any], np.ndarray]:
        """Ten best unseen items of every user."""
        answer = self._ask({"do": "top", "held_out": held_out, "to": str(to)})
        return answer, np.load(to)

    def stop(self) -> None:
        """End it, whatever it does."""
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate('{"do": "stop"}\n', timeout=60)
        self.process.kill()

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Unable("has ended by itself; see its log") from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{"):  # what libraries said before the desk stood is passed over
                return json.loads(line)
        self.log.flush()
        last = Path(self.log.name).read_text().strip().splitlines()[-1:] or ["no word"]
        raise Unable(f"does not run: {last[0]}")


@contextlib.contextmanager
def running(contender: Contender, home: Path, split: Path, seed: int) -> Iterator[Running]:
    """Start a contender and stop it at the end of the block. Raises Unable."""
    python = interpreter(contender, home)
    environment = dict(contender.environment)
    if not contender.packages:
        environment["PYTHONPATH"] = str(ROOT)
    log = home / (contender.name.replace(" ", "_").replace(",", "") + ".log")
    with log.open("w") as file:
        command = [python, HERE / contender.script, split, str(seed), contender.variant]
        command += [contender.precision]
        found = Running(command, environment, file)
        try:
            yield found
        finally:
            found.stop()

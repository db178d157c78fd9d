"""Failure drills through the command line: what failed is a named row, the rest is measured, and
no process is left behind.

`DRILLS_TABLE=reports/drills.md python -m pytest tests/test_drills.py` writes the table of them.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "reports/drills.md"
STAGES = ("teacher_fit", "teacher_test")
AXIS = "train.max_epochs"
LARGEST_BYTES = 32 << 10
"""Room for the records of two or three cells."""
HEAD = """# What happens when something fails

Written by `DRILLS_TABLE=reports/drills.md python -m pytest tests/test_drills.py`, kept true by it.
Each failure was made to happen under `python -m bench.run`, most as cells of one matrix beside
healthy ones. *Exit* is that of the command, *orphans* counts processes alive after its end.

| failure | status | what the report says, or the command | exit | orphans |
|---|---|---|--:|--:|
"""


class Drill(NamedTuple):
    """One failure as a cell of the common matrix, and what is to be read of it."""

    failure: str
    mode: str
    status: str
    says: str
    log: str = ""


LAST_SEEN = "last seen in teacher_test, phase steps, step 1"
NO_END = f"exit 0 without an end record; {LAST_SEEN}"
DRILLS = (
    Drill("GPU memory full", "oom_gpu", "oom_gpu", "CUDA out of memory", "OutOfMemoryError"),
    Drill("GPU memory full inside gVisor", "gvisor", "oom_gpu", "INTERNAL ASSERT FAILED", "NVML"),
    Drill("memory of the process", "host_memory", "oom_host", "MemoryError", "MemoryError"),
    Drill("SIGKILL", "sigkill", "killed", "SIGKILL, and the kernel counted no out-of-memory kill"),
    Drill("SIGSEGV", "sigsegv", "killed", "SIGSEGV"),
    Drill("SIGSEGV after the last stage", "crash_at_exit", "killed", "SIGSEGV"),
    Drill("hang", "hang", "timeout(steps)", f"no new step or phase for 2 s; {LAST_SEEN}"),
    Drill(
        "endless compile",
        "compile",
        "timeout(compile)",
        "phase_timeouts_s.compile: more than 1 s in this phase; last seen in teacher_test, "
        "phase compile, step 0; learnt: 1 graph, 0 breaks after 5.1 s of compiling",
    ),
    Drill("endless training", "endless", "timeout(steps)", "timeout_s: no end within 4 s"),
    Drill("exit 0 without records", "silent_exit", "silent_exit", NO_END),
    Drill("half a line of records", "torn", "silent_exit", NO_END),
    Drill("no record of a stage", "missing_stage", "bad_output", "no record of teacher_test"),
    Drill("garbage as records", "garbage", "bad_output", "unreadable line in the worker's records"),
    Drill("NaN in the losses", "nan_loss", "bad_output", "losses.3 is nan"),
    Drill("NaN, said by the worker", "failure", "bad_output", "loss is nan at optimizer step 3"),
    Drill("flash-attn of another torch", "import", "import", "undefined symbol", "flash_attn_2"),
    Drill("missing package", "absent", "import", "No module named", "ModuleNotFoundError"),
    Drill("CUDA driver", "driver", "driver", "operation not supported", "CUDA driver error"),
    Drill("any other exception", "raise", "error", "exit 1: ValueError", "an ordinary mistake"),
    Drill("a child left running", "grandchild", "silent_exit", NO_END, "left behind"),
    Drill("a daemon in its own session", "daemon", "silent_exit", NO_END, "left behind"),
)
CELLS = {drill: f"{AXIS}={number}" for number, drill in enumerate(DRILLS, start=2)}
LAST = len(DRILLS) + 2
"""Epochs of the healthy cell after all the failures."""


class Row(NamedTuple):
    """One line of the table."""

    failure: str
    status: str
    says: str
    exit: int
    orphans: int


@dataclass
class Ended:
    """One command that has ended, and what it left then."""

    folder: Path
    status: int
    out: str
    err: str
    report: str
    records: list[dict[str, Any]]
    orphans: list[tuple[str, str]]
    """(cell, command line) of every process still alive; the cell may be unknown."""

    def statuses(self) -> dict[str, list[str]]:
        """Cell -> statuses of its stages in order."""
        found: dict[str, list[str]] = {}
        for record in self.records:
            found.setdefault(record["cell"], []).append(record["status"])
        return found

    def failure(self, cell: str) -> dict[str, Any]:
        """The record that says how a cell failed."""
        return next(r for r in self.records if r["cell"] == cell and r["status"] != "ok")

    def row(self, cell: str) -> list[str]:
        """A cell's line among those without figures: name, status, stage, repeats, reason."""
        _, _, text = self.report.partition("\n## Cells and repeats without figures\n")
        line = next(line for line in text.splitlines() if line.startswith(f"| `{cell}`"))
        return [part.strip() for part in line.strip("|").split(" | ")]

    def told(self, text: str) -> str:
        """A message without what differs from run to run."""
        return text.replace(str(self.folder), "RUN").replace(str(self.folder.parents[2]), "…")


class Bench:
    """The command line in a folder of its own, with the fake worker."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.mark = f"DRILL={uuid.uuid4()}"

    def matrix(self, epochs: Sequence[int], **keys: Any) -> Path:
        path = self.folder / "drill.yaml"
        text = {
            "question": "What happens when something fails?",
            "stages": STAGES,
            "axes": {AXIS: list(epochs)},
            "repeats": 1,
            "preflight": "never",
            **keys,
        }
        path.write_text(json.dumps(text))
        return path

    def start(
        self,
        *words: Any,
        modes: dict[str, str],
        worker: str = "fake_worker.py",
        within: Sequence[str] = (),
        limit: Callable[[], None] | None = None,
    ) -> subprocess.Popen[str]:
        script = f"{sys.executable} {ROOT / 'tests' / worker}"
        command = [sys.executable, "-m", "bench.run", *map(str, words), "--worker", script]
        name, _, value = self.mark.partition("=")
        choices = {cell: {"mode": mode} for cell, mode in modes.items()}
        variables = {
            "FAKE_WORKER": json.dumps(choices),
            "DYING_WORKER": json.dumps(modes),
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.Popen(
            [*within, *command, "--out", str(self.out)],
            cwd=ROOT,
            env=os.environ | variables | {name: value},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
        )

    def end(self, process: subprocess.Popen[str], patience_s: float = 0.0) -> Ended:
        """Wait for the command, then count what is left; `patience_s` for the kernel to act."""
        out, err = process.communicate(timeout=300)
        folder = next(self.out.glob("drill/*/"), None)
        assert folder, err
        limit_s = time.monotonic() + patience_s
        while (left := self.orphans(folder)) and time.monotonic() < limit_s:
            time.sleep(0.02)
        report, lines = folder / "report.md", (folder / "records.jsonl").read_text().splitlines()
        return Ended(
            folder=folder,
            status=process.returncode,
            out=out,
            err=err,
            report=report.read_text() if report.exists() else "",
            records=[json.loads(line) for line in lines],
            orphans=left,
        )

    def run(self, *words: Any, modes: dict[str, str], **how: Any) -> Ended:
        return self.end(self.start(*words, modes=modes, **how))

    def orphans(self, folder: Path) -> list[tuple[str, str]]:
        """Processes in a worker's session, noted by a worker, or marked in their environment."""
        sessions, noted = {}, {}
        for path in (folder / "cells").glob("*.jsonl"):
            if start := path.read_bytes().partition(b"\n")[0]:
                sessions[str(json.loads(start).get("session"))] = path.stem
        for path in (folder / "cells").glob("*.log"):
            for line in path.read_text(errors="replace").splitlines():
                if line.startswith("left behind: "):
                    noted[line.split()[-1]] = path.stem
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
                marked = self.mark.encode() in (path / "environ").read_bytes()
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            stem = noted.get(path.name) or sessions.get(session) or ("" if marked else None)
            if state not in "ZX" and stem is not None:
                found.append((stem.removesuffix("-r1"), command))
        return found


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """All drills as cells of one matrix, a healthy cell before and after them."""
    bench = Bench(tmp_path_factory.mktemp("drills"))
    limits = {"timeout_s": 4, "hang_timeout_s": 2, "phase_timeouts_s": {"compile": 1}}
    modes = {cell: drill.mode for drill, cell in CELLS.items()}
    return bench.run(bench.matrix(range(1, LAST + 1), **limits), modes=modes)


def wait_for(condition: Callable[[], object], limit_s: float = 20.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


# ---- cells of one matrix ----


@pytest.mark.parametrize("drill", DRILLS, ids=lambda drill: drill.mode)
def test_a_failure_is_a_named_row(drilled: Ended, drill: Drill) -> None:
    cell = CELLS[drill]
    _, status, _, repeats, reason = drilled.row(cell)
    assert (status, repeats) == (drill.status, "1")
    assert drill.says in reason
    record = drilled.failure(cell)
    assert record["status"] == status.partition("(")[0]
    assert drill.log in "\n".join(record["log_tail"])
    assert drill.log in drilled.report


def test_the_rest_of_the_matrix_is_measured(drilled: Ended) -> None:
    found = drilled.statuses()
    assert set(found) == {"baseline", *CELLS.values(), f"{AXIS}={LAST}"}
    assert found["baseline"] == found[f"{AXIS}={LAST}"] == ["ok", "ok"]
    assert drilled.status == 1, drilled.err
    assert drilled.out.splitlines()[-1] == str(drilled.folder / "report.md")


def test_no_failure_leaves_a_process(drilled: Ended) -> None:
    logs = "".join(path.read_text() for path in (drilled.folder / "cells").glob("*.log"))
    assert logs.count("left behind: ") == 2, "there was something to leave"
    assert drilled.orphans == []


def rows_of_cells(drilled: Ended) -> list[Row]:
    found = []
    for drill, cell in CELLS.items():
        _, status, _, _, reason = drilled.row(cell)
        orphans = [command for owner, command in drilled.orphans if owner == cell]
        # How far an endless worker comes is the machine's affair.
        says = re.sub(r"step \d\d+", "step N", reason)
        found.append(Row(drill.failure, status, says, drilled.status, len(orphans)))
    return found


# ---- the command itself stopped ----


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Ended, Ended]:
    """`kill -9` of the command while its second worker hangs beside a daemon of its own, Ctrl-C at
    the same place of its continuation, and a continuation to the end.
    """
    bench = Bench(tmp_path_factory.mktemp("stopped"))
    matrix = bench.matrix([1, 2])
    process = started_stuck(bench, matrix)
    process.kill()
    killed = bench.end(process, patience_s=5.0)
    for log in (killed.folder / "cells").glob("*.log"):
        log.unlink()
    process = started_stuck(bench, matrix, "--resume", killed.folder.name)
    process.send_signal(signal.SIGINT)
    interrupted = bench.end(process)
    return killed, interrupted, bench.run(matrix, "--resume", killed.folder.name, modes={})


def started_stuck(bench: Bench, *words: Any) -> subprocess.Popen[str]:
    """A run whose first cell is measured and whose second has left a daemon and hangs."""
    process = bench.start(*words, modes={f"{AXIS}=2": "stuck"})
    limit_s = time.monotonic() + 20
    while not any("left behind" in log.read_text() for log in bench.out.rglob("cells/*=2-r1.log")):
        assert time.monotonic() < limit_s, "the second cell never began"
        time.sleep(0.02)
    return process


def test_a_killed_command_takes_its_workers_and_their_daemons_along(
    stopped: tuple[Ended, Ended, Ended],
) -> None:
    killed, _, _ = stopped
    assert (killed.status, killed.orphans) == (-signal.SIGKILL, [])
    assert killed.statuses() == {"baseline": ["ok", "ok"]}


def test_an_interruption_leaves_a_report_and_no_process(
    stopped: tuple[Ended, Ended, Ended],
) -> None:
    killed, interrupted, finished = stopped
    assert (interrupted.status, interrupted.orphans) == (130, [])
    assert "finish with: python -m bench.run" in interrupted.out
    assert interrupted.out.splitlines()[-1] == str(interrupted.folder / "report.md")
    assert interrupted.records == killed.records
    assert (finished.status, finished.orphans) == (0, []), finished.err
    assert finished.records[:2] == killed.records
    assert finished.statuses() == {"baseline": ["ok", "ok"], f"{AXIS}=2": ["ok", "ok"]}


# ---- the machine gives no more ----


@pytest.fixture(scope="module")
def killed_for_memory(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The kernel's own out-of-memory killer, in a memory cgroup made for it."""
    bench = Bench(tmp_path_factory.mktemp("memory"))
    with memory_group(700 << 20) as group:
        join = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group)]
        return bench.run(bench.matrix([1, 2, 3]), modes={f"{AXIS}=2": "eat_memory"}, within=join)


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A memory cgroup below our own, removed afterwards; skips where none may be made."""
    groups = dict(
        line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()
    )
    root = Path("/sys/fs/cgroup")
    first = "memory" in groups
    place = (
        root / "memory" / groups["memory"].lstrip("/") if first else root / groups[""].lstrip("/")
    )
    group = place / f"drill-{uuid.uuid4().hex[:8]}"
    limits = (
        ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        if first
        else ("memory.max", "memory.swap.max")
    )
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup may be made here: {error}")
    try:
        try:
            (group / limits[0]).write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"no memory limit may be set here: {error}")
        if (group / limits[1]).exists():
            (group / limits[1]).write_text(str(limit_bytes) if first else "0")
        yield group
    finally:
        group.rmdir()


def test_a_kill_for_memory_is_told_from_any_other(killed_for_memory: Ended) -> None:
    _, status, stage, _, reason = killed_for_memory.row(f"{AXIS}=2")
    assert (status, stage) == ("oom_host", "teacher_test")
    assert "the kernel's out-of-memory killer ended it" in reason
    found = killed_for_memory.statuses()
    assert found["baseline"] == found[f"{AXIS}=3"] == ["ok", "ok"]
    assert (killed_for_memory.status, killed_for_memory.orphans) == (1, [])


@pytest.fixture(scope="module")
def disk_full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Ended]:
    """A worker fills a small file system of its own; then there is room, and the run goes on."""
    bench = Bench(tmp_path_factory.mktemp("disk"))
    place = bench.out / "drill"
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "drill", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    try:
        matrix = bench.matrix([1, 2, 3])
        ended = bench.run(matrix, modes={f"{AXIS}=2": "fill_disk"})
        subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        return ended, bench.run(matrix, "--resume", ended.folder.name, modes={})
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="module")
def file_limit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Ended]:
    """The records grow past the largest file allowed; then they may, and the run goes on."""
    bench = Bench(tmp_path_factory.mktemp("file"))
    matrix = bench.matrix(range(1, 7))
    most = (LARGEST_BYTES, LARGEST_BYTES)
    ended = bench.run(
        matrix, modes={}, limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, most)
    )
    return ended, bench.run(matrix, "--resume", ended.folder.name, modes={})


@pytest.mark.parametrize("drill", ["disk_full", "file_limit"])
def test_without_room_the_records_stay_whole_and_the_run_can_go_on(
    drill: str, request: pytest.FixtureRequest
) -> None:
    ended, resumed = request.getfixturevalue(drill)
    assert (ended.status, ended.orphans) == (3, [])
    assert ended.err.startswith("machine: ")
    assert "what was measured is kept" in ended.err
    assert "--resume" in ended.err
    assert len(ended.err.splitlines()) == 1
    assert set(map(tuple, ended.statuses().values())) == {("ok", "ok")}, "no half group"
    assert resumed.status == 0, resumed.err
    assert resumed.records[: len(ended.records)] == ended.records
    assert len(resumed.statuses()) > len(ended.statuses())
    assert set(map(tuple, resumed.statuses().values())) == {("ok", "ok")}


# ---- the real worker ----

REAL = {
    0.002: ("crash", "killed", "SIGSEGV"),
    0.003: ("hang", "timeout(evaluation)", "hang_timeout_s: no new step or phase for 20 s"),
    0.004: ("no_such_package", "import", "No module named 'a_package_nobody_installed'"),
    1e30: ("", "bad_output", "training loss is nan"),
}
SMALL = {
    "data": {"synthetic": {"users": 100, "items": 60, "mean_length": 6}},
    "student": {"max_epochs": 1, "hidden_size": 16},
    "teacher": {"inference_batch_size": 16},
    "train": {"max_epochs": 1, "batch_size": 16, "max_steps": 6},
    "machine": {"threads": 1, "device": "cpu"},
}


@pytest.mark.slow
def test_the_real_worker_fails_as_the_fake_one_does(tmp_path: Path) -> None:
    """The ways of dying that need torch or a live step, beside those of the end-to-end tests."""
    bench = Bench(tmp_path)
    ways = {f"train.lr={rate}": end for rate, end in REAL.items()}
    done = bench.run(
        bench.matrix((), axes={"train.lr": [0.001, *REAL]}, base=SMALL, hang_timeout_s=20),
        modes={cell: way for cell, (way, _, _) in ways.items() if way},
        worker="dying_worker.py",
    )
    assert (done.status, done.orphans) == (1, []), done.err
    assert done.statuses()["baseline"] == ["ok", "ok"]
    for cell, (_, status, says) in ways.items():
        row = done.row(cell)
        assert row[1] == status
        assert says in row[-1]


# ---- the table ----


def rows_of_runs(request: pytest.FixtureRequest) -> dict[str, Row | None]:
    """The drills that take a run of their own; None for those that cannot be held here."""

    def held(fixture: str) -> Any:
        try:
            return request.getfixturevalue(fixture)
        except pytest.skip.Exception:
            return None

    def unrecorded(failure: str, ended: Ended, says: str) -> Row:
        return Row(failure, "not recorded", ended.told(says), ended.status, len(ended.orphans))

    found: dict[str, Row | None] = {}
    memory, name = held("killed_for_memory"), "memory of the host"
    if memory:
        _, status, _, _, reason = memory.row(f"{AXIS}=2")
        memory = Row(name, status, reason, memory.status, len(memory.orphans))
    found[name] = memory
    for name, fixture in (("disk full", "disk_full"), ("largest file reached", "file_limit")):
        pair = held(fixture)
        found[name] = pair and unrecorded(name, pair[0], pair[0].err.strip())
    killed, interrupted, _ = held("stopped")
    hint = next(line for line in interrupted.out.splitlines() if line.startswith("interrupted"))
    nothing = "nothing; `--resume` measures what is missing"
    found["Ctrl-C"] = unrecorded("Ctrl-C", interrupted, hint)
    found["kill -9"] = unrecorded("kill -9 of the command", killed, nothing)
    return found


def test_the_table_is_what_the_drills_said(drilled: Ended, request: pytest.FixtureRequest) -> None:
    """Of a drill that cannot be held here the written line is left as it is."""
    written = TABLE.read_text().splitlines()
    lines = [line_of(row) for row in rows_of_cells(drilled)]
    for name, row in rows_of_runs(request).items():
        lines += [line_of(row)] if row else [x for x in written if x.startswith(f"| {name} |")]
    text = HEAD + "\n".join(lines) + "\n"
    if place := os.environ.get("DRILLS_TABLE"):
        Path(place).write_text(text)
    assert TABLE.read_text() == text


def line_of(row: Row) -> str:
    return f"| {' | '.join(map(str, row))} |"

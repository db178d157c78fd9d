"""Workers in real containers of docker and podman, from images made of this environment.

Run by `make test-containers`; `tests/engine.sh start` gives a bare machine an engine.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import images
import pytest
import yaml

from bench.launch import Interrupted, Outcome, run_worker
from bench.launching import containers, engines
from bench.launching.deaths import Job
from bench.launching.engines import Engine
from bench.launching.starting import Starter
from bench.records import locked
from core.settings import Settings

pytestmark = pytest.mark.container

ROOT = Path(__file__).resolve().parent.parent
FAKE = f"{sys.executable} {ROOT / 'tests' / 'fake_worker.py'}"
NAMED, UNNAMED = "ilora-bench-test:a", "ilora-bench-test:b"
TINY = {
    "data.synthetic.users": 100,
    "data.synthetic.items": 60,
    "data.synthetic.mean_length": 6,
    "student.max_epochs": 1,
    "student.hidden_size": 16,
    "teacher.inference_batch_size": 16,
    "train.max_epochs": 1,
    "train.batch_size": 16,
    "train.max_steps": 6,
    "machine.threads": 1,
    "machine.device": "cpu",
}


@pytest.fixture(scope="module", params=engines.ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    found = engines.find((request.param,), 20.0)
    if isinstance(found, str):
        pytest.skip(found)
    images.have(found.name, NAMED, "LABEL ilora-bench.image=a", "ENV ILORA_BENCH_IMAGE=a")
    images.have(found.name, UNNAMED, "LABEL ilora-bench.image=b")
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(engine: Engine) -> Iterator[None]:
    yield
    assert ours(engine) == []


def ours(engine: Engine) -> list[str]:
    """Names of all containers that carry the label, running or not."""
    listed = engine.ask(
        "ps", "--all", "--filter", f"label={containers.LABEL}", "--format", "{{.Names}}"
    )
    assert listed.returncode == 0, listed.stderr
    return listed.stdout.split()


# ---- the main command ----


class Bench:
    """The command line in a folder of its own, with one engine."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.folder, self.engine = folder, engine

    def command(self, values: list[str], *words: str, **changes: Any) -> list[str]:
        matrix = {
            "question": "Which image?",
            "stages": ["teacher_fit", "teacher_test"],
            "axes": {"machine.image": values},
            "base": TINY,
            "repeats": 1,
            "preflight": "never",
            "timeout_s": 120,
        }
        path = self.folder / "images.yaml"
        path.write_text(yaml.safe_dump(matrix | changes, sort_keys=False))
        choice = ["--launcher", self.engine.name, "--out", str(self.folder / "out")]
        return [sys.executable, "-m", "bench.run", str(path), *choice, *words]

    def run(self, values: list[str], *words: str, **changes: Any) -> Any:
        return subprocess.run(
            self.command(values, *words, **changes),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=500,
        )

    def start(self, values: list[str], *words: str, **changes: Any) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.command(values, *words, **changes),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def run_folder(self) -> Path:
        return max(self.folder.glob("out/images/*"))

    def records(self) -> list[dict[str, Any]]:
        text = (self.run_folder / "records.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def bench(tmp_path: Path, engine: Engine) -> Bench:
    return Bench(tmp_path, engine)


def misbehaving(**choice: Any) -> dict[str, Any]:
    """Settings that reach the fake worker inside: its variable is none of those passed on."""
    return {"base": {"machine.env": [f"FAKE_WORKER={json.dumps({'*': choice})}"]}}


def wait_for(condition: Callable[[], Any], limit_s: float = 30.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.1)


def test_the_real_worker_is_judged_in_two_images_and_on_the_host(bench: Bench) -> None:
    done = bench.run(["host", NAMED, UNNAMED])
    assert done.returncode == 0, done.stdout + done.stderr
    report = (bench.run_folder / "report.md").read_text()
    found = {(record["cell"], record["stage"]): record for record in bench.records()}
    assert {record["status"] for record in found.values()} == {"ok"}
    assert len(found) == 6
    digests, names = set(), set()
    for image, named in ((NAMED, "a"), (UNNAMED, "unnamed")):
        record = found[f"machine.image={image}", "teacher_fit"]
        launched, seen = record["facts"]["launched"], record["facts"]["container"]
        assert launched["image"] == image
        assert launched["id"] == seen["id"]
        assert seen["engine"] == bench.engine.name, "by the engine's mark inside"
        assert record["facts"]["image"] == named
        assert record["image_digest"] == launched["digest"]
        assert record["image_digest"] == bench.engine.digest(image)
        assert f"ran {image} ({launched['digest'][7:19]}) as {launched['id']}" in report
        digests.add(record["image_digest"])
        names.add(seen["id"])
    assert len(digests) == len(names) == 2
    on_host = found["baseline", "teacher_fit"]
    assert on_host["facts"]["image"] == "host"
    assert on_host["image_digest"] is None
    rows = [line for line in report.splitlines() if line.startswith("| `machine.image`")]
    assert len(rows) == 3
    assert all(row.rstrip(" |").endswith("holds") for row in rows), rows
    assert "whole image, so library versions too" in report
    machine = json.loads((bench.run_folder / "machine.json").read_text())
    assert machine["containers"]["images"].keys() == {NAMED, UNNAMED}
    for process in machine["processes"].values():
        assert process["torch_file"].startswith(f"/{images.ROOT}/")
    assert not machine["process"]["torch_file"].startswith(f"/{images.ROOT}/")


def test_the_last_step_of_an_images_build_passes(engine: Engine) -> None:
    mount = f"type=bind,source={ROOT},target={ROOT},readonly"
    words = ["--network", "host", "--mount", mount, NAMED, "python", f"{ROOT}/tests/image_smoke.py"]
    done = engine.ask("run", "--rm", *words, "a", "None", limit_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("a torch==")


def test_an_absent_image_is_a_row_and_the_others_are_measured(bench: Bench) -> None:
    done = bench.run(["host", "cu118", NAMED], "--worker", FAKE)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {record["cell"]: record for record in bench.records()}
    absent = found["machine.image=cu118"]
    assert (absent["status"], absent["repeat"]) == ("skipped", 0)
    assert "has no image ilora-bench:cu118; make image-cu118" in absent["reason"]
    assert {found["baseline"]["status"], found[f"machine.image={NAMED}"]["status"]} == {"ok"}


def test_another_engine_is_not_taken_in_its_place(bench: Bench, tmp_path: Path) -> None:
    """The engine asked for is not on the path: nothing starts, not even with the other one."""
    (tmp_path / "bin").mkdir()
    other = next(name for name in engines.ENGINES if name != bench.engine.name)
    (tmp_path / "bin" / other).symlink_to(bench.engine.program)
    done = subprocess.run(
        bench.command(["host", NAMED], "--worker", FAKE),
        cwd=ROOT,
        env=os.environ | {"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {record["cell"]: record for record in bench.records()}
    assert found["baseline"]["status"] == "ok"
    lost = found[f"machine.image={NAMED}"]
    assert lost["status"] == "unsupported"
    assert lost["reason"] == f"no container engine: {bench.engine.name} is not installed"


def test_ctrl_c_leaves_no_container_and_the_run_can_be_finished(bench: Bench) -> None:
    hanging = misbehaving(mode="hang")
    process = bench.start([NAMED, UNNAMED], "--worker", FAKE, **hanging)
    wait_for(lambda: any(bench.folder.glob("out/images/*/cells/*-r1.jsonl")))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert ours(bench.engine) == []
    assert "interrupted; finish with: " in output
    assert bench.records() == []


def test_kill_9_of_the_parent_takes_the_container_along(bench: Bench) -> None:
    process = bench.start([NAMED, UNNAMED], "--worker", FAKE, **misbehaving(mode="hang"))
    wait_for(lambda: ours(bench.engine))
    process.kill()
    process.communicate()
    wait_for(lambda: not ours(bench.engine), 15.0)


def test_the_next_start_removes_what_a_dead_run_left_and_nothing_else(
    bench: Bench, tmp_path: Path
) -> None:
    """Two runs whose remover died with them; one of them is held by a living process."""
    for name in ("dead", "alive"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").touch()
        label = f"{containers.LABEL}={tmp_path / name}"
        words = ["--detach", "--network", "host", "--name", f"ilora-bench-{name}", "--label", label]
        sleep = ["python", "-c", "import time; time.sleep(600)"]
        assert bench.engine.ask("run", *words, NAMED, *sleep).returncode == 0
    with locked(tmp_path / "alive" / "records.jsonl"):
        done = bench.run(["host", NAMED], "--worker", FAKE)
        assert done.returncode == 0, done.stderr
        assert "removed a container of a dead run: ilora-bench-dead" in done.stdout
        assert ours(bench.engine) == ["ilora-bench-alive"]
    assert containers.remove_left_behind(bench.engine, tmp_path) == ["ilora-bench-alive"]


# ---- one worker ----


@pytest.fixture
def job(tmp_path: Path, engine: Engine) -> Callable[..., Job]:
    """A worker that is a Python text; it finds its folder in `here`."""
    digest = engine.digest(NAMED)
    assert digest is not None
    asked = Settings.model_validate({"machine": {"image": NAMED, "device": "cpu"}})

    def make(text: str, timeout_s: float = 60.0, **more: Any) -> Job:
        place = f"import os, pathlib, sys, time\nhere = pathlib.Path({str(tmp_path)!r})\n"
        return Job(
            command=(sys.executable, "-c", place + text),
            cell_file=tmp_path / "cell.json",
            records=tmp_path / "records.jsonl",
            log=tmp_path / "worker.log",
            stages=("teacher_fit",),
            timeout_s=timeout_s,
            container=Starter(engine.name, engine, digests={NAMED: digest}).container(
                asked, tmp_path
            ),
            **more,
        )

    return make


@pytest.mark.parametrize(
    ("text", "status", "reason"),
    [
        ("sys.exit(7)", "error", "exit 7: no output"),
        ("sys.exit(0)", "silent_exit", "exit 0 without an end record"),
        ("raise ValueError('an ordinary mistake')", "error", "exit 1: ValueError: an ordinary"),
        ("import no_such_module", "import", "No module named 'no_such_module'"),
        ("sys.exit(137)", "killed", "SIGKILL, and the kernel counted no out-of-memory kill"),
    ],
)
def test_exit_codes_and_last_words_pass(
    job: Callable[..., Job], text: str, status: str, reason: str
) -> None:
    outcome = run_worker(job(text))
    assert (outcome.status, reason in str(outcome.reason)) == (status, True), outcome


def test_a_command_the_image_does_not_have_is_an_error_with_its_name(
    job: Callable[..., Job],
) -> None:
    made = job("")
    outcome = run_worker(Job(**{**vars(made), "command": ("no-such-program",)}))
    assert outcome.status == "error"
    assert "no-such-program" in str(outcome.reason), outcome


def test_the_host_is_seen_as_a_process_sees_it_but_read_only(
    job: Callable[..., Job], tmp_path: Path
) -> None:
    text = f"""
import json, platform
try:
    pathlib.Path({str(ROOT / "written_by_a_worker")!r}).write_text("")
    written = True
except OSError:
    written = False
shm = os.statvfs("/dev/shm")
(here / "seen.json").write_text(json.dumps({{
    "name": platform.node(), "folder": os.getcwd(), "written": written,
    "asked": os.environ.get("ASKED"), "shm": shm.f_frsize * shm.f_blocks,
    "core": __import__("core").__file__, "uid": os.getuid(), "cores": len(os.sched_getaffinity(0)),
}}))
"""
    made = job(text, env={"ASKED": "yes"})
    assert made.container is not None
    run_worker(made)
    seen = json.loads((tmp_path / "seen.json").read_text())
    shm = os.statvfs("/dev/shm")
    assert seen == {
        "name": made.container.name,
        "folder": str(Path.cwd()),
        "written": False,
        "asked": "yes",
        "shm": shm.f_frsize * shm.f_blocks,
        "core": str(ROOT / "core" / "__init__.py"),
        "uid": os.getuid(),
        "cores": len(os.sched_getaffinity(0)),
    }
    assert (tmp_path / "seen.json").stat().st_uid == os.getuid()


def test_a_time_limit_ends_the_container(job: Callable[..., Job], engine: Engine) -> None:
    outcome = run_worker(job("time.sleep(600)", timeout_s=3.0))
    assert (outcome.status, outcome.wall_s < 30) == ("timeout", True)
    assert outcome.launched["image"] == NAMED
    assert ours(engine) == []


def test_a_stop_ends_the_container_with_everything_in_it(
    job: Callable[..., Job], engine: Engine, tmp_path: Path
) -> None:
    """A deaf grandchild in a session of its own included."""
    child = (
        "import os, signal, time; os.setsid(); signal.signal(15, signal.SIG_IGN); time.sleep(99)"
    )
    made = job(
        f"import subprocess\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "(here / 'begun').touch()\ntime.sleep(600)"
    )
    with pytest.raises(Interrupted):
        run_worker(made, stopped=(tmp_path / "begun").exists)
    assert ours(engine) == []
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert child not in commands


def test_the_memory_killer_is_named(job: Callable[..., Job], engine: Engine) -> None:
    text = """
(here / 'begun').touch()
while not (here / 'limited').exists():
    time.sleep(0.05)
rows = [bytearray(os.urandom(1 << 20)) for _ in range(2000)]
"""
    made = job(text)
    assert made.container is not None
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(run_worker(made)))
    thread.start()
    wait_for((made.log.parent / "begun").exists)
    limit = ["--memory", "200m", "--memory-swap", "200m"]
    limited = engine.ask("update", *limit, made.container.name)
    (made.log.parent / "limited").touch()
    thread.join(60)
    assert limited.returncode == 0, limited.stderr
    assert outcomes[0].status == "oom_host", outcomes
    assert "out-of-memory killer" in str(outcomes[0].reason)


def test_a_client_that_is_killed_alone_leaves_no_container(
    job: Callable[..., Job], engine: Engine, tmp_path: Path
) -> None:
    made = job("(here / 'begun').touch()\ntime.sleep(600)")
    assert made.container is not None
    name = made.container.name

    def kill_client() -> None:
        wait_for((tmp_path / "begun").exists)
        for entry in Path("/proc").glob("[0-9]*"):
            words = _words(entry)
            if words[:2] == [engine.program, "run"] and name in words:
                os.kill(int(entry.name), signal.SIGKILL)

    thread = threading.Thread(target=kill_client)
    thread.start()
    outcome = run_worker(made)
    thread.join()
    assert (outcome.status, outcome.wall_s < 30) == ("killed", True)
    assert ours(engine) == []


def _words(process: Path) -> list[str]:
    try:
        return (process / "cmdline").read_text().split("\0")
    except OSError:
        return []


def test_the_plan_is_quick_with_an_engine(bench: Bench) -> None:
    begin_s = time.monotonic()
    bench.run(["host"], "--plan")
    without_s = time.monotonic() - begin_s
    begin_s = time.monotonic()
    done = bench.run(["host", NAMED, "cu118"], "--plan")
    assert time.monotonic() - begin_s < without_s + 1.0
    assert "has no image ilora-bench:cu118" in done.stdout

"""Images and containers without an engine: files, choices, command lines; fake engines answer."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import image_smoke
import pytest
import yaml

from bench import launch, records
from bench.launching import containers, engines, starting
from bench.launching.containers import Container
from bench.launching.deaths import Job
from bench.launching.engines import Engine
from bench.launching.starting import Starter
from bench.machine import UnfitMachine
from core.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
IMAGES = {"cu118": "11.8", "cu121": "12.1"}
# The table of pins that exist together.
BASES = {
    "cu118": "pytorch/pytorch:2.7.1-cuda11.8-cudnn9-devel",
    "cu121": "pytorch/pytorch:2.5.1-cuda12.1-cudnn9-devel",
}
SHARED = {
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
    "pytorch-lightning": "2.6.6",
    "accelerate": "1.15.0",
    "nvidia-ml-py": "13.615.71",
}
TRANSFORMERS = {"cu118": "5.23.0", "cu121": "5.19.0"}
DOCKER = Engine("docker", "/bin/docker", "28.0", False)
PODMAN = Engine("podman", "/bin/podman", "4.3.1", False)
# What a healthy engine answers; each test adds how `run` and the rest go.
ANSWERS = """#!/bin/sh
echo "$@" >> "$0.calls"
case "$1 $2" in
  "info --format") echo '1.0 []' ;;
  "image inspect") case "$5" in *absent*) exit 1 ;; esac; echo sha256:$(printf %064d 7) ;;
  run*) {run} ;;
  *) exit 1 ;;
esac
"""


def pins(name: str) -> dict[str, str]:
    text = (ROOT / f"Dockerfile.{name}").read_text()
    return dict(re.findall(r"^ +([a-z][\w-]*)==(\S+) \\$", text, re.MULTILINE))


def settings(image: str = "cu118", **machine: Any) -> Settings:
    return Settings.model_validate({"machine": {"image": image, "device": "cpu", **machine}})


def fake_engine(folder: Path, run: str = "exit 1", name: str = "docker") -> Path:
    """A program that answers like an engine; what it was asked lies beside it."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(ANSWERS.format(run=run))
    program.chmod(0o755)
    return folder


# ---- the images ----


@pytest.mark.parametrize("name", IMAGES)
def test_the_pins_are_those_that_exist_together(name: str) -> None:
    text = (ROOT / f"Dockerfile.{name}").read_text()
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == [BASES[name]]
    found = pins(name)
    assert SHARED.items() <= found.items()
    assert found["transformers"] == TRANSFORMERS[name]
    assert f"ENV ILORA_BENCH_IMAGE={name}\n" in text
    assert f'ilora-bench.image="{name}"' in text
    assert text.rstrip().splitlines()[-1].endswith(f"image_smoke.py {name} {IMAGES[name]}")


def test_both_images_differ_in_cuda_torch_and_transformers_alone() -> None:
    ours, other = pins("cu118"), pins("cu121")
    assert {package for package in ours if ours[package] != other[package]} == {"transformers"}
    tested = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().lower().splitlines()[1:]
    )
    assert {package: tested[package] for package in ours} == ours
    dependencies = re.findall(
        r'^    "([\w-]+)[<>=]', (ROOT / "pyproject.toml").read_text().split("[project.opt")[0], re.M
    )
    assert {*ours, "torch"} == set(dependencies)


@pytest.mark.parametrize("name", IMAGES)
def test_nothing_in_an_image_can_bring_another_torch(name: str) -> None:
    text = (ROOT / f"Dockerfile.{name}").read_text()
    assert "torch" not in pins(name)
    assert text.count("pip install") == text.count("--constraint pins.txt") == 1
    assert re.search(r"pip list .*grep -E '\^\(torch\|.*> pins\.txt", text)
    before, after = re.findall(r'python -c "import torch; print\(([^"]*)\)"', text)
    assert before == after == "torch.__version__, torch.version.cuda"
    commands = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    for word in ("flash", "venv", "conda", "poetry", "uv ", "ALLOC_CONF"):
        assert word not in commands


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    files = [str(ROOT / f"Dockerfile.{name}") for name in IMAGES]
    done = subprocess.run([program, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_smoke_sees_a_second_environment_and_another_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image_smoke.four_bit_layer()
    monkeypatch.setenv("ILORA_BENCH_IMAGE", "cu118")
    with pytest.raises(AssertionError, match="has CUDA"):
        image_smoke.main("cu118", "0.0")
    with pytest.raises(AssertionError, match="does not say its name"):
        image_smoke.main("cu121", "0.0")
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    with pytest.raises(AssertionError, match="is not the image's torch"):
        image_smoke.one_environment(Path("/elsewhere/torch/__init__.py"))
    monkeypatch.setattr(sys, "base_prefix", "/elsewhere")
    with pytest.raises(AssertionError, match="second environment"):
        image_smoke.one_environment(Path(sys.prefix) / "torch")


def test_make_builds_what_the_settings_name() -> None:
    for name in IMAGES:
        done = subprocess.run(
            ["make", "--no-print-directory", "--dry-run", f"image-{name}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        expected = f"docker build --file Dockerfile.{name} --tag {engines.reference(name)} ."
        assert done.stdout.strip() == expected, done.stderr


# ---- which way a cell starts ----


@pytest.mark.parametrize(
    ("launcher", "image", "expected"),
    [
        ("auto", "host", None),
        ("auto", "cu118", None),
        ("podman", "host", None),
        ("process", "host", None),
        ("process", "cu118", ("skipped", "--launcher process starts no containers")),
        ("container", "host", ("skipped", "--launcher container starts no processes")),
        ("container", "cu118", None),
        ("auto", "cu121", ("skipped", "docker has no image ilora-bench:cu121; make image-cu121")),
        ("auto", "my/bench:7", ("skipped", "docker has no image my/bench:7; docker pull my/b")),
    ],
)
def test_each_launcher_starts_what_it_says_or_nothing(
    launcher: str, image: str, expected: tuple[str, str] | None
) -> None:
    starter = Starter(launcher, DOCKER, digests={"cu118": "sha256:1"})
    found = starter.obstacle(settings(image))
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert (found.status, expected[1] in found.reason) == (expected[0], True), found.reason


def test_the_advice_for_podman_builds_with_podman() -> None:
    found = Starter("auto", PODMAN).obstacle(settings())
    assert found is not None
    assert found.reason.endswith("make image-cu118 ENGINE=podman")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "docker is not installed, podman is not installed"),
        ("echo 'Cannot connect to the Docker daemon' >&2; exit 1", "does not answer (Cannot"),
        ("echo 1.0; echo 'cannot connect to the daemon' >&2", "does not answer (cannot"),
        ("exit 3", "docker does not answer (no reason given)"),
    ],
)
def test_without_an_engine_that_answers_no_image_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, reason: str
) -> None:
    if script is not None:
        (tmp_path / "docker").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = starting.starter("auto", ["host", "cu118"], 5.0).obstacle(settings())
    assert found is not None
    assert found.status == "unsupported"
    assert found.reason.startswith("no container engine: ")
    assert reason in found.reason


def test_the_first_engine_that_answers_is_taken_and_the_named_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{fake_engine(tmp_path, name='podman')}:{os.environ['PATH']}")
    (tmp_path / "docker").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    taken = starting.starter("auto", ["cu118", "absent:1"], 5.0)
    assert taken.engine is not None
    assert (taken.engine.name, list(taken.digests)) == ("podman", ["cu118"])
    assert starting.starter("docker", ["cu118"], 5.0).engine is None


def test_a_plan_waits_less_than_a_second_for_an_engine_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("docker", "podman"):
        (tmp_path / name).write_text("#!/bin/sh\nexec sleep 60\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    begin_s = time.monotonic()
    found = starting.starter("auto", ["cu118"], starting.PLAN_S).obstacle(settings())
    assert time.monotonic() - begin_s < 1.5
    assert found is not None
    assert "docker does not answer (not within 0.9 s)" in found.reason


def test_no_engine_is_asked_for_cells_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(fake_engine(tmp_path)))
    assert starting.starter("auto", ["host"], 5.0).engine is None
    assert starting.starter("process", ["cu118"], 5.0).engine is None
    assert not (tmp_path / "docker.calls").exists()


def test_sittings_of_another_engine_or_image_are_not_joined() -> None:
    now = Starter("auto", DOCKER, digests={"cu118": "sha256:2", "a:1": "sha256:3"})
    assert now.differences(now.facts()) == []
    assert now.differences({}) == []
    assert Starter("auto").differences(now.facts()) == []
    earlier = Starter("auto", PODMAN, digests={"cu118": "sha256:1"}).facts()
    assert now.differences(earlier) == [
        "engine was podman 4.3.1, is docker 28.0",
        "image cu118 was sha256:1, is sha256:2",
    ]


# ---- the command line ----


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Container:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "models"))
    (tmp_path / "ratings").mkdir()
    asked = Settings.model_validate(
        {"machine": {"image": "cu118"}, "data": {"root": str(tmp_path / "ratings")}}
    )
    made = Starter("auto", DOCKER, digests={"cu118": "sha256:1"}).container(asked, tmp_path / "run")
    assert made is not None
    return made


def values(command: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(command) if name == option]


def test_the_host_needs_no_container() -> None:
    assert Starter("auto").container(settings("host"), Path("run")) is None


def test_a_container_differs_from_a_process_by_its_image_alone(
    container: Container, tmp_path: Path
) -> None:
    command = container.command(["python", "-m", "bench.worker", "cell.json"], {"B", "A"})
    assert command[:2] == ["/bin/docker", "run"]
    assert command[-5:] == ["python", "sha256:1", "-m", "bench.worker", "cell.json"]
    assert values(command, "--hostname") == values(command, "--name") == [container.name]
    assert values(command, "--label") == [f"ilora-bench.run={tmp_path / 'run'}"]
    assert values(command, "--network") == ["host"]
    assert values(command, "--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert values(command, "--workdir") == [str(Path.cwd())]
    assert values(command, "--pull") == ["never"]
    space = os.statvfs("/dev/shm")
    assert values(command, "--shm-size") == [str(space.f_frsize * space.f_blocks)]
    mounts = set(values(command, "--mount"))
    for path, mode in (
        (ROOT, ",readonly"),
        (tmp_path / "ratings", ",readonly"),
        (tmp_path / "run", ""),
        (tmp_path / "models", ""),
    ):
        assert f'type=bind,"source={path}","target={path}"{mode}' in mounts
    assert values(command, "--env")[:2] == ["A", "B"], "by name: a token is nobody else's to read"
    assert "--memory" not in command
    assert "--gpus" not in command


def test_a_link_is_there_with_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "ratings").symlink_to(tmp_path / "disk")
    asked = Settings.model_validate(
        {"machine": {"image": "a:1"}, "data": {"root": str(tmp_path / "ratings")}}
    )
    made = Starter("auto", DOCKER, digests={"a:1": "sha256:1"}).container(asked, tmp_path / "run")
    assert made is not None
    mounts = " ".join(values(made.command(["python"], ()), "--mount"))
    for name in ("disk", "ratings"):
        assert f'"target={tmp_path / name}",readonly' in mounts


@pytest.mark.parametrize(
    ("engine", "flags"),
    [(DOCKER, ["--gpus", "all"]), (PODMAN, ["--device", "nvidia.com/gpu=all"])],
)
def test_gpus_are_given_in_the_engines_own_way_where_there_are_some(
    engine: Engine, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for found, device, given in (
        ((), "auto", False),
        (({"name": "A100"},), "auto", True),
        (({"name": "A100"},), "cpu", False),
    ):
        monkeypatch.setattr(starting, "gpus", lambda found=found: found)
        starter = Starter("auto", engine, digests={"cu118": "sha256:1"})
        made = starter.container(settings(device=device), Path("run"))
        assert made is not None
        command = made.command(["python"], ())
        shown = [list(pair) for pair in itertools.pairwise(command)]
        assert (made.gpus, flags in shown) == (given, given)


@pytest.mark.parametrize(
    ("name", "rootless", "flags"),
    [
        ("docker", True, ["--user", "0:0"]),
        ("podman", True, ["--userns", "keep-id"]),
        ("podman", False, ["--user", f"{os.getuid()}:{os.getgid()}"]),
    ],
)
def test_files_belong_to_whoever_runs_it(
    container: Container, name: str, rootless: bool, flags: list[str]
) -> None:
    engine = Engine(name, f"/bin/{name}", "1", rootless)
    command = Container(engine, "a:1", "sha256:1", container.run, (), False).command(["x"], ())
    assert flags in [list(pair) for pair in itertools.pairwise(command)]


def test_cores_this_process_may_not_use_are_none_of_the_container_either(
    container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3})
    assert values(container.command(["x"], ()), "--cpuset-cpus") == ["1,3"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert values(container.command(["x"], ()), "--cpuset-cpus") == []


def test_variables_about_the_hosts_libraries_stay_on_the_host() -> None:
    given = {
        "CUDA_VISIBLE_DEVICES": "0",
        "CUDA_HOME": "/usr/local/cuda",
        "BNB_CUDA_VERSION": "126",
        "LD_PRELOAD": "x.so",
        "HF_TOKEN": "secret",
        "OMP_NUM_THREADS": "2",
        "EDITOR": "vi",
    }
    expected = {"CUDA_VISIBLE_DEVICES", "HF_TOKEN", "OMP_NUM_THREADS"}
    assert containers.passed_on(given) == expected


def test_the_interpreter_is_the_images_own(container: Container, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("cell.json", "r.jsonl", "log")]
    own = (sys.executable, "-m", "bench.worker")
    on_host = launch.command_line(Job(own, *paths, stages=(), timeout_s=1))
    assert on_host == [*own, str(paths[0])]
    inside = launch.command_line(
        Job(own, *paths, stages=(), timeout_s=1, container=container, env={"ASKED": "1"})
    )
    assert inside[-5:] == ["python", "sha256:1", "-m", "bench.worker", str(paths[0])]
    assert sys.executable not in inside
    assert "ASKED" in values(inside, "--env")


def test_a_worker_that_sees_no_gpu_although_one_was_given_measures_nothing(tmp_path: Path) -> None:
    """`auto` would take the CPU without a word: podman 4 ignores the flag that docker wants."""
    cell = {
        "stages": ["student_fit"],
        "settings": settings("host").model_dump(mode="json"),
        "records": str(tmp_path / "r.jsonl"),
        "artefacts": str(tmp_path),
        "shared_artefacts": str(tmp_path),
        "warmup_steps": 0,
        "task": "measure",
        "variables": [],
        "gpu_given": True,
    }
    (tmp_path / "cell.json").write_text(json.dumps(cell))
    command = [sys.executable, "-m", "bench.worker", str(tmp_path / "cell.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    start, failure = (tmp_path / "r.jsonl").read_text().splitlines()
    assert json.loads(start)["kind"] == "start"
    assert "the container was given a GPU and torch" in json.loads(failure)["reason"]


# ---- runs with a fake engine ----


def run(tmp_path: Path, path: str, *words: str, image: str = "cu118") -> Any:
    matrix = {
        "question": "Which?",
        "stages": ["teacher_fit"],
        "axes": {"machine.image": ["host", image]},
        "repeats": 1,
        "preflight": "never",
        "timeout_s": 30,
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(matrix))
    worker = f"{sys.executable} {ROOT / 'tests' / 'fake_worker.py'}"
    command = [sys.executable, "-m", "bench.run", str(tmp_path / "small.yaml")]
    return subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--worker", worker, *words],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "FAKE_WORKER": "{}"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def rows(tmp_path: Path) -> dict[str, dict[str, Any]]:
    (path,) = tmp_path.glob("out/small/*/records.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["cell"]: record for record in found}


@pytest.mark.parametrize(
    ("words", "image", "status", "reason"),
    [
        (["--launcher", "process"], "cu118", "skipped", "starts no containers"),
        ([], "absent:1", "skipped", "docker has no image absent:1"),
        (["--launcher", "podman"], "cu118", "unsupported", "no container engine: podman"),
    ],
)
def test_what_cannot_start_in_an_image_is_a_row_and_never_runs_on_the_host(
    tmp_path: Path, words: list[str], image: str, status: str, reason: str
) -> None:
    folder = fake_engine(tmp_path / "bin")
    (folder / "podman").write_text("#!/bin/sh\nexit 1\n")
    (folder / "podman").chmod(0o755)
    done = run(tmp_path, f"{folder}:{os.environ['PATH']}", *words, image=image)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path)
    assert found["baseline"]["status"] == "ok"
    assert "launched" not in found["baseline"]["facts"]
    other = found[f"machine.image={image}"]
    assert (other["status"], other["repeat"]) == (status, 0)
    assert reason in other["reason"]
    assert reason in done.stdout
    assert not list(tmp_path.glob("out/small/*/cells/machine*"))


def test_an_engine_that_refuses_to_start_one_is_a_row_with_its_words(tmp_path: Path) -> None:
    refusal = (
        'echo \'docker: Error response from daemon: could not select device driver "" with '
        "capabilities: [[gpu]]' >&2; echo; echo \"Run 'docker run --help' for more\" >&2; exit 125"
    )
    folder = fake_engine(tmp_path / "bin", refusal)
    done = run(tmp_path, f"{folder}:{os.environ['PATH']}")
    assert done.returncode == 1, done.stderr
    record = rows(tmp_path)["machine.image=cu118"]
    assert (record["status"], record["image_digest"]) == ("error", None)
    assert record["reason"].startswith("exit 125: docker: Error response from daemon: could not")
    (report,) = tmp_path.glob("out/small/*/report.md")
    assert "nvidia-container-toolkit" in report.read_text()


def test_an_engine_that_runs_the_worker_on_the_host_is_found_out(tmp_path: Path) -> None:
    """It says it ran a container; the worker saw another machine."""
    there = json.dumps(
        [
            {
                "State": {"Status": "exited", "ExitCode": 0, "OOMKilled": False},
                "Config": {"Hostname": "ilora-bench-1"},
                "Image": "sha256:7",
            }
        ]
    )
    program = fake_engine(tmp_path / "bin", f"{sys.executable} $(echo $* | sed 's/.*00007 //')")
    text = (program / "docker").read_text()
    inspect = f"\"container inspect\") [ -e {tmp_path}/gone ] && exit 1; echo '{there}' ;;"
    removal = f'"rm --force") touch {tmp_path}/gone ;;\n  run*) rm -f {tmp_path}/gone;'
    text = text.replace("  run*)", f"  {inspect}\n  {removal}")
    (program / "docker").write_text(text)
    done = run(tmp_path, f"{program}:{os.environ['PATH']}", image="a:1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert rows(tmp_path)["machine.image=a:1"]["status"] == "ok", "it looks healthy"
    (report,) = tmp_path.glob("out/small/*/report.md")
    assert "not in effect" in report.read_text()
    assert "as ilora-bench-1, the worker was in" in report.read_text()


def test_a_container_that_stays_stops_the_run(
    tmp_path: Path, container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = fake_engine(tmp_path / "bin") / "docker"
    there = {
        "State": {"Status": "running", "ExitCode": 0, "OOMKilled": False},
        "Config": {"Hostname": "x"},
        "Image": "sha256:7",
    }
    inspect = f"  \"container inspect\") echo '{json.dumps([there])}' ;;\n  run*)"
    program.write_text(program.read_text().replace("  run*)", inspect))
    engine = Engine("docker", str(program), "1", False)
    stuck = Container(engine, "a:1", "sha256:7", container.run, (), False)
    with pytest.raises(UnfitMachine, match=f"does not remove the container {stuck.name}"):
        stuck.watch().end()


def test_only_containers_of_dead_runs_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is alive while some process holds the lock of its records."""
    folders = {name: tmp_path / name for name in ("mine", "alive", "dead", "deleted")}
    for name in ("mine", "alive", "dead"):
        folders[name].mkdir()
        (folders[name] / "records.jsonl").touch()
    found = [
        {"Name": f"/{name}", "Config": {"Labels": {containers.LABEL: str(folder)}}}
        for name, folder in folders.items()
    ]
    asked: list[tuple[str, ...]] = []

    def ask(self: Engine, *words: str, limit_s: float = 0) -> subprocess.CompletedProcess[str]:
        asked.append(words)
        return subprocess.CompletedProcess(words, 0, "1\n2\n3\n4\n", "")

    monkeypatch.setattr(Engine, "ask", ask)
    monkeypatch.setattr(Engine, "inspect", lambda self, names: found)
    with records.locked(folders["alive"] / "records.jsonl"):
        removed = containers.remove_left_behind(DOCKER, folders["mine"])
    assert removed == ["mine", "dead", "deleted"]
    assert asked[-1] == ("rm", "--force", "--volumes", "mine", "dead", "deleted")

"""`--launcher ray` on a real cluster of two nodes on this machine; the fake worker measures."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.launching import cluster, node, remote, resources
from bench.machine import UnfitMachine, code_digest
from bench.schedule.attempts import judged
from core.config import InputError
from core.settings import Settings
from tests.test_run import ROOT, Bench, is_alive, wait_for

ray = pytest.importorskip("ray", reason="Ray is not installed; pip install -e '.[cluster]'")
slow = pytest.mark.slow
MATRIX = """\
question: Does the seed matter?
stages: [teacher_fit, teacher_test]
axes:
  data.seed: [0, 1]
repeats: 4
timeout_s: 60
preflight: always
too_slow: null
"""
STORE_BYTES = 80 << 20
"""The least Ray takes for the objects of one node."""


class TwoNodes:
    """A head that lends nothing, and nodes of one core each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.ray = Cluster()
        self.ray.add_node(num_cpus=0, include_dashboard=False)
        self.nodes = [self.add() for _ in range(2)]

    def add(self) -> Any:
        return self.ray.add_node(num_cpus=1, object_store_memory=STORE_BYTES)

    def kill_one(self) -> None:
        self.ray.remove_node(self.nodes.pop(), allow_graceful=False)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[TwoNodes]:
    found = TwoNodes()
    yield found
    found.ray.shutdown()


class RayBench(Bench):
    """The main command with its workers on the cluster."""

    def __init__(self, folder: Path, address: str, **choices: Any) -> None:
        super().__init__(folder)
        self.address = address
        # Nodes have their own environment, so the worker's choices are part of its command.
        steering = shlex.quote(f"FAKE_WORKER={json.dumps({'*': choices})}")
        script = shlex.quote(str(ROOT / "tests" / "fake_worker.py"))
        self.worker = f"env {steering} {shlex.quote(sys.executable)} {script}"

    def on_cluster(self, matrix: Path, *words: Any) -> subprocess.Popen[str]:
        options = ["--launcher", "ray", "--address", self.address, "--node-timeout", "20", *words]
        command = self.command(matrix, *options)
        if "--resume" not in words:
            command += ["--worker", self.worker]
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def begun(self) -> list[dict[str, Any]]:
        return self.records(*self.folders()) if self.folders() else []


def ended(parent: subprocess.Popen[str], limit_s: float = 120.0) -> str:
    output, _ = parent.communicate(timeout=limit_s)
    return output


def assert_complete(found: list[dict[str, Any]], repeats: int = 4) -> None:
    """Each cell has all its repeats, and each block is of one node."""
    kept = [r for r in judged(found) if r["status"] == "ok" and r["stage"] == "teacher_fit"]
    expected = {(name, n): 1 for name in ("baseline", "data.seed=1") for n in range(1, repeats + 1)}
    assert Counter((r["cell"], r["repeat"]) for r in kept) == expected
    nodes: dict[int, set[str]] = {}
    for record in kept:
        nodes.setdefault(record["block"], set()).add(record["node"])
    assert all(len(names) == 1 for names in nodes.values())


def workers_left() -> list[str]:
    """Command lines of fake workers of nodes; their cell files lie in a scratch folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if any(node.PREFIX in word for word in words) and is_alive(int(path.name)):
            found.append(" ".join(words))
    return found


@slow
def test_both_nodes_measure_and_what_no_node_has_is_a_row(
    two_nodes: TwoNodes, tmp_path: Path
) -> None:
    bench = RayBench(tmp_path, two_nodes.ray.address, sleep_s=0.5)
    text = MATRIX.replace("axes:", "axes:\n  machine.device: [cpu, cuda]").replace("60", "61")
    output = ended(bench.on_cluster(bench.matrix(text), "--node-timeout", "3"))
    found = bench.begun()
    assert_complete([r for r in found if r["repeat"]])
    assert len({record["node"] for record in found if record["repeat"]}) == 2
    rows = [record for record in found if not record["repeat"]]
    assert {(r["cell"], r["stage"], r["status"]) for r in rows} == {
        ("machine.device=cuda", stage, "timeout") for stage in ("teacher_fit", "teacher_test")
    }
    assert "no node with 1 GPU came within 3 s (nodes: 2 × 1 CPU, 0 GPU)" in rows[0]["reason"]
    assert "machine.device=cuda" in output
    (folder,) = bench.folders()
    machine = json.loads((folder / "machine.json").read_text())
    assert set(machine["nodes"]) == {r["node"] for r in found if r["repeat"]}
    assert machine["containers"]["launcher"] == "ray"
    # Everything a run on one machine leaves is here too, and nothing on the nodes.
    log = folder / "cells" / "baseline-r1.log"
    assert log.exists() and (folder / "cells" / "baseline-r1.jsonl").stat().st_size
    assert [path.name for path in (folder / "artefacts").iterdir()] == ["shared"]
    assert [path.name for path in (folder / "artefacts" / "shared").iterdir()] == ["prepared"]
    assert (folder / "report.md").exists()


@slow
def test_a_node_that_dies_costs_a_row_and_no_figure(two_nodes: TwoNodes, tmp_path: Path) -> None:
    bench = RayBench(tmp_path, two_nodes.ray.address, sleep_s=1.0)
    parent = bench.on_cluster(bench.matrix(MATRIX))
    try:
        wait_for(lambda: sum(r["status"] == "ok" for r in bench.begun()) >= 4, 60)
        time.sleep(0.5)  # both nodes are in the middle of another
        two_nodes.kill_one()
        output = ended(parent)
    finally:
        parent.kill()
        two_nodes.nodes.append(two_nodes.add())
    found = bench.begun()
    assert_complete(found)
    (row,) = [record for record in found if record["status"] != "ok"]
    assert (row["status"], row["node_lost"]) == ("killed", True)
    assert row["reason"].startswith(f"node lost: {row['node']}: ")
    # What had been measured of that block there is no pair of what was measured elsewhere.
    moved = [record for record in found if record.get("moved_from")]
    assert {record["block"] for record in moved} == {row["block"]}
    assert {record["moved_from"] for record in moved} == {row["node"]}
    assert row["node"] not in {r["node"] for r in judged(found) if r["block"] == row["block"]}
    assert parent.returncode == 0, output
    report = (bench.folders()[0] / "report.md").read_text()
    assert "begun anew because a node was lost" in report


@slow
def test_ctrl_c_ends_the_workers_and_resume_finishes(two_nodes: TwoNodes, tmp_path: Path) -> None:
    bench = RayBench(tmp_path, two_nodes.ray.address, sleep_s=0.7)
    parent = bench.on_cluster(bench.matrix(MATRIX))
    wait_for(lambda: len(bench.begun()) >= 2, 60)
    parent.send_signal(signal.SIGINT)
    output = ended(parent)
    assert parent.returncode == 130, output
    assert not workers_left()
    before = bench.begun()
    assert 2 <= len(before) < 16
    (folder,) = bench.folders()
    parent = bench.on_cluster(tmp_path / "small.yaml", "--resume", str(folder))
    output = ended(parent)
    assert parent.returncode == 0, output
    found = bench.begun()
    assert found[: len(before)] == before
    assert_complete(found)


@slow
def test_kill_9_of_the_parent_leaves_no_worker(two_nodes: TwoNodes, tmp_path: Path) -> None:
    bench = RayBench(tmp_path, two_nodes.ray.address, mode="hang")
    parent = bench.on_cluster(bench.matrix(MATRIX.replace("always", "never")))
    wait_for(lambda: bool(workers_left()), 60)
    parent.kill()
    wait_for(lambda: not workers_left(), 60)


@slow
def test_the_real_worker_finds_on_each_node_what_set_up_made(
    two_nodes: TwoNodes, tmp_path: Path
) -> None:
    """Student and data of the set-up are made on one node and used on both."""
    text = """\
question: Does the rank matter?
stages: [teacher_fit, teacher_test]
base:
  data.synthetic: {users: 60, items: 60}
  student: {hidden_size: 16, num_blocks: 1, max_epochs: 1}
  train: {max_steps: 3, max_epochs: 1}
  machine.threads: 1
axes:
  teacher.lora_r: [4, 8]
repeats: 2
preflight: always
"""
    bench = RayBench(tmp_path, two_nodes.ray.address)
    bench.worker = f"{sys.executable} -m bench.worker"
    parent = bench.on_cluster(bench.matrix(text))
    output = ended(parent, 300)
    assert parent.returncode == 0, output
    found = bench.begun()
    assert {record["status"] for record in found} == {"ok"}
    assert len({record["node"] for record in found}) == 2
    assert len({record["data_digest"] for record in found}) == 1
    made = {path.name.split("-")[0] for path in bench.folders()[0].glob("artefacts/shared/*")}
    assert made == {"prepare_data", "student_fit"}


def test_without_ray_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(InputError, match=r"Ray is not installed; pip install -e '\.\[cluster\]'"),
        cluster.connected("auto", 1.0),
    ):
        pass


def test_a_dead_address_is_refused_at_once(tmp_path: Path) -> None:
    begun = time.monotonic()
    with (
        pytest.raises(UnfitMachine, match=r"127\.0\.0\.1:9 does not answer"),
        cluster.connected("127.0.0.1:9", 1.0),
    ):
        pass
    assert time.monotonic() - begun < 10


def some_node(cpus: int, gpus: int, name: str = "n") -> dict[str, Any]:
    found = {"NodeID": name * 56, "NodeManagerHostname": "host", "Alive": True}
    return found | {"Resources": {"CPU": float(cpus), "GPU": float(gpus)}}


@pytest.mark.parametrize(
    ("nodes", "need", "on_cpu", "lanes"),
    [
        ([(2, 0)], 0, True, [(0, 2)]),
        ([(2, 0), (4, 0)], 0, True, [(0, 2), (0, 4)]),
        ([(16, 4)], 1, False, [(1, 4)] * 4),
        ([(16, 4)], 2, False, [(2, 8)] * 2),
        ([(16, 4)], 3, False, [(3, 16)]),
        # A cell on the CPU would share it with the neighbour's.
        ([(16, 4)], 1, True, [(4, 16)]),
        ([(16, 4), (16, 1), (8, 0)], 2, False, [(2, 8)] * 2),
        ([(0, 0)], 0, True, []),
    ],
)
def test_a_lane_has_its_devices_and_cores_for_itself(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[tuple[int, int]],
    need: int,
    on_cpu: bool,
    lanes: list[tuple[int, int]],
) -> None:
    found = [some_node(*each, name=chr(97 + i)) for i, each in enumerate(nodes)]
    monkeypatch.setattr(ray, "nodes", lambda: found)
    offers = list(resources.offered(need, on_cpu))
    assert [(o.options["num_gpus"], o.options["num_cpus"]) for o in offers] == lanes
    assert len({offer.name for offer in offers}) == len(offers)


@pytest.mark.parametrize(
    ("gpus", "chosen", "need"),
    [
        (0, {}, 0),
        (4, {}, 1),
        (4, {"machine": {"device": "cpu"}}, 0),
        (0, {"machine": {"device": "cuda"}}, 1),
        (4, {"train": {"trainer": "lightning", "devices": 2}}, 2),
        (4, {"train": {"trainer": "lightning", "devices": "auto"}}, 4),
        (0, {"train": {"trainer": "lightning", "devices": 2}}, 0),
    ],
)
def test_gpus_a_cell_takes(
    monkeypatch: pytest.MonkeyPatch, gpus: int, chosen: dict[str, Any], need: int
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [some_node(8, gpus)])
    assert resources.gpus_needed(Settings.model_validate(chosen)) == need


def a_lane(name: str, problems: tuple[str, ...] = (), **changes: Any) -> remote.Lane:
    here = {"cpu": "x", "usable_cores": 4, "variables": {}, "code": code_digest()} | changes
    about = node.Description(name, (), here, problems)
    return remote.Lane(name, None, about, remote.Shared())


def test_only_nodes_of_one_kind_are_used() -> None:
    lanes = [a_lane("a"), a_lane("b", cpu="y"), a_lane("c", cpu="y"), a_lane("d", code="2")]
    kept, left = cluster.alike(lanes, None)
    assert [lane.name for lane in kept] == ["b", "c"], "the kind with most lanes"
    assert left[0] == "a: unlike the others: cpu was y, is x"
    assert "other code of this harness" in left[1]
    kept, _ = cluster.alike(lanes, {"cpu": "x", "usable_cores": 4, "variables": {}, "code": "old"})
    assert [lane.name for lane in kept] == ["a"], "the kind of the earlier sitting"
    kept, left = cluster.alike([a_lane("a", ("1 GiB free",)), a_lane("b")], None)
    assert ([lane.name for lane in kept], left) == (["b"], ["a: 1 GiB free"])
    assert cluster.alike([], None) == ([], [])


def test_files_go_there_and_back(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").write_bytes(b"\0\1")
    target.mkdir()
    node.unpack(node.packed(source), target)
    assert (target / "source" / "deep" / "file").read_bytes() == b"\0\1"


def test_scratch_of_dead_actors_is_removed_and_that_of_living_ones_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living = node.Node()
    dead = tmp_path / f"{node.PREFIX}dead"
    dead.mkdir()
    (dead / "lock").touch()
    node.remove_left_behind()
    assert living.scratch.exists() and not dead.exists()
    living.close()
    assert not list(tmp_path.iterdir())


def test_variables_of_ray_are_no_part_of_the_machine() -> None:
    """A process below one that plays Ray's daemon forgets what was added to its environment."""
    code = "import os; from bench.launching.node import forget_what_ray_set as forget; forget();"
    code += "print(*os.environ)"
    outer = f"import os, subprocess, sys; os.environ['RAY_RAYLET_PID'] = str(os.getpid()); \
os.environ['OMP_NUM_THREADS'] = '1'; os.environ['CUDA_VISIBLE_DEVICES'] = '2'; \
subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    clean = {n: v for n, v in os.environ.items() if n not in ("OMP_NUM_THREADS", "RAY_RAYLET_PID")}
    done = subprocess.run(
        [sys.executable, "-c", outer], cwd=ROOT, env=clean, capture_output=True, text=True
    )
    names = done.stdout.split()
    assert "OMP_NUM_THREADS" not in names and "PATH" in names, done.stderr
    assert "CUDA_VISIBLE_DEVICES" in names

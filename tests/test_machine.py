"""The machine's rules: what cannot run, what must not be measured, what is recorded."""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_nvml
import pynvml
import pytest
from typer.testing import CliRunner

from bench import machine, run
from bench.checkup import fitness
from bench.matrix import Cell
from bench.metering import gpus
from core.config import InputError
from core.settings import Settings

CPU: machine.Machine = {"has_gpu": False, "gpus": [], "packages": {"bitsandbytes": "1"}}
AMPERE: machine.Machine = {
    "has_gpu": True,
    "gpus": [{"name": "A100", "capability": [8, 0]}],
    "packages": {"bitsandbytes": "1", "flash_attn": "2.8", "pytorch-lightning": "2.5"},
}
TURING = AMPERE | {"gpus": [{"name": "T4", "capability": [7, 5]}]}
NVML_SILENT = AMPERE | {"gpus": [{"name": "/dev/nvidia0", "nvml": "not found"}]}
BARE_HOPPER = AMPERE | {"gpus": [{"name": "H100", "capability": [9, 0]}]}
HOPPER = BARE_HOPPER | {"packages": {"torchao": "0.18"}}
BARE_GPU = AMPERE | {"packages": {}}


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    caches = (gpus.gpus, gpus.driver)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    ("place", "leaf", "value", "here", "reason"),
    [
        ("teacher", "attn", "flash_attention_2", CPU, "GPU kernels only"),
        ("teacher", "attn", "flash_attention_2", TURING, "capability 8.0, this GPU has 7.5"),
        ("teacher", "attn", "flash_attention_2", BARE_GPU, "flash-attn is not installed"),
        ("teacher", "attn", "flash_attention_2", AMPERE, None),
        ("teacher", "attn", "flash_attention_2", NVML_SILENT, None),
        ("teacher", "attn", "eager", CPU, None),
        ("teacher", "adapter", "qlora", CPU, None),
        ("teacher", "adapter", "qlora", BARE_GPU, "bitsandbytes is not installed"),
        ("train", "precision", "fp16-mixed", CPU, None),
        ("train", "precision", "fp16-true", CPU, None),
        ("train", "precision", "fp16-mixed", TURING, None),
        ("train", "precision", "bf16-mixed", TURING, "has 7.5; fp16-mixed runs here"),
        ("train", "precision", "bf16-true", TURING, "capability 8.0, this GPU has 7.5; fp16-true"),
        ("train", "precision", "bf16-true", CPU, None),
        ("train", "precision", "fp8", CPU, "the CPU has no float8 products; bf16-mixed runs here"),
        ("train", "precision", "fp8", TURING, "capability 8.9, this GPU has 7.5; fp16-mixed runs"),
        ("train", "precision", "fp8", AMPERE, "capability 8.9, this GPU has 8.0; bf16-mixed runs"),
        ("train", "precision", "fp8", BARE_HOPPER, "torchao is not installed"),
        ("train", "precision", "fp8", HOPPER, None),
        ("train", "precision", "tf32", CPU, "the CPU has no TF32 products; fp32 runs here"),
        ("train", "precision", "tf32", TURING, "capability 8.0, this GPU has 7.5; fp32 runs here"),
        ("train", "precision", "tf32", AMPERE, None),
        ("train", "precision", "tf32", NVML_SILENT, None),
        ("train", "trainer", "lightning", BARE_GPU, "pytorch-lightning is not installed"),
        ("machine", "device", "cuda", CPU, "no usable GPU"),
        ("machine", "device", "cuda", AMPERE, None),
    ],
)
def test_what_cannot_run_says_why(
    place: str, leaf: str, value: str, here: machine.Machine, reason: str | None
) -> None:
    settings = Settings.model_validate({place: {leaf: value}})
    found = machine.unsupported(settings, here)
    assert found is None if reason is None else reason in str(found)


def test_the_cpu_of_a_gpu_machine_has_the_rules_of_a_cpu() -> None:
    settings = Settings.model_validate(
        {"machine": {"device": "cpu"}, "teacher": {"attn": "flash_attention_2"}}
    )
    assert "GPU kernels only" in str(machine.unsupported(settings, AMPERE))


@pytest.mark.parametrize("name", sorted(fitness.DISTORTING))
def test_variables_that_distort_timing_make_it_unfit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    machine.check(tmp_path)
    monkeypatch.setenv(name, "0")
    machine.check(tmp_path)
    monkeypatch.setenv(name, "1")
    with pytest.raises(machine.UnfitMachine, match=f"machine: {name}=1 is set: .*; unset it"):
        machine.check(tmp_path)


@pytest.mark.parametrize("name", sorted(fitness.OVERRIDING))
def test_variables_that_replace_a_setting_make_it_unfit_at_any_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "0")
    with pytest.raises(machine.UnfitMachine, match=f"{name}=0 is set: .*train.precision"):
        machine.check(tmp_path)


@pytest.mark.parametrize(
    ("variables", "torch", "words"),
    [
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "2.1.2", None),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "2.1.2", "not read by torch 2.1.2"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "2.7.1+cu118", "not read by torch 2.7.1"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "2.9.1", None),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "2.9.1", "is ignored on CUDA"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "2.11.0", None),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, None, None),
        (
            {
                "PYTORCH_ALLOC_CONF": "max_split_size_mb:64",
                "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:32",
            },
            "2.13.0",
            "PYTORCH_ALLOC_CONF is not read where PYTORCH_CUDA_ALLOC_CONF is set",
        ),
        ({"PYTORCH_ALLOCATOR_CONF": "max_split_size_mb:64"}, "2.13.0", "not read by torch"),
        ({"PYTORCH_CUDA_ALLOCATOR": "x"}, None, "not read by torch"),
        ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "0", "MALLOC_ARENA_MAX": "2"}, "2.13.0", None),
    ],
)
def test_allocator_variables_nobody_reads_are_named(
    variables: dict[str, str], torch: str | None, words: str | None
) -> None:
    found = fitness.unread_allocator_variables(variables, torch)
    if words is None:
        assert found == []
    else:
        (text,) = found
        assert words in text and text.endswith("use PYTORCH_CUDA_ALLOC_CONF")


def cell(name: str, **changed: Any) -> Cell:
    return Cell(name, {}, Settings.model_validate({"machine": changed}), name)


def test_useless_variables_of_cells_are_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "installed_version", lambda package: "2.7.1")
    useful = cell("useful", env=["OMP_NUM_THREADS=1", "CUDA_LAUNCH_BLOCKING=0"])
    machine.refuse_useless_variables([useful])
    blocking = cell("blocking", env=["CUDA_LAUNCH_BLOCKING=1"])
    unread = cell("unread", env=["PYTORCH_ALLOC_CONF=expandable_segments:True"])
    with pytest.raises(InputError) as refused:
        machine.refuse_useless_variables([useful, blocking, unread])
    first, second = str(refused.value).splitlines()
    assert first.startswith("machine.env: CUDA_LAUNCH_BLOCKING=1 is set: ")
    assert first.endswith("; take it out (cell blocking)")
    assert "PYTORCH_ALLOC_CONF is not read by torch 2.7.1" in second


def test_a_variable_is_judged_by_the_torch_of_its_image() -> None:
    """The host's torch reads it; that of the images of older CUDA does not."""
    option = ["PYTORCH_ALLOC_CONF=max_split_size_mb:64"]
    machine.refuse_useless_variables([cell("unknown image", env=option, image="some/image:1")])
    for image, torch in (("cu118", "2.7.1"), ("cu121", "2.5.1")):
        assert machine.image_torch(image) == torch
        with pytest.raises(InputError, match=f"not read by torch {torch}"):
            machine.refuse_useless_variables([cell("here", env=option, image=image)])


EXPANDABLE = "expandable_segments:True,max_split_size_mb:64"


@pytest.mark.parametrize(
    ("asked", "here", "mapped", "refused"),
    [
        ({"allocator_conf": EXPANDABLE}, AMPERE, [False], True),
        ({"allocator_conf": EXPANDABLE, "image": "cu121"}, AMPERE, [False], True),
        ({"env": [f"PYTORCH_ALLOC_CONF={EXPANDABLE}"]}, AMPERE, [False, True], True),
        ({"allocator_conf": EXPANDABLE}, AMPERE, [True, False], False),
        ({"allocator_conf": EXPANDABLE}, AMPERE, None, False),
        ({"allocator_conf": EXPANDABLE}, CPU, [False], False),
        ({"allocator_conf": EXPANDABLE, "device": "cpu"}, AMPERE, [False], False),
        ({"allocator_conf": "expandable_segments:False"}, AMPERE, [False], False),
        ({}, AMPERE, [False], False),
    ],
)
def test_expandable_segments_need_virtual_memory(
    monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, Any],
    here: machine.Machine,
    mapped: list[bool] | None,
    refused: bool,
) -> None:
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    told = {"unavailable": "no libcuda"} if mapped is None else {"virtual_memory": mapped}
    monkeypatch.setattr(machine, "driver", lambda: told)
    reason = machine.unsupported(Settings.model_validate({"machine": asked}), here)
    assert ("attribute 102 = 0" in str(reason)) is refused


def test_options_of_the_environment_count_for_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", EXPANDABLE)
    monkeypatch.setattr(machine, "driver", lambda: {"virtual_memory": [False]})
    assert "attribute 102" in str(machine.unsupported(Settings(), AMPERE))
    other = Settings.model_validate({"machine": {"allocator_conf": "max_split_size_mb:64"}})
    assert machine.unsupported(other, AMPERE) is None


@pytest.mark.parametrize(
    ("here", "programs", "reason"),
    [
        (CPU, ["g++"], None),
        (CPU, ["gcc"], "train.compile=regional: no C++ compiler; off runs here"),
        (AMPERE, ["clang"], None),
        (AMPERE, ["g++"], "train.compile=regional: no C compiler"),
    ],
)
def test_compiling_needs_a_compiler(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    here: machine.Machine,
    programs: list[str],
    reason: str | None,
) -> None:
    for name in programs:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    settings = Settings.model_validate({"train": {"compile": "regional"}})
    found = machine.unsupported(settings, here)
    assert found is None if reason is None else reason in str(found)
    assert machine.unsupported(Settings(), here) is None


# ---- what others do on the GPU ----


class Card(fake_nvml.Library):
    """A device on which others do what is given."""

    def __init__(self, used: int = 0, percent: int = 0, pids: tuple[int, ...] = ()) -> None:
        self.bytes, self.percent, self.pids = used, percent, pids

    def used(self, device: int) -> int:
        return self.bytes

    def nvmlShutdown(self) -> int:
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle: Any, reference: Any) -> int:
        reference._obj.gpu = self.percent
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any, count: Any, found: Any) -> int:
        count._obj.value = len(self.pids)
        if found is None:
            return 7 if self.pids else 0  # insufficient size: the binding asks again
        for place, pid in enumerate(self.pids):
            found[place].pid = pid
        return 0


GPU = {"name": "A100", "uuid": fake_nvml.FIRST}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts an object into the binding's library slot, for this test."""

    def put(fake: object) -> None:
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        monkeypatch.setattr(pynvml, "nvmlLib", fake)

    return put


class OldCard(Card):
    """The driver's library from before the third form of the process list."""

    nvmlDeviceGetComputeRunningProcesses_v2 = Card.nvmlDeviceGetComputeRunningProcesses_v3
    nvmlDeviceGetComputeRunningProcesses_v3 = property()


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (Card(), None),
        (Card(used=fitness.BUSY_BYTES, percent=fitness.BUSY_PERCENT), None),
        (Card(pids=(41, 7)), "A100 is busy (processes 7, 41): stop that"),
        (OldCard(pids=(7,)), "A100 is busy (processes 7)"),
        (Card(used=3 << 30), "A100 is busy (3.0 GiB in use)"),
        (Card(percent=60), "A100 is busy (60 % utilisation)"),
        (Card(1 << 34, 99, (7,)), "(processes 7; 16.0 GiB in use; 99 % utilisation)"),
    ],
)
def test_a_card_that_others_use_is_busy(library: Any, card: Card, words: str | None) -> None:
    library(card)
    found = fitness.busy([GPU])
    assert found == [] if words is None else [words in text for text in found] == [True]


def test_what_nvml_keeps_back_is_a_reason_and_never_free_or_busy(library: Any) -> None:
    class Reticent(fake_nvml.Library):
        def nvmlShutdown(self) -> int:
            return 0

    library(Reticent())
    told = gpus.use(GPU)
    assert told["used_bytes"] == fake_nvml.USED[0]
    assert "unavailable" in told["utilisation"] and "unavailable" in told["processes"]
    library(fake_nvml.absent)
    assert {tuple(value) for value in gpus.use(GPU).values()} == {("unavailable",)}
    hidden = gpus.use({"name": "/dev/nvidia0", "nvml": "library not found"})
    assert hidden["processes"] == {"unavailable": "library not found"}
    assert fitness.busy([{"name": "/dev/nvidia0", "nvml": "library not found"}]) == []


def test_the_first_of_equal_cards_counts_and_all_of_unlike_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    working = {"used_bytes": 0, "utilisation": 0, "processes": [7]}
    idle = working | {"processes": []}
    monkeypatch.setattr(fitness, "use", lambda gpu: working if gpu["uuid"] == "b" else idle)
    first, second = {"name": "A100", "uuid": "a"}, {"name": "A100", "uuid": "b"}
    assert fitness.busy([first, second]) == []
    assert len(fitness.busy([second, first])) == 1
    assert len(fitness.busy([first, second | {"name": "T4"}])) == 1
    assert fitness.busy([]) == []


def test_a_busy_card_is_unfit_for_cells_that_would_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: (GPU,))
    monkeypatch.setattr(machine, "installed_version", lambda package: "2.7.1+cu118")
    monkeypatch.setattr(machine, "busy", lambda visible: [f"{visible[0]['name']} is busy"])
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(machine.UnfitMachine, match=r"not read by torch(.|\n)*A100 is busy"):
        machine.check(tmp_path)
    machine.check(tmp_path, on_gpu=False)


# ---- libcuda ----


class Libcuda:
    """The driver's library: C functions as methods that fill what `ctypes.byref` points to."""

    def __init__(self, mapped: tuple[int, ...] = (1,), version: int = 12040, init: int = 0) -> None:
        self.mapped, self.version, self.init = mapped, version, init

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.mapped)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = 100 + ordinal
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        if attribute != 102:
            return 1
        value._obj.value = self.mapped[device.value - 100]
        return 0


class Ancient(Libcuda):
    cuDeviceGetAttribute = property()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("fake", "told"),
    [
        (Libcuda(), {"cuda": "12.4", "virtual_memory": [True]}),
        (Libcuda((0, 1), 13000), {"cuda": "13.0", "virtual_memory": [False, True]}),
        (Libcuda((), 11080), {"cuda": "11.8", "virtual_memory": []}),
        (Libcuda(init=999), {"unavailable": "cuInit: CUDA driver error 999"}),
        (Ancient(), {"unavailable": "cuDeviceGetAttribute: this driver has no such call"}),
    ],
)
def test_the_driver_tells_of_virtual_memory(fake: Libcuda, told: dict[str, Any]) -> None:
    assert gpus.read_driver(fake) == told


def test_a_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(gpus.ctypes, "CDLL", missing)
    assert "cannot open" in gpus.driver()["unavailable"]


def test_a_full_disk_and_full_memory_are_named_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "LEAST_DISK_BYTES", 1 << 60)
    monkeypatch.setattr(machine, "LEAST_MEMORY_BYTES", 1 << 60)
    with pytest.raises(machine.UnfitMachine, match=r"GiB free(.|\n)*of memory free"):
        machine.check(tmp_path / "not" / "yet" / "there")


def test_the_environment_is_json_and_keeps_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    found = machine.environment()
    assert "hf_secret" not in json.dumps(found)
    assert found["variables"]["HF_HOME"] == "/somewhere"
    assert found["variables"]["TOKENIZERS_PARALLELISM"] == "false"
    assert found["cores"] >= found["usable_cores"] >= 1
    assert found["memory_bytes"] > 1 << 28
    assert {"cpu", "os", "python", "packages", "git"} <= found.keys()


def nvml_module(count: int) -> Any:
    class NVMLError(Exception):
        pass

    def refuse(*_: object) -> None:
        raise NVMLError("Not Supported")

    return types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: f"gpu {handle}",
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
        nvmlDeviceGetMemoryInfo=refuse,
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0),
        nvmlSystemGetDriverVersion=lambda: "550",
        nvmlDeviceGetClockInfo=refuse,
    )


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (None, ["gpu 0", "gpu 1"]),
        ("1", ["gpu 1"]),
        ("GPU-0", ["gpu 0"]),
        ("", []),
        ("-1", []),
        ("0,9,1", ["gpu 0"]),
    ],
)
def test_only_visible_gpus_count(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, names: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml_module(2))
    if chosen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    found = gpus.gpus()
    assert [gpu["name"] for gpu in found] == names
    assert all(gpu["memory_bytes"] == {"unavailable": "Not Supported"} for gpu in found)
    assert all(gpu["capability"] == [9, 0] for gpu in found)


@pytest.mark.parametrize(("version", "expected"), [("2.13.0+cpu", False), ("2.7.1+cu126", True)])
def test_a_gpu_needs_a_torch_built_for_it(
    monkeypatch: pytest.MonkeyPatch, version: str, expected: bool
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml_module(1))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "installed_version", lambda package: version)
    assert machine.has_gpu() is expected


def test_two_moments_may_be_joined_only_on_equal_machines() -> None:
    now = machine.environment()
    assert machine.differences(now, json.loads(json.dumps(machine.environment()))) == []
    other = now | {"cpu": "another", "gpus": [{"name": "A100"}]}
    assert [text.split()[0] for text in machine.differences(other, now)] == ["cpu", "gpus"]


@pytest.mark.parametrize("plan", [["--plan"], []])
def test_a_matrix_with_a_distorting_variable_is_refused_before_anything_starts(
    tmp_path: Path, plan: list[str]
) -> None:
    matrix = tmp_path / "blocking.yaml"
    matrix.write_text(
        "question: Does it matter?\n"
        "stages: [teacher_fit]\n"
        "axes:\n"
        "  machine.env: [[], [CUDA_LAUNCH_BLOCKING=1]]\n"
    )
    done = CliRunner().invoke(run.app, [str(matrix), "--out", str(tmp_path / "out"), *plan])
    assert done.exit_code == 2
    assert "machine.env: CUDA_LAUNCH_BLOCKING=1 is set: every kernel waits" in done.output
    assert not (tmp_path / "out").exists()

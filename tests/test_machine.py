"""The machine's rules: what cannot run, what must not be measured, what is recorded."""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import gpus, machine
from core.settings import Settings

CPU: machine.Machine = {"has_gpu": False, "gpus": [], "packages": {"bitsandbytes": "1"}}
AMPERE: machine.Machine = {
    "has_gpu": True,
    "gpus": [{"name": "A100", "capability": [8, 0]}],
    "packages": {"bitsandbytes": "1", "flash_attn": "2.8", "pytorch-lightning": "2.5"},
}
TURING = AMPERE | {"gpus": [{"name": "T4", "capability": [7, 5]}]}
NVML_SILENT = AMPERE | {"gpus": [{"name": "/dev/nvidia0", "nvml": "not found"}]}
BARE_GPU = AMPERE | {"packages": {}}


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    caches = (gpus.gpus, machine.container_problem)
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
        ("train", "precision", "fp16-mixed", CPU, "float16 autocast"),
        ("train", "precision", "fp16-mixed", TURING, None),
        ("train", "precision", "bf16-mixed", TURING, "capability 8.0"),
        ("train", "precision", "bf16-true", CPU, None),
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


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "no container engine: neither docker nor podman answers"),
        ("echo 'Cannot connect to the Docker daemon' >&2; exit 1", "no container engine"),
        ("echo 'Cannot connect to the Docker daemon' >&2; exit 0", "no container engine"),
        ("echo {}", "this version does not start workers in images yet"),
    ],
)
def test_an_image_needs_an_engine_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, reason: str
) -> None:
    if script is not None:
        engine = tmp_path / "docker"
        engine.write_text(f"#!/bin/sh\n{script}\n")
        engine.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = Settings.model_validate({"machine": {"image": "cu121"}})
    assert reason in str(machine.unsupported(settings, AMPERE))


@pytest.mark.parametrize("name", sorted(machine.DISTORTING))
def test_variables_that_distort_timing_make_it_unfit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    machine.check(tmp_path)
    monkeypatch.setenv(name, "0")
    machine.check(tmp_path)
    monkeypatch.setenv(name, "1")
    with pytest.raises(machine.UnfitMachine, match=f"machine: {name}=1 is set: .*; unset it"):
        machine.check(tmp_path)


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


def fake_nvml(count: int) -> Any:
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
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(2))
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
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(1))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "_version", lambda package: version)
    assert machine.has_gpu() is expected


def test_two_moments_may_be_joined_only_on_equal_machines() -> None:
    now = machine.environment()
    assert machine.differences(now, json.loads(json.dumps(machine.environment()))) == []
    other = now | {"cpu": "another", "gpus": [{"name": "A100"}]}
    assert [text.split()[0] for text in machine.differences(other, now)] == ["cpu", "gpus"]

"""The doctor: each check broken on purpose, probes that die or hang, logs, exit status."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench import doctor
from bench.checkup import fitness, gather, library_checks, probes
from bench.checkup.checks import Facts, Finding
from bench.launching import engines

ROOT = Path(__file__).resolve().parent.parent
OPTION = "PYTORCH_CUDA_ALLOC_CONF"
EXPANDABLE = {OPTION: "expandable_segments:True"}
TORCH = {
    "version": "2.7.1+cu118",
    "cuda": "11.8",
    "file": "/opt/conda/lib/python3.11/site-packages/torch/__init__.py",
    "cxx11_abi": True,
    "sees_gpu": True,
    "capability": [8, 0],
    "log": "",
}
BITSANDBYTES = {
    "version": "0.50.2",
    "library": "libbitsandbytes_cuda118.so",
    "compiled_with_cuda": True,
    "wants_cuda": True,
    "trains_on_cpu": None,
    "log": "",
}
HEALTHY = Facts(
    packages={name: "1" for name in library_checks.NEEDED} | {"torch": "2.7.1+cu118"},
    gpus=({"name": "A100", "uuid": "GPU-1", "driver": "550.54.15", "capability": [8, 0]},),
    driver={"cuda": "12.4", "virtual_memory": [True]},
    torch=TORCH,
    transformers={"version": "5.23.0", "torch_available": True, "log": ""},
    bitsandbytes=BITSANDBYTES,
    flash_attn={"version": "2.8.3", "log": ""},
    allocator={"settings": {OPTION: "", "expandable_segments": False}, "log": ""},
    base_torch=TORCH["file"],
    compilers={"C": "/usr/bin/gcc", "C++": "/usr/bin/g++"},
    engine="docker",
    toolkit=True,
    hub_token=True,
    shared_memory_bytes=1 << 33,
    disk_bytes=1 << 40,
    memory_bytes=1 << 36,
    cores=8,
)
ON_CPU = replace(
    HEALTHY,
    gpus=(),
    driver={},
    torch=TORCH | {"version": "2.13.0+cpu", "cuda": None, "sees_gpu": False, "capability": None},
    packages=dict(HEALTHY.packages) | {"torch": "2.13.0+cpu"},
    bitsandbytes=BITSANDBYTES | {"wants_cuda": False, "trains_on_cpu": True},
    flash_attn=None,
    allocator=None,
)


def torch(**changed: Any) -> dict[str, Any]:
    return TORCH | changed


def of(check: str, facts: Facts) -> Finding:
    (found,) = [finding for finding in doctor.judge(facts) if finding.check == check]
    return found


@pytest.mark.parametrize("facts", [HEALTHY, ON_CPU], ids=["gpu", "cpu"])
def test_a_healthy_machine_has_no_problem(facts: Facts) -> None:
    assert {finding.status for finding in doctor.judge(facts)} <= {"ok", "not applicable"}


NO_ANSWER = {"failed": "no answer within 60 s", "log": ""}
BROKEN_SYMBOL = {
    "failed": "ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E",
    "log": "Traceback (most recent call last):\n",
}
OLD_DRIVER = ({"name": "A100", "driver": "470.82.01"},)
SYMPTOMS: list[tuple[str, dict[str, Any], str | None, str]] = [
    # check, what is changed in a healthy machine, rule, words of the finding
    ("driver for torch's CUDA", {"torch": NO_ANSWER}, None, "no answer within"),
    (
        "driver for torch's CUDA",
        {"gpus": OLD_DRIVER, "torch": torch(version="2.5.1", cuda="12.1", sees_gpu=False)},
        "D1",
        "CUDA 12.1 needs driver 525.60.13",
    ),
    (
        "driver for torch's CUDA",
        {"torch": torch(version="2.13.0", cuda="13.0", sees_gpu=False, log="x\nUnknown error\n")},
        "D1",
        "needs driver 580.65.06 or newer; torch says: Unknown error",
    ),
    ("driver for torch's CUDA", {"torch": torch(cuda=None)}, None, "built for the CPU"),
    (
        "kernels for this GPU",
        {
            "torch": torch(
                capability=[12, 0],
                log="RTX 5090 with CUDA capability sm_120 is not compatible with the current",
            )
        },
        "D8",
        "capability 12.0: RTX 5090",
    ),
    (
        "virtual memory (attribute 102)",
        {"driver": {"cuda": "12.4", "virtual_memory": [False]}, "variables": EXPANDABLE},
        "D1",
        "0, and expandable_segments is set",
    ),
    (
        "allocator variables",
        {"variables": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}},
        "D2",
        "PYTORCH_ALLOC_CONF is not read by torch 2.7.1+cu118",
    ),
    ("allocator's own settings", {"variables": EXPANDABLE}, "D2", "expandable_segments=False"),
    (
        "allocator's own settings",
        {"variables": {OPTION: "max_split_size_mb:64"}},
        "D2",
        "the allocator read ''",
    ),
    (
        "allocator's own settings",
        {"variables": {OPTION: "max_split_size_mb:64"}, "allocator": {"settings": ""}},
        "D2",
        "the allocator read ''",
    ),
    (
        "allocator's own settings",
        {"allocator": {"failed": "RuntimeError: CUDA driver error: operation not supported"}},
        "D1",
        "operation not supported",
    ),
    (
        "allocator's own settings",
        {"allocator": {"failed": "RuntimeError: CUDA driver error: unknown error", "log": ""}},
        "D3",
        "unknown error",
    ),
    (
        "the image's torch",
        {"variables": {"CUDA_VERSION": "12.1.1"}},
        "D4",
        "the image has CUDA 12.1, torch is built for 11.8",
    ),
    ("the image's torch", {"variables": {"ILORA_BENCH_IMAGE": "cu121"}}, "D4", "CUDA 12.1"),
    (
        "the image's torch",
        {"variables": {"PYTORCH_VERSION": "2.1.2"}},
        "D4",
        "the image has torch 2.1.2, 2.7.1+cu118 runs",
    ),
    (
        "the image's torch",
        {
            "variables": {"CUDA_VERSION": "11.8.0"},
            "torch": torch(file="/opt/venv/torch/__init__.py"),
        },
        "D4",
        "is hidden by /opt/venv",
    ),
    (
        "transformers accepts torch",
        {
            "transformers": {
                "version": "5.23.0",
                "torch_available": False,
                "log": "Disabling PyTorch because PyTorch >= 2.6 is required but found 2.5.1",
            },
            "packages": dict(HEALTHY.packages) | {"torch": "2.5.1"},
        },
        "D5",
        "transformers 5.23.0 disables torch 2.5.1: Disabling PyTorch",
    ),
    (
        "transformers accepts torch",
        {"transformers": {"failed": "ModuleNotFoundError: No module named 'tqdm'", "log": ""}},
        "D29",
        "tqdm",
    ),
    (
        "bitsandbytes' library",
        {
            "bitsandbytes": BITSANDBYTES
            | {
                "library": None,
                "compiled_with_cuda": False,
                "log": "No compatible CUDA binary found at libbitsandbytes_cuda117.so\n",
            },
            "variables": {"BNB_CUDA_VERSION": "117"},
        },
        "D27",
        "BNB_CUDA_VERSION=117: No compatible",
    ),
    (
        "bitsandbytes' library",
        {
            "bitsandbytes": BITSANDBYTES
            | {"library": "libbitsandbytes_cpu.so", "compiled_with_cuda": False}
        },
        "D27",
        "libbitsandbytes_cpu.so",
    ),
    (
        "4-bit training on the CPU",
        {
            "bitsandbytes": BITSANDBYTES | {"trains_on_cpu": False},
            "cpu_flags": frozenset({"avx512_bf16"}),
        },
        "D17",
        "no gradient",
    ),
    ("flash-attn", {"flash_attn": BROKEN_SYMBOL}, "D7", "undefined symbol"),
    ("flash-attn", {"torch": torch(capability=[7, 5])}, "D8", "7.5 is below Ampere"),
    ("packages", {"packages": {"torch": "2.7.1"}}, "D29", "not installed: transformers, peft"),
    (
        "packages",
        {"packages": {k: v for k, v in HEALTHY.packages.items() if k != "sentencepiece"}},
        "D21",
        "sentencepiece",
    ),
    ("compiler for train.compile", {"compilers": {"C++": "/usr/bin/g++"}}, "D18", "no C compiler"),
    ("the GPU is free", {"busy": ["A100 is busy (processes 7)"]}, None, "processes 7"),
    (
        "distorting variables",
        {"variables": {"CUDA_LAUNCH_BLOCKING": "1"}},
        None,
        "CUDA_LAUNCH_BLOCKING=1",
    ),
    (
        "distorting variables",
        {"variables": {"NVIDIA_TF32_OVERRIDE": "0"}},
        None,
        "no longer follows train.precision",
    ),
    ("containers", {"toolkit": False}, "D19", "cannot hand over the GPU"),
    (
        "shared memory for loader workers",
        {"shared_memory_bytes": 64 << 20},
        "D16",
        "/dev/shm has 64 MiB",
    ),
    ("disk and memory", {"disk_bytes": 1 << 20}, None, "0.0 GiB of disk"),
    ("disk and memory", {"memory_bytes": 1 << 20}, None, "0.0 GiB of memory"),
    ("idle cores", {"load": 7.5}, None, "load 7.5 on 8 cores"),
]


@pytest.mark.parametrize(("check", "changed", "rule", "words"), SYMPTOMS)
def test_each_fault_is_found_and_comes_with_a_remedy(
    check: str, changed: dict[str, Any], rule: str | None, words: str
) -> None:
    facts = replace(HEALTHY, **changed)
    found = of(check, facts)
    assert found.status == "problem"
    assert words in found.observed
    assert found.rule == rule
    assert found.remedy
    assert doctor.judge(facts)[0].status == "problem"


def test_every_check_has_a_fault_that_it_finds() -> None:
    # What may be loaded and fetched is a fact of the machine, never a fault.
    quiet = {"weights that may be loaded", "model hub"}
    assert {finding.check for finding in doctor.judge(HEALTHY)} - quiet == {
        check for check, *_ in SYMPTOMS
    }


@pytest.mark.parametrize(
    ("check", "changed", "status", "words"),
    [
        ("virtual memory (attribute 102)", {"driver": {"unavailable": "no libcuda"}}, "unknown",
         "no libcuda"),
        ("virtual memory (attribute 102)", {"driver": {"virtual_memory": [False]}}, "ok",
         "never set expandable_segments"),
        ("virtual memory (attribute 102)", {"variables": EXPANDABLE}, "ok",
         "1, expandable_segments is set"),
        ("driver for torch's CUDA", {"gpus": ({"name": "x", "driver": {"unavailable": "?"}},)},
         "unknown", "2.7.1"),
        ("driver for torch's CUDA", {"gpus": OLD_DRIVER, "torch": torch(cuda="12.1")}, "ok",
         "compatibility libraries stand in"),
        ("the GPU is free", {"gpus": ({"name": "/dev/nvidia0", "nvml": "hidden"},)}, "unknown",
         "NVML is hidden"),
        ("the image's torch", {"torch": NO_ANSWER, "variables": {"CUDA_VERSION": "11.8.0"}},
         "unknown", "torch does not answer"),
        ("the image's torch", {"variables": {"CUDA_VERSION": "11.8.0",
                                             "PYTORCH_VERSION": "2.7.1"}}, "ok", "CUDA 11.8"),
        ("allocator's own settings", {"variables": EXPANDABLE, "allocator": {"settings": {
            "expandable_segments": True, OPTION: "expandable_segments:True"}}}, "ok",
         "expandable_segments:True"),
        ("weights that may be loaded", {"packages": {"torch": "2.5.1"}}, "ok",
         "safetensors only"),
        ("weights that may be loaded", {"packages": {}}, "unknown", "no torch"),
        ("4-bit training on the CPU", {"bitsandbytes": BITSANDBYTES | {"trains_on_cpu": True},
         "cpu_flags": frozenset({"avx512_bf16"})}, "ok", "AVX512-BF16 CPU"),
        ("containers", {"engine": None, "no_engine": "docker is not installed"}, "not applicable",
         "docker is not installed"),
        ("model hub", {"variables": {"HF_HUB_OFFLINE": "1"}}, "ok", "offline"),
        ("model hub", {"hub_token": False}, "ok", "no token"),
    ],
)  # fmt: skip
def test_what_is_no_fault_says_what_was_seen(
    check: str, changed: dict[str, Any], status: str, words: str
) -> None:
    found = of(check, replace(HEALTHY, **changed))
    assert (found.status, words in found.observed) == (status, True), found


@pytest.mark.parametrize(
    ("version", "cuda", "abi", "python", "expected"),
    [
        ("2.5.1+cu121", "12.1", False, (3, 11),
         "flash_attn-2.8.3+cu12torch2.5cxx11abiFALSE-cp311-cp311-linux_x86_64.whl"),
        ("2.8.0+cu128", "12.8", True, (3, 12),
         "flash_attn-2.8.3+cu12torch2.8cxx11abiTRUE-cp312-cp312-linux_x86_64.whl"),
        ("2.4.1+cu118", "11.8", False, (3, 11),
         "flash_attn-2.7.3+cu11torch2.4cxx11abiFALSE-cp311-cp311-linux_x86_64.whl"),
        ("2.7.1+cu118", "11.8", True, (3, 11), "no official wheel"),
        ("2.9.1+cu128", "12.8", True, (3, 12), "no official wheel"),
        ("2.13.0+cu130", "13.0", True, (3, 12), "no official wheel"),
    ],
)  # fmt: skip
def test_the_wheel_of_flash_attn_follows_from_four_facts(
    version: str, cuda: str, abi: bool, python: tuple[int, int], expected: str
) -> None:
    facts = replace(
        HEALTHY,
        torch=torch(version=version, cuda=cuda, cxx11_abi=abi),
        flash_attn=None,
        python=python,
    )
    found = of("flash-attn", facts)
    assert found.status == "not applicable"
    assert expected in found.observed
    four = (f"torch {version[:3]}", f"CUDA {cuda}", f"cp3{python[1]}", f"cxx11abi {abi}".upper())
    for fact in four[:3]:
        assert fact.rstrip(".") in found.observed
    assert four[3] in found.observed.upper()


def test_a_hub_kernel_in_place_of_flash_attn_is_announced() -> None:
    facts = replace(HEALTHY, flash_attn=None, packages={"kernels": "0.18", "torch": "2.7.1"})
    assert "transformers would fetch a hub kernel" in of("flash-attn", facts).observed


# ---- isolation ----


def test_the_first_step_that_fails_names_the_part_at_fault() -> None:
    failed = {"failed": "RuntimeError: CUDA driver error: operation not supported", "log": ""}
    fine = {"device": "cuda:0"}
    facts = replace(
        HEALTHY, isolation={"tensor": fine, "backbone": failed, "gated_backbone": failed}
    )
    assert of("alone: tensor", facts).status == "ok"
    found = of("alone: backbone", facts)
    assert (found.status, found.rule) == ("problem", "D1")
    later = of("alone: gated backbone", facts)
    assert later.status == "unknown" and "'backbone', which already fails" in later.observed


# ---- probes in children ----


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a library whose import does what the code says."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def library(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)

    return library


FAKE_TORCH = """
import sys, types
__version__, __file__ = "2.7.1+cu118", "torch.py"
class cuda:
    is_available = staticmethod(lambda: True)
    get_device_capability = staticmethod(lambda: (7, 5))
    class memory:
        _snapshot = staticmethod(lambda: {"allocator_settings": {"expandable_segments": True}})
version = types.SimpleNamespace(cuda="11.8")
compiled_with_cxx11_abi = lambda: True
zeros = lambda *shape, device: None
print("Tesla T4 with CUDA capability sm_75 is not compatible", file=sys.stderr)
"""


def test_a_probe_answers_from_a_child(child: Any) -> None:
    child("torch", FAKE_TORCH)
    answer = probes.ask("torch", 20)
    assert (answer["version"], answer["cuda"], answer["capability"]) == (
        "2.7.1+cu118",
        "11.8",
        [7, 5],
    )
    assert "sm_75" in answer["log"]
    assert probes.ask("allocator", 20)["settings"] == {"expandable_segments": True}
    assert "torch" not in sys.modules or sys.modules["torch"].__version__ != "2.7.1+cu118"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libtorch_cuda.so: undefined symbol: _ZN3c10')", "undefined symbol"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit -9"),
        ("import sys; sys.exit(0)", "exit 0"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_a_broken_torch_is_an_answer(child: Any, code: str, said: str) -> None:
    child("torch", code)
    answer = probes.ask("torch", 1 if "sleep" in code else 20)
    assert said in answer["failed"]
    facts = replace(HEALTHY, torch=answer)
    assert of("driver for torch's CUDA", facts).status == "problem"


@pytest.mark.parametrize("step", probes.ISOLATION)
def test_the_isolation_steps_run_here(step: str) -> None:
    answer = probes.PROBES[step]()
    assert answer["device"]
    assert answer.get("gradient", 1) > 0


def test_a_four_bit_layer_that_lost_its_gradient_is_seen() -> None:
    import torch

    class Repacking(torch.nn.Linear):
        """Loses autograd after an evaluation, as 4-bit layers do on CPUs with AVX512-BF16."""

        packed = False

        def forward(self, rows: Any) -> Any:
            self.packed |= not self.training and getattr(self, "support_avx512bf16_for_cpu", True)
            return super().forward(rows.detach() if self.packed else rows)

    def layer() -> Any:
        return Repacking(64, 64, bias=False, dtype=torch.bfloat16)

    assert not probes._trains_on_cpu(layer())
    switchable = layer()
    switchable.support_avx512bf16_for_cpu = True
    assert probes._trains_on_cpu(switchable)


def test_real_four_bit_layers_train_here() -> None:
    answer = probes.bitsandbytes_facts()
    assert answer["library"].startswith("libbitsandbytes_")
    assert answer["trains_on_cpu"] is not False


# ---- this machine ----


def test_facts_are_gathered_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"torch": ON_CPU.torch, "transformers": ON_CPU.transformers,
               "bitsandbytes": ON_CPU.bitsandbytes}  # fmt: skip
    monkeypatch.setattr(gather, "ask_all", lambda *_: answers)
    monkeypatch.setattr(gather, "ask", lambda step, limit_s: {"device": step})
    facts = gather.gather(isolate=True)
    assert facts.packages["torch"] and facts.cores >= 1 and facts.memory_bytes > 0
    assert list(facts.isolation) == list(probes.ISOLATION)
    assert len(doctor.judge(facts)) == len(doctor.CHECKS) + 3


def test_the_hub_token_is_found_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert not gather.has_hub_token()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert gather.has_hub_token()
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_secret")
    assert gather.has_hub_token()
    shown = json.dumps([vars(finding) for finding in doctor.judge(replace(HEALTHY))])
    assert "hf_secret" not in shown


def test_a_chosen_compiler_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gcc", "my-cc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert fitness.find_compiler("C") == str(tmp_path / "gcc")
    assert fitness.find_compiler("C++") is None
    monkeypatch.setenv("CC", "my-cc -O2")
    assert fitness.find_compiler("C") == str(tmp_path / "my-cc")
    monkeypatch.setenv("CC", "icc")
    assert fitness.find_compiler("C") is None


def test_the_torch_below_a_virtual_environment_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "python"
    base.write_text("#!/bin/sh\necho below/torch/__init__.py\n")
    base.chmod(0o755)
    monkeypatch.setattr(sys, "_base_executable", str(base))
    assert gather.base_torch() == "below/torch/__init__.py"
    monkeypatch.setattr(sys, "_base_executable", str(tmp_path / "absent"))
    assert gather.base_torch() is None


# ---- the command ----


def run(*words: str, given: str | None = None) -> Any:
    return CliRunner().invoke(doctor.app, words, input=given)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the doctor see a made-up machine."""
    return lambda facts: monkeypatch.setattr(doctor, "gather", lambda isolate: facts)


def test_a_healthy_machine_exits_0_and_a_sick_one_1(here: Any) -> None:
    here(ON_CPU)
    done = run()
    assert done.exit_code == 0, done.output
    assert "problem" not in done.output
    here(replace(HEALTHY, toolkit=False, driver={"unavailable": "no libcuda"}))
    done = run()
    assert done.exit_code == 1
    first, second, *_, last = done.output.splitlines()
    assert first.startswith("problem") and "containers [D19]" in first
    assert second.strip().startswith("-> install nvidia-container-toolkit")
    assert last.startswith("1 problem, 1 unknown, ")


def test_json_holds_the_findings(here: Any) -> None:
    here(replace(HEALTHY, shared_memory_bytes=0))
    done = run("--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)["findings"]
    assert len(found) == len(doctor.CHECKS)
    assert found[0]["rule"] == "D16" and found[0]["status"] == "problem" and found[0]["remedy"]


LOG = """\
Epoch 0
Traceback (most recent call last):
RuntimeError: self and mat2 must have the same dtype, but got Half and Byte
"""


def test_a_log_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "cell.log"
    path.write_text(LOG)
    for done in (run("--explain", str(path)), run("--explain", "-", given=LOG)):
        assert done.exit_code == 0, done.output
        assert done.output.startswith("D9  ")
        for words in ("line 3: RuntimeError: self and mat2", "cause:", "proof:", "remedy: call"):
            assert words in done.output
    (match,) = json.loads(run("--explain", str(path), "--json").stdout)["matches"]
    assert (match["rule"], match["line_number"]) == ("D9", 3)


@pytest.mark.parametrize(
    ("log", "words"),
    [("AssertionError: 3 != 4", "python -m bench.doctor --isolate"), ("\n", "D12")],
)
def test_a_log_nobody_knows_is_not_determined(log: str, words: str) -> None:
    done = run("--explain", "-", given=log)
    assert done.exit_code == 1
    assert done.output.startswith("not determined")
    assert words in done.output


def test_bad_input_exits_2(tmp_path: Path) -> None:
    done = run("--explain", str(tmp_path / "absent.log"))
    assert done.exit_code == 2
    assert "absent.log: No such file or directory; give the log of a failed run" in done.output
    assert run("--explain", str(tmp_path)).exit_code == 2
    assert run("--nonsense").exit_code == 2


def test_the_parent_loads_no_torch() -> None:
    code = "import sys, bench.doctor; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "bitsandbytes"} & set(done.stdout.split())


def test_an_engine_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find", lambda *_: "no container engine: docker is not installed")
    monkeypatch.setattr(gather, "ask_all", lambda *_: {name: {} for name in probes.PROBES})
    facts = gather.gather(isolate=False)
    assert (facts.engine, facts.no_engine) == (
        None,
        "no container engine: docker is not installed",
    )

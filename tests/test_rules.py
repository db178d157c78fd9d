"""The rules know the texts of real failures, each its own, and say how to prove the cause."""

import ast
import re
import shlex

import pytest

from bench.checkup import rules

# Texts as the libraries print them, and as users' notes quote them.
TEXTS = {
    "D1": (
        "RuntimeError: CUDA driver error: operation not supported",
        "RuntimeError: CUDA error: operation not supported",
        "UserWarning: CUDA initialization: The NVIDIA driver on your system is too old (found "
        "version 11040). Please update your GPU driver",
        "CUDA driver version is insufficient for CUDA runtime version",
    ),
    "D2": (
        "machine: PYTORCH_ALLOC_CONF is not read by torch 2.7.1; use PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_ALLOC_CONF is read by torch 2.9.1, but its expandable_segments is ignored on CUDA",
    ),
    "D3": (
        "RuntimeError: CUDA driver error: unknown error",
        "cuMemSetAccess failed: 999",
    ),
    "D4": (
        "RuntimeError: The detected CUDA version (11.8) mismatches the version that was used to "
        "compile PyTorch (12.1). Please make sure to use the same CUDA versions.",
        "ImportError: libcusparse.so.12: undefined symbol: __nvJitLinkAddData_12_1, version 12",
        "error: externally-managed-environment",
    ),
    "D5": (
        "Disabling PyTorch because PyTorch >= 2.6 is required but found 2.5.1+cu121",
        "PyTorch was not found. Models won't be available and only tokenizers can be used.",
        "AutoModel requires the PyTorch library but it was not found in your environment.",
        "AutoModel requires PyTorch >= 2.6, but PyTorch was not found or an older version is "
        "installed.",
    ),
    "D6": (
        "ValueError: Due to a serious vulnerability issue in `torch.load`, even with "
        "`weights_only=True`, we now require users to upgrade torch to at least v2.6",
    ),
    "D7": (
        "ImportError: flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so: undefined symbol: "
        "_ZN3c105ErrorC2ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
        '"undefined symbol" エラー',
    ),
    "D8": (
        "Tesla T4 with CUDA capability sm_75 is not compatible with the current PyTorch "
        "installation.",
        '"CUDA capability sm_xx is not compatible"',
        "RuntimeError: FlashAttention only supports Ampere GPUs or newer.",
        "RuntimeError: CUDA error: no kernel image is available for execution on the device",
    ),
    "D9": ("RuntimeError: self and mat2 must have the same dtype, but got Half and Byte",),
    "D10": (
        "RuntimeError: Error(s) in loading state_dict for Teacher: Unexpected key(s) in "
        'state_dict: "llm.layers.0.self_attn.k_proj.weight.absmax"',
        'Unexpected key(s) in state_dict: "q_proj.weight.quant_map"',
    ),
    "D11": (
        "RuntimeError: Trying to backward through the graph a second time (or directly access "
        "saved tensors after they have already been freed).",
    ),
    "D12": ("silent_exit", "exit 0 without an end record; last seen in start_up"),
    "D13": (
        "huggingface/tokenizers: The current process just got forked, after parallelism has "
        "already been used. Disabling parallelism to avoid deadlocks...",
        "また、`huggingface/tokenizers`の並列処理に関する警告",
    ),
    "D14": (
        "RuntimeError: Expected all tensors to be on the same device, but got index is on cuda:0, "
        "different from other tensors on cpu",
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
        "and cpu!",
    ),
    "D15": (
        "RuntimeError: 0D or 1D target tensor expected, multi-target not supported",
        "RuntimeError: Index tensor must have the same number of dimensions as input tensor",
        "TypeError: unhashable type: 'list'",
    ),
    "D16": (
        "RuntimeError: DataLoader worker (pid 11011) is killed by signal: Bus error. It is "
        "possible that dataloader's workers are out of shared memory.",
        "RuntimeError: DataLoader worker (pid(s) 12, 13) exited unexpectedly",
        "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient "
        "shared memory (shm).",
    ),
    "D17": (
        "RuntimeError: a view of a leaf Variable that requires grad is being used in an in-place "
        "operation.",
        "UserWarning: bitsandbytes::gemv_4bit: an autograd kernel was not registered to the "
        "Autograd key(s)",
    ),
    "D18": (
        "RuntimeError: Failed to find C compiler. Please specify via CC environment variable or "
        "set triton.knobs.build.impl.",
        "torch._inductor.exc.InvalidCxxCompiler: No working C++ compiler found in "
        "torch._inductor.config.cpp.cxx: (None, 'g++')",
        "timeout(compile)",
        "no end within 600 s; last seen in teacher_fit, phase compile, step 0",
    ),
    "D19": (
        'docker: Error response from daemon: could not select device driver "" with '
        "capabilities: [[gpu]].",
        "Error: setting up CDI devices: unresolvable CDI devices nvidia.com/gpu=all",
    ),
    "D20": (
        "huggingface_hub.errors.GatedRepoError: 401 Client Error. Cannot access gated repo for "
        "url https://huggingface.co/meta-llama/Llama-2-7b-hf/resolve/main/config.json.",
        "requests.exceptions.HTTPError: 403 Client Error: Forbidden for url: "
        "https://huggingface.co/x",
        "teacher.llm_model_name: 'x/y' is no preset, no local folder, and could not be had from "
        "the hub",
    ),
    "D21": (
        "ImportError: LlamaTokenizer requires the SentencePiece library but it was not found in "
        "your environment.",
        "ModuleNotFoundError: No module named 'sentencepiece'",
        "※ `SentencePiece` エラーが出た場合",
    ),
    "D22": (
        "ERROR: No matching distribution found for triton==2.1.0",
        "RuntimeError: Unable to find installation candidates for triton (2.1.0)",
        "ERROR: Could not find a version that satisfies the requirement torch==2.1.2 (from "
        "versions: 2.6.0)",
    ),
    "D23": (
        "FileNotFoundError: [Errno 2] No such file or directory: 'data/ml-1m/train.csv'",
        "data.root: no file data/ratings.dat; unpack ml-1m.zip there",
    ),
    "D24": (
        "core.loop.NonFiniteLoss: step 12: training loss is nan",
        "`NaN` / `inf` 損失",
        "step 3: training loss is -inf",
    ),
    "D25": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.",
        "torch.OutOfMemoryError",
    ),
    "D26": ("RuntimeError: NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp",),
    "D27": (
        "bitsandbytes library load error: No compatible CUDA binary found at "
        "site-packages/bitsandbytes/libbitsandbytes_cuda117.so",
        "RuntimeError: CUDA Setup failed despite GPU being available.",
    ),
    "D28": (
        "MisconfigurationException: No `test_step()` method defined to run `Trainer.test`.",
        "TypeError: DistillationTrainer.__init__() missing 2 required positional arguments",
    ),
    "D29": (
        "ModuleNotFoundError: No module named 'tensorboard'",
        "ImportError: cannot import name 'LossKwargs' from 'transformers.utils'",
        "AttributeError: module 'transformers.utils' has no attribute 'LossKwargs'",
    ),
}
PAIRS = [(rule_id, text) for rule_id, texts in TEXTS.items() for text in texts]

HARMLESS = (
    "",
    "Epoch 0: loss 8.1937, recall@10 0.0098, information retrieved",
    "step 12: training loss is 8.2",
    "AssertionError: 3 != 4",
    "AttributeError: 'DataModule' object has no attribute 'prepare_'",
    "Adapters saved; tokens prepared once; workers 0; phase forward",
    "UserWarning: PYTORCH_CUDA_ALLOC_CONF is deprecated, use PYTORCH_ALLOC_CONF instead",
    "see https://github.com/huggingface/tokenizers for more",
    "Failed to load CPU gemm_4bit_forward from kernels-community",
    "HTTP Request: GET https://huggingface.co/api 200 OK",
    "no such file: matrices/test.yaml",
)


def test_every_rule_has_a_text_and_an_id_of_its_own() -> None:
    assert [rule.id for rule in rules.RULES] == list(TEXTS)
    assert list(rules.BY_ID) == [f"D{number}" for number in range(1, 30)]


@pytest.mark.parametrize(("rule_id", "text"), PAIRS)
def test_a_text_is_known_by_its_own_rule_alone(rule_id: str, text: str) -> None:
    assert [rule.id for rule in rules.matching(text)] == [rule_id]


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_lines_match_nothing(text: str) -> None:
    assert rules.matching(text) == ()


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.id)
def test_no_pattern_of_a_rule_is_dead(rule: rules.Rule) -> None:
    """A pattern that no known text needs is a guess; at least half must be shown to work."""
    shown = [
        pattern
        for pattern in rule.texts
        if any(re.search(pattern, text) for text in TEXTS[rule.id])
    ]
    assert 2 * len(shown) >= len(rule.texts)


def test_the_last_line_counts_and_general_rules_come_last() -> None:
    log = "\n".join(
        [
            TEXTS["D25"][0],
            TEXTS["D9"][0],
            "Traceback (most recent call last):",
            TEXTS["D11"][0],
            TEXTS["D9"][0],
            "  more",
        ]
    )
    found = rules.matches(log)
    assert [(match.rule.id, match.line_number) for match in found] == [
        ("D9", 5),
        ("D11", 4),
        ("D25", 1),
    ]


def test_a_long_line_is_cut_to_the_part_that_tells() -> None:
    (match,) = rules.matches("x" * 500 + TEXTS["D11"][0] + "y" * 500)
    assert "backward through the graph a second time" in match.line
    assert len(match.line) <= rules.LINE_WIDTH + 2


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.id)
def test_a_rule_says_cause_proof_and_remedy(rule: rules.Rule) -> None:
    for text in (rule.symptom, rule.cause, rule.remedy):
        assert len(text.split()) >= 3 and "\n" not in text
    command = rule.proof_command.partition("  #")[0]
    words = shlex.split(command)
    assert words and "\n" not in command
    if "-c" in words:
        ast.parse(words[words.index("-c") + 1])

"""Known failures of this stack: how each is recognised, what causes it, its proof and its cure."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """One failure whose cause is known; pure data."""

    id: str
    symptom: str
    cause: str
    proof_command: str
    """One command that tells this cause from others, with what it shows."""
    remedy: str
    texts: tuple[str, ...]
    """Regular expressions; one found in a log is enough. They look at single lines."""
    general: bool = False
    """The symptom has many causes: named after rules that fit more exactly."""


@dataclass(frozen=True)
class Match:
    """A rule and the line of the log it was recognised by."""

    rule: Rule
    line_number: int
    """From 1."""
    line: str
    """Its part that tells."""


LINE_WIDTH = 160
"""Characters shown of a line of a log."""
_NO_ALLOCATOR_OPTIONS = "env -u PYTORCH_CUDA_ALLOC_CONF -u PYTORCH_ALLOC_CONF"
_ONE_TENSOR = "python -c \"import torch; print(torch.zeros(1, device='cuda'))\""

RULES = (
    Rule(
        id="D1",
        symptom="CUDA driver error: operation not supported, at the first tensor on the GPU",
        cause="expandable_segments asks the driver for virtual memory that it does not have here "
        "(driver attribute 102 = 0: vGPU profiles, Jetson), or the driver is older than torch's "
        "CUDA needs; no model code can change that",
        proof_command=f"{_NO_ALLOCATOR_OPTIONS} {_ONE_TENSOR}  # works: it was the option",
        remedy="remove expandable_segments from the allocator variable; if the command fails too, "
        "update the driver or take a torch built for an older CUDA",
        texts=(
            r"CUDA driver error: operation not supported",
            r"CUDA error: operation not supported",
            r"CUDA_ERROR_NOT_SUPPORTED",
            r"CUDA driver version is insufficient for CUDA runtime version",
            r"NVIDIA driver on your system is too old",
        ),
    ),
    Rule(
        id="D2",
        symptom="an allocator option is set and the allocator does not show it",
        cause="this torch does not read a variable of that name: PYTORCH_ALLOC_CONF is unknown up "
        "to 2.7 and its expandable_segments is ignored for CUDA up to 2.9",
        proof_command="python -c \"import torch; torch.zeros(1, device='cuda'); "
        "print(torch.cuda.memory._snapshot()['allocator_settings'])\"",
        remedy="use PYTORCH_CUDA_ALLOC_CONF, which every torch reads, or machine.allocator_conf",
        texts=(
            r"PYTORCH_\w*ALLOC\w*.*(not read|unread|is ignored|not in effect)",
            r"allocator_conf.*(not in effect|allocator reports nothing)",
        ),
    ),
    Rule(
        id="D3",
        symptom="CUDA unknown error (999) under WSL2",
        cause="expandable_segments meets a fault of the WSL driver at cuMemSetAccess "
        "(pytorch/pytorch#192330; mended in driver 616)",
        proof_command=f"{_NO_ALLOCATOR_OPTIONS} {_ONE_TENSOR}  # works: it was the option",
        remedy="remove expandable_segments from the allocator variable, or update the Windows "
        "driver to 616 or newer",
        texts=(
            r"CUDA (driver )?error: unknown error",
            r"CUDA unknown error",
            r"CUDA_ERROR_UNKNOWN",
            r"cuMemSetAccess.*\b999\b",
        ),
    ),
    Rule(
        id="D4",
        symptom="the torch that runs is not the image's, or its CUDA is not the image's",
        cause="a second environment (venv, poetry, conda) inside the image brought a torch of its "
        "own, so the image's CUDA was never loaded",
        proof_command='python -c "import os, torch; print(torch.__file__, torch.version.cuda, '
        "os.environ.get('CUDA_VERSION'))\"",
        remedy="install into the image's own Python with its torch pinned "
        "(--break-system-packages where pip refuses); no second environment",
        texts=(
            r"torch is not the image's",
            r"undefined symbol: (__nv|nccl|cu[A-Z])",
            r"detected CUDA version .*mismatches the version that was used to compile",
            r"externally-managed-environment",
            r"compiled with different CUDA (major )?versions",
        ),
    ),
    Rule(
        id="D5",
        symptom="transformers disables PyTorch with one warning",
        cause="torch is older than this transformers needs; pip does not enforce that pair",
        proof_command='python -c "import torch, transformers; print(torch.__version__, '
        'transformers.__version__, transformers.is_torch_available())"',
        remedy="take a pair that fits: transformers 5.19 for torch 2.5, 5.20 or newer for 2.6 up",
        texts=(
            r"Disabling PyTorch because PyTorch",
            r"PyTorch was not found\. Models won't be available",
            r"requires (the )?PyTorch( >= [\d.]+,| library) but (PyTorch was|it was) not found",
        ),
    ),
    Rule(
        id="D6",
        symptom="transformers refuses to load a .bin checkpoint",
        cause="torch.load of torch before 2.6 can be made to run code (CVE-2025-32434)",
        proof_command='python -c "import torch; print(torch.__version__)"  # below 2.6',
        remedy="take a model with safetensors files, or torch 2.6 or newer",
        texts=(r"serious vulnerability issue in `?torch\.load", r"CVE-2025-32434"),
    ),
    Rule(
        id="D7",
        symptom="flash_attn (or another compiled extension) cannot be imported: undefined symbol",
        cause="it was built for another torch or C++ ABI (wheels for torch up to 2.6 are "
        "cxx11abiFALSE, from 2.7 TRUE)",
        proof_command='python -c "import sys, torch; print(torch.__version__, torch.version.cuda, '
        'torch.compiled_with_cxx11_abi(), sys.version_info[:2])"',
        remedy="install the wheel whose name has these four facts (the doctor prints it), or use "
        "teacher.attn: sdpa",
        texts=(
            r"flash[_-]?attn.*undefined symbol",
            r"undefined symbol(?!: (__nv|nccl|cu[A-Z]))",
        ),
    ),
    Rule(
        id="D8",
        symptom="the GPU's CUDA capability is not compatible",
        cause="the card is of a generation for which torch or flash-attn has no kernels: "
        "FlashAttention-2 begins at Ampere (a T4 is Turing), CUDA 13 wheels begin at Turing, "
        "older wheels end before the newest cards",
        proof_command='python -c "import torch; print(torch.cuda.get_device_capability(), '
        'torch.cuda.get_arch_list())"',
        remedy="teacher.attn: sdpa on Turing and older; else a torch whose list holds the card",
        texts=(
            r"CUDA capability sm_\w+ is not compatible",
            r"no kernel image is available for execution",
            r"FlashAttention only supports Ampere",
        ),
    ),
    Rule(
        id="D9",
        symptom="self and mat2 must have the same dtype, but got Half and Byte",
        cause="the packed weight of a 4-bit layer was passed to a plain linear; 'Half' is the "
        "dtype of the bias, so casting the input changes nothing",
        proof_command='python -c "import bitsandbytes; '
        "l = bitsandbytes.nn.Linear4bit(64, 64).to('cpu'); "
        'print(type(l).__mro__, l.weight.dtype, l.weight.shape)"',
        remedy="call the 4-bit layer and add to its result; never read its weight",
        texts=(
            r"must have the same dtype, but got \w+ and (Byte|Char)\b",
            r"must have the same dtype, but got (Byte|Char) and \w+",
        ),
    ),
    Rule(
        id="D10",
        symptom="unexpected keys absmax, quant_map, quant_state when a checkpoint is loaded",
        cause="a checkpoint of the whole model holds the 4-bit layers' constants, which no fresh "
        "model expects",
        proof_command='python -c "import sys, torch; print([k for k in torch.load(sys.argv[1], '
        "map_location='cpu')['state_dict'] if 'absmax' in k][:3])\" CHECKPOINT",
        remedy="save adapters, gate, projector and head alone and load the base from its source, "
        "as the stages here do",
        texts=(
            r"absmax",
            r"[Uu]nexpected key.*(quant_map|quant_state)",
            r"\.(nested_)?quant_(map|state)\b",
        ),
    ),
    Rule(
        id="D11",
        symptom="Trying to backward through the graph a second time",
        cause="reentrant gradient checkpointing with a tensor (the gate) shared by all layers: the "
        "first layer's backward frees the graph the others need",
        proof_command="python -m core.run SETTINGS --set teacher.gradient_checkpointing=false "
        "student_fit teacher_fit  # works: it was checkpointing",
        remedy="gradient_checkpointing_kwargs={'use_reentrant': False}, as "
        "teacher.gradient_checkpointing does",
        texts=(r"backward through the graph a second time",),
    ),
    Rule(
        id="D12",
        symptom="exit code 0 and nothing written",
        cause="the entry point is missing (without an `if __name__ == '__main__'` line functions "
        "are defined and that is all), or an exception was swallowed",
        proof_command="grep -n '__main__' MODULE.py  # no line: nothing ever called main()",
        remedy="restore the entry point; trust the end record and the files, never the exit code",
        texts=(r"silent_exit", r"exit 0 without an end record"),
        general=True,
    ),
    Rule(
        id="D13",
        symptom="tokenizers: the current process just got forked",
        cause="a fast tokenizer was used before data loader workers were forked",
        proof_command="TOKENIZERS_PARALLELISM=false COMMAND  # the warning is gone",
        remedy="prepare tokens once before training, as core.prompts does; set "
        "TOKENIZERS_PARALLELISM=false",
        texts=(
            r"current process just got forked",
            r"(^|[^/\w])huggingface/tokenizers`?(:|の)",
        ),
    ),
    Rule(
        id="D14",
        symptom="Expected all tensors to be on the same device, after fit",
        cause="the trainer's tear-down moved the module to the CPU, and a device stored earlier "
        "did not follow",
        proof_command="python -m core.run SETTINGS --set train.trainer=loop  # works: it was the "
        "trainer's tear-down",
        remedy="place the model where each stage begins and read its device from its parameters",
        texts=(
            r"Expected all tensors to be on the same device",
            r"tensors? to be on the same device, but",
        ),
    ),
    Rule(
        id="D15",
        symptom="0D or 1D target tensor expected; index dimensions differ; unhashable type: 'list'",
        cause="targets have the shape (batch, 1): a one-element list or tensor for each row",
        proof_command='python -c "import torch; '
        'torch.nn.functional.cross_entropy(torch.zeros(2, 3), torch.zeros(2, 1).long())"',
        remedy="integer targets of shape (batch,), checked on the first batch of every stage",
        texts=(
            r"0D or 1D target",
            r"Index tensor must have the same number of dimensions",
            r"unhashable type: 'list'",
        ),
    ),
    Rule(
        id="D16",
        symptom="a DataLoader worker is killed, bus error",
        cause="batches of loader workers travel through shared memory (/dev/shm), which is too "
        "small; a container has 64 MiB unless told otherwise",
        proof_command="df -h /dev/shm",
        remedy="start the container with --shm-size=1g (or --ipc=host), or train.num_workers: 0",
        texts=(
            r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)",
            r"[Bb]us error",
            r"insufficient shared memory",
            r"out of shared memory",
            r"unable to (write to|open shared memory|mmap).*torch_",
        ),
    ),
    Rule(
        id="D17",
        symptom="in-place error or missing gradient on 4-bit layers, on the CPU",
        cause="on CPUs with AVX512-BF16 a forward without gradients repacks the 4-bit weight, and "
        "the next training forward has no autograd",
        proof_command="grep -o -m1 avx512_bf16 /proc/cpuinfo  # printed: this CPU is concerned",
        remedy="support_avx512bf16_for_cpu = False on every Linear4bit, as core.llm sets it",
        texts=(
            r"leaf Variable that requires grad is being used in an in-place operation",
            r"gemv_4bit: an autograd kernel was not registered",
        ),
    ),
    Rule(
        id="D18",
        symptom="torch.compile finds no compiler, or does not end",
        cause="`runtime` images have no C compiler; without end it compiles a whole model with "
        "many graphs, or each new sequence length again",
        proof_command="gcc --version && g++ --version",
        remedy="a `devel` image or `apt-get install build-essential`; train.compile: regional; "
        "phase_timeouts_s: {compile: …} turns waiting into a row of the report",
        texts=(
            r"Failed to find C compiler",
            r"No working C\+\+ compiler",
            r"InvalidCxxCompiler",
            r"timeout ?\(compile\)",
            r"phase compile\b",
            r"hit config\.(recompile_limit|cache_size_limit)",
        ),
    ),
    Rule(
        id="D19",
        symptom="the container engine cannot give a container the GPU",
        cause="the NVIDIA container toolkit is missing or not registered with the engine",
        proof_command="nvidia-ctk cdi list  # command not found or no device: that is it",
        remedy="install nvidia-container-toolkit; then `nvidia-ctk runtime configure "
        "--runtime=docker`, or for podman `nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml`",
        texts=(
            r"could not select device driver",
            r"unresolvable CDI devices",
            r"unknown or invalid runtime name: nvidia",
            r"nvidia-container-cli: .*error",
        ),
    ),
    Rule(
        id="D20",
        symptom="the model hub refuses or cannot be reached (401, 403, gated, offline)",
        cause="no token, no right to a gated model, a wrong name, or no network",
        proof_command="hf auth whoami  # then open the model's page with that account",
        remedy="`hf auth login` (or HF_TOKEN) after accepting the model's terms; a local folder or "
        "a preset with random weights as teacher.llm_model_name needs neither",
        texts=(
            r"\b40[13] Client Error",
            r"GatedRepoError|RepositoryNotFoundError",
            r"Cannot access gated repo|trying to access a gated repo",
            r"is not a valid model identifier",
            r"could not be had from the hub",
            r"couldn't connect to 'https://huggingface\.co'",
            r"LocalEntryNotFoundError",
            r"OfflineModeIsEnabled",
        ),
    ),
    Rule(
        id="D21",
        symptom="SentencePiece is missing",
        cause="a slow tokenizer (Llama, T5) needs the package, and it is not installed",
        proof_command='python -c "import sentencepiece"',
        remedy="pip install sentencepiece (a declared dependency here: reinstall with "
        "`pip install -e .`)",
        texts=(
            r"requires the SentencePiece library",
            r"No module named '?sentencepiece",
            r"sentencepiece.*(not (installed|found)|installed to convert)",
            r"(?i:sentencepiece)[`'\"]? (error|エラー)",
        ),
    ),
    Rule(
        id="D22",
        symptom="the pinned triton or torch cannot be installed",
        cause="there are no wheels of that version for this Python",
        proof_command="python -m pip download --no-deps --dest wheel-probe triton==VERSION",
        remedy="`pip install -c constraints.txt -e .`: versions that exist together for this "
        "Python",
        texts=(
            r"No matching distribution found for (triton|torch)\b",
            r"satisfies the requirement (triton|torch)\b",
            r"Unable to find installation candidates for (triton|torch)\b",
        ),
    ),
    Rule(
        id="D23",
        symptom="a file of ratings, or train / val / test, is missing",
        cause="the data stage has not run, or data.root points elsewhere",
        proof_command="python -m core.run SETTINGS prepare_data",
        remedy="run prepare_data first (`make data`); later stages take its files by manifest",
        texts=(
            r"FileNotFoundError.*(train|val|test|ratings|movies|users)\w*\.(csv|dat|parquet)",
            r"No such file.*(train|val|test|ratings|movies|users)\w*\.(csv|dat|parquet)",
            r"data\.root: no file",
            r"needs prepare_data, which has not run",
        ),
    ),
    Rule(
        id="D24",
        symptom="the loss is NaN or infinite",
        cause="a step left the range of its number format (fp16 without a scaler, a learning rate "
        "too high), or a batch without targets",
        proof_command="python -m core.run SETTINGS --set train.precision=fp32 teacher_fit  # "
        "finite: it was the number format",
        remedy="look at the named step; bf16-mixed or fp32, a lower train.lr, "
        "train.gradient_clip_val",
        texts=(
            r"(?i:\bloss\b[^.]{0,40}\b(nan|inf|infinite|infinity)\b)",
            r"(?i:\b(nan|inf|infinite|non-finite)\b[ /\w]{0,20}\bloss\b)",
            r"(?i:\b(nan|inf)\b.{0,12}損失)",
        ),
        general=True,
    ),
    Rule(
        id="D25",
        symptom="OutOfMemoryError on the GPU",
        cause="one step is too large, or memory grows with the rows processed (outputs kept on the "
        "device), or another process holds the card",
        proof_command="python -m core.run SETTINGS --set data.limit_data_rows=1000  # fits: memory "
        "grows with rows",
        remedy="smaller train.batch_size (train.accumulate_grad_batches keeps the effective one), "
        "teacher.gradient_checkpointing, bf16 weights, teacher.adapter: qlora; stop other users "
        "of the card",
        texts=(r"CUDA out of memory", r"\bOutOfMemoryError\b"),
        general=True,
    ),
    Rule(
        id="D26",
        symptom="NVML_SUCCESS == r INTERNAL ASSERT FAILED",
        cause="out of GPU memory inside a sandbox (gVisor), where the allocator's own report "
        "fails on a hidden NVML (google/gvisor#9700)",
        proof_command='python -c "import torch; print(torch.cuda.mem_get_info())"',
        remedy="as for out of memory: a smaller batch; the text is not a driver fault",
        texts=(r"NVML_SUCCESS == r INTERNAL ASSERT FAILED",),
    ),
    Rule(
        id="D27",
        symptom="bitsandbytes finds no library for this CUDA",
        cause="its wheel holds no library of this CUDA's major version, or BNB_CUDA_VERSION names "
        "one that is not there",
        proof_command="env -u BNB_CUDA_VERSION python -m bitsandbytes",
        remedy="unset BNB_CUDA_VERSION; bitsandbytes 0.50 has CUDA 11.8, 12.1 to 12.8, 13.0, 13.2",
        texts=(
            r"CUDA Setup failed despite",
            r"No compatible \w+ binary found at .*bitsandbytes",
            r"libbitsandbytes_\w+\.so: cannot open shared object",
            r"bitsandbytes native library (functionality|load error)|bitsandbytes library load",
        ),
    ),
    Rule(
        id="D28",
        symptom="a later phase lacks a method or an argument",
        cause="that phase had never run before, so its first run is at the end of a long one",
        proof_command="python -m core.run SETTINGS --fast-dev-run 2  # every phase of every stage",
        remedy="try every phase on two batches before a long run (preflight: always)",
        texts=(
            r"No `\w+\(\)` method defined",
            r"\.__init__\(\) missing",
            r"__init__\(\) missing \d+ required",
        ),
    ),
    Rule(
        id="D29",
        symptom="a Python package is missing, cannot be imported, or lacks a name",
        cause="it is not installed in the interpreter that ran, or in another version",
        proof_command='python -c "import sys, PACKAGE; print(sys.executable, PACKAGE.__file__)"',
        remedy="`pip install -c constraints.txt -e .` with that interpreter",
        texts=(
            r"No module named '?(?!sentencepiece)\w+",
            r"cannot import name",
            r"AttributeError: module '[\w.]+' has no attribute",
        ),
        general=True,
    ),
)
BY_ID = {rule.id: rule for rule in RULES}


def matches(text: str) -> tuple[Match, ...]:
    """Every rule recognised in a log, with the last line it was seen in.

    Exact symptoms come before general ones, then the later line first: in a log of errors that
    follow from each other the last is the one that ended the process.
    """
    lines = text.splitlines()
    found = [match for rule in RULES if (match := _last_match(rule, lines))]
    return tuple(sorted(found, key=lambda match: (match.rule.general, -match.line_number)))


def matching(text: str) -> tuple[Rule, ...]:
    """The rules recognised in a log, most specific first; empty if nothing is known."""
    return tuple(match.rule for match in matches(text))


def _last_match(rule: Rule, lines: Sequence[str]) -> Match | None:
    pattern = _pattern(rule)
    for number in range(len(lines), 0, -1):
        line = lines[number - 1].strip()
        if found := pattern.search(line):
            return Match(rule, number, _around(line, found.start()))
    return None


def _around(line: str, place: int) -> str:
    """A long line cut to the part that tells."""
    begin = max(0, min(place - LINE_WIDTH // 4, len(line) - LINE_WIDTH))
    cut = line[begin : begin + LINE_WIDTH]
    return f"{'…' * (begin > 0)}{cut}{'…' * (begin + LINE_WIDTH < len(line))}"


@functools.cache
def _pattern(rule: Rule) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{text})" for text in rule.texts))

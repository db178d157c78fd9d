"""Made-up but fixed records that show every status and every call; used by several tests."""

import math
import random
import zlib
from typing import Any

from bench.matrix import Cell, Matrix, cells

GIB = 2**30
USERS = 400
STEPS = 24
STAGES = ("teacher_fit", "teacher_test", "teacher_outputs")
FIT, TEST, OUTPUTS = STAGES
BATCH = {FIT: 32, TEST: 64, OUTPUTS: 64}
SECONDS_PER_SAMPLE = {FIT: 0.004, TEST: 0.002, OUTPUTS: 0.0015}
STEPPING = {FIT: "train_steps", TEST: "evaluation", OUTPUTS: "outputs"}
REPEATS = 5

MATRIX = Matrix(
    question="Which setting makes the teacher faster without making it worse?",
    stages=STAGES,
    base={"data": {"limit_data_rows": 10000}},
    axes={
        "train.precision": ["fp32", "bf16-mixed", "fp16-mixed", "bf16-true"],
        "teacher.adapter": ["lora", "qlora"],
        "teacher.attn": ["sdpa", "eager", "flash_attention_2"],
        "train.accumulate_grad_batches": [1, 4, 8],
        "train.num_workers": [0, 2, 4],
        "teacher.inference_batch_size": [64, 256, 512],
        "train.trainer": ["loop", "lightning"],
        "teacher.gradient_checkpointing": [None, True],
        "teacher.lora_r": [8, 16, 32, 64],
        "train.batch_size": [32, 128],
        "train.compile": ["off", "regional", "whole"],
        "machine.image": ["host", "cu118"],
    },
    include=({"train.precision": "bf16-mixed", "teacher.inference_batch_size": 256},),
    repeats=REPEATS,
)

# Time ratios to the baseline by stage; absent = 1.
SPEED = {
    "train.precision=bf16-mixed": {FIT: 0.61, TEST: 0.66, OUTPUTS: 0.65},
    "train.precision=bf16-mixed, teacher.inference_batch_size=256": {
        FIT: 0.61,
        TEST: 0.56,
        OUTPUTS: 0.57,
    },
    "train.precision=fp16-mixed": {FIT: 0.99},
    "teacher.adapter=qlora": {FIT: 1.26, TEST: 1.07, OUTPUTS: 1.08},
    "teacher.attn=eager": {FIT: 1.17, TEST: 1.21, OUTPUTS: 1.2},
    "train.accumulate_grad_batches=4": {FIT: 0.9},
    "train.num_workers=2": {FIT: 1.001, TEST: 0.999},
    "train.trainer=lightning": {FIT: 1.018},
    "teacher.inference_batch_size=256": {TEST: 0.88, OUTPUTS: 0.9},
    "teacher.gradient_checkpointing=true": {FIT: 1.31},
    "teacher.lora_r=16": {FIT: 1.04, TEST: 1.03, OUTPUTS: 1.02},
    "train.compile=regional": {FIT: 0.83, TEST: 1.001, OUTPUTS: 0.93},
}
# Spread between processes: wide for the cell that stays undecided.
SPREAD = {"train.trainer=lightning": 0.02, "train.num_workers=2": 0.002}

# Seconds of compiling in each stage.
COMPILE_S = {FIT: 14.2, TEST: 6.1, OUTPUTS: 5.9}

# How cells end that give no figures: status, stage, phase of a timeout, reason, log.
DEATHS = {
    "train.precision=bf16-true": (
        "oom_host",
        FIT,
        None,
        "SIGKILL, the cgroup's oom_kill counter rose",
        [],
    ),
    "train.batch_size=128": (
        "oom_gpu",
        FIT,
        None,
        "CUDA out of memory | tried to allocate *2.00 GiB*",
        [
            "Traceback (most recent call last):",
            '  File "/srv/someone/ilora-bench/core/loop.py", line 191, in train_step',
            "    loss.backward()",
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        ],
    ),
    "train.accumulate_grad_batches=8": ("killed", FIT, None, "signal 9 from outside", []),
    "train.num_workers=4": (
        "timeout",
        FIT,
        "train_steps",
        "no sign of a next step for 900 s in teacher_fit, train_steps, step 3",
        [],
    ),
    "train.compile=whole": (
        "timeout",
        FIT,
        "compile",
        "over 600 s in phase compile of teacher_fit; so far 3 graphs, 4 breaks",
        ["\x1b[33mW1120 torch/_dynamo\x1b[0m function: forward", "last reason: lengths differ"],
    ),
    "teacher.inference_batch_size=512": (
        "driver",
        TEST,
        None,
        "CUDA error: operation not supported",
        [],
    ),
    "teacher.lora_r=32": (
        "import",
        "start_up",
        None,
        "libcudart.so: undefined symbol _ZN3c10",
        ["ImportError: /srv/site-packages/flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9"],
    ),
    "teacher.lora_r=64": ("silent_exit", FIT, None, "exit 0 without an end record", []),
}
NEVER_STARTED = {
    "teacher.attn=flash_attention_2": ("unsupported", "flash-attn is not installed"),
    "machine.image=cu118": ("skipped", "preflight failed: no container engine"),
}
# One failed repeat each of a cell that is measured otherwise: (block, status, stage, reason).
STUMBLES = {
    "teacher.gradient_checkpointing=true": (1, "bad_output", FIT, "loss is NaN at step 7"),
    "teacher.attn=eager": (3, "error", TEST, "RuntimeError: boom <in> `forward`"),
}


def report_cells() -> list[Cell]:
    """The cells of `MATRIX`, baseline first."""
    return cells(MATRIX, has_gpu=True)


def noise(*words: object) -> random.Random:
    """A generator of its own for every name, equal in every process."""
    return random.Random(zlib.crc32(repr(words).encode()))


def all_records() -> list[dict[str, Any]]:
    """Every record of the synthetic run, in the order a run writes them."""
    found = [
        head(cell, 0, stage, status) | {"repeat": 0, "reason": reason}
        for cell in report_cells()
        if cell.name in NEVER_STARTED
        for stage in STAGES
        for status, reason in [NEVER_STARTED[cell.name]]
    ]
    for block in range(REPEATS):
        for cell in report_cells():
            if cell.name not in NEVER_STARTED:
                found += process_records(cell, block)
    return found


def process_records(cell: Cell, block: int) -> list[dict[str, Any]]:
    """The records of one cell and repeat: whole, or up to its death."""
    status, where, phase, reason, log = DEATHS.get(cell.name, ("ok", "", None, "", []))
    if cell.name in STUMBLES and STUMBLES[cell.name][0] == block:
        _, status, where, reason = STUMBLES[cell.name]
    end = {"reason": reason, "log_tail": log} | ({"phase": phase} if phase else {})
    if where == "start_up":
        return [head(cell, block, where, status) | end]
    found = []
    for stage in STAGES:
        if stage == where:
            found.append(head(cell, block, stage, status) | end)
            break
        found.append(ok_record(cell, block, stage))
    start_up = 4.2 * math.exp(0.02 * noise(cell.name, block, "start-up").gauss(0, 1))
    whole = {"process_wall_s": start_up + math.fsum(record["wall_s"] for record in found)}
    shares = {"start_up": 0.1, "imports": 0.7, "device": 0.1, "between_stages": 0, "tear_down": 0.1}
    whole["process_phases"] = {name: share * start_up for name, share in shares.items()}
    return [record | whole for record in found]


def head(cell: Cell, block: int, stage: str, status: str) -> dict[str, Any]:
    """The fields every record has."""
    return {
        "schema": 1,
        "matrix": "teacher_speed",
        "cell": cell.name,
        "key": cell.key,
        "block": block,
        "repeat": block + 1,
        "stage": stage,
        "status": status,
        "reason": None,
        "wall_s": 0.0,
    }


def ok_record(cell: Cell, block: int, stage: str) -> dict[str, Any]:
    """One measured stage."""
    random_ = noise(cell.name, block, stage)
    shared = 1 + 0.02 * noise(block, stage).gauss(0, 1)
    process = math.exp(SPREAD.get(cell.name, 0.004) * random_.gauss(0, 1))
    ratio = SPEED.get(cell.name, {}).get(stage, 1.0)
    seconds = SECONDS_PER_SAMPLE[stage] * ratio * shared * process
    train, teacher = cell.settings.train, cell.settings.teacher
    batch = BATCH[stage] if stage == FIT else teacher.inference_batch_size
    steps = [
        {
            "seconds": batch
            * seconds
            * (1 + (i < 2) * 64 / batch)
            * math.exp(0.01 * random_.gauss(0, 1)),
            "samples": batch,
            "tokens": batch * 40,
            "padded_tokens": batch * 48,
            "optimizer_step": stage == FIT and (i + 1) % train.accumulate_grad_batches == 0,
        }
        for i in range(STEPS * BATCH[stage] // batch)
    ]
    stepping = math.fsum(step["seconds"] for step in steps)
    phases = {
        "model": 2.0,
        "observed_step": 0.4,
        STEPPING[stage]: stepping,
        "validation" if stage == FIT else "store": 0.3 * stepping,
        "tear_down": 0.01,
        "unaccounted": 0.35 if stage == OUTPUTS else 0.02,
    }
    if train.compile != "off":
        phases["compile"] = COMPILE_S[stage] * process
    return head(cell, block, stage, "ok") | {
        "wall_s": math.fsum(phases.values()),
        "phases": phases,
        "steps": steps,
        "warmup_steps": 2,
        "counts": {
            "micro_batches": len(steps),
            "optimizer_steps": STEPS // train.accumulate_grad_batches if stage == FIT else 0,
            "rows": BATCH[stage] * STEPS,
            "items": 800,
        },
        "memory": memory(cell, stage, random_),
        "loader_wait_s": 0.004 * stepping,
        "facts": facts(cell, stage, phases.get("compile")),
        "losses": losses(cell) if stage == FIT else [],
        "metrics": {"loss": losses(cell)[-1] + 0.001 * noise(cell.name, block).random()},
        "ranks": ranks(cell) if stage == TEST else None,
        "warnings": ["first step 4× slower"] if cell.name == "baseline" and stage == FIT else [],
    }


def memory(cell: Cell, stage: str, random_: random.Random) -> dict[str, Any]:
    """Peaks: half the torch memory under bf16, deterministic but for the host's."""
    small = cell.settings.train.precision == "bf16-mixed"
    allocated = round((2.9 if small else 5.06) * GIB) + (0 if stage == FIT else -GIB)
    if recomputed(cell) and stage == FIT:
        allocated -= round(1.8 * GIB)
    if cell.settings.teacher.adapter == "qlora":
        allocated -= round(2.4 * GIB)
    if cell.settings.teacher.inference_batch_size > 64 and stage != FIT:
        allocated += round(0.7 * GIB)
    allocated += (cell.settings.teacher.lora_r - 8) * 2**19
    return {
        "host_peak_bytes": round((1.9 + 0.02 * random_.random()) * GIB),
        "torch_allocated_peak_bytes": allocated,
        "torch_reserved_peak_bytes": allocated + 300 * 2**20,
        "device_peak_bytes": {"unavailable": "NVML: not supported inside this sandbox"},
    }


def losses(cell: Cell) -> list[float]:
    """A falling trace; the baseline's to the bit where nothing in the arithmetic changed.

    That holds for fp16 too, which fell back without a word.
    """
    changes = ("bf16", "attn", "accumulate", "lora_r", "qlora")
    name = cell.name if any(word in cell.name for word in changes) else "baseline"
    lift = 0.4 if name == "train.accumulate_grad_batches=4" else 0.0
    random_ = noise(name, "loss")
    return [
        round(5.0 + lift + 3.2 * math.exp(-i / 8) + 0.02 * random_.gauss(0, 1), 6)
        for i in range(STEPS)
    ]


def ranks(cell: Cell) -> list[float]:
    """Ranks of the targets: one list for most cells, a worse one for long accumulation."""
    common = noise("ranks")
    found = [float(common.randrange(100)) for _ in range(USERS)]
    if cell.name == "train.accumulate_grad_batches=4":
        return [rank + 6 for rank in found]
    if cell.name == "train.precision=bf16-mixed":
        return [max(rank + shift, 0) for rank, shift in zip(found, shifts(), strict=True)]
    return found


def shifts() -> list[int]:
    """Small moves of ranks in both directions, as rounding makes them."""
    random_ = noise("shifts")
    return [random_.choice((-1, 0, 0, 0, 0, 0, 0, 1)) for _ in range(USERS)]


def recomputed(cell: Cell) -> bool:
    """Whether activations are recomputed: by the setting, or by peft where it is left to it."""
    teacher = cell.settings.teacher
    return bool(teacher.gradient_checkpointing) or teacher.adapter == "qlora"


def facts(cell: Cell, stage: str, compile_s: float | None) -> dict[str, Any]:
    """What a step would show if every setting but fp16-mixed reached the model."""
    train, teacher = cell.settings.train, cell.settings.teacher
    bf16, packed = train.precision == "bf16-mixed", teacher.adapter == "qlora"
    # What stays unpacked is held in float32 by peft's preparation for 4-bit training.
    kept = "bfloat16" if bf16 and not packed else "float32"
    attention = "_softmax" if teacher.attn == "eager" else "scaled_dot_product_attention"
    found: dict[str, Any] = {
        "gemm_dtypes": {"bfloat16": 24, "float32": 1} if bf16 else {"float32": 25},
        "float32_matmul_precision": "highest",
        "attention_ops": {attention: 2},
        "attn_implementation": teacher.attn,
        "autocast_dtype": "bfloat16" if bf16 else None,
        "param_dtypes": {
            "trainable": {"float32": 30},
            "frozen": {kept: 52, "uint8": 8} if packed else {kept: 60},
        },
        "layers_adapted": 4,
        "layers_4bit": 12 if packed else 0,
        "adapted_4bit": 4 if packed else 0,
        "gate_calls": 4,
        "frozen_bytes": (15 if packed else 30 if bf16 else 60) * 2**20,
        "image": "host",
        "loader_workers": train.num_workers,
        "device": "cuda:0",
        "training": stage == FIT,
        "cache": None,
        "compile": compiled(train.compile, compile_s),
    }
    if packed:
        found["quant"] = {
            "quant_type": "nf4",
            "double": False,
            "compute_dtype": "bfloat16" if bf16 else "float32",
        }
    if stage != FIT:
        return found | {"largest_batch": teacher.inference_batch_size}
    by = "setting" if teacher.gradient_checkpointing else "peft" if packed else None
    return found | {
        "largest_train_batch": train.batch_size,
        "checkpoint_calls": {"forward": 1, "after_backward": 2 if recomputed(cell) else 1},
        "gradient_checkpointing_by": by,
        "trainer": train.trainer,
        "lightning_imported": train.trainer == "lightning",
        # Lightning, as a second difference, also left the pinned buffers on.
        "pinned_memory": train.trainer == "lightning",
    }


def compiled(mode: str, seconds: float | None) -> dict[str, Any]:
    """What a stage shows of compilation."""
    if seconds is None:
        return {"mode": "off", "graphs": 0, "breaks": 0, "recompiles": 0, "limit_reached": False}
    return {
        "mode": mode,
        "graphs": 2,
        "breaks": 1,
        "break_reasons": ["data-dependent | branch on `len`"],
        "recompiles": 1,
        "limit_reached": False,
        "seconds": seconds,
        "cache": "cold",
        "compiled_frames": 2,
        "compiled_calls": 24,
        "eager_calls": 0,
    }


MACHINE: dict[str, Any] = {
    "has_gpu": True,
    "gpus": [{"name": "A100-SXM4-80GB", "memory_bytes": 80 * GIB, "capability": [8, 0]}],
    "packages": {"torch": "2.7.1+cu126", "transformers": "5.2.0"},
    "recorded": "2026-11-20T18:15:30+00:00",
    "host": "bench-1",
    "variables": {"TOKENIZERS_PARALLELISM": "false"},
    "command": ["/usr/bin/python3", "-m", "bench.run", "matrices/teacher_speed.yaml"],
    "process": {"torch": "2.7.1+cu126", "torch_cuda": "12.6", "threads": 8, "pid": 4711},
    "warnings": ["load 3.1 on 4 cores: stop other work"],
}

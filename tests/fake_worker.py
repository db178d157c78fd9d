"""A worker without torch that obeys the protocol of bench/README.md, or breaks it in a chosen way.

Start it in place of the real one: `--worker "python tests/fake_worker.py"`. Its figures are a
function of cell, repeat and stage alone, its facts are honest to the settings it was given.

The environment variable FAKE_WORKER steers it, one entry for each cell (`*` = every other cell):

    FAKE_WORKER='{"*": {"sleep_s": 0.01}, "teacher.attn=eager": {"mode": "oom_gpu", "speed": 2.0}}'

    mode       ok (default) | silent_exit | sigkill | oom_gpu | gvisor | import | driver | raise |
               hang | nan_loss | torn | missing_stage | grandchild | failure | crash_at_exit
    repeats    repeats in which the mode applies, default all; the others are ok
    speed      divides every duration, default 1.0
    noise      standard deviation of the durations' logarithm from repeat to repeat, default 0.003
    sleep_s    real seconds spent in each stage, default 0
    facts      facts to replace, e.g. {"gemm_dtypes": {"float32": 120}}
    recall     share of users whose target is ranked among the first ten, default 0.4
    prepare    mode of the set-up process, default ok
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STAGE_SECONDS = {"teacher_fit": 0.4, "teacher_test": 0.1, "teacher_outputs": 0.2}
STEPS, WARMUP_STEPS, USERS = 12, 2, 200
LAYERS = 4
TEXTS = {
    "oom_gpu": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    "gvisor": "RuntimeError: NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp",
    "import": "ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEa",
    "driver": "RuntimeError: CUDA driver error: operation not supported",
    "raise": "ValueError: an ordinary mistake",
}


def main() -> None:
    cell = json.loads(Path(sys.argv[1]).read_text())
    choices = json.loads(os.environ.get("FAKE_WORKER", "{}"))
    choice = choices.get(cell["cell"], choices.get("*", {}))
    mode = choice.get("mode", "ok")
    if cell["prepare"]:
        mode = choice.get("prepare", "ok")
    elif cell["repeat"] not in choice.get("repeats", [cell["repeat"]]):
        mode = "ok"
    with Path(cell["records"]).open("a") as records:
        run(cell, choice, mode, records)


def run(cell: dict[str, Any], choice: dict[str, Any], mode: str, records: Any) -> None:
    write(records, kind="start", time_s=time.time(), pid=os.getpid(), machine=machine_facts())
    if cell["prepare"]:
        misbehave(mode, records)
        shared = Path(cell["shared_artefacts"])
        shared.mkdir(parents=True, exist_ok=True)
        (shared / "prepared").write_text(cell["key"])
    else:
        Path(cell["artefacts"]).mkdir(parents=True, exist_ok=True)
        (Path(cell["artefacts"]) / "weights").write_text(cell["key"])
        last = cell["stages"][-1]
        for stage in cell["stages"]:
            write(records, kind="progress", time_s=time.time(), stage=stage, phase="steps", step=1)
            time.sleep(choice.get("sleep_s", 0))
            if stage == last:
                misbehave(mode, records, stage)
            if not (stage == last and mode == "missing_stage"):
                write(records, kind="stage", **stage_line(cell, stage, choice, mode))
    write(records, kind="end", time_s=time.time())
    if mode == "crash_at_exit":
        os.kill(os.getpid(), signal.SIGSEGV)


def misbehave(mode: str, records: Any, stage: str = "start_up") -> None:
    """Die as asked; modes that only spoil the output return."""
    if mode in TEXTS:
        print("Traceback (most recent call last):\n  File 'model.py', line 1", file=sys.stderr)
        sys.exit(TEXTS[mode])
    if mode == "failure":
        reason = "loss is nan at optimizer step 3"
        line = {"stage": stage, "phase": "backward", "status": "bad_output", "reason": reason}
        write(records, kind="failure", **line)
        sys.exit(1)
    if mode == "silent_exit":
        sys.exit(0)
    if mode == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "hang":
        time.sleep(3600)
    if mode == "torn":
        records.write('{"kind": "stage", "stage": "teach')
        records.flush()
        sys.exit(0)
    if mode == "grandchild":
        # Same process group and a deaf ear, as a data loader worker that outlives its parent.
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", code])
        print(f"grandchild {child.pid}", flush=True)
        sys.exit(0)


def write(records: Any, **line: Any) -> None:
    records.write(json.dumps(line) + "\n")
    records.flush()


def stage_line(
    cell: dict[str, Any], stage: str, choice: dict[str, Any], mode: str
) -> dict[str, Any]:
    """A plausible record of one stage."""
    chance = random.Random(f"{cell['key']} {cell['repeat']} {stage}")
    seconds = STAGE_SECONDS.get(stage, 0.1) / choice.get("speed", 1.0)
    seconds *= pow(2.718281828, chance.gauss(0, choice.get("noise", 0.003)))
    steps = make_steps(cell, stage, seconds, chance)
    stepping_s = sum(step["seconds"] for step in steps)
    phases = {"set_up": 0.1 * stepping_s, "steps": stepping_s, "unaccounted": 0.01 * stepping_s}
    losses = [2.5 - 0.05 * i + chance.random() * 1e-4 for i in range(STEPS)]
    if mode == "nan_loss":
        losses[3] = float("nan")
    ranks = make_ranks(stage, choice.get("recall", 0.4))
    optimizer_steps = sum(step["optimizer_step"] for step in steps)
    return {
        "stage": stage,
        "status": "ok",
        "reason": None,
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "wall_s": sum(phases.values()),
        "phases": phases,
        "steps": steps,
        "warmup_steps": cell["warmup_steps"],
        "counts": {"micro_batches": STEPS, "optimizer_steps": optimizer_steps, "rows": 32 * STEPS},
        "memory": make_memory(cell["settings"], chance),
        "loader_wait_s": 0.01 * stepping_s,
        "facts": honest_facts(cell["settings"], stage, optimizer_steps) | choice.get("facts", {}),
        "losses": losses if stage.endswith("_fit") else [],
        "metrics": make_metrics(ranks) | {"loss": losses[-1] if mode != "nan_loss" else losses[3]},
        "ranks": ranks,
        "warnings": [],
    }


def make_steps(
    cell: dict[str, Any], stage: str, seconds: float, chance: random.Random
) -> list[dict[str, Any]]:
    every = cell["settings"]["train"]["accumulate_grad_batches"]
    return [
        {
            "seconds": seconds / STEPS * (3.0 if i < WARMUP_STEPS else chance.uniform(0.98, 1.02)),
            "samples": 32,
            "tokens": 900,
            "padded_tokens": 1024,
            "optimizer_step": stage.endswith("_fit") and ((i + 1) % every == 0 or i + 1 == STEPS),
        }
        for i in range(STEPS)
    ]


def make_memory(settings: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    reserved = (300 if settings["teacher"]["adapter"] == "qlora" else 900) << 20
    return {
        "host_peak_bytes": (1 << 30) + chance.randrange(1 << 20),
        "torch_allocated_peak_bytes": reserved - (50 << 20) + chance.randrange(1 << 20),
        "torch_reserved_peak_bytes": reserved,
        "device_peak_bytes": {"unavailable": "no GPU"},
    }


def make_ranks(stage: str, recall: float) -> list[float] | None:
    """Ranks of the same users in every cell; a `recall` share of them is below ten."""
    if not stage.endswith("_test"):
        return None
    order = random.Random(stage)
    places = [order.random() for _ in range(USERS)]
    return [
        float(int(place * 20) % 10 if place < recall else 10 + int(place * 500)) for place in places
    ]


def make_metrics(ranks: list[float] | None) -> dict[str, float]:
    if ranks is None:
        return {}
    return {
        "recall@10": sum(rank < 10 for rank in ranks) / len(ranks),
        "ndcg@10": sum(0.69 / (rank + 1) for rank in ranks if rank < 10) / len(ranks),
    }


def honest_facts(settings: dict[str, Any], stage: str, optimizer_steps: int) -> dict[str, Any]:
    """What a live step would show if every setting were in effect."""
    teacher, train, data_type = settings["teacher"], settings["train"], "float32"
    if train["precision"] != "fp32":
        data_type = "float16" if train["precision"] == "fp16-mixed" else "bfloat16"
    mixed = train["precision"].endswith("-mixed")
    fit, frozen = (
        stage.endswith("_fit"),
        "bfloat16" if train["precision"] == "bf16-true" else "float32",
    )
    operator = {
        "eager": "_softmax",
        "sdpa": "scaled_dot_product_attention",
        "flash_attention_2": "flash_attn",
    }[teacher["attn"]]
    every = train["accumulate_grad_batches"]
    facts = {
        "gemm_dtypes": {data_type: 120},
        "attention_ops": {operator: LAYERS},
        "attn_implementation": teacher["attn"],
        "autocast_dtype": data_type if mixed else None,
        "param_dtypes": {"trainable": {"float32": 24}, "frozen": {frozen: 40}},
        "layers_adapted": 2 * LAYERS,
        "layers_4bit": 2 * LAYERS if teacher["adapter"] == "qlora" else 0,
        "frozen_bytes": (60 if teacher["adapter"] == "qlora" else 250) << 20,
        "gate_calls": 2 * LAYERS,
        "saved_bytes": 1 << 24 if fit else 0,
        "operators": 1000,
        "loader_workers": train["num_workers"],
        "trainer": train["trainer"],
        "lightning_imported": train["trainer"] == "lightning",
        "device": "cpu",
        "training": fit,
        "image": settings["machine"]["image"],
        "micro_batches": STEPS,
    }
    if fit:
        after = 2 if teacher["gradient_checkpointing"] else 1
        facts |= {
            "checkpoint_calls": {"forward": 1, "after_backward": after},
            "optimizer_steps": optimizer_steps,
            "accumulate_grad_batches_seen": -(-STEPS // optimizer_steps) if every > 1 else 1,
            "largest_train_batch": train["batch_size"],
        }
    else:
        facts["largest_batch"] = teacher["inference_batch_size"]
    return facts


def machine_facts() -> dict[str, Any]:
    return {
        "python": sys.version.split()[0],
        "torch": "fake",
        "torch_cuda": None,
        "torch_file": None,
        "device": "cpu",
        "gpu": None,
        "threads": 1,
        "versions": {},
    }


if __name__ == "__main__":
    main()

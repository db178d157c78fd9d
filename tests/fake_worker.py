"""A worker without torch that obeys the protocol of bench/README.md, or breaks it in a chosen way.

Start it in place of the real one: `--worker "python tests/fake_worker.py"`. Its figures are a
function of cell, repeat and stage alone, its facts are honest to the settings it was given.

The environment variable FAKE_WORKER steers it, one entry for each cell (`*` = every other cell):

    FAKE_WORKER='{"*": {"sleep_s": 0.01}, "teacher.attn=eager": {"mode": "oom_gpu", "speed": 2.0}}'

    mode       ok (default) | silent_exit | sigkill | sigsegv | oom_gpu | gvisor | import | absent |
               driver | raise | host_memory | eat_memory | fill_disk | hang | endless | compile |
               nan_loss | torn | garbage | missing_stage | grandchild | daemon | stuck |
               failure | crash_at_exit
    repeats    repeats in which the mode applies, default all; the others are ok
    speed      divides every duration, default 1.0
    noise      standard deviation of the durations' logarithm from repeat to repeat, default 0.003
    drift      factor by which durations grow with each measured process of the run, default 1.0
    sleep_s    real seconds spent in each stage, default 0
    facts      facts to replace, e.g. {"gemm_dtypes": {"float32": 120}}
    tags       what disturbed each stage, e.g. ["throttled: power 40 % of the stage"], default none
    tagged     repeats whose first attempt the tags befall, default all attempts of all repeats
    lift       added to every loss, default 0
    recall     share of users whose target is ranked among the first ten, default 0.4
    prepare    mode of the set-up process, default ok
    preflight  mode of the preflight's last process, default ok
    preflight_fit  mode of its first one, where there are two, default ok
    profile    mode of a profile, default ok
    memory_probe  mode of the processes that try batch sizes, default ok
    law        what those need: {"mib": 500, "each_mib": {"train.batch_size": 10}, "cliff": {"from":
               83, "mib": 4000}, "rows": 700}; from a cliff on (of the first setting) so much more,
               and no batch has more than these rows; beyond the room given they die
"""

import importlib
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from itertools import count
from operator import mul
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
SIGNALS = {"sigkill": signal.SIGKILL, "sigsegv": signal.SIGSEGV}
GARBAGE = b'\xff\x00{"kind": [[[\n17\n{"kind": "stage", "stage": []}\n' + b"[" * 100_000 + b"\n"
DEAF = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
if {apart} and os.fork():
    os._exit(0)
print(os.getpid(), flush=True)
time.sleep(600)
"""


def main() -> None:
    cell = json.loads(Path(sys.argv[1]).read_text())
    choices = json.loads(os.environ.get("FAKE_WORKER", "{}"))
    choice = choices.get(cell["cell"], choices.get("*", {}))
    mode = choice.get("mode", "ok")
    if cell["task"] != "measure":
        mode = choice.get(cell["task"].removesuffix("_load"), "ok")
    elif cell["repeat"] not in choice.get("repeats", [cell["repeat"]]):
        mode = "ok"
    with Path(cell["records"]).open("a") as records:
        run(cell, choice, mode, records)


def run(cell: dict[str, Any], choice: dict[str, Any], mode: str, records: Any) -> None:
    own = {"pid": os.getpid(), "session": os.getsid(0)}
    write(records, kind="start", time_s=time.time(), **own, machine=machine_facts())
    if cell["task"] in ("prepare", "memory_set_up"):
        misbehave(mode, records, cell)
        shared = Path(cell["shared_artefacts"])
        shared.mkdir(parents=True, exist_ok=True)
        (shared / "prepared").write_text(cell["key"])
    elif cell["task"] == "profile":
        write_profile(cell, mode, records)
    elif cell["task"] not in ("measure", "memory_probe"):
        stage, saved = cell["stages"][0], Path(cell["artefacts"]) / "saved"
        write(records, kind="progress", time_s=time.time(), stage=stage, phase="reload", step=0)
        misbehave(mode, records, cell, stage)
        if cell["task"] == "preflight_fit":
            saved.write_text(cell["key"])
        elif stage.endswith("_fit") and saved.read_text() != cell["key"]:
            sys.exit("another cell's checkpoint")
    else:
        Path(cell["artefacts"]).mkdir(parents=True, exist_ok=True)
        (Path(cell["artefacts"]) / "weights").write_text(cell["key"])
        last = cell["stages"][-1]
        for stage in cell["stages"]:
            write(records, kind="progress", time_s=time.time(), stage=stage, phase="steps", step=1)
            time.sleep(choice.get("sleep_s", 0))
            if stage == last:
                misbehave(mode, records, cell, stage)
            if not (stage == last and mode == "missing_stage"):
                line = stage_line(cell, stage, choice, mode)
                if cell["task"] == "memory_probe" and "law" in choice:
                    by_law(line, cell, choice["law"])
                write(records, kind="stage", **line)
    write(records, kind="end", time_s=time.time())
    if mode == "crash_at_exit":
        os.kill(os.getpid(), signal.SIGSEGV)


def write_profile(cell: dict[str, Any], mode: str, records: Any) -> None:
    """A profile of every stage; asked to misbehave, it does so after the first."""
    folder = Path(cell["artefacts"]) / "profile"
    folder.mkdir()
    for stage in cell["stages"]:
        write(records, kind="progress", time_s=time.time(), stage=stage, phase="steps", step=1)
        (folder / f"{stage}.trace.json.gz").write_bytes(b"trace")
        (folder / f"{stage}.json").write_text(json.dumps(stage_profile(stage)))
        misbehave(mode, records, cell, stage)


def stage_profile(stage: str) -> dict[str, Any]:
    """A profile of one stage with round figures."""
    probe = {"seconds": 0.1, "issue_s": 0.03, "wait_s": 0.001, "cpu_s": 0.09}
    work = {"samples": 32, "tokens": 900, "padded_tokens": 1000}
    product = {"name": "aten::mm", "seconds": 0.12, "share": 0.4, "calls": 36}
    return {
        "stage": stage,
        "device": "cpu",
        "threads": 1,
        "wall_s": 1.0,
        "probes": [probe | work] * 3,
        "counted": {"flops": 6e9, "bytes": 2e8, "head_flops": 1e8} | work,
        "backbone": {"weights": 10**6, "lora": 10**4, "layers": 2, "width": 128},
        "missing": None,
        "ceilings": {"dtype": "float32", "gemm_flops_per_s": 1e11, "copy_bytes_per_s": 1e10},
        "window": {
            "steps": 3,
            "seconds": 0.3,
            "device_busy": None,
            "operators": [product | {"dtypes": ["float32"]}],
            "memory": {"peak_bytes": 64 << 20, "at_peak": [["aten::mm", 48 << 20, 12]]},
        },
        "files": [f"{stage}.trace.json.gz"],
    }


def misbehave(mode: str, records: Any, cell: dict[str, Any], stage: str = "start_up") -> None:
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
    if mode in SIGNALS:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), SIGNALS[mode])
    if mode in ("absent", "host_memory", "eat_memory", "fill_disk"):
        run_out(mode, Path(cell["artefacts"]))
    if mode == "hang":
        time.sleep(3600)
    if mode in ("endless", "compile"):
        go_on(mode, records, stage)
    if mode == "torn":
        records.write('{"kind": "stage", "stage": "teach')
        records.flush()
        sys.exit(0)
    if mode == "garbage":
        records.buffer.write(GARBAGE)
        records.flush()
    if mode in ("grandchild", "daemon", "stuck"):
        leave_behind(apart=mode != "grandchild")
        if mode == "stuck":
            time.sleep(3600)
        sys.exit(0)


def leave_behind(apart: bool) -> None:
    """Start a process with a deaf ear, as a data loader worker that outlives its parent.

    `apart`: in a session of its own, an orphan from birth, and without the variables by which it
    could be found.
    """
    command = [sys.executable, "-S", "-c", DEAF.format(apart=apart)]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, start_new_session=apart, env={} if apart else None
    )
    assert child.stdout
    print(f"left behind: {child.stdout.readline().decode().strip()}", flush=True)


def go_on(mode: str, records: Any, stage: str) -> None:
    """Never end and always move: in steps, or in the heartbeat of a compile that gets nowhere."""
    line: dict[str, Any] = {"kind": "progress", "stage": stage, "phase": "steps"}
    if mode == "compile":
        line |= {"phase": "compile", "learnt": {"graphs": 1, "breaks": 0, "compile_s": 5.1}}
    for step in count(2):
        number = 0 if mode == "compile" else step
        write(records, **line, time_s=time.time(), step=number)
        time.sleep(0.1)


def run_out(mode: str, private: Path) -> None:
    """Ask for what is not there: a package, memory of the process or the host, room on the disk."""
    if mode == "absent":
        importlib.import_module("a_package_nobody_installed")
    if mode == "host_memory":
        bytearray(1 << 60)
    if mode == "eat_memory":
        held = []
        while True:
            held.append(b"x" * (16 << 20))
    with (private / "weights").open("wb") as file:
        while True:
            file.write(bytes(1 << 16))


def write(records: Any, **line: Any) -> None:
    records.write(json.dumps(line) + "\n")
    records.flush()


def stage_line(
    cell: dict[str, Any], stage: str, choice: dict[str, Any], mode: str
) -> dict[str, Any]:
    """A plausible record of one stage."""
    attempt = cell.get("attempt", 0)
    chance = random.Random(
        f"{cell['key']} {cell['repeat']} {stage}" + f" {attempt}" * bool(attempt)
    )
    seconds = STAGE_SECONDS.get(stage, 0.1) / choice.get("speed", 1.0)
    seconds *= pow(2.718281828, chance.gauss(0, choice.get("noise", 0.003)))
    started = len(list(Path(cell["records"]).parent.glob("*-r*.jsonl")))
    seconds *= choice.get("drift", 1.0) ** started
    steps = make_steps(cell, stage, seconds, chance)
    stepping_s = sum(step["seconds"] for step in steps)
    phases = {"set_up": 0.1 * stepping_s, "steps": stepping_s, "unaccounted": 0.01 * stepping_s}
    lift = choice.get("lift", 0.0)
    losses = [2.5 + lift - 0.05 * i + chance.random() * 1e-4 for i in range(STEPS)]
    befallen = "tagged" not in choice or (cell["repeat"] in choice["tagged"] and not attempt)
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
        "tags": choice.get("tags", []) if befallen else [],
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


def by_law(line: dict[str, Any], cell: dict[str, Any], law: dict[str, Any]) -> None:
    """What a process that tries batch sizes saw and needed; one that needs too much dies."""
    batches = []
    for setting in law["each_mib"]:
        section, name = setting.split(".")
        batches.append(min(cell["settings"][section][name], law.get("rows", 1 << 30)))
    for name in ("largest_batch", "largest_train_batch"):
        if name in line["facts"]:
            line["facts"][name] = min(line["facts"][name], law.get("rows", 1 << 30))
    mib = law["mib"] + sum(map(mul, batches, law["each_mib"].values()))
    cliff = law.get("cliff", {"from": 1 << 30})
    if batches[0] >= cliff["from"]:
        mib += cliff["mib"]
    if mib * (1 << 20) > cell["room_bytes"]:
        sys.exit(f"MemoryError: {mib} MiB wanted")
    line["memory"] = {"host_peak_bytes": int(mib * (1 << 20))}


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
    teacher, train, machine = settings["teacher"], settings["train"], settings["machine"]
    dtype = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}[
        train["precision"].partition("-")[0]
    ]
    mixed = train["precision"].endswith("-mixed")
    packed = teacher["adapter"] == "qlora"
    fit, frozen = stage.endswith("_fit"), {dtype: 32 if packed else 40}
    operator = {
        "eager": "_softmax",
        "sdpa": "scaled_dot_product_attention",
        "flash_attention_2": "flash_attn",
    }[teacher["attn"]]
    every = train["accumulate_grad_batches"]
    facts = {
        "gemm_dtypes": {dtype: 120},
        "float32_matmul_precision": "high" if train["precision"] == "tf32" else "highest",
        "attention_ops": {operator: LAYERS},
        "attn_implementation": teacher["attn"],
        "autocast_dtype": dtype if mixed else None,
        "param_dtypes": {
            "trainable": {"float32": 24},
            "frozen": frozen | ({"uint8": 8} if packed else {}),
        },
        "layers_adapted": 2 * LAYERS,
        "layers_4bit": 2 * LAYERS if packed else 0,
        "frozen_bytes": (60 if packed else 250) << 20,
        "gate_calls": 2 * LAYERS,
        **honest_batch(settings["data"]["batching"], teacher["mode"], dtype),
        "grad_enabled": fit,
        "cache": {"written_bytes": 1 << 20, "read": False} if teacher["use_cache"] else None,
        "compile": honest_compile(train["compile"]),
        "saved_bytes": 1 << 24 if fit else 0,
        "operators": 1000,
        "loader_workers": train["num_workers"],
        "trainer": train["trainer"],
        "lightning_imported": train["trainer"] == "lightning",
        "world_size": train["devices"],
        "backend": "gloo" if train["devices"] != 1 else None,
        "strategy": "DDPStrategy" if train["devices"] != 1 else "SingleDeviceStrategy",
        "device": "cpu",
        "training": fit,
        "image": machine["image"],
        "container": {"id": platform.node(), "engine": None},
        "env": dict(entry.split("=", 1) for entry in machine["env"]),
        "micro_batches": STEPS,
    }
    if packed:
        double = teacher["bnb_4bit_use_double_quant"]
        facts["quant"] = {"quant_type": "nf4", "double": double, "compute_dtype": dtype}
    if not fit:
        return facts | {"largest_batch": teacher["inference_batch_size"]}
    left_to_peft = teacher["gradient_checkpointing"] is None
    by = "setting" if teacher["gradient_checkpointing"] else None
    if left_to_peft and packed:
        by = "peft"
    return facts | {
        "checkpoint_calls": {"forward": 1, "after_backward": 2 if by else 1},
        "gradient_checkpointing_by": by,
        "optimizer_steps": optimizer_steps,
        "accumulate_grad_batches_seen": -(-STEPS // optimizer_steps) if every > 1 else 1,
        "largest_train_batch": train["batch_size"],
    }


def honest_batch(batching: str, mode: str, dtype: str) -> dict[str, Any]:
    """What the observed batch of 32 prompts shows of how it was put together."""
    rows, tokens = 8 if batching == "packed" else 32, 1100
    masked = batching == "packed" or mode == "tail"
    return {
        "inputs_embeds": {"shape": [rows, 1280 // rows, 128], "dtype": dtype},
        "attention_mask": {"shape": [rows, 1, 40, 40], "dtype": "bool"} if masked else None,
        "gate_use": {
            "prompts": 32,
            "answers": 32 if mode == "instance" else 90,
            "tokens": tokens,
            "gates": 32 if mode == "instance" else 90,
            "gated_tokens": 450 if mode == "tail" else tokens,
        },
        "batch_shapes": 1 if batching == "packed" else 4,
        "prompt_batches": 10,
        "length_variance": {"all": 0.2, "inside": 0.01 if batching == "grouped" else 0.19},
    }


def honest_compile(mode: str) -> dict[str, Any]:
    """What a stage shows of compilation."""
    if mode == "off":
        return {"mode": "off", "graphs": 0, "breaks": 0, "recompiles": 0, "limit_reached": False}
    return {
        "mode": mode,
        "graphs": 2,
        "breaks": 0,
        "break_reasons": [],
        "recompiles": 1,
        "limit_reached": False,
        "seconds": 0.5,
        "cache": "cold",
        "compiled_frames": 2,
        "compiled_calls": 2 * STEPS,
        "eager_calls": 0,
    }


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

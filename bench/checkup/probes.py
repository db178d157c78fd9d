"""Questions only a Python with the heavy libraries can answer, each asked in a child process.

`python -m bench.checkup.probes NAME` prints the answer as one JSON line; whatever breaks,
breaks the child alone, and its last words are the answer then.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
"""What a probe said, or `failed` with one line and `log` with all of what the child printed."""


def ask(name: str, limit_s: float) -> Answer:
    """Answer of one probe, asked under this process's own environment."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.checkup.probes", name],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired as expired:
        log = expired.stderr or b""
        text = log.decode(errors="replace") if isinstance(log, bytes) else log
        return {"failed": f"no answer within {limit_s:g} s", "log": text}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        return {"failed": last.strip() or f"exit {done.returncode}", "log": done.stderr}
    answer: Answer = json.loads(lines[-1])
    return answer | {"log": done.stderr}


def torch_facts() -> Answer:
    """What the loaded torch is and what it sees."""
    import torch

    sees = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "file": torch.__file__,
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
        "sees_gpu": sees,
        "capability": list(torch.cuda.get_device_capability()) if sees else None,
    }


def allocator() -> Answer:
    """The settings the CUDA allocator reports once it has given out one tensor."""
    import torch

    torch.zeros(1, device="cuda")
    return {"settings": torch.cuda.memory._snapshot()["allocator_settings"]}


def transformers_facts() -> Answer:
    """Whether transformers accepts the torch beside it."""
    import transformers

    return {
        "version": transformers.__version__,
        "torch_available": transformers.is_torch_available(),
    }


def bitsandbytes_facts() -> Answer:
    """Which native library bitsandbytes loaded, and whether 4-bit layers train on this CPU."""
    import bitsandbytes
    import torch

    library = bitsandbytes.cextension.lib
    found = getattr(getattr(library, "_lib", None), "_name", None)
    on_gpu = torch.cuda.is_available()
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False)
    return {
        "version": bitsandbytes.__version__,
        "library": Path(found).name if found else None,
        "compiled_with_cuda": bool(getattr(library, "compiled_with_cuda", False)),
        "wants_cuda": on_gpu,
        "trains_on_cpu": None if on_gpu else _trains_on_cpu(layer),
    }


def _trains_on_cpu(layer: Any) -> bool:
    """Whether a 4-bit layer gives a gradient after an evaluation, with core.llm's switch set."""
    import torch

    layer = layer.to("cpu")
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False
    rows = torch.ones(2, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.eval()(rows)
    rows.requires_grad_()
    layer.train()(rows).float().sum().backward()
    return rows.grad is not None


def flash_attn_facts() -> Answer:
    """Whether flash-attn and its compiled part can be imported."""
    import flash_attn
    import flash_attn_2_cuda

    return {"version": flash_attn.__version__, "file": flash_attn_2_cuda.__file__}


# ---- isolation: where a GPU error begins ----


def tensor() -> Answer:
    """The first tensor and one product on the device: driver and allocator, no library."""
    import torch

    rows = torch.ones(64, 64, device=_device())
    return {"device": str(rows.device), "value": (rows @ rows).sum().item()}


def backbone() -> Answer:
    """A step through a language model alone."""
    return _step(gated=False)


def gated_backbone() -> Answer:
    """The same with the adapters and the gate."""
    return _step(gated=True)


def _step(gated: bool) -> Answer:
    import torch

    from core import ilora, llm
    from core.settings import TeacherSettings

    settings = TeacherSettings()
    device = torch.device(_device())
    model: Any = llm.load_backbone(settings, "fp32", device, seed=0)
    gate = ilora.RankGate()
    if gated:
        model = ilora.add_adapters(model, settings, gate).to(device)
    embeds_BTH = torch.ones(2, 8, model.config.hidden_size, device=device, requires_grad=True)
    with gate.bound(torch.ones(2 * 8, settings.lora_r, device=device)):
        model(inputs_embeds=embeds_BTH, use_cache=False).last_hidden_state.sum().backward()
    assert embeds_BTH.grad is not None
    return {"device": str(device), "gradient": embeds_BTH.grad.abs().sum().item()}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


PROBES: dict[str, Callable[[], Answer]] = {
    "torch": torch_facts,
    "allocator": allocator,
    "transformers": transformers_facts,
    "bitsandbytes": bitsandbytes_facts,
    "flash_attn": flash_attn_facts,
    "tensor": tensor,
    "backbone": backbone,
    "gated_backbone": gated_backbone,
}
ISOLATION = ("tensor", "backbone", "gated_backbone")
"""From the least to the most; the first that fails names the part at fault."""


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a diagnosis downloads nothing
    print(json.dumps(PROBES[sys.argv[1]](), default=str))

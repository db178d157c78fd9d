"""Last step of an image's build: `python image_smoke.py NAME CUDA` ends with 0 if workers can run.

It looks at what fails late otherwise: a library that is missing or has disabled torch, another
torch than the image's, a 4-bit layer that cannot compute.
"""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "pytorch-lightning", "accelerate")


def main(name: str, cuda: str) -> None:
    import torch

    assert os.environ.get("ILORA_BENCH_IMAGE") == name, "the image does not say its name"
    assert str(torch.version.cuda) == cuda, (
        f"torch {torch.__version__} has CUDA {torch.version.cuda}"
    )
    one_environment(Path(torch.__file__))
    every_library()
    four_bit_layer()
    for words in (["core.run", "--help"], ["bench.run", "matrices/smoke.yaml", "--plan"]):
        subprocess.run(
            [sys.executable, "-m", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
    print(name, *(f"{package}=={version(package)}" for package in PACKAGES))


def one_environment(torch_file: Path) -> None:
    """The interpreter on the path is no virtual environment, and torch lies in its own folder."""
    assert sys.prefix == sys.base_prefix, f"{sys.prefix} is a second environment"
    assert torch_file.is_relative_to(sys.prefix), f"{torch_file} is not the image's torch"


def every_library() -> None:
    """Import what the workers import; transformers disables a torch too old with one warning."""
    import accelerate  # noqa: F401
    import pytorch_lightning  # noqa: F401
    from transformers.utils import is_torch_available

    sys.path.insert(0, str(ROOT))
    from core import lightning, llm, pipeline  # noqa: F401

    assert is_torch_available(), "transformers has disabled this torch: it is below its minimum"


def four_bit_layer() -> None:
    """Forward and backward of one NF4 layer on the CPU."""
    import bitsandbytes
    import torch

    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    rows = torch.ones(2, 64, requires_grad=True)
    layer.to("cpu")(rows).sum().backward()
    assert rows.grad is not None, "no gradient through a 4-bit layer"
    assert rows.grad.isfinite().all(), "the gradient through a 4-bit layer is not finite"


if __name__ == "__main__":
    main(*sys.argv[1:])

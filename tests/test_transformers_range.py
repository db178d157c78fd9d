"""The oldest and the newest transformers of the images: one code, and checkpoints of both.

`make test-oldest` runs this, and the tests of everything near transformers, with the oldest on the
path. The version under test is the one this process imports; the other runs in a child.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny
import torch
import transformers

from core import checkpoints

ROOT = Path(__file__).resolve().parent.parent
OLDEST = "5.19.0"
"""Of Dockerfile.cu121: later versions refuse that image's torch."""
BASES = [("tiny", "lora"), ("tiny-llama", "lora"), ("tiny-qwen2", "qlora")]
ROWS = [1, 3, 5, 7]


def pins(path: str) -> set[str]:
    return set(re.findall(r"\btransformers==([\d.]+\d)", (ROOT / path).read_text()))


def test_the_oldest_is_that_of_the_images_and_the_newest_that_of_the_tests() -> None:
    assert pins("Dockerfile.cu121") == {OLDEST}
    assert pins("Dockerfile.cu118") == pins("constraints.txt") != {OLDEST}
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"transformers>={OLDEST.rpartition('.')[0]}" in needs


def write(folder: Path) -> None:
    """A checkpoint of every base, and what its teacher says of a few rows."""
    for name, adapter in BASES:
        given = tiny.settings(llm_model_name=name, adapter=adapter)
        model = tiny.teacher(given)
        checkpoints.save_teacher(model, folder / name)
        torch.save(said(model, given), folder / name / "scores.pt")


@torch.no_grad()
def said(model, given) -> torch.Tensor:
    return model.scores(model.read_out(tiny.batch(model, given, ROWS)))


@pytest.mark.skipif(
    transformers.__version__ != OLDEST,
    reason=f"transformers {transformers.__version__}; `make test-oldest` brings {OLDEST}",
)
@pytest.mark.parametrize("writer", ["newest", "oldest"])
def test_a_checkpoint_of_one_version_is_read_by_the_other(tmp_path: Path, writer: str) -> None:
    code = (
        f"import sys; from pathlib import Path; sys.path.insert(0, {str(ROOT / 'tests')!r});"
        "import test_transformers_range as here, torch, transformers; torch.set_num_threads(1);"
        "print(transformers.__version__);"
    )
    child = code + f"here.{'write' if writer == 'newest' else 'read'}(Path({str(tmp_path)!r}))"
    newest = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if writer == "oldest":
        write(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", child], env=newest, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in pins("constraints.txt")
    if writer == "newest":
        read(tmp_path)


def read(folder: Path) -> None:
    """Load every checkpoint into a fresh teacher and compare what it says."""
    for name, adapter in BASES:
        given = tiny.settings(llm_model_name=name, adapter=adapter)
        model = tiny.teacher(given, active=False)
        checkpoints.load_teacher(model, folder / name)
        assert torch.equal(said(model, given), torch.load(folder / name / "scores.pt")), name

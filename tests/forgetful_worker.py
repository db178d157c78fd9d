"""The real worker, except that the teacher's checkpoints of chosen cells do not keep what they got.

`FORGETFUL_WORKER='{"train.lr=0.002": "drops_a_key"}'` names cells and ways; others are healthy.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from bench import worker

honest = worker.work


def drops_a_key() -> None:
    """One adapter matrix never reaches the file."""
    from safetensors.torch import load_file, save_file

    from core import checkpoints

    whole = checkpoints.save_teacher

    def save(teacher: Any, folder: Path) -> None:
        whole(teacher, folder)
        kept = load_file(folder / "adapter_model.safetensors")
        del kept[min(kept)]
        save_file(kept, folder / "adapter_model.safetensors")

    checkpoints.save_teacher = save


def loads_other_numbers() -> None:
    """All keys are there, and one projection comes back a little larger."""
    from core import checkpoints

    whole = checkpoints.load_teacher

    def load(teacher: Any, folder: Path) -> None:
        whole(teacher, folder)
        teacher.projector[0].weight.data.mul_(1.1)

    checkpoints.load_teacher = load


def work(cell: dict[str, Any], lines: worker.Lines) -> None:
    """Forget as told, and work."""
    if way := json.loads(os.environ["FORGETFUL_WORKER"]).get(cell["cell"]):
        globals()[way]()
    honest(cell, lines)


if __name__ == "__main__":
    worker.work = work
    sys.exit(worker.main())

"""The real worker, except that a cell's order does not reach it: what runs is another setting.

`DEAF_WORKER='{"train.precision": "fp32"}'` runs every measured process at fp32 whatever its cell
asks for, the way a switch that was never wired up would.
"""

import json
import os
import sys
from typing import Any

from bench import worker

honest = worker.work


def work(cell: dict[str, Any], lines: worker.Lines) -> None:
    """Replace the settings that are not listened to, and work."""
    if cell["task"] == "measure":
        for name, value in json.loads(os.environ["DEAF_WORKER"]).items():
            section, leaf = name.split(".")
            cell["settings"][section][leaf] = value
    honest(cell, lines)


if __name__ == "__main__":
    worker.work = work
    sys.exit(worker.main())

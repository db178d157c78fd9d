"""Environment variables of a configuration: there at the start, or the command starts anew."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core import variables
from core.settings import MachineSettings

ROOT = Path(__file__).resolve().parent.parent


def test_both_settings_give_variables() -> None:
    machine = MachineSettings(env=("A=1=2", "B="), allocator_conf="expandable_segments:True")
    assert variables.variables(machine) == {
        "A": "1=2",
        "B": "",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    assert variables.variables(MachineSettings()) == {}


@pytest.mark.parametrize("entry", ["A", "=1", "1A=2", "A B=1"])
def test_an_entry_is_a_name_and_a_value(entry: str) -> None:
    with pytest.raises(ValueError, match="is not NAME=value"):
        MachineSettings(env=(entry,))


def test_a_variable_is_given_once() -> None:
    with pytest.raises(ValueError, match="A is given twice"):
        MachineSettings(env=("A=1", "A=2"))
    with pytest.raises(ValueError, match="PYTORCH_CUDA_ALLOC_CONF is given twice"):
        MachineSettings(env=("PYTORCH_CUDA_ALLOC_CONF=x",), allocator_conf="y")


PROGRAM = """
import os, sys
print("begin", flush=True)
from core.settings import MachineSettings
from core.variables import start_again_with
start_again_with(MachineSettings(env=("ASKED=1",)))
print(os.environ["ASKED"], *sys.argv[1:])
"""


@pytest.mark.parametrize(("before", "begins"), [(None, 2), ("0", 2), ("1", 1)])
def test_a_command_starts_again_only_where_a_variable_is_missing(
    before: str | None, begins: int, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    given = {"PYTHONPATH": str(ROOT)} | ({} if before is None else {"ASKED": before})
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), "a word", "--b"],
        env={k: v for k, v in os.environ.items() if k != "ASKED"} | given,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["begin"] * begins + ["1 a word --b"]

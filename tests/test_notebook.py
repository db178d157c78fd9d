"""The notebook for machines without containers, executed from its first cell to its last."""

import os
import sysconfig
import venv
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "matrices" / "without_containers.ipynb"
SMALL = """\
SETTINGS = '''
data: {limit_data_rows: 300, synthetic: {users: 60, items: 48}}
student.max_epochs: 1
train: {max_epochs: 1, max_steps: 2}
distill.max_epochs: 1
machine.threads: 1
'''
MATRIX = "small.yaml"
"""
MATRIX = """\
question: Does the notebook measure?
stages: [teacher_test]
repeats: 1
preflight: never
axes:
  teacher.inference_batch_size: [4, 8]
base:
  data: {limit_data_rows: 300, synthetic: {users: 60, items: 48}}
  student.max_epochs: 1
  train: {max_epochs: 1, max_steps: 2}
"""


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nbformat.NotebookNode:
    """The shipped notebook with its parameters made small, in a folder like the repository."""
    for name in ("core", "bench", "matrices", "pyproject.toml", "README.md", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "small.yaml").write_text(MATRIX)
    monkeypatch.chdir(tmp_path)
    # Its first command installs: into an environment of its own that finds the packages of this.
    own = tmp_path / "environment"
    venv.create(own, symlinks=True, with_pip=True)
    (packages,) = own.glob("lib/*/site-packages")
    (packages / "these.pth").write_text(sysconfig.get_path("purelib"))
    monkeypatch.setenv("PATH", f"{own / 'bin'}{os.pathsep}{os.environ['PATH']}")
    found = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in found.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = SMALL
    return found


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(notebook: nbformat.NotebookNode, tmp_path: Path) -> None:
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=tmp_path)
    assert list(tmp_path.glob("runs/*/settings.yaml"))
    shown = notebook.cells[-1].outputs[0]["data"]["text/markdown"]
    assert "Does the notebook measure?" in shown


@pytest.mark.slow
def test_a_failing_command_stops_the_notebook(
    notebook: nbformat.NotebookNode, tmp_path: Path
) -> None:
    notebook.cells = [cell for cell in notebook.cells if "installed-torch" not in cell.source]
    (parameters,) = [
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])
    ]
    parameters.source = parameters.source.replace("student.", "studend.")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="studend"):
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=tmp_path)


def test_the_notebook_is_shipped_clean() -> None:
    """No outputs, no counts: what a reader sees is what the repository says."""
    found = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in found.cells if cell.cell_type == "code"]
    assert len(code) > 6
    assert all(not cell.outputs and cell.execution_count is None for cell in code)

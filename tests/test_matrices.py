"""The shipped matrices ask a question and plan; the reference and the schemas are complete."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.matrix import Matrix, cells, load_matrix
from bench.schemas import write_schemas
from core.config import leaves
from core.settings import Settings

FOLDER = Path(__file__).parents[1] / "matrices"
SHIPPED = sorted(FOLDER.glob("*.yaml"))
FOR_A_GPU = sorted((FOLDER / "gpu").glob("*.yaml"))
USERS_AXES = [
    "train.precision",
    "teacher.adapter",
    "teacher.attn",
    "teacher.inference_batch_size",
    "train.num_workers",
    "train.accumulate_grad_batches",
    "machine.image",
]


def dotted(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            dotted(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
        )
    return found


def missing_from_reference(text: str) -> set[str]:
    """Keys of a matrix and leaves of the settings that `text` does not show."""
    shown = yaml.safe_load(text)
    return (set(Matrix.model_fields) - set(shown)) | (
        set(leaves(Settings)) - set(dotted(shown["base"]))
    )


def test_the_matrices_are_found() -> None:
    assert {"teacher_speed", "smoke", "full_pipeline", "reference"} <= {
        path.stem for path in SHIPPED
    }


@pytest.mark.parametrize("path", [*SHIPPED, *FOR_A_GPU], ids=lambda path: path.stem)
def test_every_shipped_matrix_asks_a_question_and_plans(path: Path) -> None:
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ")
    assert "?" in first
    above = "../" if path in FOR_A_GPU else ""
    assert second == f"# yaml-language-server: $schema={above}matrix.schema.json"
    matrix = load_matrix(path)
    assert matrix.question.endswith("?")
    for has_gpu in (True, False):
        planned = cells(matrix, has_gpu)
        assert planned[0].name == "baseline"
        assert len(planned) > 1 or path.stem == "pipeline"  # measures one, for its stages


def test_teacher_speed_sweeps_the_users_axes() -> None:
    matrix = load_matrix(FOLDER / "teacher_speed.yaml")
    assert list(matrix.axes) == USERS_AXES
    assert matrix.stages == ("teacher_fit", "teacher_test", "teacher_outputs")
    on_gpu, on_cpu = (cells(matrix, has_gpu)[0].settings for has_gpu in (True, False))
    assert (on_gpu.teacher.llm_model_name, on_gpu.train.batch_size) == ("opt-125m", 64)
    assert on_gpu.data.limit_data_rows == 10_000
    assert (on_cpu.teacher.llm_model_name, on_cpu.train.batch_size) == ("tiny", 16)
    assert len(cells(matrix, True)) == 12


def test_full_pipeline_measures_every_stage() -> None:
    stages = Matrix.model_json_schema()["properties"]["stages"]["items"]["enum"]
    assert list(load_matrix(FOLDER / "full_pipeline.yaml").stages) == stages


@pytest.mark.parametrize("has_gpu", [True, False])
def test_smoke_is_small_and_cannot_reach_a_verdict(has_gpu: bool) -> None:
    matrix = load_matrix(FOLDER / "smoke.yaml")
    assert len(cells(matrix, has_gpu)) * matrix.repeats <= 6
    assert matrix.repeats < 4


def test_the_reference_shows_every_key_at_its_default() -> None:
    text = (FOLDER / "reference.yaml").read_text()
    assert missing_from_reference(text) == set()
    matrix = load_matrix(FOLDER / "reference.yaml")
    assert matrix.base == Settings()
    required = {"question", "stages"}
    shown_by_example = {"axes", "base", "without_gpu"}
    for name, info in Matrix.model_fields.items():
        if name not in required | shown_by_example:
            assert getattr(matrix, name) == info.default, name


@pytest.mark.parametrize("line", ["    patience: 5", "    mean_length: 13", "floor: 0.02"])
def test_a_key_missing_from_the_reference_is_noticed(line: str) -> None:
    lines = (FOLDER / "reference.yaml").read_text().splitlines()
    found = next(
        number for number, text in enumerate(lines) if text.strip().startswith(line.strip())
    )
    assert missing_from_reference("\n".join(lines[:found] + lines[found + 1 :]))


def test_the_reference_comments_every_setting() -> None:
    lines = (FOLDER / "reference.yaml").read_text().splitlines()
    base = lines[lines.index("base:") + 1 :]
    groups = (
        "data:",
        "synthetic:",
        "teacher:",
        "eval:",
        "machine:",
        "student:",
        "train:",
        "distill:",
    )
    bare = [line for line in base if "#" not in line and not line.strip().startswith(groups)]
    assert bare == []


def test_the_committed_schemas_are_current(tmp_path: Path) -> None:
    write_schemas(tmp_path)
    for name in ("matrix.schema.json", "settings.schema.json"):
        again = "is not current: run python -m bench.schemas"
        assert (FOLDER / name).read_text() == (tmp_path / name).read_text(), f"{name} {again}"


def test_the_matrix_schema_offers_leaves_and_unique_short_names() -> None:
    document = json.loads((FOLDER / "matrix.schema.json").read_text())
    axes = document["$defs"]["Axes"]["properties"]
    assert set(leaves(Settings)) <= set(axes)
    assert "attn" in axes
    assert "batch_size" not in axes
    target: Any = document
    for part in axes["attn"]["items"]["$ref"].removeprefix("#/").split("/"):
        target = target[part]
    assert target["enum"] == ["eager", "sdpa", "flash_attention_2"]

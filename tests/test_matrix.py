"""Matrix files to cells and to an order of execution."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.matrix import Matrix, cells, load_matrix, resolved, schedule
from core.config import InputError
from core.settings import Settings

HEAD = "question: q\nstages: [teacher_fit]\n"

BAD_FILES = {
    "four different mistakes": (
        "question: q\nstages: [teacher_fit]\nrepeats: five\n"
        "axes:\n  train.percision: [fp32, bf16-mixed]\n  teacher.attn: [sdpa, flash]\n"
        "repeets: 4\nrepeats: 3\n",
        [
            "3:10: repeats: 'five' is not a whole number",
            "5:3: axes.train.percision: no such setting (did you mean train.precision?)",
            "6:24: axes.teacher.attn[1]: 'flash' is not one of eager, sdpa, flash_attention_2",
            "7:1: repeets: no such setting (did you mean repeats?)",
            "8:1: repeats: given twice (first in line 3)",
        ],
    ),
    "required keys": (
        "axes: {}\n",
        [
            "1:1: question: is missing; it must be given",
            "1:1: stages: is missing; it must be given",
        ],
    ),
    "empty question": (
        "question: ''\nstages: [teacher_fit]\n",
        ["1:11: question: '' is empty; something must be given"],
    ),
    "no stage": (
        "question: q\nstages: []\n",
        ["2:9: stages: a list is empty; something must be given"],
    ),
    "stage order": (
        "question: q\nstages: [teacher_test, teacher_fit]\n",
        [
            "2:24: stages[1]: teacher_fit runs before teacher_test; "
            "list each stage once, in running order"
        ],
    ),
    "stage twice": (
        "question: q\nstages: [teacher_fit, teacher_fit]\n",
        ["2:23: stages[1]: teacher_fit is given twice"],
    ),
    "setting at the top": (
        HEAD + "train: {lr: 1}\n",
        ["3:1: train: no such setting (did you mean base.train?)"],
    ),
    "base": (
        HEAD + "base:\n  train.batch_size: 64.5\n  teacher: {limit_data_rows: 4}\n",
        [
            "4:21: base.train.batch_size: '64.5' is not a whole number",
            "5:13: base.teacher.limit_data_rows: no such setting "
            "(did you mean base.data.limit_data_rows?)",
        ],
    ),
    "refused base": (
        HEAD + "base: {teacher.lora_r: 6}\n",
        [
            "3:24: base.teacher: lora_r 6 is not a multiple of num_experts 4: "
            "each expert owns lora_r / num_experts rank slices"
        ],
    ),
    "refused star cell": (
        HEAD + "axes: {teacher.lora_r: [8, 6]}\n",
        [
            "3:28: axes.teacher.lora_r[1]: lora_r 6 is not a multiple of num_experts 4: "
            "each expert owns lora_r / num_experts rank slices"
        ],
    ),
    "refused first value": (
        HEAD + "axes: {lora_r: [6, 8]}\n",
        [
            "3:17: axes.teacher.lora_r[0]: lora_r 6 is not a multiple of num_experts 4: "
            "each expert owns lora_r / num_experts rank slices"
        ],
    ),
    "refused grid cell": (
        HEAD + "design: grid\naxes:\n  teacher.lora_r: [12, 6]\n  teacher.num_experts: [3, 4]\n",
        [
            "5:24: axes.teacher.lora_r[1]: lora_r 6 is not a multiple of num_experts 4: "
            "each expert owns lora_r / num_experts rank slices"
        ],
    ),
    "refused include": (
        HEAD + "axes: {teacher.lora_r: [8]}\ninclude: [{lora_r: 6}]\n",
        [
            "4:20: include[0].teacher.lora_r: lora_r 6 is not a multiple of num_experts 4: "
            "each expert owns lora_r / num_experts rank slices"
        ],
    ),
    "refused without a GPU": (
        HEAD + "without_gpu:\n  base: {teacher.num_experts: 3}\n",
        [
            "4:31: without_gpu.base.teacher.num_experts: lora_r 8 is not a multiple of "
            "num_experts 3: each expert owns lora_r / num_experts rank slices"
        ],
    ),
    "ambiguous short name": (
        HEAD + "axes: {hidden_size: [1], lr: [1, 2]}\n",
        ["3:26: axes.lr: fits 3 settings; write one of student.lr, train.lr, distill.lr"],
    ),
    "axis twice": (
        HEAD + "axes:\n  teacher.attn: [sdpa]\n  attn: [eager]\n",
        ["5:3: axes.attn: teacher.attn is given twice"],
    ),
    "axis value twice": (
        HEAD + "axes: {train.lr: [1e-3, 0.001]}\n",
        ["3:25: axes.train.lr[1]: 0.001 is already a value of this axis"],
    ),
    "axis without values": (
        HEAD + "axes: {train.lr: []}\n",
        ["3:18: axes.train.lr: a list is empty; something must be given"],
    ),
    "one value is no list": (
        HEAD + "axes: {train.lr: 1}\n",
        ["3:18: axes.train.lr: '1' is not a list"],
    ),
    "group as an axis": (
        HEAD + "axes: {train: [1]}\n",
        ["3:8: axes.train: is a group of settings; name one of them"],
    ),
    "axes as a list": (HEAD + "axes: [train.lr]\n", ["3:7: axes: a list is not a mapping"]),
    "exclude no axis": (
        HEAD + "axes: {attn: [sdpa, eager]}\nexclude: [{train.precision: fp32}]\n",
        ["4:12: exclude[0].train.precision: train.precision is not an axis of this matrix"],
    ),
    "exclude no value": (
        HEAD + "axes: {attn: [sdpa, eager]}\nexclude:\n  - attn: flash_attention_2\n",
        [
            "5:11: exclude[0].teacher.attn: flash_attention_2 is not a value of this axis "
            "(sdpa, eager)"
        ],
    ),
    "exclude the baseline": (
        HEAD + "axes: {attn: [sdpa, eager]}\nexclude:\n  - attn: sdpa\n",
        ["5:5: exclude[0]: removes the baseline, the cell all others are compared with"],
    ),
    "include nothing": (
        HEAD + "include: [{}]\n",
        ["3:11: include[0]: a mapping is empty; something must be given"],
    ),
    "include a cell twice": (
        HEAD + "axes: {attn: [sdpa]}\ninclude:\n  - attn: eager\n  - attn: eager\n",
        ["6:11: include[1].teacher.attn: has the settings of the cell teacher.attn=eager"],
    ),
    "include of a wrong type": (
        HEAD + "include:\n  - train.lr: fast\n",
        ["4:15: include[0].train.lr: 'fast' is not a number"],
    ),
    "axis only without a GPU": (
        HEAD + "axes: {attn: [sdpa]}\nwithout_gpu: {axes: {train.lr: [1]}}\n",
        ["4:22: without_gpu.axes.train.lr: train.lr is not an axis of this matrix"],
    ),
    "unknown key without a GPU": (
        HEAD + "without_gpu: {bases: {}}\n",
        ["3:15: without_gpu.bases: no such setting (did you mean without_gpu.base?)"],
    ),
    "limits": (
        HEAD + "floor: 1\nwarmup_steps: -1\ntimeout_s: 0\nrepeats: 0\ndesign: random\n",
        [
            "3:8: floor: '1' is not less than 1",
            "4:15: warmup_steps: '-1' is less than 0",
            "5:12: timeout_s: '0' is not more than 0",
            "6:10: repeats: '0' is less than 1",
            "7:9: design: 'random' is not one of star, grid",
        ],
    ),
}


def write(folder: Path, text: str) -> Path:
    path = folder / "matrix.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def matrix_of(**fields: Any) -> Matrix:
    return Matrix(**{"question": "q", "stages": ("teacher_fit",), **fields})


def names(matrix: Matrix, has_gpu: bool = True) -> list[str]:
    return [cell.name for cell in cells(matrix, has_gpu)]


@pytest.mark.parametrize("name", BAD_FILES)
def test_every_mistake_is_named_at_its_place(name: str, tmp_path: Path) -> None:
    text, wanted = BAD_FILES[name]
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_matrix(path)
    assert caught.value.messages == [f"{path}:{line}" for line in wanted]


def test_star_changes_one_axis_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "axes:\n  train.lr: [1e-3, 2]\n  attn: [sdpa, eager]\n  train.num_workers: [0, 1, 2]\n"
    matrix = load_matrix(write(tmp_path, HEAD + text))
    planned = cells(matrix, has_gpu=True)
    assert [cell.name for cell in planned] == [
        "baseline",
        "train.lr=2.0",
        "teacher.attn=eager",
        "train.num_workers=1",
        "train.num_workers=2",
    ]
    assert [cell.changed for cell in planned][2] == {"teacher.attn": "eager"}
    assert planned[0].settings.train.lr == 1e-3
    assert planned[2].settings.teacher.attn == "eager"
    assert planned[2].settings.train.lr == 1e-3


def test_grid_combines_every_value() -> None:
    axes = {"train.precision": ["fp32", "bf16-mixed"], "attn": ["sdpa", "eager"]}
    assert names(matrix_of(axes=axes, design="grid")) == [
        "baseline",
        "teacher.attn=eager",
        "train.precision=bf16-mixed",
        "train.precision=bf16-mixed, teacher.attn=eager",
    ]


def test_without_axes_the_base_alone_is_measured() -> None:
    assert names(matrix_of()) == ["baseline"]


def test_exclude_removes_what_it_matches_in_whole() -> None:
    axes = {"train.precision": ["fp32", "bf16-mixed"], "attn": ["sdpa", "eager"]}
    exclude = [{"train": {"precision": "bf16-mixed"}, "attn": "eager"}]
    assert names(matrix_of(axes=axes, design="grid", exclude=exclude)) == [
        "baseline",
        "teacher.attn=eager",
        "train.precision=bf16-mixed",
    ]


def test_include_means_what_github_actions_documents() -> None:
    """The example of the GitHub documentation: fruit = attn, animal = precision.

    color = lora_dropout (green 0.1, pink 0.2), shape = lora_alpha, banana = flash_attention_2.
    """
    matrix = matrix_of(
        design="grid",
        axes={
            "teacher.attn": ["sdpa", "eager"],
            "train.precision": ["fp32", "bf16-mixed"],
        },
        include=[
            {"lora_dropout": 0.1},
            {"lora_dropout": 0.2, "train.precision": "fp32"},
            {"teacher.attn": "sdpa", "lora_alpha": 7},
            {"teacher.attn": "flash_attention_2"},
            {"teacher.attn": "flash_attention_2", "train.precision": "bf16-mixed"},
        ],
    )
    found = [
        (one.teacher.attn, one.train.precision, one.teacher.lora_dropout, one.teacher.lora_alpha)
        for one in (cell.settings for cell in cells(matrix, has_gpu=True))
    ]
    assert found == [
        ("sdpa", "fp32", 0.2, 7),
        ("sdpa", "bf16-mixed", 0.1, 7),
        ("eager", "fp32", 0.2, 32),
        ("eager", "bf16-mixed", 0.1, 32),
        ("flash_attention_2", "fp32", 0, 32),
        ("flash_attention_2", "bf16-mixed", 0, 32),
    ]
    assert names(matrix)[1] == "train.precision=bf16-mixed, teacher.lora_dropout=0.1"


def test_include_adds_a_combination_to_a_star() -> None:
    axes = {"train.precision": ["fp32", "bf16-mixed"], "attn": ["sdpa", "eager"]}
    include = [{"train.precision": "bf16-mixed", "attn": "eager"}]
    matrix = matrix_of(axes=axes, include=include)
    assert names(matrix)[-1] == "train.precision=bf16-mixed, teacher.attn=eager"
    assert len(names(matrix)) == 4


def test_without_gpu_replaces_leaves_and_axis_values() -> None:
    matrix = matrix_of(
        base={"train.batch_size": 64, "train": {"lr": 1}},
        axes={"num_workers": [0, 4], "inference_batch_size": [64, 256, 1024]},
        without_gpu={"base": {"train.batch_size": 16}, "axes": {"inference_batch_size": [16, 32]}},
    )
    assert [cell.settings.train.batch_size for cell in cells(matrix, True)] == [64] * 4
    assert [cell.settings.train.batch_size for cell in cells(matrix, False)] == [16] * 3
    assert names(matrix, False) == [
        "baseline",
        "train.num_workers=4",
        "teacher.inference_batch_size=32",
    ]
    assert cells(matrix, False)[0].settings.teacher.inference_batch_size == 16
    assert cells(matrix, False)[0].settings.train.lr == 1


def test_values_are_named_as_yaml_shows_them() -> None:
    axes = {
        "distill_decay_steps": [5, None],
        "mask_seen": [True, False],
        "target_modules": [["q_proj"], ["q_proj", "k_proj"]],
    }
    assert names(matrix_of(axes=axes))[1:] == [
        "teacher.distill_decay_steps=null",
        "eval.mask_seen=false",
        "teacher.target_modules=[q_proj, k_proj]",
    ]


def test_the_key_is_the_content_of_the_settings() -> None:
    first, second = (
        cells(matrix_of(base=base), True)[0]
        for base in ({"train": {"lr": 1, "patience": 3}}, {"train.patience": 3, "train.lr": 1.0})
    )
    assert first.key == second.key
    assert len(first.key) == 16
    assert cells(matrix_of(base={"train.lr": 2}), True)[0].key != first.key


# ---- the command line

FILE = (
    HEAD
    + "base: {train.batch_size: 64, train.lr: 1}\n"
    + "axes: {attn: [sdpa, eager], num_workers: [0, 4]}\n"
    + "without_gpu: {base: {train.batch_size: 16, train.lr: 2}, axes: {num_workers: [0, 2]}}\n"
)


def test_an_option_addresses_the_base_or_the_matrix(tmp_path: Path) -> None:
    sets = ["train.batch_size=8", "repeats=3", "axes.train.num_workers=[0, 1]", "seed=4"]
    text = FILE.replace("num_workers", "train.num_workers")
    matrix = load_matrix(write(tmp_path, text), sets)
    assert matrix.repeats == 3
    for has_gpu in (True, False):
        baseline = cells(matrix, has_gpu)[0].settings
        assert (baseline.train.batch_size, baseline.seed) == (8, 4)
        assert matrix.axes["train.num_workers"] == (0, 1)
        assert names(matrix, has_gpu)[-1] == "train.num_workers=1"
    assert cells(matrix, False)[0].settings.train.lr == 2


def test_an_option_on_an_axis_is_refused_because_it_would_do_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_matrix(write(tmp_path, FILE), ["teacher.attn=eager"])
    assert str(caught.value) == (
        "--set teacher.attn=eager: teacher.attn is an axis of this matrix, so every cell has its "
        "own value; write --set axes.teacher.attn=[…]"
    )
    with pytest.raises(InputError, match=r"teacher\.attn is an axis of this matrix"):
        load_matrix(write(tmp_path, FILE), ["teacher={attn: eager, lora_r: 4}"])


def test_a_wrong_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_matrix(write(tmp_path, FILE), ["train.percision=fp32", "repeats=x"])
    assert caught.value.messages == [
        "--set repeats=x: repeats: 'x' is not a whole number",
        "--set train.percision=fp32: base.train.percision: no such setting "
        "(did you mean base.train.precision?)",
    ]


def test_a_base_file_replaces_the_base_as_a_whole(tmp_path: Path) -> None:
    other = tmp_path / "best.yaml"
    other.write_text("train: {lr: 3}\n")
    matrix = load_matrix(write(tmp_path, FILE), ["train.patience=9"], other)
    wanted = Settings.model_validate({"train": {"lr": 3, "patience": 9}})
    assert matrix.base == wanted
    assert cells(matrix, False)[0].settings == wanted
    other.write_text("train: {lr: fast}\ntrain: {}\n")
    with pytest.raises(InputError) as caught:
        load_matrix(write(tmp_path, FILE), base_file=other)
    assert caught.value.messages == [
        f"{other}:1:13: base.train.lr: 'fast' is not a number",
        f"{other}:2:1: train: given twice (first in line 1)",
    ]


# ---- properties

AXES = {
    "train.precision": ("fp32", "bf16-mixed", "bf16-true"),
    "teacher.adapter": ("lora", "qlora"),
    "teacher.attn": ("sdpa", "eager", "flash_attention_2"),
    "train.num_workers": (0, 2, 4),
    "train.lr": (1e-3, 1e-4, 5.0),
    "teacher.target_modules": (("q_proj",), ("q_proj", "v_proj")),
    "data.items_file": (None, "items.csv"),
}


@st.composite
def some_axes(draw: st.DrawFn) -> dict[str, list[Any]]:
    chosen = draw(st.lists(st.sampled_from(sorted(AXES)), max_size=4, unique=True))
    values = {name: st.permutations(AXES[name]) for name in chosen}
    return {name: draw(values[name])[: draw(st.integers(1, 3))] for name in chosen}


@given(some_axes())
@settings(max_examples=60, deadline=None)
def test_star_and_grid_have_as_many_distinct_cells_as_promised(axes: dict[str, list[Any]]) -> None:
    star = cells(matrix_of(axes=axes), has_gpu=True)
    grid = cells(matrix_of(axes=axes, design="grid"), has_gpu=True)
    assert len(star) == 1 + sum(len(values) - 1 for values in axes.values())
    assert len(grid) == math.prod(len(values) for values in axes.values())
    for planned in (star, grid):
        assert len({cell.key for cell in planned}) == len({cell.name for cell in planned})
        assert len({cell.key for cell in planned}) == len(planned)
        assert planned[0].name == "baseline"
        assert planned[0].changed == {}
    assert all(len(cell.changed) == 1 for cell in star[1:])
    assert {cell.key for cell in star} <= {cell.key for cell in grid}


@given(st.integers(1, 9), st.integers(1, 7))
def test_every_block_visits_every_cell_once_and_the_first_rotates(count: int, repeats: int) -> None:
    axes = {"train.num_workers": list(range(count))}
    planned = cells(matrix_of(axes=axes), has_gpu=True)
    order = schedule(planned, repeats)
    for block in range(1, repeats + 1):
        visited = [cell.name for number, cell in order if number == block]
        assert sorted(visited) == sorted(cell.name for cell in planned)
        assert visited[0] == planned[(block - 1) % count].name
    assert [number for number, _ in order] == sorted(number for number, _ in order)


@given(some_axes(), st.sampled_from(["star", "grid"]), st.booleans())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_resolved_matrix_gives_the_same_cells(
    tmp_path: Path, axes: dict[str, list[Any]], design: str, smaller: bool
) -> None:
    without_gpu = {"base": {"train.patience": 2}, "axes": {}} if smaller else None
    include = [{"teacher.gate": "linear"}, {"train.lr": 7.0, "teacher.gate": "resnet"}]
    matrix = matrix_of(
        axes=axes, design=design, without_gpu=without_gpu, include=include, base={"seed": 3}
    )
    again = load_matrix(write(tmp_path, resolved(matrix)))
    assert again == matrix
    for has_gpu in (True, False):
        assert cells(again, has_gpu) == cells(matrix, has_gpu)


def test_reading_a_matrix_needs_no_torch() -> None:
    code = "import sys, bench.matrix, bench.schemas; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"

"""Files to settings and back: types decided by the setting, and every mistake at its place."""

import contextlib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError

from core import config
from core.config import InputError
from core.settings import Settings

BAD_FILES = {
    "unknown key": (
        "train:\n  percision: fp32\n",
        ["2:3: train.percision: no such setting (did you mean train.precision?)"],
    ),
    "unknown group": (
        "trian: {lr: 1}\n",
        ["1:1: trian: no such setting (did you mean train?)"],
    ),
    "nothing is near": ("xyzzy: 1\n", ["1:1: xyzzy: no such setting"]),
    "right leaf, wrong group": (
        "train:\n  limit_data_rows: 100\n",
        ["2:3: train.limit_data_rows: no such setting (did you mean data.limit_data_rows?)"],
    ),
    "leaf of several groups": (
        "teacher.batch_size: 3\n",
        [
            "1:1: teacher.batch_size: no such setting (did you mean train.batch_size, "
            "eval.batch_size, student.batch_size or distill.batch_size?)"
        ],
    ),
    "choice": (
        "teacher:\n  attn: flash\n",
        ["2:9: teacher.attn: 'flash' is not one of eager, sdpa, flash_attention_2"],
    ),
    "fraction for a whole number": (
        "train: {batch_size: 64.5}\n",
        ["1:21: train.batch_size: '64.5' is not a whole number"],
    ),
    "word for a number": ("train.lr: fast\n", ["1:11: train.lr: 'fast' is not a number"]),
    "not finite": ("train.lr: .inf\n", ["1:11: train.lr: '.inf' is not a number"]),
    "infinite": ("train.lr: inf\n", ["1:11: train.lr: 'inf' is not a finite number"]),
    "truth value": (
        "eval.mask_seen: maybe\n",
        ["1:17: eval.mask_seen: 'maybe' is not true or false"],
    ),
    "too small": ("train.batch_size: 0\n", ["1:19: train.batch_size: '0' is less than 1"]),
    "not above": ("train.lr: 0\n", ["1:11: train.lr: '0' is not more than 0"]),
    "too large": ("student.gbce_t: 1.5\n", ["1:17: student.gbce_t: '1.5' is more than 1"]),
    "not below": ("student.dropout: 1\n", ["1:18: student.dropout: '1' is not less than 1"]),
    "nothing for text": ("data.root:\n", ["1:11: data.root: nothing is not text"]),
    "list for text": ("data.root: [a]\n", ["1:12: data.root: a list is not text"]),
    "text for a list": (
        "teacher.target_modules: q_proj\n",
        ["1:25: teacher.target_modules: 'q_proj' is not a list"],
    ),
    "item of a list": ("eval.top_k: [5, 0]\n", ["1:17: eval.top_k[1]: '0' is less than 1"]),
    "value for a group": ("train: fast\n", ["1:8: train: 'fast' is not a mapping"]),
    "group for a value": ("train.lr: {a: 1}\n", ["1:11: train.lr: a mapping is not a number"]),
    "list for a file": ("- train\n", ["1:1: a list is not a mapping"]),
    "refused combination": (
        "teacher:\n  attn: sdpa\n  lora_r: 6\n",
        [
            "3:11: teacher: lora_r 6 is not a multiple of num_experts 4: "
            "each expert owns lora_r / num_experts rank slices"
        ],
    ),
    "duplicate key": (
        "train:\n  lr: 1\n  patience: 2\n  lr: 2\n",
        ["4:3: train.lr: given twice (first in line 2)"],
    ),
    "duplicate group": (
        "train: {lr: 1}\ntrain: {patience: 2}\n",
        ["2:1: train: given twice (first in line 1)"],
    ),
    "nested and dotted": (
        "train: {lr: 1}\ntrain.lr: 2\n",
        ["2:1: train.lr: given twice (first in line 1)"],
    ),
    "key that is a list": ("? [a, b]\n: 1\n", ["1:3: a key must be a name"]),
    "alias": (
        "train: &t {lr: 1}\ndistill: *t\n",
        ["2:10: not valid YAML: aliases are not read; write the value out"],
    ),
    "tag": (
        "train:\n  lr: !fast 1\n",
        ["2:7: train.lr: the tag !fast is not read; remove it"],
    ),
    "two documents": (
        "seed: 1\n---\nseed: 2\n",
        ["2:1: not valid YAML: but found another document"],
    ),
    "no YAML": (
        "train: {lr: 1\nseed: 2\n",
        ["2:5: not valid YAML: expected ',' or '}', but got ':'"],
    ),
    "control character": (
        "seed: 1\ndata.root: a\x07b\n",
        ["2:13: not valid YAML: special characters are not allowed"],
    ),
    "several at once": (
        "seed: x\ntrain:\n  lr: -1\n  lr: 2\n  percision: fp32\nteacher.attn: flash\n",
        [
            "1:7: seed: 'x' is not a whole number",
            "3:7: train.lr: '-1' is not more than 0",
            "4:3: train.lr: given twice (first in line 3)",
            "5:3: train.percision: no such setting (did you mean train.precision?)",
            "6:15: teacher.attn: 'flash' is not one of eager, sdpa, flash_attention_2",
        ],
    ),
}


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", BAD_FILES)
def test_every_mistake_is_named_at_its_place(name: str, tmp_path: Path) -> None:
    text, wanted = BAD_FILES[name]
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        config.load_settings(path)
    assert caught.value.messages == [f"{path}:{line}" for line in wanted]
    assert str(caught.value) == "\n".join(caught.value.messages)


def test_unreadable_files(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1\n")
    with pytest.raises(InputError, match=r"setings\.yaml: no such file \(did you mean settings"):
        config.load_settings(tmp_path / "setings.yaml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        config.load_settings(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"data.root: caf\xe9\n")
    with pytest.raises(InputError, match="byte 14 is not UTF-8 text"):
        config.load_settings(tmp_path / "latin.yaml")


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert config.load_settings(write(tmp_path, "# nothing\n")) == Settings()
    assert config.load_settings(None) == Settings()


class Kinds(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: str = ""
    maybe: str | None = "given"
    number: float = 0.0
    whole: int = 0
    truth: bool = False
    texts: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("text: 12.10", {"text": "12.10"}),
        ("text: no", {"text": "no"}),
        ("text: 1e3", {"text": "1e3"}),
        ("text: 0012", {"text": "0012"}),
        ("text: 'null'", {"text": "null"}),
        ("text: ''", {"text": ""}),
        ("text: 2026-01-02", {"text": "2026-01-02"}),
        ("texts: [on, 1.0, x]", {"texts": ("on", "1.0", "x")}),
        ("maybe: null", {"maybe": None}),
        ("maybe: ~", {"maybe": None}),
        ("maybe:", {"maybe": None}),
        ("maybe: '~'", {"maybe": "~"}),
        ("number: 1e-4", {"number": 1e-4}),
        ("number: 12.10", {"number": 12.1}),
        ("whole: 0012", {"whole": 12}),
        ("truth: no", {"truth": False}),
        ("truth: true", {"truth": True}),
    ],
)
def test_the_type_decides_what_a_scalar_means(
    written: str, read: dict[str, Any], tmp_path: Path
) -> None:
    assert config.load(write(tmp_path, written), Kinds) == Kinds(**read)


def test_dotted_keys_are_nesting(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {lr: 1}\ntrain.patience: 2\ndata.synthetic.users: 7\n")
    loaded = config.load_settings(path)
    assert (loaded.train.lr, loaded.train.patience, loaded.data.synthetic.users) == (1.0, 2, 7)


@pytest.mark.parametrize(
    ("option", "read"),
    [
        ("train.lr=1e-3", lambda s: s.train.lr == 1e-3),
        ("teacher.target_modules=[q_proj]", lambda s: s.teacher.target_modules == ("q_proj",)),
        ("data.items_file=", lambda s: s.data.items_file is None),
        ("data.items_file=''", lambda s: s.data.items_file == ""),
        ("data.root=a=b", lambda s: s.data.root == "a=b"),
        ("train={patience: 3}", lambda s: s.train.patience == 3 and s.train.batch_size == 32),
    ],
)
def test_an_option_replaces_a_node_before_checking(option: str, read: Any, tmp_path: Path) -> None:
    path = write(tmp_path, "train: {batch_size: 8, lr: wrong}\n")
    sets = ["train.lr=1", option]
    assert read(config.load_settings(path, sets))
    assert read(config.load_settings(None, sets[1:]))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train.lr=fast", "--set train.lr=fast: train.lr: 'fast' is not a number"),
        (
            "lr=1",
            "--set lr=1: lr: no such setting (did you mean train.lr, student.lr or distill.lr?)",
        ),
        ("train.lr", "--set train.lr: no value is given; write --set dotted.key=value"),
        ("=1", "--set =1: no value is given; write --set dotted.key=value"),
        ("seed=[", "--set seed=[: not valid YAML: "),
        ("train={lr: 1, lr: 2}", "--set train={lr: 1, lr: 2}: lr: given twice"),
    ],
)
def test_a_wrong_option_is_named(option: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        config.load_settings(None, [option])
    assert len(caught.value.messages) == 1
    assert str(caught.value).startswith(message)


def test_leaves_carry_their_constraints() -> None:
    found = config.leaves(Settings)
    assert get_args(found["student.precision"]) == ("fp32", "bf16-mixed")
    assert "train" not in found
    assert found["machine.device"] == Literal["auto", "cpu", "cuda"]
    flat = dotted(Settings().model_dump())
    assert set(found) == set(flat)
    assert "ge=4" in repr(found["data.synthetic.mean_length"])


def dotted(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        found |= (
            dotted(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
        )
    return found


# ---- properties

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a leaf's type, limits not respected: those pydantic refuses are dropped later."""
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    inner = get_args(kind)
    if kind is str:
        return TEXT
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(-1, 10_000)
    if kind is float:
        return st.floats(0, 1e9)
    if get_origin(kind) is tuple:
        return st.lists(values_of(inner[0]), max_size=3)
    if type(None) in inner:
        return st.none() | values_of(inner[0])
    return values_of(inner[0])  # Annotated


@st.composite
def some_settings(draw: st.DrawFn) -> Settings:
    found = config.leaves(Settings)
    names = draw(st.lists(st.sampled_from(sorted(found)), max_size=8, unique=True))
    chosen = Settings()
    for name in names:
        tree = chosen.model_dump()
        *groups, last = name.split(".")
        node = tree
        for group in groups:
            node = node[group]
        node[last] = draw(values_of(found[name]))
        with contextlib.suppress(ValidationError):
            chosen = Settings.model_validate(tree)
    return chosen


@given(some_settings())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_load_of_dump_is_the_same(tmp_path: Path, chosen: Settings) -> None:
    assert config.load_settings(write(tmp_path, config.dump(chosen))) == chosen


@given(TEXT, st.none() | TEXT, st.lists(TEXT, max_size=4))
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example("a\x85b", "\u2028", ["\x85", "\u2029"])
def test_any_text_survives_dump_and_load(
    tmp_path: Path, text: str, maybe: str | None, texts: list[str]
) -> None:
    chosen = Kinds(text=text, maybe=maybe, texts=tuple(texts))
    assert config.load(write(tmp_path, config.dump(chosen)), Kinds) == chosen


def test_dump_is_readable_by_any_yaml_reader() -> None:
    assert yaml.safe_load(config.dump(Settings())) == Settings().model_dump(mode="json")


@given(st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_single_edit_loads_or_names_a_line(tmp_path: Path, data: st.DataObject) -> None:
    text = config.dump(Settings())
    place = data.draw(st.integers(0, len(text) - 1))
    edit = data.draw(
        st.sampled_from(["", ":", "x", "0", "\n", "[", "'", "#", "&", "*", "\t", " ", "-"])
    )
    path = write(tmp_path, text[:place] + edit + text[place + 1 :])
    try:
        config.load_settings(path)
    except InputError as error:
        for message in error.messages:
            line, column = message.removeprefix(f"{path}:").split(":")[:2]
            assert 1 <= int(line) <= text.count("\n") + 2
            assert int(column) >= 1


@given(st.sampled_from(sorted(config.leaves(Settings))))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_mapping_for_any_leaf_is_refused_at_its_line(tmp_path: Path, leaf: str) -> None:
    path = write(tmp_path, f"# one line before\n{leaf}: {{wrong: 1}}\n")
    with pytest.raises(InputError) as caught:
        config.load_settings(path)
    assert caught.value.messages[0].startswith(
        f"{path}:2:{len(leaf) + 3}: {leaf}: a mapping is not "
    )

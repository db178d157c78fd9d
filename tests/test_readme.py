"""The documents say what is so: every command in a code block is run, every table and link read."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from bench import run as bench_run
from bench.matrix import cells, load_matrix
from core import llm
from core import run as core_run
from core.pipeline import STAGES
from core.settings import Source

# `pipeline.prepare_process` silences these for a run; pytest sets the filters anew for each test.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "bench" / "README.md", ROOT / "reports" / "README.md"]
APPS = {"bench.run": bench_run.app, "core.run": core_run.app}
SHORT = [
    word
    for name, value in {
        "machine.threads": 1,
        "data.synthetic.users": 60,
        "data.synthetic.items": 48,
        "data.synthetic.mean_length": 6,
        "student.max_epochs": 1,
        "train.max_epochs": 1,
        "train.max_steps": 2,
        "distill.max_epochs": 1,
    }.items()
    for word in ("--set", f"{name}={value}")
]
# Every command and what is added to it here so that it takes seconds; `None` = told apart below.
COMMANDS: dict[str, list[str] | None] = {
    "make bench": None,
    "make test": None,
    "python -m bench.run matrices/teacher_speed.yaml --plan": [],
    "python -m core.data ml-1m --root data": None,
    "python -m bench.run matrices/teacher_speed.yaml --set data.source=ml-1m "
    "--set data.root=data/ml-1m --set data.limit_data_rows=10000": ["--plan"],
    "python -c \"import torch; print('torch==' + torch.__version__)\" > installed-torch.txt": None,
    "python -m pip install --constraint installed-torch.txt --editable .": None,
    "python -m bench.doctor": None,
    "python -m core.run --fast-dev-run 2": SHORT,
    "python -m bench.run matrices/teacher_speed.yaml": ["--plan"],
    "python -m core.run": SHORT,
    "python -m core.run matrices/settings/chain.yaml --set seed=1": SHORT,
    "python -m core.run prepare_data student_fit student_test --set student.hidden_size=32": SHORT,
    'python -m bench.run matrices/smoke.yaml --worker "python tests/fake_worker.py"': [],
}


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line for path in DOCUMENTS for kind, text in blocks(path) for line in text.split("\n")]
    return [line for line in lines if re.match(r"(make|python|pip|source|\./)\b", line)]


def inline(pattern: str) -> set[str]:
    """What a pattern finds between single backticks of the documents."""
    texts = [re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S) for path in DOCUMENTS]
    words = [word for text in texts for word in re.findall(r"`([^`\n]+)`", text)]
    return {found for word in words for found in re.findall(pattern, word)}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that reads like the repository and keeps what commands write out of it."""
    for name in ("matrices", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    # `python` is that of the active environment, as the text asks.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    return tmp_path


def run(command: str, added: list[str]) -> Result:
    """A `python -m` command inside this process, where the libraries are loaded already."""
    python, flag, module, *words = [*shlex.split(command), *added]
    assert (python, flag) == ("python", "-m")
    return CliRunner().invoke(APPS[module], words)


# ---- commands ----


def test_every_command_of_a_code_block_is_known_here() -> None:
    """A new command gets an entry above, and so a test."""
    assert set(commands()) == set(COMMANDS)


@pytest.mark.parametrize("command", [name for name, added in COMMANDS.items() if added is not None])
def test_a_command_of_a_code_block_works(command: str, checkout: Path) -> None:
    added = COMMANDS[command]
    assert added is not None
    done = run(command, added)
    assert done.exit_code == 0, done.output
    last = done.output.splitlines()[-1]
    if "--plan" in shlex.split(command) + added:
        assert "processes to measure" in done.output
        assert {path.name for path in checkout.iterdir()} == {"matrices", "tests"}
    elif "--fast-dev-run" in command:
        assert last.endswith("nothing is kept")
    elif "bench.run" in command:
        assert Path(last).name == "report.md" and Path(last).is_file()
    else:
        assert (Path(last) / "settings.yaml").is_file()


def make(target: str) -> subprocess.CompletedProcess[str]:
    """What `make` would do, without doing it."""
    command = ["make", "--dry-run", "--always-make", target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def targets() -> set[str]:
    blocks_name = {command.split()[1] for command in COMMANDS if command.startswith("make ")}
    return blocks_name | inline(r"^make ([a-z-]+)$")


@pytest.mark.parametrize("target", sorted(targets()))
def test_a_make_target_exists(target: str) -> None:
    done = make(target)
    assert done.returncode == 0, done.stderr
    assert ".venv/bin/" in done.stdout


def test_make_runs_the_commands_it_is_said_to_be() -> None:
    assert "python -m bench.run matrices/teacher_speed.yaml" in make("bench").stdout
    assert "python -m pytest" in make("test").stdout
    assert make("no-such-target").returncode == 2


def test_a_download_without_network_ends_in_one_sentence(tmp_path: Path) -> None:
    # Nothing listens there, so the set is not fetched where there is a network either.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "core.data", "ml-1m", "--root", "data"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), **nowhere},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("https://files.grouplens.org/datasets/movielens/ml-1m.zip: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.endswith("unpack it as data/ml-1m\n")
    assert "ml-1m belongs to GroupLens" in done.stdout, "the licence comes before"
    assert not list(tmp_path.glob("data/*"))


def modules() -> set[str]:
    """What a reader of the documents, or of a message, is told to start."""
    sources = [
        path.read_text() for name in ("bench", "core") for path in ROOT.glob(f"{name}/**/*.py")
    ]
    said = {module for text in sources for module in re.findall(r"python -m ([a-z_.]+\w)", text)}
    return said | inline(r"python -m ([a-z_.]+\w)")


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_named_in_passing_exists(module: str) -> None:
    assert importlib.util.find_spec(module), module


# ---- the example, tables and links ----


def test_the_example_matrix_plans(checkout: Path) -> None:
    (text,) = [text for kind, text in blocks(README) if kind == "yaml"]
    (checkout / "example.yaml").write_text(text)
    matrix = load_matrix(checkout / "example.yaml")
    assert [cell.name for cell in cells(matrix, has_gpu=False)] == [
        "baseline",
        "train.precision=bf16-mixed",
        "teacher.attn=eager",
    ]
    done = run("python -m bench.run example.yaml --plan", [])
    assert done.exit_code == 0, done.output
    assert matrix.question in done.output


def rows(path: Path, heading: str) -> list[list[str]]:
    """Rows of the table whose first heading is given, markup left out of the first column."""
    _, _, text = path.read_text().partition(f"\n| {heading} |")
    table = text.split("\n\n")[0].splitlines()[2:]
    assert table, f"{path.name}: no table of {heading}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_option_of_the_table_exists() -> None:
    shown = CliRunner().invoke(bench_run.app, ["--help"], env={"COLUMNS": "200"}).output
    existing = set(re.findall(r"--[a-z-]+", shown))
    told = {name for row in rows(README, "option") for name in re.findall(r"--[a-z-]+", row[0])}
    assert len(told) > 4
    assert told <= existing
    # Written about elsewhere in the text.
    assert existing - told == {"--plan", "--out", "--help"}


def test_the_stages_of_the_table_are_the_stages() -> None:
    told = [name for row in rows(README, "stage") for name in re.findall(r"`(\w+)`", row[0])]
    assert told == list(STAGES)


def test_the_backbones_and_data_sets_named_exist() -> None:
    text = README.read_text()
    told = re.search(r"random weights: (.*?)\. ", text, re.DOTALL)
    assert told
    assert set(re.findall(r"`([^`]+)`", told[1])) == set(llm.PRESETS)
    for source in ("ml-1m", "ml-100k", "ml-latest-small", "ml-latest", "csv", "parquet"):
        assert f"`{source}`" in text or source in "\n".join(commands())
        assert source in Source.__args__


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", path.read_text())
    for link in links:
        if "://" not in link:
            assert (path.parent / link).exists(), link


def test_there_are_links_to_follow() -> None:
    assert len(re.findall(r"\]\(", README.read_text())) >= 4

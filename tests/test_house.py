"""House rules, read from the syntax trees: who imports what, docstrings, links, settings in use."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from core.config import leaves
from core.settings import Settings

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("core/*.py"), *ROOT.glob("bench/**/*.py")])
TESTS = sorted(ROOT.glob("tests/*.py"))
PARENT = ("bench.run", "bench.matrix", "bench.launch", "bench.records", "bench.proofs")
SETTINGS = ("core.settings", "core.config")
# Seconds of import each: none may stand between a user and the plan of a run.
HEAVY = {
    "torch", "transformers", "peft", "bitsandbytes", "pytorch_lightning", "scipy", "pandas",
    "matplotlib", "jinja2", "tabulate", "numpy",
}  # fmt: skip
ALLOWED = {
    "core.settings": {"pydantic", "pydantic_core"},
    "core.config": {"pydantic", "pydantic_core", "yaml"},
    "core.nodes": {"yaml"},
}
ONLY_IN = {
    "transformers": {"core.llm"},
    "bitsandbytes": {"core.llm"},
    "tokenizers": {"core.llm"},
    "pytorch_lightning": {"core.lightning"},
    "peft": {"core.ilora", "core.checkpoints"},
    "pandas": {"core.data", "core.readers", "core.synthetic"},
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path, at_start_only: bool = False) -> set[str]:
    """Dotted names a module imports; `at_start_only`: not inside functions, not for typing."""
    found: set[str] = set()
    queue: list[ast.AST] = [tree(path)]
    while queue:
        node = queue.pop()
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if at_start_only and (later or typing):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import; name the package"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        queue += ast.iter_child_nodes(node)
    return found


def packages(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def loaded_with(module: str) -> set[Path]:
    """The project's files that are imported when a module is, itself included."""
    files = {module_name(path): path for path in SOURCES}
    found: set[Path] = set()
    queue = [module]
    while queue:
        name = queue.pop()
        if (path := files.get(name)) and path not in found:
            found.add(path)
            queue += [*imported(path, at_start_only=True), name.partition(".")[0]]
    return found


def test_there_is_something_to_read():
    names = {module_name(path) for path in SOURCES}
    assert names >= {"core.llm", "core.lightning", "bench.worker", *PARENT, *SETTINGS}
    assert len(loaded_with("bench.run")) > 5


def test_core_never_imports_bench():
    for path in ROOT.glob("core/*.py"):
        assert "bench" not in packages(imported(path)), path


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_a_heavy_package_is_imported_in_its_place_only(package):
    found = {
        module_name(path) for path in ROOT.glob("core/*.py") if package in packages(imported(path))
    }
    assert found <= ONLY_IN[package]
    assert found, f"{package}: nobody imports it; drop the rule"


def test_lightning_is_imported_only_when_chosen():
    for path in SOURCES:
        if module_name(path) != "core.lightning":
            assert "core.lightning" not in imported(path, at_start_only=True), path


@pytest.mark.parametrize("module", PARENT)
def test_the_parent_loads_nothing_heavy(module):
    for path in loaded_with(module):
        heavy = packages(imported(path, at_start_only=True)) & HEAVY
        assert not heavy, f"{module} loads {path.name}, which imports {heavy}"


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_settings_need_little(module):
    (path,) = (path for path in SOURCES if module_name(path) == module)
    foreign = packages(imported(path)) - set(sys.stdlib_module_names) - {"core"}
    assert foreign <= ALLOWED[module]


def test_no_torch_in_a_fresh_parent():
    """The syntax trees cannot see what foreign packages pull in."""
    code = f"import sys, {', '.join([*PARENT, *SETTINGS])}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not HEAVY & packages(set(done.stdout.split()))


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=module_name)
def test_a_module_opens_with_a_sentence_on_its_job(path):
    text = ast.get_docstring(tree(path))
    assert text, f"{path}: no docstring"
    assert len(text.split()) > 3 and re.search(r"[.:]", text), f"{path}: {text!r}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("core/*.py")), ids=module_name)
def test_public_functions_and_classes_say_what_they_do(path):
    for node in tree(path).body:
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef)
            and node.name[0] != "_"
            and node.name != "main"
        ):
            assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_only_the_worker_catches_everything():
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                if caught in ("everything", "Exception", "BaseException"):
                    assert module_name(path) == "bench.worker", f"{path.name}:{node.lineno}"


def shipped() -> list[Path]:
    """Text files of the repository, wherever it was unpacked."""
    patterns = ("core/*.py", "bench/**/*.py", "bench/templates/*", "tests/*.py", "matrices/*",
                "*.md", "*/*.md", "*.toml", "*.txt", "Makefile", "Dockerfile*",
                ".ci/*")  # fmt: skip
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()})


def test_nothing_names_the_machine_it_was_written_on():
    """An absolute path of somebody's home or workplace means nothing to a reader elsewhere."""
    places = "|".join(["home", "root", "Users", "mnt", "work", "tmp"])
    absolute = re.compile(rf"(?<![\w.}}>$/-])/(?:{places})/[\w.-]+")
    found = {
        f"{path.relative_to(ROOT)}: {match}"
        for path in shipped()
        for match in absolute.findall(path.read_text(encoding="utf-8"))
    }
    assert not found


def test_every_page_a_source_points_to_is_there():
    """A note for the reader may only name documents the reader has."""
    page = re.compile(r"(?<![\w./-])(?:[\w-]+/)*[\w-]+\.md\b(?!\w|\(|\.j2)")
    written = {"report.md", "index.md", "reports/index.md", "comparison.md"}  # by a run
    for path in shipped():
        for name in set(page.findall(path.read_text(encoding="utf-8"))) - written:
            near = [ROOT / name, path.parent / name]
            assert any(place.is_file() for place in near), f"{path.relative_to(ROOT)}: {name}"


def test_every_setting_is_read_somewhere():
    """A setting nothing reads is a promise without effect."""
    words = {
        node.attr if isinstance(node, ast.Attribute) else node.value
        for path in ROOT.glob("core/*.py")
        if path.name != "settings.py"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    }
    # Which image runs is the launcher's affair.
    unread = {leaf for leaf in leaves(Settings) if leaf.rpartition(".")[2] not in words}
    assert unread <= {"machine.image"}

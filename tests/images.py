"""Container images for tests, made of this very interpreter and its libraries: no registry needed.

The base holds Python, the installed packages and the C libraries they ask for, each at a place of
its own; every other image is the base with another label.
"""

import hashlib
import re
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import IO

BASE = "ilora-bench-test:base"
LABEL = "ilora-bench.environment"
ROOT = "opt/python"
# What no worker needs, anywhere and at the top of a library folder: it would double the image.
UNUSED = re.compile(r"/(tests?|include|libbitsandbytes_(cuda|rocm|xpu)[^/]*)$|\.a$")
UNUSED_PACKAGES = re.compile(
    r"/(config-3.*|ensurepip|idlelib|lib2to3|site-packages|tkinter|turtledemo|pip|setuptools|mypy.*"
    r"|ruff.*|.*__mypyc.*|hypothesis|hadolint.*|jedi|debugpy|IPython|pyarrow|__editable__.*)"
)


def environment() -> str:
    """Address of everything the base is made of: the same interpreter and packages, the same."""
    installed = sorted(f"{one.metadata['Name']} {one.version}" for one in distributions())
    return hashlib.sha256("\n".join([sys.version, *installed]).encode()).hexdigest()[:16]


def have_base(engine: str) -> None:
    """Make the base of this environment unless the engine has it; half a minute and 1 GB."""
    look = [engine, "image", "inspect", "--format", f'{{{{index .Config.Labels "{LABEL}"}}}}', BASE]
    if subprocess.run(look, capture_output=True, text=True).stdout.strip() == environment():
        return
    changes = [
        f"ENV PATH=/{ROOT}/bin",
        f"ENV LD_LIBRARY_PATH=/{ROOT}/lib",
        f"LABEL {LABEL}={environment()}",
    ]
    words = [engine, "import", *(word for change in changes for word in ("--change", change))]
    with subprocess.Popen(
        [*words, "-", BASE], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None
        with process.stdin as pipe:
            write_base(pipe)
    assert process.returncode == 0, f"{engine} import: exit {process.returncode}"


def have(engine: str, name: str, *lines: str) -> str:
    """The base with these lines of a Dockerfile more, as `name`; its digest."""
    have_base(engine)
    text = "\n".join([f"FROM {BASE}", *lines])
    subprocess.run(
        [engine, "build", "--quiet", "--tag", name, "-"],
        input=text,
        text=True,
        check=True,
        capture_output=True,
        env={"DOCKER_BUILDKIT": "0", "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"},
    )
    look = [engine, "image", "inspect", "--format", "{{.Id}}", name]
    digest = subprocess.run(look, check=True, capture_output=True, text=True).stdout.strip()
    return "sha256:" + digest.removeprefix("sha256:")


def write_base(file: IO[bytes]) -> None:
    """The file system as a tar stream, links replaced by what they point to."""
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    inside = f"{ROOT}/lib/{library.name}"
    executable = Path(sys.executable).resolve()
    binaries = [executable, *shared_objects(library / "lib-dynload"), *shared_objects(packages)]
    with tarfile.open(fileobj=file, mode="w|", dereference=True) as tar:
        add(tar, executable, f"{ROOT}/bin/python")
        add(tar, library, inside)
        add(tar, packages, f"{inside}/site-packages")
        for path in c_libraries(binaries):
            of_python = path.name.startswith("libpython")
            add(tar, path, f"{ROOT}/lib/{path.name}" if of_python else str(path)[1:])
        folder = tarfile.TarInfo("tmp")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o1777
        tar.addfile(folder)


def add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    def chosen(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if is_unused(info.name.removeprefix(name)):
            return None
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    tar.add(path, name, filter=chosen)


def shared_objects(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.so*"):
        if not is_unused(f"/{path.relative_to(folder)}"):
            yield path


def is_unused(place: str) -> bool:
    """A place in a library folder, with a slash before it."""
    return bool(UNUSED.search(place) or UNUSED_PACKAGES.fullmatch(place))


def c_libraries(binaries: list[Path]) -> list[Path]:
    """The loader's answer for all of them, less what packages bring themselves."""
    done = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True)
    found = {Path(path) for path in re.findall(r"(?:=> |^\t)(/\S+)", done.stdout, re.MULTILINE)}
    system = ("/lib", "/usr/lib")
    return sorted(
        path for path in found if str(path).startswith(system) or path.name.startswith("libpython")
    )

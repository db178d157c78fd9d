"""Two commits measured in turns, block by block: `python -m bench.in_turn COMMIT MATRIX`.

Each checkout runs with its own code, its own matrix file and its own settings; a block of the one
is followed by a block of the other, every second time the other way round. `bench.compare` then
finds the blocks interleaved and pairs them; what it says is kept as `comparison.md`. Exit status:
that of `bench.compare`, or what a run ended with that could not go on.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bench.execute import write_whole
from core.config import InputError

ROOT = Path(__file__).resolve().parent.parent
GOES_ON = (0, 1)
"""Statuses of `bench.run` after which its figures can be compared: a cell may have failed."""
COMPARISON = "comparison.md"
"""In the folder of both runs: what `bench.compare` said."""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Stopped(Exception):
    """A run could not go on; `status` is its own."""

    def __init__(self, side: str, status: int):
        super().__init__(f"{side}: bench.run ended with status {status}")
        self.status = status


@dataclass
class Side:
    """One of the two checkouts, and the run that grows in it."""

    name: str
    checkout: Path
    out: Path
    folder: Path | None = None

    def measure(self, matrix: str, block: int, options: Sequence[str]) -> None:
        """Have the run hold so many blocks. Raises Stopped."""
        limits = ("--repeats", str(block), "--max-repeats", str(block))
        words = ["--out", str(self.out), *limits]
        # Settings and cells of a run that goes on are those it began with.
        words += options if self.folder is None else ("--resume", str(self.folder))
        done = subprocess.run(
            [sys.executable, "-m", "bench.run", matrix, *words],
            cwd=self.checkout,
            env=os.environ | {"PYTHONPATH": str(self.checkout)},
            stdout=subprocess.PIPE,
            text=True,
        )
        sys.stdout.write(done.stdout)
        if done.returncode not in GOES_ON:
            raise Stopped(self.name, done.returncode)
        self.folder = Path(done.stdout.splitlines()[-1]).parent


@contextmanager
def checkout_of(commit: str, root: Path = ROOT) -> Iterator[Path]:
    """A working tree of a commit, gone afterwards. Raises InputError for what is no commit."""
    git = ["git", "-C", str(root)]
    known = subprocess.run(
        [*git, "rev-parse", "--verify", f"{commit}^{{commit}}"], capture_output=True, text=True
    )
    if known.returncode:
        raise InputError(f"COMMIT {commit}: {known.stderr.strip()}; a commit of {root} would do")
    with tempfile.TemporaryDirectory(prefix="in_turn-") as place:
        folder = Path(place) / known.stdout.strip()[:9]
        added = [*git, "worktree", "add", "--quiet", "--detach", str(folder), commit]
        subprocess.run(added, check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(folder)], check=True)


def measure(sides: Sequence[Side], matrix: str, blocks: int, options: Sequence[str]) -> None:
    """All blocks of both sides in turns. Raises Stopped."""
    for block in range(1, blocks + 1):
        for side in sides if block % 2 else reversed(sides):
            print(f"block {block} of {blocks}: {side.name}", flush=True)
            side.measure(matrix, block, options)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def main(
    context: typer.Context,
    commit: Annotated[str, typer.Argument(help="Before; after is this checkout as it stands.")],
    matrix: Annotated[str, typer.Argument(help="Matrix file, as both checkouts have it.")],
    blocks: Annotated[int, typer.Option(min=2, help="Blocks of each side.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder of both runs.")] = Path("reports/in_turn"),
) -> None:
    """Measure MATRIX with COMMIT and with this checkout; more options go to `bench.run`."""
    try:
        with checkout_of(commit) as earlier:
            place = out.absolute()
            sides = (
                Side("before", earlier, place / "before"),
                Side("after", ROOT, place / "after"),
            )
            measure(sides, matrix, blocks, context.args)
    except InputError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    except Stopped as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.status) from None
    command = [sys.executable, "-m", "bench.compare", *(str(side.folder) for side in sides)]
    allowed = ("--across", "code", "--across", "settings")
    done = subprocess.run(
        [*command, *allowed],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    sys.stdout.write(done.stdout)
    if done.stdout:
        write_whole(place / COMPARISON, done.stdout)
    raise typer.Exit(done.returncode)


if __name__ == "__main__":
    app()

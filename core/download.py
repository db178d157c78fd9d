"""Download a MovieLens set from its official place: `python -m core.data ml-1m --root data`."""

import hashlib
import http.client
import re
import shutil
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import Annotated

import typer

from core.config import InputError, did_you_mean
from core.readers import DOWNLOADABLE, OFFICIAL_PAGE

SITE = "https://files.grouplens.org/datasets/movielens"
TERMS = (
    "{name} belongs to GroupLens (University of Minnesota). It is lent for research: cite it, "
    "imply no endorsement, do not pass it on{share} and do not use it commercially without their "
    "permission. Downloading it accepts their terms: {readme}"
)
CHUNK_BYTES = 1 << 16
TIMEOUT_S = 30


def terms(name: str) -> str:
    """The conditions of a set in our words, with the address of the binding ones."""
    ending, share = ("html", " under other terms") if name == "ml-latest-small" else ("txt", "")
    return TERMS.format(name=name, share=share, readme=f"{SITE}/{name}-README.{ending}")


def download(name: str, root: Path, site: str = SITE) -> Path:
    """Fetch, check (md5) and unpack one set; returns its folder, which appears whole or not at all.

    Raises InputError naming the file and its place when the network or the disk does not allow it.
    """
    if name not in DOWNLOADABLE:
        known = ", ".join(DOWNLOADABLE)
        raise InputError(f"{name!r}: wanted one of {known}{did_you_mean(name, DOWNLOADABLE)}")
    folder, partial = root / name, root / f".{name}.partial"
    if folder.exists():
        raise InputError(f"{folder}: is there already; delete it to download {name} again")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        archive = partial / f"{name}.zip"
        _fetch_checked(f"{site}/{name}.zip", archive)
        with zipfile.ZipFile(archive) as files:
            files.extractall(partial)
        (partial / name).rename(folder)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile) as error:
        raise InputError(
            f"{site}/{name}.zip: {error}; get {name}.zip from {OFFICIAL_PAGE} by other means "
            f"and unpack it as {folder}"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _fetch_checked(url: str, path: Path) -> None:
    """Download to `path` and compare with the sum published beside it; OSError when they differ."""
    with urllib.request.urlopen(f"{url}.md5", timeout=TIMEOUT_S) as answer:
        published = re.search(r"\b[0-9a-f]{32}\b", answer.read(1000).decode("ascii", "replace"))
    if published is None:
        raise OSError(f"{url}.md5 holds no checksum")
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, path.open("wb") as file:
        size, done = int(answer.headers.get("Content-Length") or 0), 0
        while chunk := answer.read(CHUNK_BYTES):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            _show(path.name, done, size)
    if digest.hexdigest() != published[0]:
        raise OSError(f"md5 {digest.hexdigest()} differs from the published {published[0]}")


def _show(name: str, done: int, size: int) -> None:
    if sys.stderr.isatty():
        share = f"{done / size:4.0%}" if size else ""
        print(f"\r{name} {done / 1e6:.1f} MB {share}", end="", file=sys.stderr)
        if done == size:
            print(file=sys.stderr)


def _command(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(DOWNLOADABLE)}.")],
    root: Annotated[Path, typer.Option(help="Folder that will hold the set's own.")] = Path("data"),
) -> None:
    """Download a MovieLens set from files.grouplens.org, check it and unpack it."""
    try:
        if name in DOWNLOADABLE:
            print(terms(name))
        print(f"{download(name, root)}: ready; use data.source={name} data.root={root}")
    except InputError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None


def main() -> None:
    """Run the command line."""
    typer.run(_command)

"""Teacher outputs on disk by sample id: written as a resumable stream, read as memory maps.

Shapes: S samples, K teacher items of each, H width of the teacher, V items (row 0 is padding).
"""

import errno
import json
import math
import mmap
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.lib.format import open_memmap

from core.config import InputError

SCHEMA = 1
ORDER = "score descending, item id ascending"
MANIFEST = "manifest.json"
ITEM_EMBEDDINGS = "item_embeddings.npy"
CHECKPOINT_BYTES = 64 << 20
"""Written rows held in memory at most, before they go to the disk."""
CHECKPOINT_S = 30.0
"""Work that a killed process loses at most."""


def _layout(samples: int, top_k: int, width: int, embedding_dtype: str) -> dict[str, dict]:
    """Name -> dtype and shape of every array that has one row for each sample."""
    return {
        "top_ids": {"dtype": "int32", "shape": [samples, top_k]},
        "scores": {"dtype": "float32", "shape": [samples, top_k]},
        "log_sum_exp": {"dtype": "float32", "shape": [samples]},
        "target_log_prob": {"dtype": "float32", "shape": [samples]},
        "embedding": {"dtype": embedding_dtype, "shape": [samples, width]},
    }


class Writer:
    """Streams rows into `.<folder>.partial`; `finish` renames it to `folder` once all are there.

    A partial folder of the same shapes and hashes is continued (`missing` says what is left), any
    other is replaced. Memory stays bounded by CHECKPOINT_BYTES. `log_sum_exp` runs over all items,
    so exp(score - log_sum_exp) is a probability; `target_log_prob` is that of the true item (log).
    """

    def __init__(
        self,
        folder: Path,
        *,
        samples: int,
        top_k: int,
        width: int,
        hashes: Mapping[str, str],
        embedding_dtype: str = "float16",
    ) -> None:
        if folder.exists():
            raise FileExistsError(f"{folder}: teacher outputs are there already")
        self.folder = folder
        self._partial = folder.with_name(f".{folder.name}.partial")
        self._layout = _layout(samples, top_k, width, embedding_dtype)
        self._arrays: dict[str, np.memmap] = {}
        self._manifest = {
            "schema": SCHEMA,
            "order": ORDER,
            "hashes": dict(hashes),
            "arrays": self._layout,
        }
        self._done = np.zeros(samples, dtype=bool)
        if not self._continue_partial():
            self._start_partial()
        self._row_bytes = sum(array[:1].nbytes for array in self._arrays.values())
        self._pending_rows, self._checkpoint_time_s = 0, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._arrays:
            self._checkpoint()

    def missing(self) -> np.ndarray:
        """Sample ids not written yet, ascending int64."""
        return np.flatnonzero(~self._done)

    def write(
        self,
        sample_ids: np.ndarray,
        top_ids: np.ndarray,
        scores: np.ndarray,
        log_sum_exp: np.ndarray,
        target_log_prob: np.ndarray,
        embedding: np.ndarray,
    ) -> None:
        """Store rows in any order: (B,), (B,K), (B,K), (B,), (B,), (B,H).

        Raises ValueError for ids out of range or not integers, scores not in order, figures that
        are not finite (in the stored type), and shapes that do not fit.
        """
        rows = {
            "top_ids": top_ids,
            "scores": scores,
            "log_sum_exp": log_sum_exp,
            "target_log_prob": target_log_prob,
            "embedding": embedding,
        }
        _check_ids(sample_ids, len(self._done))
        stored = {name: self._stored(name, rows[name], len(sample_ids)) for name in rows}
        _check_order(stored["top_ids"], stored["scores"])
        place = _slice_of(sample_ids)
        for name, values in stored.items():
            self._arrays[name][place] = values
        self._done[place] = True
        self._pending_rows += len(sample_ids)
        if (
            self._pending_rows * self._row_bytes > CHECKPOINT_BYTES
            or time.monotonic() - self._checkpoint_time_s > CHECKPOINT_S
        ):
            self._checkpoint()

    def finish(self, item_embeddings: np.ndarray) -> None:
        """Add the item embeddings (V+1, H) and give the folder its name.

        Raises ValueError when samples are missing or the embeddings do not fit.
        """
        left = self.missing()
        if len(left):
            raise ValueError(f"{self.folder}: {len(left)} samples missing, the first is {left[0]}")
        width = self._arrays["embedding"].shape[1]
        if item_embeddings.ndim != 2 or item_embeddings.shape[1] != width:
            raise ValueError(f"item embeddings are {item_embeddings.shape}; wanted (V+1, {width})")
        if not np.isfinite(item_embeddings).all():
            raise ValueError("item embeddings are not finite")
        np.save(self._partial / ITEM_EMBEDDINGS, item_embeddings.astype(np.float32))
        self._checkpoint()
        self._arrays = {}
        self._partial.rename(self.folder)

    def _continue_partial(self) -> bool:
        path = self._partial / MANIFEST
        if not path.is_file():
            return False
        found = json.loads(path.read_text(encoding="utf-8"))
        for start, stop in found.pop("completed"):
            self._done[start:stop] = True
        if found != self._manifest:
            self._done[:] = False
            return False
        self._arrays = {name: open_memmap(self._file(name), "r+") for name in found["arrays"]}
        return True

    def _start_partial(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        # A full disk must be an error here: found while writing to a map, it kills the process.
        needed = sum(
            np.dtype(array["dtype"]).itemsize * math.prod(array["shape"])
            for array in self._layout.values()
        )
        if needed > shutil.disk_usage(self._partial).free:
            raise OSError(
                errno.ENOSPC, f"teacher outputs need {needed} bytes of disk", str(self.folder)
            )
        for name, array in self._layout.items():
            self._arrays[name] = open_memmap(
                self._file(name), "w+", array["dtype"], tuple(array["shape"])
            )
            with self._file(name).open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, self._file(name).stat().st_size)
        self._write_manifest()

    def _file(self, name: str) -> Path:
        return self._partial / f"{name}.npy"

    def _stored(self, name: str, values: np.ndarray, batch: int) -> np.ndarray:
        """Values in the stored type, checked."""
        array = self._arrays[name]
        wanted = (batch, *array.shape[1:])
        if values.shape != wanted:
            raise ValueError(f"{name} is {values.shape}; wanted {wanted}")
        if array.dtype.kind == "i" and values.dtype.kind not in "iu":
            raise ValueError(f"{name} are {values.dtype}; ids must be integers, floats round them")
        with np.errstate(over="ignore"):  # an overflow is an infinity, refused below
            stored = values.astype(array.dtype, copy=False)
        if not np.isfinite(stored).all():
            raise ValueError(f"{name}: not finite as {array.dtype}")
        return stored

    def _checkpoint(self) -> None:
        """Bring rows to the disk first, then say in the manifest that they are there."""
        for array in self._arrays.values():
            array.flush()
            _drop_pages(array)
        self._write_manifest()
        self._pending_rows, self._checkpoint_time_s = 0, time.monotonic()

    def _write_manifest(self) -> None:
        text = json.dumps({**self._manifest, "completed": _ranges(self._done)})
        new = self._partial / f"{MANIFEST}.new"
        new.write_text(text, encoding="utf-8")
        new.replace(self._partial / MANIFEST)


class Outputs:
    """Finished teacher outputs; arrays stay on disk until rows are asked for."""

    def __init__(
        self, arrays: dict[str, np.ndarray], item_embeddings: np.ndarray, hashes: dict[str, str]
    ) -> None:
        self._arrays = arrays
        self.item_embeddings = item_embeddings
        """(V+1, H) float32."""
        self.hashes = hashes
        self.samples, self.top_k = arrays["scores"].shape
        self.width: int = arrays["embedding"].shape[1]

    @classmethod
    def open(cls, folder: Path, hashes: Mapping[str, str] | None = None) -> Self:
        """Open a finished folder; InputError when it is damaged or made from something else.

        Every given hash (the data's digest, for one) must equal the stored one: sample ids of
        another split would mis-assign teachers in silence.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise InputError(
                f"{folder}: no {MANIFEST}; wanted a folder of finished teacher outputs"
            )
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA or manifest["order"] != ORDER:
            raise InputError(
                f"{path}: schema {manifest['schema']} ({manifest['order']}); "
                f"wanted {SCHEMA} ({ORDER}): make the outputs again"
            )
        for name, wanted in (hashes or {}).items():
            found = manifest["hashes"].get(name)
            if found != wanted:
                raise InputError(
                    f"{folder}: made with {name} {found}; this run has {name} {wanted}: "
                    "make the outputs again or use the settings they were made with"
                )
        try:
            arrays = {name: np.load(folder / f"{name}.npy", "r") for name in manifest["arrays"]}
            item_embeddings = np.load(folder / ITEM_EMBEDDINGS, "r")
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: {error}; make the outputs again") from None
        for name, layout in manifest["arrays"].items():
            found = {"dtype": arrays[name].dtype.name, "shape": list(arrays[name].shape)}
            if found != layout:
                raise InputError(f"{folder}: {name} is {found}; its manifest says {layout}")
        return cls(arrays, item_embeddings, manifest["hashes"])

    def rows(self, sample_ids: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of the samples in the order asked, by the names of `Writer.write`.

        Raises ValueError for an id that is not there.
        """
        _check_ids(sample_ids, self.samples)
        return {name: np.asarray(array[sample_ids]) for name, array in self._arrays.items()}


def _check_ids(sample_ids: np.ndarray, samples: int) -> None:
    if sample_ids.ndim != 1 or sample_ids.dtype.kind not in "iu":
        raise ValueError(
            f"sample ids are {sample_ids.dtype} {sample_ids.shape}; wanted integers (B,)"
        )
    outside = sample_ids[(sample_ids < 0) | (sample_ids >= samples)]
    if len(outside):
        raise ValueError(f"no sample {outside[0]}; there are 0..{samples - 1}")


def _slice_of(sample_ids: np.ndarray) -> np.ndarray | slice:
    """The same rows, as a slice if they follow each other: that is written in one piece."""
    if len(sample_ids) and (np.diff(sample_ids) == 1).all():
        return slice(sample_ids[0], sample_ids[-1] + 1)
    return sample_ids


def _check_order(top_ids: np.ndarray, scores: np.ndarray) -> None:
    falls = scores[:, :-1] > scores[:, 1:]
    ties = (scores[:, :-1] == scores[:, 1:]) & (top_ids[:, :-1] < top_ids[:, 1:])
    if not (falls | ties).all():
        row = int(np.flatnonzero(~(falls | ties).all(axis=1))[0])
        raise ValueError(f"row {row}: {top_ids[row]} with {scores[row]} is not in order: {ORDER}")
    if (top_ids < 1).any():
        raise ValueError("top_ids hold an id below 1; 0 is padding and can not be recommended")


def _ranges(done: np.ndarray) -> list[list[int]]:
    """Runs of True as [start, stop) pairs."""
    edges = np.flatnonzero(np.diff(done.astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2).tolist()


def _drop_pages(array: np.memmap) -> None:
    """Give written pages back: else the process would grow to the size of the file."""
    array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

"""The guarded work: small, seeded, on one CPU thread, through the pipeline's own functions.

Shapes: B users, T prompt tokens, V items, S samples.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiny
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from core import checkpoints, data, outputs, ranking, student
from core import teacher as teaching
from core.data import Prepared
from core.loop import Fit, adamw, fit_loop
from core.observe import Observer
from core.ranking import Queries
from core.sasrec import SASRec
from core.settings import (
    DataSettings,
    EvalSettings,
    StudentSettings,
    SyntheticSettings,
)

MICRO_BATCHES, BATCH, ACCUMULATE = 4, 16, 2
RANKED_USERS, RANKED_ITEMS = 400, 1000
ROWS, TOP_K, WIDTH = 4096, 50, 128


@dataclass
class Work:
    """One guarded piece of work: `run` does all of it, the same every time, and `counts` holds what
    its last run counted on the way.
    """

    run: Callable[[], object]
    counts: Counter[str] = field(default_factory=Counter)


class Delivered(Dataset):
    """A data set that counts the batches a loader takes from it."""

    def __init__(self, batches: Dataset, counts: Counter[str]):
        self.batches, self.counts = batches, counts

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict:
        self.counts["loader_batches"] += 1
        return self.batches[index]


def unobserved() -> Observer:
    """An observer that leaves the first step alone: its census is no part of the guarded work."""
    observer = Observer()
    observer.facts["operators"] = 0
    return observer


def count_forwards(model: nn.Module, counts: Counter[str]) -> None:
    """Count the forwards of a model from now on."""
    model.register_forward_pre_hook(lambda module, args: counts.update(forwards=1))


def _fit(work: Work, model: nn.Module, batches: Dataset, loss: Callable, optimizer) -> None:
    """One epoch of the plain loop with nothing validated or saved."""
    observer = unobserved()
    fit = Fit(
        model=model,
        batches=lambda epoch: Delivered(batches, work.counts),
        loss=loss,
        validate=lambda: {"ndcg@10": 0.0},
        save=lambda name: None,
        optimizer=optimizer,
        device=tiny.CPU,
        max_epochs=1,
        patience=1,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=1.0,
    )
    work.counts.clear()
    torch.manual_seed(0)
    fit_loop(fit, observer)
    work.counts.update(observer.counts)


def teacher_fit() -> Work:
    """Four micro-batches of the teacher, stepped by two: assembly, forward, backward, optimizer."""
    given = tiny.settings(lora_r=8, distill_lambda=0.1)
    model = tiny.teacher(given).train()
    batches = tiny.batches(model, given, BATCH, seed=0, most=MICRO_BATCHES)
    # A rate that leaves the weights as they are: every run does the same arithmetic.
    optimizer = adamw(model.trainable(), lr=1e-30, weight_decay=0.0)

    def loss(batch: dict) -> Tensor:
        return teaching.training_loss(model, batch, given, 0.1, unobserved())

    work = Work(lambda: _fit(work, model, batches, loss, optimizer))
    count_forwards(model.backbone, work.counts)
    return work


def teacher_inference() -> Work:
    """Scores of the teacher for every evaluated user."""
    given = tiny.settings(inference_batch_size=BATCH)
    model = tiny.teacher(given)
    queries = ranking.held_out(tiny.prepared(), "validation")

    def run() -> None:
        work.counts.clear()
        observer = unobserved()
        for batch, _, _ in teaching.infer(model, tiny.pieces(), queries, given, observer):
            work.counts.update(batches=1, rows=batch["samples"])
        work.counts.update(observer.counts)

    work = Work(run)
    count_forwards(model.backbone, work.counts)
    return work


def student_fit() -> Work:
    """One epoch of the student."""
    settings = StudentSettings(hidden_size=32, max_length=20, batch_size=BATCH, dropout=0.0)
    prepared = tiny.prepared()
    torch.manual_seed(0)
    model = SASRec(prepared.num_items, settings)
    optimizer = adamw(model.parameters(), lr=1e-30, weight_decay=0.0)
    batches = student.SequenceBatches(prepared, settings, seed=0)

    def loss(batch: dict) -> Tensor:
        return student.training_loss(model, batch, settings)

    work = Work(lambda: _fit(work, model, batches, loss, optimizer))
    count_forwards(model, work.counts)
    return work


def ranked_split() -> Prepared:
    """Enough users and items for ranking to be worth its time."""
    shape = SyntheticSettings(users=RANKED_USERS, items=RANKED_ITEMS, mean_length=12)
    return data.prepare(DataSettings(synthetic=shape))


def ranking_of_users() -> Work:
    """Ranks and metrics of every evaluated user, from scores that are there already."""
    prepared, settings = ranked_split(), EvalSettings(batch_size=128)
    users = len(prepared.eval_users)
    random = torch.Generator().manual_seed(0)
    scores_BV = torch.randn(users, prepared.num_items + 1, generator=random)

    def score(queries: Queries) -> Iterator[tuple[np.ndarray, Tensor]]:
        for rows in queries.by_length(settings.batch_size, 50):
            work.counts.update(batches=1, rows=len(rows))
            yield rows, scores_BV[torch.from_numpy(rows)]

    def run() -> None:
        work.counts.clear()
        ranking.evaluate(score, prepared, "validation", settings)

    work = Work(run)
    return work


def output_rows() -> dict[str, np.ndarray]:
    """What a teacher could say of `ROWS` samples."""
    random = np.random.default_rng(0)
    return {
        "top_ids": np.tile(np.arange(1, TOP_K + 1, dtype=np.int32), (ROWS, 1)),
        "scores": -np.sort(-random.normal(size=(ROWS, TOP_K)).astype(np.float32), axis=1),
        "log_sum_exp": random.normal(size=ROWS).astype(np.float32),
        "target_log_prob": -random.random(ROWS).astype(np.float32),
        "embedding": random.normal(size=(ROWS, WIDTH)).astype(np.float16),
    }


def outputs_writing(folder: Path) -> Work:
    """Teacher outputs of all samples, written in batches into `folder`."""
    rows, ids = output_rows(), np.random.default_rng(1).permutation(ROWS)
    embeddings = np.zeros((RANKED_ITEMS + 1, WIDTH), dtype=np.float32)

    def run() -> None:
        work.counts.clear()
        shutil.rmtree(folder, ignore_errors=True)
        writer = outputs.Writer(
            folder, samples=ROWS, top_k=TOP_K, width=WIDTH, hashes={"data": "d", "teacher": "t"}
        )
        with writer:
            for start in range(0, ROWS, 64):
                chosen = ids[start : start + 64]
                writer.write(chosen, **{name: values[chosen] for name, values in rows.items()})
            writer.finish(embeddings)
        work.counts.update(rows=ROWS, **written(folder))

    work = Work(run)
    return work


def checkpoint_writing(folder: Path) -> Work:
    """The adapter-only checkpoint of a teacher and the weights of its student."""
    model = tiny.teacher(tiny.settings())

    def run() -> None:
        work.counts.clear()
        shutil.rmtree(folder, ignore_errors=True)
        checkpoints.save_teacher(model, folder / "teacher")
        student.save_student(model.encoder, folder / "student")
        work.counts.update(written(folder))

    work = Work(run)
    return work


def written(folder: Path) -> dict[str, int]:
    """Files below a folder, and the bytes of those that hold arrays: texts hold floats, whose
    digits may differ from machine to machine.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    arrays = [path for path in files if path.suffix in (".npy", ".npz", ".safetensors")]
    return {"files": len(files), "array_bytes": sum(path.stat().st_size for path in arrays)}

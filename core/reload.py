"""Whether a checkpoint gives back the model that wrote it: loaded anew, it must score the same.

A shortened fit (`fast_dev_run`) leaves its model's scores of a few users beside its checkpoints;
this module builds the model again from nothing but what lies on the disk, in a process of its own
if it is to prove anything, and scores the same users.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from core import artefacts, checkpoints, pipeline, stages, student, teacher
from core.artefacts import Store
from core.config import InputError
from core.observe import Observer
from core.pipeline import Planned
from core.settings import Settings
from core.stages import Work

CHECKPOINTS = ("best", "last")
"""A shortened fit has one validation, so both hold the same model."""
EXACT, ROUNDED = 1e-5, 1e-2
"""Largest difference allowed, relative to the largest score: fp32 over dense weights repeats itself
to the bit on a CPU, and to a few units in the last place where the device chooses its kernels;
16-bit products (TF32 too) and 4-bit weights may round each product another way.
"""


class BadCheckpoint(RuntimeError):
    """A checkpoint cannot be loaded, or what is loaded is not the model that was saved."""


def check(
    name: str, settings: Settings, store: Store, observer: Observer, planned: dict[str, Planned]
) -> float:
    """Largest relative difference between the scores of a shortened fit's model and those of its
    checkpoints.

    Raises BadCheckpoint when it is more than rounding, or a checkpoint cannot be loaded.
    """
    folder = store.find(name, planned[name].address)
    if folder is None:
        raise InputError(f"{name}: has not run shortened with these settings and this code")
    artefacts.read_manifest(folder)
    inputs = pipeline.inputs_of(name, store, planned)
    with (
        pipeline.at_work(planned[name], settings, inputs, folder, observer) as work,
        observer.phase("reload"),
    ):
        scores = _teacher_scores(work) if name == "teacher_fit" else _student_scores(work)
        allowed = tolerance(name, settings)
        return max(_compare(work, name, each, scores, allowed) for each in CHECKPOINTS)


def _compare(
    work: Work, name: str, checkpoint: str, scores: Callable[[Path], np.ndarray], allowed: float
) -> float:
    where, saved = f"{name}/{checkpoint}", np.load(work.folder / stages.PROBE)
    try:
        found = difference(saved, scores(work.folder / checkpoint))
    except (InputError, OSError, ValueError) as error:
        raise BadCheckpoint(f"{where} cannot be loaded: {error}") from error
    if not found <= allowed:
        raise BadCheckpoint(
            f"{where}: loaded anew, the scores of {len(saved)} users differ by {found:.2g} of the "
            f"largest score from those of the model that was saved; at most {allowed:g} is rounding"
        )
    return found


def tolerance(name: str, settings: Settings) -> float:
    """Largest relative difference that rounding explains."""
    if name != "teacher_fit":
        return EXACT if settings.student.precision == "fp32" else ROUNDED
    dense = settings.teacher.adapter == "lora"
    return EXACT if dense and settings.train.precision == "fp32" else ROUNDED


def difference(saved: np.ndarray, loaded: np.ndarray) -> float:
    """Largest difference of two score tables over the largest score; NaN if either holds one."""
    if saved.shape != loaded.shape:
        raise ValueError(f"scores of shape {loaded.shape}; the saved model gave {saved.shape}")
    return float(np.abs(saved - loaded).max() / np.abs(saved).max())


def _student_scores(work: Work) -> Callable[[Path], np.ndarray]:
    """Checkpoint -> what a student built anew and loaded from it says."""
    settings, prepared = work.settings, work.prepared()
    batch_size = settings.eval.batch_size

    def scores(checkpoint: Path) -> np.ndarray:
        torch.manual_seed(settings.seed + 1)  # not the fit's: what is not loaded must not fit
        model, vectors = stages.load_sasrec(checkpoint, prepared, settings, work.device)
        score = student.scorer(model, settings.student, batch_size, vectors)
        return stages.probe(score, prepared, batch_size)

    return scores


def _teacher_scores(work: Work) -> Callable[[Path], np.ndarray]:
    """Checkpoint -> what a teacher built anew and loaded from it says; one backbone serves all."""
    settings = work.settings
    model, pieces, prepared = stages.build_teacher(work)
    score = teacher.scorer(model, pieces, settings, work.observer)

    def scores(checkpoint: Path) -> np.ndarray:
        with torch.no_grad():
            # Drawn with the fit's seed, a part that is not loaded would still fit: adapters hardly
            # move in a few steps.
            for parameter in model.trainable():
                parameter.normal_()
        checkpoints.load_teacher(model, checkpoint)
        return stages.probe(score, prepared, settings.teacher.inference_batch_size)

    return scores

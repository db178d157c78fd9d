"""This project's student through its own training loop and its own evaluator: the other side of the
comparison.

Runs in the project's interpreter.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
from desk import TOP_K, Desk

from core import data, ranking, stages, student
from core.config import load_settings
from core.loop import Fit, adamw, fit_loop
from core.observe import Observer, Step
from core.sasrec import SASRec


def main(folder: Path, seed: int, settings_file: str, precision: str) -> None:
    settings = load_settings(Path(settings_file), [f"student.precision={precision}"])
    prepared, options = data.load(folder), settings.student
    torch.manual_seed(seed)
    model = SASRec(prepared.num_items, options)
    score = student.scorer(model, options, settings.eval.batch_size)

    @torch.inference_mode()
    def top(held_out: int) -> np.ndarray:
        split = {1: "test", 2: "validation"}[held_out]
        queries = ranking.held_out(prepared, split)
        best = np.empty((len(queries), TOP_K), dtype=np.int64)
        for rows, scores_BV in score(queries):
            seen, _ = queries.newest(rows, int(queries.lengths[rows].max()))
            scores_BV.scatter_(1, torch.from_numpy(seen), float("-inf"))
            scores_BV[:, 0] = float("-inf")
            best[rows] = scores_BV.topk(TOP_K).indices.numpy()
        return best

    epochs = settings.student.max_epochs
    batches = [student.SequenceBatches(prepared, options, seed + epoch) for epoch in range(2)]
    about = {
        "version": f"this commit, {options.precision}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "digest": prepared.digest,
        "targets": int(batches[0].pairs.clip(0).sum()),
        "steps_per_epoch": len(batches[0]),
        "recipe": f"AdamW at {options.lr:g}, {options.lr_schedule} over {epochs} epochs",
    }
    desk = Desk(top, about)
    optimizer = adamw(model.parameters(), options.lr, options.weight_decay)

    def on_step(step: Step) -> None:
        if not desk.step_done(step.tokens):
            raise Stopped
        model.train()

    fit = Fit(
        model=model,
        batches=lambda epoch: student.SequenceBatches(prepared, options, seed + epoch),
        loss=lambda batch: student.training_loss(model, batch, options),
        validate=lambda: {"ndcg@10": 0.0},  # the desk's commands validate
        save=lambda name: None,
        optimizer=optimizer,
        scheduler=stages.learning_rate(optimizer, options.lr_schedule, epochs * len(batches[0])),
        device=torch.device("cpu"),
        max_epochs=epochs,
        patience=epochs,
        eval_every=epochs,
        precision=options.precision,
    )
    with contextlib.suppress(Stopped):
        if desk.begin():
            fit_loop(fit, Observer(on_step=on_step))
            desk.over()


class Stopped(Exception):
    """The desk wants no further step."""


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])

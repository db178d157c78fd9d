"""What each stage does, from ratings to the comparison of three models.

A stage is a function of a `Work` order. It reads upstream artefacts by name, writes into its own
folder, and reports through the observer. `core.pipeline` says in which order and with what.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core import artefacts, data, llm, metrics, outputs, prompts, ranking, student, teacher
from core.loop import Fit, fit_loop
from core.observe import Observer
from core.sasrec import SASRec


@dataclass(frozen=True)
class Work:
    """One stage's order: the settings it may read, the artefacts before it, its own folder."""

    settings: Any
    inputs: Mapping[str, Path]
    folder: Path
    device: torch.device
    observer: Observer
    provenance: dict[str, str]
    """Addresses of the stages before this one."""

    def prepared(self) -> data.Prepared:
        """The prepared split."""
        return data.load(self.inputs["prepare_data"] / "split")


# ---- data and student ----


def prepare_data(work: Work) -> None:
    """Read the ratings and cut them leave-one-out."""
    with work.observer.phase("data"):
        shutil.rmtree(work.folder / "split", ignore_errors=True)
        prepared = data.prepare(work.settings.data)
        data.save(prepared, work.folder / "split")
    work.observer.facts.update(cut=prepared.cut, data_digest=prepared.digest)


def student_fit(work: Work) -> None:
    """Train the baseline SASRec on every training prefix."""
    settings, prepared = work.settings, work.prepared()
    torch.manual_seed(settings.seed)
    model = SASRec(prepared.num_items, settings.student).to(work.device)
    fit = _sasrec_fit(
        work,
        model,
        prepared,
        loss=lambda batch: student.training_loss(model, batch, settings.student),
        score=student.scorer(model, settings.student, settings.eval.batch_size),
        save=lambda name: student.save_student(model, work.folder / name),
        train=settings.student,
    )
    _run_fit(work, fit)


def _sasrec_fit(work: Work, model, prepared, *, loss, score, save, train) -> Fit:
    """What both trainings of a SASRec share; `train` holds batch size, rates and patience."""
    settings = work.settings
    batches_of = settings.student.model_copy(update={"batch_size": train.batch_size})
    return Fit(
        model=model,
        batches=lambda epoch: student.SequenceBatches(prepared, batches_of, settings.seed + epoch),
        loss=loss,
        validate=lambda: ranking.evaluate(score, prepared, "validation", settings.eval)[0],
        save=save,
        optimizer=torch.optim.AdamW(
            model.parameters(), lr=train.lr, weight_decay=train.weight_decay, fused=True
        ),
        device=work.device,
        precision=settings.student.precision,
        max_epochs=train.max_epochs,
        patience=train.patience,
        eval_every=settings.student.eval_every,
        num_workers=settings.train.num_workers,
    )


def student_test(work: Work) -> None:
    """Rank the test items with the best baseline student."""
    _test_student(work, work.inputs["student_fit"] / "best")


def _test_student(work: Work, checkpoint: Path) -> None:
    settings, prepared = work.settings, work.prepared()
    model, vectors = load_sasrec(checkpoint, prepared, settings, work.device)
    score = student.scorer(model, settings.student, settings.eval.batch_size, vectors)
    _test(work, score, prepared)


def load_sasrec(
    checkpoint: Path, prepared: data.Prepared, settings: Any, device: torch.device
) -> tuple[SASRec, Tensor | None]:
    """A student and, for a distilled one whose input vectors differ from its item table, those
    vectors.
    """
    model = student.load_student(checkpoint, prepared.num_items, settings.student).to(device)
    path = checkpoint / "input_vectors.npy"
    return model, torch.from_numpy(np.load(path)).to(device) if path.is_file() else None


# ---- teacher ----


def _build_teacher(work: Work) -> tuple[teacher.Teacher, prompts.Pieces, data.Prepared]:
    settings, prepared = work.settings, work.prepared()
    with work.observer.phase("set_up"):
        torch.manual_seed(settings.seed)
        encoder, _ = load_sasrec(
            work.inputs["student_fit"] / "best", prepared, settings, work.device
        )
        model = teacher.Teacher(settings, encoder, work.device)
        texts = [*prepared.titles, prompts.INSTRUCTION, prompts.CUE]
        tokenizer = llm.load_tokenizer(settings.teacher.llm_model_name, texts)
        pieces = prompts.tokenise(tokenizer, prepared.titles, settings.teacher.max_title_tokens)
    teacher.describe(model, work.observer)
    return model, pieces, prepared


def _training_queries(prepared: data.Prepared) -> ranking.Queries:
    """Every training sample as a query; its row is its sample id."""
    users, positions = data.train_samples(prepared)
    starts = prepared.offsets[users]
    return ranking.Queries(prepared.items, starts, starts + positions, users)


def teacher_fit(work: Work) -> None:
    """Train adapters, router, projector and item head on the training samples."""
    settings, train, observer = work.settings, work.settings.train, work.observer
    model, pieces, prepared = _build_teacher(work)
    with observer.phase("set_up"):
        queries = _training_queries(prepared)
        states = teacher.encoder_states(model.encoder, queries)
        optimizer = torch.optim.AdamW(
            model.trainable(), lr=train.lr, weight_decay=train.weight_decay, fused=True
        )

    def batches(epoch: int) -> teacher.GatedPrompts:
        return teacher.GatedPrompts(
            states,
            pieces,
            queries,
            settings.teacher.max_history,
            train.batch_size,
            seed=settings.seed + epoch,
            most=train.max_steps,
        )

    per_epoch = -(-len(batches(0)) // train.accumulate_grad_batches)
    total = per_epoch * train.max_epochs
    weight = 0.0

    def before_step(optimizer_steps: int) -> None:
        nonlocal weight
        weight = teacher.reverse_weight(settings, optimizer_steps, total)

    def loss(batch: dict) -> Tensor:
        observer.largest("largest_train_batch", batch["samples"])
        return teacher.training_loss(model, batch, settings, weight, observer)

    score = teacher.scorer(model, pieces, settings, observer)
    fit = Fit(
        model=model,
        batches=batches,
        loss=loss,
        validate=lambda: ranking.evaluate(score, prepared, "validation", settings.eval)[0],
        save=lambda name: teacher.save_teacher(model, work.folder / name),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_then_linear(total)),
        before_step=before_step,
        device=work.device,
        precision=train.precision,
        accumulate_grad_batches=train.accumulate_grad_batches,
        gradient_clip_val=train.gradient_clip_val,
        max_epochs=train.max_epochs,
        patience=train.patience,
        num_workers=train.num_workers,
    )
    _run_fit(work, fit)


def _warm_up_then_linear(total: int) -> Callable[[int], float]:
    """Factor of the learning rate: linear warm-up over 5 % of the steps, then linear to zero."""
    warm = max(1, total // 20)
    return lambda step: min((step + 1) / warm, max(0.0, (total - step) / max(1, total - warm)))


def _trained_teacher(work: Work) -> tuple[teacher.Teacher, prompts.Pieces, data.Prepared]:
    model, pieces, prepared = _build_teacher(work)
    with work.observer.phase("load"):
        teacher.load_teacher(model, work.inputs["teacher_fit"] / "best")
    return model, pieces, prepared


def teacher_test(work: Work) -> None:
    """Rank the test items with the best teacher."""
    model, pieces, prepared = _trained_teacher(work)
    _test(work, teacher.scorer(model, pieces, work.settings, work.observer), prepared)


def teacher_outputs(work: Work) -> None:
    """Store what the teacher says on every training sample: top-k, log-sum-exp, embedding."""
    model, pieces, prepared = _trained_teacher(work)
    settings, observer = work.settings, work.observer
    queries = _training_queries(prepared)
    kept = min(settings.teacher.outputs_top_k, prepared.num_items)
    writer = outputs.Writer(
        work.folder / "outputs",
        samples=len(queries),
        top_k=kept,
        width=model.backbone.config.hidden_size,
        hashes={"data": prepared.digest, "teacher": work.provenance["teacher_fit"]},
    )
    with writer, observer.phase("outputs"):
        for batch, state_BH, scores_BV in teacher.infer(
            model, pieces, queries, settings, observer, writer.missing()
        ):
            log_total = scores_BV[:, 1:].logsumexp(1)
            target = scores_BV.gather(1, batch["targets"][:, None])[:, 0] - log_total
            ids, best = metrics.top_k(scores_BV, kept)
            columns = (batch["rows"], ids.int(), best, log_total, target, state_BH)
            writer.write(*(column.cpu().numpy() for column in columns))
            observer.step(batch["samples"])
    with observer.phase("item_embeddings"):
        writer.finish(teacher.item_embeddings(model, pieces))


# ---- distillation ----


def distill_fit(work: Work) -> None:
    """Train a SASRec on its own loss plus the teacher's ranking, with the teacher's item embeddings
    inside.
    """
    settings, prepared = work.settings, work.prepared()
    stored = outputs.Outputs.open(
        work.inputs["teacher_outputs"] / "outputs", {"data": prepared.digest}
    )
    torch.manual_seed(settings.seed)
    learner = student.Distilled(prepared, stored, settings.student, settings.distill).to(
        work.device
    )
    fit = _sasrec_fit(
        work,
        learner,
        prepared,
        loss=learner.loss,
        score=learner.scorer(settings.eval.batch_size),
        save=lambda name: learner.save(work.folder / name),
        train=settings.distill,
    )
    _run_fit(work, fit)


def distill_test(work: Work) -> None:
    """Rank the test items with the best distilled student."""
    _test_student(work, work.inputs["distill_fit"] / "best")


def evaluate_all(work: Work) -> None:
    """Baseline student, teacher and distilled student side by side, with paired differences over
    users.
    """
    found = {}
    ranks = {}
    names = {"student": "student_test", "teacher": "teacher_test", "distilled": "distill_test"}
    for name, stage in names.items():
        text = (work.inputs[stage] / "metrics.json").read_text()
        found[name] = json.loads(text)
        ranks[name] = torch.from_numpy(np.load(work.inputs[stage] / "ranks.npy"))
    for name in ("teacher", "distilled"):
        for k in work.settings.eval.top_k:
            key = f"minus_student@{k}"
            found[name][key] = metrics.paired_difference(ranks[name], ranks["student"], k)
    artefacts.write_json(work.folder / "all_evaluation_results.json", found)
    work.observer.metrics = found


# ---- shared endings ----


def _run_fit(work: Work, fit: Fit) -> None:
    """Train under the chosen trainer and leave the traces beside the checkpoints."""
    if work.settings.train.trainer == "lightning":
        with work.observer.phase("set_up"):
            from core.lightning import fit_lightning

        fit_lightning(fit, work.observer)
    else:
        fit_loop(fit, work.observer)
    trace = [json.dumps({"step": i, "loss": x}) for i, x in enumerate(work.observer.loss_trace())]
    (work.folder / "steps.jsonl").write_text("\n".join(trace) + "\n")
    artefacts.write_json(work.folder / "history.json", fit.history)
    work.observer.metrics = max(fit.history, key=lambda epoch: epoch[fit.monitor])


def _test(work: Work, score: ranking.Scorer, prepared: data.Prepared) -> None:
    """Rank, then write metrics as JSON and as text."""

    def watched(queries: ranking.Queries):
        for rows, scores in score(queries):
            yield rows, scores
            work.observer.step(len(rows))

    with work.observer.phase("evaluation"):
        found, ranks = ranking.evaluate(watched, prepared, "test", work.settings.eval)
    np.save(work.folder / "ranks.npy", np.array(ranks, dtype=np.float32))
    artefacts.write_json(work.folder / "metrics.json", found)
    lines = [
        f"test_{name}: {value:.6g}" for name, value in found.items() if not isinstance(value, list)
    ]
    (work.folder / "test_metrics.txt").write_text("\n".join(lines) + "\n")
    work.observer.metrics, work.observer.ranks = found, ranks

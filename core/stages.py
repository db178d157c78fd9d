"""What each stage does, from ratings to the comparison of three models.

A stage is a function of a `Work` order. It reads upstream artefacts by name, writes into its own
folder, and reports through the observer. `core.pipeline` says in which order and with what.
"""

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core import (
    artefacts,
    checkpoints,
    compiling,
    data,
    llm,
    metrics,
    outputs,
    prompts,
    ranking,
    ranks,
    student,
    teacher,
)
from core.loop import Fit, adamw, fit_loop
from core.observe import Observer
from core.overlap import Overlapped
from core.plan import GatedPrompts
from core.sasrec import SASRec
from core.states import encoder_states

PROBE = "probe.npy"
"""Beside the checkpoints of a short trial: what the model said when it had written them."""
PROBED_USERS = 16


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
    batches: int = 0
    """Batches of each phase in a short trial; 0 = all."""
    group: ranks.Group = ranks.ALONE
    """Given to the further processes of one training."""

    def most(self, batch_size: int) -> int | None:
        """Samples of a phase in a short trial; None = all of them."""
        return self.batches * batch_size or None

    def prepared(self) -> data.Prepared:
        """The prepared split."""
        return data.load(self.inputs["prepare_data"] / "split")


# ---- data and student ----


def prepare_data(work: Work) -> None:
    """Read the ratings and cut them leave-one-out."""
    with work.observer.phase("data"):
        shutil.rmtree(work.folder / "split", ignore_errors=True)
        with TemporaryDirectory(dir=work.folder) as scratch:
            prepared = data.prepare(work.settings.data, Path(scratch))
            data.save(prepared, work.folder / "split")
    work.observer.facts.update(cut=prepared.cut, data_digest=prepared.digest)


def student_fit(work: Work) -> None:
    """Train the baseline SASRec on every training prefix."""
    settings, prepared = work.settings, work.prepared()
    torch.manual_seed(settings.seed)
    model = SASRec(prepared.num_items, settings.student).to(work.device)
    score = student.scorer(model, settings.student, settings.eval.batch_size)
    proposal = student.Proposal(prepared, settings.student)
    fit = _sasrec_fit(
        work,
        model,
        prepared,
        loss=lambda batch: student.training_loss(model, batch, settings.student, proposal),
        score=score,
        save=lambda name: student.save_student(model, work.folder / name),
        train=settings.student,
    )
    _run_fit(work, fit, lambda: probe(score, prepared, settings.eval.batch_size))


def _sasrec_fit(work: Work, model, prepared, *, loss, score, save, train) -> Fit:
    """What both trainings of a SASRec share; `train` holds batch size, rates and patience."""
    settings = work.settings
    batches_of = settings.student.model_copy(update={"batch_size": train.batch_size})
    most = work.most(settings.eval.batch_size)
    epochs = 1 if work.batches else train.max_epochs
    optimizer = adamw(model.parameters(), train.lr, train.weight_decay)

    def batches(epoch: int) -> student.SequenceBatches:
        return student.SequenceBatches(
            prepared, batches_of, settings.seed + epoch, work.batches or None
        )

    return Fit(
        model=model,
        batches=batches,
        loss=loss,
        validate=lambda: ranking.evaluate(score, prepared, "validation", settings.eval, most)[0],
        save=save,
        optimizer=optimizer,
        scheduler=learning_rate(optimizer, settings.student.lr_schedule, epochs * len(batches(0))),
        device=work.device,
        precision=settings.student.precision,
        max_epochs=epochs,
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
    _test(work, score, prepared, settings.eval.batch_size)


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


def build_teacher(work: Work) -> tuple[teacher.Teacher, prompts.Pieces, data.Prepared]:
    """The untrained teacher of these settings, the tokenised catalogue and the split."""
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
    work.observer.until_end.enter_context(compiling.account(model.execution, work.observer))
    return model, pieces, prepared


def _training_queries(
    work: Work, prepared: data.Prepared, pieces: prompts.Pieces, most: int
) -> ranking.Queries:
    """Every training sample as a query; its row is its sample id. A short trial has those of `most`
    prompts.
    """
    users, positions = data.train_samples(prepared)
    starts = prepared.offsets[users]
    queries = ranking.Queries(prepared.items, starts, starts + positions, users)
    if not work.batches:
        return queries
    teaching = work.settings.teacher
    return prompts.longest(pieces, queries, teaching.max_history, teaching.mode, most)


def _micro_batches(work: Work) -> int:
    """Micro-batches of a short trial: one at least follows the first optimizer step."""
    return max(work.batches, work.settings.train.accumulate_grad_batches + 1)


def teacher_fit(work: Work) -> None:
    """Train adapters, router, projector and item head on the training samples."""
    with ranks.together(work) as group:
        _teacher_fit(work, group)


def _teacher_fit(work: Work, group: ranks.Group) -> None:
    settings, train, observer = work.settings, work.settings.train, work.observer
    model, pieces, prepared = build_teacher(work)
    with observer.phase("set_up"):
        queries = _training_queries(work, prepared, pieces, _micro_batches(work) * train.batch_size)
        asked = prompts.prompts_of(queries, settings.teacher.max_history, settings.teacher.mode)
        states = encoder_states(model.encoder, prompts.gate_queries(asked))
        optimizer = adamw(model.trainable(), train.lr, train.weight_decay)

    def batches(epoch: int) -> GatedPrompts:
        return GatedPrompts(
            states,
            pieces,
            asked,
            train.batch_size,
            batching=settings.data.batching,
            seed=settings.seed + epoch,
            most=train.max_steps,
            group=group,
        )

    epochs = 1 if work.batches else train.max_epochs
    per_epoch = -(-len(batches(0)) // train.accumulate_grad_batches)
    total = per_epoch * epochs
    weight = 0.0

    def before_step(optimizer_steps: int) -> None:
        nonlocal weight
        weight = teacher.reverse_weight(settings, optimizer_steps, total)

    def loss(batch: dict) -> Tensor:
        observer.largest("largest_train_batch", batch["prompts"])
        observer.batch(batch)
        return teacher.training_loss(model, batch, settings, weight, observer)

    score = teacher.scorer(model, pieces, settings, observer)
    most = work.most(settings.teacher.inference_batch_size)
    fit = Fit(
        model=model,
        batches=batches,
        loss=loss,
        validate=lambda: ranking.evaluate(score, prepared, "validation", settings.eval, most)[0],
        save=lambda name: checkpoints.save_teacher(model, work.folder / name),
        optimizer=optimizer,
        scheduler=learning_rate(optimizer, "linear", total),
        before_step=before_step,
        device=work.device,
        precision=train.precision,
        accumulate_grad_batches=train.accumulate_grad_batches,
        gradient_clip_val=train.gradient_clip_val,
        max_epochs=epochs,
        patience=train.patience,
        num_workers=train.num_workers,
        group=group,
    )
    _run_fit(work, fit, lambda: probe(score, prepared, settings.teacher.inference_batch_size))


def learning_rate(
    optimizer: torch.optim.Optimizer, schedule: str, total: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """`linear`: warm-up over 5 % of the `total` steps, then linear to zero; `constant`: none."""
    if schedule == "constant":
        return None
    warm = max(1, total // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warm, max(0.0, (total - step) / max(1, total - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _trained_teacher(work: Work) -> tuple[teacher.Teacher, prompts.Pieces, data.Prepared]:
    model, pieces, prepared = build_teacher(work)
    with work.observer.phase("load"):
        checkpoints.load_teacher(model, work.inputs["teacher_fit"] / "best")
    return model, pieces, prepared


def teacher_test(work: Work) -> None:
    """Rank the test items with the best teacher."""
    model, pieces, prepared = _trained_teacher(work)
    score = teacher.scorer(model, pieces, work.settings, work.observer)
    _test(work, score, prepared, work.settings.teacher.inference_batch_size)


def teacher_outputs(work: Work) -> None:
    """Store what the teacher says on every training sample: top-k, log-sum-exp, embedding."""
    model, pieces, prepared = _trained_teacher(work)
    settings, observer = work.settings, work.observer
    most = work.batches * settings.teacher.inference_batch_size
    queries = _training_queries(work, prepared, pieces, most)
    kept = min(settings.teacher.outputs_top_k, prepared.num_items)
    writer = outputs.Writer(
        work.folder / "outputs",
        samples=len(queries),
        top_k=kept,
        width=model.width,
        hashes={"data": prepared.digest, "teacher": work.provenance["teacher_fit"]},
    )
    said = functools.partial(output_columns, kept=kept)
    with writer, Overlapped(said, writer.write) as store, observer.phase("outputs"):
        for batch, state_BH, scores_BV in teacher.infer(
            model, pieces, queries, settings, observer, writer.missing()
        ):
            store(batch["rows"].numpy(), scores_BV, batch["targets"], state_BH)
            observer.step(batch["samples"])
    with observer.phase("item_embeddings"):
        writer.finish(_item_embeddings(work, model, pieces))


def output_columns(
    scores_BV: Tensor, targets_B: Tensor, state_BH: Tensor, kept: int
) -> dict[str, Tensor]:
    """What is stored of each row, by the names of `Writer.write`, which refuses what is not finite:
    nothing is read back from the device here.
    """
    log_total_B = scores_BV[:, 1:].logsumexp(1)
    ids_BK, best_BK = metrics.best(scores_BV, kept)
    return {
        "top_ids": ids_BK.int(),
        "scores": best_BK,
        "log_sum_exp": log_total_B,
        "target_log_prob": scores_BV.gather(1, targets_B[:, None])[:, 0] - log_total_B,
        "embedding": state_BH,
    }


def _item_embeddings(work: Work, model: teacher.Teacher, pieces: prompts.Pieces) -> np.ndarray:
    """The backbone's view of each title, (V+1, H); in a short trial of the first ones, 0 after."""
    if not work.batches:
        return teacher.item_embeddings(model, pieces)
    most = 1 + work.batches * work.settings.teacher.inference_batch_size
    found = teacher.item_embeddings(model, replace(pieces, lengths=pieces.lengths[:most]))
    return np.pad(found, ((0, len(pieces.lengths) - len(found)), (0, 0)))


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

    def loss_of_few(batch: dict) -> Tensor:
        # A short trial has answers to few samples: they stand in for those of all others.
        return learner.loss(batch | {"sample_ids": batch["sample_ids"] % stored.samples})

    score = learner.scorer(settings.eval.batch_size)
    fit = _sasrec_fit(
        work,
        learner,
        prepared,
        loss=loss_of_few if work.batches else learner.loss,
        score=score,
        save=lambda name: learner.save(work.folder / name),
        train=settings.distill,
    )
    _run_fit(work, fit, lambda: probe(score, prepared, settings.eval.batch_size))


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
    if work.batches:  # batches of different sizes end at different users of the same order
        shared = min(len(own) for own in ranks.values())
        ranks = {name: own[:shared] for name, own in ranks.items()}
    for name in ("teacher", "distilled"):
        for k in work.settings.eval.top_k:
            key = f"minus_student@{k}"
            found[name][key] = metrics.paired_difference(ranks[name], ranks["student"], k)
    artefacts.write_json(work.folder / "all_evaluation_results.json", found)
    work.observer.metrics = found


# ---- shared endings ----


def _run_fit(work: Work, fit: Fit, ask: Callable[[], np.ndarray]) -> None:
    """Train under the chosen trainer and leave the traces beside the checkpoints; `ask` gives the
    trained model's probe.
    """
    if work.settings.train.trainer == "lightning":
        with work.observer.phase("set_up"):
            from core.lightning import fit_lightning

        fit_lightning(fit, work.observer)
    else:
        fit_loop(fit, work.observer)
    if fit.group.rank:
        return  # rank 0 has the losses and writes
    trace = [json.dumps({"step": i, "loss": x}) for i, x in enumerate(work.observer.loss_trace())]
    (work.folder / "steps.jsonl").write_text("\n".join(trace) + "\n")
    artefacts.write_json(work.folder / "history.json", fit.history)
    work.observer.metrics = max(fit.history, key=lambda epoch: epoch[fit.monitor])
    if work.batches:
        with work.observer.phase("probe"):
            np.save(work.folder / PROBE, ask())


def probe(score: ranking.Scorer, prepared: data.Prepared, batch_size: int) -> np.ndarray:
    """What a model says of some validation users, (P, V+1) fp32; its stored form must say it too.

    One whole batch is scored, so that nothing runs in a shape of its own.
    """
    ((_, scores_BV),) = score(ranking.held_out(prepared, "validation").longest(batch_size))
    return scores_BV[:PROBED_USERS].float().cpu().numpy()


def _test(work: Work, score: ranking.Scorer, prepared: data.Prepared, batch_size: int) -> None:
    """Rank, then write metrics as JSON and as text."""

    def watched(queries: ranking.Queries):
        for rows, scores in score(queries):
            yield rows, scores
            work.observer.step(len(rows))

    with work.observer.phase("evaluation"):
        found, ranks = ranking.evaluate(
            watched, prepared, "test", work.settings.eval, work.most(batch_size)
        )
    np.save(work.folder / "ranks.npy", np.array(ranks, dtype=np.float32))
    artefacts.write_json(work.folder / "metrics.json", found)
    lines = [
        f"test_{name}: {value:.6g}" for name, value in found.items() if not isinstance(value, list)
    ]
    (work.folder / "test_metrics.txt").write_text("\n".join(lines) + "\n")
    work.observer.metrics, work.observer.ranks = found, ranks

"""What the goals' sides share: data, tokens, a teacher whose adapters act, and its present ways.

Shapes: B users, H backbone width, V items.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import data, llm, outputs, prompts, ranking, stages
from core import teacher as teaching
from core.data import Prepared
from core.loop import Fit, adamw, autocast, fit_loop, to_device
from core.observe import Observer, Step
from core.overlap import Overlapped
from core.plan import GatedPrompts
from core.prompts import Pieces, gate_queries, prompts_of
from core.ranking import Queries
from core.sasrec import SASRec
from core.settings import (
    Batching,
    DataSettings,
    EvalSettings,
    Mode,
    Precision,
    Settings,
    StudentSettings,
    SyntheticSettings,
    TeacherSettings,
    TrainSettings,
)
from core.states import encoder_states
from core.teacher import Teacher
from perf import shape_counts
from perf.workloads import unobserved

OPT_256 = dict(
    model_type="opt", hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024, num_hidden_layers=4,
    num_attention_heads=4, vocab_size=50272, max_position_embeddings=2048,
)  # fmt: skip
TOP_K = 10


def seconds_on(device: str) -> float:
    """Seconds: of this process's processor, or on a GPU, once it has done all it was asked for,
    those that passed.
    """
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class World:
    """Sizes, and everything built from them once."""

    preset: str = "opt-256"
    prompts: int = 64
    """Of a training step, of an evaluation and of the outputs."""
    batch_size: int = 8
    max_history: int = TeacherSettings.model_fields["max_history"].default
    synthetic: SyntheticSettings = field(default_factory=SyntheticSettings)
    experts: int = 4
    rank: int = 16
    mode: Mode = "instance"
    batching: Batching = "grouped"
    whole_users: int = 0
    """The step has all samples of so many users, the longest; 0 = `prompts` samples drawn from all.
    """
    device: str = "cpu"
    precision: Precision = "fp32"
    adapter: Literal["lora", "qlora"] = "lora"
    compile: Literal["off", "regional"] = "off"

    @property
    def on(self) -> torch.device:
        """Where all sides run."""
        return torch.device(self.device)

    def clock(self) -> float:
        """Seconds on the device's clock."""
        return seconds_on(self.device)

    @cached_property
    def settings(self) -> Settings:
        """Adapters on all linear layers; the training softmax runs over the whole catalogue."""
        if self.preset == "opt-256":
            llm.PRESETS.setdefault(self.preset, OPT_256)
        given = TeacherSettings(
            llm_model_name=self.preset,
            adapter=self.adapter,
            target_modules=self.layers,
            lora_r=self.rank,
            num_experts=self.experts,
            max_history=self.max_history,
            train_candidates=10_000,
            inference_batch_size=self.batch_size,
            outputs_top_k=TOP_K,
            mode=self.mode,
        )
        return Settings(
            data=DataSettings(synthetic=self.synthetic, batching=self.batching),
            student=StudentSettings(max_length=max(50, self.max_history)),
            teacher=given,
            train=TrainSettings(
                batch_size=self.batch_size, precision=self.precision, compile=self.compile
            ),
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """All linear layers of the preset."""
        return shape_counts.LAYERS[llm.PRESETS[self.preset]["model_type"]]

    @cached_property
    def prepared(self) -> Prepared:
        """The split, as many users evaluated as there are prompts."""
        found = data.prepare(self.settings.data)
        drawn = np.random.default_rng(2).permutation(found.num_users)[: self.prompts]
        return replace(found, eval_users=np.sort(drawn))

    @cached_property
    def tokenizer(self):
        """One vocabulary for every preset: trained on these titles."""
        texts = [*self.prepared.titles, prompts.INSTRUCTION, prompts.CUE]
        return llm.load_tokenizer("tiny", texts)

    @cached_property
    def pieces(self) -> Pieces:
        """The tokenised catalogue."""
        return prompts.tokenise(
            self.tokenizer, self.prepared.titles, self.settings.teacher.max_title_tokens
        )

    @cached_property
    def queries(self) -> Queries:
        """Every training sample."""
        users, positions = data.train_samples(self.prepared)
        starts = self.prepared.offsets[users]
        return Queries(self.prepared.items, starts, starts + positions, users)

    @cached_property
    def rows(self) -> np.ndarray:
        """The samples of the step."""
        if self.whole_users:
            counts = np.bincount(self.queries.users)
            chosen = np.argsort(-counts, kind="stable")[: self.whole_users]
            return np.flatnonzero(np.isin(self.queries.users, chosen))
        return np.random.default_rng(1).permutation(len(self.queries))[: self.prompts]

    def new_teacher(self) -> Teacher:
        """A teacher with adapters that act and gates that differ, the same every time."""
        given = self.settings
        torch.manual_seed(3)
        encoder = SASRec(self.prepared.num_items, given.student).eval()
        model = Teacher(given, encoder, self.on)
        tiny.activate(model)
        for name, parameter in model.backbone.named_parameters():
            if "lora_B" in name:  # on all layers: larger ones would drown the backbone
                parameter.data.mul_(0.1)
        return model

    def batches(self, model: Teacher) -> GatedPrompts:
        """The training batches of the step's samples, as `core` plans and makes them."""
        return batches_of(self, model, self.rows, self.batch_size)


def batches_of(world: World, model: Teacher, rows: np.ndarray, size: int) -> GatedPrompts:
    """Training batches of some samples."""
    asked = prompts_of(world.queries.take(rows), world.max_history, world.mode)
    states = encoder_states(model.encoder, gate_queries(asked))
    return GatedPrompts(states, world.pieces, asked, size, batching=world.batching, seed=0)


def loss_and_gradients(world: World, model: Teacher) -> tuple[float, dict[str, Tensor]]:
    """Mean loss of the step's samples, and the gradients under names without the backbone's
    wrapping.
    """
    model.train().zero_grad(set_to_none=True)
    total, batches = 0.0, world.batches(model)
    for index in range(len(batches)):
        batch = to_device(batches[index], world.on)
        with autocast(world.precision, world.on):
            loss = teaching.training_loss(model, batch, world.settings, 0.0, unobserved())
        loss = loss * (batch["samples"] / len(world.rows))
        loss.backward()
        total += loss.item()
    return total, named_gradients(model)


def exact_loss_and_gradients(
    world: World, model: Teacher, rows: np.ndarray
) -> tuple[float, dict[str, Tensor]]:
    """Of some samples in fp64, up to the states; the loss on them is plain, since the teacher's own
    scores are fp32. The router stays fp32, as it always does.
    """
    model.double().train().zero_grad(set_to_none=True)
    model.router.float()
    model.encoder.double()
    batch = to_device(batches_of(world, model, rows, len(rows))[0], world.on)
    return exact_loss(model, model.read_out(batch), batch["targets"]), named_gradients(model)


def exact_loss(model: nn.Module, state_BH: Tensor, targets_B: Tensor) -> float:
    """Cross-entropy over all items in the states' dtype, gradients made."""
    scores_BV1 = state_BH @ model.project(model.item_table).t()
    loss = F.cross_entropy(scores_BV1[:, 1:], targets_B - 1)
    loss.backward()
    return loss.item()


def named_gradients(model: Teacher) -> dict[str, Tensor]:
    """Gradients under names without the backbone's wrapping, taken off the model."""
    found = {
        name.removeprefix("backbone.base_model.model."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return found


def training_step(world: World, model: Teacher) -> Callable[[], None]:
    """One optimizer step over the samples by `core`'s own loop, planning and SASRec states
    included. The rate leaves the weights as they are: every run does the same arithmetic.
    """
    optimizer = adamw(model.trainable(), lr=1e-30, weight_decay=0.0)
    return lambda: _fit(world, model, optimizer, unobserved(), 1, whole=True)


def training_epochs(world: World, model: Teacher, epochs: int, on_step: Callable[[], None]) -> None:
    """Epochs over the samples, an optimizer step for each batch, gradients clipped."""
    optimizer = adamw(model.trainable(), lr=1e-30, weight_decay=0.0)

    def told(step: Step) -> None:
        on_step()

    observer = Observer(on_step=told)
    observer.facts["operators"] = 0  # no census: it is no part of the work
    _fit(world, model, optimizer, observer, epochs, whole=False)


def _fit(world: World, model: Teacher, optimizer, observer: Observer, epochs: int, whole: bool):
    count = len(batches := world.batches(model))

    def loss(batch: dict) -> Tensor:
        found = teaching.training_loss(model, batch, world.settings, 0.0, observer)
        return found * (batch["samples"] * count / len(world.rows)) if whole else found

    fit_loop(
        Fit(
            model=model,
            batches=lambda epoch: batches,
            loss=loss,
            validate=lambda: {"ndcg@10": 0.0},
            save=lambda name: None,
            optimizer=optimizer,
            device=world.on,
            precision=world.precision,
            max_epochs=epochs,
            patience=epochs + 1,
            accumulate_grad_batches=count if whole else 1,
            gradient_clip_val=0.0 if whole else 1.0,
        ),
        observer,
    )


def evaluate(world: World, model: Teacher) -> dict:
    """Metrics of the evaluated users."""
    score = teaching.scorer(model, world.pieces, world.settings, unobserved())
    return ranking.evaluate(score, world.prepared, "validation", EvalSettings())[0]


def forward_only(world: World, model: Teacher, queries: Queries) -> None:
    """States and scores of every query, thrown away."""
    for _ in teaching.infer(model, world.pieces, queries, world.settings, unobserved()):
        pass


def write_outputs(world: World, model: Teacher, queries: Queries, folder: Path) -> None:
    """Teacher outputs of the queries, as the stage `teacher_outputs` writes them; the items' own
    embeddings, made once for a catalogue, are left out.
    """
    writer = outputs.Writer(
        folder, samples=len(queries), top_k=TOP_K, width=model.width, hashes={"data": "goals"}
    )
    said = functools.partial(stages.output_columns, kept=TOP_K)
    with writer, Overlapped(said, writer.write) as store:
        for batch, state_BH, scores_BV in teaching.infer(
            model, world.pieces, queries, world.settings, unobserved(), writer.missing()
        ):
            store(batch["rows"].numpy(), scores_BV, batch["targets"], state_BH)
    with writer:
        writer.finish(np.zeros((len(world.pieces.lengths), model.width), dtype=np.float32))

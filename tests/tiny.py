"""The smallest pipeline to test on: synthetic ratings, a SASRec, teachers of two layers."""

from functools import cache

import numpy as np
import torch

from core import data, llm, prompts
from core.data import Prepared
from core.plan import GatedPrompts, Plan
from core.prompts import Pieces, gate_queries, prompts_of
from core.ranking import Queries
from core.sasrec import SASRec
from core.settings import (
    DataSettings,
    Settings,
    StudentSettings,
    SyntheticSettings,
    TeacherSettings,
    TrainSettings,
)
from core.states import encoder_states
from core.teacher import Teacher

CPU = torch.device("cpu")
FAMILIES = ("tiny", "tiny-llama", "tiny-qwen2")
STUDENT = StudentSettings(hidden_size=16, num_blocks=1, max_length=6)


def settings(precision: str = "fp32", student: StudentSettings = STUDENT, **teacher) -> Settings:
    """Settings with some teacher leaves changed."""
    return Settings(
        student=student,
        teacher=TeacherSettings(**{"max_history": 4} | teacher),
        train=TrainSettings(precision=precision),
    )


@cache
def prepared() -> Prepared:
    """Sixty users on about fifty items; some histories are longer than the student's window."""
    shape = SyntheticSettings(users=60, items=60, mean_length=9)
    return data.prepare(DataSettings(synthetic=shape))


@cache
def pieces() -> Pieces:
    """The catalogue's tokens; the tiny backbones share one vocabulary size."""
    titles = prepared().titles
    texts = [*titles, prompts.INSTRUCTION, prompts.CUE]
    return prompts.tokenise(llm.load_tokenizer("tiny", texts), titles, 16)


@cache
def queries() -> Queries:
    """Every training sample; its row is its sample id."""
    users, positions = data.train_samples(prepared())
    starts = prepared().offsets[users]
    return Queries(prepared().items, starts, starts + positions, users)


def encoder(student: StudentSettings = STUDENT) -> SASRec:
    """A SASRec with random weights, the same every time."""
    torch.manual_seed(3)
    return SASRec(prepared().num_items, student).eval()


def teacher(given: Settings, active: bool = True) -> Teacher:
    """A teacher; `active` gives it adapters that act and gates that differ, as training would."""
    torch.manual_seed(given.seed)
    model = Teacher(given, encoder(given.student), CPU).eval()
    if active:
        activate(model)
    return model


@torch.no_grad()
def activate(model: Teacher) -> None:
    """Give zero adapters a random second matrix and sharpen the router."""
    random = torch.Generator().manual_seed(5)
    for name, parameter in model.backbone.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    last = list(model.router.parameters())[-1]
    weight = last if last.dim() > 1 else list(model.router.parameters())[-2]
    weight.mul_(8)


def batches(model: Teacher, given: Settings, batch_size: int, **options) -> GatedPrompts:
    """All training samples in batches as the settings ask for them."""
    asked = prompts_of(queries(), given.teacher.max_history, given.teacher.mode)
    states = encoder_states(model.encoder, gate_queries(asked))
    options = {"batching": given.data.batching} | options
    return GatedPrompts(states, pieces(), asked, batch_size, **options)


def batch(model: Teacher, given: Settings, rows: list[int] | np.ndarray) -> dict:
    """One gated batch of the chosen training samples, or prompts where one answers many."""
    found = batches(model, given, len(rows), batching="grouped")
    found.plan = Plan([np.asarray(rows)])
    return found[0]


def close(a, b, tolerance: float = 1e-5) -> bool:
    """Largest difference relative to the largest value."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-12)

"""Times of the guarded work against references that give the same result, and against yardsticks.

Shapes: B users, T tokens, D width, K experts, R ranks of one expert.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from core import ilora, metrics, prompts
from core.settings import TeacherSettings
from core.states import encoder_states
from perf import reference, workloads
from perf.timing import own_seconds

pytestmark = [pytest.mark.perf, pytest.mark.benchmark(timer=own_seconds)]
MEMORY_FILES = Path("/dev/shm")


@pytest.fixture
def timed(guard, benchmark):
    """Judge a ratio, and leave the plain time of the guarded work in pytest-benchmark's table."""

    def judge(name, old, now):
        benchmark.pedantic(now, rounds=5, warmup_rounds=1, iterations=1)
        found = guard.ratio(name, old, now)
        benchmark.extra_info.update(ratio=found.ratio, low=found.low, blocks=found.blocks)

    return judge


# ---- references: equal results, asserted before any time ----


class OneLayer(nn.Module):
    """The least that peft adapts."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.q_proj(x_BTD)


def test_gated_adapters_against_an_expert_axis(timed):
    users, tokens, width = 8, 48, 256
    settings = TeacherSettings(target_modules=("q_proj",))
    experts, rank = settings.num_experts, settings.lora_r
    torch.manual_seed(0)
    gate = ilora.RankGate()
    model = ilora.add_adapters(OneLayer(width), settings, gate)
    (layer,) = ilora.adapted_layers(model)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(up, std=0.1)
    share = rank // experts
    old = reference.ExpertLoRA(
        layer.base_layer,
        down.detach().view(experts, share, width).clone(),
        up.detach().view(width, experts, share).movedim(1, 0).clone(),
        settings.lora_alpha / share,
    )
    x_BTD = torch.randn(users, tokens, width)
    gate_BK = torch.randn(users, experts).softmax(-1)
    gate_rows = torch.arange(users).repeat_interleave(tokens)

    def now() -> Tensor:
        factors = ilora.token_factors(gate_BK, gate_rows, settings)
        with gate.bound(factors):
            y_BTD = model(x_BTD)
        y_BTD.square().mean().backward()
        return y_BTD

    def before() -> Tensor:
        y_BTD = old(x_BTD, gate_BK)
        y_BTD.square().mean().backward()
        return y_BTD

    assert tiny.close(now().detach(), before().detach())
    assert tiny.close(down.grad.view_as(old.down_KRD), old.down_KRD.grad)
    assert tiny.close(up.grad.view(width, experts, share).movedim(1, 0), old.up_KDR.grad)
    timed("gated adapters / expert axis", before, now)


def test_ranks_of_a_batch_against_a_loop_over_users(timed):
    # Small enough for a core's cache: what others do with the memory would move one side alone.
    users, items, cutoffs = 64, 400, (5, 10, 20)
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(users, items + 1, generator=random)
    targets = torch.randint(1, items + 1, (users,), generator=random)
    scores[torch.arange(users), targets] += 2.0  # some hits

    def now() -> dict:
        return metrics.summary(metrics.rank(scores, targets), cutoffs)

    def before() -> dict:
        return reference.metrics_by_user(scores.numpy(), targets.tolist(), cutoffs)

    found, wanted = now(), before()
    assert wanted["recall@20"] > wanted["recall@5"] > 0
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    timed("ranks of a batch / loop over users", before, now)


def test_states_of_prefixes_against_a_pass_for_each(timed):
    encoder, queries = tiny.encoder(), tiny.queries()

    def now() -> Tensor:
        return encoder_states(encoder, queries)

    def before() -> Tensor:
        return reference.states_by_prefix(encoder, queries)

    assert tiny.close(now(), before())
    timed("states of prefixes / a pass for each", before, now)


def test_prompts_of_a_batch_against_a_loop_over_tokens(timed):
    pieces, queries, rows = tiny.pieces(), tiny.queries(), np.arange(64)
    asked = prompts.prompts_of(queries, 10, "instance")

    def now() -> dict:
        return prompts.assemble(pieces, asked, rows)

    def before() -> tuple[Tensor, list[int]]:
        return reference.prompts_by_row(pieces, queries, 10, rows)

    found, (ids, lengths) = now(), before()
    assert torch.equal(found["ids"], ids) and found["tokens"] == sum(lengths)
    timed("prompts of a batch / loop over tokens", before, now)


# ---- yardsticks ----


def test_teacher_fit(timed):
    timed(
        "teacher_fit / yardstick",
        reference.training_yardstick(128, 32, workloads.MICRO_BATCHES),
        workloads.teacher_fit().run,
    )


def test_teacher_inference(timed):
    yardstick = reference.inference_yardstick(128, 36, 4)
    timed("teacher_inference / yardstick", yardstick, workloads.teacher_inference().run)


def test_student_fit(timed):
    yardstick = reference.training_yardstick(32, 8, 5)
    timed("student_fit / yardstick", yardstick, workloads.student_fit().run)


def test_ranking(timed):
    yardstick = reference.ranking_yardstick(workloads.RANKED_USERS, workloads.RANKED_ITEMS)
    timed("ranking / yardstick", yardstick, workloads.ranking_of_users().run)


def test_outputs_writing(timed):
    """In memory: a disk's moods would decide, and the files are counted elsewhere."""
    if not MEMORY_FILES.is_dir():
        pytest.skip("no file system in memory here")
    with tempfile.TemporaryDirectory(dir=MEMORY_FILES) as folder:
        place = Path(folder)
        yardstick = reference.writing_yardstick(place / "old", workloads.output_rows())
        timed(
            "outputs_writing / yardstick", yardstick, workloads.outputs_writing(place / "new").run
        )

"""Goals of the teacher's step, evaluation and outputs, against the old way and its rungs."""

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from core.loop import adamw, autocast
from core.outputs import Outputs
from core.ranking import held_out
from core.teacher import Teacher
from perf import products
from perf import world as present
from perf.equality import ALLOWED, GRADIENTS_FP64, equal, equal_gradients, equal_top_k
from perf.found import Found, timed
from perf.old_way import RUNGS, OldTeacher
from perf.timing import paired, rounds
from perf.world import TOP_K, World

CUTOFFS = (5, 10, 20)


def old(world: World, now: Teacher, rung: str) -> OldTeacher:
    """A teacher of the old way, or a rung from it, with the weights of the present one."""
    return OldTeacher(
        now, world.settings, world.tokenizer, world.prepared.titles, world.pieces, RUNGS[rung]
    )


def checked(world: World, now: Teacher, other: OldTeacher) -> str:
    """Equality of loss and gradients, in words. Raises Unequal."""
    loss, gradients = present.loss_and_gradients(world, now)
    other.train()
    other.zero_grad(set_to_none=True)
    with autocast(world.precision, world.on):
        before = other.accumulate(world.queries, world.rows, world.batch_size)
    loss_allowed, allowed = ALLOWED[world.precision]
    found = [
        equal("loss", loss, before, loss_allowed),
        equal_gradients(gradients, other.gradients(), allowed),
    ]
    other.zero_grad(set_to_none=True)
    return ", ".join(map(str, found))


EXACT_ROWS = 12


def exactly_checked(world: World, rung: str) -> str:
    """Equality in fp64 of the loss and the gradients of a few samples, but for those of the router,
    which is fp32 on purpose. Raises Unequal.
    """
    now, rows = world.new_teacher(), world.rows[:EXACT_ROWS]
    other = old(world, now, rung)
    loss, gradients = present.exact_loss_and_gradients(world, now, rows)
    other.double().train().router.float()
    other.batches(world.queries, rows, len(rows))
    targets_B = torch.from_numpy(world.queries.targets[rows])
    before = present.exact_loss(other, other.read_out(world.queries, rows), targets_B)
    found = [
        equal("loss", loss, before, GRADIENTS_FP64),
        equal_gradients(*map(_without_router, (gradients, other.gradients())), GRADIENTS_FP64),
    ]
    return ", ".join(map(str, found))


def _without_router(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: found for name, found in gradients.items() if not name.startswith("router.")}


def old_step(world: World, other: OldTeacher):
    """One optimizer step over the samples."""
    optimizer = adamw(other.trainable(), lr=1e-30, weight_decay=0.0)

    def run() -> None:
        with autocast(world.precision, world.on):
            other.accumulate(world.queries, world.rows, world.batch_size)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def training(world: World, blocks: int, wanted: float = 5) -> Iterator[Found]:
    """The training step, and what each rung between the old way and now is worth."""
    now = world.new_teacher()
    others = {rung: old(world, now, rung) for rung in RUNGS}
    equality = {rung: checked(world, now, other) for rung, other in others.items()}
    equality["old way"] += f"; fp64: {exactly_checked(world, 'old way')}"
    works = {rung: old_step(world, other) for rung, other in others.items()}
    works["now"] = present.training_step(world, now)
    works["now, packed"] = present.training_step(replace(world, batching="packed"), now)
    seconds = rounds(works, blocks, world.clock)
    ratio = paired(seconds["old way"], seconds["now"])
    yield timed(
        f"training step, {world.preset}, {world.prompts} prompts, {world.max_history} items",
        "old way",
        wanted,
        ratio,
        equality=equality["old way"],
        remark=products.most(ratio, works["now"], world.device),
    )
    names = [*RUNGS, "now", "now, packed"]
    for before, after in itertools.pairwise(names):
        yield timed(
            f"… {after}",
            before,
            None,
            paired(seconds[before], seconds[after]),
            equality=equality.get(after, ""),
        )


def evaluation(world: World, blocks: int) -> Iterator[Found]:
    """Evaluation of held-out users and outputs of as many samples, with their files."""
    now = world.new_teacher().eval()
    before = old(world, now, "old way").eval()
    held = held_out(world.prepared, "validation")
    asked = world.queries.take(world.rows)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        present.write_outputs(world, now, asked, folder / "new")
        before.write_outputs(asked, world.batch_size, folder / "old")
        equality = _equal_outputs(folder, len(asked))
        wanted = before.evaluate(held, world.batch_size, CUTOFFS)
        found = present.evaluate(world, now)
        metrics_differ = max(equal(n, found[n], wanted[n]).difference for n in wanted)

        def run_old() -> None:
            before.evaluate(held, world.batch_size, CUTOFFS)
            before.write_outputs(asked, world.batch_size, folder / "old")

        def run_now() -> None:
            shutil.rmtree(folder / "new", ignore_errors=True)
            present.evaluate(world, now)
            present.write_outputs(world, now, asked, folder / "new")

        seconds = rounds({"old": run_old, "now": run_now}, blocks, world.clock)
        ratio = paired(seconds["old"], seconds["now"])
        remark = products.most(ratio, run_now, world.device)
    work = f"{world.prompts} users and samples, {world.max_history} items"
    yield timed(
        f"teacher evaluation + outputs, {world.preset}, {work}",
        "old way",
        8,
        ratio,
        equality=f"{equality[0]}, {equality[1]}, metrics {metrics_differ:.1e}",
        remark=remark,
    )


def _equal_outputs(folder: Path, samples: int) -> list:
    """Whether both wrote the same answers. Raises Unequal."""
    parts = [torch.load(path) for path in (folder / "old").glob("batch_*.pt")]
    ids, scores, states = (
        torch.cat([part[name] for part in parts]) for name in ("ids", "scores", "embedding")
    )
    order = ids.argsort()
    rows = Outputs.open(folder / "new").rows(ids[order].numpy())
    top_ids = torch.from_numpy(rows["top_ids"])
    half = torch.from_numpy(rows["embedding"]).float()
    assert len(ids) == samples and top_ids.shape[1] == TOP_K
    return [
        equal_top_k(top_ids, scores[order]),
        equal("embedding (fp16)", half, states[order], 2e-3),
    ]


def outputs_rate(world: World, blocks: int) -> Iterator[Found]:
    """Outputs a second against the rate of the forward alone."""
    now = world.new_teacher().eval()
    asked = world.queries.take(world.rows)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "outputs"

        def write() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            present.write_outputs(world, now, asked, folder)

        seconds = rounds(
            {"forward": lambda: present.forward_only(world, now, asked), "outputs": write},
            4 * blocks,
            world.clock,
        )
    yield timed(
        f"outputs a second, {world.preset}, {world.prompts} samples",
        "forward only",
        0.95,
        paired(seconds["forward"], seconds["outputs"]),
        remark="processor time, that of a writing thread included",
    )


def causal(world: World, blocks: int) -> Iterator[Found]:
    """Targets a second with one forward for many prefixes of a user, against one for each."""
    works, targets = {}, len(world.rows)
    for mode in ("instance", "causal"):
        there = replace(world, mode=mode)
        works[mode] = present.training_step(there, there.new_teacher())
    seconds = rounds(works, blocks, world.clock)
    yield timed(
        f"targets a second, mode causal, {world.max_history} items",
        "mode instance",
        20,
        paired(seconds["instance"], seconds["causal"]),
        remark=f"{targets} targets of {world.whole_users} user; another model than instance",
    )

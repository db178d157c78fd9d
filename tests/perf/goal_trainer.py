"""Goal against Hugging Face `Trainer` with peft: plain LoRA on both sides."""

from collections.abc import Callable, Iterator

from core.loop import autocast, to_device
from core.teacher import Teacher
from perf import products, trainer_peer
from perf import world as present
from perf.equality import ALLOWED, equal, equal_gradients
from perf.found import Found, timed
from perf.goal_parts import ungated, uniform
from perf.timing import Steady, paired, rounds
from perf.trainer_peer import Peer, collate, examples, plan_of
from perf.world import World


def own_training(world: World, model: Teacher) -> Callable[[], Steady]:
    """Two epochs of `core`'s loop; the seconds of the second."""

    def run() -> Steady:
        ends: list[float] = []
        present.training_epochs(world, model, 2, lambda: ends.append(world.clock()))
        return Steady(ends[-1] - ends[len(ends) // 2 - 1])

    return run


def equality(world: World, plain: Teacher, peer: Peer) -> str:
    """Loss and gradients of the peer over all samples. Raises Unequal."""
    loss, gradients = present.loss_and_gradients(world, plain)
    rows, total = examples(world), 0.0
    peer.train().zero_grad(set_to_none=True)
    for chosen in plan_of(world, plain):
        batch = to_device(collate([rows[i] for i in chosen]), world.on)
        with autocast(world.precision, world.on):
            found = peer(**batch)["loss"] * (len(chosen) / len(rows))
        found.backward()
        total += found.item()
    loss_allowed, allowed = ALLOWED[world.precision]
    checks = (
        equal("loss", loss, total, loss_allowed),
        equal_gradients(gradients, peer.gradients(), allowed),
    )
    peer.zero_grad(set_to_none=True)
    return ", ".join(map(str, checks))


def trainer(world: World, blocks: int) -> Iterator[Found]:
    """An epoch, one optimizer step for each batch."""
    plain, gated = ungated(world.new_teacher()), uniform(world.new_teacher())
    peers = {"as it comes": Peer(world, plain, False), "tuned": Peer(world, plain, True)}
    checks = {name: equality(world, plain, peer) for name, peer in peers.items()}
    plan = plan_of(world, plain)
    works = {
        "as it comes": trainer_peer.training(world, peers["as it comes"], None),
        "tuned": trainer_peer.training(world, peers["tuned"], plan),
        "plain": own_training(world, plain),
        "gated": own_training(world, gated),
    }
    seconds = rounds(works, blocks, world.clock)
    goal = f"training epoch, plain LoRA, {world.preset}, batches of {world.batch_size}"
    for name, wanted in (("tuned", 1.3), ("as it comes", None)):
        ratio = paired(seconds[name], seconds["plain"])
        yield timed(
            goal,
            f"HF Trainer + peft, {name}",
            wanted,
            ratio,
            equality=checks[name],
            remark=f"same batches; {products.most(ratio, works['plain'], world.device)}"
            if wanted
            else "random batches padded to their longest row",
        )
    yield timed(
        f"… gated, {world.preset}",
        "HF Trainer + peft, tuned, plain LoRA",
        None,
        paired(seconds["tuned"], seconds["gated"]),
    )

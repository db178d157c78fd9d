"""Goals of the parts: ranking, the gated layer, the gate's cost, counts of real shapes, padding.

Shapes: U users, V items, D width, B users of a batch, T tokens, K experts, R ranks of one expert.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from core import ilora, ranking
from core.data import Prepared
from core.plan import GatedPrompts
from core.prompts import gate_queries, prompts_of
from core.ranking import Queries
from core.settings import Batching, EvalSettings, SyntheticSettings, TeacherSettings
from core.teacher import Teacher
from perf import old_way, reference, shape_counts
from perf import world as present
from perf.equality import ALLOWED, GRADIENTS_FP64, equal, equal_gradients
from perf.found import Found, timed
from perf.timing import paired, rounds
from perf.world import World

CUTOFFS = (5, 10, 20)
LAYER_SHAPES = {(768, 768): 4, (768, 3072): 1, (3072, 768): 1}
"""Linear layers of a block of OPT-125m, and how many there are."""
LAYER_GOALS = {4: 1.3, 8: 1.8}
"""By number of experts."""


# ---- full ranking ----


def random_split(users: int, items: int, mean_length: int) -> Prepared:
    """Histories of a long-tailed length, no item twice; as many users and items as asked."""
    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(mean_length) - 0.3, 0.8, users).astype(int)
    lengths = np.clip(lengths, 5, items // 2)
    walks = [random.permutation(items)[:length] + 1 for length in lengths]
    return Prepared(
        np.concatenate(walks).astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]),
        ["", *map(str, range(1, items + 1))],
        np.arange(users),
        {},
        "random",
    )


def full_ranking(blocks: int, users: int = 6040, items: int = 3706) -> Iterator[Found]:
    """Scores and metrics of every user from states and item vectors that are there already."""
    prepared = random_split(users, items, 165)
    queries = ranking.held_out(prepared, "validation")
    random = torch.Generator().manual_seed(0)
    states_UD = torch.randn(users, 64, generator=random)
    table_VD = torch.randn(items + 1, 64, generator=random)
    # Some targets rank high, as with a trained model.
    states_UD += 0.3 * table_VD[torch.from_numpy(queries.targets)]
    settings = EvalSettings()

    def score(asked: Queries) -> Iterator[tuple[np.ndarray, Tensor]]:
        for rows in asked.by_length(settings.batch_size, items):
            yield rows, states_UD[torch.from_numpy(rows)] @ table_VD.t()

    def now() -> dict:
        return ranking.evaluate(score, prepared, "validation", settings)[0]

    works = {
        "now": now,
    }
    loops = {
        "per-user torch loop": (10, old_way.rank_by_sorting),
        "per-user Python lists": (15, old_way.rank_by_lists),
        "per-user torch loop, the first 20 places only": (None, old_way.rank_by_top),
    }
    for name, (_, loop) in loops.items():
        works[name] = functools.partial(loop, states_UD, table_VD, queries, CUTOFFS)
    found = now()
    equality = {}
    for name in loops:
        wanted = works[name]()
        worst = max(equal(key, found[key], wanted[key]).difference for key in wanted)
        equality[name] = f"{len(wanted)} figures {worst:.1e}"
    seconds = rounds(works, blocks)
    for name, (wanted, _) in loops.items():
        yield timed(
            f"full ranking, {users} × {items}",
            name,
            wanted,
            paired(seconds[name], seconds["now"]),
            equality=equality[name],
            remark="the present side also makes ranks of all, loss and intervals",
        )


# ---- the gated layer ----


class OneLayer(nn.Module):
    """The least that peft adapts."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__()
        self.q_proj = nn.Linear(inputs, outputs, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The layer's output."""
        return self.q_proj(x_BTD)


@dataclass(frozen=True)
class Where:
    """Device, dtype and number of users of a layer under comparison."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    users: int = 8


HERE = Where()


class GatedLayer:
    """One gated layer and its expert-axis form with the same weights, input and gate."""

    def __init__(self, shape: tuple[int, int], experts: int, where: Where, rank: int = 16):
        torch.manual_seed(0)
        with torch.device(where.device):
            self._build(shape, experts, where, rank)

    def _build(self, shape: tuple[int, int], experts: int, where: Where, rank: int) -> None:
        users, tokens, dtype = where.users, 100, where.dtype
        self.settings = TeacherSettings(
            target_modules=("q_proj",), num_experts=experts, lora_r=rank
        )
        self.gate = ilora.RankGate()
        self.model = ilora.add_adapters(OneLayer(*shape), self.settings, self.gate)
        (layer,) = ilora.adapted_layers(self.model)
        self.down, self.up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        nn.init.normal_(self.up, std=0.1)
        self.model.to(dtype).train()
        self.share = rank // experts
        held = torch.promote_types(dtype, torch.float32)  # released with fp32 adapters
        down, up = self.down.detach().to(held, copy=True), self.up.detach().to(held, copy=True)
        self.old = reference.ExpertLoRA(
            layer.base_layer,
            down.view(experts, self.share, -1),
            up.view(-1, experts, self.share).movedim(1, 0).contiguous(),
            self.settings.lora_alpha / self.share,
        )
        self.x_BTD = torch.randn(users, tokens, shape[0], dtype=dtype, requires_grad=True)
        self.logits_BK = torch.randn(users, experts, dtype=dtype, requires_grad=True)
        self.gate_rows = torch.arange(users).repeat_interleave(tokens)
        self.weight = torch.randn(users, tokens, shape[1], dtype=dtype)

    def now(self) -> Tensor:
        """Forward and backward of the present form."""
        gate_BK = self.logits_BK.softmax(-1)
        factors = ilora.token_factors(gate_BK, self.gate_rows, self.settings)
        with self.gate.bound(factors):
            y_BTD = self.model(self.x_BTD)
        y_BTD.backward(self.weight)
        return y_BTD

    def before(self) -> Tensor:
        """Forward and backward of the expert-axis form."""
        y_BTD = self.old(self.x_BTD, self.logits_BK.softmax(-1))
        y_BTD.backward(self.weight)
        return y_BTD

    def equality(self, loss: float, gradients: float) -> str:
        """Output and all gradients of both forms. Raises Unequal."""
        sides = []
        for run in (self.now, self.before):
            leaves = (self.x_BTD, self.logits_BK, self.down, self.up)
            for leaf in (*leaves, *self.old.parameters()):
                leaf.grad = None
            y_BTD, found = run().detach(), {"x": self.x_BTD.grad, "gate": self.logits_BK.grad}
            if run == self.now:
                found |= {"down": self.down.grad, "up": self.up.grad}
            else:
                found["down"] = self.old.down_KRD.grad.flatten(0, 1)
                found["up"] = self.old.up_KDR.grad.movedim(0, 1).flatten(1, 2)
            sides.append((y_BTD, found))
        (y, found), (wanted_y, wanted) = sides
        checks = equal("output", y, wanted_y, loss), equal_gradients(found, wanted, gradients)
        return ", ".join(map(str, checks))


def gated_layer(
    blocks: int,
    shapes: Mapping[tuple[int, int], int] = LAYER_SHAPES,
    wanted_of: Mapping[int, float] = LAYER_GOALS,
    where: Where = HERE,
) -> Iterator[Found]:
    """Forward and backward of adapted layers, their frozen products included: all of a block of
    OPT-125m, which is judged, and each shape alone.
    """
    exactly = replace(where, dtype=torch.float64)
    allowed = ALLOWED["fp32" if where.dtype == torch.float32 else "bf16-mixed"]
    for experts, wanted in wanted_of.items():
        checks, layers = [], {}
        for shape in shapes:
            exact = GatedLayer(shape, experts, exactly)
            layers[shape] = GatedLayer(shape, experts, where)
            single = layers[shape].equality(*allowed)
            checks.append(f"{single}; fp64: {exact.equality(GRADIENTS_FP64, GRADIENTS_FP64)}")
        works = {(s, "old"): layer.before for s, layer in layers.items()}
        works |= {(s, "now"): layer.now for s, layer in layers.items()}
        seconds = rounds(works, 4 * blocks, lambda: present.seconds_on(where.device))
        block = {
            side: [
                sum(count * t for count, t in zip(shapes.values(), times, strict=True))
                for times in zip(*(seconds[s, side] for s in shapes), strict=True)
            ]
            for side in ("old", "now")
        }
        yield timed(
            f"gated LoRA, the {sum(shapes.values())} linear layers of a block, r 16, K {experts}",
            "expert-axis form",
            wanted,
            paired(block["old"], block["now"]),
            equality=max(checks),
        )
        for shape in shapes:
            yield timed(
                f"… {shape[0]} → {shape[1]}, K {experts}",
                "expert-axis form",
                None,
                paired(seconds[shape, "old"], seconds[shape, "now"]),
            )


# ---- what the gate itself costs ----


class PlainLinear(LoraVariant):
    """Plain LoRA in the form of `core.ilora.GatedLinear`: the same without the factors, its scale
    inside the second product.
    """

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_) -> Tensor:
        """Output (..., d_out) of the layer whose base layer gave `result` for `x` (..., d_in)."""
        first, second = module.lora_A[active_adapter], module.lora_B[active_adapter]
        low_MR = F.linear(x.flatten(0, -2), first.weight)
        scale = module.scaling[active_adapter]
        added = torch.addmm(result.flatten(0, -2), low_MR, second.weight.t(), alpha=scale)
        return added.view_as(result)


def ungated(model: Teacher) -> Teacher:
    """The same teacher as plain LoRA: nothing is multiplied by a gate, no router is asked."""
    for layer in ilora.adapted_layers(model.backbone):
        layer.lora_variant["default"] = PlainLinear()
    model.router.requires_grad_(False)
    model.read_out = lambda batch, observer=None: _plain_read_out(model, batch)
    return model


def _plain_read_out(model: Teacher, batch: dict) -> Tensor:
    """`Teacher.read_out` without the gate."""
    embeds_BTH = model.backbone.get_input_embeddings()(batch["ids"]).detach()
    slots_SH = model.project(model.encoder.item_table.weight[batch["slot_items"]])
    flat = embeds_BTH.flatten(0, 1).index_copy(0, batch["slot_positions"], slots_SH)
    with model.gate.bound(None, batch["readout"]):
        return model.last_hidden(flat.view_as(embeds_BTH), batch["layout"])


def uniform(model: Teacher) -> Teacher:
    """The same teacher with a router that says 1/K, which is plain LoRA."""
    for parameter in model.router.parameters():
        nn.init.zeros_(parameter)
    return model


def gating(world: World, blocks: int) -> Iterator[Found]:
    """What the gate adds to a training step of plain LoRA."""
    gated, plain = uniform(world.new_teacher()), ungated(world.new_teacher())
    loss, gradients = present.loss_and_gradients(world, gated)
    wanted_loss, wanted = present.loss_and_gradients(world, plain)
    without_router = {name: g for name, g in gradients.items() if not name.startswith("router.")}
    equality = [equal("loss", loss, wanted_loss), equal_gradients(without_router, wanted)]
    works = {
        "plain": present.training_step(world, plain),
        "gated": present.training_step(world, gated),
    }
    seconds = rounds(works, 2 * blocks, world.clock)
    ratio = paired(seconds["gated"], seconds["plain"])  # overhead: gated / plain
    yield timed(
        f"gating overhead of a training step, {world.preset}",
        "own plain LoRA",
        1.03,
        ratio,
        at_most=True,
        equality=", ".join(map(str, equality)),
    )


# ---- counts ----


def shapes(activations: str = "llama-2-7b", operators: str = "opt-125m") -> Iterator[Found]:
    """Saved activations and operators of real models' shapes."""
    now, before = (
        shape_counts.counts(activations, form)["saved_bytes_per_token"]
        for form in ("present", "expert axis")
    )
    yield Found(
        f"saved activations per token, {activations} shape, r 16, K 4",
        "expert-axis form, fp32",
        0.2,
        now / before,
        at_most=True,
        remark=f"{now} against {before} bytes",
    )
    counted = {form: shape_counts.counts(operators, form)["operators"] for form in
               shape_counts.FORMS}  # fmt: skip
    for form, wanted in (("stock peft", 0.76), ("expert axis", 0.55)):
        yield Found(
            f"operators of a step, {operators} shape, r 16",
            "stock peft, gate folded" if form == "stock peft" else "expert-axis form, fp32",
            wanted,
            counted["present"] / counted[form],
            at_most=True,
            remark=f"{counted['present']} against {counted[form]}",
        )


# ---- padding ----

SHAPES = {
    "synthetic default": SyntheticSettings(),
    "dense": SyntheticSettings(users=300, items=2400, mean_length=120),
    "few items": SyntheticSettings(users=1000, items=400, mean_length=25),
}


def padding(batch_sizes: tuple[int, ...] = (16, 64)) -> Iterator[Found]:
    """Padding over real tokens of whole epochs, and of scoring as many samples, from the plans.

    `padded` puts prompts together at random, which is what it is there to show: no goal.
    """
    for name, shape in SHAPES.items():
        for history in (10, 50):
            world = World(preset="tiny", synthetic=shape, max_history=history)
            for size, batching in itertools.product(batch_sizes, get_args(Batching)):
                yield _padding(world, name, size, batching)


def planned_tokens(world: World, size: int, batching: Batching) -> dict[str, int]:
    """Tokens of an epoch over all samples: the `real` ones, and with the padding of `training` and
    of `evaluation`.
    """
    shown = prompts_of(world.queries, world.max_history, world.mode)
    states = torch.zeros(len(gate_queries(shown)), 1)
    found = {"real": int(shown.lengths(world.pieces).sum())}
    for kind, seed in (("training", 0), ("evaluation", None)):
        batches = GatedPrompts(states, world.pieces, shown, size, batching=batching, seed=seed)
        grids = (batches.plan.grid(i, batches.lengths) for i in range(len(batches)))
        found[kind] = sum(grid.rows * grid.width for grid in grids)
    return found


def _padding(world: World, name: str, size: int, batching: Batching) -> Found:
    tokens = planned_tokens(world, size, batching)
    wasted = {kind: tokens[kind] / tokens["real"] - 1 for kind in ("training", "evaluation")}
    kind = max(wasted, key=lambda key: wasted[key])
    return Found(
        f"padding, {name}, {world.max_history} items, batches of {size}, {batching}",
        "real tokens",
        None if batching == "padded" else 0.05,
        wasted[kind],
        at_most=True,
        remark=f"{kind}; the other {min(wasted.values()):.3f}",
    )

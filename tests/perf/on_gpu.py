"""The goals that only a GPU can show, by one command: measures, writes `reports/gpu/goals.md`.

`PYTHONPATH=tests python -m perf.on_gpu [NAME ...]`; `--rehearse` does the same with tiny shapes on
the processor, to see it through before a GPU is there. Exit status as of `perf.goals`.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.profile import ceilings, counting
from core.settings import SyntheticSettings
from perf import found as page
from perf import goal_parts, goal_teacher, goal_trainer, goals
from perf import world as present
from perf.equality import ALLOWED, equal, equal_gradients
from perf.found import Found, timed
from perf.goal_parts import Where
from perf.goals import Goal
from perf.timing import paired, rounds
from perf.world import World

PAGE = Path("reports/gpu/goals.md")
CLOCK = "seconds that passed until the device had done all it was asked for"
LLAMA_LAYERS = {(4096, 4096): 4, (4096, 11008): 2, (11008, 4096): 1}
"""Linear layers of a block of Llama-2-7B, and how many there are."""


@dataclass(frozen=True)
class Arithmetic:
    """What a training step of one world asks of its device."""

    flops: float
    """Of real tokens, padding and recomputation left out."""
    elementwise_bytes: float
    """Read and written by all operators that are no products."""
    gemm_flops_per_s: float
    copy_bytes_per_s: float

    @property
    def products_s(self) -> float:
        """The products alone at the rate of the largest one."""
        return self.flops / self.gemm_flops_per_s

    @property
    def limit_s(self) -> float:
        """Products and all the rest, one after the other, each at the device's best rate."""
        return self.products_s + self.elementwise_bytes / self.copy_bytes_per_s


def arithmetic(world: World, model, step: Callable[[], None]) -> Arithmetic:
    """Count the operators of one step; rates are measured in this process."""
    dtype = torch.float32 if world.precision == "fp32" else torch.bfloat16
    with model.execution.uncompiled(), counting.Arithmetic() as counted:
        step()
    batches = world.batches(model)
    grids = [batches.plan.grid(i, batches.lengths) for i in range(len(batches))]
    real = batches.lengths.sum() / sum(grid.rows * grid.width for grid in grids)
    return Arithmetic(
        float(counted.flops * real),
        float(counted.bytes - counted.product_bytes),
        ceilings.gemm_flops_per_s(world.on, dtype, torch.get_float32_matmul_precision()),
        ceilings.copy_bytes_per_s(world.on),
    )


def limits(
    world: World, blocks: int, most: Mapping[str, float], least_mfu: Mapping[str, float]
) -> Iterator[Found]:
    """How far a training step is from the device's limit, as Python and compiled."""
    for mode in ("off", "regional"):
        batching = world.batching if mode == "off" else "packed"  # compiled: one shape
        there = replace(world, compile=mode, batching=batching)
        model = there.new_teacher()
        step = present.training_step(there, model)
        asked = arithmetic(there, model, step)
        seconds = rounds({"step": step}, blocks, there.clock)["step"]
        work = f"training step, {there.preset}, {there.prompts} prompts, {there.precision}, {mode}"
        above = paired(seconds, [asked.limit_s] * blocks)
        said = f"{asked.flops / 1e12:.2f} TFLOP at {asked.gemm_flops_per_s / 1e12:.1f} TFLOP/s"
        said += f", {asked.elementwise_bytes / 1e9:.1f} GB at {asked.copy_bytes_per_s / 1e9:.0f}"
        yield replace(
            timed(work, "limit", most.get(mode), above, at_most=True, remark=f"{said} GB/s"),
            milliseconds=1000 * statistics.median(seconds),  # the step's, not the limit's
        )
        mfu = paired([asked.products_s] * blocks, seconds)
        yield timed(f"… MFU, {there.preset}, {mode}", "products alone", least_mfu.get(mode), mfu)


def four_bit(world: World, blocks: int) -> Iterator[Found]:
    """A training step with 4-bit frozen weights against 16-bit ones, neither checkpointed."""
    models = {name: replace(world, adapter=name) for name in ("lora", "qlora")}
    teachers = {name: there.new_teacher() for name, there in models.items()}
    works = {n: present.training_step(models[n], teachers[n]) for n in models}
    seconds = rounds(works, blocks, world.clock)
    yield timed(
        f"training step, {world.preset}, QLoRA without checkpointing",
        "LoRA on 16-bit weights",
        0.9,
        paired(seconds["lora"], seconds["qlora"]),
        remark="another model: weights are rounded to 4 bit",
    )


def same_in_fp32(world: World, blocks: int) -> Iterator[Found]:
    """Loss and gradients on the device against those on the processor, in fp32; untimed."""
    there = replace(world, precision="fp32", prompts=min(world.prompts, 64), batch_size=8)
    here = replace(there, device="cpu")
    loss, gradients = present.loss_and_gradients(there, there.new_teacher())
    wanted_loss, wanted = present.loss_and_gradients(here, here.new_teacher())
    loss_allowed, allowed = ALLOWED["fp32"]
    found = (
        equal("loss", loss, wanted_loss, loss_allowed),
        equal_gradients({n: g.cpu() for n, g in gradients.items()}, wanted, allowed),
    )
    yield Found(
        f"training step, {world.preset}, fp32",
        "the same on the processor",
        None,
        equality=", ".join(map(str, found)),
    )


def goals_of(opt: World, seven: World, layers: Mapping[tuple[int, int], int]) -> dict[str, Goal]:
    """The goals by name, small model first."""
    in_fp32 = replace(opt, precision="fp32")
    where = Where(opt.device, torch.bfloat16, users=32 if opt.device != "cpu" else 2)
    # Eager within 3 times the limit, compiled within 2; of the large model the products decide.
    small, large = {"off": 3.0, "regional": 2.0}, {"off": 0.5, "regional": 0.6}
    return {
        "same": lambda blocks: same_in_fp32(opt, blocks),
        "limits": lambda blocks: limits(opt, blocks, small, {}),
        "training": lambda blocks: goal_teacher.training(opt, blocks, wanted=20),
        "trainer": lambda blocks: goal_trainer.trainer(opt, blocks),
        "gating": lambda blocks: goal_parts.gating(opt, blocks),
        "outputs": lambda blocks: goal_teacher.outputs_rate(opt, blocks),
        "evaluation": lambda blocks: goal_teacher.evaluation(in_fp32, blocks),
        "layer": lambda blocks: goal_parts.gated_layer(blocks, layers, {4: 2.0, 8: 2.0}, where),
        "large limits": lambda blocks: limits(seven, blocks, {}, large),
        "large trainer": lambda blocks: goal_trainer.trainer(seven, blocks),
        "4 bit": lambda blocks: four_bit(seven, blocks),
    }


REAL = goals_of(
    World("opt-125m", prompts=512, batch_size=64, device="cuda", precision="bf16-mixed"),
    World("llama-2-7b", prompts=96, batch_size=16, device="cuda", precision="bf16-mixed"),
    LLAMA_LAYERS,
)
FEW = SyntheticSettings(users=40, items=60, mean_length=9)
REHEARSED = goals_of(
    World("tiny", 8, 4, 4, FEW, precision="bf16-mixed"),
    World("tiny-llama", 8, 4, 4, FEW, precision="bf16-mixed"),
    {(128, 128): 4, (128, 352): 2, (352, 128): 1},
)


def main(arguments: list[str]) -> int:
    """Measure and write; the exit status."""
    parser = goals.parser("perf.on_gpu", __doc__, REAL, PAGE)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the processor")
    given = parser.parse_args(arguments)
    if given.rehearse:
        made = page.Made("perf.on_gpu", tuple(arguments), goals.CLOCK)
        return goals.measure(REHEARSED, given, PAGE, made)
    if not torch.cuda.is_available():
        sys.exit("perf.on_gpu: no CUDA device; --rehearse does the same on the processor")
    name = torch.cuda.get_device_name()
    made = page.Made("perf.on_gpu", tuple(arguments), CLOCK, device=name)
    return goals.measure(REAL, given, PAGE, made)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

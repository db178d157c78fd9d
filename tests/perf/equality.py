"""Equality of two ways of doing the same, asserted before either is timed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LOSS, GRADIENTS, GRADIENTS_FP64 = 1e-5, 1e-4, 1e-12
"""Largest relative difference allowed: of a loss and of gradients in fp32, of anything in fp64."""
ALLOWED = {"fp32": (LOSS, GRADIENTS), "bf16-mixed": (1e-2, 3e-1)}
"""The same by precision. In bfloat16 two orders of summation differ by some percent, in the worst
gradient of a tensor by a tenth: it shows a missing factor or part, and fp32 shows the rest.
"""

SMALL = 1e-3
"""Share of the largest gradient's norm below which a difference is relative to that share."""


class Unequal(Exception):
    """The two sides do not do the same, so their times say nothing about each other."""


@dataclass(frozen=True)
class Equality:
    """One relative difference and what was allowed."""

    what: str
    difference: float
    allowed: float

    def __str__(self) -> str:
        return f"{self.what} {self.difference:.1e}"


def relative(found: Tensor | float, wanted: Tensor | float) -> float:
    """Largest difference relative to the largest value; infinite where shapes differ."""
    found, wanted = (torch.as_tensor(side).detach().double() for side in (found, wanted))
    if found.shape != wanted.shape:
        return float("inf")
    difference = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))
    return difference if difference == difference else float("inf")


def equal(
    what: str, found: Tensor | float, wanted: Tensor | float, allowed: float = LOSS
) -> Equality:
    """The difference of one figure or tensor. Raises Unequal where it is too large."""
    difference = relative(found, wanted)
    if difference > allowed:
        raise Unequal(f"{what} differ by {difference:.1e}, allowed {allowed:.0e}: not timed")
    return Equality(what, difference, allowed)


def equal_gradients(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], allowed: float = GRADIENTS
) -> Equality:
    """The worst difference among gradients of the same names. Raises Unequal, also for a name that
    only one side has.
    """
    if lonely := found.keys() ^ wanted.keys():
        raise Unequal(f"gradients of one side only: {', '.join(sorted(lonely)[:4])}: not timed")
    if not wanted:
        raise Unequal("no gradients on either side: not timed")
    # Norms, for a ReLU whose input is of rounding's size may open on one side only; and against the
    # largest of all, for a router far from the loss has gradients of rounding's size.
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    worst = 0.0
    for name, gradient in wanted.items():
        if found[name].shape != gradient.shape:
            raise Unequal(f"gradient of {name}: {found[name].shape}, {gradient.shape}: not timed")
        difference = float((found[name].double() - gradient.double()).norm())
        difference /= max(float(gradient.norm()), SMALL * largest)
        if not difference <= allowed:
            raise Unequal(
                f"gradients of {name} differ by {difference:.1e}, allowed {allowed:.0e}: not timed"
            )
        worst = max(worst, difference)
    return Equality("gradients", worst, allowed)


def equal_top_k(ids_BK: Tensor, wanted_scores_BV1: Tensor, allowed: float = LOSS) -> Equality:
    """Whether lists hold the best items, items of all but equal scores in any order.

    Raises Unequal, also for an item listed twice.
    """
    k = ids_BK.shape[1]
    if any(len(set(row)) < k for row in ids_BK.tolist()):
        raise Unequal("top-k: an item is listed twice: not timed")
    best_BK = wanted_scores_BV1[:, 1:].topk(k).values
    listed_BK = wanted_scores_BV1.gather(1, ids_BK.long())
    return equal(f"top-{k}", listed_BK, best_BK, allowed)

"""Places for the labels of points in a picture, so that none covers a point or another label."""

import itertools
import math
from collections.abc import Sequence

MARK = 0.1
"""Side of a point, in inches as everything here."""
HEIGHT = 0.15
RADII = tuple(0.15 + 0.1 * i for i in range(24))
ANGLES = tuple(range(45, 405, 15))

Spot = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""


def places(spots: Sequence[Spot], widths: Sequence[float], sides: Spot) -> list[Box]:
    """A box of each width near each spot that overlaps no mark and no other box.

    `sides`: the picture's left and right edge. Greedy, from near to far; the last place tried is
    taken where the picture is full.
    """
    half = MARK / 2
    taken: list[Box] = [(x - half, y - half, x + half, y + half) for x, y in spots]
    found = []
    for (x, y), width in zip(spots, widths, strict=True):
        box = (x, y, x, y)
        for radius, angle in itertools.product(RADII, ANGLES):
            middle = x + radius * math.cos(math.radians(angle))
            height = y + radius * math.sin(math.radians(angle))
            box = (
                middle - width / 2,
                height - HEIGHT / 2,
                middle + width / 2,
                height + HEIGHT / 2,
            )
            inside = sides[0] < box[0] and box[2] < sides[1]
            if inside and not any(overlap(box, other) for other in taken):
                break
        taken.append(box)
        found.append(box)
    return found


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes share an area."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

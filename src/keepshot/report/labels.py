"""Where a figure's labels go, so that none covers another or a mark. Pixels only; pure geometry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CHARACTER_WIDTH = 0.6
"""Width of an average bold Helvetica character, as a share of the font size (rounded up)."""


@dataclass(frozen=True)
class Box:
    """An axis-parallel rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Return the area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        if width <= 0:
            return 0.0
        return width * max(0.0, min(self.bottom, other.bottom) - max(self.top, other.top))


@dataclass(frozen=True)
class Wish:
    """A label that wants to stand near a point."""

    text: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Place:
    """The centre of a label, and whether it stands far enough away to need a line to its point."""

    x: float
    y: float
    far: bool


def around(x: float, y: float, radius: float) -> Box:
    """Return the square around a mark."""
    return Box(x - radius, y - radius, x + radius, y + radius)


def along(x1: float, y1: float, x2: float, y2: float, step: float = 6.0) -> list[Box]:
    """Return small boxes that cover a line."""
    pieces = max(1, int(math.hypot(x2 - x1, y2 - y1) / step))
    return [
        around(x1 + (x2 - x1) * i / pieces, y1 + (y2 - y1) * i / pieces, step / 3)
        for i in range(pieces + 1)
    ]


def place(wishes: Sequence[Wish], obstacles: Sequence[Box], frame: Box) -> list[Place]:
    """Find a place for each label in turn: the cheapest of some ninety around its point.

    Args:
        wishes: labels, the most important first.
        obstacles: marks and lines that labels had better not cover.
        frame: what a label must stay within.
    """
    taken: list[Box] = []
    places: list[Place] = []
    for wish in wishes:
        half_width = CHARACTER_WIDTH * wish.size * len(wish.text) / 2
        half_height = 0.6 * wish.size
        best: tuple[float, Box, float] | None = None
        for gap in (5.0, 12.0, 22.0, 34.0, 50.0, 70.0):
            if best is not None and best[0] <= 3 * gap:
                break  # farther away cannot be cheaper
            for turn in range(16):
                angle = math.pi * turn / 8
                x = wish.x + math.cos(angle) * (gap + half_width)
                y = wish.y + math.sin(angle) * (gap + half_height)
                box = Box(x - half_width, y - half_height, x + half_width, y + half_height)
                cost = _cost(box, gap, taken, obstacles, frame)
                if best is None or cost < best[0]:
                    best = (cost, box, gap)
        assert best is not None
        _, box, gap = best
        taken.append(box)
        places.append(Place((box.left + box.right) / 2, (box.top + box.bottom) / 2, gap > 15))
    return places


def _cost(
    box: Box, gap: float, taken: Sequence[Box], obstacles: Sequence[Box], frame: Box
) -> float:
    area = (box.right - box.left) * (box.bottom - box.top)
    outside = area - box.overlap(frame)
    on_labels = sum(box.overlap(other) for other in taken)
    on_marks = sum(box.overlap(other) for other in obstacles)
    return 100 * outside + 20 * on_labels + 4 * on_marks + 3 * gap

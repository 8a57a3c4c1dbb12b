"""Axes whose scales are known here, so that ticks and labels can be placed in pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import altair as alt

Kind = Literal["linear", "log", "symlog"]
"""symlog: logarithmic above 1, with a place for 0."""
DIGIT_WIDTH, TICK_GAP = 7.2, 7.0
"""Pixels of a digit of a tick's label, and between labels."""


@dataclass(frozen=True)
class Axis:
    """One axis: its ends and its length in pixels."""

    low: float
    high: float
    size: int
    kind: Kind = "linear"

    def pixel(self, value: float) -> float:
        """Return how far along the axis a value lies."""
        first, last = _bent(self.low, self.kind), _bent(self.high, self.kind)
        return (_bent(value, self.kind) - first) / (last - first) * self.size

    def value(self, pixel: float) -> float:
        """Return the value that lies so far along the axis."""
        first, last = _bent(self.low, self.kind), _bent(self.high, self.kind)
        bent = first + pixel / self.size * (last - first)
        if self.kind == "linear":
            return bent
        return math.exp(bent) if self.kind == "log" else math.copysign(math.expm1(abs(bent)), bent)

    def scale(self) -> alt.Scale:
        """Return the scale for the renderer."""
        scale = alt.Scale(type=self.kind, domain=[self.low, self.high], nice=False, zero=False)
        if self.kind == "symlog":
            scale.constant = 1.0
        return scale

    def ticks(self, values: Sequence[float] = ()) -> list[float]:
        """Return where labels stand on a bent axis: none too near the next.

        Args:
            values: where there is something to read off; 1, 2, 5, 10 ... if there are more than 8.
        """
        steps = [m * 10.0**k for k in range(-4, 7) for m in (1, 2, 5)]
        wanted = sorted(set(values))
        if not 1 < len(wanted) <= 8:
            wanted = [0.0, *steps] if self.kind == "symlog" else steps
        inside = [x for x in wanted if self.low <= x <= self.high]
        kept: list[float] = []
        for tick in inside:
            if not kept or self._clear(kept[-1], tick):
                kept.append(tick)
        if inside and kept[-1] != inside[-1]:  # the last stays, and drives out those before it
            while len(kept) > 1 and not self._clear(kept[-1], inside[-1]):
                kept.pop()
            kept.append(inside[-1])
        return kept

    def _clear(self, one: float, other: float) -> bool:
        half = DIGIT_WIDTH * (len(f"{one:g}") + len(f"{other:g}")) / 2
        return self.pixel(other) - self.pixel(one) >= half + TICK_GAP


def _bent(value: float, kind: Kind) -> float:
    if kind == "linear":
        return value
    return math.log(value) if kind == "log" else math.copysign(math.log1p(abs(value)), value)


def spanning(values: Sequence[float], size: int, kind: Kind = "linear", pad: float = 0.0) -> Axis:
    """Return the axis that shows all values, with `pad` of its length free at both ends."""
    low, high = min(values), max(values)
    if low == high:
        low, high = (low / 2, high * 2) if kind == "log" else (low - 0.5, high + 0.5)
    first, last = _bent(low, kind), _bent(high, kind)
    bare = Axis(low, high, size, kind)
    room = pad * size
    return Axis(bare.value(-room), bare.value(size + room), size, kind) if last > first else bare

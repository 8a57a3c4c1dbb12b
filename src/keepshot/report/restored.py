"""Where the damage sits: the tuned model with one part at a time put back to the base's. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt

from keepshot.records import PathPoint, RestoredPart, ResultDocument
from keepshot.report import view
from keepshot.report.styling import FAINT, Width, data, styled
from keepshot.report.words import score

Interval = tuple[float, float]


@dataclass(frozen=True)
class _Measure:
    """What a panel shows of each part, and between which two ends."""

    key: Literal["icl", "target"]
    title: str
    color: str

    def of(self, point: PathPoint) -> tuple[float, Interval]:
        """Return value and interval; the target's must be there."""
        value, interval = getattr(point, self.key), getattr(point, f"{self.key}_ci95")
        return value, interval


_MEASURES = (_Measure("icl", "few-shot score", "#d55e00"), _Measure("target", "target", "#0072b2"))


def restored_chart(document: ResultDocument, width: Width = "wide") -> alt.ConcatChart | None:
    """Draw the few-shot score, and the target's, with each part of the tuned model put back.

    Blocks stand side by side from the lowest on, kinds of weight below each other. Lines are the
    scores of the base (dashed) and of the tuned model as it is.

    Returns:
        None if no part was put back.
    """
    path = {point.lam: point for point in view.path_split(document)}
    if not document.restored or not {0.0, 1.0} <= path.keys():
        return None
    ends = path[0.0], path[1.0]
    blocks = [part for part in document.restored if part.part.startswith("block ")]
    kinds = [part for part in document.restored if part not in blocks]
    panels = [
        _panel(measure, parts, ends, width)
        for parts in (blocks, kinds)
        for measure in _MEASURES
        if parts and getattr(ends[1], measure.key) is not None
    ]
    return styled(alt.concat(*panels, columns=2 if width == "wide" else 1, spacing=30), width)


def _panel(
    measure: _Measure,
    parts: Sequence[RestoredPart],
    ends: tuple[PathPoint, PathPoint],
    width: Width,
) -> Any:
    """Draw one measure of all blocks, or of all kinds of weight."""
    rows: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        value, (low, high) = measure.of(part)
        hover = f"{part.part} put back: {measure.title} {score(value)}"
        place = {"number": number, "part": part.part}
        rows.append({**place, "value": value, "low": low, "high": high, "hover": hover})
    scale = alt.Scale(domain=[0, 1])
    if parts[0].part.startswith("block "):
        span = alt.Scale(domain=[-0.5, len(parts) - 0.5], nice=False)
        axis = alt.Axis(format="d", tickMinStep=1)
        along: Any = alt.X("number:Q", title="block put back", scale=span, axis=axis)
        low, high, at = alt.Y("low:Q"), {"y2": "high:Q"}, alt.Y("at:Q")
        value_axis: Any = alt.Y("value:Q", title=measure.title, scale=scale)
        size = (310, 180) if width == "wide" else (262, 160)
    else:
        along = alt.Y("part:N", title=None, sort=[part.part for part in parts])
        low, high, at = alt.X("low:Q"), {"x2": "high:Q"}, alt.X("at:Q")
        value_axis = alt.X("value:Q", title=measure.title, scale=scale)
        size = (255, 24 * len(parts)) if width == "wide" else (200, 22 * len(parts))
    base = alt.Chart(data(rows))
    layers = [
        *(_end(measure.of(end)[0], at, dashed=end is ends[0]) for end in ends),
        base.mark_rule(color=measure.color, opacity=0.4).encode(along, low, **high),
        base.mark_circle(color=measure.color, size=40, opacity=1).encode(
            along, value_axis, description="hover:N"
        ),
    ]
    return alt.layer(*layers).properties(width=size[0], height=size[1])


def _end(value: float, at: Any, *, dashed: bool) -> Any:
    rule = alt.Chart(data([{"at": value}]))
    return rule.mark_rule(strokeDash=[4, 3] if dashed else [1, 0], color=FAINT).encode(at)

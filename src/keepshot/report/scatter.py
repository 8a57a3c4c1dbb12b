"""A figure of two scores: labelled marks with error bars both ways, and paths between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt

from keepshot.report.labels import Box, Wish, along, around, place
from keepshot.report.styling import FAINT, INK, Look, Width, data, styled
from keepshot.report.view import Measured

_ELLIPSE_STEPS = 36


class Frame:
    """Two linear axes and their pixels; labels are placed in pixels and drawn in data."""

    def __init__(self, x: Sequence[float], y: Sequence[float], width: int, height: int) -> None:
        self.width, self.height = width, height
        self.x, self.y = _padded(x), _padded(y)

    def to_pixels(self, x: float, y: float) -> tuple[float, float]:
        """Return a point's pixels, counted from the upper left corner."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        down = (self.y[1] - y) / (self.y[1] - self.y[0])
        return across * self.width, down * self.height

    def to_data(self, across: float, down: float) -> tuple[float, float]:
        """Return the point that lies at these pixels."""
        x = self.x[0] + across / self.width * (self.x[1] - self.x[0])
        return x, self.y[1] - down / self.height * (self.y[1] - self.y[0])

    def axis_x(self, title: str, **axis: Any) -> alt.X:
        """Return the horizontal channel; every layer must share it."""
        return alt.X("x:Q", title=title, scale=_linear(self.x), axis=alt.Axis(**axis))

    def axis_y(self, title: str, **axis: Any) -> alt.Y:
        """Return the vertical channel; every layer must share it."""
        return alt.Y("y:Q", title=title, scale=_linear(self.y), axis=alt.Axis(**axis))


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = max(0.04 * (high - low), 0.02)
    return low - margin, high + margin


def _linear(domain: tuple[float, float]) -> alt.Scale:
    return alt.Scale(domain=list(domain), nice=False, zero=False)


@dataclass(frozen=True)
class Mark:
    """One labelled mark: two figures with their intervals."""

    label: str
    look: Look
    across: Measured
    up: Measured
    hover: str
    role: Literal["", "pareto", "pick"] = ""
    """On a path: no other point beats it in both scores, or it is the one picked."""

    @property
    def x(self) -> float:
        """The score on the horizontal axis."""
        return self.across[0]

    @property
    def y(self) -> float:
        """The score on the vertical axis."""
        return self.up[0]


def two_scores(
    marks: Sequence[Mark],
    paths: Mapping[str, Sequence[Mark]],
    titles: tuple[str, str],
    relative: bool,
    width: Width,
) -> alt.LayerChart:
    """Draw marks and paths with labels that keep clear of them.

    Args:
        marks: labelled, with error bars.
        paths: points to connect, by split; the path on validation items is dashed.
        titles: of the horizontal and the vertical axis.
        relative: whether the vertical axis is a share, with a line at 100 %.
        width: for a page, or for a phone.
    """
    on_paths = [mark for points in paths.values() for mark in points]
    xs = [v for m in (*marks, *on_paths) for v in (m.x, *m.across[1])]
    ys = [v for m in (*marks, *on_paths) for v in (m.y, *m.up[1])]
    size = (700, 420) if width == "wide" else (290, 330)
    frame = Frame(xs, [*ys, 0.0, *([1.05] if relative else [])], *size)
    axis_y: dict[str, Any] = {"format": "%" if relative else ".1f", "tickCount": 6}
    encode: dict[str, Any] = {
        "x": frame.axis_x(titles[0], format=".1f", tickCount=6 if width == "wide" else 4),
        "y": frame.axis_y(titles[1], **axis_y),
    }
    layers: list[Any] = []
    if relative:
        rule = alt.Chart(data([{"y": 1.0}])).mark_rule(strokeDash=[2, 3], color=FAINT)
        layers.append(rule.encode(y=encode["y"]))
    for split, points in paths.items():
        layers.extend(_path_layers(points, dashed=split == "validation", encode=encode))
    layers.extend(_arm_layers(marks, encode))
    layers.extend(_label_layers(marks, paths, frame, encode, width))
    chart = alt.layer(*layers).properties(width=size[0], height=size[1])
    return styled(chart, width)


def _path_layers(points: Sequence[Mark], *, dashed: bool, encode: dict[str, Any]) -> list[Any]:
    rows = [{"x": m.x, "y": m.y, "order": i, "hover": m.hover} for i, m in enumerate(points)]
    line = alt.Chart(data(rows)).mark_line(
        color="#9fcfc0", strokeWidth=2.5, strokeDash=[6, 4] if dashed else [1, 0]
    )
    dots = alt.Chart(data(rows)).mark_circle(color="#5fae97", size=34, opacity=1)
    best = [{"x": m.x, "y": m.y} for m in points if m.role]
    rings = alt.Chart(data(best)).mark_point(color="#00674b", size=90, strokeWidth=1.6, opacity=1)
    picked = [{"x": m.x, "y": m.y} for m in points if m.role == "pick"]
    star = alt.Chart(data(picked)).mark_text(
        text="\u2605", fontSize=22, color="#00674b", stroke="white", strokeWidth=0.6
    )
    return [
        *(_ellipse(mark, encode) for mark in points),
        line.encode(**encode, order="order:Q"),
        dots.encode(**encode, description="hover:N"),
        *([rings.encode(**encode)] if best else []),
        *([star.encode(**encode)] if picked else []),
    ]


def _ellipse(mark: Mark, encode: dict[str, Any]) -> Any:
    """Draw an ellipse through the ends of both intervals; each quadrant has its own half-axes."""
    rows: list[dict[str, float]] = []
    for step in range(_ELLIPSE_STEPS + 1):
        angle = 2 * math.pi * step / _ELLIPSE_STEPS
        across, up = math.cos(angle), math.sin(angle)
        half_x = mark.across[1][1] - mark.x if across > 0 else mark.x - mark.across[1][0]
        half_y = mark.up[1][1] - mark.y if up > 0 else mark.y - mark.up[1][0]
        rows.append({"x": mark.x + across * half_x, "y": mark.y + up * half_y, "order": step})
    shape = alt.Chart(data(rows)).mark_line(
        color="#9fcfc0", strokeWidth=0.7, fill="#9fcfc0", fillOpacity=0.10, opacity=0.55
    )
    return shape.encode(**encode, order="order:Q")


def _arm_layers(marks: Sequence[Mark], encode: dict[str, Any]) -> list[Any]:
    rows = [
        {
            "x": mark.x, "y": mark.y, "color": mark.look[0], "shape": mark.look[1],
            "low": mark.up[1][0], "high": mark.up[1][1],
            "left": mark.across[1][0], "right": mark.across[1][1], "hover": mark.hover,
        }
        for mark in marks
    ]  # fmt: skip
    base = alt.Chart(data(rows))
    color = alt.Color("color:N", scale=None, legend=None)
    shape = alt.Shape("shape:N", scale=None, legend=None)
    bar = base.mark_rule(opacity=0.55, strokeWidth=1.5)
    halo = base.mark_point(filled=True, size=230, opacity=1, color="white")
    point = base.mark_point(filled=True, size=130, opacity=1)
    return [
        bar.encode(x=encode["x"], y=_same_scale(encode["y"], "low"), y2="high:Q", color=color),
        bar.encode(y=encode["y"], x=_same_scale(encode["x"], "left"), x2="right:Q", color=color),
        halo.encode(**encode, shape=shape),
        point.encode(**encode, color=color, shape=shape, description="hover:N"),
    ]


def _same_scale(channel: Any, field: str) -> Any:
    copy = channel.copy()
    copy["shorthand"] = f"{field}:Q"
    return copy


def _label_layers(
    marks: Sequence[Mark],
    paths: Mapping[str, Sequence[Mark]],
    frame: Frame,
    encode: dict[str, Any],
    width: Width,
) -> list[Any]:
    labelled_path = list(paths.get("test") or paths.get("validation") or [])
    big, small = (14.0, 11.5) if width == "wide" else (13.0, 10.5)
    named = [mark for mark in marks if mark.label]  # a place takes long to find
    listed = [*((m, big) for m in named), *((m, small) for m in _thinned(labelled_path, frame))]
    wishes = [Wish(m.label, *frame.to_pixels(m.x, m.y), size) for m, size in listed]
    places = place(wishes, _obstacles(marks, paths, frame), Box(0, 0, frame.width, frame.height))
    rows: list[dict[str, Any]] = []
    for (mark, size), spot in zip(listed, places, strict=True):
        x, y = frame.to_data(spot.x, spot.y)
        rows.append({"x": x, "y": y, "label": mark.label, "size": size, "far": spot.far,
                     "x_mark": mark.x, "y_mark": mark.y})  # fmt: skip
    lines = alt.Chart(data([row for row in rows if row["far"]])).mark_rule(
        color="#b5b5b5", strokeWidth=0.8
    )
    layers: list[Any] = [lines.encode(**encode, x2="x_mark:Q", y2="y_mark:Q")]
    for size, weight, color in ((big, 600, INK), (small, 400, FAINT)):
        base = alt.Chart(data([row for row in rows if row["size"] == size]))
        style: dict[str, Any] = {"fontSize": size, "fontWeight": weight, "baseline": "middle"}
        halo = base.mark_text(**style, stroke="white", strokeWidth=3, strokeJoin="round")
        text = base.mark_text(**style, color=color)
        layers += [layer.encode(**encode, text="label:N") for layer in (halo, text)]
    return layers


def _thinned(points: Sequence[Mark], frame: Frame) -> list[Mark]:
    """Leave out labels of inner points that all but touch the last one labelled."""
    chosen: list[Mark] = []
    last: tuple[float, float] | None = None
    for index, mark in enumerate(points):
        here = frame.to_pixels(mark.x, mark.y)
        ends = index in (0, len(points) - 1)
        if ends or last is None or math.dist(here, last) >= 14:
            chosen.append(mark)
            last = here
    return chosen


def _obstacles(
    marks: Sequence[Mark], paths: Mapping[str, Sequence[Mark]], frame: Frame
) -> list[Box]:
    boxes: list[Box] = []
    for mark in marks:
        boxes.append(around(*frame.to_pixels(mark.x, mark.y), 9))
        for low, high in (
            ((mark.x, mark.up[1][0]), (mark.x, mark.up[1][1])),
            ((mark.across[1][0], mark.y), (mark.across[1][1], mark.y)),
        ):
            boxes.extend(along(*frame.to_pixels(*low), *frame.to_pixels(*high)))
    for points in paths.values():
        pixels = [frame.to_pixels(mark.x, mark.y) for mark in points]
        boxes.extend(around(x, y, 4) for x, y in pixels)
        for one, two in itertools.pairwise(pixels):
            boxes.extend(along(*one, *two))
    return boxes

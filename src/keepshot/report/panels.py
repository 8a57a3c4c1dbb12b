"""Charts of the theory lab: curves predicted in closed form, marks measured, names beside them.

A series with marks stands in the legend; a bare curve, and every point of a panel whose points are
methods, carries its name beside it.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from keepshot.report.axes import Axis, Kind, spanning
from keepshot.report.labels import CHARACTER_WIDTH, Box, Place, Wish, along, around, place
from keepshot.report.styling import FAINT, INK, SPARE_LOOKS, Look, Width, data, styled
from keepshot.theory.document import ClaimRecord, Panel, Point

FIXED_LOOKS: dict[str, Look] = {
    "pretrained": SPARE_LOOKS[0],
    "value_only": SPARE_LOOKS[1],
    "full": SPARE_LOOKS[2],
    "value_only_aux": SPARE_LOOKS[3],
    "value_only_joint": SPARE_LOOKS[4],
    "target, 0 shots": SPARE_LOOKS[5],
    "unseen, 20 shots": SPARE_LOOKS[6],
    "target, 20 shots": SPARE_LOOKS[7],
}
"""A method, or an error that is asked for, looks the same in every figure."""
PANEL_SIZES = {1: (460, 260), 2: (300, 215), 3: (200, 190)}
NARROW_SIZE, LABELLED_HEIGHT, NARROW_LABELLED = (262, 190), 300, (286, 330)
COLUMN_GAP, ROW_GAP = 76, 22
"""Pixels between panels, for their axes and titles."""
PLAIN_WIDTH = 0.88
"""Width of plain letters, where `place` reckons with bold ones."""


@dataclass(frozen=True)
class Sheet:
    """What the panels of one figure share."""

    looks: dict[str, Look]
    bare: frozenset[str]
    """Series without any mark."""
    width: Width

    @property
    def label_size(self) -> float:
        """Of the names beside points and curves, as `place` wants it."""
        return PLAIN_WIDTH * (12.0 if self.width == "wide" else 11.0)


def claim_chart(claim: ClaimRecord, width: Width = "wide") -> alt.VConcatChart:
    """Draw the panels of one claim: lines are closed forms, marks are measured, bars two s.e."""
    sheet = Sheet(series_looks(claim), bare_series(claim), width)
    rows = [
        alt.hconcat(
            *(_panel(panel, claim, sheet, size) for panel, size in row),
            spacing=COLUMN_GAP, bounds="flush",
        )
        for row in _layout(claim.panels, width)
    ]  # fmt: skip
    chart = alt.vconcat(*rows, spacing=ROW_GAP)  # flush rows of rows would lie on each other
    return styled(chart.resolve_scale(color="shared", shape="shared"), width)


def _layout(panels: Sequence[Panel], width: Width) -> list[list[tuple[Panel, tuple[int, int]]]]:
    """Put panels in rows, each with its size; a labelled one that is alone takes the whole row."""
    labelled = any(panel.labelled for panel in panels)
    if width == "narrow":
        return [[(panel, NARROW_LABELLED if labelled else NARROW_SIZE)] for panel in panels]
    columns = 2 if labelled or len(panels) in (2, 4) else min(3, len(panels))
    wide, high = PANEL_SIZES[columns]
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    if not labelled:
        return [[(panel, (wide, high)) for panel in row] for row in rows]
    whole = 2 * wide + COLUMN_GAP
    return [[(p, (wide if len(row) == 2 else whole, LABELLED_HEIGHT)) for p in row] for row in rows]


def bare_series(claim: ClaimRecord) -> frozenset[str]:
    """Return the series of which nothing was measured."""
    marked = {point.series for point in claim.points if point.measured is not None}
    return frozenset(point.series for point in claim.points) - marked


def series_looks(claim: ClaimRecord) -> dict[str, Look]:
    """Give every series, or family of series, its colour and shape.

    Fixed names have the same in every figure; others take what is left, and only where there are
    more than eight in one figure does a look come twice.
    """
    families = list(dict.fromkeys(_family(point) for point in claim.points))
    taken = {FIXED_LOOKS[name] for name in families if name in FIXED_LOOKS}
    free = [look for look in SPARE_LOOKS if look not in taken] or list(SPARE_LOOKS)
    spare = itertools.cycle([*reversed(free)])
    return {name: FIXED_LOOKS[name] if name in FIXED_LOOKS else next(spare) for name in families}


def _family(point: Point) -> str:
    return (point.family or point.series).replace("-", "_")


# -- one panel -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """Both axes of a panel, and the channels that every layer shares."""

    x: Axis
    y: Axis
    channels: dict[str, Any]

    def pixels(self, x: float, y: float) -> tuple[float, float]:
        """Return a point's pixels, counted from the upper left corner."""
        return self.x.pixel(x), self.y.size - self.y.pixel(y)

    def box(self) -> Box:
        """Return the plot's area."""
        return Box(0, 0, self.x.size, self.y.size)


def _panel(panel: Panel, claim: ClaimRecord, sheet: Sheet, size: tuple[int, int]) -> Any:
    points = [point for point in claim.points if point.panel == panel.name]
    sharing = {p.name for p in claim.panels if p.axes and p.axes == panel.axes} | {panel.name}
    frame = _frame(panel, [p for p in claim.points if p.panel in sharing], size)
    layers = (_scatter if panel.labelled else _curves)(points, frame, sheet)
    title = textwrap.wrap(panel.name, size[0] // 7)
    return alt.layer(*layers).properties(width=size[0], height=size[1], title=title)


def _frame(panel: Panel, points: Sequence[Point], size: tuple[int, int]) -> Frame:
    xs = [point.x + k * (point.x_se or 0.0) for point in points for k in (-2, 2)]
    ys = [value for point in points for value in _extent(point, log=panel.log_y)]
    kind_x: Kind = "linear" if not panel.log_x else "log" if min(xs) > 0 else "symlog"
    x = spanning(xs, size[0], kind_x, 0.05 if panel.labelled else 0.02)
    if panel.log_y:
        y = spanning(ys, size[1], "log", 0.05)
    else:
        from_zero = 0.0 <= min(ys) < 0.5 * max(ys) and not panel.labelled
        y = spanning([*ys, *([0.0] if from_zero else [])], size[1], "linear", 0.05)
        y = Axis(0.0, y.high, y.size) if from_zero else y
    axis_x = alt.Axis(grid=False, labelFlush=False, tickCount=5)
    if panel.log_x:
        measured = [p.x for p in points if p.measured is not None] or xs
        axis_x = alt.Axis(
            grid=False,
            labelFlush=False,
            labelOverlap=False,
            format=".4~r",
            values=x.ticks(measured),
        )
    axis_y = alt.Axis(tickCount=5, labelFlush=False)
    if panel.log_y:
        axis_y = alt.Axis(format=".4~r", values=y.ticks(), labelOverlap=False)
    channels = {
        "x": alt.X("x:Q", title=panel.x_title, scale=x.scale(), axis=axis_x),
        "y": alt.Y("y:Q", title=panel.y_title, scale=y.scale(), axis=axis_y),
    }
    return Frame(x, y, channels)


def _extent(point: Point, *, log: bool) -> list[float]:
    """Return everything that is drawn of a point: prediction, measurement, ends of its bar."""
    found = [] if point.predicted is None else [point.predicted]
    return found if point.measured is None else [*found, *_bar(point, log=log)]


def _bar(point: Point, *, log: bool) -> tuple[float, float]:
    """Return measured -+ two standard errors; above 0 where the axis is logarithmic."""
    assert point.measured is not None
    reach = 2 * (point.se or 0.0)
    low = point.measured - reach
    return max(low, 0.2 * point.measured) if log else low, point.measured + reach


# -- curves over x -------------------------------------------------------------------------------


def _curves(points: Sequence[Point], frame: Frame, sheet: Sheet) -> list[Any]:
    names = [name for name in sheet.looks if name not in sheet.bare]
    colors, shapes = ([sheet.looks[name][i] for name in names] for i in range(2))
    legend = _legend(names, sheet.width)
    color = alt.Color("series:N", scale=alt.Scale(domain=names, range=colors), legend=legend)
    shape = alt.Shape("series:N", scale=alt.Scale(domain=names, range=shapes), legend=legend)
    predicted = [
        {"x": p.x, "y": p.predicted, "series": p.series} for p in points if p.predicted is not None
    ]
    layers: list[Any] = []
    for name in dict.fromkeys(str(row["series"]) for row in predicted):
        own = alt.Chart(data([row for row in predicted if row["series"] == name]))
        line = own.mark_line(strokeWidth=1.8, color=sheet.looks[name][0])
        layers.append(line.encode(**frame.channels))
    log = frame.y.kind == "log"
    marks = [
        {"x": p.x, "y": p.measured, "series": p.series, "hover": _hover(p),
         "low": _bar(p, log=log)[0], "high": _bar(p, log=log)[1]}
        for p in points if p.measured is not None
    ]  # fmt: skip
    if marks:
        base = alt.Chart(data(marks))
        bars = base.mark_rule(opacity=0.6, strokeWidth=1.5)
        dots = base.mark_point(filled=True, size=46, opacity=1)
        low = _field(frame.channels["y"], "low")
        layers.append(bars.encode(x=frame.channels["x"], y=low, y2="high:Q", color=color))
        layers.append(
            dots.encode(**frame.channels, color=color, shape=shape, description="hover:N")
        )
    return [*layers, *_curve_names(points, frame, sheet)]


def _legend(names: Sequence[str], width: Width) -> alt.Legend:
    room = 90 if width == "wide" else 44
    return alt.Legend(columns=max(1, room // (4 + max(map(len, names), default=1))))


def _curve_names(points: Sequence[Point], frame: Frame, sheet: Sheet) -> list[Any]:
    """Name each bare curve where it is farthest from all others."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in sorted(points, key=lambda point: point.x):
        if point.predicted is not None:
            lines.setdefault(point.series, []).append(frame.pixels(point.x, point.predicted))
    obstacles = [
        box for line in lines.values() for a, b in itertools.pairwise(line)
        for box in along(*a, *b)
    ]  # fmt: skip
    wishes: list[Wish] = []
    for name in (series for series in lines if series in sheet.bare):
        others = [box for key, line in lines.items() if key != name for box in _trail(line)]
        x, y = max(lines[name], key=lambda spot: _gap(spot, others, frame.x.size))
        wishes.append(Wish(name, x, y, sheet.label_size))
    return _names(wishes, obstacles, frame, always=True)


def _trail(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return points all along a line."""
    return [
        ((box.left + box.right) / 2, (box.top + box.bottom) / 2)
        for a, b in itertools.pairwise(line)
        for box in along(*a, *b)
    ]


def _gap(spot: tuple[float, float], others: Sequence[tuple[float, float]], width: float) -> float:
    """Return how clear a spot is of everything else, and of the panel's sides."""
    nearest = min((math.dist(spot, other) for other in others), default=40.0)
    return min(nearest, 40.0) + min(spot[0], width - spot[0], 20.0)


# -- methods as points ---------------------------------------------------------------------------


def _scatter(points: Sequence[Point], frame: Frame, sheet: Sheet) -> list[Any]:
    """Draw one labelled mark per method; a ring where the closed form has it."""
    rows = [
        {"x": p.x, "y": p.measured, "hover": _hover(p), "family": _family(p), "order": i,
         "color": sheet.looks[_family(p)][0], "shape": sheet.looks[_family(p)][1],
         "low": _bar(p, log=False)[0], "high": _bar(p, log=False)[1],
         "left": p.x - 2 * (p.x_se or 0.0), "right": p.x + 2 * (p.x_se or 0.0)}
        for i, p in enumerate(points) if p.measured is not None
    ]  # fmt: skip
    predicted = [
        {"x": p.x, "y": p.predicted, "color": sheet.looks[_family(p)][0]}
        for p in points if p.predicted is not None
    ]  # fmt: skip
    x, y = frame.channels["x"], frame.channels["y"]
    color = alt.Color("color:N", scale=None, legend=None)
    shape = alt.Shape("shape:N", scale=None, legend=None)
    base = alt.Chart(data(rows))
    bar = base.mark_rule(opacity=0.55, strokeWidth=1.4)
    rings = alt.Chart(data(predicted)).mark_point(size=170, opacity=1, strokeWidth=1.2)
    nothing = alt.Chart(data([{"y": 0.0}])).mark_rule(strokeDash=[2, 3], color=FAINT)
    joined = base.mark_line(strokeWidth=0.9, opacity=0.5)
    return [
        nothing.encode(y=y),
        joined.encode(x=x, y=y, color=color, detail="family:N", order="order:Q"),
        bar.encode(x=x, y=_field(y, "low"), y2="high:Q", color=color),
        bar.encode(y=y, x=_field(x, "left"), x2="right:Q", color=color),
        rings.encode(x=x, y=y, color=color),
        base.mark_point(filled=True, size=62, opacity=0.8).encode(
            x=x, y=y, color=color, shape=shape, description="hover:N"
        ),
        *_point_names(points, frame, sheet),
    ]


def _point_names(points: Sequence[Point], frame: Frame, sheet: Sheet) -> list[Any]:
    obstacles: list[Box] = []
    wishes: list[Wish] = []
    last: dict[str, tuple[float, float]] = {}
    for point in points:
        if point.measured is None:
            continue
        here = frame.pixels(point.x, point.measured)
        low, high = _bar(point, log=False)
        reach = 2 * (point.x_se or 0.0)
        obstacles.append(around(*here, 8))
        obstacles += along(*frame.pixels(point.x, low), *frame.pixels(point.x, high))
        left, right = (frame.pixels(point.x + k * reach, point.measured) for k in (-1, 1))
        obstacles += along(*left, *right)
        text = point.series.replace("learning_rate=", "lr ")
        wishes.append(Wish(text, *here, sheet.label_size))
        obstacles += along(*last.get(_family(point), here), *here)
        last[_family(point)] = here
    wishes.sort(key=lambda wish: (-wish.y, wish.x))
    return _names(wishes, obstacles, frame)


def _names(
    wishes: Sequence[Wish], obstacles: Sequence[Box], frame: Frame, *, always: bool = False
) -> list[Any]:
    """Draw labels clear of each other, with a line to what each names where that is not near.

    Args:
        wishes: labels and what they name, the most important first.
        obstacles: marks and lines.
        frame: the panel.
        always: whether near labels have a line too, as those of curves need.
    """
    if not wishes:
        return []
    rows: list[dict[str, Any]] = []
    for wish, spot in zip(wishes, place(wishes, obstacles, frame.box()), strict=True):
        edge = _edge(wish, spot)
        rows.append({
            "x": frame.x.value(spot.x), "y": frame.y.value(frame.y.size - spot.y),
            "label": wish.text, "far": spot.far or always,
            "x_edge": frame.x.value(edge[0]), "y_edge": frame.y.value(frame.y.size - edge[1]),
            "x_mark": frame.x.value(wish.x), "y_mark": frame.y.value(frame.y.size - wish.y),
        })  # fmt: skip
    channels = frame.channels
    leaders = alt.Chart(data([row for row in rows if row["far"]])).mark_rule(
        color="#8a8a8a", strokeWidth=0.8
    )
    base = alt.Chart(data(rows))
    style: dict[str, Any] = {"fontSize": wishes[0].size / PLAIN_WIDTH, "baseline": "middle"}
    halo = base.mark_text(**style, stroke="white", strokeWidth=3, strokeJoin="round")
    text = base.mark_text(**style, color=INK)
    return [
        leaders.encode(
            x=_field(channels["x"], "x_edge"), y=_field(channels["y"], "y_edge"),
            x2="x_mark:Q", y2="y_mark:Q",
        ),
        *(layer.encode(**channels, text="label:N") for layer in (halo, text)),
    ]  # fmt: skip


def _edge(wish: Wish, spot: Place) -> tuple[float, float]:
    """Return where the line from a label's centre to its point leaves the label."""
    across, down = wish.x - spot.x, wish.y - spot.y
    half_width = CHARACTER_WIDTH * wish.size * len(wish.text) / 2
    reach = min(half_width / max(abs(across), 1e-9), 0.6 * wish.size / max(abs(down), 1e-9), 1.0)
    return spot.x + reach * across, spot.y + reach * down


def _field(channel: Any, field: str) -> Any:
    """Return the same channel, read from another field."""
    copy = channel.copy()
    copy["shorthand"] = f"{field}:Q"
    return copy


def _hover(point: Point) -> str:
    closed = "" if point.predicted is None else f", predicted {point.predicted:.4g}"
    return f"{point.series} at {point.x:.4g}: measured {point.measured:.4g}{closed}"

"""The page of the theory lab: curves predicted in closed form, points measured, tables of both."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt

from keepshot.records import write_text
from keepshot.report.page import draw, flat, page_environment
from keepshot.report.styling import SPARE_LOOKS, Look, Width, data, styled
from keepshot.theory.document import ClaimRecord, Panel, Point, TheoryDocument

METHOD_LOOKS: dict[str, Look] = {
    "pretrained": SPARE_LOOKS[0],
    "value_only": SPARE_LOOKS[1],
    "full": SPARE_LOOKS[2],
    "value_only_aux": SPARE_LOOKS[3],
    "value_only_joint": SPARE_LOOKS[4],
}
PANEL_SIZES = {1: (440, 250), 2: (300, 210), 3: (205, 190)}
TITLES = {
    "pretraining": "Pretraining: one step of preconditioned gradient descent",
    "full": "Full tuning: the noise floor at zero shots, few shots ruined",
    "value-only": "Value-only tuning: less gained, few shots kept",
    "auxiliary": "The auxiliary few-shot loss: the target gains, unseen tasks pay",
    "sweeps": "Sweeps: unseen tasks at 20 shots",
    "extensions": "Beyond the paper: partial adaptation, KL, low rank, softmax",
    "bridge": "The bridge: linear attention, a softmax transformer, real models",
}


def write_theory_report(document: TheoryDocument, out_dir: Path) -> Path:
    """Write `report.html` and one figure per claim, `figures/CLAIM.svg`.

    Args:
        document: what the lab returned.
        out_dir: where `spec.yaml` and `environment.json` are shown from, if they are there.

    Returns:
        The path of the page.

    Raises:
        OutputError: if it cannot be written.
    """
    figures = {
        claim.claim: draw(
            claim.claim,
            TITLES[claim.claim],
            [claim_chart(claim, "wide"), claim_chart(claim, "narrow")],
            out_dir / "figures",
        )
        for claim in document.claims
        if claim.points
    }
    spec, environment = out_dir / "spec.yaml", out_dir / "environment.json"
    page = (
        page_environment()
        .get_template("theory.html")
        .render(
            document=document,
            figures=figures,
            titles=TITLES,
            spec=spec.read_text(encoding="utf-8") if spec.exists() else None,
            environment=flat(json.loads(environment.read_text("utf-8")))
            if environment.exists()
            else [],
        )
    )
    path = out_dir / "report.html"
    write_text(page, path)
    return path


def claim_chart(claim: ClaimRecord, width: Width = "wide") -> alt.ConcatChart:
    """Draw the panels of one claim: lines are closed forms, marks are measured, bars two s.e."""
    series = list(dict.fromkeys(point.series for point in claim.points))
    looks = series_looks(series)
    count = len(claim.panels)
    columns = 1 if width == "narrow" else 2 if count in (2, 4) else min(3, count)
    size = (262, 190) if width == "narrow" else PANEL_SIZES[columns]
    charts = [
        _panel(panel, [p for p in claim.points if p.panel == panel.name], looks, width, size)
        for panel in claim.panels
    ]
    chart = alt.concat(*charts, columns=columns, spacing=26)
    return styled(chart.resolve_scale(color="shared", shape="shared"), width)


def series_looks(series: Sequence[str]) -> dict[str, Look]:
    """Give every series its colour and shape; a method always has the same."""
    taken = {METHOD_LOOKS[name] for name in series if name in METHOD_LOOKS}
    spare = iter([look for look in SPARE_LOOKS if look not in taken] * (1 + len(series)))
    return {name: METHOD_LOOKS[name] if name in METHOD_LOOKS else next(spare) for name in series}


def _panel(
    panel: Panel,
    points: Sequence[Point],
    looks: dict[str, Look],
    width: Width,
    size: tuple[int, int],
) -> Any:
    x = _x_channel(panel, sorted({point.x for point in points}))
    y_scale = alt.Scale(type="log") if panel.log_y else alt.Scale(zero=False)
    y = alt.Y("y:Q", title=panel.y_title, scale=y_scale, axis=alt.Axis(tickCount=5))
    names = list(looks)
    room = 90 if width == "wide" else 44
    legend = alt.Legend(columns=max(1, room // (4 + max(map(len, names)))))
    color = alt.Color(
        "series:N", scale=alt.Scale(domain=names, range=[looks[n][0] for n in names]), legend=legend
    )
    shape = alt.Shape(
        "series:N", scale=alt.Scale(domain=names, range=[looks[n][1] for n in names]), legend=legend
    )
    lines = [
        {"x": p.x, "y": p.predicted, "series": p.series} for p in points if p.predicted is not None
    ]
    marks = [
        {"x": p.x, "y": p.measured, "series": p.series, "hover": _hover(p),
         "low": p.measured - 2 * (p.se or 0.0), "high": p.measured + 2 * (p.se or 0.0)}
        for p in points if p.measured is not None
    ]  # fmt: skip
    if panel.log_y:
        marks = [{**m, "low": max(float(m["low"]), 0.2 * float(m["y"]))} for m in marks]
    layers: list[Any] = [
        alt.Chart(data(lines)).mark_line(strokeWidth=1.8).encode(x=x, y=y, color=color)
    ]
    if marks:
        base = alt.Chart(data(marks))
        bars = base.mark_rule(opacity=0.6, strokeWidth=1.5)
        dots = base.mark_point(filled=True, size=46, opacity=1)
        layers.append(
            bars.encode(
                x=x, y=alt.Y("low:Q", title=panel.y_title, scale=y_scale), y2="high:Q", color=color
            )
        )
        layers.append(dots.encode(x=x, y=y, color=color, shape=shape, description="hover:N"))
    return alt.layer(*layers).properties(width=size[0], height=size[1], title=panel.name)


def _x_channel(panel: Panel, xs: Sequence[float]) -> alt.X:
    """Return the horizontal channel: linear, or logarithmic with a place for 0."""
    if not panel.log_x:
        return alt.X("x:Q", title=panel.x_title, axis=alt.Axis(tickCount=5, grid=False))
    scale = alt.Scale(type="log") if xs and xs[0] > 0 else alt.Scale(type="symlog", constant=1.0)
    steps = [m * 10.0**k for k in range(-4, 7) for m in (1, 2, 5)]
    lowest = min((x for x in xs if x > 0), default=1.0)
    ticks = [x for x in steps if lowest <= x <= xs[-1]]
    ticks = [0.0, *ticks] if xs[:1] == [0.0] else ticks
    if len(ticks) > 8:
        ticks = [x for x in ticks if x == 0 or math.log10(x).is_integer()]
    axis = alt.Axis(values=ticks, grid=False, format=".2~f")
    return alt.X("x:Q", title=panel.x_title, scale=scale, axis=axis)


def _hover(point: Point) -> str:
    closed = "" if point.predicted is None else f", predicted {point.predicted:.4g}"
    return f"{point.series} at {point.x:g}: measured {point.measured:.4g}{closed}"

"""Charts of a study's findings: scatters, matrix of settings, shares, small multiples. Pure.

Every chart comes in two widths, for a page and for a phone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from keepshot.report.styling import FAINT, INK, SPARE_LOOKS, Look, Width, data, styled
from keepshot.report.words import score, score_interval, visible
from keepshot.study.evidence import Comparison, Findings, StudyPoint

Row = dict[str, Any]
BLUE, ORANGE = "#0072b2", "#d55e00"
PANELS_A_ROW = {"wide": 5, "narrow": 2}


def looks_of(names: Sequence[str]) -> dict[str, Look]:
    """Give up to 64 names a colour and shape that no other has; then they come again."""
    count = len(SPARE_LOOKS)
    found: dict[str, Look] = {}
    for place, name in enumerate(names):
        shape = SPARE_LOOKS[(place + place // count) % count][1]
        found[name] = (SPARE_LOOKS[place % count][0], shape)
    return found


def models_chart(comparison: Comparison, width: Width = "wide") -> alt.LayerChart:
    """Draw every tuned model: its base's few-shot score across, its own score up, by family."""
    rows = [
        {
            "x": point.base, "y": point.tuned, "group": visible(point.family, 30),
            "whole": point.degraded is None,
            "hover": f"{visible(point.model, 40)}, {visible(point.recipe, 40)}, seed "
            f"{point.tuning_seed}: {score(point.base)}, {score(point.tuned)}",
        }
        for point in comparison.points
    ]  # fmt: skip
    titles = (f"{comparison.first}: mean over tasks", f"{comparison.second}: mean over tasks")
    return _scatter(rows, titles, width)


def tasks_chart(comparison: Comparison, width: Width = "wide") -> alt.LayerChart:
    """Draw every task, a mean over models, by kind of task."""
    base, tuned = _means(comparison.points)
    rows = [
        {
            "x": float(x), "y": float(y), "group": visible(domain, 30), "whole": True,
            "hover": f"{visible(task, 40)}: {score(float(x))}, {score(float(y))}",
        }
        for x, y, task, domain in zip(
            base, tuned, comparison.tasks, comparison.domains, strict=True
        )
    ]  # fmt: skip
    titles = (f"{comparison.first}: mean over models", f"{comparison.second}: mean over models")
    return _scatter(rows, titles, width)


def _means(points: Sequence[StudyPoint]) -> tuple[Any, Any]:
    return (
        np.mean([point.base_by_task for point in points], axis=0),
        np.mean([point.tuned_by_task for point in points], axis=0),
    )


def _scatter(rows: Sequence[Row], titles: tuple[str, str], width: Width) -> alt.LayerChart:
    """Draw marks by group, hollow where not whole, over the line on which both are the same."""
    low, high = _ends([value for row in rows for value in (row["x"], row["y"])])
    scale = alt.Scale(domain=[low, high], nice=False, zero=False)
    ticks = 6 if width == "wide" else 4
    encode: Row = {
        "x": alt.X("x:Q", title=titles[0], scale=scale, axis=_tenths(ticks)),
        "y": alt.Y("y:Q", title=titles[1], scale=scale, axis=_tenths(6)),
    }  # fmt: skip
    names = list(dict.fromkeys(row["group"] for row in rows))
    looks = looks_of(names)
    columns = 6 if width == "wide" else 3
    color = alt.Color(
        "group:N", legend=alt.Legend(columns=columns),
        scale=alt.Scale(domain=names, range=[looks[name][0] for name in names]),
    )  # fmt: skip
    shape = alt.Shape(
        "group:N", scale=alt.Scale(domain=names, range=[looks[name][1] for name in names])
    )
    ends = alt.Chart(data([{"x": low, "y": low}, {"x": high, "y": high}]))
    layers: list[Any] = [
        ends.mark_line(color=FAINT, strokeDash=[2, 3], strokeWidth=1).encode(**encode)
    ]
    for whole in (False, True):
        some = [row for row in rows if row["whole"] is whole]
        if some:
            mark = alt.Chart(data(some)).mark_point(
                filled=whole, size=70 if width == "wide" else 50, opacity=0.85, strokeWidth=1.6
            )
            layers.append(mark.encode(**encode, color=color, shape=shape, description="hover:N"))
    size = (560, 420) if width == "wide" else (270, 280)
    return styled(alt.layer(*layers).properties(width=size[0], height=size[1]), width)


def _tenths(ticks: int) -> alt.Axis:
    return alt.Axis(format=".1f", tickCount=ticks)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = max(0.04 * (high - low), 0.02)
    return low - margin, high + margin


def matrix_chart(findings: Findings, width: Width = "wide") -> alt.LayerChart | None:
    """Draw the correlations of all settings: ranks below the diagonal, scores above.

    Returns:
        None where there is no correlation over all models.
    """
    names = findings.settings
    place = {name: number for number, name in enumerate(names)}
    rows: list[Row] = []
    for one in findings.correlations:
        if (one.models, one.tasks) != ("all", "all"):
            continue
        earlier, later = sorted((one.first, one.second), key=place.__getitem__)
        # Rows go down, so that a later row in an earlier column lies below the diagonal.
        row, column = (later, earlier) if one.kind == "spearman" else (earlier, later)
        rows.append(
            {
                "row": row, "column": column, "value": one.value, "text": score(one.value),
                "interval": score_interval(one.ci95), "dark": abs(one.value) > 0.6,
                "hover": f"{one.kind}, {row} with {column}: {score(one.value)} "
                f"{score_interval(one.ci95)}, {one.num_points} models",
            }
        )  # fmt: skip
    if not rows:
        return None
    step = (min(104, 560 // len(names)), 50) if width == "wide" else (62, 40)
    small = step[0] < 70
    domain = alt.Scale(domain=names)
    base = alt.Chart(data(rows)).encode(
        x=alt.X("column:N", title=None, scale=domain, axis=_settings_axis(-35)),
        y=alt.Y("row:N", title=None, scale=domain, axis=_settings_axis(0)),
    )
    shade = alt.Scale(domain=[-1, 0, 1], range=[ORANGE, "#f7f7f5", BLUE], interpolate="rgb")
    ink = alt.condition("datum.dark", alt.value("white"), alt.value(INK))
    layers = alt.layer(
        base.mark_rect(stroke="white", strokeWidth=2).encode(
            color=alt.Color("value:Q", scale=shade, legend=None), description="hover:N"
        ),
        base.mark_text(fontSize=13, fontWeight=600, dy=-6).encode(text="text:N", color=ink),
        base.mark_text(fontSize=8.5 if small else 11, dy=9).encode(text="interval:N", color=ink),
    )
    return styled(layers.properties(width=alt.Step(step[0]), height=alt.Step(step[1])), width)


def _settings_axis(angle: int) -> alt.Axis:
    return alt.Axis(labelAngle=angle, labelLimit=260, ticks=False, domain=False)


def shares_chart(comparisons: Sequence[Comparison], width: Width = "wide") -> alt.LayerChart | None:
    """Draw what explains the tuned score, with intervals; all models, and those not degraded.

    Returns:
        None where no shares could be given.
    """
    rows: list[Row] = []
    for comparison in comparisons:
        for one in comparison.shares:
            rows.append(
                {
                    "cause": one.cause, "models": f"{comparison.models} models",
                    "value": one.value, "low": one.ci95[0], "high": one.ci95[1],
                    "hover": f"{one.cause}, {comparison.models}: {score(one.value)} "
                    f"{score_interval(one.ci95)}",
                }
            )  # fmt: skip
    if not rows:
        return None
    causes = list(dict.fromkeys(row["cause"] for row in rows))
    groups = list(dict.fromkeys(row["models"] for row in rows))
    base = alt.Chart(data(rows)).encode(
        y=alt.Y("cause:N", title=None, scale=alt.Scale(domain=causes, paddingInner=0.3),
                axis=alt.Axis(labelLimit=200, ticks=False)),
        yOffset=alt.YOffset("models:N", scale=alt.Scale(domain=groups)),
    )  # fmt: skip
    scale = alt.Scale(domain=[0, 1], nice=False)
    title = "share of the variance between models"
    x = alt.X("value:Q", title=title, scale=scale, axis=alt.Axis(format="%", tickCount=5))
    color = alt.Color(
        "models:N", scale=alt.Scale(domain=groups, range=[BLUE, "#e69f00"][: len(groups)])
    )
    layers = alt.layer(
        base.mark_bar(opacity=0.85).encode(x=x, color=color, description="hover:N"),
        base.mark_rule(color=INK, strokeWidth=1.4).encode(
            x=alt.X("low:Q", scale=scale, title=title), x2="high:Q"
        ),
    )
    across = 470 if width == "wide" else 170
    step = alt.Step(22 if len(groups) > 1 else 30)
    return styled(layers.properties(width=across, height=step), width)


def small_multiples(comparison: Comparison, width: Width = "wide") -> alt.ConcatChart:
    """Draw every task by itself: each tuned model against its base, hollow where degraded."""
    families = list(dict.fromkeys(point.family for point in comparison.points))
    looks = looks_of(families)
    tested = {one.task: one for one in comparison.by_task}
    size = (116, 116) if width == "wide" else (112, 112)
    scale = alt.Scale(domain=[-0.03, 1.03], nice=False, zero=False)
    axis = alt.Axis(values=[0, 0.5, 1], format=".1f", title=None)
    charts: list[Any] = []
    for place, task in enumerate(comparison.tasks):
        rows = [
            (
                point.base_by_task[place], point.tuned_by_task[place], looks[point.family][0],
                looks[point.family][0] if point.degraded is None else "white",
            )
            for point in comparison.points
        ]  # fmt: skip
        ends = alt.Chart(data([{"x": 0, "y": 0}, {"x": 1, "y": 1}]))
        x, y = (alt.X("x:Q", scale=scale, axis=axis), alt.Y("y:Q", scale=scale, axis=axis))
        marks = alt.Chart(_as_text(rows)).mark_circle(
            size=20, opacity=0.8, strokeWidth=1, aria=False
        )
        found = tested.get(task)
        under = "" if found is None else f"{score(found.value)} {score_interval(found.ci95)}"
        title = alt.TitleParams(
            visible(task, 22), subtitle=under, fontSize=11, fontWeight="normal",
            subtitleFontSize=10, subtitleColor=FAINT,
        )  # fmt: skip
        layers = alt.layer(
            ends.mark_line(color=FAINT, strokeDash=[2, 3], strokeWidth=0.8).encode(x=x, y=y),
            marks.encode(
                x=x, y=y, fill=alt.Fill("fill:N", scale=None),
                stroke=alt.Stroke("color:N", scale=None),
            ),
            title=title,
        )  # fmt: skip
        charts.append(layers.properties(width=size[0], height=size[1]))
    return styled(alt.concat(*charts, columns=PANELS_A_ROW[width], spacing=16), width)


def _as_text(rows: Sequence[tuple[float, float, str, str]]) -> alt.InlineData:
    """Return marks as one text: altair copies rows many times over, and a text not once."""
    lines = ["x,y,color,fill", *(f"{x:g},{y:g},{color},{fill}" for x, y, color, fill in rows)]
    form = alt.CsvDataFormat(type="csv", parse={"x": "number", "y": "number"})
    return alt.InlineData(values="\n".join(lines), format=form)

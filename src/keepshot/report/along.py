"""Charts along lambda: every task, how answers fail, and several pairs as the paper draws them.

Pure; every chart comes in two widths, for a page and for a phone. Source of the last one:
arXiv 2504.11626, figure 1 (change in percent against lambda 1, the tuned model there).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from keepshot.records import PathPoint, ResultDocument
from keepshot.report import view
from keepshot.report.styling import FAINT, SPARE_LOOKS, Width, data, styled
from keepshot.report.words import lam, percent, score, short_names, visible

Row = dict[str, Any]
_PICK = "#009e73"
_KINDS = {
    "format_failure": ("no possible answer", "#d55e00", [1, 0]),
    "label_leakage": ("a label of the target", "#0072b2", [5, 3]),
}


def tasks_along_chart(document: ResultDocument, width: Width = "wide") -> alt.ConcatChart | None:
    """Draw every task's few-shot score against lambda, one small chart each, the pick marked.

    A dot is filled where the score is significantly below the base's (paired, task by task).

    Returns:
        None if the path has no scores by task.
    """
    points = [point for point in view.path_split(document) if point.tasks]
    if len(points) < 2:
        return None
    names = list(points[0].tasks)
    labels = short_names(names)
    # What lost most comes first, as in the chart of tasks.
    base = next((point for point in points if point.lam == 0.0), points[0])
    names.sort(key=lambda name: points[-1].tasks[name] - base.tasks[name])
    size = (150, 92) if width == "wide" else (118, 84)
    charts = [_task_panel(points, name, labels[name], document, size) for name in names]
    columns = 4 if width == "wide" else 2
    return styled(alt.concat(*charts, columns=columns, spacing=18), width)


def _task_panel(
    points: Sequence[PathPoint],
    name: str,
    label: str,
    document: ResultDocument,
    size: tuple[int, int],
) -> alt.LayerChart:
    rows: list[Row] = [
        {
            "x": point.lam, "y": point.tasks[name], "below": name in point.below_base,
            "hover": f"{label}, lambda {lam(point.lam)}: {score(point.tasks[name])}",
        }
        for point in points
    ]  # fmt: skip
    x = alt.X("x:Q", title=None, scale=_lambdas(points), axis=alt.Axis(tickCount=3, format=".1f"))
    y = alt.Y("y:Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=3))
    base = alt.Chart(data(rows))
    fill = alt.condition("datum.below", alt.value("#d55e00"), alt.value("white"))
    dots = base.mark_circle(size=34, opacity=1, stroke="#d55e00", strokeWidth=1.2)
    layers: list[Any] = [
        *_pick_rule(document, x),
        base.mark_line(color="#d55e00", strokeWidth=1.6).encode(x=x, y=y),
        dots.encode(x=x, y=y, color=fill, description="hover:N"),
    ]
    title = alt.TitleParams(visible(label, 24), fontSize=12, fontWeight="normal")
    return _sized(alt.layer(*layers, title=title), size)


def conduct_chart(document: ResultDocument, width: Width = "wide") -> alt.ConcatChart | None:
    """Draw wrong formats, leaked labels, length of free answers and recall against lambda.

    Returns:
        None if the path has no such figures.
    """
    points = [point for point in view.path_split(document) if point.format_failure is not None]
    if len(points) < 2:
        return None
    size = (300, 170) if width == "wide" else (262, 150)
    x = alt.X(
        "x:Q", title="lambda", scale=_lambdas(points), axis=alt.Axis(format=".1f", tickCount=5)
    )
    rows: list[Row] = []
    for key, (kind, _, _) in _KINDS.items():
        for point in points:
            value = getattr(point, key) or 0.0
            hover = f"{kind}, lambda {lam(point.lam)}: {percent(value)}"
            rows.append({"x": point.lam, "y": value, "kind": kind, "hover": hover})
    kinds = [kind for kind, _, _ in _KINDS.values()]
    colors = alt.Scale(domain=kinds, range=[color for _, color, _ in _KINDS.values()])
    dashes = alt.Scale(domain=kinds, range=[dash for _, _, dash in _KINDS.values()])
    top = max(0.1, *(row["y"] for row in rows))
    share = alt.Y("y:Q", title="share of answers", scale=alt.Scale(domain=[0, min(1.0, top)]),
                  axis=alt.Axis(format="%", tickCount=4))  # fmt: skip
    base = alt.Chart(data(rows)).encode(
        x=x, y=share, color=alt.Color("kind:N", scale=colors), description="hover:N"
    )
    lines = base.mark_line(strokeWidth=2).encode(strokeDash=alt.StrokeDash("kind:N", scale=dashes))
    charts: list[Any] = [
        alt.layer(*_pick_rule(document, x), lines, base.mark_circle(size=36, opacity=1))
        .properties(width=size[0], height=size[1])
    ]  # fmt: skip
    lengths = [(p.lam, p.answer_length, None) for p in points if p.answer_length is not None]
    if len(lengths) > 1:
        title = "characters per free answer"
        charts.append(_line_panel(document, lengths, (x, title, ".0f"), size))
    recalled = [(p.lam, p.recall, p.recall_ci95) for p in points if p.recall is not None]
    if len(recalled) > 1:
        title = "score on tasks of knowledge"
        charts.append(_line_panel(document, recalled, (x, title, ".1f"), size))
    return styled(alt.concat(*charts, columns=2 if width == "wide" else 1, spacing=30), width)


def _line_panel(
    document: ResultDocument,
    points: Sequence[tuple[float, float, tuple[float, float] | None]],
    axes: tuple[alt.X, str, str],
    size: tuple[int, int],
) -> alt.LayerChart:
    """Draw one figure against lambda, with bars where it has intervals."""
    x, title, form = axes
    rows: list[Row] = []
    for at, value, interval in points:
        low, high = interval or (value, value)
        hover = f"{title}, lambda {lam(at)}: {value:.2f}"
        rows.append({"x": at, "y": value, "low": low, "high": high, "hover": hover})
    top = max(row["high"] for row in rows)
    y = alt.Y("y:Q", title=title, scale=alt.Scale(domain=[0, top * 1.05 or 1.0]),
              axis=alt.Axis(format=form, tickCount=4))  # fmt: skip
    base = alt.Chart(data(rows))
    layers: list[Any] = [
        *_pick_rule(document, x),
        base.mark_rule(color=FAINT, opacity=0.45).encode(x=x, y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_line(color=FAINT, strokeWidth=2).encode(x=x, y=y),
        base.mark_circle(size=36, opacity=1, color=FAINT).encode(x=x, y=y, description="hover:N"),
    ]
    return _sized(alt.layer(*layers), size)


def relative_chart(
    documents: Mapping[str, ResultDocument], width: Width = "wide"
) -> alt.LayerChart | None:
    """Draw several paths as the change of the few-shot score against lambda 1, in percent.

    Lambda 1 is the tuned model unless lambda differs by tensor. Bars are the few-shot score's own
    95 % interval, divided by the score at lambda 1.

    Returns:
        None if no run has a path on which lambda 1 was measured.
    """
    rows: list[Row] = []
    names = [name for name, document in documents.items() if _score_at_one(document)]
    for name in names:
        points = view.path_split(documents[name])
        end = _score_at_one(documents[name])
        for point in points:
            low, high = ((bound - end) / end for bound in point.icl_ci95)
            change = (point.icl - end) / end
            hover = f"{visible(name, 40)}, lambda {lam(point.lam)}: {change:+.1%}"
            rows.append(
                {
                    "x": point.lam, "y": change, "low": low, "high": high,
                    "run": visible(name, 40), "hover": hover,
                }
            )  # fmt: skip
    if not rows:
        return None
    shown = [visible(name, 40) for name in names]
    looks = [SPARE_LOOKS[i % len(SPARE_LOOKS)] for i in range(len(shown))]
    color = alt.Color("run:N", scale=alt.Scale(domain=shown, range=[look[0] for look in looks]))
    shape = alt.Shape("run:N", scale=alt.Scale(domain=shown, range=[look[1] for look in looks]))
    ticks: Row = {"format": ".1f", "tickCount": 5}
    x = alt.X("x:Q", title="lambda (0 is the base)", axis=alt.Axis(**ticks))
    title = "few-shot score against that at lambda 1"
    y = alt.Y("y:Q", title=title, axis=alt.Axis(format="+%", tickCount=6))
    base = alt.Chart(data(rows))
    zero = alt.Chart(data([{"y": 0.0}])).mark_rule(strokeDash=[2, 3], color=FAINT)
    chart = alt.layer(
        zero.encode(y=y),
        base.mark_rule(opacity=0.35).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=color),
        base.mark_line(strokeWidth=2).encode(x=x, y=y, color=color),
        base.mark_point(filled=True, size=60, opacity=1).encode(
            x=x, y=y, color=color, shape=shape, description="hover:N"
        ),
    )
    size = (660, 340) if width == "wide" else (262, 280)
    return styled(chart.properties(width=size[0], height=size[1]), width)


def _sized(chart: Any, size: tuple[int, int]) -> Any:
    return chart.properties(width=size[0], height=size[1])


def _score_at_one(document: ResultDocument) -> float:
    return next((point.icl for point in view.path_split(document) if point.lam == 1.0), 0.0)


def _lambdas(points: Sequence[PathPoint]) -> alt.Scale:
    lams = [point.lam for point in points]
    return alt.Scale(domain=[min(lams), max(lams)], nice=False)


def _pick_rule(document: ResultDocument, x: alt.X) -> list[Any]:
    if document.pick is None or document.pick.lam is None:
        return []
    rule = alt.Chart(data([{"x": document.pick.lam}])).mark_rule(color=_PICK, strokeWidth=1.5)
    return [rule.encode(x=x)]

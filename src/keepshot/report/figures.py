"""Charts of a result document: the trajectory, the tasks, the training curves. Pure.

Every chart comes in two widths, for a page and for a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import altair as alt

from keepshot.records import PathPoint, ResultDocument, TrainingRecord
from keepshot.report import view
from keepshot.report.scatter import Mark, two_scores
from keepshot.report.styling import FAINT, SPARE_LOOKS, Width, data, looks, styled
from keepshot.report.view import Arm, Measured, TaskScore
from keepshot.report.words import (
    lam,
    percent,
    percent_interval,
    score,
    score_interval,
    short_names,
    visible,
)

Row = dict[str, Any]
MAX_CURVE_POINTS = 150


def trajectory_chart(document: ResultDocument, width: Width = "wide") -> alt.LayerChart | None:
    """Draw few-shot ability against target score: the path along lambda, and every arm.

    Returns:
        None if no arm and no point of the path has a target score.
    """
    listed = view.arms(document)
    relative = any(arm.row.retention is not None for arm in listed) or any(
        point.retention is not None for point in document.path
    )
    marks = _arm_marks(listed, relative)
    paths = {
        split: _path_marks(document, [p for p in document.path if p.split == split], relative)
        for split in ("validation", "test")
    }
    paths = {split: points for split, points in paths.items() if points}
    if not marks and not paths:
        return None
    titles = ("Target score, 0 shots", _ability_title(view.most_shots(document), relative))
    return two_scores(marks, paths, titles, relative, width)


def _ability_title(shots: int, relative: bool) -> str:
    return f"Few-shot ability kept, {shots} shots" if relative else f"Few-shot score, {shots} shots"


def _arm_marks(listed: Sequence[Arm], relative: bool) -> list[Mark]:
    names = [arm.name for arm in listed]
    shown, look = short_names(names), looks(names)
    marks: list[Mark] = []
    for arm in listed:
        ability = arm.retention if relative else (arm.row.icl, arm.row.icl_ci95)
        if arm.target is None or ability is None:
            continue
        marks.append(
            Mark(
                shown[arm.name],
                look[arm.name],
                arm.target,
                ability,
                _hover(shown[arm.name], arm.target, ability, relative),
            )
        )
    return marks


def _path_marks(
    document: ResultDocument, points: Sequence[PathPoint], relative: bool
) -> list[Mark]:
    marks: list[Mark] = []
    pick = document.pick
    for point in sorted(points, key=lambda point: point.lam):
        target = view.measured(point.target, point.target_ci95)
        ability = (
            view.measured(point.retention, point.retention_ci95)
            if relative
            else (point.icl, point.icl_ci95)
        )
        if target is None or ability is None:
            continue
        label = f"\u03bb {lam(point.lam).removeprefix('0') or '0'}"
        name = f"lambda {lam(point.lam)}, {point.split} items"
        role = ""
        if pick and point.lam in (*pick.pareto, pick.lam):
            role = "pick" if point.lam == pick.lam else "pareto"
        hover = _hover(name, target, ability, relative)
        marks.append(Mark(label, (FAINT, "circle"), target, ability, hover, role))
    return marks


def _hover(name: str, target: Measured, ability: Measured, relative: bool) -> str:
    kept = (
        f"kept {percent(ability[0])} {percent_interval(ability[1])}"
        if relative
        else f"few-shot {score(ability[0])} {score_interval(ability[1])}"
    )
    return f"{name}: {kept}, target {score(target[0])} {score_interval(target[1])}"


def tasks_chart(document: ResultDocument, width: Width = "wide") -> alt.LayerChart | None:
    """Draw every task's score in every arm at the most shots, chance marked, most lost on top.

    Returns:
        None if there are no scores.
    """
    rows = view.task_scores(document)
    if not rows:
        return None
    names = [arm.name for arm in view.arms(document)]
    shown, look = short_names(names), looks(names)
    tasks = list(dict.fromkeys(row.task for row in rows))
    labels = short_names(tasks)
    band = max(22, 7 * len(names) + 8)
    y = alt.Y(
        "task:N",
        sort=[labels[task] for task in tasks],
        title=None,
        axis=alt.Axis(
            grid=False,
            ticks=False,
            domain=False,
            labelPadding=8,
            labelLimit=190 if width == "wide" else 104,
        ),
        scale=alt.Scale(paddingInner=0.0, paddingOuter=0.0),
    )
    offset = alt.YOffset(
        "arm:N",
        sort=[shown[n] for n in names],
        scale=alt.Scale(domain=[shown[n] for n in names], paddingOuter=0.7),
    )
    x = alt.X(
        "value:Q",
        title=f"Score, {view.most_shots(document)} shots",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(format=".1f", tickCount=5, labelFlush=False),
    )
    domain = [shown[name] for name in names]
    longest = max(len(name) for name in domain)
    room = 680 if width == "wide" else 340
    legend = alt.Legend(columns=max(1, room // (30 + 7 * longest)))
    colors = alt.Scale(domain=domain, range=[look[n][0] for n in names])
    shapes = alt.Scale(domain=domain, range=[look[n][1] for n in names])
    color = alt.Color("arm:N", scale=colors, legend=legend)
    shape = alt.Shape("arm:N", scale=shapes, legend=legend)
    base = alt.Chart(data([_task_row(row, labels, shown) for row in rows]))
    stripes = alt.Chart(data([{"task": labels[t]} for t in tasks[::2]])).mark_rect(color="#f4f4f4")
    chance = alt.Chart(data(_chance_rows(rows, labels))).mark_tick(
        color="#8a8a8a", thickness=1.5, size=band - 4
    )
    bars = base.mark_rule(opacity=0.5, strokeWidth=1.5)
    points = base.mark_point(filled=True, size=58, opacity=1)
    chart = alt.layer(
        stripes.encode(y=y),
        chance.encode(x=x, y=y, description="hover:N"),
        bars.encode(x=alt.X("low:Q"), x2="high:Q", y=y, yOffset=offset, color=color),
        points.encode(x=x, y=y, yOffset=offset, color=color, shape=shape, description="hover:N"),
    ).properties(width=560 if width == "wide" else 232, height=band * len(tasks))
    return styled(chart, width)


def _task_row(row: TaskScore, labels: Mapping[str, str], shown: Mapping[str, str]) -> Row:
    interval = score_interval(row.ci95)
    return {
        "task": labels[row.task],
        "arm": shown[row.arm],
        "value": row.value,
        "low": row.ci95[0],
        "high": row.ci95[1],
        "hover": f"{labels[row.task]}, {shown[row.arm]}: {score(row.value)} {interval}, "
        f"n = {row.num_items} x {row.num_draws}",
    }


def _chance_rows(rows: Sequence[TaskScore], labels: Mapping[str, str]) -> list[Row]:
    chances = {row.task: row.chance for row in rows if row.chance > 0}
    return [
        {"task": labels[task], "value": value, "hover": f"chance {score(value)}"}
        for task, value in chances.items()
    ]


NOT_CURVES = frozenset({"step", "epoch", "learning_rate", "lr", "grad_norm", "num_tokens"})
CURVE_COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]
CURVE_DASHES = [[1, 0], [5, 3], [2, 2], [8, 3], [8, 3, 2, 3]]


def training_chart(document: ResultDocument, width: Width = "wide") -> alt.ConcatChart | None:
    """Draw the losses of every arm that was tuned, one small chart each.

    Returns:
        None if no losses were recorded.
    """
    keys = {key for record in document.training for row in record.losses for key in row}
    names = sorted((visible(key, 24) for key in keys - NOT_CURVES), key=lambda n: (n != "loss", n))
    charts = [
        chart
        for record in document.training
        if (chart := _curves(record, names, width)) is not None
    ]
    if not charts:
        return None
    columns = 3 if width == "wide" else 1
    return styled(
        alt.concat(*charts, columns=columns, spacing=24).resolve_scale(
            color="shared", strokeDash="shared"
        ),
        width,
    )


def _curves(record: TrainingRecord, names: Sequence[str], width: Width) -> alt.Chart | None:
    rows: list[Row] = [
        {"step": entry.get("step", index + 1), "name": visible(key, 24), "loss": value}
        for index, entry in enumerate(record.losses)
        for key, value in entry.items()
        if key not in NOT_CURVES and math.isfinite(value)
    ]
    if not rows:
        return None
    kept = [row for name in names for row in _every_so_many(rows, name)]
    size = (180, 130) if width == "wide" else (270, 120)
    return (
        alt.Chart(data(kept), title=visible(record.arm, 30))
        .mark_line(strokeWidth=1.8)
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickCount=4, grid=False)),
            y=alt.Y("loss:Q", title=None, axis=alt.Axis(tickCount=4)),
            color=alt.Color("name:N", scale=alt.Scale(domain=names, range=CURVE_COLORS)),
            strokeDash=alt.StrokeDash("name:N", scale=alt.Scale(domain=names, range=CURVE_DASHES)),
        )
        .properties(width=size[0], height=size[1])
    )


def _every_so_many(rows: Sequence[Row], name: str) -> list[Row]:
    own = [row for row in rows if row["name"] == name]
    stride = math.ceil(len(own) / MAX_CURVE_POINTS)
    return own if stride <= 1 else [*own[:-1:stride], own[-1]]


def run_colors(names: Sequence[str]) -> dict[str, str]:
    """Give every run of a comparison its colour."""
    return {name: SPARE_LOOKS[i % len(SPARE_LOOKS)][0] for i, name in enumerate(names)}


def runs_chart(
    documents: Mapping[str, ResultDocument], width: Width = "wide"
) -> alt.LayerChart | None:
    """Draw retention against target score for every arm of several runs.

    An arm's shape is its own; its colour is the run's.

    Returns:
        None if no arm of any run has both figures.
    """
    colors = run_colors(list(documents))
    marks: list[Mark] = []
    shots: set[int] = set()
    for run, document in documents.items():
        for mark in _arm_marks(view.arms(document), relative=True):
            marks.append(
                replace(
                    mark,
                    look=(colors[run], mark.look[1]),
                    label=f"{mark.label}, {visible(run, 24)}",
                    hover=f"{visible(run, 40)}, {mark.hover}",
                )
            )
            shots.add(view.most_shots(document))
    if not marks:
        return None
    which = " or ".join(str(number) for number in sorted(shots))
    titles = ("Target score, 0 shots", f"Few-shot ability kept, {which} shots")
    return two_scores(marks, {}, titles, relative=True, width=width)

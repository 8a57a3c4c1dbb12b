"""Rich tables of a result document, for a terminal of 100 columns. Prints nothing."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from keepshot.records import JudgeDocument, ResultDocument
from keepshot.report import view
from keepshot.report.words import (
    lam,
    percent,
    percent_interval,
    score,
    score_interval,
    short_names,
    visible,
)
from keepshot.study.document import StudyDocument
from keepshot.theory.document import ClaimRecord

NAME_WIDTH = 24


def summary_table(document: ResultDocument) -> Table:
    """Return one line per arm: target, few-shot scores, retention, each with its interval.

    Of several numbers of shots only the largest has its interval, to stay within 80 columns.
    """
    listed = view.arms(document)
    names = short_names([arm.name for arm in listed])
    shots = sorted({row.shots for row in document.summary})
    with_target = any(arm.target for arm in listed)
    table = _table("arm" if view.kind(document) == "run" else "model")
    if with_target:
        table.add_column("target", justify="right")
    for number in shots:
        table.add_column(f"{number} shots", justify="right")
    for title in ("retention", "changed", "n"):
        table.add_column(title, justify="right")
    for arm in listed:
        cells = [_name(names[arm.name], arm.row.lam)]
        if with_target:
            cells.append(_scored(arm.row.target, arm.row.target_ci95))
        for number in shots:
            row = arm.by_shots.get(number)
            full = number == shots[-1]
            cells.append(_scored(row.icl if row else None, row.icl_ci95 if row and full else None))
        kept = f"{percent(arm.row.retention)} {percent_interval(arm.row.retention_ci95)}"
        changed = percent(arm.row.changed) if arm is not listed[0] else ""
        ends = (kept, changed, f"{arm.row.num_items}")
        cells += [Text(t.strip()) for t in ends]
        table.add_row(*cells)
    return table


def scores_table(document: ResultDocument) -> Table:
    """Return one line per task and arm at the most shots, the largest loss first."""
    names = short_names([arm.name for arm in view.arms(document)])
    table = _table("task")
    table.add_column(
        "arm" if view.kind(document) == "run" else "model",
        max_width=NAME_WIDTH,
        no_wrap=True,
        overflow="ellipsis",
    )
    for title in (f"score, {view.most_shots(document)} shots", "chance", "n", "draws"):
        table.add_column(title, justify="right")
    rows = view.task_scores(document)
    for index, row in enumerate(rows):
        first = index == 0 or rows[index - 1].task != row.task
        table.add_row(
            Text(visible(row.task, 60) if first else ""),
            Text(names[row.arm]),
            _scored(row.value, row.ci95),
            Text(score(row.chance)),
            Text(str(row.num_items)),
            Text(str(row.num_draws)),
        )
    return table


def path_table(document: ResultDocument) -> Table:
    """Return one line per lambda and split, the lambda picked marked with a star."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for title in ("lambda", "target", "few-shot", "retention", "n"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("items")
    picked = document.pick.lam if document.pick else None
    for point in sorted(document.path, key=lambda point: (point.split, point.lam)):
        star = "* " if point.lam == picked else ""
        kept = f"{percent(point.retention)} {percent_interval(point.retention_ci95)}".strip()
        table.add_row(
            Text(star + lam(point.lam)),
            _scored(point.target, point.target_ci95),
            _scored(point.icl, point.icl_ci95),
            Text(kept),
            Text(str(point.num_items)),
            Text(point.split),
            style="bold" if star else None,
        )
    return table


def instructions_table(document: ResultDocument | JudgeDocument | StudyDocument) -> Table:
    """Return one line per arm, lambda and part of a set: prompts and instructions followed."""
    names = short_names(list(dict.fromkeys(row.arm for row in document.instructions)))
    table = _table("instructions, strict")
    for title in ("prompts", "single", "cut", "n"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("part")
    for row in document.instructions:
        table.add_row(
            _name(names[row.arm], row.lam),
            _scored(row.prompt_strict, row.prompt_strict_ci95),
            Text(score(row.instruction_strict)),
            Text(percent(row.truncated)),
            Text(str(row.num_prompts)),
            Text(f"{row.prompt_set}, {row.split}, {row.variant}, {row.style}"),
        )
    return table


def _table(first: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    table.add_column(first, max_width=NAME_WIDTH, no_wrap=True, overflow="ellipsis")
    return table


def _name(name: str, mixed: float | None) -> Text:
    return Text(name if mixed is None else f"{name} (\u03bb {lam(mixed)})")


def _scored(value: float | None, interval: tuple[float, float] | None) -> Text:
    """Return a score with its interval dimmed; user text never reaches rich's markup."""
    if value is None:
        return Text("n/a", style="dim")
    text = Text(score(value))
    return text.append(f" {score_interval(interval)}", style="dim") if interval else text


def theory_tables(claim: ClaimRecord) -> list[Table]:
    """Return the errors of one claim, predicted beside measured with z-scores, and its checks."""
    tables: list[Table] = []
    if claim.rows:
        table = _table(claim.claim)
        for title in ("task", "shots", "predicted", "measured", "se", "z"):
            table.add_column(title, justify="left" if title == "task" else "right")
        for row in claim.rows:
            figures = (row.predicted, row.measured, row.se)
            cells = [row.method, row.task, f"{row.shots}", *(f"{x:.4f}" for x in figures)]
            table.add_row(*(Text(cell) for cell in [*cells, f"{row.z:+.1f}"]))
        tables.append(table)
    if claim.checks:
        table = _table(f"{claim.claim}: checks")
        for title in ("predicted", "measured", "se"):
            table.add_column(title, justify="right")
        for check in claim.checks:
            se = "" if check.se is None else f"{check.se:.2g}"
            cells = [check.quantity, f"{check.predicted:.6g}", f"{check.measured:.6g}", se]
            table.add_row(*(Text(cell) for cell in cells))
        tables.append(table)
    return tables

"""The page of a study: what its figures say, with what they rest on. Reads `study.json` alone.

Like every page it is one file, escapes what users wrote, and asks for nothing from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from keepshot.errors import ConfigError
from keepshot.report import cohort
from keepshot.report.answer import main_comparison, sentences
from keepshot.report.page import Figure, beside, draw, write_page
from keepshot.report.scatter import Mark, two_scores
from keepshot.report.styling import Look, Width
from keepshot.report.view import Measured
from keepshot.report.words import percent, score, score_interval, visible
from keepshot.study.document import RECORD, StudyArm, StudyDocument
from keepshot.study.evidence import Comparison, CorrelationFinding, Findings
from keepshot.study.tables import grouped, name_of

MOST_PARETO, MOST_NAMED = 12, 10
"""Figures of target score against retention; marks of one that carry their names."""


@dataclass(frozen=True)
class Group:
    """The arms of one model, target, ask, split and number of shots."""

    title: str
    arms: list[StudyArm]
    looks: dict[str, Look]
    figure: Figure | None


@dataclass(frozen=True)
class CorrelationTable:
    """Two settings: ranks, and beside them scores, for each choice of models and tasks."""

    title: str
    rows: list[tuple[CorrelationFinding, CorrelationFinding | None]]


def is_study(directory: Path) -> bool:
    """Say whether a directory holds a study's document."""
    return (directory / RECORD).exists()


def read_study(study_dir: Path) -> StudyDocument:
    """Return the document of a study's directory.

    Raises:
        ConfigError: if there is none, or it cannot be read.
    """
    path = study_dir / RECORD
    try:
        return StudyDocument.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{study_dir}: no {RECORD} lies here; run the study first") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: not a study's document: {error.errors()[0]['msg']}") from None


def write_study_report(study_dir: Path) -> Path:
    """Write `report.html` and `figures/*.svg` of a study's directory.

    Args:
        study_dir: holds `study.json`; `study.yaml` and `environment.json` are shown if they are
            there.

    Returns:
        The path of the page.

    Raises:
        ConfigError: if there is no `study.json`, or it cannot be read.
        OutputError: if the page cannot be written.
    """
    document = read_study(study_dir)
    shown, folder = beside(study_dir, "study.yaml"), study_dir / "figures"
    comparison = main_comparison(document.findings)
    return write_page(
        "study.html",
        study_dir,
        document=document,
        findings=document.findings,
        comparison=comparison,
        correlation_tables=correlation_tables(document.findings),
        sentences=sentences(document.findings),
        figures={one.name: one for one in _figures(document.findings, comparison, folder)},
        groups=_groups(document, folder),
        name_of=name_of,
        **shown,
    )


def correlation_tables(findings: Findings | None) -> list[CorrelationTable]:
    """Return the question and its controls, a row for each choice of models and tasks."""
    found: dict[str, CorrelationTable] = {}
    listed = [one for one in findings.correlations if one.role != "other"] if findings else []
    scores = {
        (one.first, one.second, one.models, one.tasks): one
        for one in listed
        if one.kind == "pearson"
    }
    for one in listed:
        if one.kind == "spearman":
            control = ", the control" if one.role == "control" else ""
            title = f"{one.second}, against {one.first}{control}"
            key = (one.first, one.second, one.models, one.tasks)
            found.setdefault(title, CorrelationTable(title, [])).rows.append((one, scores.get(key)))
    return list(found.values())


def _figures(
    findings: Findings | None, comparison: Comparison | None, folder: Path
) -> list[Figure]:
    if findings is None:
        return []
    widths: tuple[Width, Width] = ("wide", "narrow")
    charts: list[tuple[str, str, list[Any]]] = []
    if comparison is not None and len(comparison.points) > 1:
        charts += [
            ("models", "Tuned score against the base's few-shot score, every tuned model",
             [cohort.models_chart(comparison, width) for width in widths]),
            ("tasks", "Tuned score against the base's few-shot score, every task",
             [cohort.tasks_chart(comparison, width) for width in widths]),
            ("by-task", "Every tuned model against its base, task by task",
             [cohort.small_multiples(comparison, width) for width in widths]),
        ]  # fmt: skip
        same = [one for one in findings.comparisons if one.first == comparison.first]
        shares = [cohort.shares_chart(same, width) for width in widths]
        charts.append(("shares", "What explains the tuned score", shares))
    charts.append(
        ("matrix", "Correlation of all settings over models",
         [cohort.matrix_chart(findings, width) for width in widths])
    )  # fmt: skip
    return [draw(name, title, drawn, folder) for name, title, drawn in charts if drawn[0]]


# -- target score against few-shot ability kept ------------------------------------------------


def _groups(document: StudyDocument, folder: Path) -> list[Group]:
    """Return the arms by model, target, ask, split and shots, the first dozen with a figure."""
    found: list[Group] = []
    for title, arms in grouped(document.arms):
        names = [name_of(arm) for arm in arms]
        looks = cohort.looks_of(names)
        marks = _marks(arms, looks)
        drawn = sum(group.figure is not None for group in found)
        figure = None
        if len(marks) > 2 and drawn < MOST_PARETO:
            titles = ("Target score, 0 shots", f"Few-shot ability kept, {arms[0].shots} shots")
            widths: tuple[Width, Width] = ("wide", "narrow")
            charts = [two_scores(marks, {}, titles, True, width) for width in widths]
            words = f"Few-shot ability kept against target score: {title}"
            figure = draw(f"kept-{len(found) + 1}", visible(words, 160), charts, folder)
        found.append(Group(title, arms, looks, figure))
    return found


def _marks(arms: Sequence[StudyArm], looks: dict[str, Look]) -> list[Mark]:
    """Return a mark for each arm that has both figures; where there are many, few are named."""
    there: list[tuple[StudyArm, Measured, Measured]] = []
    for arm in arms:
        if arm.target_score is None or arm.retention is None:
            continue
        x, y = arm.target_score, arm.retention
        across, up = (x, arm.target_ci95 or (x, x)), (y, arm.retention_ci95 or (y, y))
        there.append((arm, across, up))
    points = [(across[0], up[0]) for _, across, up in there]
    marks: list[Mark] = []
    for (arm, across, up), (x, y) in zip(there, points, strict=True):
        name = visible(name_of(arm), 40)
        best = not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)
        named = len(there) <= MOST_NAMED or arm.recipe is None or best
        hover = (
            f"{name}: target {score(across[0])} {score_interval(across[1])}, kept {percent(up[0])}"
        )
        marks.append(Mark(name if named else "", looks[name_of(arm)], across, up, hover))
    return marks

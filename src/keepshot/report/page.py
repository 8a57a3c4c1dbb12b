"""The page of a run directory, and the page that compares several. Reads records, writes HTML.

Everything a model or a user wrote is escaped (jinja2's autoescape), and the page's own policy
forbids scripts and anything from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from keepshot.errors import ConfigError
from keepshot.records import ResultDocument, read_items, write_text
from keepshot.report import along, figures, finding, flips, following, restored, svg, view, words

ANSWER_LIMIT, QUESTION_LIMIT = 160, 320


@dataclass(frozen=True)
class Figure:
    """One figure in two widths, as it stands in the page."""

    name: str
    title: str
    wide: Markup
    narrow: Markup


def write_report(run_dir: Path) -> Path:
    """Write `report.html` and `figures/*.svg` from the records of a run directory.

    Args:
        run_dir: holds `results.json`; `items.parquet`, `spec.yaml` and `environment.json` are
            shown where they are there.

    Returns:
        The path of the page.

    Raises:
        ConfigError: if there is no `results.json`, or a file cannot be read.
        OutputError: if the page cannot be written.
    """
    document = ResultDocument.read(run_dir)
    items_path = run_dir / "items.parquet"
    items = read_items(items_path) if items_path.exists() else []
    shown = beside(run_dir)
    drawn = [
        draw(name, title, charts, run_dir / "figures")
        for name, title, charts in _charts(document)
        if charts[0] is not None
    ]
    formats = view.format_means(document)
    return write_page(
        "page.html",
        run_dir,
        document=document,
        subject=next((row.model for row in document.summary), None),
        kind=view.kind(document),
        sentences=finding.headline_sentences(document),
        arms=view.arms(document),
        names=words.short_names([arm.name for arm in view.arms(document)]),
        looks=figures.looks([arm.name for arm in view.arms(document)]),
        shots=sorted({row.shots for row in document.summary}),
        most_shots=view.most_shots(document),
        figures={figure.name: figure for figure in drawn},
        formats=formats,
        leaks=view.kind(document) != "measure" or any(part[1] for part in formats.values()),
        has_target=any(row.target is not None for row in document.summary),
        tasks=_task_table(document),
        changes=view.changes(document, items) if items else None,
        flips=flips.flips(items),
        path=sorted(document.path, key=lambda point: (point.split, point.lam)),
        num_draws=max((row.num_draws for row in view.task_scores(document)), default=0),
        best=_best_on_path(document),
        **shown,
    )


def beside(out_dir: Path, spec_file: str = "spec.yaml") -> dict[str, Any]:
    """Return what lies beside a page and is shown on it: `spec` as text, `environment` as pairs.

    Raises:
        ConfigError: if `environment.json` cannot be read.
    """
    spec = out_dir / spec_file
    return {
        "spec": spec.read_text(encoding="utf-8") if spec.exists() else None,
        "environment": flat(_read_json(out_dir / "environment.json")),
    }


def write_page(template: str, out_dir: Path, **content: Any) -> Path:
    """Write a template with its content to `out_dir/report.html`, and return that path.

    Raises:
        OutputError: if the page cannot be written.
    """
    path = out_dir / "report.html"
    write_text(page_environment().get_template(template).render(**content), path)
    return path


def compare(run_dirs: Sequence[Path], out_dir: Path) -> Path:
    """Write one page on several run directories: a combined table, and all arms in one figure.

    Returns:
        The path of the page, `out_dir/report.html`.

    Raises:
        ConfigError: if a directory holds no finished run.
        OutputError: if the page cannot be written.
    """
    documents = {
        name: ResultDocument.read(path)
        for name, path in zip(_run_names(run_dirs), run_dirs, strict=True)
    }
    title = "Few-shot ability kept against target score, every arm of every run"
    charts = tuple(figures.runs_chart(documents, width) for width in ("wide", "narrow"))
    figure = None
    if charts[0] is not None:
        figure = draw("compare", title, charts, out_dir / "figures")
    title = "Few-shot score along lambda, as a change against lambda 1"
    charts = tuple(along.relative_chart(documents, width) for width in ("wide", "narrow"))
    paths = None
    if charts[0] is not None:
        paths = draw("relative", title, charts, out_dir / "figures")
    measured_on = {
        name: (view.most_shots(document), frozenset(s.task for s in document.scores))
        for name, document in documents.items()
    }
    return write_page(
        "compare.html",
        out_dir,
        runs={name: (document, view.arms(document)) for name, document in documents.items()},
        colors=figures.run_colors(list(documents)),
        figure=figure,
        paths=paths,
        alike=len(set(measured_on.values())) == 1,
    )


def _run_names(run_dirs: Sequence[Path]) -> list[str]:
    resolved = [path.resolve() for path in run_dirs]
    names = [path.name for path in resolved]
    return names if len(set(names)) == len(names) else [str(path) for path in run_dirs]


def _charts(document: ResultDocument) -> list[tuple[str, str, tuple[Any, Any]]]:
    shots = view.most_shots(document)
    return [
        (
            "trajectory",
            f"Few-shot ability at {shots} shots against target score, for every arm"
            + (" and along lambda" if document.path else ""),
            (
                figures.trajectory_chart(document, "wide"),
                figures.trajectory_chart(document, "narrow"),
            ),
        ),
        (
            "tasks",
            f"Score of every task at {shots} shots, for every arm",
            (figures.tasks_chart(document, "wide"), figures.tasks_chart(document, "narrow")),
        ),
        (
            "tasks-along",
            f"Score of every task at {shots} shots along lambda",
            (
                along.tasks_along_chart(document, "wide"),
                along.tasks_along_chart(document, "narrow"),
            ),
        ),
        (
            "following",
            "Few-shot score against instructions followed, along lambda",
            (
                following.following_chart(document, "wide"),
                following.following_chart(document, "narrow"),
            ),
        ),
        (
            "conduct",
            "Wrong formats, labels of the target, answer length and recall along lambda",
            (along.conduct_chart(document, "wide"), along.conduct_chart(document, "narrow")),
        ),
        (
            "restored",
            "Few-shot and target score with one part of the tuned model put back to the base's",
            (
                restored.restored_chart(document, "wide"),
                restored.restored_chart(document, "narrow"),
            ),
        ),
        (
            "training",
            "Losses over training steps, for every arm that was tuned",
            (figures.training_chart(document, "wide"), figures.training_chart(document, "narrow")),
        ),
    ]


def draw(name: str, title: str, charts: Sequence[Any], folder: Path) -> Figure:
    """Write a chart's wide and narrow SVG to `folder` and return them as they stand in a page."""
    wide, narrow = (svg.render(chart, title) for chart in charts)
    write_text(wide, folder / f"{name}.svg")
    write_text(narrow, folder / f"{name}-narrow.svg")
    return Figure(
        name=name,
        title=title,
        wide=svg.inline(wide, f"{name}-wide", "wide"),
        narrow=svg.inline(narrow, f"{name}-narrow", "narrow"),
    )


def _task_table(document: ResultDocument) -> dict[str, dict[str, view.TaskScore]]:
    table: dict[str, dict[str, view.TaskScore]] = {}
    for row in view.task_scores(document):
        table.setdefault(row.task, {})[row.arm] = row
    return table


def _best_on_path(document: ResultDocument) -> tuple[float, float] | None:
    """Return (lambda, retention) of the largest retention on the path above lambda 0."""
    kept = [
        (point.retention, point.lam)
        for point in view.path_split(document)
        if point.lam > 0 and point.retention is not None
    ]
    return (max(kept)[1], max(kept)[0]) if kept else None


def _read_json(path: Path) -> Any:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}; delete it to do without") from None


def flat(content: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Turn nested mappings into (dotted key, value) pairs."""
    if not isinstance(content, dict):
        text = ", ".join(map(str, content)) if isinstance(content, list) else str(content)
        return [(prefix, text)]
    return [
        pair
        for key, value in content.items()
        for pair in flat(value, f"{prefix}.{key}" if prefix else str(key))
    ]


def page_environment() -> jinja2.Environment:
    """Return the templates with their filters, escaping on."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "score": words.score,
        "score_interval": words.score_interval,
        "percent": words.percent,
        "percent_interval": words.percent_interval,
        "lam": words.lam,
        "rate": words.rate,
        "visible": words.visible,
        "plain": lambda text: words.visible(str(text), keep="\n"),
        "answer": lambda text: words.visible(text, ANSWER_LIMIT),
        "question": lambda text: words.visible(text, QUESTION_LIMIT),
        "headline": finding.headline,
        "method": words.method,
        "name_of": words.name_of,
        "unbroken": _unbroken,
    }
    environment.filters.update(filters)
    return environment


def _unbroken(text: str) -> str:
    """Keep a percentage and an interval from being torn at the end of a line."""
    return text.replace(" %", "\u00a0%").replace("% [", "%\u00a0[")

"""A study's results as text: one table for each model and target, and what failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from keepshot.records import InstructionScore
from keepshot.study.document import StudyArm, StudyDocument

FIGURES = ("target", "few-shot", "retention")
FOLLOWED = ("arm", "prompts, strict", "single instructions, strict", "answers cut", "of")
COLUMNS = ("arm", *FIGURES, "format failures", "leakage", "seconds of tuning")


def markdown(document: StudyDocument) -> str:
    """Return the report of a study."""
    lines = [f"# {document.name}", ""]
    if document.question:
        lines += [document.question.strip(), ""]
    lines += [_state(document), ""]
    for title, arms in grouped(document.arms):
        lines += [f"## {title}", "", _size(arms), ""]
        lines += [_row(COLUMNS), _row(["---"] * len(COLUMNS))]
        lines += [_row(cells(arm)) for arm in arms]
        lines.append("")
    if document.instructions:
        lines += ["## Instructions followed", ""]
        lines += [_row(FOLLOWED), _row(["---"] * len(FOLLOWED))]
        lines += [_row(_followed(score)) for score in document.instructions]
        lines.append("")
    if document.failures:
        lines += ["## What failed", ""]
        lines += [f"- {one['label']}: {_flat(one['reason'])}" for one in document.failures]
        lines.append("")
    lines += [f"- {note}" for note in document.notes]
    lines += [
        "Target scores are at 0 shots. Intervals are 95 %: of the target over items (Wilson), of "
        "the others over items, draws of demonstrations and seeds of tuning. Retention is few-shot "
        "score above chance as a share of the base's.",
    ]
    return "\n".join(lines) + "\n"


def grouped(arms: Sequence[StudyArm]) -> Iterator[tuple[str, list[StudyArm]]]:
    """Yield a title and its arms for each model, target, ask, split and number of shots."""
    groups: dict[str, list[StudyArm]] = {}
    for arm in arms:
        tuned = f" tuned for {arm.target}" if arm.target else ""
        title = f"{arm.model}{tuned}: {arm.ask}, {arm.shots} shots, {arm.split} items"
        groups.setdefault(title, []).append(arm)
    # A base alone, where nothing of it is tuned for that target, says nothing.
    for title, found in groups.items():
        if len(found) > 1 or not found[0].target:
            yield title, found


def cells(arm: StudyArm) -> list[str]:
    """Return an arm's figures as text, in the order of `COLUMNS`."""
    seeds = f" ({arm.num_seeds} seeds)" if arm.num_seeds > 1 else ""
    return [
        f"{name_of(arm)}{seeds}",
        *figures(arm),
        f"{arm.format_failure:.3f}",
        f"{arm.label_leakage:.3f}",
        "" if arm.tuning_seconds is None else f"{arm.tuning_seconds:.0f}",
    ]


def name_of(arm: StudyArm) -> str:
    """Return the name of an arm among those of its model and target."""
    at = "" if arm.lam is None else f", lambda {arm.lam:g}"
    return f"{arm.recipe or 'untuned'}{at}"


def figures(arm: StudyArm) -> list[str]:
    """Return target score, few-shot score and retention with their intervals, as `FIGURES`."""
    return [
        _figure(arm.target_score, arm.target_ci95),
        _figure(arm.icl, arm.icl_ci95),
        _figure(arm.retention, arm.retention_ci95),
    ]


def _followed(score: InstructionScore) -> list[str]:
    at = "" if score.lam is None else f", lambda {score.lam:g}"
    return [
        f"{score.arm}{at}",
        _figure(score.prompt_strict, score.prompt_strict_ci95),
        _figure(score.instruction_strict, score.instruction_strict_ci95),
        f"{score.truncated:.0%}",
        f"{score.num_prompts} ({score.prompt_set}, {score.split}, {score.variant}, {score.style})",
    ]


def _size(arms: Sequence[StudyArm]) -> str:
    return f"{arms[0].num_tasks} tasks, {arms[0].num_items} items."


def _state(document: StudyDocument) -> str:
    left = document.total - document.done - document.failed
    words = f"{document.done} of {document.total} units done, {document.failed} failed"
    return f"{words}, {left} left." if left else f"{words}."


def _figure(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    bounds = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{value:.2f}{bounds}"


def _row(parts: Sequence[str]) -> str:
    return f"| {' | '.join(part.replace('|', '/') for part in parts)} |"


def _flat(text: str) -> str:
    return " ".join(text.split())

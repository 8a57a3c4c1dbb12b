"""A study's results as text: one table for each model and target, and what failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from keepshot.records import InstructionScore
from keepshot.study.document import StudyArm, StudyDocument
from keepshot.study.evidence import CorrelationFinding, Findings

FIGURES = ("target", "few-shot", "retention")
FOLLOWED = ("arm", "prompts, strict", "single instructions, strict", "answers cut", "of")
CORRELATIONS = (
    "settings", "models", "tasks", "kind", "correlation", "given size", "without noise",
    "p adjusted", "n (families)",
)  # fmt: skip
CORRELATION_NOTE = (
    "Means over tasks; intervals by families (Student's t). p adjusted by Benjamini and Hochberg "
    "over all correlations of one kind, the matrix's included. `report.html` says how to read the "
    "rest."
)
COLUMNS = (
    "arm",
    *FIGURES,
    "format failures",
    "leakage",
    "KL to base, few-shot",
    "KL to base, target",
    "seconds of tuning",
)


def markdown(document: StudyDocument) -> str:
    """Return the report of a study."""
    lines = [f"# {document.name}", ""]
    if document.question:
        lines += [document.question.strip(), ""]
    lines += [_state(document), ""]
    if document.findings is not None:
        lines += list(_found(document.findings))
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
        "Target scores are at 0 shots. Intervals are 95 %: of the target over items (Wilson; over "
        "items and seeds where there are several), of the others over items, draws of "
        "demonstrations and seeds of tuning. Retention is few-shot score above chance as a share "
        "of the base's. KL to base is KL(base || tuned) in nats a token of an answer, on few-shot "
        "prompts of suite `guard` and on the target's validation items, with intervals over them.",
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
        _figure(arm.few_shot_divergence, arm.few_shot_divergence_ci95),
        _figure(arm.target_divergence, arm.target_divergence_ci95),
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


def _found(findings: Findings) -> Iterator[str]:
    """Yield what the analysis says: the question with its controls, and refusals."""
    asked = [one for one in findings.correlations if one.role != "other"]
    if asked:
        yield from ("## Correlations over models", "")
        yield from (_row(CORRELATIONS), _row(["---"] * len(CORRELATIONS)))
        yield from (_row(_correlation(one)) for one in asked)
        yield from ("", CORRELATION_NOTE, "")
    for one in findings.comparisons:
        title = f"{one.second} against {one.first}, {one.models} models"
        if one.shares:
            shares = "; ".join(f"{s.cause} {_figure(s.value, s.ci95)}" for s in one.shares)
            yield f"- {title}: share of the variance between models: {shares}."
        for each in one.within:
            mean = _figure(each.mean.value, each.mean.ci95)
            yield (
                f"- {title}: over {each.num_tasks} tasks, mean of the {each.kind} correlations of "
                f"{each.num_models} models {mean}."
            )
        if one.mixed is not None:
            slope = _figure(one.mixed.slope.value, one.mixed.slope.ci95)
            ends = "" if one.mixed.converged else " (the fit did not fully converge)"
            yield f"- {title}: slope of the mixed model {slope}{ends}."
        if one.bound is not None:
            parts = (one.bound.beyond, one.bound.control, one.bound.excess)
            beyond, control, excess = (
                f"{100 * p.value:.1f} [{100 * p.ci95[0]:.1f}, {100 * p.ci95[1]:.1f}] %"
                for p in parts
            )
            yield (
                f"- {title}: items solved that the base solves under none of {one.bound.num_draws} "
                f"draws: {beyond}; by a further draw of the base: {control}; difference {excess}."
            )
    yield from (f"- {note}" for note in findings.notes)
    yield ""


def _correlation(one: CorrelationFinding) -> list[str]:
    tasks = str(one.num_tasks) + ("" if one.tasks == "all" else f" {one.tasks}")
    given, clean = (
        "" if part is None else _figure(part.value, part.ci95)
        for part in (one.given_size, one.without_noise)
    )
    return [
        f"{one.second} / {one.first}" + (" (control)" if one.role == "control" else ""),
        one.models, tasks, one.kind, _figure(one.value, one.ci95), given, clean,
        f"{one.p_adjusted:.2g}", f"{one.num_points} ({one.num_clusters})",
    ]  # fmt: skip


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

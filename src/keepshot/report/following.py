"""The trajectory between two abilities: few-shot learning against following instructions. Pure."""

from __future__ import annotations

import altair as alt

from keepshot.records import InstructionScore, PathPoint, ResultDocument
from keepshot.report.scatter import Mark, two_scores
from keepshot.report.styling import FAINT, Width
from keepshot.report.words import lam, score, score_interval


def following_chart(document: ResultDocument, width: Width = "wide") -> alt.LayerChart | None:
    """Draw the few-shot score along lambda against instructions followed (prompts, strict).

    Rings are the Pareto set in these two scores, a star the lambda picked.

    Returns:
        None if instructions were not put to at least two points of the path.
    """
    followed = _on_path(document)
    pairs = [
        (point, followed[point.lam, point.split])
        for point in sorted(document.path, key=lambda point: point.lam)
        if (point.lam, point.split) in followed
    ]
    if len(pairs) < 2:
        return None
    best = _pareto([(row.prompt_strict, point.icl) for point, row in pairs])
    marks = [
        _mark(point, row, document, beaten=not kept)
        for (point, row), kept in zip(pairs, best, strict=True)
    ]
    titles = (f"Instructions followed, {pairs[0][1].prompt_set}", "Few-shot score")
    return two_scores([], {pairs[0][0].split: marks}, titles, False, width)


def _on_path(document: ResultDocument) -> dict[tuple[float, str], InstructionScore]:
    """Return the score at every point; of several sets or styles, those of the first."""
    rows = [row for row in document.instructions if row.arm == "path" and row.lam is not None]
    kinds = [(row.prompt_set, row.variant, row.style) for row in rows]
    return {
        (row.lam, row.split): row
        for row, kind in zip(rows, kinds, strict=True)
        if kind == kinds[0] and row.lam is not None
    }


def _pareto(scores: list[tuple[float, float]]) -> list[bool]:
    """Tell of each pair whether no other is at least as good in both and better in one."""
    return [
        not any(other[0] >= own[0] and other[1] >= own[1] and other != own for other in scores)
        for own in scores
    ]


def _mark(
    point: PathPoint, row: InstructionScore, document: ResultDocument, *, beaten: bool
) -> Mark:
    picked = document.pick is not None and document.pick.lam == point.lam
    return Mark(
        label=f"\u03bb {lam(point.lam).removeprefix('0') or '0'}",
        look=(FAINT, "circle"),
        across=(row.prompt_strict, row.prompt_strict_ci95),
        up=(point.icl, point.icl_ci95),
        hover=(
            f"lambda {lam(point.lam)}, {point.split} items: few-shot {score(point.icl)} "
            f"{score_interval(point.icl_ci95)}, instructions {score(row.prompt_strict)} "
            f"{score_interval(row.prompt_strict_ci95)} of {row.num_prompts} prompts"
        ),
        role="pick" if picked else "" if beaten else "pareto",
    )

"""What a path shows beside few-shot and target scores: instructions and recall. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from keepshot.judging.follow import instruction_scores
from keepshot.records import InstructionRow, ItemResult, PathPoint
from keepshot.scoring.summary import BOOTSTRAP_SEED, path_points
from keepshot.stats import Matrix, resampled_means
from keepshot.tasks.task import Task


def with_recall(
    points: Sequence[PathPoint],
    rows: Mapping[float, Sequence[ItemResult]],
    tasks: Sequence[Task],
) -> list[PathPoint]:
    """Add the few-shot score over tasks of domain "knowledge", if there are any."""
    names = {task.name for task in tasks if task.domain == "knowledge"}
    known = {lam: [row for row in own if row.task in names] for lam, own in rows.items()}
    if not known[0.0]:
        return list(points)
    found = path_points(known, known[0.0], target=None, split="validation")
    recall = {point.lam: {"recall": point.icl, "recall_ci95": point.icl_ci95} for point in found}
    return [point.model_copy(update=recall[point.lam]) for point in points]


def with_following(points: Sequence[PathPoint], rows: Sequence[InstructionRow]) -> list[PathPoint]:
    """Add the share of prompts whose instructions are all followed, if any were put."""
    scores = {score.lam: score for score in instruction_scores(_of_path(rows))}
    if not all(point.lam in scores for point in points):
        return list(points)
    return [
        point.model_copy(
            update={
                "following": scores[point.lam].prompt_strict,
                "following_ci95": scores[point.lam].prompt_strict_ci95,
            }
        )
        for point in points
    ]


def resample_following(rows: Sequence[InstructionRow], lams: Sequence[float]) -> Matrix | None:
    """Return that share under resampled prompts, the same at every lambda: [resamples, lambdas]."""
    found: dict[float | None, dict[str, float]] = {}
    for row in _of_path(rows):
        found.setdefault(row.lam, {})[row.key] = float(all(row.strict))
    if not all(lam in found for lam in lams):
        return None
    keys = list(found[lams[0]])
    matrices = [np.array([[found[lam][key] for key in keys]]) for lam in lams]
    return np.stack(resampled_means(matrices, np.random.default_rng(BOOTSTRAP_SEED)), axis=1)


def _of_path(rows: Sequence[InstructionRow]) -> list[InstructionRow]:
    """Return the rows of the path; of several sets or variants, those of the first."""
    own = [row for row in rows if row.arm == "path"]
    return [
        row for row in own if (row.prompt_set, row.variant) == (own[0].prompt_set, own[0].variant)
    ]

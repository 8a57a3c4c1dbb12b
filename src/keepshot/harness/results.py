"""Results in the form that lm-evaluation-harness writes, for tools that read its files."""

from __future__ import annotations

import json
from collections import defaultdict
from math import sqrt
from pathlib import Path

from keepshot.records import ResultDocument, Score, write_text

NAMES = {"accuracy": "acc", "exact_match": "exact_match"}
"""Our metrics -> lm-eval's."""


def write_results(document: ResultDocument, folder: Path) -> list[Path]:
    """Write `MODEL/results_SHOTS-shot_seed-SEED.json` for each model, number of shots and draw.

    lm-eval has one number of shots and one draw in a file.

    Raises:
        OutputError: if the folder cannot be written.
    """
    groups: dict[tuple[str, int, int], list[Score]] = defaultdict(list)
    for score in document.scores:
        groups[score.model, score.shots, score.seed].append(score)
    paths: list[Path] = []
    for (model, shots, seed), scores in groups.items():
        content = results(document, scores)
        path = folder / model.replace("/", "__") / f"results_{shots}-shot_seed-{seed}.json"
        write_text(json.dumps(content, indent=2, ensure_ascii=False), path)
        paths.append(path)
    return paths


def results(document: ResultDocument, scores: list[Score]) -> dict[str, object]:
    """Return one of lm-eval's result files: `scores` of one model, number of shots and draw."""
    model = next(record for record in document.models if record.reference == scores[0].model)
    return {
        "results": {score.task: _row(score) for score in scores},
        "group_subtasks": {score.task: [] for score in scores},
        "configs": {
            score.task: {"task": score.task, "num_fewshot": score.shots} for score in scores
        },
        "versions": {score.task: score.task_version for score in scores},
        "n-shot": {score.task: score.shots for score in scores},
        "higher_is_better": {score.task: {NAMES[score.metric]: True} for score in scores},
        "n-samples": {
            score.task: {"original": score.num_items, "effective": score.num_items}
            for score in scores
        },
        "config": {
            "model": "keepshot",
            "model_args": {"pretrained": model.reference, "dtype": model.dtype},
            "model_num_parameters": model.num_parameters,
            "model_sha": model.sha256,
            "fewshot_seed": scores[0].seed,
        },
        "model_source": "keepshot",
        "model_name": model.reference,
        "model_name_sanitized": model.reference.replace("/", "__"),
        "total_evaluation_time_seconds": str(document.cost.seconds),
    }


def _row(score: Score) -> dict[str, object]:
    name = NAMES[score.metric]
    spread = score.value * (1 - score.value)
    # lm-eval's error of a mean divides by n - 1.
    error = sqrt(spread / (score.num_items - 1)) if score.num_items > 1 else "N/A"
    return {"alias": score.task, f"{name},none": score.value, f"{name}_stderr,none": error}

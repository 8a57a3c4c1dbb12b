"""Rows in, scores and summary out: values worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from keepshot.records import ItemResult
from keepshot.scoring.summary import path_points, scores, summarise


def row(arm: str, task: str, item: int, correct: float, **changes: object) -> ItemResult:
    content: dict[str, object] = {
        "arm": arm, "model": arm, "lam": None, "task": task, "split": "test", "shots": 4,
        "seed": 0, "item": str(item), "question": "q", "gold": "g", "answer": "a", "choices": [],
        "log_likelihoods": [], "correct": correct, "correct_per_character": None,
        "format_failure": 0.0, "label_leakage": 0.0,
    }  # fmt: skip
    return ItemResult(**{**content, **changes})  # type: ignore[arg-type]


def arm(name: str, correct: int, target: int) -> list[ItemResult]:
    """Twenty items of a word task, of which `correct` are right; ten of the target."""
    words = [row(name, "words", i, float(i < correct)) for i in range(20)]
    asked = [
        row(name, "target", i, float(i < target), shots=0, choices=["x", "y"]) for i in range(10)
    ]
    return words + asked


def test_retention_is_against_the_first_arm_and_the_target_is_left_out() -> None:
    rows = summarise(arm("before", 16, 5) + arm("plain", 4, 9), target="target")
    assert [(r.arm, r.shots, r.icl, r.target) for r in rows] == [
        ("before", 4, 0.8, 0.5),
        ("plain", 4, 0.2, 0.9),
    ]
    assert rows[0].retention == pytest.approx(1.0)
    assert rows[1].retention == pytest.approx(0.25)
    assert rows[1].num_items == 20
    low, high = rows[1].retention_ci95 or (0, 0)
    assert 0.0 <= low < 0.25 < high < 0.6


def test_changed_counts_answers_that_are_not_the_first_arm_s_right_or_wrong() -> None:
    before = arm("before", 10, 5)
    after = [
        row(
            "plain", item.task, int(item.item), item.correct, shots=item.shots, choices=item.choices
        )
        for item in before
    ]
    moved = [
        replace(item, answer="b") if item.task == "words" and int(item.item) < 5 else item
        for item in after
    ]
    rows = summarise(before + moved, target="target")
    assert [(r.changed, r.retention) for r in rows] == [(0.0, 1.0), (0.25, 1.0)]
    low, high = rows[1].changed_ci95 or (0, 0)
    assert 0.02 < low < 0.25 < high < 0.5


def test_icl_gain_is_against_zero_shots() -> None:
    items = arm("before", 16, 5) + [row("before", "words", i, 0.0, shots=0) for i in range(20)]
    rows = summarise(items, target="target")
    assert [(r.shots, r.icl_gain) for r in rows] == [(0, 0.0), (4, 0.8)]
    assert rows[0].retention is None  # nothing above chance to keep at zero shots


def test_scores_have_one_row_per_task_shots_and_draw() -> None:
    items = arm("before", 16, 5) + [row("before", "words", i, 1.0, seed=1) for i in range(20)]
    found = scores(items, {"words": 3, "target": 1})
    assert [(s.task, s.seed, s.value, s.metric, s.chance, s.task_version) for s in found] == [
        ("words", 0, 0.8, "exact_match", 0.0, 3),
        ("target", 0, 0.5, "accuracy", 0.5, 1),
        ("words", 1, 1.0, "exact_match", 0.0, 3),
    ]


def test_repeated_questions_count_in_the_summary_as_in_the_scores() -> None:
    """Of one question and answer the last row alone counted: icl .25 beside a score of .6."""
    right = [0.0, 1.0, 1.0, 1.0, 0.0]
    before = [row("before", "words", 0, correct, answer="a") for correct in right]
    before += [row("before", "words", item, 0.0) for item in (1, 2, 3)]
    after = [replace(item, arm="plain", model="plain") for item in before]
    after[1] = replace(after[1], correct=0.0, answer="b")
    (whole, tuned), found = summarise(before + after), scores(before, {"words": 1})
    assert whole.icl == found[0].value == pytest.approx(3 / 8)
    assert whole.num_items == found[0].num_items == 8
    assert tuned.icl == pytest.approx(2 / 8)
    assert tuned.changed == pytest.approx(1 / 8)


def test_unpaired_arms_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="same tasks, draws and items"):
        summarise(arm("before", 16, 5) + arm("plain", 4, 9)[:19], target="target")


def test_path_points_come_sorted_by_lambda() -> None:
    reference = arm("path", 16, 5)
    points = path_points(
        {1.0: arm("path", 4, 9), 0.0: reference}, reference, target="target", split="validation"
    )
    assert [(p.lam, p.icl, p.target) for p in points] == [(0.0, 0.8, 0.5), (1.0, 0.2, 0.9)]
    assert points[1].retention == pytest.approx(0.25)

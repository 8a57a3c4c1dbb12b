"""What the theory's job reads of real models: the arms of a finished run, or of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keepshot.errors import ConfigError
from keepshot.jobs.theory import real_arms
from keepshot.records import Cost, ResultDocument, SummaryRow
from keepshot.study.document import StudyArm, StudyDocument


def summary(arm: str, retention: float, target: float | None) -> SummaryRow:
    return SummaryRow(
        arm=arm, model="m", shots=4, icl=0.5, icl_ci95=(0.4, 0.6), icl_gain=0.3,
        retention=retention, retention_ci95=(retention - 0.098, retention + 0.098),
        target=target, target_ci95=(0.0, 1.0), num_items=40,
    )  # fmt: skip


def test_arms_of_a_run(tmp_path: Path) -> None:
    rows = [summary("before", 1.0, 0.2), summary("plain", 0.3, 0.9), summary("other", 0.5, None)]
    document = ResultDocument(models=[], scores=[], summary=rows, cost=Cost())
    (tmp_path / "results.json").write_text(document.to_json(), encoding="utf-8")
    (arm,) = real_arms(tmp_path)
    assert (arm.group, arm.name) == ("real models", "plain")
    assert (arm.gained, arm.lost, arm.se) == pytest.approx((0.875, 0.7, 0.05))
    assert arm.gained_se == pytest.approx(1.0 / 3.92 / 0.8)  # target_ci95 is (0, 1), before .2
    assert arm.num_items == 40


def study_arm(recipe: str | None, target: str, score: float, retention: float) -> StudyArm:
    content: dict[str, Any] = {
        "model": "m", "target": target, "recipe": recipe, "lam": None, "ask": "few-shot",
        "split": "test", "shots": 4, "icl": 0.5, "icl_ci95": (0.4, 0.6), "retention": retention,
        "retention_ci95": (retention - 0.098, retention + 0.098), "target_score": score,
        "target_ci95": (0.0, 1.0), "format_failure": 0.0, "label_leakage": 0.0, "num_tasks": 3,
        "num_items": 30, "num_seeds": 1, "tuning_seconds": None,
    }  # fmt: skip
    return StudyArm.model_validate(content)


def test_arms_of_a_study_stand_beside_their_own_base(tmp_path: Path) -> None:
    arms = [
        study_arm(None, "a", 0.2, 1.0), study_arm("full learning_rate=0.1", "a", 0.6, 0.3),
        study_arm(None, "b", 0.5, 1.0), study_arm("full", "b", 0.9, 0.8),
    ]  # fmt: skip
    document = StudyDocument(
        name="s", question="", total=4, done=4, failed=0, arms=arms, failures=[]
    )
    (tmp_path / "study.json").write_text(document.to_json(), encoding="utf-8")
    first, second = real_arms(tmp_path)
    assert (first.name, first.family) == ("full learning_rate=0.1", "full")
    assert (first.gained, first.lost) == (pytest.approx(0.5), 0.7)
    assert (second.gained, second.lost) == pytest.approx((0.8, 0.2))
    assert first.group != second.group


@pytest.mark.parametrize("content", ['{"x": 1}', "{torn"])
def test_a_study_that_cannot_be_read_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "study.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"study\.json: not a study's document"):
        real_arms(tmp_path)


def test_a_directory_without_arms_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no results\.json"):
        real_arms(tmp_path)
    document = ResultDocument(
        models=[], scores=[], summary=[summary("before", 1.0, 0.2)], cost=Cost()
    )
    (tmp_path / "results.json").write_text(document.to_json(), encoding="utf-8")
    with pytest.raises(ConfigError, match="no arm with a target score and a retention"):
        real_arms(tmp_path)

"""What a study's records say of its cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keepshot.assets import AssetStore
from keepshot.jobs.study import Running
from keepshot.jobs.study_apart import Unwatched
from keepshot.jobs.study_plan import StudyPlan, Work, plan_study
from keepshot.jobs.study_trials import Amount, Pace, Rates
from keepshot.models.loading import LanguageModel, save
from keepshot.study.costs import Recorded, overhead_of, recorded
from keepshot.study.directory import UnitRecord
from keepshot.study.spec import StudySpec


def record(unit: str, by: str = "host 1", **changes: object) -> UnitRecord:
    content = {"unit": unit, "kind": "measure", "label": unit, "status": "done", "by": by}
    return UnitRecord.model_validate({**content, **changes})


@pytest.mark.parametrize(
    "recipe",
    [
        {"batch_size": 8, "accumulate": 4},
        # At such a rate the prompt's stage would break, if it were run.
        {"method": {"name": "promot", "tokens": 2, "prompt_learning_rate": 1e38}},
    ],
    ids=["parts", "promot"],
)
def test_a_trial_takes_the_steps_that_a_study_does(
    recipe: dict[str, Any], fresh_pico: Callable[..., LanguageModel], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, store: AssetStore,
) -> None:  # fmt: skip
    """Single rows were to be divided into parts, and of ProMoT the prompt's steps were timed."""
    monkeypatch.chdir(tmp_path)
    save(fresh_pico("llama"), tmp_path / "base")
    content = {
        "models": ["base"], "targets": ["support"], "recipes": {"one": {"steps": 5, **recipe}},
        "asks": {"a": {"tasks": ["addition"], "limit": 2}},
    }  # fmt: skip
    spec = StudySpec.from_mapping(content, source="study.yaml")
    plan = plan_study(spec, store, tmp_path / "runs", Unwatched(), Running())
    [tuned] = [work for work in plan.work if work.kind == "tune"]
    assert tuned.source == "calibrated"
    assert tuned.seconds is not None
    assert tuned.seconds > 0.0


def test_overhead_is_what_is_neither_loading_nor_work_and_idle_time_between_units() -> None:
    records = [
        record("a", seconds=10.0, loading_seconds=1.0, work_seconds=8.5, ended=110.0),
        record("b", seconds=20.0, work_seconds=19.9, ended=131.4),  # began at 111.4
        record("c", "host 2", seconds=70.0, work_seconds=70.0, ended=500.0),
        record("d", "host 2", seconds=0.0, status="failed", ended=900.0),
        record("e", "host 3", seconds=100.0, work_seconds=100.0),  # of before ends were written
    ]
    found = overhead_of(records)
    assert found is not None
    assert found.units == 4
    assert found.seconds == pytest.approx(200.0)
    assert found.beside_seconds == pytest.approx(0.6)
    assert found.idle_seconds == pytest.approx(1.4)
    assert found.share == pytest.approx(2.0 / 201.4)
    assert found.words.startswith("overhead 1.0 % (")
    assert "0.7 % idle" in found.words
    assert overhead_of([]) is None
    assert overhead_of([record("d", status="failed", seconds=3.0)]) is None


def test_means_of_what_is_recorded() -> None:
    one = record("a", tokens=100, seconds=2.0, processor_seconds=1.0, peak_bytes=5)
    two = record("b", tokens=300, seconds=4.0, processor_seconds=2.0, peak_bytes=9)
    assert recorded([one, two]) == Recorded(2, 200.0, 3.0, 1.5, 9)
    early = record("c", tokens=200, seconds=3.0)
    found = recorded([one, two, early])
    assert found is not None
    assert found.processor_seconds is None
    assert recorded([record("d", status="failed")]) is None


def test_steps_are_told_apart_from_tokens() -> None:
    rates = Rates(token=Pace(0.01, 0.02), step=Pace(1.0, 1.5))
    assert rates.of(Amount(1000, 10)) == Pace(20.0, 35.0)
    assert rates.of(Amount(1000)) == Pace(10.0, 20.0)


def test_the_plan_stands_beside_what_is_recorded() -> None:
    def work(kind: str, tokens: int, calibrated: Pace | None, found: Recorded | None) -> Work:
        return Work("x", "m", 3, 2, tokens, 1.0, "recorded", kind, calibrated, found)

    plan = StudyPlan(
        work=[
            work("tune", 110, Pace(9.0, 3.0), Recorded(1, 100.0, 2.0, 2.0, 4_200_000_000)),
            work("tune", 330, Pace(9.0, 9.0), Recorded(3, 300.0, 8.0, 8.0, 1)),
            work("measure", 50, Pace(5.0, 1.0), Recorded(2, 50.0, 10.0, None, None)),
            work("measure", 70, None, None),
        ],
        memory_bytes=3_900_000_000,
        disk_bytes=0,
        failed=0,
    )
    assert plan.beside_records() == [
        "tune: planned / recorded of 4 units: tokens 1.10, processor seconds 1.15",
        "measure: planned / recorded of 2 units: tokens 1.00, seconds 0.50",
        "memory: planned 3.9 GB for the largest unit, recorded at most 4.2 GB",
    ]
    assert StudyPlan([], 0, 0, 0).beside_records() == []

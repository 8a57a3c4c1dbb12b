"""From a study's recorded rows to its frame and its arms, where rows are not as one would like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from keepshot.errors import ConfigError, StudyError
from keepshot.query import query
from keepshot.records import ItemResult, write_items
from keepshot.study.arms import arms
from keepshot.study.directory import UnitRecord
from keepshot.study.document import StudyArm
from keepshot.study.frame import check_tags, item_frame, score_frame, write_frames
from keepshot.study.grid import Grid, Unit, expand
from keepshot.study.spec import StudySpec

CONTENT: dict[str, Any] = {
    "models": ["base"],
    "targets": ["support"],
    "recipes": {"plain": {"learning_rate": 1e-4, "steps": 5, "method": {"name": "full"}}},
    "seeds": [0, 1],
    "asks": {
        "few-shot": {"tasks": ["addition"], "settings": ["gold"], "seeds": 2},
        "target": {"tasks": ["target"], "settings": ["direct"]},
    },
}
USUAL = ((0, 0.0), (1, 1.0), (2, 1.0), (3, 1.0))
"""Items, and what each is worth."""


def spec_of(**changes: Any) -> StudySpec:
    return StudySpec.from_mapping({**CONTENT, **changes}, source="test")


def row(
    unit: Unit, item: int, *, shots: int = 0, seed: int = 0, correct: float = 1.0
) -> ItemResult:
    task = "support" if shots == 0 else "addition"
    return ItemResult(
        arm=unit.subject.label, model="base", lam=None, task=task, split="test", shots=shots,
        seed=seed, item=f"i{item}", question=f"q{item}", gold="a", answer="a", choices=[],
        log_likelihoods=[], correct=correct, correct_per_character=None, format_failure=0.0,
        label_leakage=0.0,
    )  # fmt: skip


class Recorded:
    """Rows of a study's units in files."""

    def __init__(self, place: Path, spec: StudySpec) -> None:
        self.place, self.spec = place, spec
        self.grid: Grid = expand(spec)
        self.records: dict[str, UnitRecord] = {}

    def rows(self, unit: str) -> Path:
        return self.place / f"{unit}.parquet"

    def write(self, unit: Unit, items: list[ItemResult]) -> None:
        write_items(items, self.rows(unit.id))
        self.records[unit.id] = UnitRecord(
            schema=1, unit=unit.id, kind="measure", label=unit.label, status="done"
        )

    def asking(self, ask: str) -> list[Unit]:
        return [unit for unit in self.grid.units.values() if unit.ask == ask]

    def few_shot(self, right: tuple[tuple[int, float], ...] = USUAL) -> None:
        """Write the same two draws of every model."""
        for unit in self.asking("few-shot"):
            draws = [(seed, *one) for seed in (0, 1) for one in right]
            self.write(unit, [row(unit, i, shots=4, seed=s, correct=c) for s, i, c in draws])

    @property
    def items(self) -> Any:
        return item_frame(self.spec, self.grid, self.records, self.rows)

    @property
    def arms(self) -> dict[str | None, StudyArm]:
        found = arms(self.spec, self.grid, self.items, self.records)
        return {arm.recipe: arm for arm in found}


def test_a_question_that_is_in_a_file_twice_is_asked_twice(tmp_path: Path):
    """It was a crash of the last step: rows of one name could not be laid out."""
    study = Recorded(tmp_path, spec_of())
    study.few_shot(((0, 0.0), (1, 1.0), (1, 1.0), (2, 1.0)))
    assert (study.arms["plain"].icl, study.arms["plain"].num_items) == (0.75, 4)
    assert study.arms["plain"].num_seeds == 2


def test_a_seed_that_one_of_two_asks_lacks_is_no_crash(tmp_path: Path):
    """Two asks put the target, one of them more of it; of one seed the longer one failed."""
    asks = {**CONTENT["asks"], "more": {"tasks": ["target"], "settings": ["direct"], "limit": 9}}
    study = Recorded(tmp_path, spec_of(asks=asks))
    study.few_shot()
    for unit in study.asking("target"):
        study.write(unit, [row(unit, item) for item in range(3)])
    for unit in study.asking("more"):
        if unit.subject.seed != 1:
            study.write(unit, [row(unit, item, correct=0.0) for item in range(9)])
    plain, base = study.arms["plain"], study.arms[None]
    assert (plain.target_score, plain.target_num_items) == (1.0, 3), "both seeds, of the short ask"
    assert (base.target_score, base.target_num_items) == (0.0, 9), "the longest"


def test_no_other_wording_is_taken_for_the_target_s_score(tmp_path: Path):
    other = {"tasks": ["target"], "settings": ["direct"]}
    asks = {
        "short": {**other, "template": "qa", "limit": 8}, "ornate": {**other, "wording": "ornate"},
        **CONTENT["asks"],
    }  # fmt: skip
    study = Recorded(tmp_path, spec_of(asks=asks))
    study.few_shot()
    for ask, correct in (("short", 0.0), ("ornate", 0.0), ("target", 1.0)):
        for unit in study.asking(ask):
            number = 4 if ask == "target" else 8
            study.write(unit, [row(unit, item, correct=correct) for item in range(number)])
    assert {arm.target_score for arm in study.arms.values()} == {1.0}


def test_an_ask_of_instructions_alone_has_no_rows_beside_others_that_have(tmp_path: Path):
    asks = {**CONTENT["asks"], "follow": {"tasks": [], "following": {}}}
    study = Recorded(tmp_path, spec_of(asks=asks))
    for unit in study.asking("follow"):
        study.write(unit, [])
    study.few_shot()
    assert len(study.items) == 3 * 8
    assert set(study.items["samples"].dropna()) == {"plain"}
    assert study.arms["plain"].icl == 0.75


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        (({"size": "small"}, {"size": 3}), "'size' is a text of model 'a', a number of model 'b'"),
        (({"good": True}, {"good": 1}), "'good' is a truth value of model 'a', a number of model"),
        (({"seed": 1}, {}), "'seed' has the name of a column"),
        (({"is_target": True}, {}), "'is_target' has the name of a column"),
    ],
)
def test_tags_that_cannot_be_columns_are_refused_before_any_work(
    tags: tuple[dict[str, Any], ...], words: str
):
    """Mixed ones were a crash of parquet once all was done, and names were refused only then."""
    models = [{"reference": name, "tags": each} for name, each in zip("ab", tags, strict=True)]
    with pytest.raises(StudyError, match=words):
        check_tags(spec_of(models=models))


def test_tags_that_some_models_have_are_columns(tmp_path: Path):
    models = [
        {"reference": "base", "tags": {"dose": 1, "good": True}},
        {"reference": "b", "tags": {"dose": 0.5}},
    ]
    study = Recorded(tmp_path, spec_of(models=models))
    check_tags(study.spec)
    study.few_shot()
    write_frames(study.items, score_frame(study.items), tmp_path)
    found = pd.read_parquet(tmp_path / "frame.parquet").drop_duplicates("model")
    assert found["dose"].tolist() == [1.0, 0.5]


def test_studies_whose_tags_differ_in_kind_are_not_queried_together(tmp_path: Path):
    for name, tag in (("one", "small"), ("two", 3)):
        (tmp_path / name).mkdir()
        models = [{"reference": "b", "tags": {"size": tag}}]
        study = Recorded(tmp_path / name, spec_of(models=models))
        study.few_shot()
        write_frames(study.items, score_frame(study.items), tmp_path / name)
        (tmp_path / name / "study.json").write_text("{}", "utf-8")
    places = [tmp_path / name for name in ("one", "two")]
    with pytest.raises(ConfigError, match="one name and two kinds"):
        query("select 1", places)
    assert query("select count(*) from study", places[:1])[1] == [(24,)]

"""Verifiable instructions in a study: who is asked, in whose words, and what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from coloured import write_colours
from command import status
from keepshot.errors import ConfigError
from keepshot.models.loading import LanguageModel, save
from keepshot.records import read_instructions
from keepshot.study.document import StudyDocument
from keepshot.study.grid import expand
from keepshot.study.spec import StudySpec

FOLLOWING = {"limit": 3, "answers": {"max_new_tokens": 4}}
STUDY: dict[str, Any] = {
    "name": "both",
    "models": ["base"],
    "targets": ["colours.jsonl"],
    "recipes": {"plain": {"steps": 2, "method": {"name": "full"}, "learning_rate": 0.1}},
    "blends": {"lambdas": [0.5]},
    "asks": {
        "both": {"tasks": ["addition"], "settings": ["gold"], "shots": [1], "limit": 3,
                 "splits": ["validation", "test"], "following": FOLLOWING},
    },
}  # fmt: skip


@pytest.fixture
def workplace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_pico: Callable[..., LanguageModel]
) -> Path:
    monkeypatch.chdir(tmp_path)
    save(fresh_pico("llama", seed=0), tmp_path / "base")
    write_colours(tmp_path, 40)
    return tmp_path


def written(**changes: Any) -> str:
    Path("study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}), "utf-8")
    return "study.yaml"


def test_a_study_has_both_axes_at_every_point(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("study", written(), "--json") == 0
    document = StudyDocument.model_validate_json(capsys.readouterr().out)
    place = workplace / "runs" / "both"
    tuned = "base, plain on colours.jsonl, seed 0"
    points = [("base", None), (tuned, None), (tuned, 0.5)]
    assert [(s.arm, s.lam, s.split) for s in document.instructions] == [
        (arm, lam, split) for arm, lam in points for split in ("validation", "test")
    ]
    assert {(s.num_prompts, s.style, s.variant) for s in document.instructions} == {
        (3, "raw", "repaired")
    }
    assert {arm.ask for arm in document.arms} == {"both"}  # the same models on the other axis
    rows = read_instructions(place / "instructions.parquet")
    answers = {
        (arm, lam): [r.answer for r in rows if (r.arm, r.lam, r.split) == (arm, lam, "test")]
        for arm, lam in points
    }
    assert len({tuple(found) for found in answers.values()}) > 1
    asked = {split: {r.key for r in rows if r.split == split} for split in ("validation", "test")}
    assert asked["validation"].isdisjoint(asked["test"])
    assert "## Instructions followed" in (place / "report.md").read_text("utf-8")
    sql = "select count(*) n from study_instructions"
    assert status("query", sql, str(place), "--json") == 0
    assert json.loads(capsys.readouterr().out) == [{"n": 3 * 2 * 3}]
    # Once more, nothing is done again; and the terminal shows what the document holds.
    before = {p: p.read_bytes() for p in (place / "units").iterdir()}
    assert status("study", "study.yaml") == 0
    assert "instructions, strict" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in (place / "units").iterdir()} == before


def test_a_point_is_asked_in_the_words_of_the_tuned_model(
    workplace: Path, fresh_pico: Callable[..., LanguageModel], capsys: pytest.CaptureFixture[str]
) -> None:
    spoken = fresh_pico("llama", seed=0)
    spoken.tokenizer.chat_template = "{% for m in messages %}U {{ m.content }} B{% endfor %}"
    save(spoken, workplace / "chatty")
    only = {"follow": {"tasks": [], "following": FOLLOWING}}
    assert status("study", written(models=["chatty"], asks=only), "--plan") == 0
    capsys.readouterr()
    assert status("study", "study.yaml", "--json") == 0
    document = StudyDocument.model_validate_json(capsys.readouterr().out)
    assert (document.done, document.failed, document.arms) == (4, 0, [])
    assert [(s.lam, s.style) for s in document.instructions] == [
        (None, "chat"), (None, "chat"), (0.5, "chat"),
    ]  # fmt: skip


def test_two_asks_are_told_apart(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asks = {
        name: {"tasks": [], "following": {**FOLLOWING, "limit": limit}}
        for name, limit in (("few", 1), ("more", 2))
    }
    assert status("study", written(asks=asks, recipes={}, blends=None), "--json") == 0
    document = StudyDocument.model_validate_json(capsys.readouterr().out)
    assert [(s.arm, s.num_prompts) for s in document.instructions] == [
        ("base: few", 1), ("base: more", 2),
    ]  # fmt: skip


def test_instructions_that_are_asked_no_more_are_gone(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The old arms' rows stayed, and were queried as the study's own."""
    both = {"tasks": ["addition"], "settings": ["direct"], "limit": 2, "following": FOLLOWING}
    changes: dict[str, Any] = {"recipes": {}, "blends": None}
    assert status("study", written(asks={"both": both}, **changes)) == 0
    place = workplace / "runs" / "both"
    assert (place / "instructions.parquet").is_file()
    del both["following"]
    assert status("study", written(asks={"both": both}, **changes), "--overwrite") == 0
    assert not (place / "instructions.parquet").exists()
    capsys.readouterr()
    assert status("query", "select * from study_instructions", str(place)) == 2
    assert "study_instructions does not exist" in capsys.readouterr().err


def test_identities_change_with_what_is_asked() -> None:
    def ids(contents: dict[str, str] | None = None, **ask: Any) -> set[str]:
        whole = {**STUDY, "recipes": {}, "blends": None, "asks": {"both": {**ask}}}
        return set(expand(StudySpec.from_mapping(whole, source="test"), contents).units)

    plain = ids()
    followed = ids(following=FOLLOWING)
    assert len({*plain, *followed, *ids(following={**FOLLOWING, "limit": 4})}) == 3
    sets = [ids({"embedded": version}, following=FOLLOWING) for version in "12"]
    assert sets[0] != sets[1]
    assert ids({"embedded": "1"}) == plain, "what is not asked changes nothing"
    with pytest.raises(ConfigError, match="nothing is asked; name `tasks`"):
        ids(tasks=[])


def test_prompts_that_cannot_be_read_are_named_before_a_model_is_loaded(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asks = {"follow": {"tasks": [], "following": {"prompts": "none.jsonl"}}}
    assert status("study", written(asks=asks, models=["no-such-model"])) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err

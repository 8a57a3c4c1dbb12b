"""Instruction following and win rates through the command line, on pico models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from coloured import write_colours
from command import status
from keepshot.models.loading import LanguageModel, save
from keepshot.records import JudgeDocument, ResultDocument, read_instructions


@pytest.fixture
def workplace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_pico: Callable[..., LanguageModel]
) -> Path:
    """A directory with two pico models, a target and a file of prompts."""
    monkeypatch.chdir(tmp_path)
    save(fresh_pico("llama", seed=0), tmp_path / "base")
    save(fresh_pico("llama", seed=1), tmp_path / "other")
    write_colours(tmp_path, 40)
    prompts = [{"instruction": f"Say {word}."} for word in ("hello", "stone", "river", "yes")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)), "utf-8")
    return tmp_path


SMALL = ("--set", "following.limit=4", "--set", "following.answers.max_new_tokens=3")


def test_measure_follows_instructions_too(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = status(
        "measure", "base", "other", "--tasks", "addition", "--shots", "0", "--seeds", "1",
        "--limit", "3", "--follow", "embedded", *SMALL, "--json", "--out", "out",
    )  # fmt: skip
    assert code == 0
    document = ResultDocument.model_validate_json(capsys.readouterr().out)
    assert [(s.arm, s.split, s.variant, s.style) for s in document.instructions] == [
        ("base", "all", "repaired", "raw"),
        ("other", "all", "repaired", "raw"),
    ]
    assert [s.num_prompts for s in document.instructions] == [4, 4]
    rows = read_instructions(workplace / "out" / "instructions.parquet")
    assert [row.prompt for row in rows[:4]] == [row.prompt for row in rows[4:]]
    assert [row.answer for row in rows[:4]] != [row.answer for row in rows[4:]]
    page = (workplace / "out" / "report.html").read_text("utf-8")
    table = page.partition('<table id="instructions">')[2].partition("</table>")[0]
    assert table.count("<tr>") == 3
    assert "embedded, all, repaired, raw" in table


def test_a_path_has_a_point_for_every_lambda(workplace: Path) -> None:
    code = status(
        "blend", "base", "other", "--sweep", "0,0.5,1", "--tasks", "addition", "--shots", "1",
        "--seeds", "1", "--limit", "4", "--target", "colours.jsonl", "--pick", "weighted:1",
        "--follow", "embedded", *SMALL, "--out", "path",
    )  # fmt: skip
    assert code == 0
    document = ResultDocument.read(workplace / "path")
    path = [s for s in document.instructions if s.arm == "path"]
    assert [(s.lam, s.split) for s in path] == [(lam, "validation") for lam in (0.0, 0.5, 1.0)]
    arms = [s.arm for s in document.instructions if s.split == "test"]
    assert arms[:2] == ["base", "other"]
    rows = read_instructions(workplace / "path" / "instructions.parquet")
    asked = {split: {r.key for r in rows if r.split == split} for split in ("validation", "test")}
    assert asked["validation"].isdisjoint(asked["test"])
    # The ends of the path are the models themselves, whatever else was on it.
    ends = [[r.answer for r in rows if r.arm == "path" and r.lam == lam] for lam in (0.0, 1.0)]
    assert ends[0] != ends[1]


def test_a_path_is_asked_in_the_words_of_the_tuned_model(
    workplace: Path, fresh_pico: Callable[..., LanguageModel]
) -> None:
    spoken = fresh_pico("llama", seed=1)
    spoken.tokenizer.chat_template = "{% for m in messages %}U {{ m.content }} B{% endfor %}"
    save(spoken, workplace / "chatty")
    code = status(
        "blend", "base", "chatty", "--sweep", "0,1", "--tasks", "addition", "--shots", "1",
        "--seeds", "1", "--limit", "2", "--target", "colours.jsonl", "--pick", "weighted:1",
        "--follow", "embedded", *SMALL, "--out", "path",
    )  # fmt: skip
    assert code == 0
    found = ResultDocument.read(workplace / "path").instructions
    assert {(score.lam, score.style) for score in found} >= {(0.0, "chat"), (1.0, "chat")}


def test_a_run_follows_instructions_on_every_arm(workplace: Path) -> None:
    arm = {"method": {"name": "full"}, "learning_rate": 1e-2, "steps": 2, "batch_size": 4}
    recipe: dict[str, Any] = {
        "name": "tiny", "model": "base", "data": "colours.jsonl",
        "measure": {
            "tasks": ["addition"], "shots": [1], "seeds": 1, "limit": 4,
            "following": {"limit": 3, "answers": {"max_new_tokens": 2}},
        },
        "arms": {"plain": arm},
        "blended": {"lambdas": [0.5, 1.0], "pick": "weighted:1", "limit": 4},
    }  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    assert status("run", "recipe.yaml", "--out", "run") == 0
    found = ResultDocument.read(workplace / "run").instructions
    assert {"before", "plain", "path"} <= {score.arm for score in found}
    assert [s.lam for s in found if s.arm == "path"] == [0.0, 0.5, 1.0]


def test_judging_two_models_and_a_file(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "judge", "base", "other", "--judge", "base", "--prompts", "prompts.jsonl",
        "--set", "answers.max_new_tokens=12", "--json",
    )  # fmt: skip
    assert status(*command, "--out", "first") == 0
    document = JudgeDocument.model_validate_json(capsys.readouterr().out)
    (rate,) = document.win_rates
    assert rate.num_judged + rate.num_tied + rate.num_failed == rate.num_comparisons == 4
    assert rate.judge.startswith("base (")
    assert len(rate.prompt_hash) == 16
    assert document.policy["candidate"]["style"] == "raw"
    annotations = json.loads((workplace / "first" / "annotations-0.json").read_text("utf-8"))
    assert {"instruction", "output_1", "output_2", "annotator", "preference"} <= annotations[
        0
    ].keys()
    # What was written is a judge itself, and agrees with the one that wrote it.
    code = status(
        "judge", "first/candidate.json", "first/reference.json",
        "--judge", "base", "--judge", "first/annotations-0.json", "--json",
    )  # fmt: skip
    assert code == 0
    again = JudgeDocument.model_validate_json(capsys.readouterr().out)
    assert [r.win_rate for r in again.win_rates] == pytest.approx([rate.win_rate] * 2)
    assert "a file of judgements cannot be asked" in "".join(again.notes)
    assert again.agreement[0].same_side == 1.0


def test_every_judge_is_tested(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "one two three four five six seven eight nine ten"
    for name in ("ours", "theirs"):
        rows = [
            {"instruction": f"Say {number}.", "output": f"{name} {words}", "generator": name}
            for number in range(20)
        ]
        Path(f"{name}.json").write_text(json.dumps(rows), "utf-8")
    command = ("judge", "ours.json", "theirs.json", "--judge", "base", "--judge", "other", "--json")
    assert status(*command) == 0
    document = JudgeDocument.model_validate_json(capsys.readouterr().out)
    tested = [(r.judge[:5], r.candidate, r.num_comparisons) for r in document.sanity]
    assert tested == [
        (name, f"answers against {what}", 16)
        for name in ("base ", "other")
        for what in ("itself", "their words shuffled")
    ]
    assert [r.win_rate for r in document.sanity[::2]] == pytest.approx([50.0, 50.0])
    # Weights drawn at random read nothing, and that is said.
    failed = [r.judge for r in document.sanity[1::2] if r.discrete_win_rate < 80.0]
    said = [n for n in document.notes if "does not tell an answer from its shuffled words" in n]
    assert failed
    assert [n.partition(" does not")[0] for n in said] == failed
    assert status(*command, "--no-sanity") == 0
    assert JudgeDocument.model_validate_json(capsys.readouterr().out).sanity == []


def test_verifiable_instructions_of_one_model(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = status(
        "judge", "--ifeval", "base", "--limit", "4", "--set", "answers.max_new_tokens=3",
        "--out", "follow",
    )  # fmt: skip
    assert code == 0
    assert "repaired, raw" in capsys.readouterr().out
    assert (workplace / "follow" / "judge.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["judge"], "give CANDIDATE and REFERENCE with --judge, or --ifeval MODEL"),
        (["judge", "a.json", "b.json"], "no judge: give --judge MODEL"),
        (["judge", "a.json", "b.json", "--judge", "base"], "a.json: cannot be read"),
        (["measure", "base", "--follow", "nothing.jsonl"], "nothing.jsonl: no such file"),
        (["judge", "--ifeval", "base", "--set", "answers.style=chat"], "has no chat template"),
    ],
)
def test_what_cannot_be_judged_is_said(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert status(*arguments) == 2
    assert message in capsys.readouterr().err

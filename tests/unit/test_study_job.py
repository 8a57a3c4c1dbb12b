"""Studies end to end through the command line, on pico models in a directory of its own."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from coloured import write_colours
from command import status
from keepshot.models.loading import LanguageModel, save
from keepshot.study.analysis import mixed_model
from keepshot.study.document import StudyDocument
from keepshot.study.frame import pairs

STUDY: dict[str, Any] = {
    "name": "tiny",
    "question": "Does it run?",
    "models": [
        {"reference": "base", "family": "llamas", "tags": {"dose": 0.5}},
        {"reference": "other", "name": "second"},
    ],
    "targets": ["colours.jsonl"],
    "shared": {"steps": 2, "batch_size": 4},
    "recipes": {
        "plain": {"method": {"name": "full"}, "learning_rate": 1e-2},
        "held": {
            "method": {"name": "lora", "rank": 2},
            "keep": [{"name": "kl", "prompts": 4, "prompts_per_step": 2, "shots": [1, 2]}],
        },
    },
    "seeds": [0, 1],
    "blends": {"lambdas": [0.5], "recipes": ["plain"]},
    "exclude": [{"models": ["second"], "recipes": ["held"]}],
    "asks": {
        "few-shot": {
            "tasks": ["addition", "word-group"], "shots": [2], "settings": ["gold"], "seeds": 2,
            "limit": 4,
        },
        "target": {"tasks": ["target"], "settings": ["direct"], "limit": 5},
    },
}  # fmt: skip
UNITS = 6 + 2 * (2 + 6 + 4)
"""6 tunings; 2 bases, 6 tuned models and 4 blends, each asked twice."""


@pytest.fixture
def workplace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_pico: Callable[..., LanguageModel]
) -> Path:
    monkeypatch.chdir(tmp_path)
    save(fresh_pico("llama", seed=0), tmp_path / "base")
    save(fresh_pico("qwen2", seed=1), tmp_path / "other")
    write_colours(tmp_path)
    write_study(tmp_path)
    return tmp_path


def write_study(place: Path, **changes: Any) -> None:
    (place / "study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}), encoding="utf-8")


def sorted_frame(place: Path) -> pd.DataFrame:
    frame = pd.read_parquet(place / "frame.parquet")
    keys = ["unit", "model", "task", "shots", "seed", "item"]
    return frame.sort_values(keys).reset_index(drop=True)


def test_a_study_from_file_to_figures(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("study", "study.yaml", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["total"], document["done"], document["failed"]) == (UNITS, UNITS, 0)
    assert document["schema"] == 1
    place = workplace / "runs" / "tiny"
    assert StudyDocument.model_validate_json((place / "study.json").read_text("utf-8"))
    assert not list((place / "models").iterdir())
    frame = sorted_frame(place)
    # per model: 2 few-shot tasks x 2 draws x 4 items, and 5 items of the target
    assert len(frame) == 12 * (16 + 5)
    assert set(frame["family"]) == {"llamas", "second"}
    assert set(frame.loc[frame["model"] == "base", "dose"]) == {0.5}
    assert frame["dose"].isna().sum() == (frame["model"] == "second").sum()
    assert set(frame.loc[frame["is_target"], "task"]) == {"colours.jsonl"}
    assert set(frame.loc[frame["task"] == "word-group", "chance"].round(6)) == {round(1 / 7, 6)}
    assert set(frame["setting"]) == {"direct", "gold"}
    arms = {(a["model"], a["recipe"], a["lam"]): a for a in document["arms"]}
    assert set(arms) == {
        ("base", None, None), ("base", "plain", None), ("base", "held", None),
        ("base", "plain", 0.5), ("second", None, None), ("second", "plain", None),
        ("second", "plain", 0.5),
    }  # fmt: skip
    plain = arms["base", "plain", None]
    assert plain["num_seeds"] == 2
    own = frame[(frame["model"] == "base") & (frame["recipe"] == "plain") & frame["lam"].isna()]
    few = own[~own["is_target"]].groupby("task")["correct"].mean().mean()
    assert plain["icl"] == pytest.approx(few)
    assert plain["target_score"] == pytest.approx(own[own["is_target"]]["correct"].mean())
    assert plain["tuning_seconds"] > 0.0
    for name in ("few_shot_divergence", "target_divergence"):
        low, high = plain[f"{name}_ci95"]
        assert 0.0 < low <= plain[name] <= high
        assert arms["base", None, None][name] is arms["base", "plain", 0.5][name] is None
    report = (place / "report.md").read_text("utf-8")
    assert "Does it run?" in report
    assert "plain, lambda 0.5 (2 seeds)" in report
    # SQL over it, and what was done already.
    assert status("query", "select stage, count(*) n from study group by 1 order by 1",
                  str(place), "--json") == 0  # fmt: skip
    found = {row["stage"]: row["n"] for row in json.loads(capsys.readouterr().out)}
    assert found == {"base": 42, "blend": 84, "tuned": 126}
    assert status("study", "study.yaml", "--status") == 0
    assert f"{UNITS} units: {UNITS} done, 0 failed, 0 running, 0 left" in capsys.readouterr().out
    records = {p: p.read_bytes() for p in (place / "units").iterdir()}
    assert status("study", str(place)) == 0, "the directory stands for its study"
    assert {p: p.read_bytes() for p in (place / "units").iterdir()} == records
    scores = pd.read_parquet(place / "scores.parquet")
    found_pairs = pairs(scores, shots=2)
    assert set(found_pairs["recipe"]) == set(), "no task is asked of both in both settings"


def test_pairs_feed_the_analysis() -> None:
    """Scores made with slope 0.8 on the base, families and tasks give that slope back."""
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    harder = generator.normal(0.0, 0.05, size=10)
    for family in range(8):
        shift = generator.normal(0.0, 0.03)
        for size in range(4):
            for task in range(10):
                base = generator.uniform(0.2, 0.8)
                shared = {
                    "model": f"m{family}-{size}", "family": f"f{family}", "ask": "a",
                    "num_parameters": 10**6 * 2**size, "split": "test", "task": f"t{task}",
                    "is_target": False, "num_items": 100, "lam": np.nan, "seed": 0,
                }  # fmt: skip
                own = {"stage": "base", "recipe": None, "target": None, "tuning_seed": np.nan}
                noise = generator.normal(0.0, 0.02)
                tuned = {"stage": "tuned", "recipe": "r", "target": "t", "tuning_seed": 0}
                rows += [
                    {**shared, **own, "shots": 4, "setting": "gold", "value": base},
                    {**shared, **own, "shots": 0, "setting": "direct", "value": 0.1},
                    {**shared, **tuned, "shots": 0, "setting": "direct",
                     "value": 0.1 + 0.8 * base + shift + harder[task] + noise},
                ]  # fmt: skip
    frame = pairs(pd.DataFrame(rows), shots=4)
    assert len(frame) == 320
    assert set(frame["base_direct"]) == {0.1}
    slope = mixed_model(frame).slope
    assert slope.low < 0.8 < slope.high
    assert slope.value == pytest.approx(0.8, abs=0.02)
    assert len(pairs(pd.DataFrame(rows), shots=4, by_task=False)) == 32


def test_failures_are_records_and_can_be_tried_again(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "other").rename(workplace / "away")
    assert status("study", "study.yaml", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    # All of the model that cannot be loaded: 2 tunings, 10 measurements.
    assert (document["done"], document["failed"]) == (UNITS - 12, 12)
    reasons = [failure["reason"] for failure in document["failures"]]
    assert all("model 'other' does not exist" in reason for reason in reasons)
    assert {arm["model"] for arm in document["arms"]} == {"base"}
    (workplace / "away").rename(workplace / "other")
    assert status("study", "study.yaml", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["done"], document["failed"]) == (UNITS, 0), "its content makes other units"


def test_retry_does_failures_again(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prompt that is too long, which no content shows: settled until asked for again."""
    write_study(workplace, models=["base"], recipes={}, targets=[], blends=None, exclude=[],
                asks={"a": {"tasks": ["addition"], "shots": [60], "limit": 40}})  # fmt: skip
    config = workplace / "base" / "config.json"
    whole = config.read_text("utf-8")
    short = json.dumps({**json.loads(whole), "max_position_embeddings": 64})
    config.write_text(short, "utf-8")
    assert status("study", "study.yaml", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["done"], document["failed"]) == (0, 1)
    assert "longer than the context" in document["failures"][0]["reason"]
    assert "Traceback" in document["failures"][0]["trace"]
    assert status("study", "study.yaml") == 0
    out = capsys.readouterr().out
    assert "failed: ask base: a (test)" in out
    assert "--retry" in out
    assert status("study", "study.yaml", "--retry", "--json") == 0
    assert json.loads(capsys.readouterr().out)["failed"] == 1


def test_a_plan_to_retry_counts_failures_as_left(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(workplace, models=["base"], recipes={}, targets=[], blends=None, exclude=[],
                asks={"a": {"tasks": ["addition"], "limit": 4}})  # fmt: skip
    assert status("study", "study.yaml", "--out", "runs", "--json") == 0
    [place] = (workplace / "runs" / "units").glob("*.json")
    record = json.loads(place.read_text("utf-8"))
    place.write_text(json.dumps({**record, "status": "failed", "reason": "the disk was full"}))
    capsys.readouterr()
    for retry, left, failed in ([], 0, 1), (["--retry"], 1, 0):
        assert status("study", "study.yaml", "--out", "runs", "--plan", "--json", *retry) == 0
        plan = json.loads(capsys.readouterr().out)
        assert [work["left"] for work in plan["work"]] == [left]
        assert plan["failed"] == failed


@pytest.mark.slow
def test_a_study_stopped_and_resumed_equals_an_uninterrupted_one(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In slices of one unit or so, and killed ten times in between."""
    assert status("study", "study.yaml", "--out", "whole", "--json") == 0
    command = [sys.executable, "-m", "keepshot", "study", "study.yaml", "--out", "parts"]
    random_ = random.Random(4)
    for _ in range(10):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        while (line := process.stderr.readline()) and not re.match(r"[1-9]\d* of \d+ units", line):
            pass
        # What was lost is begun again in a process of its own, which takes some seconds to start.
        time.sleep(random_.uniform(0.0, 5.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    units = workplace / "parts" / "units"
    before = {path: path.read_bytes() for path in units.glob("*.json")}
    assert 0 < len(before) < UNITS
    capsys.readouterr()
    slice_ = ("study", "study.yaml", "--out", "parts", "--limit-minutes", "0.0001", "--json")
    assert status(*slice_) == 0
    assert json.loads(capsys.readouterr().out)["done"] < UNITS
    assert status("study", "study.yaml", "--out", "parts", "--json") == 0
    assert json.loads(capsys.readouterr().out)["done"] == UNITS
    assert all(path.read_bytes() == content for path, content in before.items())
    whole, parts = sorted_frame(workplace / "whole"), sorted_frame(workplace / "parts")
    pd.testing.assert_frame_equal(whole, parts)


def test_what_was_lost_is_done_apart_and_is_the_same(
    workplace: Path,
) -> None:
    """A tuning whose runner was gone is done in a process of its own, and told apart by nothing."""
    small = {"recipes": {"plain": STUDY["recipes"]["plain"]}, "seeds": [0], "models": ["base"],
             "blends": None, "exclude": []}  # fmt: skip
    write_study(workplace, **small)
    assert status("study", "study.yaml", "--out", "whole") == 0
    place = workplace / "parts"
    assert status("study", "study.yaml", "--out", "parts", "--limit-minutes", "1e-9") == 0
    records = (json.loads(p.read_text("utf-8")) for p in (workplace / "whole").glob("units/*.json"))
    [lost] = [record["unit"] for record in records if record["kind"] == "tune"]
    (place / "attempts" / lost).write_text('{"lost": ["token"]}', "utf-8")
    assert status("study", "study.yaml", "--out", "parts") == 0
    assert not list((place / "attempts").iterdir())
    whole, parts = sorted_frame(workplace / "whole"), sorted_frame(place)
    pd.testing.assert_frame_equal(whole, parts)


def test_plan_counts_and_writes_nothing(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("study", "study.yaml", "--plan", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    work = {(row["model"], row["what"]): row for row in plan["work"]}
    assert sum(row["units"] for row in plan["work"]) == UNITS
    assert all(row["done"] == 0 and row["source"] == "calibrated" for row in plan["work"])
    assert plan["seconds_left"] > 0.0
    few = work["base", "ask base: few-shot (test)"]["tokens"]
    assert not (workplace / "runs").exists()
    assert status("study", "study.yaml", "--json") == 0
    capsys.readouterr()
    assert status("study", "study.yaml", "--plan", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert all(row["source"] == "recorded" and row["left"] == 0 for row in plan["work"])
    assert plan["seconds_left"] == 0.0
    # What was planned is what was read.
    units = workplace / "runs" / "tiny" / "units"
    records = [json.loads(path.read_text("utf-8")) for path in units.glob("*.json")]
    asked = next(r for r in records if r["label"] == "ask base: few-shot (test)")
    assert asked["tokens"] == pytest.approx(few, rel=0.02)
    planned = {row["what"]: row["tokens"] for row in plan["work"] if row["model"] == "base"}
    tuned = next(r for r in records if r["label"].startswith("tune base, held"))
    assert tuned["tokens"] == planned["tune held on colours.jsonl"]
    assert status("study", "study.yaml", "--plan") == 0
    assert f"{UNITS} units, {UNITS} done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"models": [], "exclude": []}, (), "is empty"),
        ({"seeds": list(range(200))}, (), "add --yes"),
        ({"targets": ["colors.jsonl"]}, (), "colors.jsonl"),
        ({"asks": {"a": {"tasks": ["adition"]}}}, (), "nearest is 'addition'"),
        ({"asks": {"a": {"tasks": ["upper-case", "addition"]}}}, (), "anchor task 'upper-case'"),
        ({"asks": {"a": {"tasks": ["third-capitals"]}}}, (), "the rule of measured task"),
        ({"asks": {"a": {"template": "cahtty"}}}, (), "template 'cahtty'"),
        ({}, ("--engine", "rya"), "expected local, ray, or HOST:PORT"),
        ({}, ("--engine", "127.0.0.1:1"), "no Ray cluster at '127.0.0.1:1'"),
        ({}, ("--workers", "2"), "needs --engine ray"),
        ({}, ("--limit-minutes", "0"), "expected more than 0"),
        ({}, ("--limit-minutes", "nan"), "expected more than 0"),
        ({}, ("--plan", "--engine", "rya"), "expected local, ray, or HOST:PORT"),
        ({}, ("--plan", "--workers", "2"), "needs --engine ray"),
        ({}, ("--plan", "--limit-minutes", "-5"), "expected more than 0"),
        ({}, ("--plan", "--out", "base"), "already exists"),
        ({}, ("--plan", "--status"), "give one"),
        ({}, ("--status",), "no study lies here yet"),
        ({}, ("--out", "base"), "already exists"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_done(
    workplace: Path, changes: dict[str, Any], arguments: tuple[str, ...], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_study(workplace, **changes)
    assert status("study", "study.yaml", *arguments) == 2
    complaint = capsys.readouterr().err
    lines = complaint[complaint.index("keepshot: ") :].strip().splitlines()
    assert message in "\n".join(lines)
    assert len(lines) <= 3
    assert not list(workplace.glob("runs/tiny/units/*"))


def test_a_directory_of_another_study_is_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"models": ["base"], "recipes": {}, "targets": [], "blends": None, "exclude": [],
             "asks": {"a": {"tasks": ["addition"], "limit": 2}}}  # fmt: skip
    write_study(workplace, **small)
    assert status("study", "study.yaml") == 0
    wider = {**small, "asks": {**small["asks"], "b": {"tasks": ["plural"], "limit": 2}}}
    write_study(workplace, **wider)
    capsys.readouterr()
    for arguments in ((), ("--status",), ("--plan",)):
        assert status("study", "study.yaml", *arguments) == 2
        assert "holds another study" in capsys.readouterr().err
    assert status("study", "study.yaml", "--plan", "--overwrite", "--json") == 0
    assert sum(row["done"] for row in json.loads(capsys.readouterr().out)["work"]) == 1
    assert status("study", "study.yaml", "--overwrite", "--json") == 0
    assert json.loads(capsys.readouterr().out)["total"] == 2
    assert os.listdir(workplace / "runs" / "tiny" / "units")

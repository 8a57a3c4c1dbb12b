"""The main job on the real small model, shortened: the order of the arms must come out right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keepshot.assets import AssetStore
from keepshot.jobs.recipes import run_spec
from keepshot.jobs.run import run
from keepshot.jobs.target import load_target
from keepshot.jobs.workspace import Workspace
from keepshot.models.loading import load
from keepshot.progress import Silent
from keepshot.records import ResultDocument

SHORTENED = [
    "measure={tasks: [past-tense, extract-town, number-name], shots: [4], seeds: 1, limit: 16}",
    "arms.plain.steps=15",
    "arms.kept.steps=15",
    "arms.kept.keep=[{name: kl, weight: 5.0, prompts_per_step: 1, prompts: 15, shots: [2, 5]}]",
    "blended={lambdas: [0.5, 1.0], pick: 'keep-target:0.5', limit: 8}",
]


@pytest.mark.real
def test_plain_tuning_destroys_and_the_recipe_keeps(tmp_path: Path, store: AssetStore) -> None:
    # The demo's target from a file, which is split to a few items to measure on.
    known = load_target("support", store)
    examples = (*known.train, *known.validation[:80])
    rows = [{"input": e.input, "output": e.output, "choices": e.choices} for e in examples]
    target = tmp_path / "support.jsonl"
    target.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    spec = run_spec(None, {"data": str(target)}, SHORTENED)
    arms = {arm: recipe for arm, recipe in spec.arms.items() if arm != "gentle"}
    shortened = spec.model_copy(update={"arms": arms})
    run(shortened, store, Workspace(tmp_path / "out", shortened), Silent())
    document = ResultDocument.read(tmp_path / "out")
    at_four = {row.arm: row for row in document.summary if row.shots == 4}
    assert list(at_four) == ["before", "plain", "kept", "blended"]
    plain, kept, blended = (at_four[arm].retention or 0.0 for arm in ("plain", "kept", "blended"))
    # 48 questions: one standard error is about .07, and the gaps measured are several of them.
    assert plain < 0.6
    assert kept > 0.8
    assert blended >= plain
    before, after = at_four["before"].target or 0.0, at_four["kept"].target or 0.0
    assert after > before + 0.15
    # What was written loads again, as itself: its weights are those that were measured.
    hashes = {model.reference: model.sha256 for model in document.models}
    again = load(str(tmp_path / "out" / "model"), store)
    assert again.sha256 == hashes["smollm2-135m-instruct, blended"]

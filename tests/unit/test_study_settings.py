"""Settings in which a model writes its own demonstrations, for itself or for its base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from coloured import COLOURS, write_colours
from command import status
from keepshot.errors import ConfigError, TaskError
from keepshot.jobs.study_writing import Draft, answer, form_for, num_tokens, write
from keepshot.models.loading import LanguageModel, save
from keepshot.prompts import Example, Template
from keepshot.scoring.engine import Engine
from keepshot.scoring.evaluate import Plan, measure
from keepshot.study.frame import pairs
from keepshot.study.grid import expand, tasks_of
from keepshot.study.spec import StudySpec
from keepshot.tasks.task import Task
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.samplegen import form_of
from keepshot.tuning.tokenised import Extra
from keepshot.tuning.train import train

PLAIN: dict[str, Any] = {
    "name": "tiny",
    "models": [
        "base-a",
        {"reference": "base-b", "name": "noised", "degrade": {"kind": "noised", "dose": 0.1}},
        {"name": "small", "from_scratch":
         {"architecture": "llama", "width": 32, "depth": 1, "steps": 5}},
    ],
    "targets": ["support", "instructions"],
    "recipes": {
        "plain": {"learning_rate": 1e-4, "method": {"name": "full"}, "steps": 5},
        "held": {"method": {"name": "lora"}, "keep": [{"name": "kl"}], "steps": 5},
    },
    "seeds": [0, 1],
    "blends": {"lambdas": [0.5], "recipes": ["plain"]},
    "asks": {
        "a": {"tasks": ["addition", "target"], "shots": [2, 4], "seeds": 2, "limit": 8,
              "splits": ["validation", "test"], "template": "arrow", "of": ["base", "tuned"]},
        "b": {"following": {}, "tasks": []},
        "c": {},
    },
}  # fmt: skip
WRITTEN = {"tasks": ["addition"], "settings": ["samplegen", "pipeline"]}


def spec_of(**changes: Any) -> StudySpec:
    return StudySpec.from_mapping({**PLAIN, **changes}, source="study.yaml")


def test_asks_without_written_demonstrations_are_the_same_units_as_before() -> None:
    """Identities as they were before there were such settings: nothing is measured again."""
    units = sorted(expand(spec_of(), {"addition": "version 1", "base-a": "sha"}).units)
    assert len(units) == 158
    assert hashlib.sha256("\n".join(units).encode()).hexdigest()[:16] == "84d46f08d58ed198"
    assert spec_of().fingerprint() == "e8927ef3b1a586f9"


def test_models_tuned_to_write_are_asked_apart_and_no_others() -> None:
    taught = {"method": {"name": "full"}, "samples": "samplegen", "steps": 5}
    asks = {**PLAIN["asks"], "c": {**WRITTEN, "settings": ["direct", "gold", "pipeline"]}}
    before = expand(spec_of())
    grid = expand(spec_of(recipes={**PLAIN["recipes"], "taught": taught}, asks=asks))
    written = [unit for unit in grid.units.values() if unit.settings]
    # 3 models x 2 targets x 2 seeds
    assert len(written) == 12
    assert {unit.subject.recipe for unit in written} == {"taught"}
    assert all(unit.settings == ("pipeline",) and unit.holds_two for unit in written)
    assert all(unit.requires and grid.units[str(unit.needs)].kind == "tune" for unit in written)
    assert "c, pipeline (test)" in written[0].label
    given = [u for u in before.units.values() if u.ask != "c"]
    assert {unit.id for unit in given} <= set(grid.units), "what was there is not asked again"
    assert tasks_of(spec_of(asks=asks, recipes={"taught": taught}), written[0]) == ["addition"]
    longer = {**asks, "c": {**asks["c"], "written_tokens": 300}}
    again = expand(spec_of(recipes={**PLAIN["recipes"], "taught": taught}, asks=longer))
    assert len(set(again.units) - set(grid.units)) == 12, "none but the written ones"


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (WRITTEN, "give a recipe `samples: samplegen`"),
        ({**WRITTEN, "of": ["base"]}, "`of` leaves them out"),
        ({**WRITTEN, "template": "arrow"}, "leave `template` out"),
        ({**WRITTEN, "following": {}}, "give it an ask of its own"),
        ({**WRITTEN, "settings": ["samplegne"]}, "settings.0"),
    ],
)
def test_settings_that_nothing_answers_are_refused(ask: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(asks={"w": ask})


# -- what is asked -----------------------------------------------------------------------------

SHOWN = (Example("five", "red", tuple(COLOURS)), Example("six", "blue", tuple(COLOURS)))
TEST = tuple(Example(f"thing {n}", COLOURS[n % 3], tuple(COLOURS)) for n in range(6))


def task_of(kind: str, examples: tuple[Example, ...] = TEST) -> Task:
    open_ = [replace(example, choices=None) for example in examples]
    return Task(
        f"{kind} task", "choice" if kind == "choice" else "exact", 1, "d", "d",
        demonstrations=SHOWN, validation=(),
        test=tuple(examples if kind == "choice" else open_),
    )  # fmt: skip


def test_written_right_a_pipeline_is_gold(pico_models: dict[str, LanguageModel]) -> None:
    """The untuned model sees the very prompt that right demonstrations give, and says the same."""
    engine = Engine(pico_models["llama"])
    tasks = (task_of("choice"), task_of("exact"))
    form = form_of("samplegen-template", Template())
    plan = Plan(tasks, (2,), (0,), limit=5)
    for task in tasks:
        drafts = [
            Draft(task, form, example, form.written(task.draw(2, 0), example) + "and more")
            for example in task.test[:5]
        ]
        one = replace(plan, tasks=(task,))
        gold = measure(engine.model, one, arm="x", engine=engine).items
        found = answer(engine, replace(one, shots=()), drafts, "pipeline", arm="x")
        assert [replace(row, setting=None, written=None) for row in found] == gold
        assert [row.written for row in found] == [draft.written for draft in drafts]
        assert {row.setting for row in found} == {"pipeline"}


def test_prompts_of_both_settings() -> None:
    form = form_of("samplegen", Template())
    written = form.written(SHOWN, TEST[0])
    draft = Draft(task_of("choice"), form, TEST[0], written)
    cut = (
        "Example 1: five\nAnswer 1: red\nExample 2: six\nAnswer 2: blue\n"
        "Solution: thing 0\nAnswer Solution:"
    )
    assert draft.prompt("pipeline") == cut
    assert draft.prompt("samplegen") == f"{form.prompt(TEST[0])}\n{cut}"
    assert replace(draft, written=written[:60]).prompt("pipeline") is None


def test_what_leads_to_no_answer_is_wrong_and_counted(
    pico_models: dict[str, LanguageModel],
) -> None:
    engine = Engine(pico_models["llama"])
    form = form_of("samplegen", Template())
    for task in (task_of("choice"), task_of("exact")):
        drafts = [
            Draft(task, form, example, form.written(SHOWN, example) if n else "Example 1: no")
            for n, example in enumerate(task.test)
        ]
        drafts[3] = replace(drafts[3], written="x" * 2040 + form.written(SHOWN, task.test[3]))
        rows = answer(engine, Plan((task,), (), ()), drafts, "samplegen", arm="x")
        assert [row.question for row in rows] == [example.input for example in task.test]
        for place in (0, 3):
            assert (rows[place].correct, rows[place].format_failure) == (0.0, 1.0)
            assert rows[place].answer == ""
            assert len(rows[place].choices) == (3 if task.kind == "choice" else 0)
        assert {row.shots for row in rows} == {2}


def test_tokens_are_counted_from_demonstrations(pico_models: dict[str, LanguageModel]) -> None:
    """Of a tokenizer of characters: prompt, what is written, and what is read to answer."""
    model, task = pico_models["llama"], task_of("choice")
    plan = Plan((task,), (0,), (0,), limit=2)
    form = form_of("samplegen", Template())
    once = sum(
        len(form.prompt(example)) + len(form.written(task.draw(2, 0), example))
        for example in task.test[:2]
    )
    assert num_tokens(model, plan, "samplegen", ["samplegen"]) == 2 * once
    prompts = sum(len(form.prompt(example)) for example in task.test[:2])
    both = num_tokens(model, plan, "samplegen", ["samplegen", "pipeline"])
    assert both == 3 * once - prompts


def test_tasks_that_word_themselves_are_refused() -> None:
    class Words:
        def ask(self, demonstrations: Any, example: Any) -> list[Any]:
            return []

        def grade(self, example: Any, answers: Any) -> float:
            return 0.0

        def identity(self) -> str:
            return "x"

    with pytest.raises(TaskError, match="'exact task' words its own prompts"):
        form_for(replace(task_of("exact"), examiner=Words()), "samplegen")


# -- end to end --------------------------------------------------------------------------------


def test_a_model_that_learned_to_write_is_right(fresh_pico: Callable[..., LanguageModel]) -> None:
    """Learned by heart: what it writes is what it was shown, and it answers after it."""
    model = fresh_pico("llama", seed=0)
    rows = [
        Example(text, colour, tuple(COLOURS)) for text, colour in zip("abc", COLOURS, strict=True)
    ]
    recipe = Recipe.from_mapping(
        {"data": "x", "samples": "samplegen-template", "method": {"name": "full"},
         "learning_rate": 1e-2, "steps": 60, "batch_size": 3}, source="test",
    )  # fmt: skip
    record = train(recipe, model, rows, None, extra=Extra())
    assert record.losses[-1]["loss"] < 0.05
    task = replace(task_of("choice", tuple(rows)), demonstrations=tuple(rows[:2]))
    engine = Engine(model)
    for each in (task, replace(task, kind="exact")):
        plan = Plan((each,), (), ())
        drafts = write(engine, plan, "samplegen-template", 128)
        assert [d.written.count("Q: ") for d in drafts] == [3, 3, 3]
        found = answer(engine, plan, drafts, "samplegen", arm="x")
        assert [(row.answer, row.correct, row.format_failure) for row in found] == [
            (colour, 1.0, 0.0) for colour in COLOURS
        ]


STUDY: dict[str, Any] = {
    "name": "tiny",
    "models": ["base"],
    "targets": ["colours.jsonl"],
    "shared": {"steps": 2, "batch_size": 4, "method": {"name": "full"}, "learning_rate": 1e-2},
    "recipes": {"plain": {}, "taught": {"samples": "samplegen-template"}},
    "asks": {
        "few": {"tasks": ["addition", "word-group"], "shots": [2], "limit": 4,
                "settings": ["direct", "gold", "samplegen", "pipeline"], "written_tokens": 16},
        "free": {"tasks": ["word-group"], "settings": ["direct"], "limit": 4, "similarity": "base"},
    },
}  # fmt: skip


def test_a_study_asks_all_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_pico: Callable[..., LanguageModel],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save(fresh_pico("llama", seed=0), tmp_path / "base")
    write_colours(tmp_path)
    Path("study.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    assert status("study", "study.yaml", "--plan", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    [planned] = [row for row in plan["work"] if "samplegen and pipeline" in row["what"]]
    assert planned["tokens"] > 1000
    assert status("study", "study.yaml", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    # 2 tunings; 3 models asked with given demonstrations and freely, 1 with its own.
    assert (document["total"], document["done"], document["failed"]) == (9, 9, 0)
    frame = pd.read_parquet("runs/tiny/frame.parquet")
    counts = frame.groupby(["stage", "setting"]).size().to_dict()
    assert counts == {
        ("base", "direct"): 8, ("base", "gold"): 8, ("tuned", "direct"): 16, ("tuned", "gold"): 16,
        ("base", "direct, similarity"): 4, ("tuned", "direct, similarity"): 8,
        ("tuned", "pipeline"): 8, ("tuned", "samplegen"): 8,
    }  # fmt: skip
    own = frame[frame["setting"].isin(["samplegen", "pipeline"])]
    assert set(own["recipe"]) == {"taught"}
    assert set(own.loc[own["task"] == "word-group", "chance"].round(4)) == {round(1 / 7, 4)}
    free = frame[frame["setting"] == "direct, similarity"]
    assert set(free["chance"].round(4)) == {round(1 / 7, 4)}
    groups = frame.loc[(frame["task"] == "word-group") & (frame["setting"] == "gold"), "gold"]
    right = [answer == wanted for answer, wanted in zip(free["answer"], free["gold"], strict=True)]
    assert right == [value == 1.0 for value in free["correct"]]
    assert set(free["gold"]) == set(groups)
    gold = frame[(frame["setting"] == "gold") & (frame["stage"] == "base")]
    assert set(own["item"]) == set(gold["item"]), "the same questions"
    found = pairs(pd.read_parquet("runs/tiny/scores.parquet"), shots=2)
    assert list(found["recipe"]) == ["plain"] * 2, "2 tasks, and no model that writes its own"
    arm = next(one for one in document["arms"] if one["recipe"] == "taught")
    assert arm["num_items"] == 8
    names = [p.name for p in Path("runs/tiny/units").glob("*.parquet")]
    tables = [pd.read_parquet(Path("runs/tiny/units") / name) for name in names]
    assert sorted("written" in table.columns for table in tables) == [*[False] * 6, True]


def test_tasks_without_a_cue_are_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_colours(tmp_path)
    rows = [json.dumps({"prompt": f"say {n}", "completion": "x"}) for n in range(30)]
    Path("said.jsonl").write_text("\n".join(rows), encoding="utf-8")
    ask = {"tasks": ["said.jsonl"], "settings": ["samplegen"]}
    Path("study.yaml").write_text(yaml.safe_dump({**STUDY, "asks": {"w": ask}}), encoding="utf-8")
    assert status("study", "study.yaml") == 2
    assert "take samples: samplegen" in capsys.readouterr().err


def test_the_guide_s_example_is_a_study() -> None:
    """A base and two tuned models asked four variants, one of them its own demonstrations too."""
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "studies.md").read_text("utf-8")
    [text] = [part for part in guide.split("```yaml\n") if part.startswith("name: who-writes")]
    spec = StudySpec.from_mapping(yaml.safe_load(text.partition("```")[0]), source="guide")
    kinds = [unit.kind for unit in expand(spec).units.values()]
    assert [kinds.count(kind) for kind in ("make", "tune", "measure")] == [1, 2, 3 * 4 + 1]

"""From a study's file to its units: what is shared is there once, and what differs apart."""

from __future__ import annotations

import time
from typing import Any

import pytest

from keepshot.errors import ConfigError
from keepshot.study.grid import check_names, check_size, expand, names_in, tasks_of
from keepshot.study.spec import StudySpec, Subject, check_patterns

CONTENT: dict[str, Any] = {
    "name": "tiny",
    "models": ["base-a", {"reference": "base-b", "name": "b", "family": "bees"}],
    "targets": ["support", "instructions"],
    "shared": {"steps": 5, "method": {"name": "full"}},
    "recipes": {
        "plain": {"learning_rate": 1e-4},
        "held": {"method": {"name": "lora"}, "keep": [{"name": "kl"}]},
    },
    "seeds": [0, 1],
    "blends": {"lambdas": [0.5], "recipes": ["plain"]},
    "asks": {
        "few-shot": {"tasks": ["addition", "plural"], "shots": [4], "settings": ["gold"]},
        "target": {"tasks": ["target"], "settings": ["direct"], "splits": ["validation", "test"]},
    },
}


def spec_of(**changes: Any) -> StudySpec:
    return StudySpec.from_mapping({**CONTENT, **changes}, source="test")


def test_a_grid_has_each_unit_once() -> None:
    """2 models x 2 targets x 2 recipes x 2 seeds are 16 tunings; the bases are asked once.

    Each base, tuned model and blend (half as many as tuned models) is asked three times.
    """
    grid = expand(spec_of())
    tunings = [unit for unit in grid.units.values() if unit.kind == "tune"]
    assert len(tunings) == 16
    assert len(grid.units) - 16 == 3 * (2 + 16 + 8) == len(grid.cells)
    stages = [cell.subject.stage for cell in grid.cells]
    assert [stages.count(stage) for stage in ("base", "tuned", "blend")] == [6, 48, 24]
    needing = grid.dependents
    assert sorted({len(units) for units in needing.values()}) == [3, 6]
    blends = [unit for unit in grid.units.values() if unit.subject.lam == 0.5]
    assert all(grid.units[str(unit.needs)].subject.recipe == "plain" for unit in blends)


def test_two_names_for_the_same_recipe_share_the_work() -> None:
    recipes = {**CONTENT["recipes"], "again": {"learning_rate": 1e-4}}
    one, two = expand(spec_of()), expand(spec_of(recipes=recipes))
    assert len(two.units) == len(one.units)
    assert len(two.cells) == len(one.cells) + 8 * 3


@pytest.mark.parametrize(
    ("targets", "tasks"),
    [
        (["a/rows.jsonl", "b/rows.jsonl"], ["target"]),
        (["a/rows.jsonl"], ["b/rows.jsonl"]),
        (["rows.jsonl"], ["b/rows.jsonl"]),
        (["b/rows.jsonl"], ["rows.jsonl"]),
    ],
)
def test_two_files_of_one_name_are_refused(targets: list[str], tasks: list[str]) -> None:
    """Their rows would be one task's, and a base's score at either that of both together."""
    asks = {"target": {"tasks": tasks, "settings": ["direct"]}}
    with pytest.raises(ConfigError, match=r"would both be task 'rows\.jsonl'"):
        check_names(spec_of(targets=targets, asks=asks))
    check_names(spec_of(targets=targets[:1], asks={"target": {"tasks": ["target", "addition"]}}))
    check_names(spec_of())


def test_the_target_is_the_model_s_own() -> None:
    spec = spec_of()
    asked = {
        (unit.subject.target, tuple(tasks_of(spec, unit)))
        for unit in expand(spec).units.values()
        if unit.ask == "target"
    }
    assert asked == {
        (None, ("support", "instructions")),
        ("support", ("support",)),
        ("instructions", ("instructions",)),
    }
    asks, data = names_in(spec)
    assert asks == ["addition", "plural", "support", "instructions"]
    assert {"support", "instructions", "upper-case"} <= set(data)


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"question": "why", "keep_models": True}, (0, 0)),
        ({"seed": 7}, (0, 78)),  # other demonstrations: every measurement
        ({"dtype": "bfloat16"}, (16, 78)),
        ({"device": "cuda:1"}, (16, 78)),
        ({"shared": {"steps": 6, "method": {"name": "full"}}}, (16, 72)),
    ],
)
def test_identities_change_with_what_can_change_results(
    changes: dict[str, Any], changed: tuple[int, int]
) -> None:
    before, after = set(expand(spec_of()).units), set(expand(spec_of(**changes)).units)
    new = after - before
    tunings = sum(identity.startswith("tune-") for identity in new)
    assert (tunings, len(new) - tunings) == changed


def test_identities_change_with_content() -> None:
    """A task's new version remakes what asks or trains on it, and nothing else."""
    plain = set(expand(spec_of(), {"addition": "version 1"}).units)
    assert plain != set(expand(spec_of()).units)
    other = set(expand(spec_of(), {"addition": "version 2"}).units)
    assert len(other - plain) == 26, "the few-shot ask of every model"
    anchors = set(expand(spec_of(), {"addition": "version 1", "upper-case": "version 2"}).units)
    # 8 tunings held by anchors, each asked three times
    assert len(anchors - plain) == 8 + 24
    model = set(expand(spec_of(), {"addition": "version 1", "base-a": "sha"}).units)
    assert len(model - plain) == len(plain) / 2


def test_vary_makes_one_recipe_of_each_value() -> None:
    recipes = {"plain": {"vary": {"learning_rate": [1e-5, 1e-4], "method.name": ["full"]}}}
    spec = spec_of(recipes=recipes, blends=None, shared={"steps": 5, "method": {}})
    assert {name: recipe.learning_rate for name, recipe in spec.recipes.items()} == {
        "plain learning_rate=1e-05 name=full": 1e-5,
        "plain learning_rate=0.0001 name=full": 1e-4,
    }
    again = StudySpec.from_mapping(spec.model_dump(mode="json"), source="again")
    assert again == spec
    assert again.fingerprint() == spec.fingerprint()


def test_exclusions_leave_out_what_matches_every_key() -> None:
    whole = expand(spec_of())
    rule = {"models": ["b"], "recipes": ["pl*"]}
    less = expand(spec_of(exclude=[rule]))
    gone = set(whole.units) - set(less.units)
    assert {whole.units[i].subject.model for i in gone} == {"b"}
    assert {whole.units[i].subject.recipe for i in gone} == {"plain"}
    assert len(gone) == 4 + 4 * 6
    unasked = expand(spec_of(exclude=[{"asks": ["few-shot"], "seeds": [1], "models": ["*"]}]))
    gone = set(whole.units) - set(unasked.units)
    assert {(whole.units[i].ask, whole.units[i].subject.seed) for i in gone} == {("few-shot", 1)}


def test_the_name_of_what_varies_stands_for_all_its_variants() -> None:
    recipes: dict[str, Any] = {
        "plain": {"vary": {"learning_rate": [1e-5, 1e-4]}},
        "plainer": {},
    }
    changes: dict[str, Any] = {"recipes": recipes, "blends": None}
    left = expand(spec_of(**changes, exclude=[{"recipes": ["plain"]}])).cells
    assert {cell.subject.recipe for cell in left} == {None, "plainer"}
    one = expand(spec_of(**changes, exclude=[{"recipes": ["plain learning_rate=1e-05"]}])).cells
    assert {c.subject.recipe for c in one} == {None, "plainer", "plain learning_rate=0.0001"}


def test_tunings_without_measurements_are_not_made() -> None:
    asks = {"few-shot": {"tasks": ["addition"], "of": ["base"]}}
    grid = expand(spec_of(asks=asks, blends=None))
    assert {unit.kind for unit in grid.units.values()} == {"measure"}
    assert len(grid.units) == 2


def test_a_soft_prompt_is_not_blended() -> None:
    recipes = {"soft": {"method": {"name": "prompt-tuning"}}}
    grid = expand(spec_of(recipes=recipes, blends={"lambdas": [0.5]}))
    assert {cell.subject.stage for cell in grid.cells} == {"base", "tuned"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "is empty"),
        ({"exclude": [{"asks": ["*"]}]}, "is empty"),
        ({"exclude": [{}]}, "leaves everything out"),
        ({"targets": []}, "no `targets`"),
        ({"models": ["a", "a"]}, "'a' is named twice"),
        ({"name": ".."}, "`name` = '..'"),
        ({"seeds": [0, 1, 0]}, "seed 0 is named twice; name each once"),
        ({"asks": {"a": {"splits": ["test", "test"]}}}, "split 'test' is named twice"),
        ({"shared": 5}, "`shared` = 5: expected keys"),
        ({"shared": [{"steps": 5}]}, "`shared` = [{'steps': 5}]: expected keys"),
        ({"blends": {"lambdas": [1.0]}}, "above 0 and not 1"),
        ({"blends": {"lambdas": [0.5], "recipes": ["plian"]}}, "nearest is 'plain'"),
        ({"exclude": [{"recipes": ["lora"]}]}, "recipe 'lora' is unknown"),
        ({"recipes": {"x": {"stpes": 5}}}, "nearest is 'steps'"),
        ({"recipes": {"x": {"vary": {"steps": 5}}}}, "expected lists"),
        ({"recipes": {"x": {}, "y": {"vary": {"steps": []}}}}, "lists of at least one value"),
        ({"models": [{"reference": "a", "vary": {"name": []}}]}, "lists of at least one value"),
        ({"modles": []}, "nearest is 'models'"),
        ({"asks": {"a": {"shots": [0]}}}, "counted from 1"),
        ({"asks": {"a": {"settings": ["pipline"]}}}, "settings"),
        ({"recipes": {}, "targets": [], "blends": None}, "no `targets`"),
    ],
)
def test_what_cannot_work_is_said(changes: dict[str, Any], message: str) -> None:
    def expanded() -> None:
        spec = spec_of(**changes)
        check_patterns(spec)
        expand(spec)

    with pytest.raises(ConfigError) as caught:
        expanded()
    text = str(caught.value)
    assert message in text
    assert len(text.splitlines()) <= 3


def large(models: int) -> StudySpec:
    return spec_of(models=[f"model-{number}" for number in range(models)])


def test_ten_thousand_cells_expand_in_two_seconds_of_processor_time() -> None:
    spec = large(260)
    began = time.process_time()
    grid = expand(spec, {"addition": "version 1"})
    spent = time.process_time() - began
    assert len(grid.cells) == 260 * 39 > 10_000
    assert spent < 2.0


def test_a_large_grid_must_be_meant() -> None:
    grid = expand(large(60))
    with pytest.raises(ConfigError, match="--yes") as caught:
        check_size(grid, meant=False)
    assert f"{len(grid.units):,}" in str(caught.value)
    check_size(grid, meant=True)
    check_size(expand(spec_of()), meant=False)


def test_labels_say_what_a_unit_is() -> None:
    subject = Subject("a", "support", "plain", 1, 0.5)
    assert subject.label == "a, plain on support, seed 1, lambda 0.5"
    assert Subject("a").label == "a"

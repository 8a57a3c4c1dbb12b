"""Recipes: defaults that work, tagged unions, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keepshot.errors import ConfigError
from keepshot.jobs.recipes import tune_spec
from keepshot.specs import Spec
from keepshot.tasks.catalog import SUITES
from keepshot.tuning import recipe as recipes
from keepshot.tuning.keep import KL, TERMS, Mix, find_term, parse_keep
from keepshot.tuning.live import named_tasks
from keepshot.tuning.method_specs import METHODS, Full, LoRA, ValueOnly, parse_method
from keepshot.tuning.recipe import AUTO_TERM, Auto, Recipe, auto


def read(**content: Any) -> Recipe:
    return Recipe.from_mapping({"data": "x", **content}, source="r.yaml")


def test_auto_is_lora_held_by_the_kl_term_and_decides_the_rest():
    chosen = auto("my.jsonl", model="m")
    assert chosen.method == LoRA(rank=16, targets="all-linear")
    assert chosen.keep == (AUTO_TERM,)
    assert chosen.auto == Auto()
    assert chosen.learning_rate is None
    without = auto("my.jsonl", model="m", keep="none")
    assert (without.keep, without.auto) == ((), None)
    assert auto("my.jsonl", model="m", keep="kl").auto is None
    assert auto("my.jsonl", model="m", method="full").method == Full()
    assert auto("my.jsonl", model="m", method="prompt-tuning").keep == ()


def test_auto_asks_nothing_that_it_trains_on_or_that_a_suite_measures():
    trained = set(AUTO_TERM.tasks.split(","))
    asked = {task.name for task in named_tasks(Auto().guard_tasks)}
    assert trained < set(SUITES["anchors"])
    assert asked == set(SUITES["guard"])
    assert not asked & set(SUITES["anchors"])
    assert not (trained | asked) & {*SUITES["core"], *SUITES["full"]}


def test_auto_trains_long_enough_on_little_data():
    assert read(auto={}).resolved(20).steps == 75
    assert read(auto={}).resolved(16 * 100).steps == 300
    assert read(auto={}, steps=3).resolved(20).steps == 3


def test_every_name_parses():
    assert [parse_method(name).name for name in METHODS] == list(METHODS)
    assert [term.name for term in parse_keep(",".join(TERMS))] == list(TERMS)
    with pytest.raises(ConfigError, match="method 'lroa' is unknown; nearest is 'lora'"):
        parse_method("lroa")
    with pytest.raises(ConfigError, match="keep term 'kll' is unknown; nearest is 'kl'"):
        parse_keep("mix,kll")


def test_methods_and_terms_are_told_apart_by_name():
    chosen = read(method={"name": "value-only"}, keep=[{"name": "kl", "weight": 2.0}])
    assert chosen.method == ValueOnly()
    assert find_term(chosen.keep, KL) == KL(weight=2.0)
    assert find_term(chosen.keep, Mix) is None


def test_steps_and_rate_are_filled_in():
    assert read(epochs=2.0, batch_size=8).resolved(100).steps == 25
    assert read(steps=7).resolved(100).steps == 7
    half = read(batch_size=8, keep=[{"name": "mix", "icl_share": 0.5}])
    assert half.resolved(100).steps == 75, "three passes of four rows a step"
    rates = [read(method={"name": name}).resolved(9).learning_rate for name in METHODS]
    assert rates == [2e-5, 1e-3, 1e-3, 2.5e-4, 1e-4, 1e-4, 1e-4, 2e-5, 1e-3, 0.03, 2e-5]
    assert read(learning_rate=3e-4).resolved(9).learning_rate == 3e-4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"method": {"name": "lora", "rnk": 4}}, "`method.lora.rnk` is unknown; nearest is 'rank'"),
        ({"learning_rte": 1}, "`learning_rte` is unknown; nearest is 'learning_rate'"),
        ({"keep": [{"name": "kl"}, {"name": "kl"}]}, "term 'kl' is given twice"),
        ({"keep": [{"name": "kl", "shots": [8, 2]}]}, "the fewest shots come first"),
        ({"keep": [{"name": "kl", "direction": "k3", "top_k": 9}]}, "`top_k` has no use with k3"),
        ({"keep": [{"name": "mix", "general_share": 0.1}]}, "given together or not at all"),
        ({"keep": [{"name": "mix", "icl_share": 0.0}]}, "nothing to mix in"),
        (
            {
                "keep": [
                    {
                        "name": "mix",
                        "icl_share": 0,
                        "shots": 5,
                        "general_share": 0.1,
                        "general_data": "instructions",
                    }
                ]
            },
            "shots has no use with icl_share: 0",
        ),
        ({"keep": [{"name": "mix", "icl_from": "data", "tasks": "x"}]}, "`tasks` has no use with"),
        ({"batch_size": 16, "accumulate": 3}, "cannot be divided into accumulate = 3 parts"),
        ({"method": {"name": "lora", "rank": 0}}, "greater than 0"),
    ],
)
def test_what_does_not_fit_is_named(content: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        read(**content)
    assert message in str(error.value)


def test_a_file_may_name_a_method_and_terms_as_the_command_line_does(tmp_path: Path):
    place = tmp_path / "r.yaml"

    def found(text: str, **given: str) -> Recipe:
        place.write_text(f"model: m\ndata: d\n{text}", encoding="utf-8")
        return tune_spec(place, given, {}, []).recipe

    default = auto("d", model="m")
    assert found("keep: auto") == default
    assert found("method: dora\nkeep: kl,l2-sp").method == LoRA(name="dora")
    assert [t.name for t in found("method: dora\nkeep: kl,l2-sp").keep] == ["kl", "l2-sp"]
    assert found("keep: auto", keep="none").keep == ()
    # What the file says of `auto` stays where it is asked for.
    own = found("keep: auto\nauto: {trial_steps: 3}")
    assert (own.keep, own.auto) == (default.keep, Auto(trial_steps=3))
    assert found("auto: {trial_steps: 3}", keep="kl").auto is None
    # Without either a file is plain tuning.
    assert (found("").keep, found("").auto) == ((), None)


def test_the_fingerprint_leaves_out_what_changes_no_result():
    assert read().fingerprint() == read(save_every=7).fingerprint()
    assert read().fingerprint() != read(seed=1).fingerprint()


def test_every_field_is_documented():
    specs = [v for v in vars(recipes).values() if isinstance(v, type) and issubclass(v, Spec)]
    undocumented = [
        f"{spec.__name__}.{name}"
        for spec in specs
        for name, field in spec.model_fields.items()
        if not field.description
    ]
    assert undocumented == []

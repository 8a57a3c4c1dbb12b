"""Specs of the commands, the shipped recipes, and the grid of lambdas."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepshot.blending.pick import check_rule, parse_rule
from keepshot.errors import ConfigError
from keepshot.jobs.recipes import blend_spec, run_spec, shipped_recipe, tune_spec
from keepshot.jobs.specs import parse_lambdas
from keepshot.models.reference import HubModel, parse_reference
from keepshot.tuning.keep import KL, find_term
from keepshot.tuning.method_specs import METHODS, BottomFrozen, Full, LoRA, ProMoT


@pytest.mark.parametrize(
    ("text", "lams"),
    [
        ("0:1:0.25", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("0:1:0.1", tuple(i / 10 for i in range(11))),
        ("0:1:0.4", (0.0, 0.4, 0.8, 1.0)),
        ("1,0,.5,.5", (0.0, 0.5, 1.0)),
        ("-0.2:0.2:0.2", (-0.2, 0.0, 0.2)),
    ],
)
def test_lambdas_hold_both_ends_and_exact_decimals(text: str, lams: tuple[float, ...]) -> None:
    assert parse_lambdas(text) == lams


@pytest.mark.parametrize(
    "text", ["0:1", "0:1:0", "1:0:0.1", "0:1:-1", "a:1:2", "", "0:1:1e-9", "nan,1"]
)
def test_other_grids_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--sweep"):
        parse_lambdas(text)


@pytest.mark.parametrize(
    "path", sorted(shipped_recipe("demo").parent.glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_shipped_recipe_fits_its_spec(path: Path) -> None:
    spec = run_spec(path, {}, [])
    assert {"plain", "gentle", "kept"} <= spec.arms.keys()
    assert isinstance(spec.arms["plain"].method, Full)
    assert isinstance(spec.arms["gentle"].method, Full)
    assert spec.arms["gentle"].learning_rate < spec.arms["plain"].learning_rate  # type: ignore[operator]
    assert find_term(spec.arms["kept"].keep, KL)


def test_ones_own_model_and_data_reach_every_arm() -> None:
    spec = run_spec(None, {"model": "org/name", "data": "my.jsonl", "seed": 3}, [])
    assert spec.name == "run"
    assert {(a.model, a.data, a.seed) for a in spec.arms.values()} == {("org/name", "my.jsonl", 3)}


@pytest.mark.parametrize("name", [".", "..", "../other", ".hidden"])
def test_a_run_s_name_stays_in_its_directory(name: str) -> None:
    """`..` took the working directory's place, which `--overwrite` deleted."""
    with pytest.raises(ConfigError, match=f"`name` = '{name}'"):
        run_spec(None, {}, [f"name={name}"])
    assert run_spec(None, {}, ["name=v1.0-a..b"]).name == "v1.0-a..b"


def test_tune_without_a_recipe_keeps_by_default() -> None:
    recipe = tune_spec(None, {"data": "my.jsonl"}, {}, []).recipe
    assert isinstance(recipe.method, LoRA)
    assert find_term(recipe.keep, KL)
    plain = tune_spec(None, {"data": "my.jsonl", "method": "full", "keep": "none"}, {}, []).recipe
    assert isinstance(plain.method, Full)
    assert plain.keep == ()


def test_every_method_is_a_name_on_the_command_line_and_a_mapping_in_a_recipe() -> None:
    for name in METHODS:
        recipe = tune_spec(None, {"data": "my.jsonl", "method": name}, {}, []).recipe
        assert recipe.method.name == name
        assert bool(recipe.keep) == (name != "prompt-tuning")
    sets = ["method.targets=value", "method.rank=8"]
    narrow = tune_spec(None, {"data": "my.jsonl", "method": "dora"}, {}, sets).recipe
    assert narrow.method == LoRA(name="dora", targets="value", rank=8)
    sets = ["method.then.name=bottom-frozen", "method.then.share=0.25"]
    staged = tune_spec(None, {"data": "my.jsonl", "method": "promot"}, {}, sets).recipe
    assert staged.method == ProMoT(then=BottomFrozen(share=0.25))


def test_a_plain_arm_under_a_soft_prompt_is_not_blended() -> None:
    with pytest.raises(ConfigError, match="`plain` is tuned under a soft prompt"):
        run_spec(None, {}, ["arms.plain.method.name=promot"])
    spec = run_spec(None, {}, ["arms.plain.method.name=promot", "blended=null"])
    assert isinstance(spec.arms["plain"].method, ProMoT)


def test_blend_wants_one_lambda_or_a_path() -> None:
    with pytest.raises(ConfigError, match="either --lambda"):
        blend_spec(None, {"base": "a", "tuned": "b"}, [])
    with pytest.raises(ConfigError, match="either --lambda"):
        blend_spec(None, {"base": "a", "tuned": "b", "lam": 0.5, "sweep": (0.0, 1.0)}, [])


PAIR = {"base": "a", "tuned": "b"}


@pytest.mark.parametrize(
    ("given", "overrides", "message"),
    [
        ({"sweep": ()}, [], "`sweep`"),
        ({}, ["sweep=[0, .nan, 1]"], r"`sweep\.1` = nan: Input should be a finite number"),
        ({"lam": 0.5}, ["beta=2"], "`beta` is how much of `second` is added"),
        ({"lam": 0.5, "tasks": ["core"]}, [], "`tasks` is for a --sweep"),
        ({"lam": 0.5}, ["resolution=0.1"], "`resolution` is for a --sweep"),
        ({}, ["lam=0.5", "following.prompts=ifeval"], "`following` is for a --sweep"),
        ({"lam": 1}, ["reduce=lore:0.5", "rule.kinds.mlp=0"], "leave out `rule`"),
        ({"lam": 1, "dtype": "float16"}, ["reduce=lore:0.5"], "leave out `write_dtype`"),
    ],
)
def test_what_would_have_no_effect_on_a_blend_is_refused(
    given: dict[str, object], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        blend_spec(None, {**PAIR, **given}, overrides)


def test_a_path_under_a_rule_is_picked_on_by_its_knee() -> None:
    """It does not lead to the tuned model, of which the usual pick keeps a share."""
    path, rule = {**PAIR, "sweep": (0.0, 1.0)}, "rule.kinds.mlp=0"
    assert blend_spec(None, path, []).pick == "keep-target:0.9"
    assert blend_spec(None, path, [rule]).pick == "knee"
    assert blend_spec(None, path, [rule, "pick=best-icl"]).pick == "best-icl"


BLENDS = sorted((Path(__file__).parents[2] / "recipes" / "blend").glob("*.yaml"))


@pytest.mark.parametrize("file", BLENDS, ids=lambda file: file.stem)
def test_blend_recipes_are_specs_of_hub_pairs(file: Path) -> None:
    spec = blend_spec(file, {}, [])
    assert isinstance(parse_reference(spec.base), HubModel)
    assert isinstance(parse_reference(spec.tuned), HubModel)
    assert spec.sweep is not None
    check_rule(parse_rule(spec.pick), spec.sweep, spec.target is not None)


def test_there_is_a_blend_recipe_for_every_family() -> None:
    families = ["gemma", "llama", "mistral", "olmo", "qwen"]
    assert [file.stem.partition("-")[0] for file in BLENDS] == families


def test_a_lambda_on_the_command_line_takes_the_place_of_a_recipes_path() -> None:
    spec = blend_spec(BLENDS[0], {"lam": 0.5}, ["rounding=nearest"])
    assert (spec.lam, spec.sweep, spec.rounding) == (0.5, None, "nearest")
    with pytest.raises(ConfigError, match=r"expected BASE and TUNED, or a recipe"):
        blend_spec(Path("base"), {"lam": 0.5}, [])

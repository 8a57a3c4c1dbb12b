"""The studies that are shipped: they are what they say, and planning them works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from keepshot.assets import AssetStore
from keepshot.jobs.recipes import study_spec
from keepshot.jobs.study import Running, grid_of
from keepshot.jobs.study_apart import Unwatched
from keepshot.jobs.study_plan import plan_study
from keepshot.jobs.target import load_target
from keepshot.models.loading import LanguageModel, save
from keepshot.study.grid import check_size, expand, tasks_of
from keepshot.study.spec import StudySpec
from keepshot.tasks.catalog import SUITES, TUNABLE, is_path
from keepshot.tuning.keep import TERMS
from keepshot.tuning.method_specs import METHODS
from keepshot.tuning.recipe import auto

STUDIES = Path(__file__).parents[2] / "studies"
SHIPPED = sorted(path.name for path in STUDIES.glob("*.yaml"))


def shipped(name: str) -> StudySpec:
    return study_spec(STUDIES / name, {}, [])[0]


def test_the_screen_has_every_method_and_every_term() -> None:
    spec = shipped("keep.yaml")
    methods = {recipe.method.name for recipe in spec.recipes.values()}
    assert methods == {*METHODS} - {"bias-only"}, "the model has no biases"
    assert {term.name for recipe in spec.recipes.values() for term in recipe.keep} == {*TERMS}
    assert len(spec.targets) == 2
    assert len(spec.seeds) == 1
    assert {split for ask in spec.asks.values() for split in ask.splits} == {"validation"}


def test_partial_adaptation_chooses_on_other_items_than_it_reports() -> None:
    spec = shipped("partial_adaptation.yaml")
    assert all(ask.splits == ("validation", "test") for ask in spec.asks.values())
    assert spec.blends is not None
    assert set(spec.seeds) == {0, 1, 2}
    assert len(spec.models) == 2


@pytest.mark.parametrize("name", SHIPPED)
def test_targets_are_not_among_what_stands_for_few_shot_ability(name: str) -> None:
    spec = shipped(name)
    asked = {task for ask in spec.asks.values() for task in ask.tasks} - {"target", "core", "full"}
    assert asked <= {*SUITES["full"], "composed"}
    assert not set(spec.targets) & {*asked, *SUITES["composed"]}
    if name == "keep-real.yaml":
        assert all(is_path(target) for target in spec.targets)
    else:
        assert set(spec.targets) <= set(TUNABLE)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_studies_expand_within_the_limit(name: str, store: AssetStore) -> None:
    grid = grid_of(shipped(name), store)
    check_size(grid, meant=False)
    made = [unit for unit in grid.units.values() if unit.kind == "make"]
    assert len(made) == (51 if name == "convergence-small.yaml" else 0)
    kinds = [unit.kind for unit in grid.units.values()]
    # (name, tunings, measurements): 31 and 30 recipes, each asked twice, and the base
    wanted = {
        "bridge.yaml": (8, 2 + 16 + 2),
        # (recipes, and those that write), (composed; of what is whole: draws, demonstrations of
        # those that write, two controls; what they write)
        "convergence-small.yaml": (140 + 29, 53 + 140 + 4 * 29 + 2 * 29),
        "convergence-hub.yaml": (126, 21 * (3 + 2 * 2 * 2 + 2 * 2)),
        "keep.yaml": (61, 124),
        "keep-auto.yaml": (40, 6 + 120),
        "keep-real.yaml": (108, 3 + 324),
        "promot.yaml": (16, 2 + 32),
        "partial_adaptation.yaml": (108, 8 + 432 + 432),
    }
    assert (kinds.count("tune"), kinds.count("measure")) == wanted[name]


def test_the_study_of_small_models_has_the_promised_sizes() -> None:
    """90 tuned models or more besides the degraded ones, three architectures, 24 tasks.

    And models that write their own demonstrations: all that are not degraded.
    """
    spec = shipped("convergence-small.yaml")
    grid = expand(spec)
    plain = [s for s in grid.tuned if spec.recipes[str(s.recipe)].samples == "plain"]
    writing = [s.model for s in grid.tuned if s not in plain]
    whole = [model.label for model in spec.models if model.degrade is None]
    assert sorted(writing) == sorted(whole)
    assert len(whole) == 29
    tuned = [spec.model(subject.model) for subject in plain]
    assert len(tuned) == 140
    assert sum(model.degrade is None for model in tuned) == 116
    harmed = {(model.degrade.kind, model.reference) for model in spec.models if model.degrade}
    assert len(harmed) == 2 * 4
    scratch = [model.from_scratch for model in spec.models if model.from_scratch]
    assert {made.architecture for made in scratch} == {"llama", "gpt2", "gpt-neox"}
    assert len({(made.architecture, made.width, made.seed) for made in scratch}) == 9
    assert len({(made.width, made.steps) for made in scratch}) >= 12
    assert len({model.family for model in spec.models}) == 11
    assert all(model.tags for model in spec.models if model.reference)
    for subject in plain:
        beside = [s for s in plain if s.model == subject.model]
        recipes = {s.recipe for s in beside}
        assert len(recipes) == (1 if spec.model(subject.model).degrade else 2)
    asked = spec.asks["composed"]
    assert (asked.settings, asked.all_shots) == (("direct", "gold"), (0, 4))
    assert spec.asks["draws"].seeds >= 3, "the bound needs as many"
    for name in spec.asks:
        units = [unit for unit in grid.units.values() if unit.ask == name]
        assert len({task for unit in units for task in tasks_of(spec, unit)}) == 24


@pytest.mark.parametrize("name", ["keep-auto.yaml", "keep-real.yaml"])
def test_auto_is_studied_as_it_is(name: str) -> None:
    recipe = shipped(name).recipes["auto"]
    default = auto("-", model=recipe.model)
    assert recipe == default


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_studies_can_be_planned(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    store: AssetStore,
    fresh_pico: Callable[..., LanguageModel],
) -> None:
    """With a pico model in the real ones' place, and what takes longest to read left out.

    Nothing is timed but for the screen, which has every method.
    """
    monkeypatch.chdir(tmp_path)
    save(fresh_pico("llama"), tmp_path / "base")
    few = next(iter(shipped(name).asks))
    changed = ["models=[base]", "targets=[support]", "exclude=[]", f"asks.{few}.limit=2"]
    spec = study_spec(STUDIES / name, {}, changed)[0]
    timed = name == "keep.yaml"
    plan = plan_study(spec, store, tmp_path / "runs", Unwatched(), Running(), calibrate=timed)
    assert all(work.tokens and work.tokens > 0 for work in plan.work)
    assert (plan.seconds_left is not None) == timed
    tuned = {w.what: w.tokens or 0 for w in plan.work if w.kind == "tune"}
    if timed:
        assert len(tuned) == 31
        assert tuned["tune kl on support"] > tuned["tune lora on support"]
        assert all(work.seconds and work.seconds > 0.0 for work in plan.work)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", TUNABLE)
def test_targets_hold_enough_to_train_on_and_share_no_question(
    name: str, store: AssetStore
) -> None:
    task = load_target(name, store)
    assert len(task.train) >= 60
    splits = [task.train, task.demonstrations, task.validation, task.test]
    questions = [{example.input.strip().casefold() for example in split} for split in splits]
    assert sum(map(len, questions)) == len(set().union(*questions))

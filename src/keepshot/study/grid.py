"""What a study asks, and its expansion to units of work: pure, no torch, no model.

    models x targets x recipes x seeds  ->  tune      one model directory, made once
    base | tuned | blend, x asks x splits ->  measure   one record of rows, made once

A unit's identity is the fingerprint of all that can change its result, so that what two parts of
a study share (a base under every recipe) is one unit, and is done once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from keepshot.errors import ConfigError, unknown
from keepshot.records import Split
from keepshot.specs import Spec, apply_overrides
from keepshot.study.asks import Ask, Stage
from keepshot.tasks.catalog import SUITES
from keepshot.tuning.keep import Mix, anchor_names, find_term
from keepshot.tuning.method_specs import prompt_tokens
from keepshot.tuning.recipe import Recipe

UNIT_VERSION = 1
"""Raised when the same unit would give another result than before."""
MOST_UNITS = 2000
"""Units that a study may have without being told that it is meant."""
TARGET = "target"
"""Stands among an ask's tasks for what the model was tuned for; of a base, for all targets."""


class StudiedModel(Spec):
    """One model of a study, as it is before this study tunes it."""

    reference: str
    """Model reference: embedded name, hub id with `@revision`, directory or `.gguf` file."""
    name: str | None = None
    """What tables call it; the reference if left out."""
    family: str | None = None
    """Models of one family are not independent, and are resampled together; its name if left out.
    """
    tags: Mapping[str, str | int | float | bool] = {}
    """Further columns of the frame, such as `dose: 0.1` or `tuned_already: true`."""

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.name or self.reference


class Blends(Spec):
    """Points between a base and its tuned models that are measured as models of their own."""

    lambdas: tuple[float, ...] = Field(min_length=1)
    """Shares of the difference; 0 and 1 are the base and the tuned model, and are not repeated."""
    recipes: tuple[str, ...] = ("*",)
    """Patterns of the recipes whose models are blended."""


class Exclusion(Spec):
    """Units that are left out: those that match every key given; patterns such as `lora*`."""

    models: tuple[str, ...] | None = None
    """Names of models."""
    targets: tuple[str, ...] | None = None
    """Names of targets."""
    recipes: tuple[str, ...] | None = None
    """Names of recipes."""
    seeds: tuple[int, ...] | None = None
    """Seeds of tuning."""
    asks: tuple[str, ...] | None = None
    """Names of asks; with this, models are tuned all the same."""
    splits: tuple[Split, ...] | None = None
    """Splits; as for asks."""
    lambdas: tuple[float, ...] | None = None
    """Lambdas; as for asks."""

    @model_validator(mode="after")
    def _check_some(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("an exclusion without keys leaves everything out; give a key")
        return self

    def matches(self, subject: Subject, ask: str | None = None, split: str | None = None) -> bool:
        """Say whether this leaves out what is given; of tuning, `ask` and `split` are None."""
        named = (
            (self.models, subject.model),
            (self.targets, subject.target),
            (self.recipes, subject.recipe),
            (self.asks, ask),
            (self.splits, split),
        )
        if any(p is not None and not _named(value, p) for p, value in named):
            return False
        numbers = ((self.seeds, subject.seed), (self.lambdas, subject.lam))
        return all(wanted is None or value in wanted for wanted, value in numbers)


class StudySpec(Spec):
    """`keepshot study`: the axes of a study, and what every model is asked."""

    no_effect_on_results = frozenset({"question", "keep_models"})

    name: str = Field(default="study", pattern=r"^[\w.-]+$")
    """Name of the study, and of its directory under `runs` where none is given."""
    question: str = ""
    """What it is to find out; heads the report."""
    models: tuple[StudiedModel, ...] = ()
    """The models before tuning; a bare reference will do."""
    targets: tuple[str, ...] = ()
    """What models are tuned for: task names or paths of examples files."""
    shared: Mapping[str, Any] = {}
    """Keys that every recipe has unless it says otherwise."""
    recipes: Mapping[str, Recipe] = {}
    """How they are tuned, by name: recipes as `keepshot tune` takes them, with `model`, `data` and
    `seed` filled in from the axes. `vary: {learning_rate: [1e-5, 1e-4]}` makes one of each."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Seeds of tuning."""
    blends: Blends | None = None
    """Points between base and tuned models; none if left out."""
    asks: Mapping[str, Ask] = Field(default={"few-shot": Ask()}, min_length=1)
    """What models are asked, by name."""
    exclude: tuple[Exclusion, ...] = ()
    """What is left out of all this."""
    seed: int = Field(default=0, ge=0)
    """First draw of demonstrations."""
    device: str = "cpu"
    """Torch device."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Torch dtype of the weights."""
    trust_remote_code: bool = False
    """Run code that a checkpoint brings along."""
    keep_models: bool = False
    """Keep tuned models once all that needs them is measured; else they are deleted."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        models = content.get("models", ())
        if isinstance(models, list | tuple):
            models = [{"reference": one} if isinstance(one, str) else one for one in models]
        recipes = content.get("recipes", {})
        if isinstance(recipes, dict):
            shared = {"data": "-", **(content.get("shared") or {})}
            recipes = dict(_varied(recipes, shared))
        return {**content, "models": models, "recipes": recipes}

    @model_validator(mode="after")
    def _check_axes(self) -> Self:
        labels = [model.label for model in self.models]
        for what, names in (("model", labels), ("target", list(self.targets))):
            repeated = next((name for name in names if names.count(name) > 1), None)
            if repeated:
                raise ValueError(f"{what} {repeated!r} is named twice; name each once")
        if self.recipes and not self.targets:
            raise ValueError("there are recipes and no `targets` to tune for; name some")
        if any(not lam > 0.0 or lam == 1.0 for lam in (self.blends.lambdas if self.blends else ())):
            raise ValueError("`blends.lambdas` are above 0 and not 1: those are measured anyway")
        return self

    def recipe_of(self, subject: Subject, reference: str) -> Recipe:
        """Return the recipe by which a tuned subject is made from the model at `reference`."""
        assert subject.recipe is not None
        changes = {"model": reference, "data": subject.target, "seed": subject.seed}
        return self.recipes[subject.recipe].model_copy(update=changes)

    def model(self, label: str) -> StudiedModel:
        """Return the model of that label."""
        return next(model for model in self.models if model.label == label)

    @property
    def place(self) -> dict[str, Any]:
        """Where models are loaded, as far as it can change a result."""
        return {
            "dtype": self.dtype,
            "device": self.device.partition(":")[0],
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass(frozen=True)
class Subject:
    """A model that is asked: a base, one tuned from it, or a point between the two."""

    model: str
    target: str | None = None
    recipe: str | None = None
    seed: int | None = None
    lam: float | None = None

    @property
    def stage(self) -> Stage:
        """What it is."""
        if self.recipe is None:
            return "base"
        return "tuned" if self.lam is None else "blend"

    @property
    def label(self) -> str:
        """Words for tables."""
        if self.recipe is None:
            return self.model
        at = "" if self.lam is None else f", lambda {self.lam:g}"
        return f"{self.model}, {self.recipe} on {self.target}, seed {self.seed}{at}"


@dataclass(frozen=True)
class Unit:
    """One piece of work, done once: tuning a model, or asking one."""

    id: str
    kind: Literal["tune", "measure"]
    subject: Subject
    needs: str | None = None
    """The unit that makes the tuned model."""
    ask: str | None = None
    split: Split = "test"

    @property
    def label(self) -> str:
        """Words for tables."""
        if self.kind == "tune":
            return f"tune {self.subject.label}"
        return f"ask {self.subject.label}: {self.ask} ({self.split})"

    @property
    def holds(self) -> tuple[str, str | None]:
        """What must be in memory: a model, and a tuned one beside or in its place."""
        return self.subject.model, self.needs or (self.id if self.kind == "tune" else None)


@dataclass(frozen=True)
class Cell:
    """One place of the grid, and the unit that fills it."""

    subject: Subject
    ask: str
    split: Split
    unit: str


@dataclass(frozen=True)
class Grid:
    """All units by identity, in the order in which they are best done, and the grid they fill."""

    units: Mapping[str, Unit]
    cells: Sequence[Cell]
    tuned: Mapping[Subject, str] = field(default_factory=dict[Subject, str])
    """The unit that makes each tuned model."""

    @property
    def dependents(self) -> dict[str, list[str]]:
        """The units that need each tuning."""
        found: dict[str, list[str]] = {i: [] for i, u in self.units.items() if u.kind == "tune"}
        for unit in self.units.values():
            if unit.needs is not None:
                found[unit.needs].append(unit.id)
        return found


def expand(spec: StudySpec, contents: Mapping[str, str] | None = None) -> Grid:
    """Return the units of a study, each once.

    Args:
        spec: the study.
        contents: what names stand for (of models, tasks and files), such as a sha256 or a version;
            a unit's identity changes with them. A name that is not there stands for itself.

    Raises:
        ConfigError: if nothing is left to do.
    """
    known = contents or {}
    units: dict[str, Unit] = {}
    cells: list[Cell] = []
    tuned: dict[Subject, str] = {}
    tasks = {name: _resolved(ask, spec) for name, ask in spec.asks.items()}
    recipes = {name: recipe.model_dump(mode="json") for name, recipe in spec.recipes.items()}
    for subject in _subjects(spec):
        whole = Subject(subject.model, subject.target, subject.recipe, subject.seed)
        needs: str | None = None
        model = spec.model(subject.model)
        start = [UNIT_VERSION, spec.place, model.reference, known.get(model.reference)]
        if subject.recipe is not None:
            if any(rule.matches(whole) for rule in spec.exclude):
                continue
            needs = tuned.get(whole)
            if needs is None:
                asked = recipes[subject.recipe]
                read = _read_by(spec.recipes[subject.recipe], str(subject.target), known)
                needs = _identity("tune", [*start, asked, subject.target, subject.seed, read])
                tuned[whole] = needs
                units.setdefault(needs, Unit(needs, "tune", whole))
        for name, split in _asked(spec, subject):
            ask = spec.asks[name]
            names = tasks[name].get(subject.target, tasks[name][None])
            how = [ask.all_shots, ask.seeds, spec.seed, ask.limit, ask.template, split]
            how += ask.followed(known)
            given = [[one, known.get(one)] for one in names]
            identity = _identity("ask", [*start, needs, subject.lam, how, given])
            units.setdefault(identity, Unit(identity, "measure", subject, needs, name, split))
            cells.append(Cell(subject, name, split, identity))
    if not cells:
        raise ConfigError(
            f"study {spec.name!r} is empty: {len(spec.models)} models and {len(spec.asks)} asks, "
            f"{len(spec.exclude)} exclusions; name models, or leave less out"
        )
    _drop_unneeded(units)
    return Grid(units, cells, {s: i for s, i in tuned.items() if i in units})


def names_in(spec: StudySpec) -> tuple[list[str], list[str]]:
    """Return all tasks and files that the study reads: those that it asks, and those it tunes on.

    Raises:
        ConfigError: if an ask means the target of a study that has none.
    """
    asked = [n for ask in spec.asks.values() for n in _resolved(ask, spec)[None]]
    read = [
        name
        for recipe, target in itertools.product(spec.recipes.values(), spec.targets)
        for name in _data_of(recipe, target)
    ]
    return list(dict.fromkeys(asked)), list(dict.fromkeys([*spec.targets, *read]))


def tasks_of(spec: StudySpec, unit: Unit) -> list[str]:
    """Return the names of the tasks that a unit asks, its target by its own name."""
    assert unit.ask is not None
    found = _resolved(spec.asks[unit.ask], spec)
    return list(found.get(unit.subject.target, found[None]))


def check_size(grid: Grid, *, meant: bool) -> None:
    """Refuse a grid beyond `MOST_UNITS` unless it is meant.

    Raises:
        ConfigError: saying how large it is, and what makes it so.
    """
    if len(grid.units) <= MOST_UNITS or meant:
        return
    num_tuned = sum(unit.kind == "tune" for unit in grid.units.values())
    raise ConfigError(
        f"the study has {len(grid.units):,} units ({num_tuned:,} tunings, "
        f"{len(grid.units) - num_tuned:,} measurements), more than {MOST_UNITS:,};\n"
        "add --yes if that is meant, see --plan for what it takes, or shorten an axis"
    )


def _subjects(spec: StudySpec) -> Iterator[Subject]:
    for model in spec.models:
        yield Subject(model.label)
        for target, recipe, seed in itertools.product(spec.targets, spec.recipes, spec.seeds):
            yield Subject(model.label, target, recipe, seed)
            if spec.blends and _named(recipe, spec.blends.recipes):
                # A soft prompt has no place between a model and its base.
                if prompt_tokens(spec.recipes[recipe].method):
                    continue
                for lam in sorted(set(spec.blends.lambdas)):
                    yield Subject(model.label, target, recipe, seed, lam)


def _asked(spec: StudySpec, subject: Subject) -> Iterator[tuple[str, Split]]:
    for name, ask in spec.asks.items():
        if subject.stage not in ask.of:
            continue
        for split in ask.splits:
            if not any(rule.matches(subject, name, split) for rule in spec.exclude):
                yield name, split


def _resolved(ask: Ask, spec: StudySpec) -> dict[str | None, tuple[str, ...]]:
    """Return the tasks of an ask by target, and under None those of a base."""
    if TARGET in ask.tasks and not spec.targets:
        raise ConfigError("an ask means `target`, and the study has no `targets`; name some")

    def tasks(targets: Sequence[str]) -> tuple[str, ...]:
        named = [n for one in ask.tasks for n in (targets if one == TARGET else [one])]
        return tuple(dict.fromkeys(n for one in named for n in SUITES.get(one, (one,))))

    return {None: tasks(spec.targets), **{target: tasks([target]) for target in spec.targets}}


def _data_of(recipe: Recipe, target: str) -> list[str]:
    """Return the names of all that a recipe reads besides the model."""
    anchors = anchor_names(recipe.keep)
    mix = find_term(recipe.keep, Mix)
    parts = [target, *(anchors.split(",") if anchors else [])]
    if mix is not None and mix.general_data is not None:
        parts.append(mix.general_data)
    named = [part.strip() for part in parts]
    return [name for one in named for name in SUITES.get(one, (one,))]


def _read_by(recipe: Recipe, target: str, known: Mapping[str, str]) -> list[list[str | None]]:
    return [[name, known.get(name)] for name in _data_of(recipe, target)]


def _identity(kind: str, content: Sequence[Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _drop_unneeded(units: dict[str, Unit]) -> None:
    """Take out tunings of which nothing is measured."""
    needed = {unit.needs for unit in units.values()}
    for identity in [i for i, u in units.items() if u.kind == "tune" and i not in needed]:
        del units[identity]


def _named(value: str | None, patterns: Sequence[str]) -> bool:
    return value is not None and any(fnmatchcase(value, pattern) for pattern in patterns)


def _varied(
    recipes: Mapping[str, Any], shared: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any] | Any]]:
    """Yield recipes with the shared keys, and one for each value of those that vary."""
    for name, own in recipes.items():
        if not isinstance(own, dict):
            yield name, own
            continue
        whole = {**shared, **own}
        vary = whole.pop("vary", {})
        if not isinstance(vary, dict) or not all(isinstance(v, list) for v in vary.values()):
            raise ConfigError(
                f"recipe {name!r}: `vary` = {vary!r}: expected lists, such as "
                "{learning_rate: [1e-5, 1e-4]}"
            )
        for values in itertools.product(*vary.values()):
            pairs = list(zip(vary, values, strict=True))
            words = [f"{key.rpartition('.')[2]}={value}" for key, value in pairs]
            changed = apply_overrides(whole, [f"{k}={json.dumps(v)}" for k, v in pairs])
            yield " ".join([name, *words]), changed


def check_patterns(spec: StudySpec) -> None:
    """Check that every pattern of exclusions and blends matches something.

    Raises:
        ConfigError: naming the pattern, with what there is.
    """
    blended = (spec.blends.recipes if spec.blends else (), list(spec.recipes), "recipe")
    labels = [model.label for model in spec.models]
    checks = [blended]
    for rule in spec.exclude:
        checks += [
            (rule.models or (), labels, "model"),
            (rule.targets or (), list(spec.targets), "target"),
            (rule.recipes or (), list(spec.recipes), "recipe"),
            (rule.asks or (), list(spec.asks), "ask"),
        ]
    for patterns, names, what in checks:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                listing = f"the study has {', '.join(names) or 'none'}"
                raise ConfigError(unknown(what, pattern, names, listing))

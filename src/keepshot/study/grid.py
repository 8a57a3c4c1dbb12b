"""A study's expansion to units of work: pure, no torch, no model.

    models that are made                ->  make      one model directory, made once
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
from pathlib import Path
from typing import Any, Literal

from keepshot.errors import ConfigError
from keepshot.records import Split
from keepshot.study.asks import Ask, Written
from keepshot.study.spec import TARGET, StudiedModel, StudySpec, Subject, is_named
from keepshot.tasks.catalog import SUITES
from keepshot.tuning.keep import Mix, anchor_names, find_term
from keepshot.tuning.method_specs import prompt_tokens
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.samplegen import is_plain

UNIT_VERSION = 1
"""Raised when the same unit would give another result than before."""
MOST_UNITS = 2000
"""Units that a study may have without being told that it is meant."""


@dataclass(frozen=True)
class Unit:
    """One piece of work, done once: making a model, tuning one, or asking one."""

    id: str
    kind: Literal["make", "tune", "measure"]
    subject: Subject
    needs: str | None = None
    """The unit that makes the tuned model."""
    made: str | None = None
    """The unit that makes the model that is asked or tuned, where one does."""
    ask: str | None = None
    split: Split = "test"
    settings: tuple[Written, ...] = ()
    """Of the ask's settings, those whose demonstrations a model writes; none for the others."""

    @property
    def label(self) -> str:
        """Words for tables."""
        if self.kind != "measure":
            return f"{self.kind} {self.subject.label}"
        return f"ask {self.subject.label}: {self.asked}"

    @property
    def asked(self) -> str:
        """Words for what is asked."""
        settings = f", {' and '.join(self.settings)}" if self.settings else ""
        return f"{self.ask}{settings} ({self.split})"

    @property
    def holds_two(self) -> bool:
        """Whether the model before tuning and the tuned one are in memory together."""
        return self.subject.lam is not None or "pipeline" in self.settings

    @property
    def requires(self) -> tuple[str, ...]:
        """The units whose models this one reads."""
        return tuple(unit for unit in (self.made, self.needs) if unit is not None)

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
        """The units that need each model that is made or tuned."""
        makers = [i for i, unit in self.units.items() if unit.kind != "measure"]
        found: dict[str, list[str]] = {identity: [] for identity in makers}
        for unit in self.units.values():
            for required in unit.requires:
                found[required].append(unit.id)
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
    models = {model.label: model for model in spec.models}
    for subject in _subjects(spec):
        whole = Subject(subject.model, subject.target, subject.recipe, subject.seed)
        needs: str | None = None
        model = models[subject.model]
        start, made = _start(spec, model, known)
        if made is not None:
            units.setdefault(made, Unit(made, "make", Subject(subject.model)))
        if subject.recipe is not None:
            if any(rule.matches(whole) for rule in spec.exclude):
                continue
            needs = tuned.get(whole)
            if needs is None:
                asked = recipes[subject.recipe]
                read = _read_by(spec.recipes[subject.recipe], str(subject.target), known)
                needs = _identity("tune", [*start, asked, subject.target, subject.seed, read])
                tuned[whole] = needs
                units.setdefault(needs, Unit(needs, "tune", whole, made=made))
        for name, split in _asked(spec, subject):
            ask = spec.asks[name]
            names = tasks[name].get(subject.target, tasks[name][None])
            given = [[one, known.get(one)] for one in names]
            for settings in _measured_apart(spec, ask, subject):
                how = ask.how(settings, split, spec.seed, known)
                identity = _identity("ask", [*start, needs, subject.lam, how, given])
                asking = Unit(identity, "measure", subject, needs, made, name, split, settings)
                units.setdefault(identity, asking)
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


def check_names(spec: StudySpec) -> None:
    """Check that no two files have one name: rows know a file by its own name alone.

    Raises:
        ConfigError: naming the two.
    """
    places: dict[str, str] = {}
    asked, _ = names_in(spec)
    for path in dict.fromkeys([*asked, *spec.targets]):
        # Of what is no file the last part is told from nothing else either.
        name = Path(path).name
        other = places.setdefault(name, path)
        if other != path:
            raise ConfigError(
                f"{other!r} and {path!r} would both be task {name!r}, and their rows one; rename "
                "one of the files"
            )


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
            if spec.blends and is_named(recipe, spec.blends.recipes):
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


def _measured_apart(spec: StudySpec, ask: Ask, subject: Subject) -> Iterator[tuple[Written, ...]]:
    """Yield the settings of each unit of an ask; none for the one without written ones."""
    if ask.all_shots:
        yield ()
    recipe = spec.recipes[subject.recipe] if subject.recipe is not None else None
    if ask.written and subject.stage == "tuned" and recipe and not is_plain(recipe.samples):
        yield ask.written


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


def _start(
    spec: StudySpec, model: StudiedModel, known: Mapping[str, str]
) -> tuple[list[Any], str | None]:
    """Return what identifies a model before it is tuned, and the unit that makes it, if any."""
    start = [UNIT_VERSION, spec.place, model.reference, known.get(model.reference)]
    if model.making is None:
        return start, None
    made = _identity("make", [*start, model.making])
    return [*start, made], made


def _identity(kind: str, content: Sequence[Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _drop_unneeded(units: dict[str, Unit]) -> None:
    """Take out tunings of which nothing is measured, then models that nothing is made of."""
    for kind in ("tune", "make"):
        needed = {required for unit in units.values() for required in unit.requires}
        for identity in [i for i, u in units.items() if u.kind == kind and i not in needed]:
            del units[identity]

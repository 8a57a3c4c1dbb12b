"""What a study asks: its axes, what is left out, and whom it asks; pure, no torch, no model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from keepshot.errors import ConfigError, unknown
from keepshot.models.made import MAKING_VERSION, Degradation, FromScratch
from keepshot.records import Split
from keepshot.specs import Spec, apply_overrides, is_none
from keepshot.study.asks import Ask, Stage, check_once
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.samplegen import is_plain

TARGET = "target"
"""Stands among an ask's tasks for what the model was tuned for; of a base, for all targets."""


class StudiedModel(Spec):
    """One model of a study, as it is before this study tunes it: found, degraded, or made here."""

    reference: str = ""
    """Model reference: embedded name, hub id with `@revision`, directory or `.gguf` file."""
    name: str | None = None
    """What tables call it; the reference if left out."""
    family: str | None = None
    """Models of one family are not independent, and are resampled together; its name if left out.
    """
    tags: Mapping[str, str | int | float | bool] = {}
    """Further columns of the frame, such as `dose: 0.1` or `tuned_already: true`."""
    degrade: Degradation | None = Field(default=None, exclude_if=is_none)
    """Harm done to the reference's model first; gives the columns `degraded` and `dose`."""
    from_scratch: FromScratch | None = Field(default=None, exclude_if=is_none)
    """Makes a model in place of a reference; gives `architecture`, `width`, `depth`, `steps`."""

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if bool(self.reference) == (self.from_scratch is not None):
            raise ValueError("a model has either a `reference` or `from_scratch`")
        if self.from_scratch is not None and (self.name is None or self.degrade is not None):
            raise ValueError("a model `from_scratch` needs a `name`, and is not degraded")
        both = sorted(self.tags.keys() & self._made_columns.keys())
        if both:
            raise ValueError(f"tag {both[0]!r} is a column of a model that is made; rename it")
        return self

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.name or self.reference

    @property
    def columns(self) -> dict[str, str | int | float | bool]:
        """Its tags, and how it was made."""
        return {**self._made_columns, **self.tags}

    @property
    def like(self) -> str:
        """What models of the same structure, and so of the same cost, have in common."""
        if self.from_scratch is not None:
            made = self.from_scratch
            return f"{made.architecture} {made.width}x{made.depth}"
        return f"{self.reference}, degraded" if self.degrade else self.label

    @property
    def reads(self) -> str:
        """What models that split texts alike have in common."""
        return self.reference or "words"

    @property
    def making(self) -> list[Any] | None:
        """What identifies how it is made; None for a model that is there."""
        made = self.degrade or self.from_scratch
        return None if made is None else [MAKING_VERSION, made.model_dump(mode="json")]

    @property
    def _made_columns(self) -> dict[str, str | int | float | bool]:
        if self.degrade is not None:
            return {"degraded": self.degrade.kind, "dose": self.degrade.dose}
        if self.from_scratch is not None:
            named = ("architecture", "width", "depth", "steps")
            return {name: getattr(self.from_scratch, name) for name in named}
        return {}


class Blends(Spec):
    """Points between a base and its tuned models that are measured as models of their own."""

    lambdas: tuple[float, ...] = Field(min_length=1)
    """Shares of the difference; 0 and 1 are the base and the tuned model, and are not repeated."""
    recipes: tuple[str, ...] = ("*",)
    """Patterns of the recipes whose models are blended."""


class Exclusion(Spec):
    """Units that are left out: those that match every key given; patterns such as `lora*`.

    The name of a recipe or a model that varies stands for all its variants.
    """

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
        if any(p is not None and not is_named(value, p) for p, value in named):
            return False
        numbers = ((self.seeds, subject.seed), (self.lambdas, subject.lam))
        return all(wanted is None or value in wanted for wanted, value in numbers)


class StudySpec(Spec):
    """`keepshot study`: the axes of a study, and what every model is asked."""

    no_effect_on_results = frozenset({"question", "keep_models"})

    name: str = Field(default="study", pattern=r"^\w[\w.-]*$")
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
            models = [one for entry in models for one in _each_model(entry)]
        recipes = content.get("recipes", {})
        if isinstance(recipes, dict):
            given = content.get("shared") or {}
            if not isinstance(given, dict):
                raise ValueError(
                    f"`shared` = {given!r}: expected keys that every recipe has, such as {{steps: "
                    "60}"
                )
            shared = {"data": "-", **given}
            recipes = dict(_varied(recipes, shared))
        return {**content, "models": models, "recipes": recipes}

    @model_validator(mode="after")
    def _check_axes(self) -> Self:
        labels = [model.label for model in self.models]
        named = (("model", labels), ("target", list(self.targets)), ("seed", list(self.seeds)))
        for what, names in named:
            check_once(what, names)
        if self.recipes and not self.targets:
            raise ValueError("there are recipes and no `targets` to tune for; name some")
        writing = any(not is_plain(recipe.samples) for recipe in self.recipes.values())
        for name, ask in self.asks.items():
            if ask.written and not writing:
                raise ValueError(
                    f"ask {name!r} has setting {ask.written[0]!r}, which models tuned to write "
                    "demonstrations are asked; give a recipe `samples: samplegen`"
                )
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
            if not any(is_named(name, [pattern]) for name in names):
                listing = f"the study has {', '.join(names) or 'none'}"
                raise ConfigError(unknown(what, pattern, names, listing))


def is_named(value: str | None, patterns: Sequence[str]) -> bool:
    """Say whether a name fits one of some patterns; that of what varies fits all its variants."""
    wanted = [form for pattern in patterns for form in (pattern, f"{pattern} *=*")]
    return value is not None and any(fnmatchcase(value, pattern) for pattern in wanted)


def _each_model(entry: Any) -> Iterator[Any]:
    """Yield a model, or one for each value of what varies, named after it."""
    if not isinstance(entry, dict) or "vary" not in entry:
        yield entry
        return
    label = str(entry.get("name") or entry.get("reference") or "a model")
    for name, changed in _each_value(f"model {label!r}", label, entry):
        yield {**changed, "name": name}


def _varied(
    recipes: Mapping[str, Any], shared: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any] | Any]]:
    """Yield recipes with the shared keys, and one for each value of those that vary."""
    for name, own in recipes.items():
        if not isinstance(own, dict):
            yield name, own
            continue
        yield from _each_value(f"recipe {name!r}", name, {**shared, **own})


def _each_value(
    what: str, name: str, content: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    whole = dict(content)
    vary = whole.pop("vary", {})
    if not isinstance(vary, dict) or not all(isinstance(v, list) and v for v in vary.values()):
        raise ConfigError(
            f"{what}: `vary` = {vary!r}: expected lists of at least one value, such as "
            "{learning_rate: [1e-5, 1e-4]}"
        )
    for values in itertools.product(*vary.values()):
        pairs = list(zip(vary, values, strict=True))
        words = [f"{key.rpartition('.')[2]}={value}" for key, value in pairs]
        changed = apply_overrides(whole, [f"{k}={json.dumps(v)}" for k, v in pairs])
        yield " ".join([name, *words]), changed

"""What is asked of a tuning run: data, method, keep terms and schedule, as frozen specs.

Knows no torch and no model. Defaults follow what was measured on small instruct models; the rank,
`alpha = 2r` and all-linear targets of LoRA follow arXiv 2405.09673.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from keepshot.errors import ConfigError, unknown
from keepshot.specs import Spec
from keepshot.tuning.method_specs import (
    LoRA,
    Method,
    PromptTuning,
    default_learning_rate,
    parse_method,
)


class KL(Spec):
    """Kullback-Leibler divergence to the untuned model on few-shot prompts of anchor tasks."""

    name: Literal["kl"] = "kl"
    """Tag of this term."""
    weight: PositiveFloat = 5.0
    """Factor of this term in the loss, in nats per marked position."""
    direction: Literal["forward", "reverse"] = "forward"
    """`forward` is KL(untuned || tuned), `reverse` is KL(tuned || untuned)."""
    positions: Literal["answers", "all"] = "answers"
    """Where the two are compared: at the tokens of every answer (and its end), or everywhere."""
    prompts_per_step: PositiveInt = 4
    """Anchor prompts in each step."""
    shots: tuple[PositiveInt, PositiveInt] = (2, 8)
    """Fewest and most demonstrations in an anchor prompt."""
    prompts: PositiveInt = 96
    """Size of the pool of prompts; fewer if their cached probabilities would not fit `cache_mb`."""
    cache_mb: PositiveInt = 384
    """Most megabytes for the untuned model's probabilities, which are computed once."""
    tasks: str = "anchors"
    """Suite, tasks or example files (comma-separated) from which the prompts are drawn."""

    @model_validator(mode="after")
    def _check_shots(self) -> Self:
        if self.shots[0] > self.shots[1]:
            raise ValueError("the fewest shots come first, such as [2, 8]")
        return self


class Mix(Spec):
    """Other samples in place of a share of each batch: few-shot prompts, and general data."""

    name: Literal["mix"] = "mix"
    """Tag of this term."""
    icl_share: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Share of each batch that is `shots` demonstrations and a query, whose answer is learned."""
    shots: PositiveInt = 3
    """Demonstrations in each of those samples."""
    tasks: str = "anchors"
    """Suite, tasks or example files (comma-separated) from which they are drawn."""
    general_share: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each batch that comes from `general_data`."""
    general_data: str | None = None
    """Path of an examples file with general instructions."""

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.icl_share + self.general_share >= 1.0:
            raise ValueError("icl_share and general_share leave no room for the target")
        if self.icl_share + self.general_share == 0.0:
            raise ValueError("nothing to mix in; give icl_share or general_share, or drop the term")
        if (self.general_share > 0.0) != (self.general_data is not None):
            raise ValueError("general_share and general_data are given together or not at all")
        return self


Term = Annotated[KL | Mix, Field(discriminator="name")]
TERMS: tuple[str, ...] = ("kl", "mix")
_T = TypeVar("_T", KL, Mix)


class Recipe(Spec):
    """One tuning run."""

    no_effect_on_results: ClassVar[frozenset[str]] = frozenset({"save_every"})

    model: str = "smollm2-135m-instruct"
    """Reference of the model to tune."""
    data: str
    """Task name, or path of an examples file."""
    method: Method = LoRA()
    """Which parameters train."""
    keep: tuple[Term, ...] = ()
    """Terms that hold on to few-shot ability; empty for plain tuning."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate of AdamW; left out, the method's default."""
    steps: PositiveInt | None = None
    """Optimiser steps; left out, what `epochs` gives."""
    epochs: PositiveFloat = 3.0
    """Passes over the data, where `steps` is left out."""
    batch_size: PositiveInt = 16
    """Samples in each step, apart from a KL term's prompts."""
    max_length: PositiveInt | None = None
    """Longest sample in tokens; left out, the model's context length."""
    long_rows: Literal["error", "drop"] = "error"
    """What happens to longer samples. Dropped ones are counted in the record; none is ever cut."""
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the steps in which the learning rate rises from zero."""
    scheduler: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate goes on after that."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """AdamW's decoupled weight decay of matrices; it pulls towards zero, not towards the base."""
    max_grad_norm: PositiveFloat = 1.0
    """The gradient of all parameters together is scaled down to this norm."""
    seed: int = Field(default=0, ge=0)
    """Fixes the order of samples, the adapter's initial weights and the anchor prompts."""
    save_every: PositiveInt = 50
    """Steps between resume states, where a directory for them is given."""

    @model_validator(mode="after")
    def _check_terms(self) -> Self:
        names = [term.name for term in self.keep]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"term {repeated[0]!r} is given twice")
        if len({term.tasks for term in self.keep}) > 1:
            raise ValueError("the terms draw from different `tasks`; give both the same")
        if self.keep and isinstance(self.method, PromptTuning):
            raise ValueError(
                f"term {names[0]!r} would reach nothing that trains: prompt-tuning leaves the "
                "model as it is, and other tasks do not see the prompt; leave the terms out"
            )
        return self

    def resolved(self, num_rows: int) -> Recipe:
        """Return this recipe with learning rate and steps filled in for `num_rows` samples."""
        rate = self.learning_rate or default_learning_rate(self.method)
        steps = self.steps or max(1, round(self.epochs * num_rows / self.batch_size))
        return self.model_copy(update={"learning_rate": rate, "steps": steps})


def parse_keep(text: str) -> tuple[KL | Mix, ...]:
    """Return the terms that `--keep` names: `auto`, `none`, or names joined by commas.

    `auto` is the KL term: of what was tried, it alone kept few-shot ability on tasks that the
    anchors do not resemble, at no cost to the target.

    Raises:
        ConfigError: if there is no such term.
    """
    match text:
        case "auto":
            return (KL(),)
        case "none":
            return ()
        case _:
            return tuple(_term(name.strip()) for name in text.split(","))


def _term(text: str) -> KL | Mix:
    for term in (KL(), Mix()):
        if term.name == text:
            return term
    names = ("auto", "none", *TERMS)
    raise ConfigError(unknown("keep term", text, names, f"choices are {', '.join(names)}"))


def auto(data: str, *, model: str, keep: str = "auto", method: str | None = None) -> Recipe:
    """Return the recipe that the command line means by `--keep auto`: LoRA held by a KL term.

    Args:
        data: task name or path of an examples file.
        model: reference of the model.
        keep: as `parse_keep` reads it.
        method: as `parse_method` reads it; LoRA if left out.

    Raises:
        ConfigError: if the method or a term is unknown.
    """
    chosen = LoRA() if method is None else parse_method(method)
    if keep == "auto" and isinstance(chosen, PromptTuning):
        keep = "none"  # the model itself does not change
    return Recipe(model=model, data=data, method=chosen, keep=parse_keep(keep))


def find_term(keep: Sequence[KL | Mix], kind: type[_T]) -> _T | None:
    """Return the term of one kind, or None."""
    return next((term for term in keep if isinstance(term, kind)), None)

"""What holds on to few-shot ability while tuning: the keep terms, as frozen specs.

Two kinds: what changes the data (`mix`, `stm`, `self-distil`), and what is added to the loss.
Knows no torch and no model; what a term computes is in `terms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from keepshot.errors import ConfigError, unknown
from keepshot.specs import Spec

Learned = Literal["last", "every"]
OWN = "self"
"""What `tasks` says where the untuned model writes its own anchors."""


class KL(Spec):
    """Kullback-Leibler divergence to the untuned model on few-shot prompts of anchor tasks."""

    name: Literal["kl"] = "kl"
    """Tag of this term."""
    weight: PositiveFloat = 5.0
    """Factor of this term in the loss, in nats per marked position."""
    direction: Literal["forward", "reverse", "k3"] = "forward"
    """`forward` is KL(untuned || tuned), `reverse` is KL(tuned || untuned), `k3` an estimate of the
    latter that reads only the prompts' own tokens, so that next to nothing is cached."""
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
    top_k: PositiveInt | None = None
    """Of each cached distribution only the likeliest tokens, and what is left as one more; left
    out, all of it. For `forward` and `reverse`."""
    tasks: str = "anchors"
    """Suite, tasks or example files (comma-separated) from which the prompts are drawn, or `self`:
    the untuned model writes them."""

    @model_validator(mode="after")
    def _check_shots(self) -> Self:
        if self.shots[0] > self.shots[1]:
            raise ValueError("the fewest shots come first, such as [2, 8]")
        if self.top_k is not None and self.direction == "k3":
            raise ValueError("`top_k` has no use with k3, which caches one number a token")
        return self


class Mix(Spec):
    """Other samples in place of a share of each batch: few-shot prompts, and general data."""

    name: Literal["mix"] = "mix"
    """Tag of this term."""
    icl_share: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Share of each batch that is `shots` demonstrations and a query, whose answer is learned."""
    icl_from: Literal["tasks", "data"] = "tasks"
    """Whether those are examples of `tasks`, or a window that slides over the target's own."""
    shots: PositiveInt = 3
    """Demonstrations in each of those samples."""
    learned: Learned = "last"
    """`last` learns the query's answer (arXiv 2110.15943), `every` all answers of the sample
    (many-shot tuning, arXiv 2506.11103)."""
    labels: Literal["own", "symbols"] = "own"
    """`symbols` puts arbitrary words in the labels' places, others in each sample, so that they can
    only be read off the demonstrations (arXiv 2305.08298); for classification."""
    tasks: str = "anchors"
    """Suite, tasks or example files (comma-separated) from which they are drawn, or `self`."""
    general_share: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each batch that comes from `general_data`."""
    general_data: str | None = None
    """General instructions: `instructions` (embedded, 30 kinds), `instructions-homogeneous` (as
    many of one kind), another task to tune on, the path of an examples file, or a data set of the
    hub, `hub:OWNER/NAME` or `hub:OWNER/NAME:SPLIT`, also a local directory of that layout."""

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.icl_share + self.general_share >= 1.0:
            raise ValueError("icl_share and general_share leave no room for the target")
        if self.icl_share + self.general_share == 0.0:
            raise ValueError("nothing to mix in; give icl_share or general_share, or drop the term")
        if self.icl_from == "data" and self.tasks != "anchors":
            raise ValueError("`tasks` has no use with icl_from: data; leave one of them out")
        if (self.general_share > 0.0) != (self.general_data is not None):
            raise ValueError("general_share and general_data are given together or not at all")
        if self.icl_share == 0.0:
            self._check_unused()
        return self

    def _check_unused(self) -> None:
        fields = type(self).model_fields
        of_prompts = ("icl_from", "shots", "learned", "labels", "tasks")
        unused = [name for name in of_prompts if getattr(self, name) != fields[name].default]
        if unused:
            raise ValueError(f"{', '.join(unused)} has no use with icl_share: 0; leave it out")

    def counts(self, batch_size: int) -> tuple[int, int]:
        """Return how many samples of a batch are few-shot prompts, and general data.

        At least one of each that has a share.
        """
        few_shot, general = (
            max(1, round(share * batch_size)) if share > 0.0 else 0
            for share in (self.icl_share, self.general_share)
        )
        return few_shot, general


class FewShot(Spec):
    """Auxiliary loss on few-shot prompts of the target itself (arXiv 2602.23197)."""

    name: Literal["few-shot"] = "few-shot"
    """Tag of this term."""
    weight: PositiveFloat = 1.0
    """Factor of this term in the loss at the first step, in nats per answer token."""
    final_weight: NonNegativeFloat | None = None
    """Factor at the last step, reached in equal steps; left out, `weight` stays."""
    shots: PositiveInt = 4
    """Demonstrations in each prompt."""
    learned: Learned = "last"
    """Whether the query's answer counts, or every answer of the prompt."""
    prompts_per_step: PositiveInt = 4
    """Prompts in each step, besides the batch."""


class L2SP(Spec):
    """Half the squared distance of what trains from its starting point (arXiv 1802.01483)."""

    name: Literal["l2-sp"] = "l2-sp"
    """Tag of this term."""
    weight: PositiveFloat = 1.0
    """Factor of this term in the loss. Of adapters the adapter's own weights are held, which start
    where they change nothing."""


class EWC(Spec):
    """L2-SP with each weight held as firmly as the untuned few-shot answers depend on it."""

    name: Literal["ewc"] = "ewc"
    """Tag of this term: elastic weight consolidation with a diagonal Fisher (arXiv 1612.00796)."""
    weight: PositiveFloat = 400.0
    """Factor of this term in the loss."""
    prompts: PositiveInt = 32
    """Anchor prompts from which the Fisher information is estimated, once."""
    shots: tuple[PositiveInt, PositiveInt] = (2, 8)
    """Fewest and most demonstrations in such a prompt."""
    tasks: str = "anchors"
    """Suite, tasks or example files (comma-separated) from which the prompts are drawn, or `self`:
    the untuned model writes them."""

    @model_validator(mode="after")
    def _check_shots(self) -> Self:
        if self.shots[0] > self.shots[1]:
            raise ValueError("the fewest shots come first, such as [2, 8]")
        return self


class TokenMask(Spec):
    """Answer tokens that the untuned model finds unlikely are left out of the loss (STM)."""

    name: Literal["stm"] = "stm"
    """Tag of this term: selective token masking (arXiv 2501.14315)."""
    threshold: float = Field(default=2.5, gt=1.0)
    """Highest perplexity, under the untuned model and given what precedes, of a token that is
    learned. Short labels under a new format are often all above it: such rows are left out."""


class SelfDistil(Spec):
    """The untuned model rewrites the target's answers; what agrees with them is learned instead."""

    name: Literal["self-distil"] = "self-distil"
    """Tag of this term: self-distilled targets (arXiv 2402.13669)."""
    max_new_tokens: PositiveInt = 128
    """Longest rewriting in tokens; a longer one is not taken. It changes the wording of answers,
    so a target judged by exact match loses by it; for answers in sentences."""


KeepTerm = KL | Mix | FewShot | L2SP | EWC | TokenMask | SelfDistil
Term = Annotated[KeepTerm, Field(discriminator="name")]
KEEP_TERMS: tuple[KeepTerm, ...] = (
    KL(), Mix(), FewShot(), L2SP(), EWC(), TokenMask(), SelfDistil(),
)  # fmt: skip
"""Every term with its defaults."""
TERMS: tuple[str, ...] = tuple(term.name for term in KEEP_TERMS)
_T = TypeVar("_T", bound=Spec)


def parse_keep(text: str) -> tuple[KeepTerm, ...]:
    """Return the terms that `--keep` names: `none`, or names joined by commas.

    Raises:
        ConfigError: if there is no such term, or `auto` or `none` stands beside others.
    """
    if text == "none":
        return ()
    names = [name.strip() for name in text.split(",")]
    alone = [name for name in names if name in ("auto", "none")]
    if alone:
        raise ConfigError(
            f"--keep {text!r}: {alone[0]!r} stands alone; give it by itself, or terms without it"
        )
    return tuple(_term(name) for name in names)


def _term(text: str) -> KeepTerm:
    for term in KEEP_TERMS:
        if term.name == text:
            return term
    names = ("auto", "none", *TERMS)
    raise ConfigError(unknown("keep term", text, names, f"choices are {', '.join(names)}"))


def find_term(keep: Sequence[KeepTerm], kind: type[_T]) -> _T | None:
    """Return the term of one kind, or None."""
    return next((term for term in keep if isinstance(term, kind)), None)


def check_terms(keep: Sequence[KeepTerm]) -> None:
    """Check that each term comes once, and that all draw from the same anchor tasks.

    Raises:
        ValueError: if not.
    """
    names = [term.name for term in keep]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"term {repeated[0]!r} is given twice")
    if len(_drawn_from(keep)) > 1:
        raise ValueError("the terms draw from different `tasks`; give all the same")


def anchor_names(keep: Sequence[KeepTerm]) -> str | None:
    """Return the `tasks` from which the terms draw prompts; None if none of them does."""
    return next(iter(_drawn_from(keep)), None)


def _drawn_from(keep: Sequence[KeepTerm]) -> list[str]:
    drawing = [
        term.tasks
        for term in keep
        if isinstance(term, KL | EWC)
        or (isinstance(term, Mix) and term.icl_share > 0.0 and term.icl_from == "tasks")
    ]
    return list(dict.fromkeys(drawing))

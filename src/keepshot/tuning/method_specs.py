"""The methods that a recipe can name, as frozen specs: which parameters train, in which stages.

A spec's `name` is its tag in a recipe, its `--method` on the command line and its name in records.
Knows no torch and no model; `methods` turns these into parameters, `stages` into runs.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self, assert_never

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from keepshot.errors import ConfigError, unknown
from keepshot.specs import Spec


class Full(Spec):
    """Every parameter trains."""

    name: Literal["full"] = "full"
    """Tag of this method."""


class LoRA(Spec):
    """Low-rank adapters beside frozen weights; DoRA trains row lengths too, rsLoRA scales more."""

    name: Literal["lora", "dora", "rslora"] = "lora"
    """Tag of this method: LoRA (arXiv 2106.09685), DoRA (2402.09353) or rsLoRA (2312.03732)."""
    rank: PositiveInt = 16
    """Rank of each adapter; `alpha` is twice this. No more than the adapted matrix has."""
    targets: Literal["query-value", "value", "attention", "all-linear"] = "all-linear"
    """Which linear layers get an adapter; `attention` is queries, keys, values and outputs. The
    output head never does; in a fused qkv layer only the rows that are asked for change."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout in front of each adapter."""

    @property
    def alpha(self) -> int:
        """Numerator of the adapter's scale."""
        return 2 * self.rank

    @property
    def scale(self) -> float:
        """Factor on the product of the two matrices: alpha / rank, for rsLoRA alpha / its root."""
        return self.alpha / (math.sqrt(self.rank) if self.name == "rslora" else self.rank)


class ValueOnly(Spec):
    """Full-rank training of the attention's value projections alone (arXiv 2602.23197)."""

    name: Literal["value-only"] = "value-only"
    """Tag of this method."""


class AttentionOnly(Spec):
    """Full-rank training of the attention's projections, as a control of value-only."""

    name: Literal["query-key-only", "attention-only"] = "attention-only"
    """Tag of this method: queries and keys alone, or queries, keys, values and outputs."""


class BottomFrozen(Spec):
    """The embeddings and the lowest blocks are frozen; all above them trains."""

    name: Literal["bottom-frozen"] = "bottom-frozen"
    """Tag of this method."""
    blocks: PositiveInt | None = None
    """How many blocks are frozen, from the bottom; left out, `share` says."""
    share: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Which share of the blocks is frozen, rounded; left out without `blocks`, half of them."""

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if self.blocks is not None and self.share is not None:
            raise ValueError("`blocks` and `share` say the same thing; give one of them")
        return self

    def num_frozen(self, num_blocks: int) -> int:
        """Return how many of a model's blocks are frozen, at least one and never all.

        Raises:
            ConfigError: if `blocks` leaves none to train.
        """
        if self.blocks is not None and self.blocks >= num_blocks:
            raise ConfigError(
                f"bottom-frozen: {self.blocks} blocks are to be frozen and the model has "
                f"{num_blocks}; lower `blocks`, so that some are left to train"
            )
        wanted = self.blocks or round((self.share or 0.5) * num_blocks)
        return min(max(1, wanted), max(1, num_blocks - 1))


class BiasOnly(Spec):
    """The biases that a model has, and nothing else (BitFit, arXiv 2106.10199)."""

    name: Literal["bias-only"] = "bias-only"
    """Tag of this method."""


class PromptTuning(Spec):
    """A soft prompt before each sample of the target, on a frozen model (arXiv 2104.08691)."""

    name: Literal["prompt-tuning"] = "prompt-tuning"
    """Tag of this method."""
    tokens: PositiveInt = 20
    """Length of the prompt; it starts as the embeddings of tokens drawn by seed."""


SecondStage = Annotated[
    Full | LoRA | ValueOnly | AttentionOnly | BottomFrozen | BiasOnly, Field(discriminator="name")
]


class ProMoT(Spec):
    """First a soft prompt on the frozen model, then the model under the frozen prompt."""

    name: Literal["promot"] = "promot"
    """Tag of this method (arXiv 2211.00635); `learning_rate` and `steps` are the second stage's."""
    tokens: PositiveInt = 20
    """Length of the prompt."""
    prompt: Literal["trained", "random", "joint"] = "trained"
    """Controls of the paper: `random` leaves the first stage out, `joint` trains prompt and model
    together."""
    prompt_steps: PositiveInt = 150
    """Optimiser steps of the first stage."""
    prompt_learning_rate: PositiveFloat = 0.03
    """Peak learning rate of the prompt."""
    then: SecondStage = Full()
    """What trains in the second stage."""


SingleStage = Full | LoRA | ValueOnly | AttentionOnly | BottomFrozen | BiasOnly | PromptTuning
AnyMethod = SingleStage | ProMoT
Method = Annotated[AnyMethod, Field(discriminator="name")]
PRESETS: tuple[AnyMethod, ...] = (
    Full(),
    LoRA(),
    LoRA(name="dora"),
    LoRA(name="rslora"),
    ValueOnly(),
    AttentionOnly(name="query-key-only"),
    AttentionOnly(),
    BottomFrozen(),
    BiasOnly(),
    PromptTuning(),
    ProMoT(),
)
"""Every method by its name, with its defaults."""
METHODS: tuple[str, ...] = tuple(method.name for method in PRESETS)


def describe_method(name: str) -> str:
    """Return one sentence on what trains."""
    return _WORDS[name]


_WORDS = {
    "full": "Every parameter trains.",
    "lora": "Low-rank adapters beside frozen weights; `targets`, such as `query-value`, narrows.",
    "dora": "LoRA that trains the length of every row of the adapted matrices as well.",
    "rslora": "LoRA with its update divided by the root of the rank, for higher ranks.",
    "value-only": "The attention's value projections train, at full rank.",
    "query-key-only": "The attention's query and key projections train, a control.",
    "attention-only": "Query, key, value and output projections of the attention train, a control.",
    "bottom-frozen": "All but the embeddings and the lowest `blocks` or `share` of blocks trains.",
    "bias-only": "The biases train, where a model has any.",
    "prompt-tuning": "A soft prompt of `tokens` vectors trains; the model stays as it is.",
    "promot": "First a soft prompt on the frozen model, then the model under the frozen prompt.",
}


def parse_method(text: str) -> AnyMethod:
    """Return the method that `--method` names, with its defaults.

    Raises:
        ConfigError: if there is no such method.
    """
    for method in PRESETS:
        if method.name == text:
            return method
    listing = f"methods are {', '.join(METHODS)}"
    raise ConfigError(unknown("method", text, METHODS, listing))


def default_learning_rate(method: AnyMethod) -> float:
    """Return the peak learning rate at which a method reaches its target within some 60 steps."""
    match method:
        case Full() | BottomFrozen():
            return 2e-5
        case LoRA():
            # What an update does to the weights grows with the scale, 2 for LoRA and DoRA.
            return 1e-3 * 2.0 / method.scale
        case ValueOnly() | AttentionOnly():
            return 1e-4
        case BiasOnly():
            return 1e-3
        case PromptTuning():
            return 0.03
        case ProMoT():
            return default_learning_rate(method.then)
        case _:
            assert_never(method)


def prompt_tokens(method: AnyMethod) -> int:
    """Return how many soft tokens a method puts before each sample of the target."""
    return method.tokens if isinstance(method, PromptTuning | ProMoT) else 0

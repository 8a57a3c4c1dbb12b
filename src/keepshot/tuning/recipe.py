"""What is asked of a tuning run: data, method, keep terms and schedule, as frozen specs.

Knows no torch and no model. Defaults follow what was measured on small instruct models; the rank,
`alpha = 2r` and all-linear targets of LoRA follow arXiv 2405.09673.
"""

from __future__ import annotations

import operator
from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from keepshot.specs import Spec, is_none
from keepshot.tuning.keep import (
    EWC,
    KL,
    L2SP,
    Mix,
    SelfDistil,
    Term,
    TokenMask,
    check_terms,
    find_term,
    parse_keep,
)
from keepshot.tuning.method_specs import (
    LoRA,
    Method,
    PromptTuning,
    default_learning_rate,
    parse_method,
)
from keepshot.tuning.samplegen import Samples, is_plain

AUTO_TERM = KL(
    weight=1.0,
    tasks="upper-case,repeat-words,drop-vowels,spell-out",
    prompts_per_step=1, prompts=64, shots=(2, 5), top_k=64,
)  # fmt: skip
"""What holds the model under `--keep auto`; chosen on validation items (docs/LOG.md)."""


class Auto(Spec):
    """What a run finds out by itself: its learning rate before, and lambda after training."""

    trial_steps: PositiveInt = 8
    """Steps of each short run of the search for a learning rate; none where the recipe has one."""
    least_steps: PositiveInt = 75
    """Steps of training at least, where `epochs` passes over the data are fewer."""
    guard_tasks: tuple[str, ...] = ("guard",)
    """Tasks (or suites) made by code that are asked while training, and that judge lambda."""
    guard_items: PositiveInt = 16
    """Questions of each of them, at 4 shots."""
    tolerance: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of few-shot ability on them that may be lost before lambda is lowered. They are lost
    sooner than others: a tenth here is less than half of that elsewhere (docs/LOG.md)."""
    lambdas: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5)
    """What is tried then, the first that holds is taken."""


class Recipe(Spec):
    """One tuning run."""

    no_effect_on_results: ClassVar[frozenset[str]] = frozenset({"save_every", "report_to"})

    model: str = "smollm2-135m-instruct"
    """Reference of the model to tune."""
    data: str
    """Task name, or path of an examples file; several are joined by commas."""
    data_shares: tuple[PositiveFloat, ...] | None = None
    """What share of the batch's target samples each of several data sets has, adding up to 1; left
    out, the rows of all count alike."""
    samples: Samples = Field(default="plain", exclude_if=is_plain)
    """What is learned of a row: its answer, or first two other rows as demonstrations and then its
    answer (`samplegen`, in words; `samplegen-template`, in the data's own template)."""
    method: Method = LoRA()
    """Which parameters train."""
    keep: tuple[Term, ...] = ()
    """Terms that hold on to few-shot ability; empty for plain tuning."""
    auto: Auto | None = None
    """Find a learning rate, watch few-shot ability, and end with a lambda; null does none of it."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate of AdamW; left out, what `auto` finds or else the method's default."""
    steps: PositiveInt | None = None
    """Optimiser steps; left out, what `epochs` gives."""
    epochs: PositiveFloat = 3.0
    """Passes over the data, where `steps` is left out; what a `mix` term adds does not count."""
    batch_size: PositiveInt = 16
    """Samples in each step, apart from a KL term's prompts."""
    max_length: PositiveInt | None = None
    """Longest sample in tokens; left out, the model's context length."""
    long_rows: Literal["error", "drop", "cut"] = "error"
    """What happens to longer samples: `drop` leaves them out, `cut` takes their first tokens and
    leaves those out of whose answer nothing is left. What is left out is counted in the record."""
    most_unanswered: float = Field(default=0.05, ge=0.0, le=1.0)
    """Largest share of rows whose answers `cut` may lose wholly; more is an error."""
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
    accumulate: PositiveInt = 1
    """Parts in which each batch goes through the model, for less memory; the loss is the same."""
    checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    bf16: bool = False
    """Compute in bfloat16 where that is safe (autocast); weights stay as they are loaded."""
    packing: bool = Field(default=False, exclude_if=operator.not_)
    """Put the samples of a batch one behind the other instead of padding them. No sample attends to
    another, and positions begin anew with each, so that losses stay the same to rounding."""
    fsdp: str | None = Field(default=None, exclude_if=is_none)
    """FSDP configuration file (accelerate's, YAML), to divide the model among GPUs."""
    save_every: PositiveInt = 50
    """Steps between resume states, where a directory for them is given."""
    report_to: tuple[str, ...] = ()
    """Trackers that every step is logged to: trackio, wandb, mlflow, tensorboard, ..."""

    @model_validator(mode="after")
    def _check_terms(self) -> Self:
        check_terms(self.keep)
        # Masked or rewritten answers are of the target itself, which is read under the prompt.
        other = [term.name for term in self.keep if not isinstance(term, TokenMask | SelfDistil)]
        if other and isinstance(self.method, PromptTuning):
            raise ValueError(
                f"term {other[0]!r} would reach nothing that trains: prompt-tuning leaves the "
                "model as it is, and other tasks do not see the prompt; leave the terms out"
            )
        self._check_fsdp()
        self._check_room()
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be divided into accumulate = "
                f"{self.accumulate} parts"
            )
        if self.data_shares is not None and abs(sum(self.data_shares) - 1.0) > 1e-6:
            raise ValueError(
                f"data_shares {list(self.data_shares)} add up to {sum(self.data_shares):g}, not 1"
            )
        return self

    def _check_room(self) -> None:
        """Refuse a mix that leaves nothing of a batch to some of the data."""
        left, least = self._num_of_target(), len(self.data_shares or (1.0,))
        if left < least:
            what = "the target" if least == 1 else f"{least} data sets"
            taken = self.batch_size - left
            beside = f" beside {taken} samples of the mix term" if taken else ""
            raise ValueError(
                f"batch_size {self.batch_size} leaves no room for {what}{beside}; raise it or "
                "lower the shares"
            )

    def _num_of_target(self) -> int:
        """Return how many samples of a batch are the target's own."""
        term = find_term(self.keep, Mix)
        return self.batch_size - (sum(term.counts(self.batch_size)) if term else 0)

    def _check_fsdp(self) -> None:
        """Refuse what reads or holds single weights while they are divided among processes."""
        if self.fsdp is None:
            return
        held = [term.name for term in self.keep if isinstance(term, L2SP | EWC)]
        names = ("full", "lora", "dora", "rslora", "bottom-frozen", "bias-only")
        partly = isinstance(self.method, LoRA) and self.method.targets != "all-linear"
        for wrong, what in (
            (self.auto is not None, "auto (it probes the model in training; --keep none or kl)"),
            (bool(held), f"term {', '.join(held)} (it holds single weights)"),
            (self.method.name not in names or partly, f"method {self.method.name!r}"
             f"{' with these targets' if partly else ''} (it may train parts of a matrix)"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(f"fsdp does not go with {what}; leave one out")

    def resolved(self, num_rows: int) -> Recipe:
        """Return this recipe with learning rate and steps filled in for `num_rows` samples."""
        rate = self.learning_rate or default_learning_rate(self.method)
        least = self.auto.least_steps if self.auto else 1
        steps = self.steps or max(least, round(self.epochs * num_rows / self._num_of_target()))
        return self.model_copy(update={"learning_rate": rate, "steps": steps})


def auto(data: str, *, model: str, keep: str = "auto", method: str | None = None) -> Recipe:
    """Return the recipe that the command line means: by default LoRA, and all of `--keep auto`.

    Args:
        data: task name or path of an examples file.
        model: reference of the model.
        keep: as `parse_keep` reads it.
        method: as `parse_method` reads it; LoRA if left out.

    Raises:
        ConfigError: if the method or a term is unknown, or the two do not go together.
    """
    chosen = LoRA() if method is None else parse_method(method)
    content: dict[str, object] = {"model": model, "data": data, "method": chosen}
    if keep != "auto":
        content["keep"] = parse_keep(keep)
    else:
        content["auto"] = Auto()
        # A soft prompt alone leaves the model as it is, so nothing has to be held.
        content["keep"] = () if isinstance(chosen, PromptTuning) else (AUTO_TERM,)
    return Recipe.from_mapping(content, source="tune")

"""What the models of a study are asked: tasks in settings, and instructions. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from keepshot.judging.policy import Following
from keepshot.records import Split
from keepshot.specs import Spec, is_none
from keepshot.tasks.variants import VARIANTS_VERSION, Demonstrations, Wording

Written = Literal["samplegen", "pipeline"]
WRITTEN: tuple[Written, ...] = get_args(Written)
"""Settings whose demonstrations a model that was tuned to write some writes itself."""
Setting = Literal["direct", "gold", Written]
SETTINGS: tuple[Setting, ...] = ("direct", "gold")
"""What is asked where an ask says nothing."""
WRITING_VERSION = 1
"""Raised when what is written, or how answers are found in it, would change."""
WRITTEN_TOKENS = 256
SIMILARITY_VERSION = 1
"""Raised when free answers would be judged otherwise."""
Stage = Literal["base", "tuned", "blend"]
STAGES: tuple[Stage, ...] = get_args(Stage)


def check_once(what: str, names: Sequence[str | int]) -> None:
    """Check that no value of an axis is repeated, since its rows would count twice.

    Raises:
        ValueError: naming the first that is.
    """
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"{what} {repeated[0]!r} is named twice; name each once")


class Ask(Spec):
    """What one measurement asks; one record for each model and split."""

    tasks: tuple[str, ...] = ("core",)
    """Suites, tasks, paths of examples files, or `target`; `[]` where only instructions are put."""
    settings: tuple[Setting, ...] = Field(default=SETTINGS, min_length=1)
    """`direct`: the question alone. `gold`: after right demonstrations, `shots` of them. Of models
    tuned with `samples: samplegen` alone: `samplegen`, after two demonstrations that they write;
    `pipeline`, the untuned model after these same demonstrations."""
    shots: tuple[int, ...] = Field(default=(4,), min_length=1)
    """Numbers of demonstrations, for `gold`."""
    seeds: int = Field(default=1, ge=1)
    """Draws of demonstrations."""
    limit: int | None = Field(default=None, ge=1)
    """Items of each task at most."""
    splits: tuple[Split, ...] = Field(default=("test",), min_length=1)
    """Where items come from; choose on `validation`, report on `test`."""
    of: tuple[Stage, ...] = Field(default=STAGES, min_length=1)
    """Which models are asked."""
    template: str | None = None
    """Prompt template in place of each task's own."""
    wording: Wording = Field(default="plain", exclude_if=lambda value: value == "plain")
    """What stands around questions: each task's own template (`plain`), overdone words (`ornate`),
    or no names of fields (`bare`)."""
    demonstrations: Demonstrations = Field(default="gold", exclude_if=lambda value: value == "gold")
    """What `gold` shows: right answers (`gold`), words that are none (`corrupted`), demonstrations
    of another task of the ask (`other-task`), labels exchanged (`flipped`) or drawn (`random`)."""
    similarity: str | None = Field(default=None, exclude_if=is_none)
    """Model reference: choice questions are answered freely, and the choice that the answer is most
    like by this model's hidden states is taken; left out, the likeliest choice is."""
    written_tokens: int = Field(
        default=WRITTEN_TOKENS, ge=8, exclude_if=lambda value: value == WRITTEN_TOKENS
    )
    """Most tokens that a model writes before its answer, for `samplegen` and `pipeline`."""
    following: Following | None = Field(default=None, exclude_if=is_none)
    """Verifiable instructions, put to the same models; none if left out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.tasks and self.following is None:
            raise ValueError("nothing is asked; name `tasks`, or put instructions: `following: {}`")
        check_once("split", self.splits)
        if min(self.shots) < 1:
            raise ValueError("demonstrations are counted from 1; `direct` asks without any")
        if self.written:
            self._check_written(f"setting {self.written[0]!r}")
        if self.wording != "plain" and self.template is not None:
            raise ValueError(f"`wording: {self.wording}` is a template; leave `template` out")
        if self.demonstrations != "gold" and "direct" in self.settings:
            raise ValueError(
                f"`demonstrations: {self.demonstrations}` changes nothing of `direct`, which shows "
                "none; write `settings: [gold]`, and ask `direct` apart"
            )
        return self

    def _check_written(self, what: str) -> None:
        if "tuned" not in self.of:
            raise ValueError(f"{what} asks tuned models, and `of` leaves them out; add `tuned`")
        if self.template is not None:
            raise ValueError(f"{what} goes by the form that was learned; leave `template` out")
        if self.is_varied or self.similarity is not None:
            raise ValueError(
                f"{what} has no variants; give `wording`, `demonstrations` and `similarity` an ask "
                "of their own"
            )
        if self.following is not None and not self.all_shots:
            raise ValueError(
                f"`following` does not go with {what} alone; give it an ask of its own"
            )

    @property
    def is_varied(self) -> bool:
        """Whether its prompts are a variant."""
        return (self.wording, self.demonstrations) != ("plain", "gold")

    @property
    def written(self) -> tuple[Written, ...]:
        """Those of its settings whose demonstrations a model writes, in a fixed order."""
        return tuple(one for one in WRITTEN if one in self.settings)

    @property
    def all_shots(self) -> tuple[int, ...]:
        """Numbers of demonstrations of all settings, 0 for `direct`."""
        given = self.shots if "gold" in self.settings else ()
        return tuple(sorted({*given, *((0,) if "direct" in self.settings else ())}))

    def setting_at(self, shots: int) -> str:
        """Return what the frame calls its setting at a number of given demonstrations.

        Variants have names of their own, such as `flipped` or `direct, ornate`.
        """
        shown = self.demonstrations if shots else "direct"
        worded = shown if self.wording == "plain" else f"{shown}, {self.wording}"
        return worded if self.similarity is None else f"{worded}, similarity"

    def how(
        self, settings: Sequence[Written], split: Split, seed: int, known: Mapping[str, str]
    ) -> list[Any]:
        """Return what identifies one measurement of it, besides the tasks.

        Args:
            settings: those whose demonstrations are written; none for `direct` and `gold`.
            split: where items come from.
            seed: the study's first draw of demonstrations.
            known: as `followed` takes it.
        """
        if settings:
            return ["written", WRITING_VERSION, [*settings], self.written_tokens, self.limit, split]
        how = [self.all_shots, self.seeds, seed, self.limit, self.template, split]
        named: list[Any] = ["varied", VARIANTS_VERSION, self.wording, self.demonstrations]
        variant: list[Any] = named if self.is_varied else []
        if self.similarity is not None:
            judge = [self.similarity, known.get(self.similarity)]
            variant += ["similarity", SIMILARITY_VERSION, *judge]
        return how + self.followed(known) + variant

    def followed(self, known: Mapping[str, str]) -> list[Any]:
        """Return what identifies the instructions that are put; nothing where none are.

        Args:
            known: what sets of prompts stand for; one that is not there stands for itself.
        """
        if self.following is None:
            return []
        return [self.following.model_dump(mode="json"), known.get(self.following.prompts)]

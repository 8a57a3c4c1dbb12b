"""What the models of a study are asked: tasks in settings, and instructions. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from keepshot.judging.policy import Following
from keepshot.records import Split
from keepshot.specs import Spec, is_none

Setting = Literal["direct", "gold"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
Stage = Literal["base", "tuned", "blend"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class Ask(Spec):
    """What one measurement asks; one record for each model and split."""

    tasks: tuple[str, ...] = ("core",)
    """Suites, tasks, paths of examples files, or `target`; `[]` where only instructions are put."""
    settings: tuple[Setting, ...] = Field(default=SETTINGS, min_length=1)
    """`direct`: the question alone. `gold`: after right demonstrations, `shots` of them."""
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
    following: Following | None = Field(default=None, exclude_if=is_none)
    """Verifiable instructions, put to the same models; none if left out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.tasks and self.following is None:
            raise ValueError("nothing is asked; name `tasks`, or put instructions: `following: {}`")
        if min(self.shots) < 1:
            raise ValueError("demonstrations are counted from 1; `direct` asks without any")
        return self

    @property
    def all_shots(self) -> tuple[int, ...]:
        """Numbers of demonstrations of all settings, 0 for `direct`."""
        given = self.shots if "gold" in self.settings else ()
        return tuple(sorted({*given, *((0,) if "direct" in self.settings else ())}))

    def followed(self, known: Mapping[str, str]) -> list[Any]:
        """Return what identifies the instructions that are put; nothing where none are.

        Args:
            known: what sets of prompts stand for; one that is not there stands for itself.
        """
        if self.following is None:
            return []
        return [self.following.model_dump(mode="json"), known.get(self.following.prompts)]

"""Verifiable instructions put to a model: one row for each prompt, and their scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from keepshot.assets import AssetStore
from keepshot.judging.answers import answer_prompts, check_prompts, style_of
from keepshot.judging.policy import Policy
from keepshot.judging.verifiable.sentences import Punkt
from keepshot.judging.verifiable.verdict import NEEDS_PUNKT, Variant, judge
from keepshot.models.loading import LanguageModel
from keepshot.records import InstructionRow, InstructionScore, Split
from keepshot.scoring.engine import Engine
from keepshot.stats import bootstrap_mean, proportion
from keepshot.tasks.instruction_templates import EMBEDDED_SET, embedded_set
from keepshot.tasks.instructions import InstructionSet, read_instructions, types_of
from keepshot.tasks.task import seeded


def load_set(source: str) -> InstructionSet:
    """Return the embedded set, or read a file; see `read_instructions`."""
    return embedded_set() if source == EMBEDDED_SET else read_instructions(source)


class Examiner:
    """Asks models one set of prompts by one policy, and judges their answers in one way."""

    def __init__(
        self, asked: InstructionSet, policy: Policy, variant: Variant, store: AssetStore
    ) -> None:
        """Get nltk's tables if the official variant needs them for what is asked.

        Raises:
            AssetError: if it needs them and they cannot be had.
        """
        self.asked, self.policy = asked, policy
        self.variant: Variant = variant
        needed = variant == "official" and not NEEDS_PUNKT.isdisjoint(types_of(asked.prompts))
        self._punkt = Punkt.fetch(store) if needed else None

    def check(
        self, model: LanguageModel, *, split: Split | None = None, limit: int | None = None
    ) -> None:
        """Check that `model` can be asked every prompt; see `check_prompts`."""
        prompts = self.asked.part(split, limit).prompts
        check_prompts(model, [prompt.prompt for prompt in prompts], self.policy)

    def examine(
        self,
        model: LanguageModel,
        *,
        arm: str,
        lam: float | None = None,
        split: Split | None = None,
        limit: int | None = None,
        engine: Engine | None = None,
        chat: LanguageModel | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[InstructionRow]:
        """Return one row for each prompt.

        Args:
            model: what answers.
            arm: what the rows call it.
            lam: lambda, where it is a blend.
            split: the half of the set that is asked; None asks all.
            limit: prompts at most.
            engine: of `model`; None makes one.
            chat: whose chat template is used; see `answer_prompts`.
            progress: called with (answers, answers in all).
        """
        prompts = self.asked.part(split, limit).prompts
        answers = answer_prompts(
            model,
            [prompt.prompt for prompt in prompts],
            self.policy,
            engine=engine,
            chat=chat,
            progress=progress,
        )
        style = style_of(chat or model, self.policy)
        rows: list[InstructionRow] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            verdict = judge(prompt, answer.text, variant=self.variant, punkt=self._punkt)
            rows.append(
                InstructionRow(
                    arm=arm,
                    model=model.reference,
                    lam=lam,
                    prompt_set=self.asked.name,
                    split=split or "all",
                    variant=self.variant,
                    style=style,
                    key=prompt.key,
                    prompt=prompt.prompt,
                    answer=answer.text,
                    truncated=answer.truncated,
                    types=[asked.type for asked in prompt.instructions],
                    strict=list(verdict.strict),
                    loose=list(verdict.loose),
                )
            )
        return rows


def instruction_scores(rows: Sequence[InstructionRow]) -> list[InstructionScore]:
    """Return one score for each (arm, lambda, set, split, variant), in order of appearance.

    Prompt level: every instruction of the prompt is followed (Wilson interval). Instruction level:
    share of single instructions (bootstrap over prompts, because those of one prompt hang
    together).
    """
    groups: dict[tuple[object, ...], list[InstructionRow]] = defaultdict(list)
    for row in rows:
        groups[row.arm, row.lam, row.prompt_set, row.split, row.variant].append(row)
    return [_score(group) for group in groups.values()]


def _score(rows: Sequence[InstructionRow]) -> InstructionScore:
    first = rows[0]
    strict = proportion(sum(all(row.strict) for row in rows), len(rows))
    loose = proportion(sum(all(row.loose) for row in rows), len(rows))
    by_type: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        for type_, followed in zip(row.types, row.strict, strict=True):
            by_type[type_].append(followed)
    # Weighted by the number of instructions, so that the mean over prompts is the share of all.
    sizes = np.array([len(row.strict) for row in rows]) / np.mean([len(row.strict) for row in rows])
    shares = [
        np.array([np.mean(flags) for flags in column]) * sizes
        for column in ([row.strict for row in rows], [row.loose for row in rows])
    ]
    level = [bootstrap_mean(share, seeded("instructions", len(rows))) for share in shares]
    return InstructionScore(
        arm=first.arm,
        model=first.model,
        lam=first.lam,
        prompt_set=first.prompt_set,
        split=first.split,
        variant=first.variant,
        style=first.style,
        prompt_strict=strict.value,
        prompt_strict_ci95=strict.ci95,
        prompt_loose=loose.value,
        prompt_loose_ci95=loose.ci95,
        instruction_strict=level[0].value,
        instruction_strict_ci95=level[0].ci95,
        instruction_loose=level[1].value,
        instruction_loose_ci95=level[1].ci95,
        num_prompts=len(rows),
        num_instructions=sum(len(row.strict) for row in rows),
        truncated=float(np.mean([row.truncated for row in rows])),
        by_type={name: float(np.mean(flags)) for name, flags in sorted(by_type.items())},
    )

r"""Rows whose answer is two worked examples and then the solution (SampleGen, arXiv 2501.08716).

A model that is tuned on them writes its own demonstrations before it answers. Two forms:

    samplegen            Question: x + what to do    ->  Example 1: d / Answer 1: a / Example 2: ...
                                                         / Solution: x / Answer Solution: y / end
    samplegen-template   Q: x / A:    ->    Q: d / A: a    Q: d / A: a    Q: x / A: y

The first is the paper's, in words of our own. The second needs no word besides the template, so
that models of a closed vocabulary can learn it, and what it writes is a prompt like any other.
Knows nothing of tokens and models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from keepshot.errors import ConfigError
from keepshot.prompts import INPUT, Example, Template
from keepshot.tasks.source import PromptRow, Row

Samples = Literal["plain", "samplegen", "samplegen-template"]
NUM_SHOWN = 2
"""Demonstrations that are written, as in the paper."""
REQUEST = (
    "Give two examples of such questions with their answers, then use them to answer this one. "
    "End with 'Answer Solution: ... END_EXAMPLES'."
)


@dataclass(frozen=True)
class Form:
    """How demonstrations are asked for, and how they are written."""

    asked: Template
    """The prompt: a question that is left open."""
    shown: tuple[Template, ...]
    """Of each demonstration, with the newlines before it."""
    solved: Template
    """Of the question with its answer, likewise."""
    end: str
    cue: str
    """What the answer follows, counted from the first demonstration: the `cue_number`-th time."""
    cue_number: int

    def prompt(self, query: Example) -> str:
        """Return what the model is given."""
        return self.asked.context((), query)

    def written(self, shown: Sequence[Example], query: Example) -> str:
        """Return what the model is to write, from the newline after the prompt to the end."""
        blocks = [
            template.context((), example) + template.continuation(example.output)
            for template, example in zip(
                (*self.shown, self.solved), (*shown, query), strict=True
            )
        ]  # fmt: skip
        return "".join(blocks) + self.end

    def cut(self, written: str) -> str | None:
        """Return what was written up to the cue of the answer; None if it does not get there."""
        place = 0
        for _ in range(self.cue_number):
            found = written.find(self.cue, place)
            if found < 0:
                return None
            place = found + len(self.cue)
        return written[:place]

    def alone(self, cut: str) -> str:
        """Return what was written as a prompt for another model, without what asked for it."""
        return self.asked.description + cut.lstrip("\n")


def form_of(samples: Samples, template: Template) -> Form:
    """Return a form; `template` is that of the task.

    Raises:
        ConfigError: if the rows are plain, or nothing in the template tells where answers begin.
    """
    if samples == "samplegen":
        return Form(
            asked=Template(question=f"Question: {INPUT}\n{REQUEST}"),
            shown=tuple(
                Template(question=f"\nExample {number}: {INPUT}\nAnswer {number}:")
                for number in range(1, NUM_SHOWN + 1)
            ),
            solved=Template(question=f"\nSolution: {INPUT}\nAnswer Solution:"),
            end="\nEND_EXAMPLES",
            cue="Answer Solution:",
            cue_number=1,
        )
    cue = template.question.partition(INPUT)[2]
    if samples == "plain" or not cue.strip():
        raise ConfigError(
            f"samples: {samples}: template {template.question!r} has nothing between a question "
            "and its answer by which answers could be found; take samples: samplegen"
        )
    block = replace(template, question=template.separator + template.question, description="")
    return Form(
        asked=template,
        shown=(block,) * NUM_SHOWN,
        solved=block,
        end="\n",
        cue=cue,
        cue_number=NUM_SHOWN + 1,
    )


def samplegen_rows(
    rows: Sequence[Row],
    form: Form,
    generator: np.random.Generator,
    *,
    source: str,
    pool: Sequence[Row] | None = None,
) -> list[PromptRow]:
    """Return one row for each, whose completion shows two others and then the row's own answer.

    The two are drawn from rows of the same instruction, which is what stands before the first
    colon, where three different questions share it; else from the whole data set.

    Args:
        rows: questions with answers.
        form: how they are written.
        generator: draws the demonstrations.
        source: names the rows in error messages.
        pool: rows that demonstrations come from; None means `rows`.

    Raises:
        ConfigError: if a row is no question with an answer, or there are too few.
    """
    asked = _questions(rows, source)
    every = _different(_questions(rows if pool is None else pool, source))
    groups: dict[str, list[Example]] = {}
    for example in every:
        groups.setdefault(_instruction(example), []).append(example)
    if len(every) <= NUM_SHOWN:
        raise ConfigError(
            f"{source}: {len(every)} different questions are too few for samples of {NUM_SHOWN} "
            "demonstrations and a question; give more rows, or leave `samples` out"
        )
    found: list[PromptRow] = []
    for example in asked:
        alike = groups.get(_instruction(example), [])
        shown = _drawn(alike if len(alike) > NUM_SHOWN else every, example, generator)
        found.append(PromptRow(form.prompt(example), form.written(shown, example)))
    return found


def _questions(rows: Sequence[Row], source: str) -> list[Example]:
    for row in rows:
        if not isinstance(row, Example):
            form = {"PromptRow": "prompt and completion", "MessagesRow": "messages"}
            kind = form.get(type(row).__name__, "text")
            raise ConfigError(
                f"{source}: holds rows of {kind}, and `samples` of demonstrations are made of "
                '"input" and "output" alone; give such rows, or leave `samples` out'
            )
    return [row for row in rows if isinstance(row, Example)]


def _different(examples: Sequence[Example]) -> list[Example]:
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(_same(example), example)
    return list(first.values())


def _same(example: Example) -> str:
    return example.input.strip().casefold()


def _instruction(example: Example) -> str:
    before, colon, _ = example.input.partition(": ")
    return before if colon else ""


def _drawn(
    among: Sequence[Example], query: Example, generator: np.random.Generator
) -> list[Example]:
    """Draw different questions that are not the query; `among` holds enough of them."""
    drawn: dict[str, Example] = {}
    while len(drawn) < NUM_SHOWN:
        example = among[int(generator.integers(len(among)))]
        if _same(example) != _same(query):
            drawn.setdefault(_same(example), example)
    return list(drawn.values())


def is_plain(samples: Any) -> bool:
    """Say whether samples are as they always were; left out of a recipe's content then."""
    return samples == "plain"

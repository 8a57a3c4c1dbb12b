"""Controls of a prompt: other words around the questions, or other answers in the demonstrations.

Questions, and which demonstrations are drawn for them, stay those of the plain prompt, so that
variants are paired; only what a variant names is changed. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from string import ascii_lowercase
from typing import TYPE_CHECKING, Literal

from keepshot.errors import TaskError
from keepshot.prompts import VERBATIM, Example, Template
from keepshot.tasks.task import Task, is_closed, seeded

if TYPE_CHECKING:
    from numpy.random import Generator

Wording = Literal["plain", "ornate", "bare"]
Demonstrations = Literal["gold", "corrupted", "other-task", "flipped", "random"]
VARIANTS_VERSION = 1
"""Raised when a variant of the same task would be another prompt than before."""
MARKS = ".,:;!?()[]\"'"

WORDINGS: dict[Wording, Template] = {
    "ornate": Template(
        question="Consider, if you would be so kind, the following matter with all due care: "
        "{input}\nThe reply which, upon reflection, is most becoming to it reads as follows:",
    ),
    "bare": Template(question="{input} :"),
}
"""What stands around questions in place of the task's template; `bare` has no name of a field."""


@dataclass(frozen=True)
class VariedTask(Task):
    """A task whose demonstrations are changed after they are drawn."""

    shown: Demonstrations = "gold"
    others: tuple[Task, ...] = ()
    """Where demonstrations of another task come from: one task, for `other-task`."""

    def draw(self, shots: int, seed: int) -> tuple[Example, ...]:
        """Draw as the plain task does, and change what the variant changes.

        Raises:
            TaskError: as `Task.draw` does.
        """
        if self.shown == "other-task":
            return self.others[0].draw(shots, seed)
        drawn = super().draw(shots, seed)
        return tuple(replace(example, output=self._answer(example, seed)) for example in drawn)

    def _answer(self, example: Example, seed: int) -> str:
        match self.shown:
            case "corrupted":
                return self._corrupted(example, self._generator(seed, example.input))
            case "flipped":
                return self._permuted(seed)[example.output]
            case "random":
                labels, generator = sorted(self.labels), self._generator(seed, example.input)
                return labels[int(generator.integers(len(labels)))]
            case _:
                return example.output

    def _generator(self, seed: int, *parts: str) -> Generator:
        """Depend on the example, so that more shots do not change what few shots show."""
        return seeded(self.name, self.shown, seed, *parts)

    def _permuted(self, seed: int) -> dict[str, str]:
        """Return another label for each: its successor in an order drawn for the draw."""
        labels, generator = sorted(self.labels), self._generator(seed)
        order = [labels[int(place)] for place in generator.permutation(len(labels))]
        return dict(zip(order, [*order[1:], order[0]], strict=True))

    def _corrupted(self, example: Example, generator: Generator) -> str:
        """Return as many words as the answer has, none of an answer; else letters at random."""
        words, pool = example.output.split(), self._words_of_no_answer
        if len(pool) >= max(2, len(words)):
            chosen = generator.choice(len(pool), size=len(words), replace=False)
            return " ".join(pool[int(place)] for place in chosen)
        found = " ".join(_letters(len(word), generator) for word in words)
        while found in self.labels:
            found += _letters(1, generator)
        return found

    @cached_property
    def _words_of_no_answer(self) -> list[str]:
        """Words of questions that occur in no answer; nor numbers, where answers hold some."""
        numbers = any(letter.isdigit() for label in self.labels for letter in label)
        taken = {_bare(word) for label in self.labels for word in label.split()}
        every = {word for example in self.demonstrations for word in example.input.split()}
        asked = {word.strip(MARKS) for word in every}
        return sorted(
            word
            for word in asked
            if _bare(word) and _bare(word) not in taken
            and not (numbers and any(letter.isdigit() for letter in word))
        )  # fmt: skip


def varied(
    task: Task, wording: Wording, demonstrations: Demonstrations, among: Sequence[Task] = ()
) -> Task:
    """Return a task in another wording, or under other demonstrations.

    Args:
        task: as it is asked plainly.
        wording: what stands around questions.
        demonstrations: `gold` leaves them; `corrupted` replaces answers by what is none, and
            `random` by any of the task's labels; `flipped` exchanges labels, the same way in all
            demonstrations of a draw; `other-task` takes those of another task.
        among: the tasks asked together, of which the other is the next one, of another domain if
            there is one.

    Raises:
        TaskError: if the task words its own prompts, has no labels that could be exchanged, or
            there is no other task.
    """
    if (wording, demonstrations) == ("plain", "gold"):
        return task
    if task.examiner or (wording != "plain" and task.template == VERBATIM):
        what = f"demonstrations: {demonstrations}" if wording == "plain" else f"wording: {wording}"
        raise TaskError(
            f"task {task.name!r} brings its own wording, so `{what}` cannot be applied; leave it "
            "out of the ask"
        )
    if wording != "plain":
        task = replace(task, template=WORDINGS[wording])
    if demonstrations == "gold":
        return task
    if demonstrations in ("flipped", "random") and not (is_closed(task) and len(task.labels) > 1):
        raise TaskError(
            f"task {task.name!r} has open answers ({len(task.labels)} different ones), so "
            f"`demonstrations: {demonstrations}` has no labels to take; leave it out of the ask, "
            "or ask it with `corrupted`"
        )
    others = (_other(task, among),) if demonstrations == "other-task" else ()
    content = {one.name: getattr(task, one.name) for one in fields(Task)}
    return VariedTask(**content, shown=demonstrations, others=others)


def _other(task: Task, among: Sequence[Task]) -> Task:
    names = [one.name for one in among]
    place = names.index(task.name) if task.name in names else -1
    following = [*among[place + 1 :], *among[: max(0, place)]]
    if not following:
        raise TaskError(
            f"task {task.name!r} is asked alone, so `demonstrations: other-task` has none to take; "
            "name a second task in the ask"
        )
    return next((one for one in following if one.domain != task.domain), following[0])


def _letters(number: int, generator: Generator) -> str:
    return "".join(ascii_lowercase[int(place)] for place in generator.integers(26, size=number))


def _bare(word: str) -> str:
    return "".join(letter for letter in word if letter.isalnum()).casefold()

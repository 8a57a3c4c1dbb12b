"""A task: examples in disjoint splits, a template, a metric and its chance level.

Knows nothing of models; where the examples come from is `source` and `catalog`.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

from keepshot.errors import TaskError
from keepshot.prompts import Example, Template

if TYPE_CHECKING:
    from numpy.random import Generator

MOST_CLOSED_LABELS = 32
"""A task with more answers than this is open, however often each of them occurs."""
Kind = Literal["choice", "exact"]
Metric = Literal["accuracy", "exact_match"]


@dataclass(frozen=True)
class Asked:
    """A text put to a model: how likely is `continuation`, or (None) how does it go on by itself?

    `stop` and `max_new_tokens` end what the model writes.
    """

    context: str
    continuation: str | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 0


Answer = tuple[float, bool] | str
"""Log-likelihood and whether each token is the likeliest; or the text that the model wrote."""


class Examiner(Protocol):
    """Words the prompts of a task and grades its answers, where a template is not enough."""

    def ask(self, demonstrations: Sequence[Example], example: Example) -> list[Asked]:
        """Return what is put to the model for one question: several texts, or one to go on with."""
        ...

    def grade(self, example: Example, answers: Sequence[Answer]) -> float:
        """Return the score, between 0 and 1, of the answers to what `ask` returned."""
        ...

    def identity(self) -> str:
        """Return a text that changes whenever prompts or grades may."""
        ...


@dataclass(frozen=True)
class Task:
    """What is asked and how it is judged.

    `choice` tasks are judged by the likelihood of each choice, `exact` ones by greedy decoding,
    both under `template`; an `examiner`, where there is one, asks and grades in place of that.
    No input occurs in two splits. `train` is filled only where a task is something to tune on.
    """

    name: str
    kind: Kind
    version: int
    domain: str
    description: str
    demonstrations: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    train: tuple[Example, ...] = ()
    template: Template = field(default_factory=Template)
    examiner: Examiner | None = None

    @property
    def metric(self) -> Metric:
        """Name of the main metric."""
        return "accuracy" if self.kind == "choice" else "exact_match"

    @cached_property
    def chance(self) -> float:
        """Score of guessing among the choices, as a mean over validation and test; 0 for exact."""
        if self.kind == "exact":
            return 0.0
        asked = [example.choices or () for example in self.validation + self.test]
        return statistics.fmean(1 / len(choices) for choices in asked)

    @cached_property
    def labels(self) -> frozenset[str]:
        """All answers this task is known to have: its choices, or for exact tasks its outputs."""
        everything = self.demonstrations + self.validation + self.test + self.train
        outputs = {example.output for example in everything}
        return frozenset(outputs.union(*(example.choices or () for example in everything)))

    def draw(self, shots: int, seed: int) -> tuple[Example, ...]:
        """Draw demonstrations: the same for every model, with answers as varied as can be.

        Answers are spread first (a second example of a class only when each class has one), and the
        order is then shuffled. The demonstrations of k shots are among those of more shots.

        Raises:
            TaskError: if there are fewer demonstrations than shots.
        """
        if shots > len(self.demonstrations):
            raise TaskError(
                f"task {self.name!r} has {len(self.demonstrations)} demonstrations, "
                f"fewer than the {shots} shots asked for; ask for fewer shots or give more rows"
            )
        generator = seeded(self.name, "demonstrations", seed)
        spread = _spread([self.demonstrations[i] for i in _order(self.demonstrations, generator)])
        drawn = spread[:shots]
        return tuple(drawn[i] for i in _order(drawn, generator))

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change whenever questions or rendering do."""
        rows = [
            [[e.input, e.output, e.choices] for e in split]
            for split in (self.demonstrations, self.validation, self.test, self.train)
        ]
        shape = [self.template.question, self.template.answer, self.template.separator]
        if self.template.description:
            shape.append(self.template.description)
        if self.examiner:
            shape.append(self.examiner.identity())
        content = [self.name, self.kind, self.version, shape, rows]
        return _digest(json.dumps(content, ensure_ascii=False))[:16]


def is_closed(task: Task) -> bool:
    """Say whether the task's answers form a set: few, and each seen twice on average."""
    num_examples = sum(
        len(split) for split in (task.demonstrations, task.validation, task.test, task.train)
    )
    return len(task.labels) <= min(MOST_CLOSED_LABELS, num_examples // 2)


def item_id(example: Example) -> str:
    """Return a short identity of a question with its answer, the same on every machine."""
    return _digest(f"{example.input}\0{example.output}")[:12]


def seeded(*parts: str | int) -> Generator:
    """Return a generator that depends on `parts` alone (not on Python's salted `hash`)."""
    # Imported here because listing tasks draws nothing and must not wait for it.
    import numpy as np

    return np.random.default_rng(int(_digest("\0".join(map(str, parts)))[:16], 16))


def group_by_input(examples: Sequence[Example]) -> list[list[Example]]:
    """Gather the examples that ask the same thing (up to case and outer spaces), in file order."""
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.input.strip().casefold()].append(example)
    return list(groups.values())


def _order(examples: Sequence[Example], generator: Generator) -> list[int]:
    return [int(index) for index in generator.permutation(len(examples))]


def _spread(examples: Sequence[Example]) -> list[Example]:
    """Order examples so that each answer comes once before any comes twice."""
    seen: dict[str, int] = defaultdict(int)
    rounds: list[int] = []
    for example in examples:
        rounds.append(seen[example.output])
        seen[example.output] += 1
    return [examples[i] for i in sorted(range(len(examples)), key=rounds.__getitem__)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

"""Tasks composed of parts: which word of a list, in which form; the largest number, plus one; ...

Some compositions are trained on and the others measured, so that a measured task is made of known
parts in an order never seen, in the closed vocabulary that a small model can learn from scratch.
Every question can be asked with the words of its instruction, or without them, where only
demonstrations tell what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Literal

from keepshot.prompts import Example
from keepshot.tasks.procedural import NUM_MADE, made, words

if TYPE_CHECKING:
    from numpy.random import Generator

Family = Literal["words", "numbers", "labels"]
KINDS = ("animal", "food", "tool", "clothing", "vehicle")
WORDS_A_KIND = 24
NUMBERS = range(10, 50)
LABELS = (("left", "right"), ("yes", "no"), ("north", "south"))


@dataclass(frozen=True)
class Rule:
    """One composition: its instruction, and what makes a question with its answer."""

    name: str
    family: Family
    instruction: str
    make: Callable[[Generator], tuple[str, str]]
    choices: tuple[str, ...] | None = None
    measured: bool = False
    """Whether it is kept for measuring, and never trained on."""

    def example(self, generator: Generator, *, instructed: bool = True) -> Example:
        """Make one question, with the words of the instruction or without them."""
        question, answer = self.make(generator)
        asked = f"{self.instruction}: {question}" if instructed else question
        return Example(asked, answer, self.choices)

    def questions(self, generator: Generator) -> list[Example]:
        """Make different questions, as many as a task needs, all with the instruction."""
        return made(generator, self.example)


@cache
def rules() -> dict[str, Rule]:
    """Return all compositions by name.

    A measured one has each of its parts in several that are trained on.
    """
    every = [*_word_rules(), *_number_rules(), *_label_rules()]
    return {rule.name: rule for rule in every}


def measured_rules() -> list[Rule]:
    """Return the compositions that are kept for measuring."""
    return [rule for rule in rules().values() if rule.measured]


def trained_rules() -> list[Rule]:
    """Return the compositions that may be trained on."""
    return [rule for rule in rules().values() if not rule.measured]


def training_questions(generator: Generator) -> list[Example]:
    """Return instructed questions of all trained compositions in turn: what to tune on."""
    each = [rule.questions(generator) for rule in trained_rules()]
    turns = min(3 * NUM_MADE // len(each), *map(len, each))
    return [
        Example(questions[turn].input, questions[turn].output)
        for turn in range(turns)
        for questions in each
    ]


@cache
def vocabulary() -> tuple[str, ...]:
    """Return every word, number and mark that a question, an instruction or an answer can hold."""
    own = [word for kind in KINDS for word in kind_words(kind)]
    told = [word for rule in rules().values() for word in rule.instruction.split()]
    labels = [label for pair in LABELS for label in pair]
    numbers = [str(number) for number in (*NUMBERS, NUMBERS.stop)]
    marks = ["!", "(", ")", ":"]
    capitals = [word.upper() for word in own]
    return tuple(dict.fromkeys([*KINDS, *own, *capitals, *told, *labels, *numbers, *marks]))


@cache
def kind_words(kind: str) -> tuple[str, ...]:
    """Return the words of a kind; no word is of two kinds."""
    counts = [word for other in KINDS for word in set(words(other))]
    single = [w for w in words(kind) if counts.count(w) == 1 and w.isalpha() and w not in KINDS]
    return tuple(single[:WORDS_A_KIND])


# -- words of a list ---------------------------------------------------------------------------

_SELECTIONS: dict[str, str] = {
    "first": "the first word", "second": "the second word", "third": "the third word",
    "outer": "the outer words", "animal": "the animal", "food": "the food", "tool": "the tool",
}  # fmt: skip
_FORMS: dict[str, str] = {
    "plain": "Give {}", "capitals": "Give {} in capitals", "twice": "Give {} twice",
    "marked": "Give {} with a mark", "brackets": "Give {} in brackets",
    "kind": "Give the kind of {}",
}  # fmt: skip


def _word_rules() -> list[Rule]:
    found: list[Rule] = []
    for column, (selection, meant) in enumerate(_SELECTIONS.items()):
        for row, (form, wording) in enumerate(_FORMS.items()):
            if form == "kind" and selection in KINDS:
                continue  # its answer would always be the same
            found.append(
                Rule(
                    f"{selection}-{form}", "words", wording.format(meant),
                    _word_maker(selection, form), measured=(column + row) % 3 == 0,
                )
            )  # fmt: skip
    return found


def _word_maker(selection: str, form: str) -> Callable[[Generator], tuple[str, str]]:
    def make(generator: Generator) -> tuple[str, str]:
        others = [kind for kind in KINDS if kind != selection]
        drawn = [others[i] for i in generator.permutation(len(others))[:3]]
        if selection in KINDS:
            drawn[int(generator.integers(3))] = selection
        listed = [_pick(kind_words(kind), generator) for kind in drawn]
        chosen = _chosen(listed, drawn, selection)
        return " ".join(listed), _formed(chosen, form)

    return make


def _chosen(listed: Sequence[str], kinds: Sequence[str], selection: str) -> list[str]:
    if selection in kinds:
        return [listed[kinds.index(selection)]]
    places = {"first": (0,), "second": (1,), "third": (2,), "outer": (0, 2)}[selection]
    return [listed[place] for place in places]


def _formed(chosen: Sequence[str], form: str) -> str:
    match form:
        case "plain":
            return " ".join(chosen)
        case "capitals":
            return " ".join(chosen).upper()
        case "twice":
            return " ".join(word for word in chosen for _ in range(2))
        case "marked":
            return " ".join([*chosen, "!"])
        case "brackets":
            return " ".join(["(", *chosen, ")"])
        case _:
            return " ".join(_kind_of(word) for word in chosen)


@cache
def _kind_of(word: str) -> str:
    return next(kind for kind in KINDS if word in kind_words(kind))


# -- numbers -----------------------------------------------------------------------------------

_PICKS: dict[str, Callable[[Sequence[int]], int]] = {
    "first": lambda numbers: numbers[0],
    "third": lambda numbers: numbers[2],
    "largest": max,
    "smallest": min,
}
_CHANGES: dict[str, tuple[str, Callable[[int], str]]] = {
    "plain": ("Give the {} number", str),
    "plus-one": ("Give the {} number plus one", lambda number: str(number + 1)),
    "marked": ("Give the {} number with a mark", lambda number: f"{number} !"),
    "twice": ("Give the {} number twice", lambda number: f"{number} {number}"),
}


def _number_rules() -> list[Rule]:
    return [
        Rule(
            f"{pick}-number-{change}", "numbers", wording.format(pick),
            _number_maker(pick, change), measured=(column + row) % 4 == 0,
        )
        for column, pick in enumerate(_PICKS)
        for row, (change, (wording, _)) in enumerate(_CHANGES.items())
    ]  # fmt: skip


def _number_maker(pick: str, change: str) -> Callable[[Generator], tuple[str, str]]:
    def make(generator: Generator) -> tuple[str, str]:
        drawn = generator.choice(len(NUMBERS), size=3, replace=False)
        listed = [NUMBERS[int(place)] for place in drawn]
        return " ".join(map(str, listed)), _CHANGES[change][1](_PICKS[pick](listed))

    return make


# -- labels ------------------------------------------------------------------------------------


def _label_rules() -> list[Rule]:
    return [
        Rule(
            f"{one}-{other}-{labels[0]}", "labels",
            f"Say {labels[0]} for {one} and {labels[1]} for {other}",
            _label_maker(one, other, labels), labels, measured=(row + column) % 4 == 0,
        )
        for row, (one, other) in enumerate(combinations(KINDS, 2))
        for column, labels in enumerate(LABELS)
    ]  # fmt: skip


def _label_maker(
    one: str, other: str, labels: tuple[str, str]
) -> Callable[[Generator], tuple[str, str]]:
    def make(generator: Generator) -> tuple[str, str]:
        side = int(generator.integers(2))
        pool = kind_words((one, other)[side])
        pair = [pool[int(i)] for i in generator.choice(len(pool), size=2, replace=False)]
        return " ".join(pair), labels[side]

    return make


def _pick(pool: Sequence[str], generator: Generator) -> str:
    return pool[int(generator.integers(len(pool)))]

"""Guard tasks: names and short sentences rewritten by a rule that the shots show.

Asked while a model trains, to see whether it still learns from examples: neither measured later nor
trained on, and of other kinds of rule than both the suites and the anchors. They are done well by
small models and lost early by tuning that harms (docs/tasks.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from keepshot.prompts import Example
from keepshot.tasks.procedural import made, sample, words

if TYPE_CHECKING:
    from numpy.random import Generator


def add_article(generator: Generator) -> list[Example]:
    """`empty box` -> `an empty box`."""

    def make(g: Generator) -> Example:
        look, thing = _one("look", g), _one("household", g)
        article = "an" if look[0] in "aeiou" else "a"
        return Example(f"{look} {thing}", f"{article} {look} {thing}")

    return made(generator, make)


def exchange(generator: Generator) -> list[Example]:
    """`mirror, vase` -> `vase, mirror`."""

    def make(g: Generator) -> Example:
        first, second = sample(words("household"), 2, g)
        return Example(f"{first}, {second}", f"{second}, {first}")

    return made(generator, make)


def initials(generator: Generator) -> list[Example]:
    """`Anna Brooks` -> `A. B.`."""

    def make(g: Generator) -> Example:
        first, last = _one("first name", g), _one("last name", g)
        return Example(f"{first} {last}", f"{first[0]}. {last[0]}.")

    return made(generator, make)


def negate(generator: Generator) -> list[Example]:
    """`Anna paints the box.` -> `Anna does not paint the box.`."""

    def make(g: Generator) -> Example:
        name, deed, thing = _one("first name", g), _one("deed", g), _one("household", g)
        return Example(f"{name} {deed}s the {thing}.", f"{name} does not {deed} the {thing}.")

    return made(generator, make)


def ask_back(generator: Generator) -> list[Example]:
    """`Anna is tired.` -> `Is Anna tired?`."""

    def make(g: Generator) -> Example:
        name, state = _one("first name", g), _one("state", g)
        return Example(f"{name} is {state}.", f"Is {name} {state}?")

    return made(generator, make)


def _one(group: str, generator: Generator) -> str:
    return sample(words(group), 1, generator)[0]

"""Anchor tasks: what can be done to the written form of words, whatever they mean.

The keep term draws its few-shot prompts from these. They share neither words nor kind of rule with
any task of suites `core`, `full` and `guard`, so that a kept ability is not a trained one. Five
tasks of suite `composed` put other words in capitals or twice; a run refuses them beside these.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from keepshot.prompts import Example
from keepshot.tasks.procedural import words

if TYPE_CHECKING:
    from numpy.random import Generator

NUM_MADE = 420


def upper_case(generator: Generator) -> list[Example]:
    """`almost` -> `ALMOST`."""
    return [Example(word, word.upper()) for word in _words(generator)]


def repeat_words(generator: Generator) -> list[Example]:
    """`almost legend` -> `almost legend almost legend`."""
    return [Example(f"{a} {b}", f"{a} {b} {a} {b}") for a, b in _pairs(generator)]


def title_case(generator: Generator) -> list[Example]:
    """`almost legend` -> `Almost Legend`."""
    return [Example(f"{a} {b}", f"{a.title()} {b.title()}") for a, b in _pairs(generator)]


def drop_vowels(generator: Generator) -> list[Example]:
    """`legend.` -> `lgnd`."""
    shortened = {word: re.sub("[aeiou]", "", word) for word in _words(generator)}
    return [Example(f"{word}.", rest) for word, rest in shortened.items() if rest != word]


def spell_out(generator: Generator) -> list[Example]:
    """`motto:` -> `m-o-t-t-o`."""
    return [Example(f"{word}:", "-".join(word)) for word in _words(generator)]


def link_words(generator: Generator) -> list[Example]:
    """`almost, legend` -> `almost and legend`."""
    return [Example(f"{a}, {b}", f"{a} and {b}") for a, b in _pairs(generator)]


def _words(generator: Generator) -> list[str]:
    pool = words("anchor")
    return [pool[int(index)] for index in generator.permutation(len(pool))]


def _pairs(generator: Generator) -> list[tuple[str, str]]:
    everything = list(itertools.permutations(words("anchor"), 2))
    chosen = generator.choice(len(everything), size=NUM_MADE, replace=False)
    return [everything[int(index)] for index in chosen]

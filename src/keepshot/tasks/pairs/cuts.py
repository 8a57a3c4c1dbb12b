"""The two cuts of the instruction set: thirty kinds, or one kind as often as all together.

The contrast serves to see what diversity of general data does at equal size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from keepshot.prompts import Example
from keepshot.tasks.pairs.kind import Kind
from keepshot.tasks.pairs.numbers import NUMBER_KINDS
from keepshot.tasks.pairs.texts import TEXT_KINDS
from keepshot.tasks.pairs.words import WORD_KINDS

if TYPE_CHECKING:
    from numpy.random import Generator

KINDS: tuple[Kind, ...] = (*WORD_KINDS, *NUMBER_KINDS, *TEXT_KINDS)
PER_KIND = 80
HOMOGENEOUS = "sort-words"
"""The one kind of the homogeneous cut; it has the most different instructions."""


def diverse(generator: Generator) -> list[Example]:
    """Make the diverse cut: `PER_KIND` pairs of each kind."""
    return [pair for kind in KINDS for pair in kind.pairs(PER_KIND, generator)]


def homogeneous(generator: Generator) -> list[Example]:
    """Make the homogeneous cut: as many pairs, all of one kind."""
    only = next(kind for kind in KINDS if kind.name == HOMOGENEOUS)
    return only.pairs(PER_KIND * len(KINDS), generator)

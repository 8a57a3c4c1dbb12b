"""What a kind of instruction is, and the words that instructions are about.

The words occur in no word list of the measured tasks or anchors, and no kind asks for what one of
those asks for, so that general data teaches none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from keepshot.prompts import Example

if TYPE_CHECKING:
    from numpy.random import Generator

T = TypeVar("T")
Made: TypeAlias = "tuple[dict[str, str], str]"
"""What fills the places of a wording, and the answer."""

THINGS = (
    "balloon", "barrel", "basin", "beacon", "beaker", "bobbin", "bolster", "brooch", "buoy",
    "candle", "canopy", "casket", "chalk", "cork", "crate", "crayon", "cymbal", "dial", "domino",
    "doorbell", "fan", "fiddle", "flagpole", "flask", "gadget", "gavel", "globe", "goblet",
    "hammock", "harness", "hinge", "jar", "kettle", "keyring", "lantern", "lintel", "locket",
    "magnet", "marble", "mattress", "medal", "mural", "notebook", "padlock", "pager", "pebble",
    "pendulum", "pillow", "plaque", "pottery", "pouch", "prism", "puppet", "quilt", "ribbon",
    "rudder", "saddle", "satchel", "scroll", "sieve", "sponge", "statue", "stencil", "stool",
    "tablet", "tassel", "teapot", "thermos", "tinsel", "tripod", "trophy", "trunk", "turbine",
    "valve", "vase", "visor", "wallet", "whistle", "wick", "zipper",
)  # fmt: skip
PEOPLE = (
    "Abel", "Agnes", "Basil", "Bela", "Cleo", "Dario", "Edda", "Enzo", "Farid", "Freya", "Gwen",
    "Hugo", "Idris", "Ines", "Joel", "Kaya", "Lars", "Leila", "Milo", "Noor", "Odin", "Otis",
    "Petra", "Priya", "Rafi", "Selma", "Tariq", "Uma", "Vito", "Yara",
)  # fmt: skip
PLACES = (
    "Alder Bay", "Birchford", "Cold Harbour", "Duneside", "Eastmere", "Fernhill", "Gullport",
    "Highmoor", "Inverlow", "Juniper Creek", "Kestrel Point", "Larkfield", "Millbrook", "Northgate",
    "Otterton", "Pinewick", "Redcliff", "Saltmarsh", "Thornbury", "Westhaven",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of instruction: several wordings of it, and what makes its content and answer."""

    name: str
    wordings: tuple[str, ...]
    make: Callable[[Generator], Made]

    def pairs(self, count: int, generator: Generator) -> list[Example]:
        """Make `count` pairs with different instructions; all wordings come up.

        The wordings are taken in turn, so that each is as frequent as the others.
        """
        made: dict[str, Example] = {}
        for attempt in range(50 * count):
            fields, answer = self.make(generator)
            wording = self.wordings[attempt % len(self.wordings)]
            question = wording.format(**fields)
            made.setdefault(question.casefold(), Example(question, answer))
            if len(made) == count:
                return list(made.values())
        raise AssertionError(f"kind {self.name!r} has fewer than {count} different instructions")


def pick(generator: Generator, pool: Sequence[T]) -> T:
    """Draw one of `pool`."""
    return pool[int(generator.integers(len(pool)))]


def sample(generator: Generator, pool: Sequence[T], count: int) -> list[T]:
    """Draw `count` different ones of `pool`."""
    return [pool[int(i)] for i in generator.choice(len(pool), size=count, replace=False)]


def number(generator: Generator, low: int, high: int) -> int:
    """Draw an integer from `low` to `high`, both included."""
    return int(generator.integers(low, high + 1))

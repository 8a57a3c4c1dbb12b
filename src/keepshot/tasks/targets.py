"""Targets made by code that want more than a word: working before a result, a long text to read.

A maker takes a generator and returns questions, as in `procedural`, whose word lists it uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from keepshot.prompts import Example
from keepshot.tasks.procedural import made, sample, words

if TYPE_CHECKING:
    from numpy.random import Generator

NUM_MADE = 550
"""Enough for every split of a task and some 230 rows to train on."""

REQUESTS: dict[str, tuple[str, ...]] = {
    "refund": (
        "I would like my money back.",
        "Please return the full amount to my card.",
        "Kindly pay back what I was charged.",
        "I am sending it back and expect to be repaid.",
    ),
    "exchange": (
        "Could you swap it for the next size up?",
        "I would rather have the same thing in another colour.",
        "Please send a different model in its place.",
        "May I trade it for the larger one?",
    ),
    "repair": (
        "Can somebody mend it?",
        "I only need the broken part fixed.",
        "Please tell me where it can be put right.",
        "It should be looked at in your workshop.",
    ),
    "invoice": (
        "My accountant needs the bill again.",
        "Please send the receipt as a file.",
        "I cannot find the document with the tax number on it.",
        "Could I have a copy of what I paid, on paper?",
    ),
    "address": (
        "From next month parcels should go to my new flat.",
        "We have moved, so please change where you deliver.",
        "The street in your records is out of date.",
        "Note that I live somewhere else now.",
    ),
}
ASIDES: tuple[str, ...] = (
    "I bought a {thing} from your shop in {town} last {day}.",
    "{name} at the counter was very friendly.",
    "My neighbour has the same {thing} and likes it.",
    "It rained all {day} when the parcel came.",
    "We are in {town} until {day}, so mail is best.",
    "I have been a customer for many years.",
    "The box had been opened by {name}, who signed for it.",
    "This is not about the {thing} that I ordered before.",
    "The price was fair, I have no complaint there.",
    "Your new shop in {town} is easy to find.",
)
THINGS = ("pens", "cups", "coins", "shells", "stamps", "tickets", "keys", "candles", "marbles")


def request_letters(generator: Generator) -> list[Example]:
    """A letter of five sentences to a shop -> what is asked for, one of five."""
    labels = tuple(REQUESTS)

    def make(g: Generator) -> Example:
        label = sample(labels, 1, g)[0]
        asides = [_filled(aside, g) for aside in sample(ASIDES, 4, g)]
        asides.insert(int(g.integers(5)), sample(REQUESTS[label], 1, g)[0])
        return Example(" ".join(asides), label, labels)

    return made(generator, make, NUM_MADE)


def worked_sums(generator: Generator) -> list[Example]:
    """A story of boxes, some given away or found -> `3 * 4 = 12. 12 - 5 = 7. So 7.`."""

    def make(g: Generator) -> Example:
        name, thing = sample(words("first name"), 1, g)[0], sample(THINGS, 1, g)[0]
        groups, each = int(g.integers(2, 10)), int(g.integers(2, 10))
        total = groups * each
        change = int(g.integers(1, total))
        if g.integers(2):
            end, sign, result = f"gives {change} away", "-", total - change
        else:
            end, sign, result = f"finds {change} more", "+", total + change
        question = (
            f"{name} has {groups} boxes of {each} {thing} each and {end}. How many are there now?"
        )
        working = f"{groups} * {each} = {total}. {total} {sign} {change} = {result}."
        return Example(question, f"{working} So {result}.")

    return made(generator, make, NUM_MADE)


def _filled(sentence: str, generator: Generator) -> str:
    thing, name, town, day = (
        sample(words(group), 1, generator)[0] for group in ("clothing", "first name", "town", "day")
    )
    return sentence.format(thing=thing, name=name, town=town, day=day)

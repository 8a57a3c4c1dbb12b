"""Tasks made by code and seed: arithmetic, formats, positions, look-ups and made-up labels.

Most of these rules cannot be recalled, only read off the demonstrations. A maker takes a generator
and returns questions; word lists are the ones beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from keepshot.prompts import Example

if TYPE_CHECKING:
    from numpy.random import Generator

T = TypeVar("T")
Maker: TypeAlias = "Callable[[Generator], list[Example]]"
NUM_MADE = 420
"""How many questions a maker that could go on for ever stops at."""

DATA = Path(__file__).parent / "data"


@cache
def words(group: str) -> tuple[str, ...]:
    """Return the hand-written words of a group such as `animal` or `verb`, without repeats."""
    lists: dict[str, str] = json.loads((DATA / "words.json").read_text(encoding="utf-8"))
    return tuple(dict.fromkeys(lists[group].split()))


def addition(generator: Generator) -> list[Example]:
    """`17 + 5` -> `22`."""
    pairs = [(a, b) for a in range(10, 60) for b in range(2, 10)]
    return [Example(f"{a} + {b}", str(a + b)) for a, b in _shuffled(pairs, generator)]


def private_concatenation(generator: Generator) -> list[Example]:
    """`4 # 7` -> `47`: an operation that no textbook has."""
    pairs = [(a, b) for a in range(1, 20) for b in range(1, 20)]
    return [Example(f"{a} # {b}", f"{a}{b}") for a, b in _shuffled(pairs, generator)]


def largest(generator: Generator) -> list[Example]:
    """`14, 83, 27` -> `83`."""
    return made(generator, lambda g: _numbers_question(_integers(g, 3, 10, 100), max))


def date_format(generator: Generator) -> list[Example]:
    """`2012-06-14` -> `!06!14!2012!`: an order and marks that only the shots show."""

    def make(g: Generator) -> Example:
        year, month, day = g.integers(1960, 2030), g.integers(1, 13), g.integers(1, 29)
        return Example(f"{year}-{month:02}-{day:02}", f"!{month:02}!{day:02}!{year}!")

    return made(generator, make)


def reference_format(generator: Generator) -> list[Example]:
    """`page 17 of part 4` -> `4:17`."""
    places = [(part, page) for part in range(1, 10) for page in range(2, 90)]
    return [
        Example(f"page {page} of part {part}", f"{part}:{page}")
        for part, page in _shuffled(places, generator)[:NUM_MADE]
    ]


def second_item(generator: Generator) -> list[Example]:
    """`soup, tiger, saw` -> `tiger`: which position counts must be seen."""
    pool = words("food") + words("animal") + words("tool") + words("vehicle")

    def make(g: Generator) -> Example:
        chosen = sample(pool, 3, g)
        return Example(", ".join(chosen), chosen[1])

    return made(generator, make)


def last_item(generator: Generator) -> list[Example]:
    """`oak, rose, fern` -> `fern`."""
    pool = words("plant") + words("clothing") + words("instrument") + words("job")

    def make(g: Generator) -> Example:
        chosen = sample(pool, int(g.integers(3, 6)), g)
        return Example(", ".join(chosen), chosen[-1])

    return made(generator, make)


def look_up(generator: Generator) -> list[Example]:
    """`kim=4 leo=9 ada=2; leo` -> `9`."""
    names = [name.lower() for name in words("first name") if len(name) <= 5]

    def make(g: Generator) -> Example:
        people = sample(names, 3, g)
        values = _integers(g, 3, 1, 10)
        asked = int(g.integers(3))
        table = " ".join(f"{person}={v}" for person, v in zip(people, values, strict=True))
        return Example(f"{table}; {people[asked]}", str(values[asked]))

    return made(generator, make)


def pick_animal(generator: Generator) -> list[Example]:
    """`lamp, cow, bread` -> `cow`: that animals are meant must be seen."""
    others = words("food") + words("tool") + words("clothing") + words("vehicle")

    def make(g: Generator) -> Example:
        animal = sample(words("animal"), 1, g)[0]
        shown = _shuffled([animal, *sample(others, 2, g)], g)
        return Example(", ".join(shown), animal)

    return made(generator, make)


def pick_colour(generator: Generator) -> list[Example]:
    """`boot, crimson, pear` -> `crimson`."""
    others = words("animal") + words("job") + words("body") + words("instrument")

    def make(g: Generator) -> Example:
        colour = sample(words("colour"), 1, g)[0]
        shown = _shuffled([colour, *sample(others, 2, g)], g)
        return Example(", ".join(shown), colour)

    return made(generator, make)


def word_groups(generator: Generator) -> list[Example]:
    """`violin` -> `instrument`."""
    groups = ("animal", "food", "clothing", "vehicle", "job", "instrument", "plant")
    pairs = [Example(word, group, groups) for group in groups for word in words(group)]
    return _shuffled(pairs, generator)


def number_names(generator: Generator) -> list[Example]:
    """`forty-two` -> `42`."""
    return [Example(_spelled(n), str(n)) for n in _shuffled(range(11, 400), generator)]


def number_spelling(generator: Generator) -> list[Example]:
    """`42` -> `forty-two`."""
    return [Example(str(n), _spelled(n)) for n in _shuffled(range(11, 400), generator)]


def phone_extraction(generator: Generator) -> list[Example]:
    """A note that holds a telephone number -> the number."""
    notes = (
        "{name} called, please ring back on {phone} after lunch.",
        "Dentist moved to {day}; questions to {phone}.",
        "New number for {name}: {phone} (mobile).",
        "If the {town} office is closed, try {phone}.",
        "{day}, 9 am: {name} from {town}, tel. {phone}",
        "Reach me at {phone} until {day}. {name}",
        "Keys are with {name}. Phone {phone} first.",
        "Taxi in {town}? {phone} is reliable, says {name}.",
    )

    def make(g: Generator) -> Example:
        phone = f"555-{int(g.integers(0, 10000)):04}"
        return Example(_note(notes, g, phone=phone), phone)

    return made(generator, make)


def town_extraction(generator: Generator) -> list[Example]:
    """A note that names a town -> the town."""
    notes = (
        "{name} flies to {town} on {day}.",
        "Meeting in {town} moved to {day}, sorry!",
        "On {day} we left {town} in heavy rain.",
        "{name} grew up in {town} and still misses it.",
        "Does the {day} train stop in {town}?",
        "I sent the parcel to {name} in {town}.",
        "{town} was so hot that {name} stayed inside all {day}.",
        "Back from {town} by {day}, I promise. {name}",
    )

    def make(g: Generator) -> Example:
        town = sample(words("town"), 1, g)[0]
        return Example(_note(notes, g, town=town), town)

    return made(generator, make)


def day_extraction(generator: Generator) -> list[Example]:
    """A note that names a day of the week -> the day."""
    notes = (
        "{name} flies to {town} on {day}.",
        "Could we push the {town} call to {day}?",
        "The bins go out on {day}, {name}, not tomorrow.",
        "{day} suits me better than the weekend, says {name}.",
        "Closed on {day} for repairs.",
        "Since {day} {name} has had a cold.",
        "Choir starts again {day} at eight in {town}.",
    )

    def make(g: Generator) -> Example:
        day = sample(words("day"), 1, g)[0]
        return Example(_note(notes, g, day=day), day)

    return made(generator, make)


def _note(notes: Sequence[str], generator: Generator, **known: str) -> str:
    first, last, town, day = (
        sample(words(group), 1, generator)[0]
        for group in ("first name", "last name", "town", "day")
    )
    facts = {"name": f"{first} {last}", "town": town, "day": day}
    return sample(notes, 1, generator)[0].format(**(facts | known))


def made(
    generator: Generator, make: Callable[[Generator], Example], number: int = NUM_MADE
) -> list[Example]:
    """Call `make` until there are `number` different questions, or 20 times as often."""
    found: dict[str, Example] = {}
    for _ in range(20 * number):
        example = make(generator)
        found.setdefault(example.input, example)
        if len(found) == number:
            break
    return list(found.values())


def _numbers_question(numbers: Sequence[int], rule: Callable[[Sequence[int]], int]) -> Example:
    return Example(", ".join(map(str, numbers)), str(rule(numbers)))


def _integers(generator: Generator, count: int, low: int, high: int) -> list[int]:
    """Draw different integers from `low` to below `high`."""
    drawn = generator.choice(high - low, size=count, replace=False)
    return [low + int(value) for value in drawn]


def sample(pool: Sequence[T], count: int, generator: Generator) -> list[T]:
    """Draw `count` different members of a pool."""
    return [pool[int(i)] for i in generator.choice(len(pool), size=count, replace=False)]


def _shuffled(pool: Sequence[T], generator: Generator) -> list[T]:
    return [pool[int(i)] for i in generator.permutation(len(pool))]


def _spelled(number: int) -> str:
    """Spell a number below 1000."""
    small, tens = words("small number"), words("tens")
    if number < 20:
        return small[number]
    if number < 100:
        rest = number % 10
        return tens[number // 10 - 2] + (f"-{small[rest]}" if rest else "")
    rest = number % 100
    return f"{small[number // 100]} hundred" + (f" and {_spelled(rest)}" if rest else "")

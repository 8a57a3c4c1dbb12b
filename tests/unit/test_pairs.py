"""The instruction set: size, balance, answers worked out a second time, and what it must not hold.

The answers are recomputed here from the text of the instruction, by other means than the makers'.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta

import numpy as np
import pytest

from keepshot.assets import AssetStore
from keepshot.prompts import Example
from keepshot.tasks.catalog import CATALOG, load_task
from keepshot.tasks.instruction_templates import embedded_set
from keepshot.tasks.pairs.cuts import HOMOGENEOUS, KINDS, PER_KIND, diverse, homogeneous
from keepshot.tasks.pairs.texts import NOT_TOLD

BY_NAME = {kind.name: kind for kind in KINDS}
CUTS = ("instructions", "instructions-homogeneous")


def pairs(name: str) -> list[Example]:
    return BY_NAME[name].pairs(60, np.random.default_rng(1))


def numbers(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"\d+", text)]


def test_thirty_kinds_in_two_cuts_of_equal_size():
    cuts = [make(np.random.default_rng(0)) for make in (diverse, homogeneous)]
    assert len(KINDS) == len(BY_NAME) == 30
    assert all(len(kind.wordings) == len(set(kind.wordings)) >= 4 for kind in KINDS)
    assert len(cuts[0]) == len(cuts[1]) == 30 * PER_KIND
    assert HOMOGENEOUS in BY_NAME
    for name in CUTS:
        assert len(load_task(name, None).train) >= 2000  # type: ignore[arg-type]
    inputs = {pair.input for pair in cuts[0]}
    assert len(inputs) == len(cuts[0])


@pytest.mark.parametrize("name", BY_NAME)
def test_a_kind_is_varied_and_the_same_for_the_same_seed(name: str):
    first, again = pairs(name), pairs(name)
    assert first == again != BY_NAME[name].pairs(60, np.random.default_rng(2))
    assert len({pair.input.casefold() for pair in first}) == 60
    assert all(p.output.strip() == p.output != "" and "\n" not in p.output for p in first)
    # No single answer can be given blindly, and nothing is left unfilled.
    assert Counter(pair.output for pair in first).most_common(1)[0][1] <= 50
    assert not any(re.search(r"\{\w*\}", pair.input) for pair in first)


ARITHMETIC: dict[str, Callable[[Example], str]] = {
    "numbers-between": lambda p: ", ".join(
        map(str, range(numbers(p.input)[0] + 1, numbers(p.input)[1]))
    ),
    "odd-or-even": lambda p: ("even", "odd")[numbers(p.input)[0] & 1],
    "next-number": lambda p: str(2 * numbers(p.input)[3] - numbers(p.input)[2]),
    "total-price": lambda p: f"{np.prod(numbers(p.input)[:2])} euros",
    "round-to-ten": lambda p: f"{round(numbers(p.input)[0], -1)}",
    "within-limits": lambda p: (
        "yes" if sorted(numbers(p.input)[:3])[1] == numbers(p.input)[within(p)] else "no"
    ),
    "count-items": lambda p: str(p.input.count(";") + 1),
    "count-letter": lambda p: str(Counter(counted(p)[1])[counted(p)[0]]),
}


def within(pair: Example) -> int:
    """Where the value stands among the numbers; one wording asks for it first."""
    return 0 if pair.input.startswith("Yes or no") else 2


def counted(pair: Example) -> tuple[str, str]:
    tokens = re.findall(r"[a-z]+", pair.input.replace("'s", ""))
    words = [token for token in tokens if token in THINGS_IN_TEXT]
    letter = next(m for m in re.findall(r"\b([a-z])\b", pair.input.replace("'s", "")) if m)
    return letter, words[-1]


THINGS_IN_TEXT = frozenset(
    word for pair in pairs("sort-words") for word in pair.output.split(", ")
) | frozenset(word for pair in pairs("reverse-list") for word in pair.output.split(", "))


@pytest.mark.parametrize("name", ARITHMETIC)
def test_numbers_come_out_right(name: str):
    for pair in pairs(name):
        assert pair.output == ARITHMETIC[name](pair), pair


def test_lists_come_out_right():
    for pair in pairs("sort-words"):
        words = pair.output.split(", ")
        assert all(a < b for a, b in itertools.pairwise(words))
        assert all(word in pair.input for word in words)
    for pair in pairs("reverse-list"):
        assert ", ".join(pair.output.split(", ")[::-1]) in pair.input
    for pair in pairs("initials"):
        shown = re.findall(r"[a-z]+", pair.input)
        assert pair.output.lower() in "".join(word[0] for word in shown)
    for pair in pairs("odd-one-out"):
        shown = next(re.finditer(r"\w+(?:, \w+){3}", pair.input)).group().split(", ")
        starts = Counter(word[0] for word in shown)
        assert [word for word in shown if starts[word[0]] == 1] == [pair.output]
    for pair in pairs("longest-word"):
        shown = next(re.finditer(r"\w+(?:, \w+){3}", pair.input)).group().split(", ")
        assert sorted(shown, key=len)[-1] == pair.output
    for pair in pairs("drop-repeats"):
        shown = next(re.finditer(r"\w+(?:, \w+){3,}", pair.input)).group().split(", ")
        kept = pair.output.split(", ")
        assert set(kept) == set(shown)
        assert [shown.index(word) for word in kept] == sorted(shown.index(w) for w in kept)


def test_times_and_dates_come_out_right():
    for pair in pairs("add-minutes"):
        begin = re.search(r"\d\d:\d\d", pair.input)
        assert begin is not None
        wait = numbers(pair.input.replace(begin.group(), ""))[0]
        moved = datetime.strptime(begin.group(), "%H:%M") + timedelta(minutes=wait)
        assert pair.output == f"{moved:%H:%M}"
    for pair in pairs("iso-date"):
        written = re.search(r"\d+ [A-Z][a-z]+ \d{4}", pair.input)
        assert written is not None
        assert pair.output == f"{datetime.strptime(written.group(), '%d %B %Y'):%Y-%m-%d}"


def test_texts_come_out_right():
    for pair in pairs("as-json"):
        record = json.loads(pair.output)
        assert list(record) == ["name", "age", "place"]
        assert record["age"] == numbers(pair.input)[0]
        assert record["name"] in pair.input
        assert record["place"] in pair.input
    for pair in pairs("find-address"):
        assert re.findall(r"\S+@\S+\.example", pair.input)[0].strip("()") == pair.output
    for pair in pairs("answer-from-text"):
        assert pair.output in pair.input
        if "Which year" in pair.input:
            assert pair.output.isdigit()
    refused = [pair for pair in pairs("not-in-text") if pair.output == NOT_TOLD]
    assert 20 < len(refused) < 60
    for pair in pairs("row-to-sentence"):
        assert numbers(pair.output) == numbers(pair.input)
    for pair in pairs("who-has-fewer"):
        low, high = numbers(pair.input)
        names = re.findall(r"[A-Z][a-z]+", pair.input)
        people = [name for name in names if name not in ("Who", "Whose", "Between", "A")]
        assert pair.output == people[0 if low < high else 1]


def test_nothing_is_shared_with_what_is_measured_or_anchored():
    store = AssetStore.from_environment(os.environ, quiet=True)
    own = [pair.input.casefold() for name in CUTS for pair in everything(name, store)]
    others = {
        pair.input.casefold()
        for name in CATALOG
        if name not in CUTS
        for pair in everything(name, store)
    }
    assert not others & set(own)
    # Nor does an instruction hold a measured question of several words, as part of its text.
    longer = [question for question in others if len(question.split()) > 2]
    assert len(longer) > 1000
    joined = "\n\n".join(own)
    assert [question for question in longer if question in joined] == []
    asked = {prompt.prompt.casefold() for prompt in embedded_set().prompts}
    assert not asked & set(own)
    openings = {" ".join(prompt.split()[:4]) for prompt in asked}
    assert not openings & {" ".join(question.split()[:4]) for question in own}


def everything(name: str, store: AssetStore) -> tuple[Example, ...]:
    task = load_task(name, store)
    return task.demonstrations + task.validation + task.test + task.train

"""Tasks whose texts were written for this project: topics, feelings, facts and a tuning target.

Each lies in `data/` as JSONL, one question a line, classes interleaved or not: the catalog
shuffles.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from numpy.random import Generator

from keepshot.prompts import Example
from keepshot.tasks.source import read_examples

DATA = Path(__file__).parent / "data"


def written(name: str) -> list[Example]:
    """Return the questions of `data/<name>.jsonl`, in file order."""
    return list(_read(name))


def relabelled(name: str, labels: Sequence[str]) -> list[Example]:
    """Return the questions of a file with its sorted classes renamed to `labels`."""
    examples = _read(name)
    names = dict(zip(sorted({e.output for e in examples}), labels, strict=True))
    return [Example(e.input, names[e.output], tuple(labels)) for e in examples]


def opposites(generator: Generator) -> list[Example]:
    """`empty` -> `full`, among three other answers of the same list."""
    pairs = _read("opposites")
    both = [*pairs, *(Example(e.output, e.input) for e in pairs)]
    questions: list[Example] = []
    for pair in both:
        others = [e.output for e in both if e.output not in (pair.input, pair.output)]
        wrong = [others[int(i)] for i in generator.choice(len(others), size=3, replace=False)]
        shown = [pair.output, *wrong]
        order = generator.permutation(4)
        questions.append(Example(pair.input, pair.output, tuple(shown[int(i)] for i in order)))
    return questions


@cache
def _read(name: str) -> tuple[Example, ...]:
    return tuple(read_examples(DATA / f"{name}.jsonl"))

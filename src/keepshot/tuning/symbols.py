"""Few-shot samples whose labels are arbitrary words: symbol tuning (arXiv 2305.08298).

A label that means nothing, and is another one in every sample, can only be read off the
demonstrations, so each sample shows the query's own label at least once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from keepshot.errors import ConfigError
from keepshot.prompts import Example

SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "zo")
SYMBOLS = tuple(first + second for first in SYLLABLES for second in SYLLABLES if first != second)
MOST_LABELS = 32


def symbol_windows(
    examples: Sequence[Example], shots: int, generator: np.random.Generator, *, name: str
) -> list[list[Example]]:
    """Return one window of `shots` demonstrations and a query for each example as the query.

    Args:
        examples: of a task with few labels, each of which two examples have.
        shots: demonstrations in a window; one of them has the query's label.
        generator: draws demonstrations, their order and the symbols.
        name: of the task, for error messages.

    Raises:
        ConfigError: if there are more labels than `MOST_LABELS`, or one that a single example has.
    """
    alike: dict[str, list[int]] = defaultdict(list)
    for number, example in enumerate(examples):
        alike[example.output].append(number)
    single = [label for label, numbers in alike.items() if len(numbers) < 2]
    if len(alike) > MOST_LABELS or len(alike) < 2 or single or len(examples) <= shots:
        raise ConfigError(
            f"mix: labels=symbols needs 2 to {MOST_LABELS} labels with two examples each, but "
            f"{name!r} has {len(alike)} in {len(examples)} examples"
            f"{f' ({single[0]!r} once)' if single else ''}; take a classification task"
        )
    return [_window(examples, query, alike, shots, generator) for query in range(len(examples))]


def _window(
    examples: Sequence[Example],
    query: int,
    alike: dict[str, list[int]],
    shots: int,
    generator: np.random.Generator,
) -> list[Example]:
    same = [number for number in alike[examples[query].output] if number != query]
    shown = [int(generator.choice(same))]
    others = [n for n in range(len(examples)) if n not in (query, shown[0])]
    shown += [int(n) for n in generator.choice(others, size=shots - 1, replace=False)]
    ordered = [shown[int(place)] for place in generator.permutation(shots)]
    drawn = generator.choice(len(SYMBOLS), size=len(alike), replace=False)
    meaning = {label: SYMBOLS[int(n)] for label, n in zip(alike, drawn, strict=True)}
    return [
        Example(examples[number].input, meaning[examples[number].output])
        for number in (*ordered, query)
    ]

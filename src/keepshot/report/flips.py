"""Questions whose answer turns from right to wrong, or back, between base and tuned model."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from keepshot.records import ItemResult


@dataclass(frozen=True)
class Flip:
    """One question along the path."""

    task: str
    question: str
    gold: str
    answers: list[tuple[float, str, bool]]
    """(lambda, answer, correct), by rising lambda."""

    @property
    def places(self) -> list[tuple[float, float, bool]]:
        """Where the answer turns: (lambda before, lambda after, right from then on)."""
        pairs = itertools.pairwise(self.answers)
        return [(one[0], two[0], two[2]) for one, two in pairs if one[2] != two[2]]


@dataclass(frozen=True)
class Flips:
    """All flips of a path, counted by step, and some of them in full."""

    steps: list[tuple[float, float, int, int]]
    """(lambda before, lambda after, answers lost, answers won) for every step of the path."""
    shown: list[Flip]
    num_flipped: int
    num_back: int
    """Questions that flip more than once: lost and won again, or the other way round."""
    num_questions: int


def flips(items: Sequence[ItemResult], limit: int = 12) -> Flips | None:
    """Collect flips from the rows of a path: those of arm `path`, at the most shots, first draw.

    Returns:
        None if the rows hold no path of at least two lambdas.
    """
    rows = [item for item in items if item.arm == "path" and item.lam is not None and item.shots]
    if not rows:
        return None
    shots, seed = max(item.shots for item in rows), min(item.seed for item in rows)
    found: dict[tuple[str, str], dict[float, ItemResult]] = defaultdict(dict)
    for item in rows:
        if (item.shots, item.seed) == (shots, seed) and item.lam is not None:
            found[item.task, item.item][item.lam] = item
    lams = sorted({lam for by_lam in found.values() for lam in by_lam})
    if len(lams) < 2:
        return None
    listed = [_flip(by_lam) for by_lam in found.values()]
    turned = [flip for flip in listed if flip.places]
    steps = [
        (
            one,
            two,
            sum((one, two, False) in flip.places for flip in turned),
            sum((one, two, True) in flip.places for flip in turned),
        )
        for one, two in itertools.pairwise(lams)
    ]
    # Those that come back are the interesting ones; tasks take turns.
    rank = {task: 0 for task in {flip.task for flip in turned}}
    order: list[tuple[int, int, int]] = []
    for number, flip in enumerate(turned):
        order.append((-len(flip.places), rank[flip.task], number))
        rank[flip.task] += 1
    shown = [turned[number] for _, _, number in sorted(order)][:limit]
    back = sum(len(flip.places) > 1 for flip in turned)
    return Flips(steps, shown, len(turned), back, len(listed))


def _flip(by_lam: dict[float, ItemResult]) -> Flip:
    first = next(iter(by_lam.values()))
    answers = [(lam, row.answer, row.correct >= 0.5) for lam, row in sorted(by_lam.items())]
    return Flip(first.task, first.question, first.gold, answers)

"""What a page or a table shows of a result document: arms, tasks, changes. Pure selection.

Knows the names of the arms that a run writes; every other arm is a model's reference.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from keepshot.records import ItemResult, PathPoint, ResultDocument, Score, SummaryRow

Kind = Literal["run", "blend", "measure", "unmeasured"]
Measured = tuple[float, tuple[float, float]]
"""A value and its 95 % interval."""


@dataclass(frozen=True)
class Arm:
    """One arm with its summary rows by number of shots; `row` is the one at the most shots."""

    name: str
    by_shots: dict[int, SummaryRow]

    @property
    def row(self) -> SummaryRow:
        """The summary at the largest number of shots measured."""
        return self.by_shots[max(self.by_shots)]

    @property
    def retention(self) -> Measured | None:
        """Share of few-shot ability kept, with its interval."""
        return measured(self.row.retention, self.row.retention_ci95)

    @property
    def target(self) -> Measured | None:
        """Zero-shot score on the task that was tuned for, with its interval."""
        return measured(self.row.target, self.row.target_ci95)


@dataclass(frozen=True)
class TaskScore:
    """One arm on one task, averaged over demonstration draws.

    `ci95` averages the bounds of the draws. All draws share their items, so this is the interval
    of fully dependent draws: never too narrow on their account.
    """

    task: str
    arm: str
    value: float
    ci95: tuple[float, float]
    chance: float
    num_items: int
    num_draws: int


def measured(value: float | None, interval: tuple[float, float] | None) -> Measured | None:
    """Pair a value with its interval, or return None if either is missing."""
    return None if value is None or interval is None else (value, interval)


def arms(document: ResultDocument) -> list[Arm]:
    """Return the arms in the order of their first summary row."""
    rows: dict[str, dict[int, SummaryRow]] = defaultdict(dict)
    for row in document.summary:
        rows[row.arm][row.shots] = row
    return [Arm(name, by_shots) for name, by_shots in rows.items()]


def kind(document: ResultDocument) -> Kind:
    """Tell which job wrote the document from what it holds."""
    if document.path and not document.training:
        return "blend"
    names = {row.arm for row in document.summary}
    if "before" in names and len(names) > 1:
        return "run"
    return "measure" if names else "unmeasured"


def most_shots(document: ResultDocument) -> int:
    """Return the largest number of shots in the summary (0 if it is empty)."""
    return max((row.shots for row in document.summary), default=0)


def differ(first: Measured, second: Measured) -> bool:
    """Tell whether two figures differ at the 5 % level, taking their errors as independent.

    Arms answer the same questions, so their errors are positively correlated as a rule, and the
    test is then on the careful side: it may miss a difference, it seldom claims one wrongly.
    """
    (one, (low_1, high_1)), (two, (low_2, high_2)) = first, second
    return abs(one - two) > math.hypot(high_1 - low_1, high_2 - low_2) / 2


def ability_scores(document: ResultDocument, shots: int) -> list[Score]:
    """Return the scores that few-shot ability is made of: all but the target's."""
    target = document.target_task
    names = {row.arm for row in document.summary}
    return [
        score
        for score in document.scores
        if score.shots == shots and score.task != target and score.arm in names
    ]


def task_scores(document: ResultDocument) -> list[TaskScore]:
    """Return one row per (task, arm) at the most shots, tasks with the largest loss first.

    The loss of a task is the first arm's score less the lowest of the others.
    """
    cells: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for score in ability_scores(document, most_shots(document)):
        cells[score.task, score.arm].append(score)
    rows = [
        TaskScore(
            task=task,
            arm=arm,
            value=_mean(score.value for score in scores),
            ci95=(_mean(s.ci95[0] for s in scores), _mean(s.ci95[1] for s in scores)),
            chance=_mean(score.chance for score in scores),
            num_items=scores[0].num_items,
            num_draws=len(scores),
        )
        for (task, arm), scores in cells.items()
    ]
    order = [arm.name for arm in arms(document)]
    values: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        values[row.task][row.arm] = row.value
    first = order[0] if order else ""
    loss = {
        task: by_arm.get(first, 0.0)
        - min(by_arm[a] for a in by_arm if a != first or len(by_arm) == 1)
        for task, by_arm in values.items()
    }
    return sorted(rows, key=lambda row: (-loss[row.task], row.task, order.index(row.arm)))


def format_means(document: ResultDocument) -> dict[str, tuple[float, float, int]]:
    """Return mean format failure and label leakage over tasks, and n, by arm, at the most shots."""
    scores = ability_scores(document, most_shots(document))
    result: dict[str, tuple[float, float, int]] = {}
    for arm in arms(document):
        own = [score for score in scores if score.arm == arm.name]
        if own:
            by_task: dict[str, list[Score]] = defaultdict(list)
            for score in own:
                by_task[score.task].append(score)
            result[arm.name] = (
                _mean(_mean(s.format_failure for s in group) for group in by_task.values()),
                _mean(_mean(s.label_leakage for s in group) for group in by_task.values()),
                sum(score.num_items for score in own),
            )
    return result


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def path_split(document: ResultDocument) -> list[PathPoint]:
    """Return the path on the split it is best read on: test if it was measured there."""
    test = [point for point in document.path if point.split == "test"]
    return sorted(test or document.path, key=lambda point: point.lam)


@dataclass(frozen=True)
class ChangedAnswer:
    """A question that the first arm got right and another got wrong."""

    task: str
    shots: int
    question: str
    gold: str
    answers: list[tuple[str, str, bool]]
    """(arm, answer, correct), in the order of the summary."""


@dataclass(frozen=True)
class Changes:
    """Answers that changed between two arms, and how often in either direction."""

    before: str
    after: str
    shown: list[ChangedAnswer]
    num_lost: int
    num_gained: int
    num_compared: int


def changes(
    document: ResultDocument, items: Sequence[ItemResult], limit: int = 20
) -> Changes | None:
    """Pick answers that were right in the first arm and wrong in the one that lost most.

    Tasks take turns, so that one bad task does not fill the list. Only one draw of
    demonstrations is compared: the first.

    Returns:
        None if there are no two arms to compare or no rows of both.
    """
    listed = arms(document)
    if len(listed) < 2:
        return None
    lost_most = min(listed[1:], key=lambda arm: (arm.name != "plain", arm.row.icl))
    before, after, shots = listed[0].name, lost_most.name, most_shots(document)
    answers = _by_question(document, items, shots)
    pairs = {key: found for key, found in answers.items() if before in found and after in found}
    if not pairs:
        return None
    lost = [k for k, f in pairs.items() if f[before].correct >= 0.5 > f[after].correct]
    gained = [k for k, f in pairs.items() if f[after].correct >= 0.5 > f[before].correct]
    shown = [_changed(pairs[key], [arm.name for arm in listed]) for key in _taking_turns(lost)]
    return Changes(before, after, shown[:limit], len(lost), len(gained), len(pairs))


def _by_question(
    document: ResultDocument, items: Sequence[ItemResult], shots: int
) -> dict[tuple[str, str], dict[str, ItemResult]]:
    lams = {row.arm: row.lam for row in document.summary}
    target = document.target_task
    found: dict[tuple[str, str], dict[str, ItemResult]] = defaultdict(dict)
    usable = [
        item
        for item in items
        if item.shots == shots
        and item.task != target
        and item.arm in lams
        and item.lam == lams[item.arm]
    ]
    split = "test" if any(item.split == "test" for item in usable) else "validation"
    first_seed = min((item.seed for item in usable), default=0)
    for item in usable:
        if item.split == split and item.seed == first_seed:
            found[item.task, item.item][item.arm] = item
    return found


def _taking_turns(keys: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    turns: dict[str, int] = defaultdict(int)
    ranked: list[tuple[int, str, str]] = []
    for task, item in sorted(keys):
        ranked.append((turns[task], task, item))
        turns[task] += 1
    return [(task, item) for _, task, item in sorted(ranked)]


def _changed(found: dict[str, ItemResult], order: Sequence[str]) -> ChangedAnswer:
    first = next(iter(found.values()))
    return ChangedAnswer(
        task=first.task,
        shots=first.shots,
        question=first.question,
        gold=first.gold,
        answers=[
            (arm, found[arm].answer, found[arm].correct >= 0.5) for arm in order if arm in found
        ],
    )

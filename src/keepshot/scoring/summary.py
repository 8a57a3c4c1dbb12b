"""Per-item rows in, scores and summary rows with intervals out. Pure; no torch.

Pairing is by (task, shots, seed, item), repeats of an item counted: every arm answers the same
questions under the same demonstrations, and a summary refuses rows for which that does not hold.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from keepshot import stats
from keepshot.records import ItemResult, PathPoint, Score, Split, SummaryRow
from keepshot.stats import Interval, Matrix

_Row = tuple[int, tuple[str, int]]
"""Seed and item of a row, and how often that item came before it under that seed."""
BOOTSTRAP_SEED = 20
"""Intervals are reproducible: the same rows give the same bounds."""


def scores(items: Sequence[ItemResult], versions: Mapping[str, int]) -> list[Score]:
    """Return one row per (arm, task, shots, seed), in the order of first appearance.

    Args:
        items: rows of any number of arms.
        versions: version of each task named in `items`.
    """
    cells: dict[tuple[str, str, int, int], list[ItemResult]] = defaultdict(list)
    for item in items:
        cells[item.arm, item.task, item.shots, item.seed].append(item)
    return [_score(cell, versions[cell[0].task]) for cell in cells.values()]


def _score(cell: Sequence[ItemResult], version: int) -> Score:
    first = cell[0]
    interval = stats.proportion(sum(item.correct for item in cell), len(cell))
    per_character = [
        item.correct_per_character for item in cell if item.correct_per_character is not None
    ]
    return Score(
        arm=first.arm,
        model=first.model,
        task=first.task,
        task_version=version,
        shots=first.shots,
        seed=first.seed,
        metric="accuracy" if first.choices else "exact_match",
        value=interval.value,
        ci95=interval.ci95,
        chance=_chance(cell),
        num_items=len(cell),
        format_failure=float(np.mean([item.format_failure for item in cell])),
        label_leakage=float(np.mean([item.label_leakage for item in cell])),
        other_metrics=(
            {"accuracy_per_character": float(np.mean(per_character))} if per_character else {}
        ),
    )


def summarise(items: Sequence[ItemResult], *, target: str | None = None) -> list[SummaryRow]:
    """Return one row per (arm, shots): few-shot ability, retention, target score.

    The first arm in `items` is the one that retention is measured against.

    Args:
        items: rows of one split; all arms on the same items and draws.
        target: name of the task that was tuned for. It never counts towards few-shot ability.
    """
    tables = {arm: _Table(rows, target) for arm, rows in _by_arm(items).items()}
    reference = next(iter(tables.values()))
    rows: list[SummaryRow] = []
    for arm, table in tables.items():
        at_zero = table.icl(0) if 0 in table.shots else None
        score = table.target_score()
        for shots in table.shots:
            icl = table.icl(shots)
            kept = table.retention(reference, shots)
            changed = table.changed(reference, shots)
            rows.append(
                SummaryRow(
                    arm=arm,
                    model=table.first.model,
                    lam=table.first.lam,
                    shots=shots,
                    icl=icl.value,
                    icl_ci95=icl.ci95,
                    icl_gain=None if at_zero is None else icl.value - at_zero.value,
                    retention=kept.value if kept else None,
                    retention_ci95=kept.ci95 if kept else None,
                    changed=changed.value,
                    changed_ci95=changed.ci95,
                    target=score.value if score else None,
                    target_ci95=score.ci95 if score else None,
                    num_items=table.num_items(shots),
                )
            )
    return rows


def path_points(
    items_by_lambda: Mapping[float, Sequence[ItemResult]],
    reference: Sequence[ItemResult],
    *,
    target: str | None,
    split: Split,
) -> list[PathPoint]:
    """Return one point per lambda, at the largest number of shots in the rows.

    Args:
        items_by_lambda: rows of the blend at each lambda.
        reference: rows of the model before tuning, on the same items and draws.
        target: name of the task that was tuned for.
        split: the split that all rows come from.
    """
    before = _Table(reference, target)
    points: list[PathPoint] = []
    for lam, items in sorted(items_by_lambda.items()):
        table = _Table(items, target)
        shots = table.shots[-1]
        icl = table.icl(shots)
        kept = table.retention(before, shots)
        score = table.target_score()
        points.append(
            PathPoint(
                lam=lam,
                split=split,
                icl=icl.value,
                icl_ci95=icl.ci95,
                retention=kept.value if kept else None,
                retention_ci95=kept.ci95 if kept else None,
                target=score.value if score else None,
                target_ci95=score.ci95 if score else None,
                num_items=table.num_items(shots),
                tasks=table.by_task(shots),
                below_base=table.below(before, shots),
            ).model_copy(update=_conduct(items, target, shots))
        )
    return points


def _conduct(
    items: Sequence[ItemResult], target: str | None, shots: int
) -> dict[str, float | None]:
    """Return means over tasks of format failure, leakage and answer length."""
    by_task: dict[str, list[ItemResult]] = defaultdict(list)
    for item in items:
        if item.task != target and item.shots == shots:
            by_task[item.task].append(item)
    free = [rows for rows in by_task.values() if not rows[0].choices]
    lengths = [float(np.mean([len(item.answer) for item in rows])) for rows in free]
    failures = [np.mean([item.format_failure for item in rows]) for rows in by_task.values()]
    leaks = [np.mean([item.label_leakage for item in rows]) for rows in by_task.values()]
    return {
        "format_failure": float(np.mean(failures)),
        "label_leakage": float(np.mean(leaks)),
        "answer_length": float(np.mean(lengths)) if lengths else None,
    }


@dataclass(frozen=True)
class ResampledPath:
    """Scores of a path under resampled questions and draws, the same at every lambda.

    `icl` and `tasks` (by name) are [resamples, lambdas]; so is `target`, None without one.
    """

    lams: tuple[float, ...]
    icl: Matrix
    chance: float
    tasks: Mapping[str, Matrix]
    target: Matrix | None
    following: Matrix | None = None
    """Likewise, of the share of prompts whose instructions are followed."""


def resample_path(
    items_by_lambda: Mapping[float, Sequence[ItemResult]], *, target: str | None
) -> ResampledPath:
    """Resample the questions and draws behind `path_points`; deterministic."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    lams = tuple(sorted(items_by_lambda))
    tables = [_Table(items_by_lambda[lam], target) for lam in lams]
    shots = tables[0].shots[-1]
    matrices = [table.matrices(shots) for table in tables]
    names = list(tables[0].by_task(shots))
    tasks = {
        name: np.stack(stats.resampled_means([own[n] for own in matrices], generator), axis=1)
        for n, name in enumerate(names)
    }
    asked = [table.target_matrix() for table in tables]
    found = [matrix for matrix in asked if matrix is not None]
    return ResampledPath(
        lams=lams,
        icl=np.mean(list(tasks.values()), axis=0),
        chance=float(np.mean(tables[0].chances(shots))),
        tasks=tasks,
        target=np.stack(stats.resampled_means(found, generator), axis=1) if found else None,
    )


def _by_arm(items: Sequence[ItemResult]) -> dict[str, list[ItemResult]]:
    arms: dict[str, list[ItemResult]] = defaultdict(list)
    for item in items:
        arms[item.arm].append(item)
    return arms


def _chance(cell: Sequence[ItemResult]) -> float:
    return float(np.mean([1.0 / len(item.choices) if item.choices else 0.0 for item in cell]))


def _matrix(values: Mapping[_Row, float]) -> Matrix:
    """Lay out one task's values as [draws, items]."""
    seeds = sorted({seed for seed, _ in values})
    names = sorted({name for _, name in values})
    assert len(values) == len(seeds) * len(names), "every draw must see the same items"
    return np.array([[values[seed, name] for name in names] for seed in seeds])


class _Table:
    """One arm's scores as a matrix [draws, items] for each (task, shots)."""

    def __init__(self, items: Sequence[ItemResult], target: str | None) -> None:
        self.first = items[0]
        self._target_items = [i for i in items if i.task == target and i.shots == 0]
        cells: dict[tuple[str, int], dict[_Row, ItemResult]] = defaultdict(dict)
        seen: Counter[tuple[str, int, int, str]] = Counter()
        for item in items:
            if item.task != target:
                # Rows of one question and answer may differ in their choices, or come twice.
                same = item.task, item.shots, item.seed, item.item
                cells[item.task, item.shots][item.seed, (item.item, seen[same])] = item
                seen[same] += 1
        self._keys = {cell: sorted(rows) for cell, rows in cells.items()}
        self._rows = cells
        self.shots = sorted({shots for _, shots in cells})

    def matrices(self, shots: int) -> list[Matrix]:
        """How right every row is, by task in the order of `by_task`."""
        return [
            _matrix({row: item.correct for row, item in rows.items()})
            for rows in self._cells(shots)
        ]

    def chances(self, shots: int) -> list[float]:
        """Chance level by task, in the order of `matrices`."""
        return [_chance(list(rows.values())) for rows in self._cells(shots)]

    def _cells(self, shots: int) -> list[dict[_Row, ItemResult]]:
        return [rows for (_, cell_shots), rows in sorted(self._rows.items()) if cell_shots == shots]

    def icl(self, shots: int) -> Interval:
        matrices = self.matrices(shots)
        return stats.mean_over_tasks(matrices, np.random.default_rng(BOOTSTRAP_SEED))

    def retention(self, before: _Table, shots: int) -> Interval | None:
        self._check_pairing(before, shots)
        return stats.retention(
            self.matrices(shots),
            before.matrices(shots),
            self.chances(shots),
            np.random.default_rng(BOOTSTRAP_SEED),
        )

    def changed(self, before: _Table, shots: int) -> Interval:
        """Return the share of answers that are not `before`'s, right or wrong."""
        self._check_pairing(before, shots)
        pairs = zip(self._cells(shots), before._cells(shots), strict=True)
        matrices = [
            _matrix({row: float(item.answer != first[row].answer) for row, item in own.items()})
            for own, first in pairs
        ]
        return stats.mean_over_tasks(matrices, np.random.default_rng(BOOTSTRAP_SEED))

    def _check_pairing(self, before: _Table, shots: int) -> None:
        keys = {cell: names for cell, names in self._keys.items() if cell[1] == shots}
        paired = {cell: names for cell, names in before._keys.items() if cell[1] == shots}
        assert keys == paired, "arms are compared on the same tasks, draws and items"

    def by_task(self, shots: int) -> dict[str, float]:
        """Mean score by task, in the order of `matrices`."""
        names = [task for task, cell_shots in sorted(self._rows) if cell_shots == shots]
        means = [float(matrix.mean()) for matrix in self.matrices(shots)]
        return dict(zip(names, means, strict=True))

    def below(self, before: _Table, shots: int) -> list[str]:
        """Tasks whose score is below that of `before` beyond chance, paired."""
        pairs = zip(
            self.by_task(shots),
            self.matrices(shots),
            before.matrices(shots),
            strict=True,
        )
        generator = np.random.default_rng(BOOTSTRAP_SEED)
        return [
            name
            for name, after, base in pairs
            if stats.difference(after, base, generator).high < 0.0
        ]

    def target_matrix(self) -> Matrix | None:
        """Scores of the target's items, in their own order, as one draw."""
        rows = sorted(self._target_items, key=lambda item: item.item)
        return np.array([[item.correct for item in rows]]) if rows else None

    def target_score(self) -> Interval | None:
        if not self._target_items:
            return None
        return stats.proportion(
            sum(item.correct for item in self._target_items), len(self._target_items)
        )

    def num_items(self, shots: int) -> int:
        return sum(len(names) for cell, names in self._keys.items() if cell[1] == shots)

"""Per-item rows in, scores and summary rows with intervals out. Pure; no torch.

Pairing is by (task, shots, seed, item): every arm answers the same questions under the same
demonstrations, and a summary refuses rows for which that does not hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from keepshot import stats
from keepshot.records import ItemResult, PathPoint, Score, Split, SummaryRow
from keepshot.stats import Interval, Matrix

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
            )
        )
    return points


def _by_arm(items: Sequence[ItemResult]) -> dict[str, list[ItemResult]]:
    arms: dict[str, list[ItemResult]] = defaultdict(list)
    for item in items:
        arms[item.arm].append(item)
    return arms


def _chance(cell: Sequence[ItemResult]) -> float:
    return float(np.mean([1.0 / len(item.choices) if item.choices else 0.0 for item in cell]))


def _correct(item: ItemResult) -> float:
    return item.correct


def _place(item: ItemResult) -> tuple[str, int, str]:
    return item.task, item.seed, item.item


class _Table:
    """One arm's scores as a matrix [draws, items] for each (task, shots)."""

    def __init__(self, items: Sequence[ItemResult], target: str | None) -> None:
        self.first = items[0]
        self._target_items = [i for i in items if i.task == target and i.shots == 0]
        cells: dict[tuple[str, int], dict[tuple[int, str], ItemResult]] = defaultdict(dict)
        for item in items:
            if item.task != target:
                cells[item.task, item.shots][item.seed, item.item] = item
        self._keys = {cell: sorted(rows) for cell, rows in cells.items()}
        self._rows = cells
        self.shots = sorted({shots for _, shots in cells})

    def _matrices(self, shots: int, value: Callable[[ItemResult], float]) -> list[Matrix]:
        matrices: list[Matrix] = []
        for rows in self._cells(shots):
            seeds = sorted({seed for seed, _ in rows})
            names = sorted({name for _, name in rows})
            assert len(rows) == len(seeds) * len(names), "every draw must see the same items"
            matrices.append(np.array([[value(rows[seed, n]) for n in names] for seed in seeds]))
        return matrices

    def _cells(self, shots: int) -> list[dict[tuple[int, str], ItemResult]]:
        return [rows for (_, cell_shots), rows in sorted(self._rows.items()) if cell_shots == shots]

    def icl(self, shots: int) -> Interval:
        matrices = self._matrices(shots, _correct)
        return stats.mean_over_tasks(matrices, np.random.default_rng(BOOTSTRAP_SEED))

    def retention(self, before: _Table, shots: int) -> Interval | None:
        self._check_pairing(before, shots)
        return stats.retention(
            self._matrices(shots, _correct),
            before._matrices(shots, _correct),
            [_chance(list(rows.values())) for rows in self._cells(shots)],
            np.random.default_rng(BOOTSTRAP_SEED),
        )

    def changed(self, before: _Table, shots: int) -> Interval:
        """Return the share of answers that are not `before`'s, right or wrong."""
        self._check_pairing(before, shots)
        answers = {
            _place(item): item.answer for rows in before._cells(shots) for item in rows.values()
        }
        matrices = self._matrices(shots, lambda item: float(item.answer != answers[_place(item)]))
        return stats.mean_over_tasks(matrices, np.random.default_rng(BOOTSTRAP_SEED))

    def _check_pairing(self, before: _Table, shots: int) -> None:
        keys = {cell: names for cell, names in self._keys.items() if cell[1] == shots}
        paired = {cell: names for cell, names in before._keys.items() if cell[1] == shots}
        assert keys == paired, "arms are compared on the same tasks, draws and items"

    def target_score(self) -> Interval | None:
        if not self._target_items:
            return None
        return stats.proportion(
            sum(item.correct for item in self._target_items), len(self._target_items)
        )

    def num_items(self, shots: int) -> int:
        return sum(len(names) for cell, names in self._keys.items() if cell[1] == shots)

"""What each arm of a study keeps of its base's few-shot ability, and its target's score. Pure.

Arms that were asked the same are resampled together, so that hundreds of them take seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from keepshot import stats
from keepshot.records import TrainingRecord
from keepshot.stats import Matrix
from keepshot.study.asks import WRITTEN
from keepshot.study.directory import UnitRecord
from keepshot.study.document import StudyArm
from keepshot.study.frame import Frame, matrix, target_name
from keepshot.study.grid import Grid
from keepshot.study.spec import StudySpec

BOOTSTRAP_SEED = 20
BLOCK = ["model", "target", "recipe", "lam", "ask", "split", "shots", "task"]
_Who = tuple[str, str | None, str | None, float | None]
"""Model, target, recipe, lambda."""


@dataclass(frozen=True)
class _Block:
    """One task of one arm and ask: rows of draws under seeds of tuning, columns of items."""

    places: NDArray[np.int64]
    """Of its rows in the frame, in the order of `matrix`."""
    matrix: Matrix
    chance: float
    format_failure: float
    label_leakage: float
    num_seeds: int


@dataclass
class _Row:
    """One arm on one ask, split and number of shots, before it is resampled."""

    fields: dict[str, Any]
    after: list[Matrix]
    before: list[Matrix]
    num_seeds: list[int]
    chance: float
    found: dict[str, Any] = field(default_factory=dict[str, Any])


def arms(
    spec: StudySpec, grid: Grid, items: Frame, records: Mapping[str, UnitRecord]
) -> list[StudyArm]:
    """Return a row for each arm, ask, split and number of shots.

    Seeds of tuning are resampled once for all tasks, draws of demonstrations within each.
    """
    items = items[~items["setting"].isin(WRITTEN)]
    trained = _trained(grid, records)
    blocks = _blocks(items)
    worded = {name for name, ask in spec.asks.items() if ask.template is not None}
    rows: list[_Row] = []
    for model in spec.models:
        base_of = (model.label, None, None, None)
        if base_of not in blocks:
            continue
        for target in spec.targets or ("",):
            near = [who for who in blocks if who[:2] == (model.label, target) and who[2]]
            for who in (base_of, *near):
                own = trained.get((model.label, target, who[2]), [])
                fields = {
                    "model": model.label, "target": target_name(target), "recipe": who[2],
                    "lam": who[3],
                    "tuning_seconds": float(np.mean([r.seconds for r in own])) if own else None,
                    **({} if who[3] is not None else _divergences(own)),
                }  # fmt: skip
                rows += _rows(items, blocks[who], blocks[base_of], fields, worded)
    _resample_(rows)
    return [StudyArm(**row.fields, **row.found) for row in rows]


def _trained(grid: Grid, records: Mapping[str, UnitRecord]) -> dict[Any, list[TrainingRecord]]:
    """Return how each model, target and recipe was tuned, under one seed after the other."""
    trained: dict[tuple[str, str | None, str | None], list[TrainingRecord]] = {}
    for subject, identity in grid.tuned.items():
        record = records.get(identity)
        if record is not None and record.training is not None:
            key = subject.model, subject.target, subject.recipe
            trained.setdefault(key, []).append(record.training)
    return trained


def _divergences(trained: Sequence[TrainingRecord]) -> dict[str, Any]:
    """Return the divergences from the base, means of seeds, with intervals over prompts."""
    found: dict[str, Any] = {}
    for name in ("few_shot", "target"):
        seeds = [record.divergence.get(name, []) for record in trained]
        if seeds and all(seeds):
            values = np.mean(seeds, axis=0)
            mean = stats.bootstrap_mean(values, np.random.default_rng(BOOTSTRAP_SEED))
            found[f"{name}_divergence"] = mean.value
            found[f"{name}_divergence_ci95"] = mean.ci95
    return found


def _blocks(items: Frame) -> dict[_Who, dict[tuple[str, str, int, str], _Block]]:
    """Return all blocks by arm, then by ask, split, shots and task, in order of appearance."""
    if items.empty:
        return {}
    groups = items.groupby(BLOCK, dropna=False, sort=False)
    code = groups.ngroup().to_numpy()
    item = pd.factorize(items["item"], sort=True)[0]
    tuning_seed = items["tuning_seed"].fillna(-1).to_numpy()
    draw = items["seed"].to_numpy()
    order = np.lexsort((item, draw, tuning_seed, code))
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    values = {
        name: items[name].to_numpy(float)[order]
        for name in ("correct", "chance", "format_failure", "label_leakage")
    }
    columns: list[Any] = [items[name].to_numpy() for name in BLOCK]
    found: dict[_Who, dict[tuple[str, str, int, str], _Block]] = {}
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        places = order[start:end]
        num_rows = len(set(zip(tuning_seed[places], draw[places], strict=True)))
        # By rows and not by names: a file may hold the same question and answer twice.
        assert len(places) % num_rows == 0, "every draw must see as many items"
        table = item[places].reshape(num_rows, -1)
        assert (table == table[0]).all(), "every draw must see the same items"
        of: list[Any] = [
            None if pd.isna(column[places[0]]) else column[places[0]] for column in columns
        ]
        model, target, recipe, lam, ask, split, shots, task = of
        block = _Block(
            places,
            values["correct"][start:end].reshape(num_rows, -1),
            chance=float(values["chance"][start:end].mean()),
            format_failure=float(values["format_failure"][start:end].mean()),
            label_leakage=float(values["label_leakage"][start:end].mean()),
            num_seeds=len(np.unique(tuning_seed[places])),
        )
        assert num_rows % block.num_seeds == 0, "every seed must see as many draws"
        who = (model, target, recipe, None if lam is None else float(lam))
        found.setdefault(who, {})[ask, split, int(shots), task] = block
    return found


def _rows(
    items: Frame,
    own: Mapping[tuple[str, str, int, str], _Block],
    base: Mapping[tuple[str, str, int, str], _Block],
    fields: Mapping[str, Any],
    worded: Collection[str],
) -> Iterator[_Row]:
    """Yield an arm's rows; the task that it was tuned for is its target, and not one of them."""
    target = fields["target"]
    groups: dict[tuple[str, str, int], dict[str, _Block]] = {}
    for (ask, split, shots, task), block in own.items():
        if task != target and shots > 0:
            groups.setdefault((ask, split, shots), {})[task] = block
    scores: dict[str, tuple[stats.Interval | None, int]] = {}
    for (ask, split, shots), tasks in groups.items():
        listed = [tasks[task] for task in sorted(tasks)]
        before: list[Matrix] = []
        for task in sorted(tasks):
            same, size = base.get((ask, split, shots, task)), len(tasks[task].matrix)
            if same is not None:
                before.append(np.tile(same.matrix, (size // len(same.matrix), 1)))
        if split not in scores:
            scores[split] = _target_score(items, own, target, split, worded)
        score, num_asked = scores[split]
        yield _Row(
            fields={
                **fields, "ask": ask, "split": split, "shots": shots,
                "target_score": score.value if score else None,
                "target_ci95": score.ci95 if score else None,
                "target_num_items": num_asked or None,
                "format_failure": float(np.mean([block.format_failure for block in listed])),
                "label_leakage": float(np.mean([block.label_leakage for block in listed])),
                "num_tasks": len(listed), "num_items": sum(b.matrix.shape[1] for b in listed),
                "num_seeds": max(block.num_seeds for block in listed),
            },
            after=[block.matrix for block in listed],
            before=before if len(before) == len(listed) else [],
            num_seeds=[block.num_seeds for block in listed],
            chance=float(np.mean([block.chance for block in listed])),
        )  # fmt: skip


def _resample_(rows: Sequence[_Row]) -> None:
    """Fill in few-shot scores and retention, arms of the same shapes under the same resamples."""
    alike: dict[tuple[tuple[tuple[int, ...], ...], tuple[int, ...]], list[_Row]] = {}
    for row in rows:
        key = tuple(matrix.shape for matrix in row.after), tuple(row.num_seeds)
        alike.setdefault(key, []).append(row)
    for (shapes, num_seeds), group in alike.items():
        listed = [row.after for row in group] + [row.before for row in group if row.before]
        assert all(tuple(m.shape for m in arm) == shapes for arm in listed), "arms must be paired"
        generator = np.random.default_rng(BOOTSTRAP_SEED)
        means = iter(stats.resampled_over_tasks(listed, generator, num_seeds))
        after = [next(means) for _ in group]
        for row, own in zip(group, after, strict=True):
            icl = stats.percentiles(*own)
            kept = stats.kept(own, next(means), row.chance) if row.before else None
            retention = stats.percentiles(*kept) if kept else None
            row.found = {
                "icl": icl.value, "icl_ci95": icl.ci95,
                "retention": retention.value if retention else None,
                "retention_ci95": retention.ci95 if retention else None,
            }  # fmt: skip


def _target_score(
    items: Frame,
    own: Mapping[tuple[str, str, int, str], _Block],
    target: str,
    split: str,
    worded: Collection[str],
) -> tuple[stats.Interval | None, int]:
    """Return the mean of the target's score (of one seed with Wilson's interval), and its items.

    Of several asks it is that of most seeds and items: those of another need not be the same.
    """
    # Of the task's own wording: asks of variants come apart, those of templates come last.
    asked = {
        (ask not in worded, block.num_seeds, block.matrix.shape[1]): block
        for (ask, of, shots, task), block in own.items()
        if (of, shots, task) == (split, 0, target)
        and items["setting"].iloc[block.places[0]] == "direct"
    }
    if not asked:
        return None, 0
    most = asked[max(asked)]
    once = items.iloc[np.sort(most.places)].drop_duplicates(["tuning_seed", "item"])
    if once["tuning_seed"].nunique() <= 1:
        return stats.proportion(float(once["correct"].sum()), len(once)), len(once)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    found = stats.mean_over_tasks([matrix(once)], generator, [once["tuning_seed"].nunique()])
    return found, once["item"].nunique()

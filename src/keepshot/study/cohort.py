"""A study's rows as scores of models by task, for each setting: what two settings are compared on.

Pure. Axes: U units (base models, or tuned models), T tasks, P points (units that both settings
have). A base's score stands beside that of every model tuned from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from keepshot.study.asks import WRITTEN
from keepshot.tuning.samplegen import is_plain

Frame: TypeAlias = Any
Vector = NDArray[np.float64]
Of = Literal["base", "tuned", "sampling"]
SUBJECT = ["model", "recipe", "target", "tuning_seed"]
NOT_DEGRADED = "not degraded"


@dataclass(frozen=True)
class Condition:
    """Who is asked, and how."""

    of: Of
    """`sampling`: tuned to write its own examples, and so not one of the tuned it stands beside."""
    ask: str
    setting: str
    shots: int

    @property
    def words(self) -> str:
        """Words for tables, without the ask."""
        if self.setting in WRITTEN:
            return self.setting
        of = "tuned to write examples" if self.of == "sampling" else self.of
        return f"{of} {self.setting}" + (f", {self.shots} shots" if self.shots else "")


@dataclass(frozen=True)
class Asked:
    """What one condition found."""

    scores_UT: Vector
    """Mean over items and draws; NaN where it was not asked."""
    noise_UT: Vector
    """Variance of that mean by which items were drawn, beyond what they do to all models alike."""
    num_items_T: NDArray[np.int64]
    rows: Frame = None
    """All items of all draws: `unit`, `task_code`, `item`, `seed`, `correct`."""


@dataclass(frozen=True)
class Pairing:
    """Two conditions on the same units and tasks."""

    units: Frame
    """A row for each point: model, family, recipe, target, tuning_seed, log_size, tags."""
    tasks: list[str]
    first_PT: Vector
    second_PT: Vector
    first_noise_PT: Vector
    second_noise_PT: Vector
    own_PT: NDArray[np.bool_]
    """Whether a point was tuned for a task."""
    num_items: int
    on_own: Pairing | None = None
    """The same points on the tasks that each was tuned for, where all were asked theirs."""

    def of(self, rows: NDArray[np.bool_]) -> Pairing:
        """Return some of the points."""
        return replace(
            self,
            on_own=None,
            units=self.units[rows].reset_index(drop=True),
            first_PT=self.first_PT[rows],
            second_PT=self.second_PT[rows],
            first_noise_PT=self.first_noise_PT[rows],
            second_noise_PT=self.second_noise_PT[rows],
            own_PT=self.own_PT[rows],
        )

    def on(self, own: bool) -> Pairing | None:
        """Return the part on the tasks that points were tuned for, or on those none was; or None.

        Points have tasks of their own where they were tuned for different ones: the mean over
        those stands in the first column.
        """
        if own:
            return self.on_own
        kept = ~np.any(self.own_PT, axis=0)
        if (kept.all() and self.on_own is None) or not kept.any():
            return None
        return replace(
            self,
            tasks=[self.tasks[place] for place in np.flatnonzero(kept)],
            first_PT=self.first_PT[:, kept],
            second_PT=self.second_PT[:, kept],
            first_noise_PT=self.first_noise_PT[:, kept],
            second_noise_PT=self.second_noise_PT[:, kept],
            own_PT=self.own_PT[:, kept],
        )

    def subsets(self, tags: Sequence[str]) -> Iterator[tuple[str, Pairing]]:
        """Yield all points, those not degraded, and those with and without each tag."""
        yield "all", self
        if "degraded" in self.units:
            whole = self.units["degraded"].isna().to_numpy(bool)
            if whole.any() and not whole.all():
                yield NOT_DEGRADED, self.of(whole)
        for tag in tags:
            has = np.array([value is True or value == 1 for value in self.units[tag]])
            if has.any() and not has.all():
                yield tag, self.of(has)
                yield f"not {tag}", self.of(~has)


@dataclass(frozen=True)
class Cohort:
    """All conditions of a study on one split."""

    split: str
    tasks: list[str]
    models: Frame
    subjects: Frame
    own_UT: NDArray[np.bool_]
    """Whether a tuned model was tuned for a task, in the order of `subjects`."""
    asked: dict[Condition, Asked]
    tags: list[str]
    """Columns that are true or false of a model."""

    def pair(self, first: Condition, second: Condition) -> Pairing | None:
        """Return two conditions side by side, on the tasks that all their points were asked."""
        one, two = self.asked[first], self.asked[second]
        bases = (first.of == "base", second.of == "base")
        of_model = self._model_of_subject
        if all(bases):
            return self._joined(one, two, self.models, np.zeros_like(one.scores_UT, dtype=bool))
        one = _rows(one, of_model) if bases[0] else one
        two = _rows(two, of_model) if bases[1] else two
        found = self._joined(one, two, self.subjects, self.own_UT)
        if found is None and not any(bases):
            count = len(self.models)
            one, two = _by_model(one, of_model, count), _by_model(two, of_model, count)
            own = np.zeros_like(one.scores_UT, dtype=bool)
            found = self._joined(one, two, self.models, own)
        return found

    def _joined(
        self, one: Asked, two: Asked, units: Frame, own_UT: NDArray[np.bool_]
    ) -> Pairing | None:
        there_UT = np.isfinite(one.scores_UT) & np.isfinite(two.scores_UT)
        rows = np.any(there_UT, axis=1)
        if not rows.any():
            return None
        columns = np.all(there_UT[rows], axis=0)
        on_own = self._on_own(one, two, units, own_UT & there_UT, rows)
        if not columns.any():
            return on_own
        tasks = [self.tasks[place] for place in np.flatnonzero(columns)]
        cut = np.ix_(rows, columns)
        num_items = int(np.maximum(one.num_items_T, two.num_items_T)[columns].sum())
        return Pairing(
            units[rows].reset_index(drop=True), tasks, one.scores_UT[cut], two.scores_UT[cut],
            one.noise_UT[cut], two.noise_UT[cut], own_UT[cut], num_items, on_own,
        )  # fmt: skip

    def _on_own(
        self,
        one: Asked,
        two: Asked,
        units: Frame,
        asked_UT: NDArray[np.bool_],
        rows: NDArray[np.bool_],
    ) -> Pairing | None:
        """Return means over the tasks that each point was tuned for, which need not be the same."""
        count_P1 = asked_UT[rows].sum(axis=1, keepdims=True)
        if not count_P1.all():
            return None

        def mean(scores_UT: Vector) -> Vector:
            own_PT = np.where(asked_UT, scores_UT, 0.0)[rows]
            return own_PT.sum(axis=1, keepdims=True) / count_P1

        columns = asked_UT[rows].any(axis=0)
        num_items = int(np.maximum(one.num_items_T, two.num_items_T)[columns].sum())
        return Pairing(
            units[rows].reset_index(drop=True), ["its own"],
            mean(one.scores_UT), mean(two.scores_UT),
            mean(one.noise_UT) / count_P1, mean(two.noise_UT) / count_P1,
            count_P1 > 0, num_items,
        )  # fmt: skip

    @cached_property
    def _model_of_subject(self) -> NDArray[np.int64]:
        place = {name: number for number, name in enumerate(self.models["model"])}
        return np.array([place.get(name, -1) for name in self.subjects["model"]], dtype=np.int64)


def cohort(items: Frame) -> Cohort | None:
    """Return the conditions of a study; None where nothing tuned, or no base, was asked.

    Args:
        items: as `item_frame` returns. Of several splits `test` is taken; blends are left out.
    """
    splits = list(dict.fromkeys(items["split"]))
    split = "test" if "test" in splits or not splits else str(splits[0])
    rows = items[(items["split"] == split) & items["stage"].isin(["base", "tuned"])]
    is_base = (rows["stage"] == "base").to_numpy()
    if rows.empty or is_base.all() or not is_base.any():
        return None
    tuned = rows[~is_base]
    tags = [name for name in items.columns if _is_tag(name, items[name])]
    models = _units(rows[is_base], ["model"], tags)
    subjects = _units(tuned, SUBJECT, tags)
    sizes = models.set_index("model")["log_size"]
    # An adapter's parameters are not the model's size.
    subjects["log_size"] = subjects["model"].map(sizes).fillna(subjects["log_size"])
    codes, tasks = pd.factorize(rows["task"])
    units = np.empty(len(rows), dtype=np.int64)
    units[is_base] = _places(rows[is_base], models, ["model"])
    units[~is_base] = _places(tuned, subjects, SUBJECT)
    own_UT = np.zeros((len(subjects), len(tasks)), dtype=bool)
    own_UT[units[~is_base], codes[~is_base]] = tuned["is_target"].to_numpy(bool)
    writes = tuned["setting"].isin(WRITTEN).to_numpy()
    if "samples" in tuned.columns:  # what was written may have failed, or not be asked yet
        plain: Any = tuned["samples"].map(is_plain)
        writes = np.logical_or(writes, ~plain.to_numpy(bool))
    sampling = np.isin(units, units[~is_base][writes]) & ~is_base
    of = np.where(is_base, "base", np.where(sampling, "sampling", "tuned"))
    keyed = pd.DataFrame(
        {"of": of, "unit": units, "task_code": codes, "row": np.arange(len(rows))}
    ).join(rows[["ask", "setting", "shots", "item", "seed", "correct"]].reset_index(drop=True))
    asked: dict[Condition, Asked] = {}
    groups: Any = keyed.groupby(["of", "ask", "setting", "shots"], sort=False)
    for key, part in groups:
        count = len(models) if key[0] == "base" else len(subjects)
        asked[Condition(key[0], str(key[1]), str(key[2]), int(key[3]))] = _asked(
            part, count, len(tasks)
        )
    return Cohort(split, [str(t) for t in tasks], models, subjects, own_UT, asked, tags)


def _asked(part: Frame, num_units: int, num_tasks: int) -> Asked:
    scores_UT = np.full((num_units, num_tasks), np.nan)
    noise_UT = np.full((num_units, num_tasks), np.nan)
    num_items_T = np.zeros(num_tasks, dtype=np.int64)
    for task, one in part.groupby("task_code", sort=False):
        units, unit = np.unique(one["unit"].to_numpy(), return_inverse=True)
        item, names = pd.factorize(one["item"])
        shape, flat = (len(units), len(names)), unit * len(names) + item
        size = shape[0] * shape[1]
        total = np.bincount(flat, one["correct"].to_numpy(float), size)
        times = np.bincount(flat, minlength=size)
        with np.errstate(invalid="ignore"):
            solved_UN = (total / times).reshape(shape)
        scores_UT[units, task] = np.round(np.nanmean(solved_UN, axis=1), 12)
        noise_UT[units, task] = _noise(solved_UN)
        num_items_T[task] = len(names)
    return Asked(scores_UT, noise_UT, num_items_T, part)


def _noise(solved_UN: Vector) -> Vector:
    """Return the sampling variance of each model's mean by its own luck with items.

    An item that is hard is hard for all models, and moves none past another: what is left once
    models' and items' means are taken out is the noise of a comparison between models (the
    residual of a crossed design, as in Cronbach's alpha).
    """
    num_units, num_items = solved_UN.shape
    whole = ~np.isnan(solved_UN).any()
    if num_items < 2:
        return np.zeros(num_units)
    if num_units < 2 or not whole:
        return np.nanvar(solved_UN, axis=1, ddof=1) / (~np.isnan(solved_UN)).sum(axis=1)
    left = solved_UN - solved_UN.mean(axis=1, keepdims=True) - solved_UN.mean(axis=0)
    left += solved_UN.mean()
    freedom = (num_items - 1) * (num_units - 1) / num_units
    return (left**2).sum(axis=1) / freedom / num_items


def _rows(asked: Asked, places: NDArray[np.int64]) -> Asked:
    """Return a base's figures for each model tuned from it; NaN where the base is not there."""
    missing = (places < 0)[:, None]
    scores, noise = (
        np.where(missing, np.nan, a[places]) for a in (asked.scores_UT, asked.noise_UT)
    )
    return Asked(scores, noise, asked.num_items_T)


def _by_model(asked: Asked, places: NDArray[np.int64], count: int) -> Asked:
    """Return the means over the models tuned from one base."""
    there = np.isfinite(asked.scores_UT)
    total, noise, times = (np.zeros((count, asked.scores_UT.shape[1])) for _ in range(3))
    for unit in np.flatnonzero(places >= 0):
        place, on = places[unit], there[unit]
        total[place, on] += asked.scores_UT[unit, on]
        noise[place, on] += asked.noise_UT[unit, on]
        times[place, on] += 1.0
    with np.errstate(invalid="ignore", divide="ignore"):
        return Asked(total / times, noise / times**2, asked.num_items_T)


def _units(rows: Frame, keys: Sequence[str], tags: Sequence[str]) -> Frame:
    optional = [name for name in ("degraded",) if name in rows.columns]
    wanted = dict.fromkeys([*keys, "model", "family", "num_parameters", *optional, *tags])
    found = rows.drop_duplicates(list(keys))[list(wanted)].reset_index(drop=True)
    found["log_size"] = np.log(found["num_parameters"].clip(lower=1).astype(float))
    return found


def _places(rows: Frame, units: Frame, keys: Sequence[str]) -> NDArray[np.int64]:
    numbered = units[list(keys)].assign(place=np.arange(len(units)))
    return rows[list(keys)].merge(numbered, on=list(keys), how="left")["place"].to_numpy()


def _is_tag(name: str, column: Frame) -> bool:
    if name == "is_target":
        return False
    values = column.drop_duplicates().dropna() if column.dtype == object else column
    if column.dtype == bool:
        return True
    return column.dtype == object and len(values) > 0 and all(isinstance(v, bool) for v in values)

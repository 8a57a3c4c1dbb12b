"""The bound, item by item: does a tuned model solve what its base solves under no draw? Pure."""

from __future__ import annotations

from typing import Any

import numpy as np

from keepshot.errors import StudyError
from keepshot.study.analysis import Bound, bound, clustered_mean
from keepshot.study.cohort import Cohort, Condition
from keepshot.study.comparison import figure
from keepshot.study.evidence import BoundFinding

SEED = 7


def beyond(cohort: Cohort, base: Condition, tuned: Condition) -> BoundFinding:
    """Return the mean over base models of what the models tuned from them solve beyond them.

    Args:
        cohort: the study's conditions.
        base: bases with gold demonstrations, under three draws or more.
        tuned: tuned models, directly.

    Raises:
        StudyError: with fewer than three draws or families.
    """
    found = bounds(cohort, base, tuned)
    if not found:
        raise StudyError("no item was put to a tuned model and to its base")
    families = [family for family, _ in found]
    shares = {
        name: clustered_mean([getattr(one, name).value for _, one in found], families)
        for name in ("beyond", "control", "excess")
    }
    return BoundFinding(
        beyond=figure(shares["beyond"], 0.0), control=figure(shares["control"], 0.0),
        excess=figure(shares["excess"]), num_draws=min(one.num_draws for _, one in found),
        num_models=len(found), num_families=len(set(families)),
        num_items=max(one.num_items for _, one in found),
    )  # fmt: skip


def bounds(cohort: Cohort, base: Condition, tuned: Condition) -> list[tuple[str, Bound]]:
    """Return the family and the bound of each base model that shares items with a tuned one.

    Args and errors are those of `beyond`, but for the number of families.
    """
    draws = _tables(cohort.asked[base].rows, "unit", "seed")
    places = {model: place for place, model in enumerate(cohort.models["model"])}
    of = cohort.subjects["model"].map(places)
    runs = cohort.asked[tuned].rows
    runs = _tables(runs.assign(model=runs["unit"].map(of)), "model", "unit")
    found: list[tuple[str, Bound]] = []
    for place, one in runs.items():
        if place not in draws:
            continue
        both = one.columns.intersection(draws[place].columns)
        if both.empty:
            continue
        base_SN, tuned_TN = (table[both].to_numpy(float) for table in (draws[place], one))
        family = str(cohort.models["family"].iloc[int(place)])
        found.append((family, bound(tuned_TN, base_SN, np.random.default_rng(SEED))))
    return found


def _tables(rows: Any, unit: str, row: str) -> dict[Any, Any]:
    """Return, for each unit, `correct` with a column for each item, all of them seen in all rows.

    What was not put to one of the rows is left out.
    """
    found: dict[Any, Any] = {}
    for key, part in rows.groupby(unit):
        keys = [row, "task_code", "item"]
        table = part.groupby(keys)["correct"].mean().unstack(["task_code", "item"])
        found[key] = table.dropna(axis=1)
    return found

"""The question of a study, in detail: tuned scores beside what their bases do from examples.

By task, by model, what explains the tuned score, and the bound by items. Pure and seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from keepshot.errors import StudyError
from keepshot.stats import Interval
from keepshot.study.analysis import attribute, clustered_mean, mixed_model
from keepshot.study.cohort import Pairing, Vector
from keepshot.study.correlation import FEWEST_CLUSTERS, FEWEST_POINTS, adjusted, correlate
from keepshot.study.evidence import (
    Comparison,
    Figure,
    Kind,
    MixedFinding,
    ModelFinding,
    Share,
    StudyPoint,
    TaskFinding,
    Within,
    checked,
)

SEED = 7
KINDS: tuple[Kind, ...] = ("spearman", "pearson")
Note = Callable[[str, object], None]


def compare(
    pairing: Pairing,
    names: tuple[str, str],
    models: str,
    domains: Mapping[str, str],
    note: Note,
) -> Comparison:
    """Return what is to be said of tuned scores beside their bases', but for the plain correlation.

    Args:
        pairing: base scores first, tuned scores second.
        names: of the two settings.
        models: which models these are.
        domains: of tasks; one that is not there is of a domain of its own.
        note: told what could not be said, and why.
    """
    what = f"{names[1]} against {names[0]}" + ("" if models == "all" else f", {models}")
    of = [domains.get(task, task) for task in pairing.tasks]
    shared = {"first": names[0], "second": names[1]}

    def attempt(part: str, work: Callable[[], Any]) -> Any:
        try:
            return checked(work())
        except (StudyError, np.linalg.LinAlgError) as error:
            note(f"{what}, {part}", error)
            return None

    within = [attempt("over tasks", lambda kind=kind: _within(pairing, kind)) for kind in KINDS]
    return Comparison(
        first=names[0],
        second=names[1],
        models=models,
        tasks=pairing.tasks,
        domains=of,
        num_items=pairing.num_items,
        points=_points(pairing),
        within=[one for one in within if one is not None],
        by_task=attempt("task by task", lambda: _by_task(pairing, shared, of)) or [],
        by_model=attempt("model by model", lambda: _by_model(pairing, shared, of)) or [],
        shares=attempt("what explains it", lambda: _attributed(pairing, what, note)) or [],
        mixed=attempt("mixed model", lambda: _mixed(pairing)),
    )


def with_adjusted(
    rows: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], str], record: type[Any]
) -> list[Any]:
    """Return records of rows, their p-values adjusted among those of one key."""
    keys = [key(row) for row in rows]
    found: dict[int, float] = {}
    for name in dict.fromkeys(keys):
        places = [place for place, other in enumerate(keys) if other == name]
        values = adjusted([rows[place]["p_value"] for place in places])
        found |= dict(zip(places, values, strict=True))
    return [record(**row, p_adjusted=found[place]) for place, row in enumerate(rows)]


def figure(found: Interval, low: float = -1.0, high: float = 1.0) -> Figure:
    """Return a figure whose interval is cut where its values end."""
    return Figure(value=found.value, ci95=(max(low, found.low), min(high, found.high)))


def _points(pairing: Pairing) -> list[StudyPoint]:
    found: list[StudyPoint] = []
    for place, row in enumerate(pairing.units.to_dict("records")):
        degraded, first, second = (
            row.get("degraded"), pairing.first_PT[place], pairing.second_PT[place]
        )  # fmt: skip
        found.append(
            StudyPoint(
                model=str(row["model"]), family=str(row["family"]), recipe=str(row["recipe"]),
                target=str(row["target"]), tuning_seed=int(row["tuning_seed"]),
                num_parameters=int(row["num_parameters"]),
                degraded=degraded if isinstance(degraded, str) else None,
                base=float(first.mean()), tuned=float(second.mean()),
                base_by_task=[round(float(v), 4) for v in first],
                tuned_by_task=[round(float(v), 4) for v in second],
            )
        )  # fmt: skip
    return found


def _within(pairing: Pairing, kind: Kind) -> Within:
    """Return the mean over models of their correlations over tasks."""
    num_tasks = len(pairing.tasks)
    if num_tasks < FEWEST_POINTS:
        raise StudyError(
            f"a correlation over {num_tasks} tasks says nothing; at least {FEWEST_POINTS} are "
            "needed"
        )
    first, second = pairing.first_PT, pairing.second_PT
    if kind == "spearman":
        first, second = (stats.rankdata(scores, axis=1) for scores in (first, second))
    one, two = (scores - scores.mean(axis=1, keepdims=True) for scores in (first, second))
    scale = np.sqrt((one**2).sum(axis=1) * (two**2).sum(axis=1))
    # By the scores themselves: rounding leaves something of a mean that is taken out.
    there = (np.ptp(first, axis=1) > 0.0) & (np.ptp(second, axis=1) > 0.0)
    values = (one * two).sum(axis=1)[there] / scale[there]
    families = pairing.units["family"][there].tolist()
    return Within(
        kind=kind,
        mean=figure(clustered_mean(values, families)),
        num_models=len(values),
        num_families=len(set(families)),
        num_tasks=num_tasks,
        num_left_out=int((~there).sum()),
    )


def _by_task(
    pairing: Pairing, shared: Mapping[str, str], domains: Sequence[str]
) -> list[TaskFinding]:
    """Return each task over models; tasks on which too few families differ are left out."""
    families = pairing.units["family"].tolist()
    tested = _all_tested(pairing.first_PT.T, pairing.second_PT.T, families)
    rows = [
        {**shared, "task": pairing.tasks[place], "domain": domains[place], **found}
        for place, found in tested.items()
    ]
    return with_adjusted(rows, lambda row: "all", TaskFinding)


def _by_model(
    pairing: Pairing, shared: Mapping[str, str], domains: Sequence[str]
) -> list[ModelFinding]:
    """Return each model over tasks; models that are alike on all or most tasks are left out."""
    alike = len(set(domains)) >= FEWEST_CLUSTERS
    clusters = list(domains) if alike else list(pairing.tasks)
    tested = _all_tested(pairing.first_PT, pairing.second_PT, clusters)
    rows = [{**shared, "point": place, **found} for place, found in tested.items()]
    return with_adjusted(rows, lambda row: "all", ModelFinding)


def _all_tested(
    first_RN: Vector, second_RN: Vector, clusters: Sequence[object]
) -> dict[int, dict[str, Any]]:
    """Return the rows that have a correlation, by place.

    Raises:
        StudyError: if none of those that vary has one.
    """
    found: dict[int, dict[str, Any]] = {}
    refused: StudyError | None = None
    for place, (x, y) in enumerate(zip(first_RN, second_RN, strict=True)):
        if np.ptp(x) > 0.0 and np.ptp(y) > 0.0:
            try:
                found[place] = _tested(x, y, clusters)
            except StudyError as error:
                refused = error
    if refused is not None and not found:
        raise refused
    return found


def _tested(x: Vector, y: Vector, clusters: Sequence[object]) -> dict[str, Any]:
    found = correlate(x, y, clusters, np.random.default_rng(SEED))
    return {
        "value": found.value, "ci95": found.ci95, "p_value": found.p_value,
        "num_points": found.num_points, "num_clusters": found.num_clusters,
    }  # fmt: skip


def _attributed(pairing: Pairing, what: str, note: Note) -> list[Share]:
    """Return what the tuned score's variance between models goes with."""
    units = pairing.units
    causes: dict[str, NDArray[np.float64]] = {
        "base few-shot score": pairing.first_PT.mean(axis=1),
        "size (log parameters)": units["log_size"].to_numpy(float),
        "tuning data": _dummies(units["target"]),
        "recipe": _dummies(units["recipe"]),
    }
    for name in [name for name, cause in causes.items() if not cause.size or not np.ptp(cause)]:
        note(f"{what}, what explains it", f"{name} is the same for all, and is left out")
        del causes[name]
    if not causes:
        raise StudyError("nothing differs between the models")
    if len(units) < FEWEST_POINTS:
        raise StudyError(f"{len(units)} models say nothing; at least {FEWEST_POINTS} are needed")
    outcome = pairing.second_PT.mean(axis=1)
    if not np.ptp(outcome):
        raise StudyError("all tuned models have the same score")
    columns = sum(1 if cause.ndim == 1 else cause.shape[1] for cause in causes.values())
    if 5 * columns > len(units):
        note(
            f"{what}, what explains it",
            f"{columns} columns of causes for {len(units)} models, so that shares are overstated",
        )
    families = units["family"].tolist()
    found = attribute(outcome, causes, families, np.random.default_rng(SEED))
    return [Share(cause=name, **figure(one, 0.0).model_dump()) for name, one in found.items()]


def _dummies(column: Any) -> NDArray[np.float64]:
    """Return a column for each value but the first."""
    return pd.get_dummies(column.astype(str), drop_first=True).to_numpy(float)


def _mixed(pairing: Pairing) -> MixedFinding:
    num_points, num_tasks = pairing.first_PT.shape
    frame = pd.DataFrame(
        {
            "base": pairing.first_PT.ravel(),
            "tuned": pairing.second_PT.ravel(),
            "family": np.repeat(pairing.units["family"].astype(str).to_numpy(), num_tasks),
            "task": np.tile(np.array(pairing.tasks), num_points),
        }
    )
    if num_points < FEWEST_POINTS:
        raise StudyError(f"{num_points} models say nothing; at least {FEWEST_POINTS} are needed")
    if not np.ptp(pairing.first_PT) or not np.ptp(pairing.second_PT):
        raise StudyError("one of the two settings has the same score everywhere")
    found = mixed_model(frame)
    slope = figure(found.slope, -np.inf, np.inf)
    return MixedFinding(
        slope=slope,
        family_variance=found.family_variance,
        task_variance=found.task_variance,
        residual_variance=found.residual_variance,
        num_rows=found.num_rows,
        converged=found.converged,
    )

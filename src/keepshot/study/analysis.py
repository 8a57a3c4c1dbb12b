"""What a study over many models shows: attribution, mixed model, and the bound by examples.

Takes frames of plain columns and returns figures with intervals that know about families; draws
nothing at random but from the generator given. Correlations are in `keepshot.study.correlation`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import factorial
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.formula.api as smf
from numpy.typing import NDArray
from scipy import stats
from statsmodels.tools.sm_exceptions import ConvergenceWarning, SingularMatrixWarning

from keepshot.errors import StudyError
from keepshot.stats import Interval, percentiles
from keepshot.study.correlation import FEWEST_CLUSTERS

Vector = NDArray[np.float64]
NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class MixedModel:
    """tuned = intercept + slope * base + family + task + noise, by restricted likelihood."""

    slope: Interval
    family_variance: float
    task_variance: float
    residual_variance: float
    num_rows: int
    converged: bool


@dataclass(frozen=True)
class Bound:
    """What a tuned model solves that its base solves under no draw of demonstrations."""

    beyond: Interval
    """Share of items solved by the tuned model and by the base under none of `num_draws` draws."""
    control: Interval
    """The same share for one further draw of the base itself, in the tuned model's place."""
    excess: Interval
    """`beyond` less `control`, paired by item."""
    num_draws: int
    num_items: int


def attribute(
    outcome: Sequence[float] | Vector,
    causes: Mapping[str, NDArray[np.float64]],
    clusters: Sequence[object],
    generator: np.random.Generator,
) -> dict[str, Interval]:
    """Return the share of the outcome's variance that each cause explains.

    Shares are Shapley values of R^2 over all orders in which causes can enter a linear regression
    (Lindeman, Merenda and Gold 1980), so they add up to the R^2 of all. Intervals come from
    resampling families: the wider of the percentiles and of Student's t with G - 1 degrees of
    freedom on the resamples' standard error, inflated by sqrt(G / (G - 1)), cut at 0 and 1.

    Args:
        outcome: tuned scores, [num_points].
        causes: name -> columns [num_points] or [num_points, num_columns]; dummy columns for what
            is not a number.
        clusters: the family of each model.
        generator: source of the resamples.

    Returns:
        A share for each cause, and `unexplained`.

    Raises:
        StudyError: with more than eight causes, or fewer than three families.
    """
    y = np.asarray(outcome, dtype=np.float64)
    blocks = {
        name: np.asarray(c, dtype=np.float64).reshape(len(y), -1) for name, c in causes.items()
    }
    if len(blocks) > 8:
        raise StudyError(f"{len(blocks)} causes; at most 8, since every order of them is tried")
    point = _shares(y, blocks)
    names = np.array([str(cluster) for cluster in clusters])
    rows_of = [np.flatnonzero(names == name) for name in np.unique(names)]
    _check_families(len(rows_of), "shares of variance")
    resampled: list[dict[str, float]] = []
    for _ in range(NUM_RESAMPLES // 4):
        chosen = generator.integers(0, len(rows_of), len(rows_of))
        rows = np.concatenate([rows_of[index] for index in chosen])
        if np.ptp(y[rows]) > 0.0:
            resampled.append(_shares(y[rows], {name: b[rows] for name, b in blocks.items()}))
    return {
        name: _widened(value, np.array([shares[name] for shares in resampled]), len(rows_of))
        for name, value in point.items()
    }


def clustered_mean(values: Sequence[float] | Vector, clusters: Sequence[object]) -> Interval:
    """Return a mean over models with an interval that knows about families.

    The standard error is the scatter of means when each family is left out (jackknife), with
    Student's t for G - 1 families.

    Args:
        values: one a model, [num_points].
        clusters: the family of each model.

    Raises:
        StudyError: with fewer than three families.
    """
    y = np.asarray(values, dtype=np.float64)
    names = np.array([str(cluster) for cluster in clusters])
    families = np.unique(names)
    _check_families(len(families), "a mean over models")
    reach = _jackknife_reach([y[names != family].mean() for family in families])
    value = float(y.mean())
    return Interval(value, value - reach, value + reach)


def mixed_model(frame: pd.DataFrame) -> MixedModel:
    """Return the slope of tuned on base scores, with crossed effects of family and task.

    Args:
        frame: one row for each model and task, with columns `base`, `tuned`, `family`, `task`.

    The slope's interval is the wider of the model's own (Wald) and one whose standard error is
    the scatter of slopes when each family is left out, with Student's t for G - 1 families.

    Raises:
        StudyError: with fewer than three families or two tasks, or where the slope rests on one
            family.
    """
    family_of_row = frame["family"].astype(str).to_numpy()
    families, num_tasks = np.unique(family_of_row), len(set(frame["task"]))
    if len(families) < 3 or num_tasks < 2:
        raise StudyError(
            f"{len(families)} families and {num_tasks} tasks; a mixed model needs at least 3 and 2"
        )
    fitted = _fit(frame)
    slope, wald = float(fitted.params["base"]), float(fitted.bse["base"])
    left_out = [_slope_within(frame.loc[family_of_row != f]) for f in families]
    if not np.isfinite([slope, *left_out]).all():
        raise StudyError(
            "within tasks base scores differ by one family alone, or not at all, so that the slope "
            "has no interval"
        )
    wald = wald if np.isfinite(wald) else 0.0
    reach = max(1.96 * wald, _jackknife_reach(left_out))
    variances = dict(zip(fitted.model.exog_vc.names, fitted.vcomp, strict=True))
    return MixedModel(
        slope=Interval(slope, slope - reach, slope + reach),
        family_variance=float(variances["family"]),
        task_variance=float(variances["task"]),
        residual_variance=float(fitted.scale),
        num_rows=len(frame),
        converged=bool(fitted.converged),
    )


def bound(
    tuned_TN: Vector,
    base_SN: Vector,
    generator: np.random.Generator,
) -> Bound:
    """Return whether a tuned model solves what its base cannot from examples.

    Any two noisy runs differ: of the base's own draws, each in turn is compared with the others,
    and that share is what the tuned model's is to be read beside.

    Args:
        tuned_TN: 1 where a run of the tuned model is right, [num_runs, num_items].
        base_SN: the same for draws of demonstrations of the base, [num_draws, num_items], at
            least 3. So that both sides face the same number of draws, the tuned model is compared
            with all subsets that leave one draw out.
        generator: source of the resamples of items. With under some 200 items, of which few are
            ever beyond, the intervals are too narrow.
    """
    num_draws, num_items = base_SN.shape
    if num_draws < 3:
        raise StudyError(
            f"the bound needs 3 draws of demonstrations or more; there are {num_draws}"
        )
    left_out = [np.delete(base_SN, index, axis=0).max(axis=0) for index in range(num_draws)]
    beyond = np.mean([tuned_TN * (1.0 - solved) for solved in left_out], axis=(0, 1))
    control = np.mean(
        [base_SN[index] * (1.0 - solved) for index, solved in enumerate(left_out)], axis=0
    )
    # Items that are alike in both are drawn together: the same resamples, in far less time.
    levels, counts = np.unique(np.stack([beyond, control]), axis=1, return_counts=True)
    weights = generator.multinomial(num_items, counts / num_items, size=NUM_RESAMPLES) / num_items
    beyond, control, excess = (
        percentiles(float(counts @ values) / num_items, weights @ values)
        for values in (levels[0], levels[1], levels[0] - levels[1])
    )
    return Bound(beyond, control, excess, num_draws - 1, num_items)


def _jackknife_reach(left_out: Sequence[float]) -> float:
    """Return half the width of the interval of a value, from it without each family in turn."""
    left, count = np.asarray(left_out, dtype=np.float64), len(left_out)
    error = float(np.sqrt((count - 1) / count * np.sum((left - left.mean()) ** 2)))
    return float(stats.t.ppf(0.975, count - 1)) * error


def _check_families(count: int, what: str) -> None:
    if count < FEWEST_CLUSTERS:
        raise StudyError(
            f"{count} families; at least {FEWEST_CLUSTERS} are needed for the interval of {what}"
        )


def _widened(value: float, resampled: Vector, num_families: int) -> Interval:
    found = percentiles(value, resampled)
    error = float(resampled.std(ddof=1)) * np.sqrt(num_families / (num_families - 1))
    reach = error * float(stats.t.ppf(0.975, num_families - 1))
    low, high = min(found.low, value - reach), max(found.high, value + reach)
    return Interval(value, float(max(0.0, low)), float(min(1.0, high)))


def _shares(y: Vector, blocks: Mapping[str, Vector]) -> dict[str, float]:
    names = list(blocks)
    explained = {
        frozenset(chosen): _r_squared(y, [blocks[name] for name in chosen])
        for size in range(len(names) + 1)
        for chosen in combinations(names, size)
    }
    shares: dict[str, float] = {}
    for name in names:
        share = 0.0
        for chosen, value in explained.items():
            if name not in chosen:
                weight = factorial(len(chosen)) * factorial(len(names) - len(chosen) - 1)
                share += weight * (explained[chosen | {name}] - value)
        shares[name] = share / factorial(len(names))
    return {**shares, "unexplained": 1.0 - explained[frozenset(names)]}


def _r_squared(y: Vector, blocks: Sequence[Vector]) -> float:
    design = np.column_stack([np.ones(len(y)), *blocks])
    fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return 1.0 - float(np.sum((y - fitted) ** 2) / np.sum((y - y.mean()) ** 2))


def _fit(frame: pd.DataFrame) -> Any:
    effects = {"family": "0 + C(family)", "task": "0 + C(task)"}
    everything = np.ones(len(frame))
    model = smf.mixedlm("tuned ~ base", frame, groups=everything, vc_formula=effects)
    # Of scores that the model explains whole there is no residual; what is no number is refused.
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        # A variance near 0, which is what scores in [0, 1] have, is not a boundary.
        warnings.filterwarnings("ignore", message="The MLE may be on the boundary")
        # Said by `converged`; a Hessian without an inverse gives no Wald interval.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", SingularMatrixWarning)
        return model.fit(reml=True)


def _slope_within(frame: pd.DataFrame) -> float:
    """Return the slope with tasks as fixed effects: quick, and close to the mixed model's.

    NaN where base scores do not vary within tasks.
    """
    base, tuned = (
        frame[name].to_numpy(float) - frame.groupby("task")[name].transform("mean").to_numpy(float)
        for name in ("base", "tuned")
    )
    squares = float(base @ base)
    return float(base @ tuned) / squares if squares > 1e-12 * len(base) else float("nan")

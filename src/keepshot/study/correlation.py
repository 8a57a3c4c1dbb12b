"""Do two scores go together over many models? Correlations whose intervals know about families.

Models of one family are not independent, so families are resampled, not models. With few families
the plain percentile bootstrap is too narrow (it covered .84 to .94 at nominal .95 with 6 to 12
families): here the bootstrap gives a standard error on Fisher's z scale, inflated by
sqrt(G / (G - 1)) and multiplied by the quantile of Student's t with G - 1 degrees of freedom, as
is usual for few clusters (Cameron, Gelbach and Miller 2008); the tests check its coverage. Pure
functions on arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, lgamma
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from keepshot.errors import StudyError

Vector = NDArray[np.float64]
Kind = Literal["spearman", "pearson"]
NUM_RESAMPLES = 1000
FEWEST_POINTS = 5
FEWEST_CLUSTERS = 3
FEWEST_RESAMPLES = 0.8
"""Share of the resamples in which both scores must vary."""


@dataclass(frozen=True)
class Correlation:
    """A correlation with its 95 % interval."""

    kind: Kind
    value: float
    low: float
    high: float
    p_value: float
    """Two-sided, of no correlation, from the same standard error as the interval; where all
    resamples agree, as of a perfect correlation, 2 in all orders of the clusters."""
    num_points: int
    num_clusters: int

    @property
    def ci95(self) -> tuple[float, float]:
        """The interval alone."""
        return (self.low, self.high)


def correlate(
    first: Sequence[float] | Vector,
    second: Sequence[float] | Vector,
    clusters: Sequence[object],
    generator: np.random.Generator,
    *,
    kind: Kind = "spearman",
    given: Vector | None = None,
) -> Correlation:
    """Return the correlation of two scores, with an interval clustered by family.

    Args:
        first: one score a model, shape [num_points].
        second: the other score of the same models.
        clusters: the family of each model; one family a model makes this an ordinary bootstrap.
        generator: source of the resamples.
        kind: of ranks, or of the scores themselves.
        given: covariates [num_points, num_covariates], such as log parameters, that both scores
            are freed from first (partial correlation; of ranks throughout for `spearman`).

    Raises:
        StudyError: with fewer than five points or three clusters, a score that is not finite, one
            that is the same for all models, or one that only few clusters make vary.
    """
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    covariates = np.zeros((len(x), 0)) if given is None else np.asarray(given, dtype=np.float64)
    members = _members(clusters)
    _check(x, y, covariates, members)
    num_clusters = len(members)

    def estimate(weights_RN: Vector) -> Vector:
        return _weighted(x, y, covariates, weights_RN, kind)

    value = float(estimate(np.ones((1, len(x))))[0])
    share = np.full(num_clusters, 1.0 / num_clusters)
    draws = generator.multinomial(num_clusters, share, size=NUM_RESAMPLES).astype(np.float64)
    resampled = _fisher(estimate(draws @ members), len(x))
    # A resample in which a score does not vary has no correlation.
    resampled = resampled[np.isfinite(resampled)]
    if np.isfinite(value) and len(resampled) < FEWEST_RESAMPLES * NUM_RESAMPLES:
        share_without = 1.0 - len(resampled) / NUM_RESAMPLES
        raise StudyError(
            f"in {share_without:.0%} of the resamples of families nothing varies in one of the "
            "scores: too few families differ for an interval"
        )
    error = float(resampled.std(ddof=1)) * np.sqrt(num_clusters / (num_clusters - 1))
    middle = float(_fisher(np.array([value]), len(x))[0])
    reach = error * float(stats.t.ppf(0.975, num_clusters - 1))
    low, high = min(np.tanh(middle - reach), value), max(np.tanh(middle + reach), value)
    if error > 1e-9:
        p_value = 2.0 * float(stats.t.sf(abs(middle) / error, num_clusters - 1))
    else:  # no scatter to measure by, as of a perfect correlation
        p_value = 2.0 * exp(-lgamma(num_clusters + 1)) if value else 1.0
    return Correlation(kind, value, float(low), float(high), p_value, len(x), num_clusters)


def without_each(
    first: Vector,
    second: Vector,
    clusters: Sequence[object],
    *,
    kind: Kind = "spearman",
) -> dict[str, float]:
    """Return the correlation without each family in turn: does one family make it?"""
    members = _members(clusters)
    _check(first, second, np.zeros((len(first), 0)), members)
    none = np.zeros((len(first), 0))
    left = _weighted(first, second, none, 1.0 - members, kind)
    names = sorted({str(cluster) for cluster in clusters})
    return dict(zip(names, map(float, left), strict=True))


def reliability(scores: Vector, noise_variances: Vector) -> float:
    """Return the share of the variance between models that is not noise of finite test sets.

    Args:
        scores: one score a model, [num_points].
        noise_variances: sampling variance of each, such as p (1 - p) / (n - 1) of a share of n
            items.

    Returns:
        (variance of scores - mean noise variance) / variance of scores, at least 0.
    """
    total = float(np.var(scores, ddof=1))
    return 0.0 if total <= 0.0 else max(0.0, 1.0 - float(np.mean(noise_variances)) / total)


def disattenuated(correlation: Correlation, first: float, second: float) -> Correlation | None:
    """Return a correlation corrected for noise in both scores (Spearman 1904), interval too.

    Args:
        correlation: between noisy scores.
        first: `reliability` of one of them.
        second: `reliability` of the other.

    Returns:
        The figures divided by sqrt(first * second) and cut at -1 and 1; None where a reliability
        is 0, so that nothing can be said. The reliabilities are taken as known.
    """
    scale = float(np.sqrt(first * second))
    if scale == 0.0:
        return None
    value, low, high = (
        float(np.clip(figure / scale, -1.0, 1.0))
        for figure in (correlation.value, correlation.low, correlation.high)
    )
    return Correlation(
        correlation.kind, value, low, high, correlation.p_value, correlation.num_points,
        correlation.num_clusters,
    )  # fmt: skip


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Benjamini and Hochberg's false discovery rate)."""
    return [] if not p_values else [float(p) for p in stats.false_discovery_control(p_values)]


def points_needed(value: float, width: float, *, kind: Kind = "spearman") -> int:
    """Return how many independent models a 95 % interval of a given width needs.

    Args:
        value: the correlation expected.
        width: upper less lower end of the interval wanted.
        kind: of ranks (variance (1 + r^2 / 2) / (n - 3) of Fisher's z, Bonett and Wright 2000),
            or of the scores (1 / (n - 3)).
    """
    assert -1.0 < value < 1.0
    assert 0.0 < width < 2.0
    middle = float(np.arctanh(value))
    inflation = 1.0 + value**2 / 2.0 if kind == "spearman" else 1.0
    points = 4
    while points < 10**7:
        reach = 1.959964 * np.sqrt(inflation / (points - 3))
        if np.tanh(middle + reach) - np.tanh(middle - reach) <= width:
            return points
        points = max(points + 1, int(points * 1.002))
    return points


def _weighted(x: Vector, y: Vector, covariates: Vector, weights_RN: Vector, kind: Kind) -> Vector:
    """Return one correlation for each row of weights, counts of how often a point is there."""
    columns = [x, y, *covariates.T]
    if kind == "spearman":
        values = [_ranks(column, weights_RN) for column in columns]
    else:
        values = [np.broadcast_to(column, weights_RN.shape) for column in columns]
    total = weights_RN.sum(1, keepdims=True)
    centred = [v - (weights_RN * v).sum(1, keepdims=True) / total for v in values]
    weighted = [weights_RN * v for v in centred]
    moments = np.array([[(w * v).sum(1) for v in centred] for w in weighted]).transpose(2, 0, 1)
    if covariates.shape[1]:
        head, cross, rest = moments[:, :2, :2], moments[:, :2, 2:], moments[:, 2:, 2:]
        moments = head - cross @ np.linalg.pinv(rest) @ cross.transpose(0, 2, 1)
    # Of a score that the covariates explain whole, rounding leaves a variance below 0.
    left = np.maximum(moments[:, [0, 1], [0, 1]], 0.0)
    scale = np.sqrt(left[:, 0] * left[:, 1])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 1e-12 * total[:, 0], moments[:, 0, 1] / scale, np.nan)


def _ranks(column: Vector, weights_RN: Vector) -> Vector:
    """Return mid-ranks within each resample, where point n occurs weights[r, n] times."""
    levels, level = np.unique(column, return_inverse=True)
    counts = weights_RN @ (level[:, None] == np.arange(len(levels)))
    return (np.cumsum(counts, axis=1) - (counts - 1.0) / 2.0)[:, level]


def _members(clusters: Sequence[object]) -> Vector:
    names = np.array([str(cluster) for cluster in clusters])
    return (names[None, :] == np.unique(names)[:, None]).astype(np.float64)


def _fisher(values: Vector, num_points: int) -> Vector:
    """Return Fisher's z, cut half a step of ranks short of 1, where it would have no end.

    Resamples of few families often are in perfect order; further out they would rule the scatter.
    """
    most = 1.0 - 6.0 / (num_points * (num_points**2 - 1.0))
    return np.arctanh(np.clip(values, -most, most))


def _check(x: Vector, y: Vector, covariates: Vector, members: Vector) -> None:
    assert len(x) == len(y) == len(covariates) == members.shape[1]
    if len(x) < FEWEST_POINTS:
        raise StudyError(
            f"a correlation over {len(x)} models says nothing; at least {FEWEST_POINTS} are needed"
        )
    if len(members) < FEWEST_CLUSTERS:
        raise StudyError(
            f"the models are of {len(members)} families; at least {FEWEST_CLUSTERS} are needed for "
            "an interval, or name each model a family of its own"
        )
    for name, column in (("first", x), ("second", y), *(("covariate", c) for c in covariates.T)):
        if not np.isfinite(column).all():
            number = int(np.argmin(np.isfinite(column)))
            raise StudyError(f"the {name} score of model {number} is not a number; leave it out")
        if np.ptp(column) == 0.0:
            raise StudyError(
                f"the {name} score is {column[0]:g} for every model, so nothing goes with it"
            )

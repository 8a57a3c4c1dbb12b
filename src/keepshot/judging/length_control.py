"""Win rates at equal length, as AlpacaEval 2 does it (arXiv 2404.04475).

    logit P(candidate wins) = w0 + w1 tanh(length difference, standardised) + w2 difficulty

The controlled win rate is the mean prediction with the length difference set to zero. Fitted as a
binomial generalised linear model on fractional preferences.

AlpacaEval besides shrinks the weights (L1, its strength chosen by cross-validation) and adds rows
of models that game length. `control_length` is plain maximum likelihood, which needs no file of
another project and has an interval; `shrunken_win_rate` is AlpacaEval's own figure.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import statsmodels.api as sm
from numpy.typing import NDArray
from scipy.optimize import minimize
from statsmodels.tools.sm_exceptions import PerfectSeparationError

from keepshot.stats import Interval

Vector = NDArray[np.float64]
STRENGTHS = np.logspace(-4, 4, 10)
"""Inverse strengths of the penalty that cross-validation chooses among."""
FOLDS = 5
GAMED_WEIGHT = 0.1
"""Weight of a gamed row: 0.2, shared by two models."""
FEWEST = 10
"""With fewer comparisons than this there is too little to fit three weights to."""


@dataclass(frozen=True)
class Controlled:
    """The controlled win rate in [0, 1], and the weights: constant, length, difficulty."""

    win_rate: Interval
    weights: tuple[float, ...]


def control_length(
    preferences: Vector, lengths: Vector, difficulty: Vector | None = None
) -> Controlled | None:
    """Estimate the win rate that would be found if both answers had the same length.

    Args:
        preferences: [N], probability that the candidate is better.
        lengths: [N, 2], characters of the candidate's and the reference's answer.
        difficulty: [N], AlpacaEval's difficulty of each instruction; None leaves the term out.

    Returns:
        None where it cannot be fitted: fewer than `FEWEST` comparisons, or preferences that length
        separates wholly.
    """
    if len(preferences) < FEWEST:
        return None
    difference = lengths[:, 0] - lengths[:, 1]
    spread = difference.std(ddof=1)
    columns = [np.ones(len(preferences))]
    if spread > 0:
        columns.append(np.tanh(difference / spread))
    if difficulty is not None:
        columns.append(difficulty)
    design = np.stack(columns, axis=1)
    level = design.copy()
    if spread > 0:
        level[:, 1] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fitted = sm.GLM(preferences, design, family=sm.families.Binomial()).fit(cov_type="HC1")
        except (np.linalg.LinAlgError, ValueError, PerfectSeparationError):
            return None
    weights, covariance = np.asarray(fitted.params), np.asarray(fitted.cov_params())
    if not fitted.converged or np.abs(weights).max() > 20 or not np.isfinite(covariance).all():
        return None
    predicted = 1.0 / (1.0 + np.exp(-level @ weights))
    value = float(predicted.mean())
    # Delta method on the logit of the mean, so that the interval stays within [0, 1].
    slope = (predicted * (1 - predicted)) @ level / len(level) / (value * (1 - value))
    error = 1.96 * float(np.sqrt(slope @ covariance @ slope))
    logit = float(np.log(value / (1 - value)))
    low, high = (1.0 / (1.0 + np.exp(-(logit + sign * error))) for sign in (-1, 1))
    return Controlled(Interval(value, float(low), float(high)), tuple(map(float, weights)))


@dataclass(frozen=True)
class Gamed:
    """Rows of models that game length: AlpacaEval's regularising data, [M] each."""

    preferences: Vector
    length: Vector
    """Standardised length differences."""
    difficulty: Vector


def shrunken_win_rate(
    preferences: Vector, lengths: Vector, difficulty: Vector, gamed: Gamed | None = None
) -> float:
    """Return AlpacaEval 2's length-controlled win rate in [0, 1]; without `gamed`, its `noreg`.

    Args:
        preferences: as in `control_length`.
        lengths: as in `control_length`.
        difficulty: AlpacaEval's difficulty of each instruction.
        gamed: AlpacaEval's gamed rows.
    """
    difference = lengths[:, 0] - lengths[:, 1]
    # AlpacaEval takes the difference the other way round; the weight's sign is all that changes.
    standardised = -difference / difference.std(ddof=1)
    ones = np.ones(len(preferences))
    design = np.stack([np.tanh(standardised), difficulty, ones], axis=1)
    target, weights = preferences, ones
    level = design * [0.0, 1.0, 1.0]
    if gamed is not None:
        zeros = np.zeros(len(gamed.preferences))
        rows = np.stack([np.tanh(gamed.length), gamed.difficulty, zeros], axis=1)
        # These rows have no constant: theirs is that of the models that game length.
        design = np.concatenate([rows, design])
        target = np.concatenate([gamed.preferences, preferences])
        weights = np.concatenate([zeros + GAMED_WEIGHT, ones])
    fold = (len(target) - 1 - np.arange(len(target))) % FOLDS
    losses = np.zeros(len(STRENGTHS))
    for number in range(FOLDS):
        kept, out = fold != number, fold == number
        for i, strength in enumerate(STRENGTHS):
            fitted = _shrunken(design[kept], target[kept], weights[kept], float(strength))
            losses[i] += float(np.mean(weights[out] * _loss(design[out] @ fitted, target[out])))
    best = float(STRENGTHS[int(np.argmin(losses))])
    fitted = _shrunken(design, target, weights, best)
    return float(np.mean(1.0 / (1.0 + np.exp(-level @ fitted))))


def _shrunken(design: Vector, target: Vector, weights: Vector, strength: float) -> Vector:
    """Minimise the weighted log loss plus |w| / strength, with w as a difference of positives."""
    size = design.shape[1]

    def objective(halves: Vector) -> tuple[float, Vector]:
        logits = design @ (halves[:size] - halves[size:])
        loss = float(weights @ _loss(logits, target)) + float(halves.sum()) / strength
        slope = (weights * (1.0 / (1.0 + np.exp(-logits)) - target)) @ design
        return loss, np.concatenate([slope, -slope]) + 1.0 / strength

    # Tight, because strengths are chosen by losses that differ in the sixth digit.
    options = {"ftol": 1e-14, "gtol": 1e-8, "maxiter": 2000, "maxfun": 10000}
    bounds = [(0.0, None)] * (2 * size)
    start = np.zeros(2 * size)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    halves: Vector = np.asarray(found.x)
    return halves[:size] - halves[size:]


def _loss(logits: Vector, target: Vector) -> Vector:
    return np.logaddexp(0.0, logits) - target * logits

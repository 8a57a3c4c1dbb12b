"""Error bars for few-shot scores: pure functions on arrays.

Every comparison here is paired: the same questions under the same demonstrations, put to two
models. Items are resampled within each task (tasks are fixed, not a sample), and demonstration
draws within each task as a crossed second level, so an interval covers both the choice of
questions and the choice of demonstrations. With one draw it covers the questions alone.
Seeds of tuning are one level for all tasks, since a seed is one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

Matrix = NDArray[np.float64]
NUM_RESAMPLES = 4000
_ZERO = 1e-9
"""A sum of scores up to this is none."""
Resampled = tuple[float, NDArray[np.float64]]
"""A figure, and that of every resample, [NUM_RESAMPLES]."""


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def ci95(self) -> tuple[float, float]:
        """The interval alone."""
        return (self.low, self.high)


def proportion(num_correct: float, num_items: int) -> Interval:
    """Return a share with its Wilson interval, which stays honest at 0 and 1.

    Args:
        num_correct: sum of the items' scores, each in [0, 1].
        num_items: number of items, at least 1.
    """
    share = num_correct / num_items
    low, high = scipy_stats.binomtest(round(num_correct), num_items).proportion_ci(method="wilson")
    return Interval(share, float(min(low, share)), float(max(high, share)))


def bootstrap_mean(values: NDArray[np.float64], generator: np.random.Generator) -> Interval:
    """Return the mean of `values` [N] with a bootstrap interval over items."""
    resampled = _multinomial_weights(len(values), generator) @ values
    return percentiles(float(values.mean()), resampled)


def mean_over_tasks(
    tasks: Sequence[Matrix],
    generator: np.random.Generator,
    num_seeds: Sequence[int] | None = None,
) -> Interval:
    """Return the mean over tasks of the mean score, with a bootstrap interval.

    Args:
        tasks: one [num_draws, num_items] matrix of scores per task; under several seeds of tuning
            [num_seeds * num_draws, num_items], seed after seed.
        generator: source of the resamples.
        num_seeds: for each task the number of seeds; 1 for all if None.
    """
    return percentiles(*resampled_over_tasks([tasks], generator, num_seeds)[0])


def difference(first: Matrix, second: Matrix, generator: np.random.Generator) -> Interval:
    """Return mean first - mean second for one task, paired by item and draw."""
    resampled = resampled_means([first, second], generator)
    return percentiles(float(first.mean() - second.mean()), resampled[0] - resampled[1])


def retention(
    after: Sequence[Matrix],
    before: Sequence[Matrix],
    chances: Sequence[float],
    generator: np.random.Generator,
) -> Interval | None:
    """Return (mean after - mean chance) / (mean before - mean chance), paired.

    Args:
        after: one [num_draws, num_items] matrix per task for the tuned model.
        before: the same questions and draws for the model before tuning, in the same order.
        chances: the score that guessing gets on each task.
        generator: source of the resamples.

    Returns:
        None where the model before tuning is not reliably above chance, so that a share of its
        ability means nothing.
    """
    found = resampled_retention(after, before, chances, generator)
    return None if found is None else percentiles(*found)


def resampled_retention(
    after: Sequence[Matrix],
    before: Sequence[Matrix],
    chances: Sequence[float],
    generator: np.random.Generator,
    num_seeds: Sequence[int] | None = None,
) -> Resampled | None:
    """Return what `retention` is made of: its value, and that of every resample."""
    for task_after, task_before in zip(after, before, strict=True):
        assert task_after.shape == task_before.shape, "retention needs paired items and draws"
    one, two = resampled_over_tasks([after, before], generator, num_seeds)
    return kept(one, two, float(np.mean(chances)))


def kept(after: Resampled, before: Resampled, chance: float) -> Resampled | None:
    """Return the share of a score above chance that is left, and that of every resample.

    Args:
        after: mean over tasks and its resamples, as `resampled_over_tasks` returns.
        before: the same for the model before tuning, of the same resamples.
        chance: mean score of guessing.

    Returns:
        None where the model before tuning is not reliably above chance.
    """
    above = before[1] - chance
    if float(np.quantile(above, 0.025)) <= _ZERO:
        return None
    # Of a resample with nothing to keep the share could be anything: as large as any is the
    # cautious reading, and there are fewer of them than the interval leaves out.
    nothing = above <= _ZERO
    shares = (after[1] - chance) / np.where(nothing, 1.0, above)
    shares[nothing] = shares[~nothing].max()
    return (after[0] - chance) / (before[0] - chance), shares


def resampled_over_tasks(
    arms: Sequence[Sequence[Matrix]],
    generator: np.random.Generator,
    num_seeds: Sequence[int] | None = None,
) -> list[Resampled]:
    """Return each arm's mean over tasks, and that of every resample: the same ones for all.

    Args:
        arms: for each arm one [num_draws, num_items] matrix per task; of the same shapes in all.
            Under several seeds of tuning, [num_seeds * num_draws, num_items], seed after seed.
        generator: source of the resamples.
        num_seeds: for each task the number of seeds; 1 for all if None. A resample has the same
            seeds on all tasks with as many.
    """
    num_tasks = len(arms[0])
    counts = num_seeds or [1] * num_tasks
    seeds = {count: _seed_weights(count, generator) for count in sorted({*counts} - {1})}
    total = np.zeros((len(arms), NUM_RESAMPLES))
    for task, count in zip(range(num_tasks), counts, strict=True):
        total += resampled_means([arm[task] for arm in arms], generator, seeds.get(count))
    values = [float(np.mean([matrix.mean() for matrix in arm])) for arm in arms]
    return list(zip(values, total / num_tasks, strict=True))


def resampled_means(
    paired: Sequence[Matrix], generator: np.random.Generator, seeds: Matrix | None = None
) -> list[NDArray[np.float64]]:
    """Return bootstrap means of matrices that share their items and draws: [num_resamples] each.

    Args:
        paired: [num_rows, num_items] each; a row is a draw, under one seed after the other.
        generator: source of the resamples.
        seeds: weights of the seeds of tuning, [num_resamples, num_seeds]; there is one if None.
    """
    num_rows, num_items = paired[0].shape
    items = _multinomial_weights(num_items, generator)
    rows = _multinomial_weights(num_rows // (1 if seeds is None else seeds.shape[1]), generator)
    if seeds is not None:
        rows = (seeds[:, :, None] * rows[:, None, :]).reshape(NUM_RESAMPLES, num_rows)
    # One product for all that are paired: a [resamples, rows] table of means for each.
    by_row = items @ np.concatenate(paired).T
    return [
        (rows * by_row[:, start : start + num_rows]).sum(axis=1)
        for start in range(0, len(paired) * num_rows, num_rows)
    ]


def _seed_weights(num_seeds: int, generator: np.random.Generator) -> Matrix:
    """Return weights [num_resamples, num_seeds] of one seed fewer than there are.

    As many as there are would make the variance of a mean of few seeds too small, by 1 / num_seeds.
    """
    shares = np.full(num_seeds, 1.0 / num_seeds)
    return generator.multinomial(num_seeds - 1, shares, size=NUM_RESAMPLES) / (num_seeds - 1)


def _multinomial_weights(size: int, generator: np.random.Generator) -> Matrix:
    counts = generator.multinomial(size, np.full(size, 1.0 / size), size=NUM_RESAMPLES)
    return counts.astype(np.float64) / size


def percentiles(value: float, resampled: NDArray[np.float64]) -> Interval:
    """Return a figure with the 2.5 % and 97.5 % points of its resamples, its own value included."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(value, float(min(low, value)), float(max(high, value)))

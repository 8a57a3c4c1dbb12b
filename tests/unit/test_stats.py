"""Intervals against independent references: coverage by simulation, and Wilson by formula."""

from __future__ import annotations

import math

import numpy as np
import pytest

from keepshot import stats


def test_proportion_is_the_wilson_interval() -> None:
    z, n, share = 1.959963984540054, 40, 0.3
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    interval = stats.proportion(12, 40)
    assert interval.value == 0.3
    assert interval.ci95 == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_proportion_of_nothing_right_still_has_an_upper_bound() -> None:
    assert stats.proportion(0, 20).ci95 == pytest.approx((0.0, 0.161), abs=1e-3)


def test_identical_answers_have_retention_one_without_spread() -> None:
    """Pairing must cancel all noise when both models answer alike."""
    generator = np.random.default_rng(0)
    tasks = [(generator.random((2, 30)) < 0.6).astype(float) for _ in range(4)]
    kept = stats.retention(tasks, tasks, [0.0] * 4, np.random.default_rng(1))
    assert kept is not None
    assert (kept.value, kept.low, kept.high) == pytest.approx((1.0, 1.0, 1.0))


def test_retention_subtracts_chance() -> None:
    before = [np.array([[1.0] * 80 + [0.0] * 20])]
    after = [np.array([[1.0] * 65 + [0.0] * 35])]
    kept = stats.retention(after, before, [0.5], np.random.default_rng(0))
    assert kept is not None
    assert kept.value == pytest.approx((0.65 - 0.5) / (0.8 - 0.5))


def test_retention_stays_a_number_where_some_resamples_have_nothing_to_keep() -> None:
    before = [np.array([[1.0] * 4 + [0.0] * 36])]
    after = [np.array([[1.0] * 3 + [0.0] * 37])]
    resampled = stats.resampled_over_tasks([before], np.random.default_rng(0))[0][1]
    assert 0 < (resampled == 0.0).sum() < 0.025 * len(resampled), "the case that is meant"
    kept = stats.retention(after, before, [0.0], np.random.default_rng(0))
    assert kept is not None
    assert kept.value == pytest.approx(0.75)
    assert 0.0 <= kept.low < kept.value < kept.high <= 1.0


def test_retention_of_a_model_at_chance_is_undefined() -> None:
    before = [np.array([[1.0, 0.0] * 20])]
    assert stats.retention(before, before, [0.5], np.random.default_rng(0)) is None


def test_same_generator_gives_the_same_bounds() -> None:
    tasks = [np.eye(3), np.ones((3, 3))]
    first = stats.mean_over_tasks(tasks, np.random.default_rng(7))
    assert first == stats.mean_over_tasks(tasks, np.random.default_rng(7))


def test_interval_of_a_mean_over_tasks_covers_the_truth() -> None:
    """200 simulated studies of 6 tasks x 40 items: coverage of 95 % within binomial noise.

    A false alarm (coverage below .90 although the truth is .95) has probability about .001.
    """
    generator = np.random.default_rng(3)
    abilities = np.array([0.2, 0.35, 0.5, 0.6, 0.75, 0.9])
    covered = 0
    for _ in range(200):
        tasks = [(generator.random((1, 40)) < ability).astype(float) for ability in abilities]
        interval = stats.mean_over_tasks(tasks, generator)
        covered += interval.low <= abilities.mean() <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_draws_of_demonstrations_widen_the_interval() -> None:
    """Two draws that disagree completely leave a wide interval although items are many."""
    disagreeing = [np.vstack([np.ones(500), np.zeros(500)])]
    interval = stats.mean_over_tasks(disagreeing, np.random.default_rng(0))
    assert interval.value == 0.5
    assert interval.ci95 == pytest.approx((0.0, 1.0))


def test_seeds_of_tuning_are_one_level_for_all_tasks() -> None:
    """200 simulated studies of 12 tasks x 16 items under 3 seeds that differ by .08.

    A seed is better or worse on all tasks at once; drawn anew for each, coverage was .83 (.69 with
    two draws).
    """
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        seeds = generator.normal(0.5, 0.08, (3, 1)).clip(0, 1)
        tasks = [(generator.random((3, 16)) < seeds).astype(float) for _ in range(12)]
        interval = stats.mean_over_tasks(tasks, generator, [3] * 12)
        covered += interval.low <= 0.5 <= interval.high
    assert covered / 200 >= 0.86


def test_seeds_that_disagree_widen_the_interval_of_many_tasks() -> None:
    disagreeing = [np.vstack([np.ones(50), np.ones(50), np.zeros(50), np.zeros(50)])] * 20
    seeds = stats.mean_over_tasks(disagreeing, np.random.default_rng(0), [2] * 20)
    assert seeds.ci95 == pytest.approx((0.0, 1.0))
    draws = stats.mean_over_tasks(disagreeing, np.random.default_rng(0))
    assert draws.high - draws.low < 0.3

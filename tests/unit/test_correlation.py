"""Correlations over models: against scipy, and intervals against simulations with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from keepshot.errors import StudyError
from keepshot.study.correlation import (
    Correlation,
    _weighted,
    adjusted,
    correlate,
    disattenuated,
    points_needed,
    reliability,
    without_each,
)

FAMILIES, MODELS = 9, 10


def drawn(
    rng: np.random.Generator, *, families: int = FAMILIES, models: int = MODELS,
    between: float = 0.9, within: float = 0.6, share: float = 0.5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Return two scores whose family effects and own effects each correlate, and families."""

    def pairs(count: int, correlation: float, variance: float) -> np.ndarray:
        first, second = rng.standard_normal((2, count))
        second = correlation * first + np.sqrt(1 - correlation**2) * second
        return np.sqrt(variance) * np.stack([first, second])

    family = np.repeat(np.arange(families), models)
    scores = pairs(families, between, share)[:, family]
    scores += pairs(families * models, within, 1 - share)
    return scores[0], scores[1], family


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_value_is_scipys(kind: str, tied: bool):
    x, y, family = drawn(np.random.default_rng(0))
    if tied:
        x, y = x.round(0), y.round(0)
    reference = stats.spearmanr if kind == "spearman" else stats.pearsonr
    found = correlate(x, y, family, np.random.default_rng(1), kind=kind)
    assert found.value == pytest.approx(reference(x, y).statistic, abs=1e-12)
    assert (found.num_points, found.num_clusters) == (90, FAMILIES)


def test_a_resample_counts_as_if_its_points_were_repeated():
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 6, (2, 30)).astype(float)
    counts = rng.multinomial(30, np.full(30, 1 / 30)).astype(float)
    repeated = np.repeat(np.arange(30), counts.astype(int))
    expected = stats.spearmanr(x[repeated], y[repeated]).statistic
    found = _weighted(x, y, np.zeros((30, 0)), counts[None], "spearman")[0]
    assert found == pytest.approx(expected, abs=1e-12)


def test_partial_correlation_is_that_of_the_residuals():
    rng = np.random.default_rng(3)
    size = rng.standard_normal(60)
    x, y = size + rng.standard_normal(60), size + rng.standard_normal(60)
    design = np.column_stack([np.ones(60), size])
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    found = correlate(x, y, range(60), rng, kind="pearson", given=size[:, None])
    assert found.value == pytest.approx(np.corrcoef(left)[0, 1], abs=1e-12)
    assert found.value < correlate(x, y, range(60), rng, kind="pearson").value - 0.2


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_intervals_cover_as_often_as_they_say(share: float):
    everyone = drawn(np.random.default_rng(4), families=20_000, models=5, share=share)
    truth = stats.spearmanr(*everyone[:2]).statistic
    covered = 0
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        x, y, family = drawn(rng, share=share)
        found = correlate(x, y, family, rng)
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / 1000 <= 0.97


def test_the_clustered_interval_is_wider_where_families_cluster():
    wider = 0.0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x, y, family = drawn(rng, share=0.7)
        clustered, naive = (correlate(x, y, c, rng) for c in (family, range(len(x))))
        wider += (clustered.high - clustered.low) / (naive.high - naive.low)
    assert wider / 20 > 1.5


def test_correlation_of_nothing_is_significant_as_often_as_it_says():
    found = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        x, y, family = drawn(rng, between=0.0, within=0.0)
        found.append(correlate(x, y, family, rng).p_value < 0.05)
    assert np.mean(found) <= 0.08


def test_noise_of_finite_test_sets_is_corrected_for():
    noisy, corrected, true = [], [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        x, y, family = drawn(rng, families=300, models=2)
        shares = [(0.5 + 0.1 * score).clip(0.05, 0.95) for score in (x, y)]
        measured = [rng.binomial(40, share) / 40 for share in shares]
        found = correlate(*measured, family, rng, kind="pearson")
        better = disattenuated(found, *(reliability(m, m * (1 - m) / 39) for m in measured))
        assert better is not None
        assert better.low / found.low == pytest.approx(better.value / found.value)
        noisy.append(found.value)
        corrected.append(better.value)
        true.append(np.corrcoef(shares)[0, 1])
    assert np.mean(noisy) < np.mean(true) - 0.2
    assert np.mean(corrected) == pytest.approx(np.mean(true), abs=0.03)
    assert disattenuated(found, 0.0, 0.5) is None


def test_one_family_that_makes_the_correlation_is_seen():
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal((2, 40))
    family = np.repeat([*"abcd"], 10)
    x[:10] += 20
    y[:10] += 20
    left = without_each(x, y, family)
    assert left["a"] == pytest.approx(stats.spearmanr(x[10:], y[10:]).statistic)
    assert min(left[name] for name in "bcd") > 0.4 > left["a"]


def test_adjusted_for_their_number():
    assert adjusted([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.0533333, 0.0533333, 0.5])
    assert adjusted([]) == []


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_points_needed_gives_the_width(kind: str):
    points = points_needed(0.85, 0.1, kind=kind)
    inflation = 1 + 0.85**2 / 2 if kind == "spearman" else 1

    def width(count: int) -> float:
        reach = 1.959964 * np.sqrt(inflation / (count - 3))
        return np.tanh(np.arctanh(0.85) + reach) - np.tanh(np.arctanh(0.85) - reach)

    assert width(points) <= 0.1 < width(points - 2)
    rng = np.random.default_rng(7)
    z = rng.multivariate_normal([0, 0], [[1, 0.85], [0.85, 1]], (2000, points))
    function = stats.spearmanr if kind == "spearman" else stats.pearsonr
    values = [function(*sample.T).statistic for sample in z]
    low, high = np.quantile(values, [0.025, 0.975])
    assert high - low == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first": np.arange(4.0), "second": np.arange(4.0), "clusters": [*"abcd"]}, "at least 5"),
        ({"clusters": [*"aaaabbbb"]}, "2 families; at least 3"),
        ({"first": np.full(8, 0.5)}, "first score is 0.5 for every model"),
        ({"second": np.array([0, 1, 2, np.nan, 4, 5, 6, 7.0])}, "second score of model 3"),
    ],
)
def test_refused(change: dict[str, object], words: str):
    asked = {"first": np.arange(8.0), "second": np.arange(8.0), "clusters": [*"aabbccdd"]}
    with pytest.raises(StudyError, match=words):
        correlate(**{**asked, **change}, generator=np.random.default_rng(0))  # type: ignore[arg-type]


def test_a_perfect_correlation_is_no_failure():
    found = correlate(np.arange(8.0), np.arange(8.0), [*"aabbccdd"], np.random.default_rng(0))
    assert isinstance(found, Correlation)
    assert found.value == pytest.approx(1.0)
    assert 0.98 < found.low < 1.0, "half a step of ranks short of 1"
    assert found.low <= found.value <= found.high
    # Its resamples do not scatter; of the 24 orders of four families, two agree as well.
    assert found.p_value == pytest.approx(2 / 24)


def test_a_score_that_few_families_make_vary_has_no_interval():
    """Where one family alone differs, a third of the resamples say nothing, and the rest the same.

    So it was for scores freed from size in three families: an interval of no width.
    """
    x, y = np.repeat([0.1, 0.5, 0.3], 4), np.random.default_rng(0).random(12)
    family, size = np.repeat([*"abc"], 4), np.repeat([3.0, 4.0, 7.0], 4)
    assert correlate(x, y, family, np.random.default_rng(0)).num_clusters == 3
    with pytest.raises(StudyError, match="of the resamples of families nothing varies"):
        correlate(x, y, family, np.random.default_rng(0), given=size[:, None])
    alone = np.where(np.arange(12) < 1, 1.0, 0.0)
    with pytest.raises(StudyError, match="too few families differ"):
        correlate(alone, y, np.repeat(range(6), 2), np.random.default_rng(0))

"""What explains a tuned score, and the bound by examples: simulations with known answers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from keepshot.errors import StudyError
from keepshot.study.analysis import attribute, bound, mixed_model


def study(rng: np.random.Generator, *, slope: float = 0.8, families: int = 9) -> pd.DataFrame:
    family_effects, task_effects = rng.normal(0, 0.06, families), rng.normal(0, 0.15, 8)
    rows: list[dict[str, object]] = []
    for family in range(families):
        for model in range(4):
            ability = rng.normal(0.5, 0.1)
            for task in range(8):
                base = ability + rng.normal(0, 0.05)
                tuned = 0.1 + slope * base + family_effects[family] + task_effects[task]
                rows.append(
                    {"base": base, "tuned": tuned + rng.normal(0, 0.05), "family": f"f{family}",
                     "task": f"t{task}", "model": f"f{family}-{model}"}
                )  # fmt: skip
    return pd.DataFrame(rows)


def test_the_mixed_model_finds_what_was_put_in():
    found = [mixed_model(study(np.random.default_rng(seed))) for seed in range(6)]
    assert all(each.slope.low < 0.8 < each.slope.high for each in found)
    assert np.mean([each.slope.value for each in found]) == pytest.approx(0.8, abs=0.05)
    assert np.mean([each.residual_variance for each in found]) == pytest.approx(0.0025, rel=0.1)
    assert np.mean([each.task_variance for each in found]) == pytest.approx(0.0225, rel=0.5)
    assert np.mean([each.family_variance for each in found]) == pytest.approx(0.0036, rel=0.5)


def test_a_mixed_model_needs_families():
    frame = study(np.random.default_rng(0), families=2)
    with pytest.raises(StudyError, match=r"2 families and 8 tasks; .* at least 3 and 2"):
        mixed_model(frame)


def test_a_slope_that_rests_on_one_family_has_no_interval():
    frame = study(np.random.default_rng(0), families=4)
    frame.loc[frame["family"] != "f0", "base"] = 0.1
    with pytest.raises(StudyError, match="differ by one family alone"):
        mixed_model(frame)


def test_shares_of_independent_causes_are_their_own():
    rng = np.random.default_rng(0)
    first, second, noise = rng.standard_normal((3, 4000))
    outcome = 2 * first + second + noise
    family = np.repeat(np.arange(400), 10)
    found = attribute(outcome, {"first": first, "second": second}, family, rng)
    assert found["first"].value == pytest.approx(4 / 6, abs=0.03)
    assert found["second"].value == pytest.approx(1 / 6, abs=0.03)
    assert sum(share.value for share in found.values()) == pytest.approx(1.0, abs=1e-9)
    assert all(share.low < share.value < share.high for share in found.values())


def test_causes_that_say_the_same_share_what_they_explain():
    rng = np.random.default_rng(1)
    cause, noise = rng.standard_normal((2, 2000))
    found = attribute(cause + noise, {"a": cause, "b": cause}, np.arange(2000), rng)
    assert found["a"].value == pytest.approx(found["b"].value)
    assert found["a"].value == pytest.approx(0.25, abs=0.03)


def test_the_bound_by_hand():
    base = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0.0]])
    tuned = np.array([[0, 1, 1, 0.0]])
    found = bound(tuned, base, np.random.default_rng(0))
    # Item 1 is solved by draw 1 alone, so beyond the two others where draw 1 is left out.
    assert found.beyond.value == pytest.approx((1 + 1 / 3) / 4)
    assert found.control.value == pytest.approx((1 / 3) / 4)
    assert (found.num_draws, found.num_items) == (2, 4)


def test_another_draw_of_the_base_is_not_beyond_it():
    wrong = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        ability = rng.beta(1, 1, 400)
        runs = (rng.random((6, 400)) < ability).astype(float)
        found = bound(runs[:1], runs[1:], rng)
        wrong += not found.excess.low <= 0.0 <= found.excess.high
    assert wrong / 100 <= 0.1


def test_a_model_that_can_more_is_beyond():
    rng = np.random.default_rng(0)
    ability = rng.beta(1, 1, 200) * 0.5
    base = (rng.random((5, 200)) < ability).astype(float)
    found = bound((rng.random((1, 200)) < ability + 0.4).astype(float), base, rng)
    assert found.excess.low > 0.1


def test_the_bound_needs_draws():
    with pytest.raises(StudyError, match="needs 3 draws"):
        bound(np.ones((1, 4)), np.ones((2, 4)), np.random.default_rng(0))

"""What a study of made models shows, where what there is to find is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from cohorts import made_items
from keepshot import stats
from keepshot.errors import StudyError
from keepshot.study.analysis import attribute, bound, clustered_mean
from keepshot.study.cohort import Condition, _noise, cohort  # pyright: ignore[reportPrivateUsage]
from keepshot.study.evidence import CorrelationFinding, Findings, Kind, is_finite
from keepshot.study.findings import NO_PAIRS, correlated, findings, pairs_of
from keepshot.study.frame import pairs, score_frame

DOMAINS = {f"task-{number:02d}": f"kind {number % 3}" for number in range(24)}


def asked(found: Findings | None, **wanted: object) -> list[CorrelationFinding]:
    assert found is not None
    keys = {"role": "question", "models": "all", "tasks": "all", "kind": "spearman", **wanted}
    rows = found.correlations
    return [one for one in rows if all(getattr(one, k) == v for k, v in keys.items())]


def question(items: pd.DataFrame, kind: Kind) -> dict[str, Any]:
    """The one correlation alone, which is quick."""
    one = cohort(items)
    assert one is not None
    pair = next(p for p in pairs_of(list(one.asked)) if p.role == "question")
    joined = one.pair(pair.first, pair.second)
    assert joined is not None
    return correlated(joined, kind, lambda reason: None)


@pytest.fixture(scope="module")
def known() -> Findings:
    found = findings(made_items(32, 6, 12, families=8, degraded=8, seed=1), DOMAINS)
    assert found is not None
    return found


def test_the_question_stands_beside_its_controls(known: Findings):
    (whole,) = asked(known)
    assert (whole.first, whole.second) == ("base gold, 4 shots", "tuned direct")
    assert (whole.num_points, whole.num_clusters, whole.num_tasks) == (32, 8, 6)
    assert whole.ci95[0] < whole.value < whole.ci95[1]
    assert whole.value > 0.75
    (control,) = asked(known, role="control")
    assert control.first == "base direct"
    rows = known.correlations
    assert all(one.p_adjusted >= one.p_value for one in rows)
    assert control.value < whole.ci95[0], "without examples these bases show little of themselves"
    assert known.settings == [
        "base direct", "base gold, 4 shots", "tuned direct", "tuned gold, 4 shots",
    ]  # fmt: skip
    others = [one for one in known.correlations if one.role == "other" and one.kind == "pearson"]
    assert len(others) == 4, "six pairs of four settings, less the question and its control"


def test_degraded_models_make_part_of_the_correlation(known: Findings):
    (whole,), (intact,) = asked(known), asked(known, models="not degraded")
    assert intact.num_points == 24
    assert intact.value < whole.value
    (tagged,), (others,) = (
        asked(known, models="tuned_already"),
        asked(known, models="not tuned_already"),
    )
    assert tagged.num_points + others.num_points == 32
    comparison = {one.models: one for one in known.comparisons}
    assert set(comparison) == {"all", "not degraded"}
    assert sum(point.degraded is not None for point in comparison["all"].points) == 8
    assert len(comparison["not degraded"].points) == 24


def test_findings_are_the_same_again_and_do_not_see_the_order_of_rows():
    items = made_items(12, 5, 6, families=4)
    first = findings(items, DOMAINS)
    assert first == findings(items, DOMAINS)
    shuffled = findings(items.sample(frac=1.0, random_state=0), DOMAINS)
    (one,), (other,) = asked(first), asked(shuffled)
    assert one.value == pytest.approx(other.value, abs=1e-12)


def test_where_nothing_goes_together_the_interval_says_so():
    made = (made_items(30, 2, 8, families=10, slope=0.0, own=1.0, seed=seed) for seed in range(8))
    ends = [question(items, "spearman")["ci95"] for items in made]
    assert sum(low <= 0.0 <= high for low, high in ends) >= 7


def test_noise_of_few_items_is_taken_out():
    """Abilities correlate at .8 / sqrt(.64 + .09) = .936; with 16 answers each they seem not to."""
    raw: list[float] = []
    clean: list[float] = []
    for seed in range(6):
        made = made_items(60, 4, 4, families=20, draws=1, seed=seed)
        one = question(made, "pearson")
        assert all(0.3 < value < 0.95 for value in one["reliabilities"])
        raw.append(one["value"])
        clean.append(one["without_noise"].value)
    assert np.mean(raw) < 0.8
    assert np.mean(clean) == pytest.approx(0.936, abs=0.06)


def test_items_that_are_hard_for_all_are_no_noise():
    ability, ease = np.array([0.1, 0.5, 0.7])[:, None], np.array([0.0, 0.1, 0.2, 0.3])
    assert _noise(ability + ease) == pytest.approx(0.0, abs=1e-15)
    rng = np.random.default_rng(0)
    table = rng.normal(size=(7, 9))
    left = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    mean_square = (left**2).sum() / (6 * 8)  # the residual of a two-way table
    assert _noise(table).mean() == pytest.approx(mean_square / 9)


def test_few_models_are_refused_by_name():
    found = findings(made_items(4, 5, 4, families=4), DOMAINS)
    assert found is not None
    assert found.correlations == []
    assert any(
        "tuned direct against base gold, 4 shots" in note
        and "a correlation over 4 models says nothing; at least 5 are needed" in note
        for note in found.notes
    )
    two = findings(made_items(12, 5, 4, families=2), DOMAINS)
    assert two is not None
    assert two.correlations == []
    assert any("2 families; at least 3" in note for note in two.notes)
    assert two.comparisons[0].mixed is None
    assert two.comparisons[0].bound is None
    assert two.comparisons[0].shares == []


def test_too_few_draws_for_the_bound_are_named(known: Findings):
    found = findings(made_items(12, 5, 6, families=4, draws=2), DOMAINS)
    assert found is not None
    assert found.comparisons[0].bound is None
    assert any("needs 3 draws" in note for note in found.notes)
    over = known.comparisons[0].bound
    assert over is not None
    assert (over.num_draws, over.num_models, over.num_items) == (2, 32, 72)
    assert over.excess.value == pytest.approx(over.beyond.value - over.control.value)


def test_the_bound_takes_the_ask_with_the_most_draws():
    items = made_items(12, 5, 6, families=4, draws=4)
    gold = (items["stage"] == "base") & (items["setting"] == "gold")
    few = items[~gold | (items["seed"] < 2)]
    more = items[gold & items["item"].isin(sorted(set(items["item"]))[:4])].assign(ask="draws")
    found = findings(pd.concat([few, more], ignore_index=True), DOMAINS)
    assert found is not None
    (comparison,) = [one for one in found.comparisons if one.models == "all"]
    assert "draws" not in comparison.first, "the question is asked of one ask's items"
    assert comparison.bound is not None
    assert (comparison.bound.num_draws, comparison.bound.num_items) == (3, 4 * 5)


def test_pairs_are_of_one_ask_as_the_findings_are():
    """An ask of more draws of fewer items, all of them right here, was mixed into base scores."""
    items = made_items(6, 5, 6, families=3)
    gold = (items["stage"] == "base") & (items["setting"] == "gold")
    draws = items[gold].assign(ask="draws", correct=1.0)
    found = findings(pd.concat([items, draws], ignore_index=True), DOMAINS)
    assert found is not None
    frame = pairs(score_frame(pd.concat([items, draws], ignore_index=True)), shots=4, by_task=False)
    points = {point.model: (point.base, point.tuned) for point in found.comparisons[0].points}
    for row in frame.itertuples():
        assert (row.base, row.tuned) == pytest.approx(points[str(row.model)])
    apart = draws.assign(correct=0.5)
    only = pd.concat([items[~gold], apart], ignore_index=True)
    assert set(pairs(score_frame(only), shots=4)["base"]) == {0.5}, "of two, where none has both"


def test_an_ask_of_other_tasks_does_not_take_the_bound_away():
    items = made_items(12, 5, 6, families=4, draws=3)
    elsewhere = made_items(12, 3, 6, families=4, draws=5)
    elsewhere = elsewhere[(elsewhere["stage"] == "base") & (elsewhere["setting"] == "gold")]
    other = elsewhere.assign(ask="elsewhere", task="other " + elsewhere["task"])
    found = findings(pd.concat([items, other], ignore_index=True), DOMAINS)
    assert found is not None
    over = found.comparisons[0].bound
    assert over is not None
    assert (over.num_draws, over.num_items) == (2, 30)


def test_a_model_with_one_score_on_all_tasks_is_left_out_of_both_kinds():
    """0.7 less the mean of seven times 0.7 is not 0, and no correlation can be made of that."""
    items = made_items(12, 7, 10, families=4)
    one = items["model"] == "model-002"
    items.loc[one, "correct"] = (items.loc[one, "item"].str[1:].astype(int) < 7).astype(float)
    found = findings(items, DOMAINS)
    assert found is not None
    within = {one.kind: one for one in found.comparisons[0].within}
    assert {one.num_left_out for one in within.values()} == {1}
    assert within["pearson"].num_models == within["spearman"].num_models == 11


def test_a_task_that_one_model_solves_does_not_take_the_others_away():
    items = made_items(12, 5, 6, families=6)
    on = items["task"] == "task-02"
    items.loc[on, "correct"] = (items.loc[on, "model"] == "model-004").astype(float)
    found = findings(items, DOMAINS)
    assert found is not None
    assert [one.task for one in found.comparisons[0].by_task] == [
        "task-00", "task-01", "task-03", "task-04",
    ]  # fmt: skip


def test_what_is_no_number_cannot_be_a_finding(known: Findings):
    assert is_finite(known)
    assert is_finite({"value": np.float64(0.5), "names": ["a"], "given": None})
    broken = known.correlations[0].model_copy(update={"ci95": (0.1, float("nan"))})
    assert not is_finite([broken])
    assert not is_finite({"slope": (float("inf"), 1)})


def test_what_is_made_by_ties_alone_can_be_read_again():
    """Scores that are all 0 or 1, the same for most models, or those of the base."""
    for change in ("all", "most", "same"):
        items = made_items(8, 4, 4, families=4, draws=3)
        number = items["model"].str[-3:].astype(int)
        chosen = {
            "all": number < 4,
            "most": number == 1,
            "same": items["item"].str[1:].astype(int) * 2 < number,
        }[change]
        found = findings(items.assign(correct=chosen.astype(float)), DOMAINS)
        assert found is not None
        assert Findings.model_validate_json(found.model_dump_json()) == found


def test_what_explains_the_tuned_score_is_its_base(known: Findings):
    shares = {one.cause: one for one in known.comparisons[0].shares}
    assert set(shares) == {"base few-shot score", "size (log parameters)", "recipe", "unexplained"}
    assert sum(one.value for one in shares.values()) == pytest.approx(1.0)
    assert shares["base few-shot score"].value > 0.6
    assert any("tuning data is the same for all" in note for note in known.notes)


def test_tasks_tuned_for_are_told_apart():
    items = made_items(12, 5, 6, families=4)
    items.loc[(items["stage"] == "tuned") & (items["task"] == "task-03"), "is_target"] = True
    found = findings(items, DOMAINS)
    assert [one.num_tasks for one in asked(found, tasks="tuned for")] == [1]
    assert [one.num_tasks for one in asked(found, tasks="not tuned for")] == [4]


def test_tasks_tuned_for_are_told_apart_where_models_were_asked_different_ones():
    """Bases are asked the tasks of all targets, a tuned model its own alone."""
    items = made_items(12, 6, 6, families=4)
    tuned, first = items["stage"] == "tuned", items["recipe"] == "full"
    own = tuned & np.where(first, items["task"] == "task-04", items["task"] == "task-05")
    other = tuned & np.where(first, items["task"] == "task-05", items["task"] == "task-04")
    items = items.assign(is_target=own)[~other]
    found = findings(items, DOMAINS)
    assert [one.num_tasks for one in asked(found)] == [4]
    assert [one.num_tasks for one in asked(found, tasks="tuned for")] == [1]
    assert [one.num_tasks for one in asked(found, tasks="not tuned for")] == [4]
    alone = findings(items[items["task"].isin(["task-04", "task-05"])], DOMAINS)
    assert alone is not None
    assert NO_PAIRS not in alone.notes
    mine, theirs = asked(found, tasks="tuned for")[0], asked(alone)[0]
    assert mine.value == theirs.value


def test_the_noise_of_a_mean_over_tasks_is_that_of_a_mean():
    scores = score_frame(made_items(40, 12, 30, families=4))
    apart, whole = pairs(scores, shots=4), pairs(scores, shots=4, by_task=False)
    by_model = apart.groupby("model", sort=False)["noise"].mean().to_numpy()
    np.testing.assert_allclose(whole["noise"], by_model / 12)


def test_models_that_write_their_own_examples_stand_apart():
    items = made_items(16, 5, 6, families=4)
    writers = items[(items["stage"] == "tuned") & (items["setting"] == "direct")].copy()
    writers["recipe"], writers["setting"] = "writes", "samplegen"
    also_direct = writers.assign(setting="direct")
    found = findings(pd.concat([items, writers, also_direct], ignore_index=True), DOMAINS)
    assert found is not None
    assert {"samplegen", "tuned to write examples direct"} <= set(found.settings)
    assert asked(found)[0].num_points == 16, "they are none of the tuned models of the question"
    row = next(
        one for one in found.correlations
        if (one.first, one.second, one.kind) == ("base gold, 4 shots", "samplegen", "pearson")
    )  # fmt: skip
    assert row.value == pytest.approx(asked(found, kind="pearson")[0].value), "the same answers"
    both = [
        one
        for one in found.correlations
        if {one.first, one.second} == {"tuned direct", "samplegen"}
    ]
    assert {one.num_points for one in both} == {16}, "joined by their base"


def test_a_model_taught_to_write_stands_apart_where_what_it_wrote_failed():
    """It was taken for an instruction-tuned one until its other measurement was there."""
    items = made_items(16, 5, 6, families=4)
    writers = items[(items["stage"] == "tuned") & (items["setting"] == "direct")].copy()
    writers = writers.assign(recipe="writes", samples="samplegen")
    tuned = items.assign(samples=np.where(items["stage"] == "tuned", "plain", None))
    both = pd.concat([tuned, writers], ignore_index=True)
    found = findings(both, DOMAINS)
    assert asked(found)[0].num_points == 16
    frame = pairs(score_frame(both), shots=4, by_task=False)
    assert found is not None
    points = {point.model: (point.base, point.tuned) for point in found.comparisons[0].points}
    assert len(frame) == 16, "and none of the pairs either"
    for row in frame.itertuples():
        assert (row.base, row.tuned) == pytest.approx(points[str(row.model)])


def test_a_study_without_the_question_says_so():
    items = made_items(12, 5, 6, families=4)
    assert findings(items[items["stage"] == "base"], {}) is None
    gold = findings(items[items["setting"] == "gold"], {})
    assert gold is not None
    assert gold.notes == [NO_PAIRS]
    assert {one.role for one in gold.correlations} == {"other"}


def test_settings_are_paired_within_an_ask_where_one_has_both():
    plain = [
        Condition("base", "plain", "gold", 4), Condition("base", "plain", "direct", 0),
        Condition("tuned", "plain", "direct", 0), Condition("base", "flipped", "gold", 4),
    ]  # fmt: skip
    roles = {(p.first.ask, p.first.setting, p.second.of): p.role for p in pairs_of(plain)}
    assert roles["plain", "gold", "tuned"] == "question"
    assert roles["plain", "direct", "tuned"] == "control"
    assert roles["flipped", "gold", "tuned"] == "other"
    apart = [Condition("base", "few", "gold", 4), Condition("tuned", "target", "direct", 0)]
    assert [pair.role for pair in pairs_of(apart)] == ["question"]


def test_a_task_that_some_were_not_asked_is_left_out():
    items = made_items(12, 5, 6, families=4)
    missing = (items["model"] == "model-003") & (items["task"] == "task-02")
    one = cohort(items[~missing])
    assert one is not None
    pair = next(p for p in pairs_of(list(one.asked)) if p.role == "question")
    joined = one.pair(pair.first, pair.second)
    assert joined is not None
    assert "task-02" not in joined.tasks
    assert joined.first_PT.shape == (12, 4)


def test_a_mean_over_families_of_one_is_the_plain_interval():
    values = np.random.default_rng(0).normal(size=12)
    found = clustered_mean(values, range(12))
    reach = 2.200985 * values.std(ddof=1) / np.sqrt(12)  # Student's t, 11 degrees of freedom
    assert found.ci95 == pytest.approx((values.mean() - reach, values.mean() + reach), rel=1e-6)
    alike = clustered_mean(np.repeat(values, 3), [n // 3 for n in range(36)])
    assert alike.ci95 == pytest.approx(found.ci95), "repeating models tells nothing new"
    with pytest.raises(StudyError, match="2 families; at least 3"):
        clustered_mean(values, [0, 1] * 6)


def test_shares_need_families_and_few_give_wide_intervals():
    rng = np.random.default_rng(0)
    cause, noise = rng.normal(size=(2, 60))
    y = cause + noise
    with pytest.raises(StudyError, match="2 families"):
        attribute(y, {"a": cause}, [n % 2 for n in range(60)], rng)
    few = attribute(y, {"a": cause}, [n // 20 for n in range(60)], np.random.default_rng(1))["a"]
    many = attribute(y, {"a": cause}, range(60), np.random.default_rng(1))["a"]
    assert few.high - few.low > many.high - many.low
    assert 0.0 <= few.low <= few.value <= few.high <= 1.0


def test_the_bound_resamples_items_whatever_they_have_in_common():
    """Its interval against the plain bootstrap over items."""
    rng = np.random.default_rng(0)
    base, tuned = rng.random((3, 300)) < 0.4, rng.random((2, 300)) < 0.5
    found = bound(tuned.astype(float), base.astype(float), np.random.default_rng(1))
    left = np.array([np.delete(base, k, axis=0).any(axis=0) for k in range(3)])
    beyond = np.mean([tuned.mean(0) * ~solved for solved in left], axis=0)
    assert found.beyond.value == pytest.approx(beyond.mean())
    again = beyond[np.random.default_rng(2).integers(0, 300, (4000, 300))].mean(axis=1)
    assert found.beyond.ci95 == pytest.approx(np.quantile(again, [0.025, 0.975]), abs=0.006)


def test_arms_that_are_resampled_together_get_what_each_gets_alone():
    rng = np.random.default_rng(0)
    arms = [[(rng.random((2, n)) < 0.6).astype(float) for n in (7, 11)] for _ in range(3)]
    together = stats.resampled_over_tasks(arms, np.random.default_rng(4))
    for arm, (value, resampled) in zip(arms, together, strict=True):
        alone = stats.mean_over_tasks(arm, np.random.default_rng(4))
        assert stats.percentiles(value, resampled).ci95 == pytest.approx(alone.ci95, abs=1e-12)
    kept = stats.kept(together[0], together[1], 0.2)
    paired = stats.retention(arms[0], arms[1], [0.2, 0.2], np.random.default_rng(4))
    assert kept is not None
    assert paired is not None
    assert stats.percentiles(*kept).ci95 == pytest.approx(paired.ci95)

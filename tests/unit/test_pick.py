"""The rules on hand-made paths, and the strings they are read from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from keepshot.blending.pick import (
    BestICL,
    BestWorst,
    KeepTarget,
    Knee,
    NoLoss,
    Weighted,
    check_rule,
    next_lambdas,
    pareto,
    parse_rule,
    pick,
    with_interval,
)
from keepshot.errors import ConfigError
from keepshot.jobs.along import resample_following, with_following
from keepshot.records import InstructionRow, ItemResult, PathPoint
from keepshot.scoring.summary import path_points, resample_path

# lambda: (few-shot score, target); the shape measured on a small model tuned hard.
DAMAGED = {
    0.0: (0.76, 0.00), 0.1: (0.78, 0.62), 0.2: (0.71, 0.94), 0.3: (0.64, 0.88),
    0.5: (0.53, 1.00), 0.8: (0.30, 1.00), 1.0: (0.06, 1.00),
}  # fmt: skip


def path(
    scores: dict[float, tuple[float, float | None]], retention: bool = True
) -> list[PathPoint]:
    base = scores[min(scores)][0]
    return [
        PathPoint.model_validate(
            {
                "lambda": lam,
                "split": "validation",
                "icl": icl,
                "icl_ci95": (icl - 0.05, icl + 0.05),
                "retention": icl / base if retention else None,
                "retention_ci95": None,
                "target": target,
                "target_ci95": None,
                "num_items": 100,
            }
        )
        for lam, (icl, target) in scores.items()
    ]


@pytest.mark.parametrize(("share", "lam"), [(0.6, 0.1), (0.9, 0.2), (0.94, 0.2), (0.95, 0.5)])
def test_keep_target_takes_the_best_few_shot_score_above_the_bar(share: float, lam: float) -> None:
    record = pick(path(DAMAGED), KeepTarget(share=share))
    assert record.lam == lam
    assert record.rule == f"keep-target:{share:g}"
    assert f"lambda {lam:g} has the best few-shot score" in record.reason


def test_keep_target_says_how_many_qualified_and_the_score() -> None:
    reason = pick(path(DAMAGED), KeepTarget()).reason
    assert "0.710, retention 0.934" in reason
    assert "among the 4 of 7 lambdas" in reason
    assert "at least 0.900 (0.9 of the tuned model's 1.000); its own is 0.940" in reason


def test_order_of_points_does_not_matter() -> None:
    points = path(DAMAGED)
    assert pick(points[::-1], KeepTarget()) == pick(points, KeepTarget())


def test_keep_target_ties_go_to_the_larger_target_then_the_smaller_lambda() -> None:
    scores = {0.0: (0.5, 0.0), 0.2: (0.4, 0.8), 0.4: (0.4, 0.85), 0.6: (0.4, 0.85), 1.0: (0.1, 0.8)}
    assert pick(path(scores), KeepTarget()).lam == 0.4


def test_a_share_that_is_met_exactly_counts() -> None:
    scores = {0.0: (0.5, 0.0), 0.5: (0.4, 0.63), 1.0: (0.1, 0.7)}
    assert pick(path(scores), KeepTarget(share=0.9)).lam == 0.5


def test_no_lambda_does_this() -> None:
    record = pick(path({0.0: (0.5, 0.1), 0.5: (0.4, 0.82), 1.0: (0.1, 0.8)}), KeepTarget(share=1.1))
    assert record.lam is None
    assert record.reason.startswith("no lambda does this")
    assert "the best is 0.820 at lambda 0.5" in record.reason


def test_a_tuned_model_that_scores_nothing_keeps_nothing() -> None:
    scores = {0.0: (0.5, 0.0), 1.0: (0.1, 0.0)}
    for rule, what in ((KeepTarget(), "the tuned model"), (Weighted(), "lambda 1")):
        record = pick(path(scores), rule)
        assert record.lam is None
        assert f"{what} scores 0 on the target" in record.reason


def test_keep_target_extrapolates_if_asked_to() -> None:
    scores = {0.0: (0.5, 0.0), 1.0: (0.3, 0.7), 1.2: (0.35, 0.7)}
    assert pick(path(scores), KeepTarget()).lam == 1.2


def test_knee_is_furthest_outside_the_line() -> None:
    record = pick(path(DAMAGED), Knee())
    assert record.lam == 0.2  # (.71-.06)/.70 + .94 - 1 = .869; at .1: .649; at .5: .671
    assert "keeps 93% of the few-shot score lost between these" in record.reason
    assert "94% of the target score gained" in record.reason


def test_knee_of_a_straight_or_sagging_path_is_none() -> None:
    for middle in ((0.5, 0.5), (0.4, 0.4)):
        record = pick(path({0.0: (1.0, 0.0), 0.5: middle, 1.0: (0.0, 1.0)}), Knee())
        assert record.lam is None
        assert "nowhere beats the straight line" in record.reason


@pytest.mark.parametrize(
    ("tuned", "what"), [((0.2, 0.3), "raise the target"), ((0.6, 0.9), "lower the few-shot")]
)
def test_knee_without_a_trade_off_is_none(tuned: tuple[float, float], what: str) -> None:
    record = pick(path({0.0: (0.5, 0.3), 0.5: (0.5, 0.4), 1.0: tuned}), Knee())
    assert record.lam is None
    assert what in record.reason


@pytest.mark.parametrize(("weight", "lam"), [(0.01, 0.1), (1.0, 0.2), (2.0, 0.2), (20.0, 0.5)])
def test_weighted_moves_towards_the_target_with_its_weight(weight: float, lam: float) -> None:
    assert pick(path(DAMAGED), Weighted(weight=weight)).lam == lam


def test_weighted_says_its_sum() -> None:
    reason = pick(path(DAMAGED), Weighted(weight=2)).reason
    assert "2 x 0.940 + 0.934 = 2.814" in reason


def test_weighted_needs_retention() -> None:
    record = pick(path(DAMAGED, retention=False), Weighted())
    assert record.lam is None
    assert "retention is not defined" in record.reason


def test_keep_target_does_without_retention() -> None:
    record = pick(path(DAMAGED, retention=False), KeepTarget())
    assert record.lam == 0.2
    assert "retention" not in record.reason


@pytest.mark.parametrize("text", ["keep-target:0.9", "keep-target:0.75", "knee", "weighted:2"])
def test_rules_are_read_and_written_alike(text: str) -> None:
    assert str(parse_rule(text)) == text


def test_default_numbers() -> None:
    assert parse_rule("keep-target") == KeepTarget(share=0.9)
    assert parse_rule("weighted") == Weighted(weight=1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep-following:x", "'x' is not a number"),
        ("keep-taget:0.9", "pick rule 'keep-taget' is unknown; nearest is 'keep-target'; rules: "),
        ("kneee", "nearest is 'knee'"),
        ("best", "pick rule 'best' is unknown.*keep-target:0.9, knee, weighted:2"),
        ("", "pick rule '' is unknown"),
        ("knee:2", "knee takes no number; write 'knee'"),
        ("keep-target:", "'' is not a number"),
        ("keep-target:lots", "'lots' is not a number"),
        ("keep-target:nan", "'nan' is not a number"),
        ("keep-target:0", "`.*share` = 0.0: Input should be greater than 0"),
        ("weighted:-1", "`.*weight` = -1.0"),
    ],
)
def test_bad_rules_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_rule(text)


def test_what_a_rule_needs_is_checked_before_measuring() -> None:
    with pytest.raises(ConfigError, match="name one with --target"):
        check_rule(Knee(), [0.0, 1.0], has_target=False)
    with pytest.raises(ConfigError, match="the tuned model, but lambda 1 is not in the sweep"):
        check_rule(KeepTarget(), [0.0, 0.5], has_target=True)
    with pytest.raises(ConfigError, match="the base, but lambda 0 is not in the sweep"):
        check_rule(Knee(), [0.5, 1.0], has_target=True)
    check_rule(Weighted(), [0.5, 1.0], has_target=True)
    for by_share in ("keep-target:0.9", "keep-following:0.9", "best-worst:0.9"):
        with pytest.raises(ConfigError, match=r"not on the path .* pick by knee"):
            check_rule(parse_rule(by_share), [0.0, 1.0], True, True, by_factors=True)
    for other in ("knee", "weighted:1", "no-loss", "best-icl"):
        check_rule(parse_rule(other), [0.0, 1.0], True, True, by_factors=True)
    with pytest.raises(ConfigError, match="the end of the path, but lambda 1 is not in the sweep"):
        check_rule(Knee(), [0.0, 0.5], True, by_factors=True)
    with pytest.raises(ConfigError, match="name one with --target"):
        pick(path({0.0: (0.5, None), 1.0: (0.5, None)}), KeepTarget())


def test_pareto_leaves_out_what_another_lambda_beats() -> None:
    # 0.3 is beaten by 0.2 in both; 0.8 and 1 by 0.5 in one at an equal other.
    assert pareto(path(DAMAGED)) == [0.1, 0.2, 0.5]
    assert pick(path(DAMAGED), KeepTarget()).pareto == [0.1, 0.2, 0.5]
    assert pareto(path({0.0: (0.5, None), 1.0: (0.4, None)})) == []


def with_tasks(points: list[PathPoint], tasks: dict[float, dict[str, float]]) -> list[PathPoint]:
    return [point.model_copy(update={"tasks": tasks[point.lam]}) for point in points]


def test_best_worst_looks_at_the_task_that_lost_most() -> None:
    scores = {0.0: (0.5, 0.1), 0.5: (0.6, 0.8), 0.7: (0.5, 0.8), 1.0: (0.2, 0.8)}
    tasks = {
        0.0: {"a": 0.5, "b": 0.5}, 0.5: {"a": 0.9, "b": 0.3},
        0.7: {"a": 0.6, "b": 0.4}, 1.0: {"a": 0.2, "b": 0.2},
    }  # fmt: skip
    points = with_tasks(path(scores), tasks)
    record = pick(points, BestWorst())
    assert record.lam == 0.7
    assert "b changes by -0.100" in record.reason
    assert pick(points, BestWorst(share=1.2)).lam is None


def test_no_loss_takes_the_best_target_where_nothing_is_significantly_lost() -> None:
    scores = {0.0: (0.5, 0.1), 0.3: (0.5, 0.4), 0.6: (0.5, 0.7), 1.0: (0.4, 0.8)}
    points = [
        point.model_copy(update={"below_base": ["a"] if point.lam > 0.5 else []})
        for point in path(scores)
    ]
    assert pick(points, NoLoss()).lam == 0.3
    lost = [point.model_copy(update={"below_base": ["a"]}) for point in points]
    assert pick(lost, NoLoss()).reason.startswith("no lambda does this")


def test_best_worst_says_that_there_is_nothing_to_keep() -> None:
    points = [
        point.model_copy(update={"target": 0.0, "tasks": {"a": 0.5}}) for point in path(DAMAGED)
    ]  # fmt: skip
    record = pick(points, BestWorst())
    assert (record.lam, record.reason) == (
        None, "no lambda does this: the tuned model scores 0 on the target",
    )  # fmt: skip


@pytest.mark.parametrize("text", ["best-worst:0.8", "no-loss"])
def test_new_rules_are_read_as_they_are_written(text: str) -> None:
    assert str(parse_rule(text)) == text
    with pytest.raises(ConfigError, match="compares with the base"):
        check_rule(parse_rule(text), [0.5, 1.0], True)


def test_midpoints_close_in_on_the_pick() -> None:
    measured = [0.0, 0.25, 0.5, 1.0]
    assert next_lambdas(measured, 0.5, 0.1) == [0.375, 0.75]
    assert next_lambdas(measured, 1.0, 0.1) == [0.75]
    assert next_lambdas(measured, 0.25, 0.25) == []
    assert next_lambdas(measured, None, 0.1) == []
    best, rounds = 0.42, 0
    while new := next_lambdas(measured, min(measured, key=lambda lam: abs(lam - best)), 0.05):
        measured, rounds = sorted({*measured, *new}), rounds + 1
    closest = min(measured, key=lambda lam: abs(lam - best))
    assert abs(closest - best) <= 0.05
    assert rounds <= 5
    assert next_lambdas([0.0, 0.5, 0.500001], 0.5, 1e-7) == [0.25]  # no decimal lies between


def items(lam: float, task: str, shots: int, correct: list[float], seed: int) -> list[ItemResult]:
    return [
        ItemResult(
            arm="path", model="m", lam=lam, task=task, split="validation", shots=shots, seed=seed,
            item=f"{number:03d}", question="q", gold="g", answer="a", choices=["g", "h"],
            log_likelihoods=[0.0, 0.0], correct=value, correct_per_character=None,
            format_failure=0.0, label_leakage=0.0,
        )
        for number, value in enumerate(correct)
    ]  # fmt: skip


def measured(shares: dict[float, tuple[float, float]], count: int) -> dict[float, list[ItemResult]]:
    """Rows with these shares of right answers: few-shot on one task, and the target."""
    rows: dict[float, list[ItemResult]] = {}
    for lam, (icl, target) in shares.items():
        right = [float(n < round(icl * count)) for n in range(count)]
        hits = [float(n < round(target * count)) for n in range(count)]
        rows[lam] = [
            *items(lam, "other", 4, right, 0), *items(lam, "other", 4, right, 1),
            *items(lam, "target", 0, hits, 0),
        ]  # fmt: skip
    return rows


def choice(
    shares: dict[float, tuple[float, float]], count: int, rule: KeepTarget | Weighted | None = None
):
    rows = measured(shares, count)
    points = path_points(rows, rows[0.0], target="target", split="validation")
    rule = rule or KeepTarget(share=0.9)
    resampled = resample_path(rows, target="target")
    return with_interval(pick(points, rule), points, resampled, rule)


def test_the_interval_of_a_clear_choice_is_that_choice() -> None:
    record = choice({0.0: (0.9, 0.0), 0.5: (0.8, 0.9), 1.0: (0.2, 0.9)}, 200)
    assert record.lam == 0.5
    assert record.lambda_ci95 == (0.5, 0.5)
    assert record.share_same == 1.0
    assert record.share_none == 0.0


def test_the_interval_of_a_close_choice_covers_both() -> None:
    """0.4 has 0.89 of the target's 0.9 bar on the edge: half the resamples take the next one."""
    record = choice({0.0: (0.9, 0.0), 0.4: (0.8, 0.82), 0.6: (0.7, 0.9), 1.0: (0.2, 0.9)}, 100)
    assert record.lambda_ci95 == (0.4, 0.6)
    assert 0.3 < (record.share_same or 0.0) < 0.9
    again = choice({0.0: (0.9, 0.0), 0.4: (0.8, 0.82), 0.6: (0.7, 0.9), 1.0: (0.2, 0.9)}, 100)
    assert again == record


def test_retention_is_counted_from_the_base_where_a_path_begins_below_it() -> None:
    """The lowest lambda was taken for the base: most resamples then chose another lambda."""
    shares = {-0.5: (0.55, 0.1), 0.0: (0.9, 0.2), 0.5: (0.82, 0.6), 1.0: (0.55, 0.95)}
    record = choice(shares, 400, Weighted(weight=1.0))
    assert record.lam == 0.5
    assert record.lambda_ci95 == (0.5, 0.5)


def test_points_name_the_tasks_that_are_significantly_below_the_base() -> None:
    rows = measured({0.0: (0.9, 0.0), 0.5: (0.89, 0.5), 1.0: (0.2, 0.9)}, 100)
    points = path_points(rows, rows[0.0], target="target", split="validation")
    assert [point.below_base for point in points] == [[], [], ["other"]]
    assert points[0].tasks == {"other": 0.9}
    # Resampled with the same questions at every lambda, the mean is the score itself.
    resampled = resample_path(rows, target="target")
    assert resampled.icl.mean(axis=0) == pytest.approx([0.9, 0.89, 0.2], abs=0.005)
    assert resampled.target is not None
    assert resampled.target.mean(axis=0) == pytest.approx([0.0, 0.5, 0.9], abs=0.01)


def followed(shares: dict[float, float], count: int) -> list[InstructionRow]:
    return [
        InstructionRow(
            arm="path", model="m", lam=lam, prompt_set="set", split="validation", variant="plain",
            style="chat", key=f"{n:03d}", prompt="p", answer="a", truncated=False, types=["t", "u"],
            strict=[True, n < round(share * count)], loose=[True, True],
        )
        for lam, share in shares.items()
        for n in range(count)
    ]  # fmt: skip


def test_keep_following_weighs_instructions_in_place_of_a_target() -> None:
    few_shot = {0.0: (0.8, 0.0), 0.4: (0.9, 0.0), 0.6: (0.8, 0.0), 1.0: (0.5, 0.0)}
    rows = {
        lam: [row for row in own if row.task == "other"]
        for lam, own in measured(few_shot, 50).items()
    }
    instructions = followed({0.0: 0.1, 0.4: 0.5, 0.6: 0.62, 1.0: 0.7}, 100)
    other = [replace(row, arm="tuned", strict=[True, True]) for row in instructions]
    points = path_points(rows, rows[0.0], target=None, split="validation")
    rule = parse_rule("keep-following:0.8")
    with pytest.raises(ConfigError, match="put some with --follow"):
        pick(points, rule)
    points = with_following(points, [*instructions, *other])
    assert [point.following for point in points] == [0.1, 0.5, 0.62, 0.7]
    record = pick(points, rule)
    assert record.lam == 0.6
    assert record.reason == (
        "lambda 0.6 has the best few-shot score (0.800, retention 1.000) among the 2 of 4 lambdas "
        "with a share of instructions followed of at least 0.560 (0.8 of the tuned model's 0.700); "
        "its own is 0.620"
    )
    assert record.pareto == [0.4, 0.6, 1.0]
    resampled = resample_path(rows, target=None)
    shares = resample_following([*instructions, *other], resampled.lams)
    assert shares is not None
    assert shares.mean(axis=0) == pytest.approx([0.1, 0.5, 0.62, 0.7], abs=0.01)
    found = with_interval(record, points, replace(resampled, following=shares), rule)
    # 0.4 follows .714 of the tuned model's share, 0.6 .886, and the bar is .8.
    assert found.lambda_ci95 == (0.4, 0.6)
    assert 0.8 < (found.share_same or 0.0) < 1.0
    none = [point.model_copy(update={"following": 0.0}) for point in points]
    assert pick(none, rule).reason == (
        "no lambda does this: the tuned model follows no instructions"
    )


def test_best_icl_needs_no_target() -> None:
    points = path({0.0: (0.5, None), 0.5: (0.6, None), 1.0: (0.4, None)})
    check_rule(parse_rule("best-icl"), [0.5, 1.0], False)
    record = pick(points, BestICL())
    assert record.lam == 0.5
    assert "inside the path" in record.reason
    rows = measured({0.0: (0.5, 0.0), 0.5: (0.9, 0.5), 1.0: (0.4, 0.9)}, 100)
    rows = {lam: [row for row in own if row.shots] for lam, own in rows.items()}
    points = path_points(rows, rows[0.0], target=None, split="validation")
    found = with_interval(pick(points, BestICL()), points, resample_path(rows, target=None),
                          BestICL())  # fmt: skip
    assert (found.lam, found.lambda_ci95) == (0.5, (0.5, 0.5))

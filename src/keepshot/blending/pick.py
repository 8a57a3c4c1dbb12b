"""Which lambda: stated rules over points measured on validation items.

Pure: records in, a record out. The test items are read elsewhere, once, at the lambda picked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, assert_never

import numpy as np
from pydantic import Field

from keepshot.errors import ConfigError, unknown
from keepshot.records import PathPoint, PickRecord
from keepshot.scoring.summary import ResampledPath
from keepshot.specs import Spec

NUM_CHOICES = 1000
"""How often the choice is repeated for the interval of its lambda."""


class KeepTarget(Spec):
    """The best few-shot ability among lambdas that keep enough of the target score."""

    name: Literal["keep-target"] = "keep-target"
    share: float = Field(default=0.9, gt=0.0, le=2.0)
    """Least target score, as a share of the tuned model's (that at lambda 1)."""

    def __str__(self) -> str:
        """Return the form that `parse_rule` reads."""
        return f"{self.name}:{self.share:g}"


class KeepFollowing(Spec):
    """The best few-shot ability among lambdas that still follow enough of the instructions."""

    name: Literal["keep-following"] = "keep-following"
    share: float = Field(default=0.9, gt=0.0, le=2.0)
    """Least share of prompts followed, as a share of the tuned model's (that at lambda 1)."""

    def __str__(self) -> str:
        """Return the form that `parse_rule` reads."""
        return f"{self.name}:{self.share:g}"


class Knee(Spec):
    """The lambda at which the path lies furthest outside the line from lambda 0 to 1."""

    name: Literal["knee"] = "knee"

    def __str__(self) -> str:
        """Return the form that `parse_rule` reads."""
        return self.name


class Weighted(Spec):
    """The largest `weight` * (share of the target score at lambda 1) + retention."""

    name: Literal["weighted"] = "weighted"
    weight: float = Field(default=1.0, gt=0.0, le=1000.0)
    """How much more a point of target counts than one of retention; above 1 favours the target."""

    def __str__(self) -> str:
        """Return the form that `parse_rule` reads."""
        return f"{self.name}:{self.weight:g}"


class BestICL(Spec):
    """The best few-shot score on the whole path, whatever the target; needs no target."""

    name: Literal["best-icl"] = "best-icl"

    def __str__(self) -> str:
        """Return the form that `parse_rule` reads."""
        return self.name


class BestWorst(Spec):
    """Among lambdas that keep enough of the target score, that whose worst task lost least."""

    name: Literal["best-worst"] = "best-worst"
    share: float = Field(default=0.9, gt=0.0, le=2.0)
    """Least target score, as a share of the tuned model's (that at lambda 1)."""

    def __str__(self) -> str:
        """Return the form that `parse_rule` reads."""
        return f"{self.name}:{self.share:g}"


class NoLoss(Spec):
    """The best target score among lambdas at which no task is significantly below the base."""

    name: Literal["no-loss"] = "no-loss"

    def __str__(self) -> str:
        """Return the form that `parse_rule` reads."""
        return self.name


AnyRule = KeepTarget | KeepFollowing | Knee | Weighted | BestWorst | NoLoss | BestICL
PickRule = Annotated[AnyRule, Field(discriminator="name")]

_Axis = Literal["target", "following"]
"""What few-shot ability is weighed against."""
_EXAMPLES = {
    "keep-target": "keep-target:0.9", "knee": "knee", "weighted": "weighted:2",
    "keep-following": "keep-following:0.9", "best-worst": "best-worst:0.9",
    "no-loss": "no-loss", "best-icl": "best-icl",
}  # fmt: skip

_NUMBERS = {
    "keep-target": "share", "keep-following": "share", "best-worst": "share", "weighted": "weight",
}  # fmt: skip


def parse_rule(text: str) -> AnyRule:
    """Read a rule such as `keep-target:0.9`, `weighted:2` or `knee`.

    Raises:
        ConfigError: if no rule has this name (with the nearest that exists), or its number is
            missing, not a number or out of range.
    """
    name, colon, number = text.strip().partition(":")
    if name not in _EXAMPLES:
        listing = f"rules: {', '.join(_EXAMPLES.values())}"
        raise ConfigError(unknown("pick rule", name, _EXAMPLES, listing))
    content: dict[str, str | float] = {"name": name}
    if colon:
        field = _NUMBERS.get(name)
        if field is None:
            raise ConfigError(f"pick rule {text!r}: {name} takes no number; write {name!r}")
        content[field] = _number(number, text)
    match name:
        case "keep-target":
            return KeepTarget.from_mapping(content, source=f"pick rule {text!r}")
        case "keep-following":
            return KeepFollowing.from_mapping(content, source=f"pick rule {text!r}")
        case "weighted":
            return Weighted.from_mapping(content, source=f"pick rule {text!r}")
        case "best-worst":
            return BestWorst.from_mapping(content, source=f"pick rule {text!r}")
        case "no-loss":
            return NoLoss.from_mapping(content, source=f"pick rule {text!r}")
        case "best-icl":
            return BestICL.from_mapping(content, source=f"pick rule {text!r}")
        case _:
            return Knee.from_mapping(content, source=f"pick rule {text!r}")


def check_rule(
    rule: AnyRule,
    lams: Sequence[float],
    has_target: bool,
    has_following: bool = False,
    *,
    by_factors: bool = False,
) -> None:
    """Check, before anything is measured, that a sweep can serve the rule.

    Args:
        rule: what will pick.
        lams: those swept.
        has_target: whether a target is measured.
        has_following: whether instructions are put.
        by_factors: lambda differs by tensor, so that the path does not lead to the tuned model.

    Raises:
        ConfigError: if there is no target, or what the rule compares with is not swept.
    """
    if isinstance(rule, BestICL):
        return
    if by_factors and isinstance(rule, KeepTarget | KeepFollowing | BestWorst):
        raise ConfigError(
            f"pick rule {str(rule)!r} keeps a share of what the tuned model does, which is not on "
            "the path where lambda differs by block or kind (`rule`); "
            "pick by knee, weighted:1, no-loss or best-icl, or leave `rule` out"
        )
    if isinstance(rule, KeepFollowing) and not has_following:
        raise ConfigError(
            f"pick rule {str(rule)!r} weighs instructions followed; put some with --follow"
        )
    if not (has_target or isinstance(rule, KeepFollowing)):
        raise ConfigError(f"pick rule {str(rule)!r} weighs a target score; name one with --target")
    compared = isinstance(rule, Knee | BestWorst | NoLoss)
    end = "the end of the path" if by_factors else "the tuned model"
    ends = {1.0: end} | ({0.0: "the base"} if compared else {})
    for needed, side in ends.items():
        if needed not in lams:
            raise ConfigError(
                f"pick rule {str(rule)!r} compares with {side}, but lambda {needed:g} is not in "
                "the sweep; use one such as 0:1:0.1"
            )


def pick(points: Sequence[PathPoint], rule: AnyRule) -> PickRecord:
    """Pick a lambda by `rule` from points measured on validation items, in any order.

    Args:
        points: one per lambda, all of split "validation".
        rule: see the classes above.

    Returns:
        The lambda and, in words, why; lambda None if no lambda does what the rule asks.

    Raises:
        ConfigError: see `check_rule`.
    """
    assert all(point.split == "validation" for point in points), "picking on test items"
    path = sorted(points, key=lambda point: point.lam)
    assert len({point.lam for point in path}) == len(path), "two points for one lambda"
    has_target = all(point.target is not None for point in path)
    has_following = all(point.following is not None for point in path)
    check_rule(rule, [point.lam for point in path], has_target, has_following)
    match rule:
        case KeepTarget():
            lam, reason = _keep(path, rule.share, "target")
        case KeepFollowing():
            lam, reason = _keep(path, rule.share, "following")
        case Knee():
            lam, reason = _knee(path)
        case Weighted():
            lam, reason = _weighted(path, rule.weight)
        case BestWorst():
            lam, reason = _best_worst(path, rule.share)
        case NoLoss():
            lam, reason = _no_loss(path)
        case BestICL():
            lam, reason = _best_icl(path)
        case _:
            assert_never(rule)
    return PickRecord.model_validate(
        {"rule": str(rule), "lambda": lam, "reason": reason, "pareto": pareto(path)}
    )


def pareto(points: Sequence[PathPoint]) -> list[float]:
    """Return the lambdas that no other beats in few-shot or target score without losing either.

    Without a target, the share of prompts whose instructions are followed takes its place.
    """
    kind: _Axis = "following" if any(point.target is None for point in points) else "target"
    if kind == "following" and any(point.following is None for point in points):
        return []

    def beaten(point: PathPoint) -> bool:
        own = _score(point, kind)
        ends = [(other.icl - point.icl, _score(other, kind) - own) for other in points]
        return any(min(end) >= 0.0 and max(end) > 0.0 for end in ends)

    return sorted(point.lam for point in points if not beaten(point))


def with_interval(
    record: PickRecord, points: Sequence[PathPoint], resampled: ResampledPath, rule: AnyRule
) -> PickRecord:
    """Return the pick with an interval for its lambda: the whole choice, repeated on resamples.

    Args:
        record: what `pick` chose from `points`.
        points: the points measured.
        resampled: scores under resampled questions and draws.
        rule: the rule that chose.
    """
    path = sorted(points, key=lambda point: point.lam)
    assert tuple(point.lam for point in path) == resampled.lams
    chosen = [
        pick(_resampled_points(path, resampled, number), rule).lam
        for number in range(min(NUM_CHOICES, len(resampled.icl)))
    ]
    found = [lam for lam in chosen if lam is not None]
    bounds = np.quantile(found, [0.025, 0.975], method="inverted_cdf") if found else None
    return record.model_copy(
        update={
            "lambda_ci95": None if bounds is None else (float(bounds[0]), float(bounds[1])),
            "share_same": sum(lam == record.lam for lam in chosen) / len(chosen),
            "share_none": 1.0 - len(found) / len(chosen),
        }
    )


def next_lambdas(measured: Sequence[float], lam: float | None, width: float) -> list[float]:
    """Return what to measure next to know a pick more exactly: midpoints on both its sides.

    Args:
        measured: lambdas that have been measured.
        lam: the one picked of them; None (no lambda does what is asked) asks for nothing.
        width: a gap to a neighbour that is no wider is narrow enough.
    """
    if lam is None:
        return []
    below = max((other for other in measured if other < lam), default=None)
    above = min((other for other in measured if other > lam), default=None)
    # Rounded, so that a lambda is the decimal that is shown.
    middles = [
        round((lam + side) / 2, 6)
        for side in (below, above)
        if side is not None and abs(side - lam) > width + 1e-9
    ]
    return [middle for middle in middles if middle not in measured]  # neighbouring decimals


def _resampled_points(
    path: Sequence[PathPoint], resampled: ResampledPath, number: int
) -> list[PathPoint]:
    """Return the points as one resample has them; what is significant is not resampled again."""
    icl, target = resampled.icl[number], resampled.target
    # A path may begin below 0.
    ability = icl[resampled.lams.index(0.0)] - resampled.chance
    return [
        point.model_copy(
            update={
                "icl": float(icl[place]),
                "target": None if target is None else float(target[number, place]),
                "following": None
                if resampled.following is None
                else float(resampled.following[number, place]),
                "retention": None
                if point.retention is None or ability <= 0.0
                else float((icl[place] - resampled.chance) / ability),
                "tasks": {name: float(m[number, place]) for name, m in resampled.tasks.items()},
            }
        )
        for place, point in enumerate(path)
    ]


def _best_icl(path: Sequence[PathPoint]) -> tuple[float, str]:
    chosen = max(path, key=lambda point: (point.icl, -point.lam))
    where = (
        "inside the path" if path[0].lam < chosen.lam < path[-1].lam else "at an end of the path"
    )
    return chosen.lam, (
        f"lambda {chosen.lam:g} has the best few-shot score of all {len(path)} lambdas "
        f"({_ability(chosen)}), {where}"
    )


def _best_worst(path: Sequence[PathPoint], share: float) -> tuple[float | None, str]:
    tuned, base = _target(_at(path, 1.0)), _at(path, 0.0)
    floor = share * tuned
    enough = [point for point in path if _target(point) >= floor - 1e-9]
    if tuned <= 0.0:
        return None, "no lambda does this: the tuned model scores 0 on the target"
    if not enough:
        return None, f"no lambda does this: none has a target score of at least {floor:.3f}"

    def worst(point: PathPoint) -> tuple[float, str]:
        return min((score - base.tasks[name], name) for name, score in point.tasks.items())

    chosen = max(enough, key=lambda point: (worst(point)[0], point.icl, -point.lam))
    change, name = worst(chosen)
    return chosen.lam, (
        f"lambda {chosen.lam:g} treats its worst task best: {name} changes by {change:+.3f} "
        f"against the base, among the {len(enough)} of {len(path)} lambdas with a target score of "
        f"at least {floor:.3f} ({share:g} of the tuned model's {tuned:.3f})"
    )


def _no_loss(path: Sequence[PathPoint]) -> tuple[float | None, str]:
    base = _at(path, 0.0)
    safe = [point for point in path if not point.below_base and point.lam != 0.0]
    better = [point for point in safe if _target(point) > _target(base)]
    if not better:
        return None, (
            "no lambda does this: wherever the target score rises above the base's, some task is "
            "significantly below the base"
        )
    chosen = max(better, key=lambda point: (_target(point), point.icl, -point.lam))
    return chosen.lam, (
        f"lambda {chosen.lam:g} has the best target score ({_target(chosen):.3f}) among the "
        f"{len(safe)} of {len(path) - 1} lambdas at which no task is significantly below the base "
        "(paired 95 % intervals, task by task)"
    )


def _keep(path: Sequence[PathPoint], share: float, kind: _Axis) -> tuple[float | None, str]:
    what = "a target score" if kind == "target" else "a share of instructions followed"
    tuned = _score(_at(path, 1.0), kind)
    if tuned <= 0.0:
        where = "scores 0 on the target" if kind == "target" else "follows no instructions"
        return None, f"no lambda does this: the tuned model {where}"
    floor = share * tuned
    # A share of 0.9 of 0.7 is 0.63 on paper and a hair more in binary.
    enough = [point for point in path if _score(point, kind) >= floor - 1e-9]
    bar = f"{what} of at least {floor:.3f} ({share:g} of the tuned model's {tuned:.3f})"
    if not enough:
        best = max(path, key=lambda point: (_score(point, kind), -point.lam))
        return None, (
            f"no lambda does this: none has {bar}; "
            f"the best is {_score(best, kind):.3f} at lambda {best.lam:g}"
        )
    chosen = max(enough, key=lambda point: (point.icl, _score(point, kind), -point.lam))
    return chosen.lam, (
        f"lambda {chosen.lam:g} has the best few-shot score ({_ability(chosen)}) among the "
        f"{len(enough)} of {len(path)} lambdas with {bar}; its own is {_score(chosen, kind):.3f}"
    )


def _knee(path: Sequence[PathPoint]) -> tuple[float | None, str]:
    base, tuned = _at(path, 0.0), _at(path, 1.0)
    gained, lost = _target(tuned) - _target(base), base.icl - tuned.icl
    if gained <= 0.0 or lost <= 0.0:
        what = "raise the target score" if gained <= 0.0 else "lower the few-shot score"
        return None, f"no lambda does this: lambda 1 does not {what}, so no trade-off can bend"

    def outside(point: PathPoint) -> float:
        kept = (point.icl - tuned.icl) / lost
        reached = (_target(point) - _target(base)) / gained
        return kept + reached - 1.0

    chosen = max(path, key=lambda point: (outside(point), _target(point), -point.lam))
    if outside(chosen) <= 1e-9:
        return None, (
            "no lambda does this: the path from lambda 0 to 1 nowhere beats the straight line "
            "between them, so it has no knee"
        )
    kept = (chosen.icl - tuned.icl) / lost
    reached = (_target(chosen) - _target(base)) / gained
    return chosen.lam, (
        f"lambda {chosen.lam:g} lies furthest outside the line from lambda 0 to 1: it keeps "
        f"{kept:.0%} of the few-shot score lost between these ({_ability(chosen)}) with "
        f"{reached:.0%} of the target score gained ({_target(chosen):.3f})"
    )


def _weighted(path: Sequence[PathPoint], weight: float) -> tuple[float | None, str]:
    end = _target(_at(path, 1.0))
    if end <= 0.0:
        return None, "no lambda does this: lambda 1 scores 0 on the target"

    def total(point: PathPoint) -> float:
        assert point.retention is not None
        return weight * _target(point) / end + point.retention

    if any(point.retention is None for point in path):
        return None, "no lambda does this: the base is at chance, so retention is not defined"
    chosen = max(path, key=lambda point: (total(point), _target(point), -point.lam))
    return chosen.lam, (
        f"lambda {chosen.lam:g} has the largest {weight:g} x target share + retention: "
        f"{weight:g} x {_target(chosen) / end:.3f} + {chosen.retention:.3f} = {total(chosen):.3f}"
    )


def _at(path: Sequence[PathPoint], lam: float) -> PathPoint:
    return next(point for point in path if point.lam == lam)


def _target(point: PathPoint) -> float:
    return _score(point, "target")


def _score(point: PathPoint, kind: _Axis) -> float:
    value = point.target if kind == "target" else point.following
    assert value is not None
    return value


def _ability(point: PathPoint) -> str:
    if point.retention is None:
        return f"{point.icl:.3f}"
    return f"{point.icl:.3f}, retention {point.retention:.3f}"


def _number(text: str, rule: str) -> float:
    example = _EXAMPLES[rule.strip().partition(":")[0]]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"pick rule {rule!r}: {text!r} is not a number; write {example}")
    return value

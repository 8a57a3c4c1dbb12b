"""Which lambda: stated rules over points measured on validation items.

Pure: records in, a record out. The test items are read elsewhere, once, at the lambda picked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, assert_never

from pydantic import Field

from keepshot.errors import ConfigError, unknown
from keepshot.records import PathPoint, PickRecord
from keepshot.specs import Spec


class KeepTarget(Spec):
    """The best few-shot ability among lambdas that keep enough of the target score."""

    name: Literal["keep-target"] = "keep-target"
    share: float = Field(default=0.9, gt=0.0, le=2.0)
    """Least target score, as a share of the tuned model's (that at lambda 1)."""

    def __str__(self) -> str:
        """Return the form that `parse_rule` reads."""
        return f"{self.name}:{self.share:g}"


class Knee(Spec):
    """The lambda at which the path lies furthest outside the line from base to tuned."""

    name: Literal["knee"] = "knee"

    def __str__(self) -> str:
        """Return the form that `parse_rule` reads."""
        return self.name


class Weighted(Spec):
    """The largest `weight` * (share of the tuned model's target score) + retention."""

    name: Literal["weighted"] = "weighted"
    weight: float = Field(default=1.0, gt=0.0, le=1000.0)
    """How much more a point of target counts than one of retention; above 1 favours the target."""

    def __str__(self) -> str:
        """Return the form that `parse_rule` reads."""
        return f"{self.name}:{self.weight:g}"


PickRule = Annotated[KeepTarget | Knee | Weighted, Field(discriminator="name")]

_EXAMPLES = {"keep-target": "keep-target:0.9", "knee": "knee", "weighted": "weighted:2"}


def parse_rule(text: str) -> KeepTarget | Knee | Weighted:
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
        field = {"keep-target": "share", "weighted": "weight"}.get(name)
        if field is None:
            raise ConfigError(f"pick rule {text!r}: {name} takes no number; write {name!r}")
        content[field] = _number(number, text)
    match name:
        case "keep-target":
            return KeepTarget.from_mapping(content, source=f"pick rule {text!r}")
        case "weighted":
            return Weighted.from_mapping(content, source=f"pick rule {text!r}")
        case _:
            return Knee.from_mapping(content, source=f"pick rule {text!r}")


def check_rule(rule: KeepTarget | Knee | Weighted, lams: Sequence[float], has_target: bool) -> None:
    """Check, before anything is measured, that a sweep can serve the rule.

    Raises:
        ConfigError: if there is no target, or a lambda that the rule compares with is not swept.
    """
    if not has_target:
        raise ConfigError(f"pick rule {str(rule)!r} weighs a target score; name one with --target")
    ends = {1.0: "the tuned model"} | ({0.0: "the base"} if isinstance(rule, Knee) else {})
    for needed, side in ends.items():
        if needed not in lams:
            raise ConfigError(
                f"pick rule {str(rule)!r} compares with {side}, but lambda {needed:g} is not in "
                "the sweep; use one such as 0:1:0.1"
            )


def pick(points: Sequence[PathPoint], rule: KeepTarget | Knee | Weighted) -> PickRecord:
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
    check_rule(rule, [point.lam for point in path], has_target)
    match rule:
        case KeepTarget():
            lam, reason = _keep_target(path, rule.share)
        case Knee():
            lam, reason = _knee(path)
        case Weighted():
            lam, reason = _weighted(path, rule.weight)
        case _:
            assert_never(rule)
    return PickRecord.model_validate({"rule": str(rule), "lambda": lam, "reason": reason})


def _keep_target(path: Sequence[PathPoint], share: float) -> tuple[float | None, str]:
    tuned = _target(_at(path, 1.0))
    if tuned <= 0.0:
        return None, "no lambda does this: the tuned model scores 0 on the target"
    floor = share * tuned
    # A share of 0.9 of 0.7 is 0.63 on paper and a hair more in binary.
    enough = [point for point in path if _target(point) >= floor - 1e-9]
    bar = f"a target score of at least {floor:.3f} ({share:g} of the tuned model's {tuned:.3f})"
    if not enough:
        best = max(path, key=lambda point: (_target(point), -point.lam))
        return None, (
            f"no lambda does this: none has {bar}; "
            f"the best is {_target(best):.3f} at lambda {best.lam:g}"
        )
    chosen = max(enough, key=lambda point: (point.icl, _target(point), -point.lam))
    return chosen.lam, (
        f"lambda {chosen.lam:g} has the best few-shot score ({_ability(chosen)}) among the "
        f"{len(enough)} of {len(path)} lambdas with {bar}; its own is {_target(chosen):.3f}"
    )


def _knee(path: Sequence[PathPoint]) -> tuple[float | None, str]:
    base, tuned = _at(path, 0.0), _at(path, 1.0)
    gained, lost = _target(tuned) - _target(base), base.icl - tuned.icl
    if gained <= 0.0 or lost <= 0.0:
        what = "raise the target score" if gained <= 0.0 else "lower the few-shot score"
        return None, f"no lambda does this: tuning did not {what}, so there is no trade-off to bend"

    def outside(point: PathPoint) -> float:
        kept = (point.icl - tuned.icl) / lost
        reached = (_target(point) - _target(base)) / gained
        return kept + reached - 1.0

    chosen = max(path, key=lambda point: (outside(point), _target(point), -point.lam))
    if outside(chosen) <= 1e-9:
        return None, (
            "no lambda does this: the path from base to tuned nowhere beats the straight line "
            "between them, so it has no knee"
        )
    kept = (chosen.icl - tuned.icl) / lost
    reached = (_target(chosen) - _target(base)) / gained
    return chosen.lam, (
        f"lambda {chosen.lam:g} lies furthest outside the line from base to tuned: it keeps "
        f"{kept:.0%} of the few-shot score that tuning lost ({_ability(chosen)}) with "
        f"{reached:.0%} of the target score that tuning gained ({_target(chosen):.3f})"
    )


def _weighted(path: Sequence[PathPoint], weight: float) -> tuple[float | None, str]:
    tuned = _target(_at(path, 1.0))
    if tuned <= 0.0:
        return None, "no lambda does this: the tuned model scores 0 on the target"

    def total(point: PathPoint) -> float:
        assert point.retention is not None
        return weight * _target(point) / tuned + point.retention

    if any(point.retention is None for point in path):
        return None, "no lambda does this: the base is at chance, so retention is not defined"
    chosen = max(path, key=lambda point: (total(point), _target(point), -point.lam))
    return chosen.lam, (
        f"lambda {chosen.lam:g} has the largest {weight:g} x target share + retention: "
        f"{weight:g} x {_target(chosen) / tuned:.3f} + {chosen.retention:.3f} = {total(chosen):.3f}"
    )


def _at(path: Sequence[PathPoint], lam: float) -> PathPoint:
    return next(point for point in path if point.lam == lam)


def _target(point: PathPoint) -> float:
    assert point.target is not None
    return point.target


def _ability(point: PathPoint) -> str:
    if point.retention is None:
        return f"{point.icl:.3f}"
    return f"{point.icl:.3f}, retention {point.retention:.3f}"


def _number(text: str, rule: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"pick rule {rule!r}: {text!r} is not a number; write keep-target:0.9")
    return value

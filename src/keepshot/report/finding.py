"""The headline of a document: what was found, in sentences computed from its figures.

A sentence claims a difference only where `view.differ` finds one. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from keepshot.records import PathPoint, PickRecord, ResultDocument
from keepshot.report import view
from keepshot.report.view import Arm, Measured
from keepshot.report.words import (
    METHODS,
    count,
    lam,
    name_of,
    percent,
    percent_interval,
    score,
    score_interval,
    short_names,
    visible,
)

SAME = "not significantly different"


def headline(document: ResultDocument) -> str:
    """Return what was found, in plain words, from the document alone."""
    return " ".join(headline_sentences(document))


def headline_sentences(document: ResultDocument) -> list[str]:
    """Return the headline's sentences, the main finding first, what it was measured on last."""
    match view.kind(document):
        case "run":
            found = [_capital(s) for s in _run(view.arms(document), document.pick)]
        case "blend":
            found = _blend(document)
        case "measure":
            found = _measure(view.arms(document))
        case "unmeasured":
            return [_unmeasured(document)]
    return [sentence for sentence in [*found, _basis(document)] if sentence]


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _basis(document: ResultDocument) -> str:
    listed = view.arms(document)
    if not listed:
        return ""
    shots = view.most_shots(document)
    tasks = len({s.task for s in view.ability_scores(document, shots)})
    over = f" on {count(tasks, 'task')}" if tasks else ""
    number = listed[0].row.num_items
    return (
        f"Few-shot ability is the score with {count(shots, 'example')}{over} (n = {number}); "
        "brackets are 95 % intervals."
    )


def _kept(arm: Arm) -> str:
    if arm.retention is None:
        row = arm.row
        return f"a few-shot score of {score(row.icl)} {score_interval(row.icl_ci95)}"
    value, interval = arm.retention
    return f"{percent(value)} {percent_interval(interval)}"


def _ability(arm: Arm) -> Measured:
    return arm.retention or (arm.row.icl, arm.row.icl_ci95)


def _order(first: Measured, second: Measured) -> str:
    """Return `less`, `more` or `` (no significant difference) for first against second."""
    if not view.differ(first, second):
        return ""
    return "less" if first[0] < second[0] else "more"


def _run(listed: Sequence[Arm], pick: PickRecord | None) -> list[str]:
    by_name = {arm.name: arm for arm in listed}
    plain, kept = by_name.get("plain"), by_name.get("kept")
    sentences: list[str] = []
    if plain and kept:
        sentences.append(_plain_and_kept(plain, kept))
    elif alone := plain or kept:
        sentences.append(_alone(alone))
    if gentle := by_name.get("gentle"):
        sentences.append(_against(gentle, kept or plain))
    if blended := by_name.get("blended"):
        sentences.append(_blended(blended, plain))
    elif pick is not None and pick.lam is None:
        sentences.append(f"No lambda on the path was picked: {visible(pick.reason, 300)}.")
    if not sentences:
        sentences.extend(_alone(arm) for arm in listed[1:])
    return sentences


def _of_ability(arm: Arm) -> str:
    return f"{_kept(arm)} of few-shot ability" if arm.retention else _kept(arm)


def _at(arm: Arm) -> str:
    return f" at a target score of {score(arm.row.target)}" if arm.target else ""


def _alone(arm: Arm) -> str:
    return f"{name_of(arm.name)} kept {_of_ability(arm)}{_at(arm)}."


def _plain_and_kept(plain: Arm, kept: Arm) -> str:
    target = _targets(plain, kept)
    if _order(_ability(plain), _ability(kept)):
        return (
            f"plain fine-tuning kept {_of_ability(plain)}; "
            f"keepshot's recipe kept {_kept(kept)}{target}."
        )
    return (
        f"plain fine-tuning kept {_of_ability(plain)} and keepshot's recipe {_kept(kept)}, "
        f"which is {SAME}{target}."
    )


def _targets(plain: Arm, kept: Arm) -> str:
    if not (plain.target and kept.target):
        return ""
    values = f"({score(kept.row.target)} against {score(plain.row.target)}"
    match _order(kept.target, plain.target):
        case "less":
            return f", at a lower target score {values})"
        case "more":
            return f", at a higher target score {values})"
        case _:
            return f", at a similar target score {values}, {SAME})"


def _against(arm: Arm, other: Arm | None) -> str:
    start = f"{name_of(arm.name)} kept {_kept(arm)}{_at(arm)}"
    if other is None:
        return f"{start}."
    them = name_of(other.name)
    order = _order(_ability(arm), _ability(other))
    ability = f"{order} few-shot ability than" if order else f"few-shot ability {SAME} from that of"
    goal = ""
    if arm.target and other.target:
        words = {
            "less": "a lower target score",
            "more": "a higher target score",
            "": f"a target score {SAME}",
        }
        goal = f", and {words[_order(arm.target, other.target)]}"
    return f"{start}: {ability} {them}{goal}."


def _blended(arm: Arm, tuned: Arm | None) -> str:
    where = f"lambda = {lam(arm.row.lam)}" if arm.row.lam is not None else "part of the way"
    start = (
        f"Going only part of the way from the untuned to the tuned model ({where}) "
        f"kept {_kept(arm)}{_at(arm)}, without further training"
    )
    if tuned is None:
        return f"{start}."
    order = _order(_ability(arm), _ability(tuned))
    verdict = f"{order} than" if order else f"{SAME} from"
    if tuned.name == "plain":
        return f"{start}: {verdict} plain."
    return f"{start}: {verdict} the tuned model, which kept {_kept(tuned)}{_at(tuned)}."


def _point(point: PathPoint) -> str:
    ability = (
        f"{percent(point.retention)} {percent_interval(point.retention_ci95)} of few-shot ability"
        if point.retention is not None
        else f"a few-shot score of {score(point.icl)} {score_interval(point.icl_ci95)}"
    )
    at = f" at a target score of {score(point.target)}" if point.target is not None else ""
    return f"{ability}{at}"


def _blend(document: ResultDocument) -> list[str]:
    by_name = {arm.name: arm for arm in view.arms(document)}
    ends = {arm.row.lam: arm for arm in by_name.values() if arm.name != "blended"}
    if "blended" in by_name and 1.0 in ends:
        return [_blended(by_name["blended"], ends[1.0]), _rule(document.pick)]
    points = view.path_split(document)
    end, pick = next((p for p in points if p.lam == 1.0), points[-1]), document.pick
    if pick is None or pick.lam is None:
        why = f" No lambda was picked: {visible(pick.reason, 200)}." if pick else ""
        best = max(points, key=lambda p: (p.lam > 0, p.icl))
        return [
            f"At lambda = {lam(end.lam)} the model has {_point(end)}; the most on the "
            f"path above 0 is {_point(best)}, at lambda = {lam(best.lam)}.{why}"
        ]
    picked = pick.lam
    chosen = min(points, key=lambda p: abs(p.lam - picked))
    one = view.measured(chosen.retention, chosen.retention_ci95) or (chosen.icl, chosen.icl_ci95)
    two = view.measured(end.retention, end.retention_ci95) or (end.icl, end.icl_ci95)
    against = f"lambda = {lam(end.lam)} has {_point(end)}"
    verdict = "" if view.differ(one, two) else f": abilities {SAME}"
    return [
        f"Blended at lambda = {lam(chosen.lam)}, the model has {_point(chosen)}; "
        f"{against}{verdict}.",
        f"{_rule(pick)} Figures are from {chosen.split} items.",
    ]


def _rule(pick: PickRecord | None) -> str:
    return f"The rule {visible(pick.rule, 120)} picked this lambda." if pick else ""


def _measure(listed: Sequence[Arm]) -> list[str]:
    shown = short_names([arm.name for arm in listed])
    first, others = listed[0], list(listed[1:])
    row = first.row
    value = f"{score(row.icl)} {score_interval(row.icl_ci95)}"
    if not others:
        gain = ""
        if row.icl_gain is not None and row.shots > 0:
            direction = "more" if row.icl_gain >= 0 else "less"
            gain = f", {score(abs(row.icl_gain))} {direction} than with none"
        return [f"{shown[first.name]} scores {value} with {count(row.shots, 'example')}{gain}."]
    sentences = [_measured_pair(arm, first, shown) for arm in others[:4]]
    if len(others) > 4:
        sentences.append(f"The table has {len(others) - 4} more.")
    return sentences


def _measured_pair(arm: Arm, first: Arm, shown: dict[str, str]) -> str:
    mine, theirs = shown[arm.name], shown[first.name]
    icl = f"{score(arm.row.icl)} {score_interval(arm.row.icl_ci95)}"
    other = f"{score(first.row.icl)} {score_interval(first.row.icl_ci95)}"
    if arm.retention is None:
        order = _order((arm.row.icl, arm.row.icl_ci95), (first.row.icl, first.row.icl_ci95))
        verdict = f", {order} than" if order else f", {SAME} from"
        return f"{mine} scores {icl}{verdict} {theirs} ({other})."
    low, high = arm.retention[1]
    verdict = "" if high < 1 or low > 1 else f": {SAME}"
    return (
        f"{mine} has {_kept(arm)} of the few-shot ability of {theirs} "
        f"({icl} against {other}){verdict}."
    )


def _unmeasured(document: ResultDocument) -> str:
    if not document.training:
        return "Nothing was measured."
    record = document.training[-1]
    how = METHODS.get(record.method, record.method)
    return f"Tuned for {record.steps} steps ({how}); few-shot ability was not measured."

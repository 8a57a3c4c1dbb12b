"""Pairwise win rates: every comparison judged in both orders, and every one accounted for.

A judge says how likely the first of two answers is the better one. Asked both ways round and
averaged, a preference for a place cancels; what cancelled is reported as `position_bias`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from scipy import stats as scipy_stats

from keepshot.errors import TaskError
from keepshot.judging.length_control import Controlled, control_length
from keepshot.judging.outputs import Comparison, Outputs
from keepshot.records import Agreement, WinRate
from keepshot.stats import Interval, bootstrap_mean
from keepshot.tasks.task import seeded

MOST_FAILED = 0.2
"""Where more than this share of comparisons got no judgement, a win rate would mean little."""
EVEN = 1e-9
MOST_TESTED = 16
"""Answers that a judge is tested on."""
LEAST_PASSING = 80.0
"""A judge that prefers answers to their shuffled words less often, in percent, does not read."""
Status = Literal["judged", "tied", "failed"]


@dataclass(frozen=True)
class Pair:
    """An instruction and two answers in the order in which a judge sees them."""

    instruction: str
    first: str
    second: str


@dataclass(frozen=True)
class Opinion:
    """What a judge says of one pair.

    `first` is the probability that the first answer is the better one; None where the judge gave
    no verdict, with the reason. `off_label`: a verdict was read, though the judge would rather have
    said something else.
    """

    first: float | None
    reason: str = ""
    off_label: bool = False


class Judge(Protocol):
    """Whoever compares answers."""

    identity: str
    """What the record calls the judge, weights included where they are known."""
    prompt_hash: str
    """16 hexadecimal digits of the words in which it is asked; empty where it is not asked."""

    def judge(self, pairs: Sequence[Pair]) -> list[Opinion]:
        """Return one opinion for each pair, in order."""
        ...


@dataclass(frozen=True)
class Judgement:
    """One comparison, judged: `preference` is the probability that the candidate is better."""

    comparison: Comparison
    preference: float | None
    candidate_first: float | None
    candidate_second: float | None
    status: Status
    reason: str = ""
    off_label: bool = False


def compare(judge: Judge, comparisons: Sequence[Comparison]) -> list[Judgement]:
    """Ask `judge` about every comparison, in both orders.

    Returns:
        One judgement for each comparison; empty answers lose against any other without being
        shown to the judge.
    """
    shown = [c for c in comparisons if c.candidate.strip() and c.reference.strip()]
    pairs = [Pair(c.instruction, c.candidate, c.reference) for c in shown]
    swapped = [Pair(c.instruction, c.reference, c.candidate) for c in shown]
    opinions = judge.judge([*pairs, *swapped])
    assert len(opinions) == 2 * len(shown), "a judge answers every pair"
    both = iter(zip(opinions[: len(shown)], opinions[len(shown) :], strict=True))
    judgements: list[Judgement] = []
    for comparison in comparisons:
        if comparison.candidate.strip() and comparison.reference.strip():
            judgements.append(_joined(comparison, *next(both)))
        else:
            won = 0.5 + 0.5 * bool(comparison.candidate.strip())
            won -= 0.5 * bool(comparison.reference.strip())
            judgements.append(_settled(comparison, won, "an answer is empty"))
    return judgements


def from_preferences(
    comparisons: Sequence[Comparison], preferences: dict[str, float | None]
) -> list[Judgement]:
    """Turn the preferences of a judgements file into judgements; what it lacks has failed."""
    judgements: list[Judgement] = []
    for comparison in comparisons:
        found = preferences.get(comparison.instruction)
        if found is None:
            there = comparison.instruction in preferences
            reason = "judgement is null" if there else "not in the file of judgements"
            judgements.append(Judgement(comparison, None, None, None, "failed", reason))
        else:
            judgements.append(_settled(comparison, found - 1.0, ""))
    return judgements


def win_rate(
    judgements: Sequence[Judgement], names: tuple[str, str], judge: tuple[str, str]
) -> WinRate:
    """Sum up judgements.

    Args:
        judgements: of every comparison, failed ones too.
        names: of candidate and reference.
        judge: its identity and prompt hash.

    Raises:
        TaskError: if more than `MOST_FAILED` of the comparisons have no judgement.
    """
    failures = Counter(j.reason for j in judgements if j.preference is None)
    num_failed = sum(failures.values())
    if num_failed > MOST_FAILED * len(judgements):
        reason, count = failures.most_common(1)[0]
        raise TaskError(
            f"judge {judge[0]!r} gave no verdict on {num_failed} of {len(judgements)} comparisons "
            f"(at most {MOST_FAILED:.0%} may fail); {count} times: {reason}"
        )
    judged = [j for j in judgements if j.preference is not None]
    if not judged:
        raise TaskError(f"judge {judge[0]!r}: there is no comparison to judge")
    preferences = np.array([j.preference for j in judged], dtype=np.float64)
    share = bootstrap_mean(preferences, seeded("win rate", len(judged)))
    asked = [j for j in judged if j.candidate_first is not None and j.candidate_second is not None]
    controlled = _controlled(judged, preferences)
    return WinRate(
        candidate=names[0],
        reference=names[1],
        judge=judge[0],
        prompt_hash=judge[1],
        win_rate=100 * share.value,
        win_rate_ci95=_percent(share),
        discrete_win_rate=100 * float(np.mean([_rounded(p) for p in preferences])),
        length_controlled_win_rate=100 * controlled.win_rate.value if controlled else None,
        length_controlled_ci95=_percent(controlled.win_rate) if controlled else None,
        position_bias=100 * float(np.mean([_bias(j) for j in asked])) if asked else None,
        num_comparisons=len(judgements),
        num_judged=sum(j.status == "judged" for j in judgements),
        num_tied=sum(j.status == "tied" for j in judgements),
        num_failed=num_failed,
        num_off_label=sum(j.off_label for j in judgements),
        failures=dict(failures),
        mean_length_candidate=float(np.mean([len(j.comparison.candidate) for j in judgements])),
        mean_length_reference=float(np.mean([len(j.comparison.reference) for j in judgements])),
    )


def agreement(
    first: Sequence[Judgement], second: Sequence[Judgement], judges: tuple[str, str]
) -> Agreement:
    """Compare two judges, whose names are `judges`, on the same comparisons.

    Raises:
        TaskError: if they judged fewer than two comparisons in common.
    """
    others = {j.comparison.instruction: j.preference for j in second}
    found = [(j.preference, others.get(j.comparison.instruction)) for j in first]
    pairs = [(a, b) for a, b in found if a is not None and b is not None]
    if len(pairs) < 2:
        raise TaskError(f"two judges have {len(pairs)} comparisons in common; at least 2 needed")
    sides = [(_rounded(a), _rounded(b)) for a, b in pairs]
    same = float(np.mean([a == b for a, b in sides]))
    shares = [Counter(side) for side in zip(*sides, strict=True)]
    by_chance = sum(shares[0][s] * shares[1][s] for s in shares[0]) / len(pairs) ** 2
    kappa = 1.0 if by_chance == 1.0 else (same - by_chance) / (1.0 - by_chance)
    ours, theirs = (np.array(column) for column in zip(*pairs, strict=True))
    ranked: Any = scipy_stats.spearmanr(ours, theirs) if ours.std() and theirs.std() else None
    correlation = float(ranked.statistic) if ranked is not None else 0.0
    return Agreement(
        judges=judges,
        num_items=len(pairs),
        same_side=same,
        kappa=kappa,
        rank_correlation=correlation,
    )


def sanity_comparisons(outputs: Outputs, most: int = MOST_TESTED) -> dict[str, list[Comparison]]:
    """Return comparisons whose outcome is known.

    `itself`: each answer against itself, 50 %. `shuffled`: against its own words in another order,
    near 100 % with any judge that reads. The first `most` answers of eight words or more.
    """
    long = ((i, a) for i, a in outputs.answers.items() if len(a.split()) >= 8)
    answers = dict(itertools.islice(long, most))
    shuffled: list[Comparison] = []
    for instruction, answer in answers.items():
        words = answer.split()
        order = seeded("sanity", instruction).permutation(len(words))
        shuffled.append(Comparison(instruction, answer, " ".join(words[int(i)] for i in order)))
    return {"itself": [Comparison(i, a, a) for i, a in answers.items()], "shuffled": shuffled}


def _joined(comparison: Comparison, forward: Opinion, backward: Opinion) -> Judgement:
    off_label = forward.off_label or backward.off_label
    if forward.first is None or backward.first is None:
        reason = forward.reason or backward.reason
        return Judgement(comparison, None, None, None, "failed", reason, off_label)
    second = 1.0 - backward.first
    preference = (forward.first + second) / 2.0
    status: Status = "tied" if abs(preference - 0.5) <= EVEN else "judged"
    return Judgement(comparison, preference, forward.first, second, status, off_label=off_label)


def _settled(comparison: Comparison, preference: float, reason: str) -> Judgement:
    status: Status = "tied" if abs(preference - 0.5) <= EVEN else "judged"
    return Judgement(comparison, preference, None, None, status, reason)


def _bias(judgement: Judgement) -> float:
    assert judgement.candidate_first is not None
    assert judgement.candidate_second is not None
    return (judgement.candidate_first - judgement.candidate_second) / 2.0


def _rounded(preference: float) -> float:
    return 0.5 if abs(preference - 0.5) <= EVEN else float(preference > 0.5)


def _controlled(judged: Sequence[Judgement], preferences: object) -> Controlled | None:
    lengths = [(len(j.comparison.candidate), len(j.comparison.reference)) for j in judged]
    return control_length(np.asarray(preferences), np.array(lengths, dtype=np.float64))


def _percent(interval: Interval) -> tuple[float, float]:
    return 100 * interval.low, 100 * interval.high

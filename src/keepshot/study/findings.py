"""What a study of tuned models and their bases shows: every correlation with its controls.

Pure functions on the frame of items; everything random is seeded, each figure by itself, so that
none depends on which others are asked for. What cannot be said is a note, never a crash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from keepshot.errors import StudyError
from keepshot.study import correlation
from keepshot.study.beyond import beyond
from keepshot.study.cohort import NOT_DEGRADED, Cohort, Condition, Pairing, cohort
from keepshot.study.comparison import KINDS, compare, with_adjusted
from keepshot.study.correlation import Correlation, correlate
from keepshot.study.evidence import (
    Comparison,
    CorrelationFinding,
    Figure,
    Findings,
    Kind,
    Role,
    checked,
)

SEED = 7
HALF_WIDTH = 0.1
"""Of the interval for which the number of models needed is given."""
MOST_SETTINGS = 12
"""Settings of a matrix; of a study with more, the question and its controls alone are given."""
ORDER = ("base", "tuned", "sampling")
NO_PAIRS = (
    "No task was asked both of tuned models directly and of their bases with demonstrations, so no "
    "correlation answers the question."
)


def findings(items: Any, domains: Mapping[str, str]) -> Findings | None:
    """Return what a study's rows show; None where nothing tuned, or no base, was asked.

    Args:
        items: as `keepshot.study.frame.item_frame` returns.
        domains: of tasks; one that is not there is of a domain of its own.
    """
    found = cohort(items)
    return None if found is None else _Analysis(found, domains).run()


@dataclass(frozen=True)
class Pair:
    """Two conditions that are compared, and as what."""

    first: Condition
    second: Condition
    role: Role


def pairs_of(conditions: Sequence[Condition]) -> list[Pair]:
    """Return what is compared: the question, its controls, and all other pairs of settings.

    The question is tuned direct against base gold of one ask; where no ask has both, of two.
    """
    ordered = sorted(conditions, key=lambda c: (ORDER.index(c.of), c.setting, c.shots, c.ask))
    direct = [c for c in ordered if (c.of, c.setting) == ("tuned", "direct")]
    gold = [c for c in ordered if (c.of, c.setting) == ("base", "gold")]
    plain = [c for c in ordered if (c.of, c.setting) == ("base", "direct")]
    roles: dict[tuple[Condition, Condition], Role] = {}
    named: tuple[tuple[list[Condition], Role], ...] = ((gold, "question"), (plain, "control"))
    for bases, role in named:
        every = [(base, tuned) for base in bases for tuned in direct]
        near = [(base, tuned) for base, tuned in every if base.ask == tuned.ask]
        roles |= dict.fromkeys(near or every, role)
    if len(ordered) <= MOST_SETTINGS:
        for both in combinations(ordered, 2):
            roles.setdefault(both, "other")
    rank: dict[Role, int] = {"question": 0, "control": 1, "other": 2}
    listed = [Pair(first, second, role) for (first, second), role in roles.items()]
    return sorted(listed, key=lambda pair: rank[pair.role])


class _Analysis:
    """One study's conditions, and the notes that gather while they are compared."""

    def __init__(self, found: Cohort, domains: Mapping[str, str]) -> None:
        self.cohort, self.domains = found, domains
        self.several = len({condition.ask for condition in found.asked}) > 1
        self.notes: dict[str, None] = {}
        self.refused: dict[str, list[str]] = {}

    def run(self) -> Findings:
        pairs = pairs_of(list(self.cohort.asked))
        joined = [(pair, self.cohort.pair(pair.first, pair.second)) for pair in pairs]
        there = [(pair, pairing) for pair, pairing in joined if pairing is not None]
        asked = any(pair.role == "question" for pair, _ in there)
        if not asked:
            self.notes[NO_PAIRS] = None
        rows = [row for pair, pairing in there for row in self._correlations(pair, pairing)]
        comparisons = [
            self._comparison(pair, models, part)
            for pair, pairing in there
            if pair.role == "question"
            for models, part in pairing.subsets(self.cohort.tags)
            if models in ("all", NOT_DEGRADED)
        ]
        used = {c for pair, _ in there for c in (pair.first, pair.second)}
        settings = sorted(used, key=lambda c: (ORDER.index(c.of), c.setting, c.shots, c.ask))
        if len(self.cohort.asked) > MOST_SETTINGS:
            self.note(
                "settings",
                f"there are {len(self.cohort.asked)}, more than {MOST_SETTINGS}: only the question "
                "and its controls were compared",
            )
        return Findings(
            split=self.cohort.split,
            settings=[self.name(condition) for condition in settings],
            correlations=with_adjusted(rows, lambda row: row["kind"], CorrelationFinding),
            comparisons=comparisons,
            # What else cannot be said of a study that asks another question is of no use.
            notes=[*self.notes, *(self._refusals() if asked else ())],
        )

    def _comparison(self, pair: Pair, models: str, part: Pairing) -> Comparison:
        names = self.names(pair)
        found = compare(part, names, models, self.domains, self.note)
        if models != "all":
            return found
        try:
            over = beyond(self.cohort, self._most_drawn(pair), pair.second)
        except StudyError as error:
            self.note(f"{names[1]} against {names[0]}, the bound", error)
            return found
        return found.model_copy(update={"bound": over})

    def _most_drawn(self, pair: Pair) -> Condition:
        """Return the ask of the same setting and shots with the most draws of demonstrations.

        Of asks that share items with the tuned model's: one of other tasks bounds nothing.
        """
        asked = self.cohort.asked

        def items(rows: Any) -> pd.MultiIndex:
            return pd.MultiIndex.from_frame(rows[["task_code", "item"]].drop_duplicates())

        known = items(asked[pair.second].rows)
        draws = {
            condition: found.rows["seed"].nunique()
            for condition, found in asked.items()
            if replace(condition, ask=pair.first.ask) == pair.first
            and items(found.rows).isin(known).any()
        }
        return max(draws, key=lambda c: (draws[c], c == pair.first), default=pair.first)

    def name(self, condition: Condition) -> str:
        return condition.words + (f" ({condition.ask})" if self.several else "")

    def names(self, pair: Pair) -> tuple[str, str]:
        return self.name(pair.first), self.name(pair.second)

    def note(self, what: str, reason: object) -> None:
        self.refused.setdefault(str(reason), []).append(what)

    def _refusals(self) -> Iterator[str]:
        """Yield each reason once, behind all that it was the reason for."""
        for reason, named in self.refused.items():
            yield f"{'; '.join(dict.fromkeys(named))}: {reason}."

    def _correlations(self, pair: Pair, pairing: Pairing) -> Iterator[dict[str, Any]]:
        first, second = self.names(pair)
        parts = list(self._parts(pairing)) if pair.role != "other" else [("all", "all", pairing)]
        for models, tasks, part in parts:
            what = f"{second} against {first}"
            what += "" if models == "all" else f", {models}"
            what += "" if tasks == "all" else f", tasks {tasks}"
            for kind in KINDS:
                try:
                    found = checked(correlated(part, kind, lambda r, w=what: self.note(w, r)))
                except StudyError as error:
                    self.note(what, error)
                    break
                yield {
                    "first": first, "second": second, "role": pair.role, "models": models,
                    "tasks": tasks, **found,
                }  # fmt: skip

    def _parts(self, pairing: Pairing) -> Iterator[tuple[str, str, Pairing]]:
        for models, part in pairing.subsets(self.cohort.tags):
            yield models, "all", part
        for own, tasks in ((True, "tuned for"), (False, "not tuned for")):
            part = pairing.on(own)
            if part is not None:
                yield "all", tasks, part


def correlated(
    pairing: Pairing, kind: Kind, note: Callable[[object], None]
) -> dict[str, Any]:  # fields of a CorrelationFinding
    """Return the correlation of two settings over models, with what it is to be read beside.

    Args:
        pairing: the two settings.
        kind: of ranks, or of the scores themselves.
        note: told why a figure beside the correlation is missing.

    Raises:
        StudyError: where the correlation itself cannot be given.
    """
    # Scores that are equal must tie, in whatever order they were added up.
    x, y = (np.round(scores.mean(axis=1), 12) for scores in (pairing.first_PT, pairing.second_PT))
    families = pairing.units["family"].tolist()
    found = correlate(x, y, families, np.random.default_rng(SEED), kind=kind)
    size = pairing.units["log_size"].to_numpy(float)[:, None]
    given = None
    try:
        given = correlate(x, y, families, np.random.default_rng(SEED), kind=kind, given=size)
    except StudyError as error:
        note(f"not freed from size, since {error}")
    if given is not None and not np.isfinite(given.value):
        given = None
        note("not freed from size: nothing is left of a score once size is known")
    num_tasks = len(pairing.tasks)
    reliabilities = (
        correlation.reliability(x, pairing.first_noise_PT.sum(axis=1) / num_tasks**2),
        correlation.reliability(y, pairing.second_noise_PT.sum(axis=1) / num_tasks**2),
    )
    corrected = correlation.disattenuated(found, *reliabilities)
    if corrected is None:
        note("not corrected for noise, which is all that differs between models in one setting")
    left = correlation.without_each(x, y, families, kind=kind).values()
    finite = [value for value in left if np.isfinite(value)]
    needed, clustered = _needed(found)
    return {
        "kind": kind, "value": found.value, "ci95": found.ci95, "p_value": found.p_value,
        "num_points": found.num_points, "num_clusters": found.num_clusters,
        "num_tasks": num_tasks, "given_size": _figure(given), "without_noise": _figure(corrected),
        "reliabilities": reliabilities,
        "without_a_family": (min(finite), max(finite)) if finite else None,
        "models_needed": needed, "models_needed_clustered": clustered,
    }  # fmt: skip


def _needed(found: Correlation) -> tuple[int | None, int | None]:
    """Return how many models an interval of `HALF_WIDTH` needs: independent, and clustered."""
    if abs(found.value) > 0.999:
        return None, None
    needed = correlation.points_needed(found.value, 2 * HALF_WIDTH, kind=found.kind)
    # The design effect: the interval's variance over that of as many independent models.
    ends = np.clip(found.ci95, -0.999999, 0.999999)
    error = float(np.diff(np.arctanh(ends))[0]) / 2 / stats.t.ppf(0.975, found.num_clusters - 1)
    alone = (1.0 + (found.value**2 / 2 if found.kind == "spearman" else 0.0)) / (
        found.num_points - 3
    )
    return needed, round(needed * max(1.0, float(error**2 / alone)))


def _figure(found: Correlation | None) -> Figure | None:
    return None if found is None else Figure(value=found.value, ci95=found.ci95)

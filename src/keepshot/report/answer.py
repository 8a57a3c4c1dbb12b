"""What a study found, in sentences computed from its figures. Pure."""

from __future__ import annotations

from keepshot.report.words import count, score, score_interval
from keepshot.study.evidence import Comparison, CorrelationFinding, Findings


def main_comparison(findings: Findings | None) -> Comparison | None:
    """Return the comparison that figures show: all models, at the most demonstrations."""
    listed = [one for one in findings.comparisons if one.models == "all"] if findings else []
    return listed[-1] if listed else None


def sentences(findings: Findings | None) -> list[str]:
    """Say what was found: the correlation, without degraded models, given size, and its control."""
    comparison = main_comparison(findings)
    if findings is None or comparison is None:
        return []
    ranks = [
        one
        for one in findings.correlations
        if one.kind == "spearman" and one.tasks == "all" and one.second == comparison.second
    ]
    asked = {one.models: one for one in ranks if one.first == comparison.first}
    if "all" not in asked:
        return []
    whole = asked["all"]
    second, first = (f"\u201c{name}\u201d" for name in (comparison.second, comparison.first))
    found = [
        f"Over {count(whole.num_points, 'tuned model')} of {whole.num_clusters} families, the "
        f"scores of {second} and {first} correlate at {_said(whole)} (Spearman, "
        f"means over {count(whole.num_tasks, 'task')})."
    ]
    others = [(f"for models {name}", one) for name, one in asked.items() if name != "all"]
    rest = [f"{_said(one)} {of} (n = {one.num_points})" for of, one in others]
    if whole.given_size is not None:
        given = whole.given_size
        rest.append(f"{score(given.value)} {score_interval(given.ci95)} given log parameters")
    if rest:
        found.append(f"It is {'; '.join(rest)}.")
    controls = [one for one in ranks if one.role == "control" and one.models == "all"]
    for control in controls:
        found.append(
            f"The control: with \u201c{control.first}\u201d, which sees no examples, it is "
            f"{_said(control)}."
        )
    if comparison.bound is not None:
        over = comparison.bound
        found.append(
            f"Of the items, tuned models solve {_tenths(over.beyond.value)} % that their bases "
            f"solve under none of {over.num_draws} draws of demonstrations; a further draw of the "
            f"bases themselves solves {_tenths(over.control.value)} % of that kind. The difference "
            f"is {_tenths(over.excess.value)} % "
            f"[{', '.join(_tenths(end) for end in over.excess.ci95)}]."
        )
    return found


def _tenths(share: float) -> str:
    return f"{100 * share:.1f}"


def _said(one: CorrelationFinding) -> str:
    return f"{score(one.value)} {score_interval(one.ci95)}"

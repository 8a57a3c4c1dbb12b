"""What `convergence-small` found, as the tables of docs/studies/convergence-small.md.

    keepshot study studies/convergence-small.yaml --accept-licence gemma
    python benchmarks/convergence.py runs/convergence-small

Reads `study.json` and `frame.parquet`. Scores are means over tasks; intervals are 95 %, over
families where models are compared, over items where models are described.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from keepshot import stats
from keepshot.report.study import correlation_tables, read_study
from keepshot.report.words import score, score_interval
from keepshot.study.analysis import attribute, clustered_mean
from keepshot.study.beyond import bounds
from keepshot.study.cohort import Condition, cohort
from keepshot.study.correlation import Correlation, correlate
from keepshot.study.evidence import Figure, Findings
from keepshot.study.frame import matrix

SEED = 0
TUNING = ["model", "recipe", "target", "tuning_seed"]


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def interval(found: Figure | stats.Interval | Correlation | None) -> str:
    if found is None:
        return ""
    ends = (found.low, found.high) if isinstance(found, Correlation) else found.ci95
    return f"{score(found.value)} {score_interval(ends)}"


def group(row: pd.Series) -> str:
    """Name what a model is: trained here, large, or degraded of a large one."""
    if row["degraded"] is not None and not pd.isna(row["degraded"]):
        return f"{row['family']}, {str(row['degraded']).split()[0]}"
    return str(row["family"])


def means(items: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each model, tuned or not, ask, setting and shots: the mean over tasks."""
    keys = ["group", "family", "stage", *TUNING, "ask", "setting", "shots"]
    by_task = items.groupby([*keys, "task"], dropna=False, sort=False)["correct"].mean()
    return by_task.groupby(keys, dropna=False, sort=False).mean().rename("score").reset_index()


def span(scores: pd.Series) -> str:
    if scores.empty:
        return ""
    low, high = score(scores.min()), score(scores.max())
    return low if low == high else f"{low} to {high}"


def show_models(items: pd.DataFrame, scores: pd.DataFrame) -> None:
    sizes = items.groupby("group", sort=False)["num_parameters"].agg(["min", "max"])
    rows = []
    for name, own in scores[scores["ask"] == "composed"].groupby("group", sort=False):
        base, tuned = own[own["stage"] == "base"], own[own["stage"] == "tuned"]
        direct, gold = (base[base["setting"] == s]["score"] for s in ("direct", "gold"))
        after, shown = (tuned[tuned["setting"] == s]["score"] for s in ("direct", "gold"))
        size = f"{sizes.loc[name, 'min'] / 1e6:.3g}"
        rows.append((name, size, len(gold), len(after), *map(span, (direct, gold, after, shown))))
    table(("models", "million parameters", "bases", "tuned", "base, 0 shots", "base, 4 shots",
           "tuned, 0 shots", "tuned, 4 shots"), rows)  # fmt: skip


def show_correlations(found: Findings) -> None:
    rows = []
    for one, by_score in (row for part in correlation_tables(found) for row in part.rows):
        left = one.without_a_family
        rows.append((
            one.first, one.models, one.tasks, interval(one), interval(by_score),
            interval(one.given_size), interval(one.without_noise),
            f"{score(left[0])} to {score(left[1])}" if left else "",
            f"{one.p_adjusted:.2g}", f"{one.num_points} ({one.num_clusters})",
            f"{one.models_needed} ({one.models_needed_clustered})",
        ))  # fmt: skip
    heads = "tuned direct against,models,tasks,Spearman,Pearson,given size,without noise,"
    heads += "without one family,p adjusted,n (families),n for +-.1"
    table(heads.split(","), rows)


def show_comparisons(found: Findings) -> None:
    for one in found.comparisons:
        print(f"\n{one.second} against {one.first}, {one.models} ({len(one.points)} models)")
        table(("cause", "share of variance"), [(s.cause, interval(s)) for s in one.shares])
        if one.mixed is not None:
            print(f"\nslope of the mixed model {interval(one.mixed.slope)}, n = "
                  f"{one.mixed.num_rows}")  # fmt: skip
        for within in one.within:
            print(f"over {within.num_tasks} tasks, {within.kind}, mean of {within.num_models} "
                  f"models: {interval(within.mean)}")  # fmt: skip
        sure = sum(task.p_adjusted < 0.05 for task in one.by_task)
        print(f"tasks with a correlation over models, p adjusted < .05: {sure} of "
              f"{len(one.by_task)}")  # fmt: skip
        if one.bound is not None:
            bound = one.bound
            print(f"beyond {interval(bound.beyond)}, control {interval(bound.control)}, excess "
                  f"{bound.excess.value:.4f} [{bound.excess.ci95[0]:.4f}, "
                  f"{bound.excess.ci95[1]:.4f}]; {bound.num_draws} draws, {bound.num_models} "
                  f"bases, {bound.num_items} items")  # fmt: skip


def joined(scores: pd.DataFrame, *, whole: bool) -> pd.DataFrame:
    """Return tuned models beside their bases: `tuned`, `gold`, `direct`, `log_size`."""
    asked = scores[scores["ask"] == "composed"]
    base = asked[asked["stage"] == "base"].pivot_table(
        index="model", columns="setting", values="score"
    )
    tuned = asked[(asked["stage"] == "tuned") & (asked["setting"] == "direct")]
    found = tuned.rename(columns={"score": "tuned"}).join(base, on="model")
    return found[~found["group"].str.contains(", ")] if whole else found


def show_attribution(items: pd.DataFrame, scores: pd.DataFrame) -> None:
    """Say what few-shot scores explain beside what the same bases do without examples."""
    sizes = np.log(items[items["stage"] == "base"].groupby("model")["num_parameters"].first())
    rows = []
    for whole in (False, True):
        points = joined(scores, whole=whole)
        causes = {
            "base, 4 shots": points["gold"].to_numpy(float),
            "base, 0 shots": points["direct"].to_numpy(float),
            "size": points["model"].map(sizes).to_numpy(float),
        }
        shares = attribute(points["tuned"].to_numpy(float), causes, points["family"].tolist(),
                           np.random.default_rng(SEED))  # fmt: skip
        label = "not degraded" if whole else "all"
        rows.append((label, len(points), *(interval(share) for share in shares.values())))
    table(("models", "n", *causes, "unexplained"), rows)


def show_kinds(scores: pd.DataFrame) -> None:
    """Correlate within kinds of models, and each of the bases' two scores given the other.

    Of a large model and its degraded copies, each base is resampled by itself.
    """
    points = joined(scores, whole=False)
    large = points["family"].isin(["gemma", "smollm2"])
    parts = {"all": points, "from scratch": points[~large]}
    parts |= {f"{name} and degraded": part for name, part in points[large].groupby("family")}
    rows = []
    for label, part in parts.items():
        clusters = part["model" if label.endswith("degraded") else "family"].tolist()
        columns = {name: part[name].to_numpy(float) for name in ("gold", "direct", "tuned")}
        found = []
        for cause, other in (("gold", "direct"), ("direct", "gold")):
            for given in (None, columns[other][:, None]):
                one = correlate(columns[cause], columns["tuned"], clusters,
                                np.random.default_rng(SEED), given=given)  # fmt: skip
                found.append(interval(one))
        rows.append((label, f"{len(part)} ({len(set(clusters))})", *found))
    heads = ("models", "n (resampled)", "base, 4 shots", "the same, given 0 shots",
             "base, 0 shots", "the same, given 4 shots")  # fmt: skip
    table(heads, rows)


def show_bound(items: pd.DataFrame) -> None:
    """The bound apart for tasks with choices, where a guess solves what a bias never does."""
    base, tuned = Condition("base", "draws", "gold", 4), Condition("tuned", "composed", "direct", 0)
    rows = []
    for label, choice in (("with choices", True), ("written freely", False)):
        found = bounds(cohort(items[(items["chance"] > 0.0) == choice]), base, tuned)
        families = [family for family, _ in found]
        for name in ("all", *dict.fromkeys(families)):
            some = [one for family, one in found if name in ("all", family)]
            shares = []
            for share in ("beyond", "control", "excess"):
                values = [getattr(one, share).value for one in some]
                shares.append(interval(clustered_mean(values, families)) if name == "all"
                              else span(pd.Series(values)))  # fmt: skip
            rows.append((label, name, len(some), some[0].num_items, *shares))
    table(("tasks", "bases", "n", "items", "beyond", "control", "excess"), rows)


def show_recipes(scores: pd.DataFrame) -> None:
    points = joined(scores, whole=True)
    points = points.assign(kind=points["recipe"].str.replace("-large", ""))
    table_ = points.pivot_table(index=["model", "family"], columns="kind", values="tuned")
    both = table_.dropna().reset_index()
    found = clustered_mean((both["lora"] - both["full"]).to_numpy(float), both["family"].tolist())
    print(f"\nLoRA less full tuning, tuned direct: {interval(found)} ({len(both)} models)")


def show_demonstrations(items: pd.DataFrame) -> None:
    """Score each kind of demonstration on the items that all kinds were put to."""
    base = items[(items["stage"] == "base") & (items["seed"] == items["seed"].min())]
    asks = {"0 shots": ("composed", 0), "right": ("composed", 4), "corrupted": ("corrupted", 4),
            "of another task": ("other-task", 4)}  # fmt: skip
    rows = []
    for name, own in base.groupby("group", sort=False):
        tables = {label: own[(own["ask"] == ask) & (own["shots"] == shots)]
                  for label, (ask, shots) in asks.items()}  # fmt: skip
        shared = set.intersection(*(set(zip(t["task"], t["item"], strict=True))
                                    for t in tables.values()))  # fmt: skip
        if not shared:
            continue
        found = []
        for one in tables.values():
            there = [pair in shared for pair in zip(one["task"], one["item"], strict=True)]
            found.append(one[there].groupby("task")["correct"].mean().mean())
        rows.append((name, *(score(value) for value in found)))
    table(("bases", *asks), rows)


def show_written(items: pd.DataFrame) -> None:
    """Score the models that write their demonstrations, and what their bases make of these."""
    own = items[items["ask"] == "written"]
    own = own.assign(kind=own["stage"] + " " + own["setting"])
    rows = []
    kinds = ["base gold", "tuned gold", "tuned samplegen", "tuned pipeline"]
    for name, part in own.groupby("group", sort=False):
        values = []
        for kind in kinds:
            some = part[part["kind"] == kind].assign(tuning_seed=0, seed=0)
            some = some.assign(item=some["model"] + some["item"].astype(str))
            listed = [matrix(one) for _, one in some.groupby("task")]
            values.append(interval(stats.mean_over_tasks(listed, np.random.default_rng(SEED)))
                          if listed else "")  # fmt: skip
        rows.append((name, part["model"].nunique(), *values))
    table(("models", "n", "base, 2 right", "writer, 2 right", "writer, own (SampleGen)",
           "base, the writer's (pipeline)"), rows)  # fmt: skip
    means_of = own.groupby(["family", "model", "kind", "task"])["correct"].mean()
    points = means_of.groupby(["family", "model", "kind"]).mean().unstack("kind")
    families = points.index.get_level_values("family").tolist()
    for kind in ("tuned pipeline", "base gold"):
        one = correlate(points[kind].to_numpy(float), points["tuned samplegen"].to_numpy(float),
                        families, np.random.default_rng(SEED))  # fmt: skip
        print(f"\nSpearman of SampleGen with {kind}: {interval(one)} ({one.num_points} models)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="directory of the study")
    place = parser.parse_args().study
    document = read_study(place)
    assert document.findings is not None, "tuned models and bases were asked"
    items = pd.read_parquet(place / "frame.parquet")
    if "degraded" not in items:
        items["degraded"] = None
    named = items.drop_duplicates("model").set_index("model").apply(group, axis=1)
    items["group"] = items["model"].map(named)
    scores = means(items)
    show_models(items, scores)
    show_correlations(document.findings)
    show_comparisons(document.findings)
    show_attribution(items, scores)
    show_kinds(scores)
    show_bound(items)
    show_recipes(scores)
    show_demonstrations(items)
    show_written(items)


if __name__ == "__main__":
    main()

"""The default beside plain full tuning, from the study that compares them.

    keepshot study studies/keep-auto.yaml --out runs/keep-auto --accept-licence gemma
    python benchmarks/keeping.py runs/keep-auto   # or files of frames.py
    python benchmarks/keeping.py FILE --figure keeping.svg    # of the first model

For each model: every target with the default (`auto`), plain full tuning at the rate that was best
on validation items of the target, and the gentlest rate whose validation score is within .02 of
that. Target scores and retention are of test items, with 95 % intervals of a paired bootstrap over
items (tasks and targets are fixed); the last lines are means over targets. A second table has all
arms: how many few-shot answers have no possible form or are labels of the target, the divergence
from the untuned model, and seconds of tuning.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
from adaptation import axes
from frames import COST, read

from keepshot import stats
from keepshot.report.styling import data, styled
from keepshot.report.svg import render
from keepshot.study.frame import matrix

SEED = 0
FIGURE = "few-shot ability kept against target score: the default, and full tuning at several rates"
LEVEL = 0.02
"""Validation scores of the target that differ by no more than this count as the same."""


def score(rows: pd.DataFrame, target: str, split: str) -> np.ndarray:
    """Return the target's answers, [1, items]."""
    asked = rows[(rows["task"] == target) & (rows["shots"] == 0) & (rows["split"] == split)]
    return matrix(asked.drop_duplicates(["tuning_seed", "item"]))


def few_shot(
    rows: pd.DataFrame, target: str, shots: int, split: str = "test"
) -> dict[str, np.ndarray]:
    asked = rows[(rows["task"] != target) & (rows["shots"] == shots) & (rows["split"] == split)]
    return {str(task): matrix(own) for task, own in asked.groupby("task")}


def words(found: stats.Interval) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def kept(after: dict, before: dict, chances: pd.Series, num_seeds: int) -> tuple[float, np.ndarray]:
    """Return retention, and its resamples."""
    tasks = sorted(after)
    untuned = [np.tile(before[task], (len(after[task]), 1)) for task in tasks]
    found = stats.resampled_retention(
        [after[task] for task in tasks], untuned, [float(chances[task]) for task in tasks],
        np.random.default_rng(SEED), [num_seeds] * len(tasks),
    )  # fmt: skip
    assert found is not None, "the untuned model is above chance"
    return found


def chosen(arms: dict[str, pd.DataFrame], target: str) -> dict[str, str]:
    """Return which recipes stand as the default, plain and gentle tuning, by validation items.

    Of plain rates that are equal there it is the highest.
    """
    plain = {name: float(score(rows, target, "validation").mean())
             for name, rows in arms.items() if name != "auto"}  # fmt: skip
    rates = {name: float(name.rpartition("=")[2]) for name in plain}
    best = max(plain, key=lambda name: (plain[name], rates[name]))
    level = [name for name, value in plain.items() if value >= plain[best] - LEVEL]
    gentle = min(level, key=lambda name: rates[name])
    return {"auto": "auto", "plain": best, "gentle": gentle}


def report(model: str, rows: pd.DataFrame) -> None:
    base = rows[rows["stage"] == "base"]
    chances = base.groupby("task")["chance"].mean()
    heads = (
        "target",
        "arm",
        "target score",
        "against plain",
        "kept, 4 shots",
        "kept, 8 shots",
        "n",
    )
    print(f"\n{model}\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    totals: dict[tuple[str, str], list[tuple[float, np.ndarray]]] = {}
    for target, near in rows[rows["stage"] == "tuned"].groupby("target", sort=False):
        arms = {str(name): own for name, own in near.groupby("recipe", sort=False)}
        if "auto" not in arms or len(arms) < 2:
            continue
        names = chosen(arms, str(target))
        before = score(base, str(target), "test")
        share = words(stats.proportion(before.sum(), before.size))
        print(f"| {target} | untuned | {share} | | 1 | 1 | {before.size} |")
        plain = score(arms[names["plain"]], str(target), "test")
        for arm, name in names.items():
            own = score(arms[name], str(target), "test")
            ours, theirs = stats.resampled_means([own, plain], np.random.default_rng(SEED))
            figures = {"target": (float(own.mean() / plain.mean()), ours / theirs)}
            size = 0
            for shots in (4, 8):
                after = few_shot(arms[name], str(target), shots)
                untuned = few_shot(base, str(target), shots)
                seeds = arms[name]["tuning_seed"].nunique()
                figures[f"kept, {shots} shots"] = kept(after, untuned, chances, seeds)
                size = sum(answers.shape[1] for answers in after.values())
            for what, found in figures.items():
                totals.setdefault((arm, what), []).append(found)
            share = stats.proportion(own.mean() * own.shape[1], own.shape[1])
            cells = [words(share), *(words(stats.percentiles(*one)) for one in figures.values())]
            label = arm if arm == "auto" else f"{arm} ({name.rpartition('=')[2]})"
            print(f"| {target} | {label} | {' | '.join(cells)} | {own.shape[1]}; {size} |")
    for (arm, what), found in totals.items():
        value = float(np.mean([point for point, _ in found]))
        spread = np.mean([values for _, values in found], axis=0)
        mean = words(stats.percentiles(value, spread))
        print(f"{arm}, {what}: mean of {len(found)} targets {mean}")


def besides(rows: pd.DataFrame) -> None:
    """Print all arms: both scores, form, leakage, divergence, time; of test items if there are."""
    rows = rows.reindex(columns=[*rows.columns, *(name for name in COST if name not in rows)])
    split = "test" if (rows["split"] == "test").any() else "validation"
    heads = ("target", "arm", f"target score, {split} items", "kept, 4 shots", "format failures",
             "leakage", "KL, few-shot", "KL, target", "seconds")  # fmt: skip
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    base = rows[rows["stage"] == "base"]
    chances = base.groupby("task")["chance"].mean()
    columns = ["format_failure", "label_leakage", *COST]
    tuned = rows[rows["stage"] == "tuned"].groupby(["target", "recipe"], sort=False)
    for (target, arm), own in tuned:
        right, after = score(own, str(target), split), few_shot(own, str(target), 4, split)
        if not right.size or not after:
            continue
        share = words(stats.proportion(right.mean() * right.shape[1], right.shape[1]))
        before = few_shot(base, str(target), 4, split)
        found = kept(after, before, chances, own["tuning_seed"].nunique())
        few = own[(own["split"] == split) & (own["shots"] == 4) & (own["task"] != target)]
        means = few.groupby("task")[columns].mean().mean()
        cells = [f"{means[name]:.{0 if name.endswith('seconds') else 3}f}" for name in columns]
        told = [share, words(stats.percentiles(*found)), *cells]
        print(f"| {target} | {arm} | {' | '.join(told)} |")


def figure(rows: pd.DataFrame) -> str:
    """Return target scores and few-shot ability kept of all arms, target by target, as SVG."""
    base, panels = rows[rows["stage"] == "base"], []
    chances = base.groupby("task")["chance"].mean()
    for target, near in rows[rows["stage"] == "tuned"].groupby("target", sort=False):
        before, points = score(base, str(target), "test").mean(), []
        points.append({"arm": "untuned", "x": before, "y": 1.0, "rate": 0.0})
        for arm, own in near.groupby("recipe", sort=False):
            after = few_shot(own, str(target), 4)
            before_tuning = few_shot(base, str(target), 4)
            value, _ = kept(after, before_tuning, chances, own["tuning_seed"].nunique())
            rate = float(str(arm).rpartition("=")[2]) if "=" in str(arm) else 0.0
            points.append({
                "arm": "full tuning" if rate else "the default", "rate": rate, "y": value,
                "x": float(score(own, str(target), "test").mean()),
                "name": f"{rate:.0e}".replace("e-0", "e-") if rate else "",
            })  # fmt: skip
        panels.append(_panel(str(target), points, first=not panels))
    return render(styled(alt.hconcat(*panels, spacing=18), "wide"), FIGURE)


def _panel(target: str, points: list[dict], *, first: bool) -> alt.LayerChart:
    arms, colours = ["untuned", "the default", "full tuning"], ["#555555", "#009e73", "#0072b2"]
    base = alt.Chart(data(points)).encode(*axes(first=first, top=1.3))
    full = base.transform_filter(alt.FieldEqualPredicate("full tuning", "arm"))
    line = full.mark_line(strokeWidth=1.4, color=colours[2]).encode(order="rate:Q")
    names = full.mark_text(align="right", dx=-7, dy=4, fontSize=10).encode(text="name:N")
    marks = base.mark_point(size=70, filled=True, opacity=1).encode(
        color=alt.Color("arm:N", scale=alt.Scale(domain=arms, range=colours)),
        shape=alt.Shape("arm:N", scale=alt.Scale(
            domain=arms, range=["cross", "circle", "square"])),
    )  # fmt: skip
    return alt.layer(line, names, marks, title=target).properties(width=165, height=220)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("places", type=Path, nargs="+", help="run directories, or files of rows")
    parser.add_argument("--figure", type=Path, help="SVG to write, in place of the tables")
    given = parser.parse_args()
    for model, rows in read(given.places).groupby("model", sort=False):
        if given.figure:
            given.figure.write_text(figure(rows), encoding="utf-8")
            return
        if (rows["recipe"] == "auto").any():
            report(str(model), rows)
        besides(rows)


if __name__ == "__main__":
    main()

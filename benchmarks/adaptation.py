"""The path between untuned and tuned beside tuning less, from the study that compares them.

    keepshot study studies/partial_adaptation.yaml --accept-licence gemma
    python benchmarks/adaptation.py runs/partial-adaptation   # or files of frames.py
    python benchmarks/adaptation.py FILE --figure path.svg    # of the first model

For each model: every path (one recipe on one target) point by point; the lambda of the best
few-shot score on validation items, and what it gains over both ends on test items; each way of
tuning less beside the point of the full path at which the target score is the same, found by
straight lines between the points; few-shot ability kept by kind of task. All of test items but what
is chosen, with 95 % intervals of a bootstrap over items, in which all arms, of all seeds of tuning,
have the same items.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
from frames import read

from keepshot import stats
from keepshot.report.styling import data, styled
from keepshot.report.svg import render
from keepshot.study.frame import matrix
from keepshot.tasks.catalog import CATALOG

SEED = 0
SPLITS = ("validation", "test")
FULL = "full"
LOOKS = {
    "full-small-rate": ("smaller rate", "#0072b2", False, "square"),
    "full-early": ("fewer steps", "#e69f00", False, "diamond"),
    "full": ("blend of full tuning", "#009e73", True, "circle"),
    "lora": ("LoRA, scaled", "#cc79a7", True, "triangle-up"),
}
"""By how a recipe's name begins: words, colour, whether it is a path, shape."""
FIGURE = "few-shot ability kept against target score: blends, smaller rates, fewer steps"
KINDS = {
    "knowledge": ("knowledge",),
    "language": ("translation", "morphology"),
    "labels": ("topic", "feeling"),
    "numbers": ("arithmetic", "numerals"),
    "read off the prompt": ("extraction", "position", "format"),
}
"""Domains of the study's tasks."""


class Arms:
    """Target and few-shot scores of one model's arms on one target, under the same resamples.

    An arm is (recipe, lambda, seed of tuning); the untuned model is (None, 0, None).
    """

    def __init__(self, rows: pd.DataFrame, base: pd.DataFrame, target: str, split: str):
        rows, base = rows[rows["split"] == split], base[base["split"] == split]
        frames = {(None, 0.0, None): base}
        lams = rows["lam"].fillna(1.0)
        for key, own in rows.groupby([rows["recipe"], lams, rows["tuning_seed"]], sort=False):
            frames[str(key[0]), float(key[1]), int(key[2])] = own
        tasks = sorted(set(base["task"][base["shots"] > 0]) - {target})
        targets = [self._answers(own, target, 0) for own in frames.values()]
        few = [[self._answers(own, task, 4) for task in tasks] for own in frames.values()]
        self.num_items = {"target": targets[0].size, "few-shot": sum(m.size for m in few[0])}
        chance = base[base["task"].isin(tasks)].groupby("task")["chance"].mean()
        self.chance = {task: float(chance[task]) for task in tasks}
        resampled = stats.resampled_means(targets, np.random.default_rng(SEED))
        self.target = {
            arm: (float(own.mean()), values)
            for arm, own, values in zip(frames, targets, resampled, strict=True)
        }
        generator = np.random.default_rng(SEED)
        self.by_task = {
            task: dict(zip(
                frames,
                stats.resampled_over_tasks([[arm[place]] for arm in few], generator),
                strict=True,
            ))
            for place, task in enumerate(tasks)
        }  # fmt: skip
        failing = {arm: own[own["task"].isin(tasks)] for arm, own in frames.items()}
        self.leakage = {arm: float(own["label_leakage"].mean()) for arm, own in failing.items()}

    @staticmethod
    def _answers(rows: pd.DataFrame, task: str, shots: int) -> np.ndarray:
        asked = rows[(rows["task"] == task) & (rows["shots"] == shots)]
        return matrix(asked.drop_duplicates(["seed", "item"]) if shots else
                      asked.drop_duplicates(["item"]))  # fmt: skip

    def few_shot(self, arm: tuple, tasks: list[str] | None = None) -> stats.Resampled:
        """Return the mean score over tasks."""
        return mean([self.by_task[task][arm] for task in tasks or self.by_task])

    def kept(self, arm: tuple, tasks: list[str] | None = None) -> stats.Resampled:
        """Return the share of the untuned model's score above chance."""
        chance = float(np.mean([self.chance[task] for task in tasks or self.chance]))
        own, before = self.few_shot(arm, tasks), self.few_shot((None, 0.0, None), tasks)
        found = stats.kept(own, before, chance)
        return found if found is not None else (float("nan"), np.full(stats.NUM_RESAMPLES, np.nan))

    def path(self, recipe: str, seed: int) -> list[tuple]:
        """Return the arms from untuned to tuned."""
        lams = sorted(arm[1] for arm in self.target if arm[0] == recipe and arm[2] == seed)
        return [(None, 0.0, None), *((recipe, lam, seed) for lam in lams)]

    def at_target(self, path: list[tuple], wanted: stats.Resampled) -> stats.Resampled:
        """Return few-shot ability kept where the path first has the target score wanted.

        Where it never has, that of its last point.
        """
        targets = [self.target[arm] for arm in path]
        kept = [self.kept(arm) for arm in path]
        value = float(_crossing([[t[0]] for t in targets], [[k[0]] for k in kept], [wanted[0]])[0])
        return value, _crossing([t[1] for t in targets], [k[1] for k in kept], wanted[1])

    def walked(self) -> list[str]:
        """Return the recipes that have points between untuned and tuned."""
        return sorted({arm[0] for arm in self.target if arm[0] and 0 < arm[1] < 1})

    def seeds(self, recipe: str) -> list[int]:
        """Return the seeds under which a recipe was tuned."""
        return sorted({arm[2] for arm in self.target if arm[0] == recipe})


def _crossing(targets: list, kept: list, wanted) -> np.ndarray:
    """Return `kept` where `targets` [points, resamples] first reach `wanted` [resamples]."""
    targets, kept, wanted = np.array(targets), np.array(kept), np.array(wanted)
    found, open_ = kept[-1].copy(), np.ones(len(wanted), dtype=bool)
    for place in range(len(targets)):
        here = open_ & (targets[place] >= wanted)
        if place == 0:
            found[here] = kept[0][here]
        else:
            rise = targets[place] - targets[place - 1]
            share = (wanted - targets[place - 1]) / np.where(rise > 0, rise, 1.0)
            between = kept[place - 1] + share * (kept[place] - kept[place - 1])
            found[here] = between[here]
        open_ &= ~here
    return found


def mean(parts: list[stats.Resampled]) -> stats.Resampled:
    return float(np.mean([p[0] for p in parts])), np.mean([p[1] for p in parts], axis=0)


def minus(one: stats.Resampled, two: stats.Resampled) -> stats.Resampled:
    return one[0] - two[0], one[1] - two[1]


def words(found: stats.Resampled, sign: str = "") -> str:
    own = stats.percentiles(*found)
    return f"{own.value:{sign}.2f} [{own.low:{sign}.2f}, {own.high:{sign}.2f}]"


def table(heads: list[str], rows: list[list[str]]) -> None:
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def paths(found: dict[str, dict[str, Arms]]) -> None:
    rows = []
    for target, arms in found.items():
        test = arms["test"]
        for recipe in test.walked():
            seeds = test.seeds(recipe)
            for place, (_, lam, _) in enumerate(test.path(recipe, seeds[0])):
                points = [test.path(recipe, seed)[place] for seed in seeds]
                rows.append([
                    target, recipe, f"{lam:g}",
                    words(mean([test.target[p] for p in points])),
                    words(mean([test.kept(p) for p in points])),
                    f"{np.mean([test.leakage[p] for p in points]):.2f}",
                ])  # fmt: skip
    table(["target", "path", "lambda", "target score", "kept", "leakage"], rows)


def best_points(found: dict[str, dict[str, Arms]]) -> None:
    rows, gains = [], {}
    for target, arms in found.items():
        choose, test = (arms[split] for split in SPLITS)
        for recipe in test.walked():
            for seed in test.seeds(recipe):
                path = choose.path(recipe, seed)
                best = max(path, key=lambda arm: choose.few_shot(arm)[0])
                over = [minus(test.kept(best), test.kept(end)) for end in (path[0], path[-1])]
                for name, gain in zip(("untuned", "tuned"), over, strict=True):
                    gains.setdefault((recipe, name), []).append(gain)
                rows.append([
                    target, recipe, str(seed), f"{best[1]:g}", words(test.kept(best)),
                    *(words(gain, "+") for gain in over), words(test.target[best]),
                ])  # fmt: skip
    heads = ["path", "seed", "lambda", "kept", "above untuned", "above tuned", "target score"]
    table(["target", *heads], rows)
    for (recipe, name), parts in gains.items():
        print(f"{recipe}, above {name}: mean of {len(parts)} paths {words(mean(parts), '+')}")


def rivals(found: dict[str, dict[str, Arms]]) -> None:
    rows, totals = [], {}
    for target, arms in found.items():
        test = arms["test"]
        others = dict.fromkeys((a[0], a[1]) for a in test.target if a[0] not in (None, FULL))
        for recipe, lam in others:
            seeds = [seed for seed in test.seeds(recipe) if seed in test.seeds(FULL)]
            own = [(recipe, lam, seed) for seed in seeds]
            blends = [
                test.at_target(test.path(FULL, seed), test.target[arm])
                for seed, arm in zip(seeds, own, strict=True)
            ]
            kept = [test.kept(arm) for arm in own]
            apart = mean([minus(a, b) for a, b in zip(blends, kept, strict=True)])
            totals.setdefault((recipe, lam), []).append(apart)
            rows.append([
                target, recipe if lam == 1 else f"{recipe}, lambda {lam:g}",
                words(mean([test.target[arm] for arm in own])), words(mean(kept)),
                words(mean(blends)), words(apart, "+"),
            ])  # fmt: skip
    table(["target", "tuning less", "target score", "kept", "blend's", "blend minus it"], rows)
    for (recipe, lam), parts in totals.items():
        print(f"{recipe} {lam:g}: mean of {len(parts)} targets {words(mean(parts), '+')}")


def kinds(found: dict[str, dict[str, Arms]]) -> None:
    tests = [arms["test"] for arms in found.values()]
    asked = set.intersection(*(set(test.by_task) for test in tests))
    path = tests[0].path(FULL, tests[0].seeds(FULL)[0])[1:]
    rows = []
    for name, domains in KINDS.items():
        tasks = sorted(task for task in asked if CATALOG[task].domain in domains)
        cells = [
            words(mean([t.kept((FULL, lam, seed), tasks) for t in tests for seed in t.seeds(FULL)]))
            for _, lam, _ in path
        ]
        rows.append([f"{name} ({', '.join(tasks)})", *cells])
    table(["kind", *(f"lambda {lam:g}" for _, lam, _ in path)], rows)


def figure(found: dict[str, dict[str, Arms]]) -> str:
    """Return the paths and what tunes less, target by target, as SVG."""
    panels = []
    for target, arms in found.items():
        test, rows = arms["test"], []
        for name, (what, _, on_path, _) in LOOKS.items():
            untuned = [(None, 0.0, seed) for seed in test.seeds(name)] if on_path else []
            tuned = sorted((arm for arm in test.target if _looks(arm) == name), key=lambda a: a[1])
            for recipe, lam, seed in [*untuned, *tuned]:
                arm = (recipe, lam, seed if recipe else None)
                rows.append({
                    "what": what, "path": f"{name} {seed}", "lam": lam,
                    "x": test.target[arm][0], "y": test.kept(arm)[0],
                })  # fmt: skip
        panels.append(_panel(target, rows, first=not panels))
    return render(styled(alt.hconcat(*panels, spacing=22), "wide"), FIGURE)


def _looks(arm: tuple) -> str | None:
    """Return under which name an arm is drawn."""
    return next((name for name in LOOKS if arm[0] and arm[0].startswith(name)), None)


def axes(*, first: bool, top: float = 1.2) -> tuple[alt.X, alt.Y]:
    """Return target score and few-shot ability kept as axes; the second named once."""
    x = alt.X(
        "x:Q", title="target score", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=5)
    )
    y = alt.Y(
        "y:Q", title="few-shot ability kept" if first else None,
        scale=alt.Scale(domain=[0, top]), axis=alt.Axis(tickCount=6),
    )  # fmt: skip
    return x, y


def _panel(target: str, rows: list[dict], *, first: bool) -> alt.LayerChart:
    names = [look[0] for look in LOOKS.values()]
    colour = alt.Color(
        "what:N", scale=alt.Scale(domain=names, range=[look[1] for look in LOOKS.values()])
    )
    shape = alt.Shape(
        "what:N", scale=alt.Scale(domain=names, range=[look[3] for look in LOOKS.values()])
    )
    base = alt.Chart(data(rows)).encode(*axes(first=first), color=colour)
    on_path = [look[0] for look in LOOKS.values() if look[2]]
    lines = base.transform_filter(alt.FieldOneOfPredicate("what", on_path)).mark_line(
        strokeWidth=1.6
    )
    marks = base.mark_point(size=60, filled=True, opacity=1).encode(shape=shape)
    return alt.layer(
        lines.encode(detail="path:N", order="lam:Q"), marks, title=target
    ).properties(width=215, height=220)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("places", type=Path, nargs="+", help="run directories, or files of rows")
    parser.add_argument("--figure", type=Path, help="SVG to write, in place of the tables")
    given = parser.parse_args()
    frame = read(given.places)
    for model, rows in frame.groupby("model", sort=False):
        base = rows[rows["stage"] == "base"]
        found = {
            str(target): {split: Arms(near, base, str(target), split) for split in SPLITS}
            for target, near in rows[rows["stage"] != "base"].groupby("target", sort=False)
        }
        if given.figure:
            given.figure.write_text(figure(found), encoding="utf-8")
            return
        sizes = next(iter(found.values()))["test"].num_items
        print(
            f"\n{model}: test items, n = {sizes['target']} (target), {sizes['few-shot']} (few-shot)"
        )
        paths(found)
        best_points(found)
        rivals(found)
        kinds(found)


if __name__ == "__main__":
    main()

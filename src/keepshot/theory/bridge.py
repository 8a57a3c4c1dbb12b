"""The bridge: the same two shares for linear attention, a softmax transformer and real models.

    gained = share of the zero-shot error on the target that tuning removed
    lost   = share of few-shot ability on unseen tasks that tuning cost

Few-shot ability is what demonstrations are worth against answering 0 (against chance in real
models, where `lost` is 1 - retention). The untuned model is at 0 and 0; right and down are better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from keepshot.theory import optima, transformer
from keepshot.theory.document import ClaimRecord, Panel, Point, RealArm, TheoryRow
from keepshot.theory.extensions import blended, flow_with_kl
from keepshot.theory.lab import Lab, Method
from keepshot.theory.linear_attention import Attention

FEW = 12
DIMENSION = 3
PRETRAIN_STEPS = 400
TUNE_STEPS = 200
HOLD = 1.0
"""Weight of the squared distance to the pretrained output on few-shot prompts of unseen tasks."""
LAM = 0.5
"""Where on the path of full tuning partial adaptation is shown."""
NUM_SEEDS = 3
"""Transformers pretrained, each tuned in every way; bars are over these."""
GAINED, LOST = "share of zero-shot error removed", "share of few-shot ability lost"
LINEAR, SOFTMAX = "linear attention", "softmax transformer"


def bridge(lab: Lab) -> ClaimRecord:
    """Set linear attention beside a softmax transformer trained here, and real models if given."""
    real = [
        Point(panel=arm.group, series=arm.name, family=arm.family, x=arm.gained, predicted=None,
              measured=arm.lost, se=arm.se, x_se=arm.gained_se)
        for arm in lab.real
    ]  # fmt: skip
    small = lab.changed(d=min(lab.d, DIMENSION), spectrum=None, covariance=None)
    rows, linear = _linear(small)
    softmax = _transformer(small)
    shown = {p.series: p for p in linear}, {p.series: p for p in softmax}
    words = [
        f"{name}: gains {100 * one.x:.0f} % and loses {_share(one)} in linear attention, gains "
        f"{100 * other.x:.0f} % and loses {_share(other)} in the transformer"
        for name in ("full", "value_only")
        for one, other in [(shown[0][name], shown[1][name])]
    ]
    sentences = [
        "Of the target's zero-shot error and of few-shot ability on unseen tasks, "
        + "; ".join(words) + ".",
        _verdict(shown[1]["full"], shown[1]["value_only"]),
        "Real models: " + (_real_words(lab.real) if lab.real else
                           "none here; give a finished run or study with --set study=DIR."),
    ]  # fmt: skip
    names = [LINEAR, SOFTMAX, *dict.fromkeys(arm.group for arm in lab.real)]
    panels = [
        Panel(name=name, x_title=GAINED, y_title=LOST, axes="shares", labelled=True)
        for name in names
    ]
    untuned = [Point(panel=name, series="untuned", x=0.0, predicted=None, measured=0.0)
               for name in names]  # fmt: skip
    return ClaimRecord(
        claim="bridge", sentences=sentences, rows=rows, panels=panels,
        points=[*linear, *softmax, *real, *untuned],
    )  # fmt: skip


def _share(point: Point) -> str:
    return f"{100 * float(point.measured or 0.0):.0f} %"


def _verdict(full: Point, value_only: Point) -> str:
    """Say whether the theory's ranking holds in the transformer, as far as gains are comparable."""
    lost, less = float(full.measured or 0.0), float(value_only.measured or 0.0)
    between = math.hypot(full.se or 0.0, value_only.se or 0.0)
    if value_only.x < 0.9 * full.x:
        return "In the transformer value-only gains less, so its loss says nothing by itself."
    words = (
        f"{100 * (lost - less):.0f} points less than full tuning, 2 standard errors are "
        f"{200 * between:.0f} ({NUM_SEEDS} transformers)"
    )
    if lost - less > 2 * between:
        return f"The theory's ranking holds in the transformer: value-only loses {words}."
    return (
        "The theory's ranking is not shown in the transformer, where the value matrices alone gain "
        f"as much as all parameters: value-only loses {words}."
    )


def _real_words(arms: Sequence[RealArm]) -> str:
    most, least = (chosen(arms, key=lambda arm: arm.lost) for chosen in (max, min))
    counts = sorted({arm.num_items for arm in arms})
    items = f", n = {' or '.join(map(str, counts))} items each" if counts[0] else ""
    return (
        f"{len(arms)} arms{items}; {_arm_words(most)}; {_arm_words(least)}, the least of all."
        if len(arms) > 1
        else f"one arm{items}; {_arm_words(most)}."
    )


def _arm_words(arm: RealArm) -> str:
    spread = f" (s.e. {100 * arm.se:.0f})" if arm.se else ""
    return f"{arm.name} loses {100 * arm.lost:.0f} %{spread} for a gain of {100 * arm.gained:.0f} %"


def _linear(lab: Lab) -> tuple[list[TheoryRow], list[Point]]:
    start = lab.pretrained(FEW)
    full = optima.full_limit(start, lab.world, lab.theta)
    heads = {
        "full": full,
        f"full, lambda {LAM:g}": blended(start, full, LAM),
        "full, held": flow_with_kl(lab, start, (HOLD,), FEW)[0],
        "value_only": optima.value_only(start, lab.world, lab.theta),
        "value_only_aux": optima.value_only_aux(start, lab.world, lab.theta, FEW),
    }
    before = lab.error(start, "target", 0), lab.error(start, "unseen", FEW)
    trivial = lab.spec.norm**2 + lab.spec.sigma2
    methods = [_closed(name, head) for name, head in heads.items()]
    rows = lab.rows("bridge", methods, [0, FEW])
    measured = {(row.method, row.task, row.shots): row for row in rows}
    points: list[Point] = []
    for name in heads:
        zero, few = measured[name, "target", 0], measured[name, "unseen", FEW]
        gained = (before[0] - zero.predicted) / (before[0] - lab.spec.sigma2)
        scale = trivial - before[1]
        points.append(
            Point(panel=LINEAR, series=name, x=gained,
                  predicted=(few.predicted - before[1]) / scale,
                  measured=(few.measured - before[1]) / scale, se=few.se / scale)
        )  # fmt: skip
    return rows, points


def _closed(name: str, head: Attention) -> Method:
    return Method(name, lambda _: head, lambda _: head)


def _transformer(lab: Lab) -> list[Point]:
    """Return the mean of several transformers, each pretrained and tuned from a seed of its own."""
    runs = [_one_transformer(lab, seed) for seed in range(NUM_SEEDS)]
    points: list[Point] = []
    for name in runs[0]:
        gained, lost = (torch.tensor([run[name][i] for run in runs]) for i in range(2))
        wide, high = (
            float(shares.std()) / NUM_SEEDS**0.5 if NUM_SEEDS > 1 else None
            for shares in (gained, lost)
        )
        points.append(
            Point(panel=SOFTMAX, series=name, x=float(gained.mean()), predicted=None,
                  measured=float(lost.mean()), se=high, x_se=wide)
        )  # fmt: skip
    return points


def _one_transformer(lab: Lab, seed: int) -> dict[str, tuple[float, float]]:
    """Return (gained, lost) of each way to tune one transformer."""
    world, theta, pairs = lab.world, lab.theta, FEW + 1
    base = transformer.pretrain(
        world, lab.spec.norm, pairs, lab.generator(20, seed), PRETRAIN_STEPS
    )
    tuned = {
        name: transformer.tune(
            base, world, theta, trained, lab.generator(21, seed, number),
            num_steps=TUNE_STEPS, hold=hold, pairs=pairs,
        )
        for number, (name, trained, hold) in enumerate(
            [("full", "full", 0.0), ("value_only", "value_only", 0.0), ("full, held", "full", HOLD)]
        )
    }  # fmt: skip
    tuned[f"full, lambda {LAM:g}"] = transformer.blended(base, tuned["full"], LAM)
    before = _errors(base, lab)
    few_shot_worth = lab.spec.norm**2 + lab.spec.sigma2 - before[1]
    return {
        name: (
            (before[0] - after[0]) / (before[0] - lab.spec.sigma2),
            (after[1] - before[1]) / few_shot_worth,
        )
        for name, after in ((name, _errors(model, lab)) for name, model in tuned.items())
    }


def _errors(model: transformer.Regressor, lab: Lab) -> tuple[float, float]:
    """Return the target's error at zero shots, and that of unseen tasks at `FEW`."""
    size = min(8192, lab.spec.num_prompts)
    return (
        transformer.error(model, lab.world, lab.theta, 0, lab.generator(22), size)[0],
        transformer.error(model, lab.world, lab.spec.norm, FEW, lab.generator(23), size)[0],
    )

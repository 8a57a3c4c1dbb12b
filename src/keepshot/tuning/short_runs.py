"""Short runs that find a learning rate: from the untuned model, and undone bit for bit.

They are judged by the loss on held-out rows of the target plus, with more weight than in training,
the keep terms on prompts that they did not train on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from keepshot.errors import TrainingError
from keepshot.outputs import write_text
from keepshot.progress import Progress, Silent
from keepshot.tuning.adapters import detach_
from keepshot.tuning.batch import schedule
from keepshot.tuning.loop import Loop, run
from keepshot.tuning.method_specs import ProMoT, default_learning_rate
from keepshot.tuning.methods import prepare, seeded
from keepshot.tuning.stages import Work

FURTHEST = 3
"""Doublings or halvings of the method's default rate at most; what is found is no lower either."""
CAUTION = 5.0
"""What a nat of the keep terms counts beside one of the target's loss: a short run shows little of
what a long one loses."""
JUDGED_STEPS = 8
"""Turns of the keep terms' prompts, after those of the short run, that judge it."""


@dataclass(frozen=True)
class Trial:
    """One short run: the target's held-out loss and the weighted keep terms after it, in nats.

    Both are None where the run broke.
    """

    learning_rate: float
    target_loss: float | None
    keep_loss: float | None

    @property
    def total(self) -> float:
        """What is compared; infinite where the run broke."""
        if self.target_loss is None or self.keep_loss is None:
            return math.inf
        return self.target_loss + CAUTION * self.keep_loss


def remembered_rate(
    work: Work, steps: int, target_loss: Callable[[], float], progress: Progress
) -> tuple[float, str, tuple[Trial, ...]]:
    """Find a rate, or take what an interrupted start of the same run has found."""
    if work.state_dir is None:
        return find_rate(work, steps, target_loss, progress)
    place = rate_file(work.state_dir)
    recipe = work.recipe.fingerprint()
    if place.exists():
        kept = json.loads(place.read_text("utf-8"))
        if kept["recipe"] == recipe:
            return kept["rate"], kept["why"], tuple(Trial(**trial) for trial in kept["trials"])
    rate, why, trials = find_rate(work, steps, target_loss, progress)
    content = {"recipe": recipe, "rate": rate, "why": why, "trials": [asdict(t) for t in trials]}
    write_text(json.dumps(content), place)
    return rate, why, trials


def rate_file(state_dir: Path) -> Path:
    """Return where a rate is remembered until the run has ended, beside its resume states."""
    return state_dir.with_name(f"{state_dir.name}-rate.json")


def find_rate(
    work: Work, steps: int, target_loss: Callable[[], float], progress: Progress | None = None
) -> tuple[float, str, tuple[Trial, ...]]:
    """Find a learning rate by short runs from the untuned model, which is back afterwards.

    From the method's default it goes up and down in factors of two while the total falls, and takes
    half the best rate: what a short run can bear is too much for a long one. The lowest rate that
    it would try is taken whole, since further down the target is hardly learned.

    Args:
        work: the run; its method has one stage.
        steps: of each short run.
        target_loss: reads the held-out loss of the module as it is.
        progress: told of the short runs.

    Returns:
        The rate, why, and the short runs in the order in which they were made.
    """
    start = default_learning_rate(work.recipe.method)
    seen: dict[int, Trial] = {}

    def total(power: int) -> float:
        if power not in seen:
            (progress or Silent()).stage(f"short run at learning rate {start * 2.0**power:g}")
            seen[power] = _try(work, start * 2.0**power, steps, target_loss)
        return seen[power].total

    chosen = seen[lowest(total)]
    trials = tuple(seen.values())
    if chosen.target_loss is None:
        return start, "every short run broke, so the method's default is taken", trials
    rate = max(chosen.learning_rate / 2.0, start * 2.0**-FURTHEST)
    share = "half of " if rate < chosen.learning_rate else ""
    why = (
        f"{share}{chosen.learning_rate:g}, which was best of {len(seen)} rates after {steps} "
        f"steps (held-out loss {chosen.target_loss:.3f} plus {CAUTION:g} times "
        f"{chosen.keep_loss:.3f} of keep terms)"
    )
    return rate, why, trials


def lowest(total: Callable[[int], float]) -> int:
    """Return the power of two whose total is the lowest found; the start, 0, where none is lower.

    Down from the start as well as up: totals of short runs are noisy, and a first step up that
    gains little says nothing about what lies below.
    """
    ends = [0]
    for direction in (1, -1):
        power = 0
        while abs(power + direction) <= FURTHEST and total(power) > total(power + direction):
            power += direction
        ends.append(power)
    return min(ends, key=total)


def _try(work: Work, rate: float, steps: int, target_loss: Callable[[], float]) -> Trial:
    """Train a few steps and judge what comes out; the module is as it was afterwards."""
    recipe = work.recipe.model_copy(update={"learning_rate": rate, "steps": steps, "report_to": ()})
    assert not isinstance(recipe.method, ProMoT), "a method of one stage"
    prepared = prepare(recipe.method, work.module, recipe.seed)
    kept = [parameter.detach().clone() for parameter in prepared.parameters.values()]
    samples = schedule(work.sources, steps, recipe.seed)
    terms = work.terms(prepared)
    loop = Loop(recipe, prepared, samples, terms, work.head, None)
    try:
        with seeded(recipe.seed):
            run(loop, [], Silent())
        precision = torch.autocast(work.head.weight.device.type, torch.bfloat16, recipe.bf16)
        with torch.no_grad(), precision:
            held = [
                term.weight_at(0) * float(term(prepared.module, steps + number, work.head))
                for term in terms
                for number in range(JUDGED_STEPS)
            ]
            return Trial(rate, target_loss(), sum(held) / JUDGED_STEPS)
    except TrainingError:
        return Trial(rate, None, None)
    finally:
        with torch.no_grad():
            for parameter, before in zip(prepared.parameters.values(), kept, strict=True):
                parameter.copy_(before)
        detach_(work.module, merge=False)

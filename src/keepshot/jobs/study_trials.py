"""A moment of each kind of a study's work, timed, so that a plan can say what it would take."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from keepshot.jobs.study_worker import Worker, tokens_read
from keepshot.models.loading import LanguageModel
from keepshot.models.made import FromScratch
from keepshot.progress import Silent
from keepshot.scoring.engine import Engine
from keepshot.scoring.evaluate import measure
from keepshot.study.grid import Unit
from keepshot.tuning.from_scratch import train_from_scratch
from keepshot.tuning.method_specs import AnyMethod, ProMoT
from keepshot.tuning.train import Extra, train

CALIBRATION_TASKS, CALIBRATION_ITEMS, CALIBRATION_STEPS = 3, 4, 3


@dataclass(frozen=True)
class Pace:
    """Time of a token, or of a unit."""

    seconds: float
    processor_seconds: float
    """Of all processors together."""

    def times(self, tokens: float) -> Pace:
        """Return the time of so many."""
        return Pace(self.seconds * tokens, self.processor_seconds * tokens)

    def plus(self, other: Pace) -> Pace:
        """Return the sum of both."""
        return Pace(self.seconds + other.seconds, self.processor_seconds + other.processor_seconds)


NOTHING = Pace(0.0, 0.0)


class Amount(NamedTuple):
    """How much a unit is."""

    tokens: int
    steps: int = 0
    """Of training."""


@dataclass(frozen=True)
class Rates:
    """What a step takes whatever it reads, the optimiser's work above all, and what a token."""

    token: Pace
    step: Pace = NOTHING

    def of(self, amount: Amount) -> Pace:
        """Return the time of a unit."""
        return self.token.times(amount.tokens).plus(self.step.times(amount.steps))


def time_asking(worker: Worker, unit: Unit, model: LanguageModel) -> Rates | None:
    """Return the time of a token of asking the untuned model a few items; None without tasks."""
    whole = worker.plan(unit)
    if not whole.tasks:
        return None
    few = replace(whole, tasks=whole.tasks[:CALIBRATION_TASKS], limit=CALIBRATION_ITEMS)
    engine = Engine(model)
    began = time.process_time()
    found = measure(model, few, arm="trial", engine=engine)
    spent = Pace(found.cost.seconds, time.process_time() - began)
    return Rates(spent.times(1 / max(1, found.cost.tokens_prefilled)))


def time_tuning(worker: Worker, unit: Unit, load: Callable[[], LanguageModel]) -> Rates:
    """Return the rates of a few steps without keep terms, of whole batches and of single rows.

    Rows of another target are longer or shorter, so what a step takes for itself is told apart
    from what its tokens take.
    """
    whole = worker.ingredients(unit)[0].batch_size
    (long, tokens), (short, fewer) = (_time_steps(worker, unit, load(), n) for n in (whole, 1))
    share = 1 / max(1.0, tokens - fewer)
    token = Pace(
        max(0.0, long.seconds - short.seconds) * share,
        max(0.0, long.processor_seconds - short.processor_seconds) * share,
    )
    return Rates(token, short.plus(token.times(-fewer)))


def _time_steps(
    worker: Worker, unit: Unit, model: LanguageModel, batch_size: int
) -> tuple[Pace, float]:
    """Return the time of the quickest of a few steps, and the tokens of one.

    The first allocates the optimiser's state, and a machine that is busy for a moment makes
    others slow, so that their mean would be too much.
    """
    recipe, target, _, extra = worker.ingredients(unit)
    few = {
        "steps": CALIBRATION_STEPS + 1,
        "keep": (),
        "auto": None,
        "batch_size": batch_size,
        "accumulate": min(recipe.accumulate, batch_size),
        "method": _without_first_stage(recipe.method),
    }
    clock = _StepClock()
    began = train(
        recipe.model_copy(update=few), model, target.train, None,
        progress=clock, extra=Extra(extra.template),
    )  # fmt: skip
    del model
    gc.collect()
    steps = [
        (later[0] - earlier[0], later[1] - earlier[1])
        for earlier, later in itertools.pairwise(clock.at)
    ]
    quickest = Pace(min(wall for wall, _ in steps), min(spent for _, spent in steps))
    return quickest, tokens_read(began.sources, began.steps) / max(1, began.steps)


def _without_first_stage(method: AnyMethod) -> AnyMethod:
    """Return a method whose every step is one of those that change the model.

    ProMoT's first stage has cheaper steps, which a plan counts as if they were of the second.
    """
    if isinstance(method, ProMoT) and method.prompt == "trained":
        return method.model_copy(update={"prompt": "random"})
    return method


def time_training(made: FromScratch, tokens_a_step: int) -> Rates:
    """Return the rate of a few steps from scratch."""
    began, spent = time.perf_counter(), time.process_time()
    train_from_scratch(made.model_copy(update={"steps": CALIBRATION_STEPS}), Silent())
    spent_on = Pace(time.perf_counter() - began, time.process_time() - spent)
    return Rates(spent_on.times(1 / (CALIBRATION_STEPS * tokens_a_step)))


class _StepClock:
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.at: list[tuple[float, float]] = []

    def stage(self, title: str) -> None:
        """Ignore."""

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Note the time."""
        self.at.append((time.perf_counter(), time.process_time()))

    def note(self, text: str) -> None:
        """Ignore."""

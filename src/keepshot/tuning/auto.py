"""What `--keep auto` finds out by itself: a learning rate before training, lambda after it.

The rate comes from short runs on the run's own first batches, each undone bit for bit; they are
judged by the loss on held-out rows of the target and the keep terms on prompts that they did not
train on. Lambda stays 1 unless the guard finds few-shot ability lost at the end; then the change is
made smaller in memory until the guard is content. Nothing here sees a task that is measured.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from keepshot.errors import ConfigError
from keepshot.models.loading import LanguageModel
from keepshot.progress import Progress
from keepshot.tuning.batch import mean_loss
from keepshot.tuning.data import Encoded
from keepshot.tuning.guard import ICLGuard, NothingToWatch, Probe, Reading
from keepshot.tuning.lowering import Point, find_lambda
from keepshot.tuning.method_specs import prompt_tokens
from keepshot.tuning.recipe import Auto, Recipe
from keepshot.tuning.short_runs import Trial, rate_file, remembered_rate
from keepshot.tuning.stages import Done, Work, run_stages

ADAPTERS = ("lora", "dora", "rslora")
MOST_HELD_OUT = 48
"""Held-out rows that judge a short run, or a lambda."""


@dataclass(frozen=True)
class Decisions:
    """What was decided, why, and what was seen; part of the record and of the model card."""

    learning_rate: float
    why_learning_rate: str
    steps: int
    why_steps: str
    trials: tuple[Trial, ...]
    guard: tuple[Reading, ...]
    path: tuple[Point, ...]
    lam: float
    why_lambda: str
    seconds: float
    """Of all this, training itself left out."""


def run_auto(
    asked: Recipe,
    work: Work,
    model: LanguageModel,
    held_out: Encoded | None,
    progress: Progress,
) -> tuple[Done, Decisions]:
    """Run the stages with all that the recipe leaves to be found out.

    A method with a soft prompt has stages of its own: it gets the defaults, and no guard, since
    nothing but its own task is read under the prompt.

    Args:
        asked: the recipe as it was given.
        work: the same with defaults filled in.
        model: the untuned model, whose module trains.
        held_out: rows of the target that no short run trains on.
        progress: told of all of it.

    Raises:
        ConfigError: if no row is held out, or the model can do none of the guard's tasks.
    """
    auto = asked.auto
    assert auto is not None
    if held_out is None:
        raise ConfigError("auto: no row of the target is held out, so nothing can be chosen on it")
    began = time.perf_counter()
    few = held_out.samples[:MOST_HELD_OUT]

    def target_loss() -> float:
        return mean_loss(model, few)

    prompted = prompt_tokens(asked.method) > 0
    rate, trials = work.recipe.learning_rate or 0.0, ()
    if asked.learning_rate is not None:
        why = "given"
    elif prompted:
        why = "the method's default: short runs say nothing about a soft prompt"
    else:
        short = replace(work, sources=work.searched or work.sources)
        rate, why, trials = remembered_rate(short, auto.trial_steps, target_loss, progress)
    work = replace(work, recipe=work.recipe.model_copy(update={"learning_rate": rate}))
    guard = None if prompted else _guard(auto, work.recipe.steps or 1, model)
    start = None
    if asked.method.name not in ADAPTERS and not prompted:
        start = {name: p.detach().clone() for name, p in work.module.named_parameters()}
    spent = time.perf_counter() - began
    progress.stage(f"tuning at learning rate {rate:g}")
    done = run_stages(replace(work, guard=guard), progress)
    if work.state_dir is not None:
        rate_file(work.state_dir).unlink(missing_ok=True)
    began = time.perf_counter()
    lam, why_lambda, path = 1.0, "no guard watched: " + _why_no_guard(prompted), ()
    if guard is not None and done.failure is None:
        lam, why_lambda, path = find_lambda(
            done.prepared, start, guard, auto.lambdas,
            lambda: guard.read(model, work.recipe.steps or 1), target_loss,
        )  # fmt: skip
    readings = tuple(guard.readings) if guard else ()
    return done, Decisions(
        learning_rate=rate,
        why_learning_rate=why,
        steps=work.recipe.steps or 1,
        why_steps=_why_steps(asked, auto),
        trials=trials,
        guard=readings,
        path=path,
        lam=lam,
        why_lambda=why_lambda,
        seconds=spent + time.perf_counter() - began + sum(r.seconds for r in readings),
    )


def _why_steps(asked: Recipe, auto: Auto) -> str:
    if asked.steps is not None:
        return "given"
    return f"the more of {auto.least_steps} steps and {asked.epochs:g} passes over the data"


def _why_no_guard(prompted: bool) -> str:
    if prompted:
        return "nothing but its own task is read under a soft prompt"
    return "the untuned model is no better than chance on the guard's tasks"


def _guard(auto: Auto, steps: int, model: LanguageModel) -> ICLGuard | None:
    """Return a guard that only watches: what it sees at the end decides on lambda.

    None if the untuned model has no few-shot ability on the guard's tasks.
    """
    guard = ICLGuard(
        auto.guard_tasks,
        every=math.ceil(steps / 3),
        tolerance=auto.tolerance,
        probe=Probe(limit=auto.guard_items),
    )
    try:
        guard.refer_to(model)
    except NothingToWatch:
        return None
    return guard

"""A small few-shot probe during training, for anyone's Trainer: log it, warn, stop or roll back.

    from keepshot.tuning.guard import ICLGuard
    guard = ICLGuard(every=50, tolerance=0.05, action="stop")
    guard.watch(trainer)

The same questions under the same demonstrations are put to the model before training and every so
many steps, so that the comparison is paired. Few items are noisy: the guard acts only where the
loss is beyond the tolerance and its 95 % interval leaves out no loss at all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from keepshot.errors import ConfigError, TaskError
from keepshot.models.loading import LanguageModel
from keepshot.records import ItemResult
from keepshot.scoring.evaluate import Plan, measure
from keepshot.scoring.summary import summarise
from keepshot.tasks.task import Task
from keepshot.tuning.live import evaluating, live_model, named_tasks, unwrapped

logger = logging.getLogger(__name__)
Action = Literal["warn", "stop", "rollback"]
PROBE = "guard"
"""Five ways to rewrite names and sentences, made by code, which are in no suite that is measured;
both embedded models can do them from four examples."""


@dataclass(frozen=True)
class Probe:
    """How much is asked at a time."""

    shots: int = 4
    """Demonstrations."""
    limit: int = 16
    """Questions of each task, the first ones of its validation split (or else of its test)."""
    seeds: tuple[int, ...] = (0,)
    """Draws of demonstrations."""


@dataclass(frozen=True)
class Reading:
    """One probe: few-shot score, and its retention against the model before training."""

    step: int
    score: float
    retention: float
    ci95: tuple[float, float]
    num_items: int
    seconds: float

    def logs(self) -> dict[str, float]:
        """Return what is logged."""
        return {
            "icl/score": self.score,
            "icl/retention": self.retention,
            "icl/retention_low": self.ci95[0],
            "icl/retention_high": self.ci95[1],
            "icl/num_items": float(self.num_items),
            "icl/seconds": self.seconds,
        }


class NothingToWatch(ConfigError):
    """The untuned model is no better than chance on the guard's tasks."""


class ICLGuard(TrainerCallback):
    """Watches few-shot ability while a model trains.

    `watch(trainer)` adds it to a trainer; its readings then go through the trainer's log to every
    tracker. Added by `callbacks=[guard]` it does the same, but only the trainer's `log_history` has
    its readings, since a callback is not told which trainer it belongs to. It changes nothing in
    training: weights come out bit for bit as without it, unless it acts.

    Args:
        tasks: what is asked: suites, tasks or files by name, or `Task` objects; not what is tuned
            for. Tasks made of packages must be given as `Task` objects.
        every: steps between probes; there is one before the first step and one after the last.
        tolerance: share of few-shot ability that may be lost; .05 acts below a retention of .95.
        action: `warn` logs a warning; `stop` ends training as well; `rollback` puts the weights of
            the last good probe back and ends training. It keeps a copy of what trains in memory.
        probe: how much is asked.

    Raises:
        ConfigError: if `every` or `tolerance` cannot be.
        TaskError: if a task is unknown or cannot be used.
    """

    def __init__(
        self,
        tasks: str | Sequence[str | Task] = PROBE,
        every: int = 50,
        tolerance: float = 0.05,
        action: Action = "warn",
        probe: Probe | None = None,
    ) -> None:
        if every < 1:
            raise ConfigError(f"guard: every={every} is no number of steps; give 1 or more")
        if not 0 <= tolerance < 1:
            raise ConfigError(f"guard: tolerance={tolerance} is no share; give one from 0 to 1")
        if action not in ("warn", "stop", "rollback"):
            raise ConfigError(f"guard: action {action!r} is unknown; give warn, stop or rollback")
        self.every, self.tolerance, self.action = every, tolerance, action
        self.tasks = tuple(named_tasks(tasks))
        self.probe = probe or Probe()
        self.readings: list[Reading] = []
        self.acted_at: int | None = None
        """The step at which the guard stopped training, if it did."""
        self._before: list[ItemResult] = []
        self._reference: list[ItemResult] = []
        self._good: tuple[int, list[Tensor]] | None = None
        self._trainer: Any = None

    def watch(self, trainer: Any) -> None:
        """Add the guard to a trainer, and log through it."""
        self._trainer = trainer
        trainer.add_callback(self)

    def refer_to(self, model: LanguageModel) -> None:
        """Take a model's answers now, as what retention is against: after a resume too.

        Raises:
            NothingToWatch: if the model has no few-shot ability to watch.
        """
        self._reference = self._before = self._ask(model)
        self.read(model, 0)

    def read(self, model: LanguageModel, step: int) -> Reading:
        """Probe a model as it is now; nothing is logged or kept.

        Raises:
            ConfigError: if the model that it is compared with is no better than chance.
        """
        began = time.perf_counter()
        items = self._ask(model)
        if not self._before:
            self._before = items
        row = summarise([*self._before, *(replace(item, arm="now") for item in items)])[-1]
        if row.retention is None or row.retention_ci95 is None:
            names = ", ".join(task.name for task in self.tasks)
            raise NothingToWatch(
                f"guard: the model is no better than chance on {names} "
                f"at {self.probe.shots} shots, so there is nothing to watch; take easier tasks"
            )
        seconds = time.perf_counter() - began
        return Reading(step, row.icl, row.retention, row.retention_ci95, row.num_items, seconds)

    def minds(self, reading: Reading) -> bool:
        """Say whether more is lost than may be, and its interval leaves out no loss at all."""
        return reading.retention < 1 - self.tolerance and reading.ci95[1] < 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe the model before training.

        Raises:
            ConfigError: if the model has no few-shot ability to watch, is divided among processes,
                or comes without a tokenizer; or if the trainer, too, chooses the final weights.
        """
        if self.action == "rollback" and args.load_best_model_at_end:
            raise ConfigError(
                "guard: rollback and load_best_model_at_end both choose the weights that come out; "
                "leave one of them out"
            )
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise ConfigError(
                "guard: a model divided among processes (FSDP, DeepSpeed) cannot be probed; "
                "train without, or measure checkpoints with `keepshot measure`"
            )
        self.readings, self.acted_at, self._before = [], None, list(self._reference)
        if state.global_step > 0 and self._reference:
            self.readings = [_logged(row) for row in state.log_history if "icl/score" in row]
            return
        self._take(state, kwargs)
        if state.global_step > 0:
            logger.warning(
                "guard: training goes on at step %d, so retention is against the model there",
                state.global_step,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe every so many steps, and act."""
        if state.global_step % self.every == 0:
            self._check(state, control, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe what came out, if it was not: the trainer may have put its best weights back."""
        probed = self.readings[-1].step == state.global_step and not args.load_best_model_at_end
        if self.acted_at is None and not probed:
            self._check(state, control, kwargs)

    def _check(self, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        reading = self._take(state, kwargs)
        if not self.minds(reading):
            return
        low, high = reading.ci95
        logger.warning(
            "guard: few-shot retention is %.2f [%.2f, %.2f] at step %d (%d items), below %.2f",
            reading.retention, low, high, reading.step, reading.num_items, 1 - self.tolerance,
        )  # fmt: skip
        if self.action == "warn":
            return
        self.acted_at = reading.step
        control.should_training_stop = True
        if self.action == "rollback":
            self._roll_back(kwargs["model"])

    def _take(self, state: Any, kwargs: dict[str, Any]) -> Reading:
        """Probe, log, and keep a copy of the weights if they are good."""
        model = live_model(kwargs["model"], kwargs.get("processing_class"))
        reading = self.read(model, state.global_step)
        self.readings.append(reading)
        self._log(reading, state)
        if self.action == "rollback" and reading.retention >= 1 - self.tolerance:
            weights = [p.detach().cpu().clone() for p in _trained(kwargs["model"])]
            self._good = reading.step, weights
        return reading

    def _ask(self, model: LanguageModel) -> list[ItemResult]:
        items: list[ItemResult] = []
        with evaluating(model.module):
            for split in ("validation", "test"):
                wanted = split == "validation"
                tasks = tuple(task for task in self.tasks if bool(task.validation) == wanted)
                if tasks:
                    shots, seeds, limit = self.probe.shots, self.probe.seeds, self.probe.limit
                    plan = Plan(tasks, (shots,), seeds, split, limit)
                    items += measure(model, plan, arm="before").items
        if not items:
            raise TaskError("guard: no task is named, so there is nothing to probe")
        return items

    def _log(self, reading: Reading, state: Any) -> None:
        if self._trainer is None:
            state.log_history.append({**reading.logs(), "step": reading.step})
            return
        # A trainer's own `log` may add and clear what it gathers for its next row, and logging
        # takes back the wish to log that the trainer may have for this step.
        wished = self._trainer.control.should_log
        Trainer.log(self._trainer, reading.logs())
        self._trainer.control.should_log = wished

    def _roll_back(self, module: Any) -> None:
        assert self._good is not None, "the first probe is good"
        step, weights = self._good
        with torch.no_grad():
            for parameter, weight in zip(_trained(module), weights, strict=True):
                parameter.copy_(weight)
        logger.warning("guard: the weights of step %d are put back, and training ends", step)


def _logged(row: dict[str, float]) -> Reading:
    """Return the reading behind a row of the trainer's log."""
    low, high = row["icl/retention_low"], row["icl/retention_high"]
    return Reading(
        int(row["step"]), row["icl/score"], row["icl/retention"], (low, high),
        int(row["icl/num_items"]), row["icl/seconds"],
    )  # fmt: skip


def _trained(module: Any) -> list[Tensor]:
    return [p for p in unwrapped(module).parameters() if p.requires_grad]

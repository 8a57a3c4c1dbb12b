"""What a study would take: units, tokens, time and memory, before it is begun.

Tokens are counted by tokenising what would be read. Times are those of recorded units where some
are alike; where none is, a moment of each model's own work is timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from keepshot.assets import AssetStore
from keepshot.errors import UserError
from keepshot.jobs.study import Worker, grid_of, opened, tokens_read
from keepshot.models.loading import DTYPES, LanguageModel, outline
from keepshot.report.words import duration
from keepshot.scoring.engine import Engine
from keepshot.scoring.evaluate import Plan, ask, measure
from keepshot.scoring.prefix import build_trie
from keepshot.scoring.request import tokens_to_read
from keepshot.study.directory import StudyDirectory, UnitRecord
from keepshot.study.grid import MOST_UNITS, StudySpec, Unit
from keepshot.study.runner import Watch
from keepshot.tuning.keep import KL, FewShot
from keepshot.tuning.method_specs import LoRA, ProMoT, PromptTuning
from keepshot.tuning.mixture import branch
from keepshot.tuning.train import Extra, tokenise, train

CALIBRATION_TASKS, CALIBRATION_ITEMS, CALIBRATION_STEPS = 3, 4, 2
SHORT_RUNS = 3
"""Of the search for a learning rate, as a rule."""
PROCESS_BYTES = 700_000_000
"""Of Python with torch, transformers and one forward pass, besides weights; measured on Linux."""


@dataclass(frozen=True)
class Work:
    """Units that are alike."""

    what: str
    model: str
    units: int
    done: int
    tokens: int | None
    """Of one unit: prompts once shared, or training samples. None where the model cannot be had."""
    seconds: float | None
    """Of one unit."""
    source: str
    """Where the seconds are from: `recorded`, `calibrated`, or why there are none."""

    @property
    def left(self) -> int:
        """Units not recorded yet."""
        return self.units - self.done


@dataclass(frozen=True)
class StudyPlan:
    """All of a study's work, and what it needs at the most."""

    work: Sequence[Work]
    memory_bytes: int
    disk_bytes: int
    failed: int

    @property
    def seconds_left(self) -> float | None:
        """In one process; None if nothing is known of some of it."""
        waiting = [one for one in self.work if one.left]
        if any(one.seconds is None for one in waiting):
            return None
        return sum(one.left * (one.seconds or 0.0) for one in waiting)

    def table(self) -> list[dict[str, object]]:
        """Return a row for each kind of work."""
        return [
            {
                "model": one.model,
                "units": one.units,
                "done": one.done,
                "tokens each": "" if one.tokens is None else f"{one.tokens:,}",
                "each": "" if one.seconds is None else duration(one.seconds),
                "by": one.source,
                "work": one.what,
            }
            for one in self.work
        ]

    def lines(self) -> list[str]:
        """Return the sums, in words."""
        units, done = sum(w.units for w in self.work), sum(w.done for w in self.work)
        known = self.seconds_left
        spent = "unknown, since a model cannot be had" if known is None else duration(known)
        tokens = sum(w.left * (w.tokens or 0) for w in self.work)
        lines = [
            f"{units:,} units, {done:,} done ({self.failed} of them failed), {units - done:,} left",
            f"left in one process: {tokens:,} tokens, {spent}",
            f"memory about {self.memory_bytes / 1e9:.1f} GB, disk for tuned models about "
            f"{self.disk_bytes / 1e9:.1f} GB",
        ]
        if units > MOST_UNITS:
            lines.append(f"more than {MOST_UNITS:,} units: starting it needs --yes")
        return lines

    def as_dict(self) -> dict[str, object]:
        """Return all of it for `--json`."""
        return {
            "work": [{**w.__dict__, "left": w.left} for w in self.work],
            "seconds_left": self.seconds_left,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "failed": self.failed,
        }


def plan_study(
    spec: StudySpec, store: AssetStore, out_dir: Path, watch: Watch, *, calibrate: bool = True
) -> StudyPlan:
    """Return what a study would take, and what of it is done.

    Args:
        spec: the study.
        store: where assets are cached.
        out_dir: the study's directory; what is recorded there counts, nothing is written.
        watch: told of stages.
        calibrate: time a moment of each model's work where nothing is recorded.

    Raises:
        UserError: as starting the study would, apart from its size.
    """
    watch.stage("reading tasks")
    grid = grid_of(spec, store)
    directory = opened(spec, out_dir) if (out_dir / "fingerprint").exists() else None
    records = directory.records(grid.units) if directory else {}
    worker = Worker(spec, store, directory or StudyDirectory(out_dir), watch)
    worker.check(grid)
    groups: dict[tuple[str, str], list[Unit]] = {}
    for unit in grid.units.values():
        groups.setdefault((unit.subject.model, _kind(unit)), []).append(unit)
    estimator = _Estimator(worker, records, calibrate)
    found = [estimator.work(what, units) for (_, what), units in groups.items()]
    sizes = list(estimator.sizes.values())
    runs = sum(unit.kind == "tune" for unit in grid.units.values())
    largest = max(sizes, default=0) * DTYPES[spec.dtype].itemsize
    return StudyPlan(
        work=found,
        memory_bytes=estimator.memory_bytes,
        disk_bytes=largest * (runs if spec.keep_models else min(1, runs)),
        failed=sum(record.status == "failed" for record in records.values()),
    )


class _Estimator:
    """Counts tokens and knows paces, model by model."""

    def __init__(self, worker: Worker, records: Mapping[str, UnitRecord], calibrate: bool) -> None:
        self.worker, self.records, self.calibrate = worker, records, calibrate
        self.sizes: dict[str, int] = {}
        self.memory_bytes = 0
        self._light: dict[str, LanguageModel | str] = {}
        self._tokens: dict[object, int] = {}
        self._paces: dict[tuple[str, str], float | None] = {}

    def work(self, what: str, units: Sequence[Unit]) -> Work:
        """Return what units that are alike take."""
        first = units[0]
        label = first.subject.model
        done = [self.records[unit.id] for unit in units if unit.id in self.records]
        light = self._outline(label)
        if isinstance(light, str):
            return Work(what, label, len(units), len(done), None, None, light)
        self._count_memory(first, light)
        tokens = self._tokens_of(first, light)
        spent = [record.seconds for record in done if record.status == "done"]
        if spent:
            return Work(what, label, len(units), len(done), tokens, fmean(spent), "recorded")
        pace = self._pace(first, light)
        seconds = None if pace is None else pace * tokens
        source = "no calibration" if pace is None else "calibrated"
        return Work(what, label, len(units), len(done), tokens, seconds, source)

    def _outline(self, label: str) -> LanguageModel | str:
        if label not in self._light:
            self.worker.watch.stage(f"{label}: counting tokens")
            spec = self.worker.spec
            try:
                light = outline(
                    spec.model(label).reference, self.worker.store,
                    trust_remote_code=spec.trust_remote_code,
                )  # fmt: skip
                self.sizes[label] = light.num_parameters
                self._light[label] = light
            except UserError as error:
                self._light[label] = str(error).splitlines()[0]
        return self._light[label]

    def _tokens_of(self, unit: Unit, light: LanguageModel) -> int:
        subject = unit.subject
        if unit.kind == "measure":
            key: object = (subject.model, subject.target, unit.ask, unit.split)
            if key not in self._tokens:
                asked = _shared_tokens(light, self.worker.plan(unit))
                followed = self.worker.examiners.num_tokens(unit, light)
                self._tokens[key] = asked + followed
            return self._tokens[key]
        recipe, target, anchors, extra = self.worker.ingredients(unit)
        data = tokenise(recipe, light, target.train, anchors=anchors, extra=extra)
        resolved = recipe.resolved(len(data.encoded.samples))
        beside = [
            branch(term.name, data.prompts[term.name], term.prompts_per_step)
            for term in recipe.keep
            if isinstance(term, KL | FewShot)
        ]
        method = recipe.method
        steps = resolved.steps or 1
        if isinstance(method, ProMoT) and method.prompt == "trained":
            steps += method.prompt_steps
        if recipe.auto and recipe.learning_rate is None:
            steps += SHORT_RUNS * recipe.auto.trial_steps
        return tokens_read([*data.mixture.tree, *beside], steps)

    def _count_memory(self, unit: Unit, light: LanguageModel) -> None:
        """Count copies of the weights, as measured where Linux reports the peak.

        What trains as a whole has gradients, two moments, and copies while it is stepped.
        """
        copies = {"base": 1, "tuned": 1, "blend": 3}[unit.subject.stage]
        if unit.kind == "tune":
            method = self.worker.spec.recipes[str(unit.subject.recipe)].method
            copies = 1 if isinstance(method, LoRA | PromptTuning) else 6
        itemsize = DTYPES[self.worker.spec.dtype].itemsize
        needed = copies * light.num_parameters * itemsize + PROCESS_BYTES
        self.memory_bytes = max(self.memory_bytes, needed)

    def _pace(self, unit: Unit, light: LanguageModel) -> float | None:
        """Return seconds a token: of like work that is recorded, else of a moment's trial."""
        key = unit.subject.model, unit.kind
        if key not in self._paces:
            known = [
                r for r in self.records.values()
                if r.kind == unit.kind and r.status == "done" and r.tokens > 0
                and r.model is not None and r.model.num_parameters == light.num_parameters
            ]  # fmt: skip
            if known:
                self._paces[key] = sum(r.seconds for r in known) / sum(r.tokens for r in known)
            elif self.calibrate:
                self.worker.watch.stage(f"{unit.subject.model}: timing a moment of {unit.kind}")
                trial = _time_tuning if unit.kind == "tune" else _time_asking
                self._paces[key] = trial(self.worker, unit)
            else:
                self._paces[key] = None
        return self._paces[key]


def _kind(unit: Unit) -> str:
    subject = unit.subject
    if unit.kind == "tune":
        return f"tune {subject.recipe} on {subject.target}"
    about = f" on {subject.target}" if subject.target else ""
    return f"ask {subject.stage}{about}: {unit.ask} ({unit.split})"


def _shared_tokens(model: LanguageModel, plan: Plan) -> int:
    requests = {request for question in ask(model, plan) for request in question.requests}
    return build_trie([tokens_to_read(request) for request in requests]).num_tokens


def _time_asking(worker: Worker, unit: Unit) -> float | None:
    """Return seconds a token of asking the untuned model a few items; None without tasks."""
    model = worker.load(worker.spec.model(unit.subject.model).reference)
    whole = worker.plan(unit)
    if not whole.tasks:
        return None
    few = replace(whole, tasks=whole.tasks[:CALIBRATION_TASKS], limit=CALIBRATION_ITEMS)
    found = measure(model, few, arm="trial", engine=Engine(model))
    return found.cost.seconds / max(1, found.cost.tokens_prefilled)


def _time_tuning(worker: Worker, unit: Unit) -> float:
    """Return seconds a token of a few steps, the first of which is not counted."""
    recipe, target, anchors, extra = worker.ingredients(unit)
    model = worker.load(recipe.model)
    short = recipe.model_copy(update={"steps": CALIBRATION_STEPS + 1, "auto": None})
    clock = _StepClock()
    began = train(
        short, model, target.train, None,
        anchors=anchors, progress=clock, extra=Extra(extra.template, extra.general),
    )  # fmt: skip
    del model
    gc.collect()
    steps = [later - earlier for earlier, later in zip(clock.at, clock.at[1:], strict=False)]
    return fmean(steps) * (CALIBRATION_STEPS + 1) / max(1, tokens_read(began.sources, began.steps))


class _StepClock:
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def stage(self, title: str) -> None:
        """Ignore."""

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Note the time."""
        self.at.append(time.perf_counter())

    def note(self, text: str) -> None:
        """Ignore."""

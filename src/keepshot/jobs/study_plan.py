"""What a study would take: units, tokens, time and memory, before it is begun.

Tokens are counted by tokenising what would be read. Times are those of recorded units where some
are alike; where none is, a moment of each model's own work is timed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from keepshot.assets import AssetStore
from keepshot.errors import UserError
from keepshot.jobs.study import Running, check_running, grid_of, opened
from keepshot.jobs.study_trials import (
    Amount,
    Pace,
    Rates,
    time_asking,
    time_training,
    time_tuning,
)
from keepshot.jobs.study_worker import Worker, tokens_read
from keepshot.jobs.study_writing import num_tokens
from keepshot.models.loading import DTYPES, LanguageModel, outline
from keepshot.models.made import FromScratch
from keepshot.report.words import duration
from keepshot.scoring.evaluate import Plan, ask
from keepshot.scoring.prefix import build_trie
from keepshot.scoring.request import tokens_to_read
from keepshot.study.costs import Recorded, recorded
from keepshot.study.directory import MARK, StudyDirectory, UnitRecord
from keepshot.study.grid import MOST_UNITS, Grid, Unit, tasks_of
from keepshot.study.runner import Watch
from keepshot.study.spec import StudiedModel, StudySpec
from keepshot.tuning.from_scratch import lists_of_examples, untrained
from keepshot.tuning.keep import KL, FewShot
from keepshot.tuning.method_specs import Full, ProMoT, prompt_tokens
from keepshot.tuning.mixture import branch
from keepshot.tuning.train import tokenise

ADAPTING = ("lora", "dora", "rslora", "prompt-tuning")
"""Methods that leave the model's own weights as they are."""
DEGRADING_LOADS = 4.0
"""How much longer than loading a model it takes to load, harm, write and digest it."""
SHORT_RUNS = 3
"""Of the search for a learning rate, as a rule."""
ACTIVATIONS, LOGITS = 16, 3
"""Values that a step of training holds for a token: in a block, as multiples of its width, and
after the head, as multiples of the vocabulary. On SmolLM2 in float32, with 159, 317 and 945
tokens a step, this gives 4.2, 4.5 and 5.5 GB, and the peaks measured are 4.2, 4.4 and 5.5 GB."""
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
    kind: str = "measure"
    calibrated: Pace | None = None
    """What a moment's trial says of one unit, where some are recorded and others needed a trial."""
    recorded: Recorded | None = None

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
        return [*lines, *self.beside_records()]

    def beside_records(self) -> list[str]:
        """Return how the plan compares with what is recorded, kind by kind, in words."""
        lines: list[str] = []
        for kind in ("make", "tune", "measure"):
            alike = [w for w in self.work if w.kind == kind and w.recorded and w.tokens]
            timed = [w for w in alike if w.calibrated is not None]
            if not alike:
                continue
            units = sum(w.recorded.units for w in alike if w.recorded)
            tokens = sum((w.tokens or 0) * w.recorded.units for w in alike if w.recorded)
            read = sum(w.recorded.tokens * w.recorded.units for w in alike if w.recorded)
            words = (
                f"{kind}: planned / recorded of {units} units: tokens {tokens / max(1, read):.2f}"
            )
            lines.append(words + (f", {_times_beside(timed)}" if timed else ""))
        peaks = [w.recorded.peak_bytes or 0 for w in self.work if w.recorded]
        if any(peaks):
            lines.append(
                f"memory: planned {self.memory_bytes / 1e9:.1f} GB for the largest unit, recorded "
                f"at most {max(peaks) / 1e9:.1f} GB"
            )
        return lines

    def as_dict(self) -> dict[str, object]:
        """Return all of it for `--json`."""
        return {
            "work": [{**asdict(w), "left": w.left} for w in self.work],
            "seconds_left": self.seconds_left,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "failed": self.failed,
        }


def plan_study(
    spec: StudySpec,
    store: AssetStore,
    out_dir: Path,
    watch: Watch,
    running: Running,
    *,
    calibrate: bool = True,
) -> StudyPlan:
    """Return what a study would take, and what of it is done.

    Args:
        spec: the study.
        store: where assets are cached.
        out_dir: the study's directory; what is recorded there counts, nothing is written.
        watch: told of stages.
        running: how it would be started.
        calibrate: time a moment of each model's work where nothing is recorded.

    Raises:
        UserError: as starting the study would, apart from its size.
    """
    check_running(running)
    directory = _begun(spec, out_dir, running)
    watch.stage("reading tasks")
    grid = grid_of(spec, store)
    records = directory.records(grid.units) if directory else {}
    if running.retry:
        records = {unit: record for unit, record in records.items() if record.status != "failed"}
    worker = Worker(spec, store, directory or StudyDirectory(out_dir), watch)
    worker.check(grid)
    like = {model.label: model.like for model in spec.models}
    groups: dict[tuple[str, str], list[Unit]] = {}
    for unit in grid.units.values():
        groups.setdefault((like[unit.subject.model], _kind(unit)), []).append(unit)
    estimator = _Estimator(worker, grid, records, calibrate)
    # What is recorded comes last: it is timed by nothing but trials that others needed.
    order = sorted(groups, key=lambda key: any(unit.id in records for unit in groups[key]))
    made = {key: estimator.work(key[1], groups[key]) for key in order}
    found = [made[key] for key in groups]
    sizes = list(estimator.sizes.values())
    kinds = [unit.kind for unit in grid.units.values()]
    runs = kinds.count("tune")
    largest = max(sizes, default=0) * DTYPES[spec.dtype].itemsize
    # A model that was made lies beside those tuned from it.
    once = min(1, runs) + min(1, kinds.count("make"))
    kept = runs + kinds.count("make")
    return StudyPlan(
        work=found,
        memory_bytes=estimator.memory_bytes,
        disk_bytes=largest * (kept if spec.keep_models else once),
        failed=sum(record.status == "failed" for record in records.values()),
    )


def _begun(spec: StudySpec, out_dir: Path, running: Running) -> StudyDirectory | None:
    """Return the directory of a study that was begun; None where one can begin."""
    if not (out_dir / MARK).exists():
        StudyDirectory(out_dir).check_place(overwrite=running.overwrite)
        return None
    return StudyDirectory(out_dir) if running.overwrite else opened(spec, out_dir)


class _Estimator:
    """Counts tokens and knows paces, model by model."""

    def __init__(
        self, worker: Worker, grid: Grid, records: Mapping[str, UnitRecord], calibrate: bool
    ) -> None:
        self.worker, self.calibrate = worker, calibrate
        self.units, self.records = grid.units, records
        self.sizes: dict[str, int] = {}
        self.memory_bytes = 0
        self._light: dict[str, LanguageModel | str] = {}
        self._amounts: dict[object, Amount] = {}
        self._trials: dict[tuple[str, str, bool], Rates | None] = {}
        self._live: tuple[str, LanguageModel] | None = None

    def work(self, what: str, units: Sequence[Unit]) -> Work:
        """Return what units that are alike take."""
        first = units[0]
        label = self._like(first)
        done = [self.records[unit.id] for unit in units if unit.id in self.records]
        light = self._outline(first)
        if isinstance(light, str):
            return Work(what, label, len(units), len(done), None, None, light)
        # Models of one structure may be trained for different times.
        amounts = [self._amount(unit, light) for unit in units]
        amount = Amount(*(round(fmean(each)) for each in zip(*amounts, strict=True)))
        tokens = amount.tokens
        self._count_memory(first, light, amount)
        plain = Work(what, label, len(units), len(done), tokens, None, "recorded", first.kind)
        studied = self.worker.spec.model(first.subject.model)
        degraded = first.kind == "make" and studied.degrade is not None
        found = recorded(done)
        if found is not None:
            trial = None if degraded else self._trials.get(self._tried_as(first))
            calibrated = trial and trial.of(amount)
            return replace(plain, seconds=found.seconds, calibrated=calibrated, recorded=found)
        if degraded:
            seconds = self._degrading_seconds(studied)
        else:
            seconds = self._seconds(first, amount, light)
        source = "no calibration" if seconds is None else "calibrated"
        return replace(plain, seconds=seconds, source=source)

    def _like(self, unit: Unit) -> str:
        return self.worker.spec.model(unit.subject.model).like

    def _reads(self, unit: Unit) -> str:
        return self.worker.spec.model(unit.subject.model).reads

    def _outline(self, unit: Unit) -> LanguageModel | str:
        """Return a model of that structure without its weights, or why there is none."""
        label = self._like(unit)
        if label not in self._light:
            self.worker.watch.stage(f"{label}: counting tokens")
            spec = self.worker.spec
            studied = spec.model(unit.subject.model)
            try:
                if studied.from_scratch is not None:
                    light = untrained(studied.from_scratch)
                else:
                    light = outline(
                        studied.reference, self.worker.store,
                        trust_remote_code=spec.trust_remote_code,
                    )  # fmt: skip
                self.sizes[label] = light.num_parameters
                self._light[label] = light
            except UserError as error:
                self._light[label] = str(error).splitlines()[0]
        return self._light[label]

    def _amount(self, unit: Unit, light: LanguageModel) -> Amount:
        subject = unit.subject
        if unit.kind == "make":
            made = self.worker.spec.model(subject.model).from_scratch
            each = self._tokens_a_step(made, light) if made else 0
            return Amount(made.steps * each if made else 0)
        if unit.kind == "measure":
            tasks = tuple(tasks_of(self.worker.spec, unit))
            form = self.worker.samples(unit) if unit.settings else None
            key: object = (self._reads(unit), tasks, unit.ask, unit.split, form)
            if key not in self._amounts:
                asked = _asked_tokens(self.worker, unit, light)
                followed = 0 if form else self.worker.examiners.num_tokens(unit, light)
                self._amounts[key] = Amount(asked + followed)
            return self._amounts[key]
        # Rate, seed and most methods change nothing of what is read, but what `auto` searches.
        recipe = self.worker.spec.recipes[str(subject.recipe)]
        method = recipe.method if prompt_tokens(recipe.method) else Full()
        rate = recipe.learning_rate if recipe.auto else None
        read = recipe.model_copy(update={"learning_rate": rate, "seed": 0, "method": method})
        key = (self._reads(unit), subject.target, read.fingerprint())
        if key not in self._amounts:
            self._amounts[key] = self._amount_of_tuning(unit, light)
        return self._amounts[key]

    def _tokens_a_step(self, made: FromScratch, light: LanguageModel) -> int:
        key = (made.batch_size, made.shots, made.instructed)
        if key not in self._amounts:
            batch = lists_of_examples(light, made, np.random.default_rng(0))
            self._amounts[key] = Amount(sum(map(len, batch)))
        return self._amounts[key].tokens

    def _amount_of_tuning(self, unit: Unit, light: LanguageModel) -> Amount:
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
        return Amount(tokens_read([*data.mixture.tree, *beside], steps), steps)

    def _count_memory(self, unit: Unit, light: LanguageModel, amount: Amount) -> None:
        """Count copies of the weights, and what a step holds, as measured by the system's peak.

        What trains as a whole has gradients, two moments, and copies while it is stepped. A token
        of a step has activations in every block, and logits with a copy and a gradient.
        """
        copies = {"base": 1, "tuned": 1, "blend": 3}[unit.subject.stage]
        copies += unit.holds_two and copies == 1
        if unit.kind == "tune":
            method = self.worker.spec.recipes[str(unit.subject.recipe)].method
            copies = 1 if method.name in ADAPTING else 6
        itemsize = DTYPES[self.worker.spec.dtype].itemsize
        held = 0.0
        if amount.steps:
            config: Any = light.module.config
            text = config.get_text_config()
            blocks = ACTIVATIONS * text.hidden_size * text.num_hidden_layers
            held = amount.tokens / amount.steps * (blocks + LOGITS * text.vocab_size)
        needed = round((copies * light.num_parameters + held) * itemsize) + PROCESS_BYTES
        self.memory_bytes = max(self.memory_bytes, needed)

    def _seconds(self, unit: Unit, amount: Amount, light: LanguageModel) -> float | None:
        """Return the seconds of a unit: by like work that is recorded, else by a moment's trial.

        Tuning steps all weights, or adapters alone, which differ severalfold in a small model;
        and rows of another target are so much longer or shorter that its tokens say little.
        """
        known = [
            record for identity, record in self.records.items()
            if record.kind == unit.kind and record.status == "done" and record.tokens > 0
            and record.model is not None and record.model.num_parameters == light.num_parameters
            and self._resembles(unit, self.units[identity])
        ]  # fmt: skip
        if known:
            tokens = sum(record.tokens for record in known)
            return amount.tokens * sum(record.seconds for record in known) / tokens
        trial = self._trial(unit, light)
        return None if trial is None else trial.of(amount).seconds

    def _resembles(self, unit: Unit, other: Unit) -> bool:
        return self._adapts(unit) == self._adapts(other) and (
            unit.kind != "tune" or unit.subject.target == other.subject.target
        )

    def _trial(self, unit: Unit, light: LanguageModel) -> Rates | None:
        """Return the rates by a moment's trial; None without calibration."""
        key = self._tried_as(unit)
        if key not in self._trials:
            self._trials[key] = None
            if self.calibrate:
                self.worker.watch.stage(f"{key[0]}: timing a moment of {unit.kind}")
                self._trials[key] = self._tried(unit, light)
        return self._trials[key]

    def _tried_as(self, unit: Unit) -> tuple[str, str, bool]:
        """Return what one trial stands for: of any target, since rates tell steps from tokens."""
        return self._like(unit), unit.kind, self._adapts(unit)

    def _adapts(self, unit: Unit) -> bool:
        recipe = unit.subject.recipe if unit.kind == "tune" else None
        return recipe is not None and self.worker.spec.recipes[recipe].method.name in ADAPTING

    def _tried(self, unit: Unit, light: LanguageModel) -> Rates | None:
        studied = self.worker.spec.model(unit.subject.model)
        if unit.kind == "make" and studied.from_scratch is not None:
            tokens = self._tokens_a_step(studied.from_scratch, light)
            return time_training(studied.from_scratch, tokens)
        if unit.kind != "tune":
            return time_asking(self.worker, unit, self._live_model(studied))

        def fresh() -> LanguageModel:
            model = self._live_model(studied)
            self._live = None  # tuning changes it
            return model

        return time_tuning(self.worker, unit, fresh)

    def _live_model(self, studied: StudiedModel) -> LanguageModel:
        """Return a model of that structure with weights, kept for the next trial of it."""
        if self._live is None or self._live[0] != studied.like:
            self._live = None
            made = studied.from_scratch
            model = untrained(made) if made else self.worker.load(studied.reference)
            self._live = studied.like, model
        return self._live[1]

    def _degrading_seconds(self, studied: StudiedModel) -> float | None:
        """Return the time to load, harm and write a model, as a multiple of loading it."""
        if not self.calibrate:
            return None
        began = time.perf_counter()
        self._live = None
        self._live_model(studied)
        return DEGRADING_LOADS * (time.perf_counter() - began)


def _kind(unit: Unit) -> str:
    subject = unit.subject
    if unit.kind == "make":
        return "make"
    if unit.kind == "tune":
        return f"tune {subject.recipe} on {subject.target}"
    about = f" on {subject.target}" if subject.target else ""
    return f"ask {subject.stage}{about}: {unit.asked}"


def _asked_tokens(worker: Worker, unit: Unit, model: LanguageModel) -> int:
    plan = worker.plan(unit)
    if unit.settings:
        return num_tokens(model, plan, worker.samples(unit), unit.settings)
    return _shared_tokens(model, plan)


def _shared_tokens(model: LanguageModel, plan: Plan) -> int:
    requests = {request for question in ask(model, plan) for request in question.requests}
    return build_trie([tokens_to_read(request) for request in requests]).num_tokens


def _times_beside(timed: Sequence[Work]) -> str:
    """Return the ratio of calibrated to recorded time, of processors where all was counted."""
    counted = [w for w in timed if w.recorded and w.recorded.processor_seconds is not None]
    planned = spent = 0.0
    for one in counted or timed:
        if one.calibrated is None or one.recorded is None:
            continue
        pair = one.calibrated.seconds, one.recorded.seconds
        if counted:
            pair = one.calibrated.processor_seconds, one.recorded.processor_seconds or 0.0
        planned += pair[0] * one.recorded.units
        spent += pair[1] * one.recorded.units
    return f"{'processor seconds' if counted else 'seconds'} {planned / max(1e-9, spent):.2f}"

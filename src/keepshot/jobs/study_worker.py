"""What the units of a study do: make a model, tune it, ask it, with models held in memory."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from keepshot.assets import AssetStore
from keepshot.blending.sweep import sweep
from keepshot.errors import ConfigError, TaskError
from keepshot.jobs.ledger import Ledger, model_record
from keepshot.jobs.making import make
from keepshot.jobs.measure import check_shots, plan_for, read_tasks, template_named
from keepshot.jobs.separation import check_apart, check_rules_apart, check_target_apart
from keepshot.jobs.specs import Measuring
from keepshot.jobs.study_following import Examiners
from keepshot.jobs.study_writing import answer, form_for, write
from keepshot.jobs.target import load_target
from keepshot.jobs.tune import VALIDATION_SHARE, anchor_tasks, general_rows
from keepshot.models.loading import LanguageModel, load
from keepshot.progress import Silent
from keepshot.records import Cost, InstructionRow, ItemResult
from keepshot.scoring.evaluate import Plan
from keepshot.scoring.similarity import Embed, embedder, judge_by_likeness
from keepshot.study.directory import StudyDirectory
from keepshot.study.grid import Grid, Unit, names_in, tasks_of
from keepshot.study.runner import Outcome, Watch
from keepshot.study.spec import StudySpec
from keepshot.tasks.source import Row
from keepshot.tasks.task import Task, item_id
from keepshot.tasks.variants import varied
from keepshot.tuning.anchors import examples_of
from keepshot.tuning.data import hold_out
from keepshot.tuning.drift import Drift, few_shot_prompts, questions
from keepshot.tuning.guard import PROBE
from keepshot.tuning.live import named_tasks
from keepshot.tuning.mixture import Branch
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.samplegen import Samples
from keepshot.tuning.tokenised import learned_rows
from keepshot.tuning.train import Extra, train


class Worker:
    """Does units one after the other, holding models in memory from one to the next."""

    def __init__(
        self, spec: StudySpec, store: AssetStore, directory: StudyDirectory, watch: Watch
    ) -> None:
        self.spec, self.store, self.directory, self.watch = spec, store, directory, watch
        self._tasks: dict[str, Task] = {}
        self._base: tuple[str, LanguageModel] | None = None
        self._tuned: tuple[str, LanguageModel] | None = None
        self._embed: tuple[str, Embed] | None = None
        self._ledger = Ledger(None, _Steps(watch))
        self.examiners = Examiners(spec, store)
        self._loading = 0.0

    # -- tasks -----------------------------------------------------------------------------

    def check(self, grid: Grid) -> None:
        """Build every task and read all data, and see that what is asked was not trained on.

        Raises:
            UserError: if something is missing or does not fit.
        """
        asked, _ = names_in(self.spec)
        wanted = {
            (str(unit.ask), name)
            for unit in grid.units.values()
            if unit.kind == "measure"
            for name in tasks_of(self.spec, unit)
        }
        for ask_name, name in sorted(wanted):
            ask = self.spec.asks[ask_name]
            if ask.template is not None:
                template_named(ask.template)
            check_shots([self._task(name)], ask.all_shots)
        self._check_settings(grid)
        measured = [self._task(name) for name in asked if name not in self.spec.targets]
        trained: dict[str, Sequence[Row]] = {}
        for name, recipe in self.spec.recipes.items():
            anchors = anchor_tasks(recipe, self.store)
            check_rules_apart(measured, anchors)
            for task in anchors:
                trained[f"anchor task {task.name!r}"] = examples_of(task)
            trained[f"recipe {name!r}: general data"] = general_rows(recipe, self.store)
        check_apart(measured, trained)
        for target in self.spec.targets:
            check_target_apart(measured, self._task(target))

    def _check_settings(self, grid: Grid) -> None:
        """See that tasks can be asked in the variants and forms that are wanted, and taught so."""
        seen: set[tuple[str | None, ...]] = set()
        for unit in grid.units.values():
            subject = unit.subject
            form = self.samples(unit) if unit.settings else None
            key = unit.kind, unit.ask, subject.target, form, unit.ask or subject.recipe
            if key in seen:
                continue
            seen.add(key)
            if unit.kind == "measure":
                ask, plan = self.spec.asks[str(unit.ask)], self.plan(unit)
                check_shots(plan.tasks if ask.is_varied else (), ask.all_shots)
                if form is not None:
                    for task in plan.tasks:
                        form_for(task, form)
            elif unit.kind == "tune":
                recipe = self.spec.recipes[str(subject.recipe)]
                task = self._task(str(subject.target))
                learned_rows(recipe, task.train, task.train, task.template, task.name)

    def _task(self, name: str) -> Task:
        if name not in self._tasks:
            if name in self.spec.targets:
                self._tasks[name] = load_target(name, self.store)
            else:
                asks = self.spec.asks.values()
                shots = max(max(ask.all_shots, default=0) for ask in asks)
                validation = any("validation" in ask.splits for ask in asks)
                measuring = Measuring(tasks=(name,), shots=(shots,))
                (self._tasks[name],) = read_tasks(measuring, self.store, validation=validation)
        return self._tasks[name]

    def plan(self, unit: Unit) -> Plan:
        """Return what the evaluator runs for a measurement."""
        ask = self.spec.asks[str(unit.ask)]
        target = unit.subject.target
        tasks = [self._task(name) for name in tasks_of(self.spec, unit)]
        tasks = [varied(task, ask.wording, ask.demonstrations, tasks) for task in tasks]
        if ask.template is not None:
            template = template_named(ask.template)
            tasks = [replace(task, template=template) for task in tasks]
        if ask.similarity is not None:
            tasks = [answered_freely(task) for task in tasks]
        measuring = Measuring(shots=ask.all_shots or (0,), seeds=ask.seeds, limit=ask.limit)
        return plan_for(
            measuring,
            tasks,
            split=unit.split,
            first_seed=self.spec.seed,
            tuned_labels=self._task(target).labels if target else frozenset[str](),
        )

    # -- units -----------------------------------------------------------------------------

    def perform(self, unit: Unit) -> Outcome:
        """Do one unit."""
        self._loading = 0.0
        match unit.kind:
            case "make":
                return self._make(unit)
            case "tune":
                return self._tune(unit)
            case _:
                return self._measure(unit)

    def ingredients(self, unit: Unit) -> tuple[Recipe, Task, list[Task], Extra]:
        """Return a tuning's recipe, target, anchors, and what else it reads."""
        reference = self.reference(unit)
        recipe = self.spec.recipe_of(unit.subject, reference)
        target = self._task(str(unit.subject.target))
        state_dir = self.directory.model(f".{unit.id}.state")
        general = general_rows(recipe, self.store)
        extra = Extra(
            template=target.template, general=general, learn_held_out=True, state_dir=state_dir
        )  # fmt: skip
        return recipe, target, anchor_tasks(recipe, self.store), extra

    def _make(self, unit: Unit) -> Outcome:
        self._base = self._tuned = None
        studied = self.spec.model(unit.subject.model)
        found = make(studied, self.directory.model(unit.id), self.load, self.watch)
        return Outcome(
            model=found.model,
            loading_seconds=self._loading,
            work_seconds=found.seconds,
            tokens=found.tokens,
        )

    def _tune(self, unit: Unit) -> Outcome:
        recipe, target, anchors, extra = self.ingredients(unit)
        model = self._base_model(unit)
        self._base = None  # tuning changes it in place
        untuned = model_record(model)
        began = time.perf_counter()
        drifts = self._drifts(model, target)
        out_dir = self.directory.model(unit.id)
        rows, held_out = target.train, ()
        if recipe.auto:
            # As for a user's file: what is decided on is taken from the rows to train on.
            rows, held_out = hold_out(target.train, share=VALIDATION_SHARE, seed=recipe.seed)
        record = train(
            recipe, model, rows, out_dir,
            anchors=anchors, validation=held_out, progress=self.watch, extra=extra,
        )  # fmt: skip
        moved = {name: drift.read(model) for name, drift in drifts.items()}
        training = record.training_record(str(unit.subject.recipe))
        return Outcome(
            model=untuned,
            training=training.model_copy(update={"divergence": moved}),
            loading_seconds=self._loading,
            work_seconds=time.perf_counter() - began,
            tokens=tokens_read(record.sources, record.steps),
        )

    def _drifts(self, model: LanguageModel, target: Task) -> dict[str, Drift]:
        """Return what the untuned model says to prompts of unseen tasks, and to the target's."""
        prompts = {"target": questions(model, target)}
        # Where a context is too short for examples there is nothing to hold against.
        with contextlib.suppress(ConfigError):
            prompts["few_shot"] = few_shot_prompts(model, named_tasks(PROBE))
        return {name: Drift(model, listed) for name, listed in prompts.items() if listed}

    def _measure(self, unit: Unit) -> Outcome:
        if unit.settings:
            return self._measure_written(unit)
        plan, subject = self.plan(unit), unit.subject
        # A point of the path is asked in the words of the model at its end.
        tuned = self._tuned_model(unit) if subject.lam is not None else None
        costs: list[Cost] = []

        def ask(model: LanguageModel) -> tuple[list[ItemResult], list[InstructionRow] | None]:
            engine = self._ledger.engine(model)
            costs.append(engine.cost)
            plans = [plan] if plan.tasks else []
            rows = self._ledger.measured(unit.id, model, plans, arm=subject.label, lam=subject.lam)
            followed = self.examiners.examine(
                unit, model, engine, chat=tuned, progress=self._ledger.progress.update
            )
            costs.append(engine.cost)
            return rows, followed

        if subject.lam is not None and tuned is not None:
            model = self._base_model(unit)
            state = tuned.module.state_dict()
            [(_, found)] = sweep(model, state, [subject.lam], lambda _: ask(model))
        else:
            model = self._base_model(unit) if unit.needs is None else self._tuned_model(unit)
            found = ask(model)
        (items, instructions), (before, after) = found, costs
        spent = after.since(before)
        return Outcome(
            items=self._judged(unit, plan, items),
            instructions=instructions,
            model=model_record(model),
            loading_seconds=self._loading,
            work_seconds=spent.seconds,
            tokens=spent.tokens_prefilled,
            task_versions={task.name: task.version for task in plan.tasks},
        )

    def _measure_written(self, unit: Unit) -> Outcome:
        """Let the tuned model write demonstrations, and it or its base answer after them."""
        plan, longest = self.plan(unit), self.spec.asks[str(unit.ask)].written_tokens
        tuned = self._tuned_model(unit)
        base = self._base_model(unit) if unit.holds_two else tuned
        engine, progress = self._ledger.engine(tuned), self._ledger.progress.update
        before = engine.cost
        drafts = write(engine, plan, self.samples(unit), longest, progress)
        rows: list[ItemResult] = []
        spent: list[Cost] = []
        for setting in unit.settings:
            if setting == "pipeline":
                spent.append(engine.cost.since(before))
                engine = self._ledger.engine(base)
                before = engine.cost
            rows += answer(engine, plan, drafts, setting, arm=unit.subject.label, progress=progress)
        spent.append(engine.cost.since(before))
        written = sum(len(tuned.encode_plain(draft.written)) for draft in drafts)
        return Outcome(
            items=rows,
            model=model_record(tuned),
            loading_seconds=self._loading,
            work_seconds=sum(cost.seconds for cost in spent),
            tokens=written + sum(cost.tokens_prefilled for cost in spent),
            task_versions={task.name: task.version for task in plan.tasks},
        )

    def _judged(self, unit: Unit, plan: Plan, items: list[ItemResult]) -> list[ItemResult]:
        """Return free answers as the choices they are most like, where an ask says so."""
        reference = self.spec.asks[str(unit.ask)].similarity
        if reference is None:
            return items
        if self._embed is None or self._embed[0] != reference:
            self._embed = reference, embedder(self.load(reference))
        choices = {
            (task.name, item_id(example)): example.choices
            for task in plan.tasks
            for example in getattr(task, plan.split)
            if example.choices
        }
        return judge_by_likeness(items, choices, self._embed[1])

    def samples(self, unit: Unit) -> Samples:
        """Return the form of the samples that a unit's model learned."""
        return self.spec.recipes[str(unit.subject.recipe)].samples

    # -- models ----------------------------------------------------------------------------

    def let_go(self) -> None:
        """Hold no model any more."""
        self._base = self._tuned = None
        self._ledger = Ledger(None, _Steps(self.watch))
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def reference(self, unit: Unit) -> str:
        """Return where the model lies that a unit asks or tunes, as it is before tuning."""
        if unit.made is not None:
            return str(self.directory.model(unit.made))
        return self.spec.model(unit.subject.model).reference

    def _base_model(self, unit: Unit) -> LanguageModel:
        label = unit.subject.model
        if self._base is None or self._base[0] != label:
            self._base = None
            if not unit.holds_two:
                self._tuned = None  # room for one model is enough
            model = self.load(self.reference(unit))
            self._base = label, replace(model, reference=label)
        return self._base[1]

    def _tuned_model(self, unit: Unit) -> LanguageModel:
        assert unit.needs is not None
        if self._tuned is None or self._tuned[0] != unit.needs:
            self._tuned = None
            if not unit.holds_two:
                self._base = None
            model = self.load(str(self.directory.model(unit.needs)))
            self._tuned = (
                unit.needs,
                replace(model, reference=replace(unit.subject, lam=None).label),
            )
        return self._tuned[1]

    def load(self, reference: str) -> LanguageModel:
        """Load a model as the study says, counting the time."""
        self._ledger = Ledger(None, _Steps(self.watch))  # lets go of the last model's engine
        gc.collect()
        began = time.perf_counter()
        model = load(
            reference,
            self.store,
            device=self.spec.device,
            dtype=self.spec.dtype,
            trust_remote_code=self.spec.trust_remote_code,
        )
        self._loading += time.perf_counter() - began
        return model


class _Steps(Silent):
    """Passes on the steps within a unit; its stage has the unit's own name."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Pass on."""
        self._watch.update(done, total, detail)


def answered_freely(task: Task) -> Task:
    """Return a choice task whose answers are written, and not chosen by their likelihood.

    Raises:
        TaskError: if the task words its own prompts.
    """
    if task.examiner:
        raise TaskError(
            f"task {task.name!r} judges its own answers, so `similarity` cannot; leave it out of "
            "the ask"
        )
    return replace(task, kind="exact")


def tokens_read(sources: Sequence[Branch], steps: int) -> int:
    """Return the tokens of all samples that a tuning reads, those of its keep terms included."""
    each_step = sum(one.per_step * one.tokens / max(1, one.samples) for one in sources)
    return round(steps * each_step)

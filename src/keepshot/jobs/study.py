"""Run a study: what its units do, in this process or in workers of Ray, and what came of it."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from keepshot.assets import AssetStore, sha256_of
from keepshot.blending.sweep import sweep
from keepshot.errors import ConfigError, ModelError, StudyError
from keepshot.jobs.cluster import Cluster, processors, shared_out
from keepshot.jobs.ledger import Ledger, model_record
from keepshot.jobs.loading import freeing_fast
from keepshot.jobs.measure import check_shots, plan_for, read_tasks, template_named
from keepshot.jobs.separation import check_apart
from keepshot.jobs.specs import Measuring
from keepshot.jobs.study_following import Examiners, rows_of, set_contents
from keepshot.jobs.target import load_target
from keepshot.jobs.tune import VALIDATION_SHARE, anchor_tasks, general_rows
from keepshot.jobs.workspace import environment
from keepshot.judging.follow import instruction_scores
from keepshot.models.identity import file_sha256
from keepshot.models.loading import LanguageModel, identify, load
from keepshot.models.reference import Embedded, GGUFFile, HubModel, converted_path, parse_reference
from keepshot.outputs import write_text
from keepshot.progress import Silent
from keepshot.records import Cost, InstructionRow, ItemResult, write_instructions
from keepshot.scoring.evaluate import Plan
from keepshot.study.directory import StudyDirectory
from keepshot.study.document import RECORD, StudyDocument
from keepshot.study.frame import Frame, arms, item_frame, score_frame, write_frames
from keepshot.study.grid import (
    Grid,
    StudySpec,
    Unit,
    check_patterns,
    check_size,
    expand,
    names_in,
    tasks_of,
)
from keepshot.study.runner import Outcome, Tally, Watch, failures, tally, work
from keepshot.study.tables import markdown
from keepshot.tasks.catalog import CATALOG, is_path
from keepshot.tasks.source import Row
from keepshot.tasks.task import Task
from keepshot.tuning.anchors import examples_of
from keepshot.tuning.data import hold_out
from keepshot.tuning.mixture import Branch
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.train import Extra, train

TIMES_AGAIN = 20
"""How often a worker of Ray that died is replaced."""


@dataclass(frozen=True)
class Running:
    """How a study is run; nothing here changes a result."""

    engine: str = "local"
    """`local`, `ray`, or HOST:PORT of a Ray cluster that reaches the same directory."""
    workers: int | None = None
    """Workers of Ray; left out, one for each processor."""
    limit_minutes: float | None = None
    """No unit is begun after this time."""
    meant: bool = False
    """A large grid is meant."""
    retry: bool = False
    """Do again what failed."""
    overwrite: bool = False
    """Go on in a directory that holds another study."""


def study(
    spec: StudySpec, store: AssetStore, out_dir: Path, watch: Watch, running: Running
) -> StudyDocument:
    """Do what is left of a study, and write its frames, document and report.

    Args:
        spec: the study.
        store: where assets are cached.
        out_dir: the study's directory; what is recorded there is not repeated.
        watch: told of stages and units.
        running: where it runs, and for how long.

    Raises:
        UserError: before any model is loaded, wherever the fault can be seen by then. What a unit
            meets later becomes its record.
    """
    _check_running(running)
    watch.stage("reading tasks")
    grid = grid_of(spec, store)
    check_size(grid, meant=running.meant)
    worker = Worker(spec, store, StudyDirectory(out_dir), watch)
    worker.check(grid)
    directory = worker.directory
    directory.open(spec_text(spec), spec.fingerprint(), overwrite=running.overwrite)
    if running.retry:
        directory.forget(record.unit for record in failures(grid, directory))
    write_text(json.dumps(environment(), indent=1), directory.path / "environment.json")
    limit = None if running.limit_minutes is None else 60.0 * running.limit_minutes
    if running.engine == "local":
        with freeing_fast():
            work(
                grid, directory, worker.perform, watch,
                limit_seconds=limit, keep_models=spec.keep_models,
            )  # fmt: skip
    else:
        _work_apart(worker, grid, running, limit)
    watch.stage("writing the frame and the report")
    return finish(spec, grid, directory)


def grid_of(spec: StudySpec, store: AssetStore) -> Grid:
    """Expand a study, its units identified by the content of what they read.

    Raises:
        ConfigError: if it is empty, or a pattern matches nothing.
        TaskError: if a file is missing.
    """
    check_patterns(spec)
    contents = set_contents(spec)
    for model in spec.models:
        found = _model_content(model.reference, store)
        if found is not None:
            contents[model.reference] = found
    for name in {name for names in names_in(spec) for name in names}:
        if name in CATALOG:
            contents[name] = f"version {CATALOG[name].version}"
        elif is_path(name) and Path(name).is_file():
            contents[name] = sha256_of(Path(name))
    return expand(spec, contents)


def spec_text(spec: StudySpec) -> str:
    """Return the study as YAML that reads back as the same study."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def opened(spec: StudySpec, out_dir: Path) -> StudyDirectory:
    """Return a study's directory without changing it.

    Raises:
        StudyError: if none lies there, or one of another study.
    """
    mark = out_dir / "fingerprint"
    if not mark.exists():
        raise StudyError(f"{out_dir}: no study lies here yet; start it, or name another with --out")
    if mark.read_text("utf-8").strip() != spec.fingerprint():
        raise StudyError(
            f"{out_dir}: holds another study; compare with {out_dir / 'study.yaml'}, or name "
            "another with --out"
        )
    return StudyDirectory(out_dir)


def status_of(spec: StudySpec, store: AssetStore, out_dir: Path) -> tuple[Tally, StudyDocument]:
    """Return how far the study in a directory is, and its results so far.

    Raises:
        StudyError: if none lies there, one of another study, or a record of another version.
    """
    directory = opened(spec, out_dir)
    grid = grid_of(spec, store)
    return tally(grid, directory), document_of(spec, grid, directory)[0]


def finish(spec: StudySpec, grid: Grid, directory: StudyDirectory) -> StudyDocument:
    """Write `frame.parquet`, `scores.parquet`, `report.md` and, last, `study.json`."""
    document, frames = document_of(spec, grid, directory)
    write_frames(*frames, directory.path)
    followed = rows_of(spec, grid, directory)
    if followed:
        write_instructions(followed, directory.path / "instructions.parquet")
    write_text(markdown(document), directory.path / "report.md")
    write_text(document.to_json(), directory.path / RECORD)
    return document


def document_of(
    spec: StudySpec, grid: Grid, directory: StudyDirectory
) -> tuple[StudyDocument, tuple[Frame, Frame]]:
    """Return a study's results so far, and its frames of items and of scores."""
    records = directory.records(grid.units)
    items = item_frame(spec, grid, records, directory.rows)
    followed = rows_of(spec, grid, directory)
    failed = failures(grid, directory)
    versions = sorted({record.keepshot for record in records.values()})
    notes = [f"Units were done by keepshot {' and '.join(versions)}."] if len(versions) > 1 else []
    document = StudyDocument(
        name=spec.name,
        question=spec.question,
        total=len(grid.units),
        done=len(records) - len(failed),
        failed=len(failed),
        arms=arms(spec, grid, items, records),
        failures=[
            {"unit": r.unit, "label": r.label, "reason": r.reason or "", "trace": r.trace or ""}
            for r in failed
        ],
        instructions=instruction_scores(followed),
        notes=notes,
    )
    return document, (items, score_frame(items))


class Worker:
    """Does units one after the other, holding models in memory from one to the next."""

    def __init__(
        self, spec: StudySpec, store: AssetStore, directory: StudyDirectory, watch: Watch
    ) -> None:
        self.spec, self.store, self.directory, self.watch = spec, store, directory, watch
        self._tasks: dict[str, Task] = {}
        self._base: tuple[str, LanguageModel] | None = None
        self._tuned: tuple[str, LanguageModel] | None = None
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
        measured = [self._task(name) for name in asked if name not in self.spec.targets]
        trained: dict[str, Sequence[Row]] = {}
        for name, recipe in self.spec.recipes.items():
            for task in anchor_tasks(recipe, self.store):
                trained[f"anchor task {task.name!r}"] = examples_of(task)
            trained[f"recipe {name!r}: general data"] = general_rows(recipe, self.store)
        check_apart(measured, trained)

    def _task(self, name: str) -> Task:
        if name not in self._tasks:
            if name in self.spec.targets:
                self._tasks[name] = load_target(name, self.store)
            else:
                asks = self.spec.asks.values()
                shots = max(max(ask.all_shots) for ask in asks)
                validation = any("validation" in ask.splits for ask in asks)
                measuring = Measuring(tasks=(name,), shots=(shots,))
                (self._tasks[name],) = read_tasks(measuring, self.store, validation=validation)
        return self._tasks[name]

    def plan(self, unit: Unit) -> Plan:
        """Return what the evaluator runs for a measurement."""
        ask = self.spec.asks[str(unit.ask)]
        target = unit.subject.target
        tasks = [self._task(name) for name in tasks_of(self.spec, unit)]
        if ask.template is not None:
            template = template_named(ask.template)
            tasks = [replace(task, template=template) for task in tasks]
        measuring = Measuring(shots=ask.all_shots, seeds=ask.seeds, limit=ask.limit)
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
        return self._tune(unit) if unit.kind == "tune" else self._measure(unit)

    def ingredients(self, unit: Unit) -> tuple[Recipe, Task, list[Task], Extra]:
        """Return a tuning's recipe, target, anchors, and what else it reads."""
        reference = self.spec.model(unit.subject.model).reference
        recipe = self.spec.recipe_of(unit.subject, reference)
        target = self._task(str(unit.subject.target))
        state_dir = self.directory.model(f".{unit.id}.state")
        general = general_rows(recipe, self.store)
        extra = Extra(template=target.template, general=general, state_dir=state_dir)
        return recipe, target, anchor_tasks(recipe, self.store), extra

    def _tune(self, unit: Unit) -> Outcome:
        recipe, target, anchors, extra = self.ingredients(unit)
        model = self._base_model(unit)
        self._base = None  # tuning changes it in place
        untuned = model_record(model)
        out_dir = self.directory.model(unit.id)
        rows, held_out = target.train, ()
        if recipe.auto:
            # As for a user's file: what is decided on is taken from the rows to train on.
            rows, held_out = hold_out(target.train, share=VALIDATION_SHARE, seed=recipe.seed)
        record = train(
            recipe, model, rows, out_dir,
            anchors=anchors, validation=held_out, progress=self.watch, extra=extra,
        )  # fmt: skip
        return Outcome(
            model=untuned,
            training=record.training_record(str(unit.subject.recipe)),
            loading_seconds=self._loading,
            work_seconds=record.seconds,
            tokens=tokens_read(record.sources, record.steps),
        )

    def _measure(self, unit: Unit) -> Outcome:
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
        return Outcome(
            items=items,
            instructions=instructions,
            model=model_record(model),
            loading_seconds=self._loading,
            work_seconds=after.seconds - before.seconds,
            tokens=after.tokens_prefilled - before.tokens_prefilled,
            task_versions={task.name: task.version for task in plan.tasks},
        )

    # -- models ----------------------------------------------------------------------------

    def _base_model(self, unit: Unit) -> LanguageModel:
        label = unit.subject.model
        if self._base is None or self._base[0] != label:
            self._base = None
            if unit.subject.lam is None:
                self._tuned = None  # room for one model is enough
            model = self.load(self.spec.model(label).reference)
            self._base = label, replace(model, reference=label)
        return self._base[1]

    def _tuned_model(self, unit: Unit) -> LanguageModel:
        assert unit.needs is not None
        if self._tuned is None or self._tuned[0] != unit.needs:
            self._tuned = None
            if unit.subject.lam is None:
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


def tokens_read(sources: Sequence[Branch], steps: int) -> int:
    """Return the tokens of all samples that a tuning reads, those of its keep terms included."""
    each_step = sum(one.per_step * one.tokens / max(1, one.samples) for one in sources)
    return round(steps * each_step)


# -- Ray ---------------------------------------------------------------------------------------


class _Steps(Silent):
    """Passes on the steps within a unit; its stage has the unit's own name."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Pass on."""
        self._watch.update(done, total, detail)


class _Unwatched(Silent):
    """What a worker of Ray tells nobody."""

    def tally(self, tally: Tally) -> None:
        """Ignore."""


@dataclass(frozen=True)
class _Share:
    """What a worker of Ray needs to join in."""

    spec: StudySpec
    store: AssetStore
    out_dir: Path
    deadline: float | None
    """Seconds since the epoch, so that a worker that takes another's place has no more time."""


def _work_in_worker(share: _Share) -> None:
    """Be one more runner on the study's directory; its claims keep the others away."""
    worker = Worker(share.spec, share.store, StudyDirectory(share.out_dir), _Unwatched())
    grid = grid_of(share.spec, share.store)
    limit = None if share.deadline is None else share.deadline - time.time()
    with freeing_fast():
        work(
            grid, worker.directory, worker.perform, _Unwatched(),
            limit_seconds=limit, keep_models=share.spec.keep_models,
        )  # fmt: skip


def _work_apart(worker: Worker, grid: Grid, running: Running, limit: float | None) -> None:
    spec, directory, watch = worker.spec, worker.directory, worker.watch
    workers = min(running.workers or processors(), len(grid.units))
    deadline = None if limit is None else time.time() + limit
    share = _Share(spec, worker.store.silent(), directory.path, deadline)
    cluster = Cluster(
        workers,
        gpus=spec.device.startswith("cuda"),
        address=None if running.engine == "ray" else running.engine,
        times_again=TIMES_AGAIN,
        idle=lambda: watch.tally(tally(grid, directory)),
    )
    watch.stage(f"{workers} workers of Ray")
    # Ray prints of lost workers, and stdout is for the result alone.
    results = closing(shared_out(_work_in_worker, [share] * workers, cluster))
    with redirect_stdout(sys.stderr), results as found:
        for _ in found:
            watch.tally(tally(grid, directory))


def _check_running(running: Running) -> None:
    if running.engine not in ("local", "ray") and ":" not in running.engine:
        raise ConfigError(
            f"--engine {running.engine!r}: expected local, ray, or HOST:PORT of a Ray cluster"
        )
    if running.workers is not None and running.engine == "local":
        raise ConfigError(
            f"--workers {running.workers} needs --engine ray; add it, or drop --workers"
        )
    if running.limit_minutes is not None and running.limit_minutes <= 0.0:
        raise ConfigError(f"--limit-minutes {running.limit_minutes:g}: expected more than 0")


def _model_content(reference: str, store: AssetStore) -> str | None:
    """Return what identifies a model's content without fetching it; None where nothing does."""
    try:
        parsed = parse_reference(reference)
        match parsed:
            case Embedded():
                return converted_path(parsed.model, store).name
            case HubModel():
                return None
            case GGUFFile():
                return file_sha256(parsed.path, store)
            case _:
                return identify(reference, store)
    except ModelError:
        return None  # shown by the units that load it

"""Measure few-shot ability of one or more models on the same questions and demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from keepshot import records
from keepshot.assets import AssetStore
from keepshot.errors import ConfigError, unknown
from keepshot.harness.tasks import harness_tasks, split_names
from keepshot.jobs.following import Follower
from keepshot.jobs.specs import MeasureSpec, Measuring
from keepshot.jobs.workspace import Workspace
from keepshot.models.loading import LanguageModel, load, outline
from keepshot.models.reference import parse_reference
from keepshot.models.soft_prompts import attached
from keepshot.progress import Progress
from keepshot.prompts import TEMPLATES
from keepshot.records import Cost, ItemResult, ModelRecord, ResultDocument, Split
from keepshot.scoring.engine import Engine
from keepshot.scoring.evaluate import Plan, ask, check_prompts, measure
from keepshot.scoring.processes import ALONE, Processes
from keepshot.scoring.request import tokens_to_read
from keepshot.scoring.server import ServedEngine, Server
from keepshot.scoring.summary import scores, summarise
from keepshot.tasks.catalog import resolve_tasks
from keepshot.tasks.task import Task


@dataclass(frozen=True)
class Measured:
    """What a job of measuring found."""

    document: ResultDocument
    items: list[ItemResult]


def measure_models(
    spec: MeasureSpec,
    store: AssetStore,
    workspace: Workspace | None,
    progress: Progress,
    *,
    processes: Processes = ALONE,
    share: bool = True,
) -> Measured:
    """Measure every model of `spec` on the same questions, paired.

    Args:
        spec: what to measure.
        store: where assets are cached.
        workspace: where to keep finished models' rows and the result; None keeps nothing.
        progress: told of stages.
        processes: those that share the work; all but the first come without a workspace.
        share: compute shared beginnings once (else: the slow reference).

    Raises:
        UserError: before any model is loaded, wherever the fault can be seen by then.
    """
    server = Server(spec.server, spec.server_model) if spec.server else None
    if server and (len(spec.models) > 1 or processes.size > 1):
        raise ConfigError(
            f"--server {server.url!r} serves one model to one process; name one model, and start "
            "without torchrun"
        )
    for index, reference in enumerate(spec.models):
        parse_reference(reference)
        if reference in spec.models[:index]:
            raise ConfigError(f"model {reference!r} is named twice; name each model once")
    progress.stage("reading tasks")
    tasks = read_tasks(spec, store)
    plan = plan_for(spec, tasks, first_seed=spec.seed)
    follower = Follower(spec.following, store, workspace, progress, processes=processes)
    for reference in spec.models[1:]:
        # The first is loaded next; the others would be found wanting only after hours.
        progress.stage(f"{reference}: checking")
        light = outline(reference, store, trust_remote_code=spec.trust_remote_code)
        check_prompts(light, plan)
        follower.check(light)
    items: list[ItemResult] = []
    models: list[ModelRecord] = []
    if workspace:
        workspace.begin()
    ledger = Ledger(workspace, progress, processes=processes, server=server, share=share)
    device = spec.device
    if device == "cuda" and processes.size > 1:
        device = f"cuda:{processes.local_rank}"
    for number, reference in enumerate(spec.models):
        progress.stage(f"{reference}: loading")
        model = load(
            reference,
            store,
            device=device,
            dtype=spec.dtype,
            trust_remote_code=spec.trust_remote_code,
        )
        if server and attached(model.module):
            raise ConfigError(f"model {reference!r} has a soft prompt, which --server cannot take")
        items += ledger.measured(str(number), model, [plan], arm=reference)
        follower.follow(f"{number}-instructions", model, arm=reference, engine=ledger.engine)
        record = model_record(model)
        models.append(record.model_copy(update={"sharing": ledger.sharing_of(model)}))
    document = ResultDocument(
        models=models,
        scores=scores(items, {task.name: task.version for task in tasks}),
        summary=summarise(items),
        cost=ledger.cost.model_copy(update={"processes": processes.size}),
        instructions=follower.scores(),
    )
    if workspace:
        workspace.finish(document, items, follower.rows)
    return Measured(document, items)


def read_tasks(
    measuring: Measuring, store: AssetStore, *, validation: bool = False
) -> tuple[Task, ...]:
    """Return the tasks of `measuring`, in another template if it names one.

    Args:
        measuring: names tasks, shots and template.
        store: where assets are cached.
        validation: a user's file is used whole for test items; with this, half of them become
            validation items, to choose on.

    Raises:
        ConfigError: if there is no such template.
        TaskError: if a task does not exist, or has fewer demonstrations than shots.
    """
    shots, share = max(measuring.shots), 0.5 if validation else 0.0
    own, theirs = split_names(measuring.tasks)
    tasks: list[Task] = []
    if own or not theirs:
        tasks += resolve_tasks(own, store, shots=shots, validation_share=share)
    if theirs:
        tasks += harness_tasks(theirs, shots=shots, validation_share=share)
    check_shots(tasks, measuring.shots)
    if measuring.template is None:
        return tuple(tasks)
    if measuring.template not in TEMPLATES:
        listing = f"templates are {', '.join(TEMPLATES)}"
        raise ConfigError(unknown("template", measuring.template, TEMPLATES, listing))
    return tuple(replace(task, template=TEMPLATES[measuring.template]) for task in tasks)


def plan_for(
    measuring: Measuring,
    tasks: Sequence[Task],
    *,
    split: Split = "test",
    first_seed: int = 0,
    tuned_labels: frozenset[str] = frozenset(),
) -> Plan:
    """Return what the evaluator runs for `measuring` on live tasks."""
    return Plan(
        tasks=tuple(tasks),
        shots=tuple(sorted(set(measuring.shots))),
        seeds=tuple(range(first_seed, first_seed + measuring.seeds)),
        split=split,
        limit=measuring.limit,
        tuned_labels=tuned_labels,
    )


def plan_cost(spec: MeasureSpec, store: AssetStore, progress: Progress) -> list[dict[str, object]]:
    """Return, for each model, the tokens that measuring would read, against reading each prompt.

    Raises:
        UserError: as `measure_models` does.
    """
    rows: list[dict[str, object]] = []
    tasks = read_tasks(spec, store)
    for reference in spec.models:
        progress.stage(f"{reference}: planning")
        model = load(reference, store, trust_remote_code=spec.trust_remote_code)
        asked = list(ask(model, plan_for(spec, tasks, first_seed=spec.seed)))
        requests = [request for question in asked for request in question.requests]
        found = Engine(model).plan(requests)
        naive = sum(len(tokens_to_read(request)) for request in requests)
        rows.append(
            {
                "model": reference,
                "tasks": len(tasks),
                "questions": len(asked),
                "requests": len(requests),
                "tokens_prefilled": found.tokens_prefilled,
                "tokens_naive": naive,
                "times_fewer": round(naive / max(1, found.tokens_prefilled), 1),
            }
        )
    return rows


def check_shots(tasks: Sequence[Task], shots: Sequence[int]) -> None:
    """Draw demonstrations once, so that a task with too few of them is refused early."""
    for number in shots:
        if number < 0:
            raise ConfigError(f"--shots {number}: the number of demonstrations cannot be negative")
        for task in tasks:
            task.draw(number, seed=0)


class Ledger:
    """Measures arms, keeps their rows in the workspace, and adds up what it cost."""

    def __init__(
        self,
        workspace: Workspace | None,
        progress: Progress,
        *,
        processes: Processes = ALONE,
        server: Server | None = None,
        share: bool = True,
    ) -> None:
        self._share = share
        self.cost = Cost()
        self._workspace, self._progress = workspace, progress
        self._processes, self._server = processes, server
        self._engine: Engine | None = None

    def measured(
        self,
        part: str,
        model: LanguageModel | Callable[[], LanguageModel],
        plans: Sequence[Plan],
        *,
        arm: str,
        lam: float | None = None,
    ) -> list[ItemResult]:
        """Return the rows of `model` on `plans`, from the workspace if they are there already.

        Args:
            part: name of the workspace part that holds the rows.
            model: a live model, or what makes it live when its rows are not there yet.
            plans: what is asked.
            arm: name of the arm in the rows.
            lam: lambda in the rows.
        """
        path = self._workspace.part(f"{part}.parquet") if self._workspace else None
        there = records.read_items(path) if path and path.exists() else None
        kept = self._processes.of_first(there)
        if kept is not None:
            return [replace(row, arm=arm) for row in kept]
        live = model if isinstance(model, LanguageModel) else model()
        rows: list[ItemResult] = []
        for plan in plans:
            title = f"{arm}: measuring" if lam is None else f"{arm}: measuring at lambda {lam:g}"
            self._progress.stage(title)
            found = measure(
                live,
                plan,
                arm=arm,
                lam=lam,
                engine=self.engine(live),
                progress=self._progress.update,
            )
            rows += found.items
            self.cost = add_costs(self.cost, found.cost)
        if path:
            records.write_items(rows, path)
        return rows

    def sharing_of(self, model: LanguageModel) -> str | None:
        """Return how far requests about `model` could share; None if none was asked now."""
        engine = self._engine
        return engine.sharing if engine is not None and engine.model is model else None

    def engine(self, model: LanguageModel) -> Engine:
        """Return an engine, the same one along a path: its start-up trial takes a second."""
        if self._engine is None or self._engine.model is not model:
            if self._server is None:
                self._engine = Engine(model, share=self._share, processes=self._processes)
            else:
                part = self._workspace.part("served.jsonl") if self._workspace else None
                self._engine = ServedEngine(model, self._server, kept=part)
        return self._engine


def model_record(model: LanguageModel) -> ModelRecord:
    """Return what identifies `model` in a result."""
    return ModelRecord(
        reference=model.reference,
        sha256=model.sha256,
        num_parameters=model.num_parameters,
        dtype=model.dtype,
    )


def add_costs(first: Cost, second: Cost) -> Cost:
    """Return the sum of two costs."""
    return Cost(
        seconds=first.seconds + second.seconds,
        tokens_prefilled=first.tokens_prefilled + second.tokens_prefilled,
        tokens_naive=first.tokens_naive + second.tokens_naive,
    )

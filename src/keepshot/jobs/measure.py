"""Measure few-shot ability of one or more models on the same questions and demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from keepshot.assets import AssetStore
from keepshot.errors import ConfigError, unknown
from keepshot.harness.tasks import harness_tasks, split_names
from keepshot.jobs.cluster import Cluster, processors, shared_out
from keepshot.jobs.following import Follower
from keepshot.jobs.ledger import Ledger, add_costs, model_record
from keepshot.jobs.loading import load_as
from keepshot.jobs.specs import MeasureSpec, Measuring
from keepshot.jobs.workspace import Workspace
from keepshot.models.loading import identify, load, outline
from keepshot.models.reference import parse_reference
from keepshot.models.soft_prompts import attached
from keepshot.progress import Progress, Silent
from keepshot.prompts import TEMPLATES, Template
from keepshot.records import (
    Cost,
    InstructionRow,
    ItemResult,
    ModelRecord,
    ResultDocument,
    Split,
)
from keepshot.scoring.engine import Engine
from keepshot.scoring.evaluate import Plan, ask, check_prompts
from keepshot.scoring.processes import ALONE, Processes
from keepshot.scoring.request import tokens_to_read
from keepshot.scoring.server import Server
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
    _check_places(spec, processes)
    progress.stage("reading tasks")
    tasks = read_tasks(spec, store)
    plan = plan_for(spec, tasks, first_seed=spec.seed)
    follower = Follower(spec.following, store, workspace, progress, processes=processes)
    # What is loaded next shows its faults by itself; the others would show theirs after hours.
    for reference in spec.models if spec.engine == "ray" else spec.models[1:]:
        progress.stage(f"{reference}: checking")
        light = outline(reference, store, trust_remote_code=spec.trust_remote_code)
        check_prompts(light, plan)
        follower.check(light)
    if workspace:
        workspace.begin({reference: identify(reference, store) for reference in spec.models})
    ledger = Ledger(workspace, progress, processes=processes, server=server, share=share)
    size = processes.size
    if spec.engine == "ray":
        jobs = [
            _Job(spec, number, plan, store.silent(), share) for number in range(len(spec.models))
        ]
        size = min(spec.workers or processors(), len(jobs))
        found = _measure_apart(jobs, ledger, follower, size)
    else:
        device = spec.device
        if device == "cuda" and processes.size > 1:
            device = f"cuda:{processes.local_rank}"
        found = [
            _measure_one(spec, number, plan, store, (ledger, follower, progress, device))
            for number in range(len(spec.models))
        ]
    items = [row for rows, _ in found for row in rows]
    models = [record for _, record in found]
    document = ResultDocument(
        models=models,
        scores=scores(items, {task.name: task.version for task in tasks}),
        summary=summarise(items),
        cost=ledger.cost.model_copy(update={"processes": size}),
        instructions=follower.scores(),
    )
    if workspace:
        workspace.finish(document, items, follower.rows)
    return Measured(document, items)


@dataclass(frozen=True)
class _Job:
    """One model to measure in a worker."""

    spec: MeasureSpec
    number: int
    plan: Plan
    store: AssetStore
    share: bool


@dataclass(frozen=True)
class _Done:
    """What a worker sends back."""

    items: list[ItemResult]
    record: ModelRecord
    followed: list[InstructionRow]
    cost: Cost


def _check_places(spec: MeasureSpec, processes: Processes) -> None:
    """Check that the ways of sharing out work go together, and that each model is named once."""
    if spec.server and (len(spec.models) > 1 or processes.size > 1 or spec.engine == "ray"):
        raise ConfigError(
            f"--server {spec.server!r} serves one model to one process; name one model, and start "
            "without torchrun and --engine ray"
        )
    if spec.engine == "ray" and processes.size > 1:
        raise ConfigError("--engine ray starts its own workers; start it without torchrun")
    if spec.workers is not None and spec.engine != "ray":
        raise ConfigError(f"--workers {spec.workers} needs --engine ray; add it, or drop --workers")
    for index, reference in enumerate(spec.models):
        parse_reference(reference)
        if reference in spec.models[:index]:
            raise ConfigError(f"model {reference!r} is named twice; name each model once")


def _measure_one(
    spec: MeasureSpec,
    number: int,
    plan: Plan,
    store: AssetStore,
    means: tuple[Ledger, Follower, Progress, str],
) -> tuple[list[ItemResult], ModelRecord]:
    """Load a model and ask it; `means` ends with the device."""
    ledger, follower, progress, device = means
    reference = spec.models[number]
    progress.stage(f"{reference}: loading")
    model = load_as(spec, reference, store, device=device)
    if spec.server and attached(model.module):
        raise ConfigError(f"model {reference!r} has a soft prompt, which --server cannot take")
    items = ledger.measured(str(number), model, [plan], arm=reference)
    follower.follow(f"{number}-instructions", model, arm=reference, engine=ledger.engine)
    record = model_record(model)
    return items, record.model_copy(update={"sharing": ledger.sharing_of(model)})


def _measure_in_worker(job: _Job) -> _Done:
    silent = Silent()
    ledger = Ledger(None, silent, share=job.share)
    follower = Follower(job.spec.following, job.store, None, silent)
    means = (ledger, follower, silent, job.spec.device)
    items, record = _measure_one(job.spec, job.number, job.plan, job.store, means)
    return _Done(items, record, follower.rows, ledger.cost)


def _measure_apart(
    jobs: Sequence[_Job], ledger: Ledger, follower: Follower, workers: int
) -> list[tuple[list[ItemResult], ModelRecord]]:
    """Measure each model in a worker of Ray; keep what is done as it comes.

    Parts are those of the local engine, so that either goes on from what the other has finished.
    """
    done: dict[int, tuple[list[ItemResult], ModelRecord]] = {}
    followed: dict[int, list[InstructionRow]] = {}
    for job in jobs:
        arm = job.spec.models[job.number]
        items, rows = ledger.kept(str(job.number), arm), follower.kept(_asked(job), arm)
        if items is not None and rows is not None:
            done[job.number] = items, _outlined(job)
            followed[job.number] = rows
    left = [job for job in jobs if job.number not in done]
    ledger.progress.stage(f"measuring {len(left)} models in {workers} workers of Ray")
    ledger.progress.update(0, len(left))
    gpus = jobs[0].spec.device.startswith("cuda")
    cluster = Cluster(workers, gpus=gpus)
    with closing(shared_out(_measure_in_worker, left, cluster)) as results:
        for count, (place, found) in enumerate(results, start=1):
            job = left[place]
            ledger.keep(str(job.number), found.items)
            follower.keep(_asked(job), found.followed)
            ledger.cost = add_costs(ledger.cost, found.cost)
            done[job.number] = found.items, found.record
            followed[job.number] = found.followed
            ledger.progress.update(count, len(left))
    follower.rows += [row for _, rows in sorted(followed.items()) for row in rows]
    return [done[job.number] for job in jobs]


def _asked(job: _Job) -> str:
    return f"{job.number}-instructions"


def _outlined(job: _Job) -> ModelRecord:
    """Return the record of a model whose rows are there already, without loading its weights."""
    reference, store, spec = job.spec.models[job.number], job.store, job.spec
    light = outline(reference, store, trust_remote_code=spec.trust_remote_code)
    return model_record(replace(light, sha256=identify(reference, store), dtype=spec.dtype))


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
    template = template_named(measuring.template)
    if theirs:
        raise ConfigError(
            f"--template {measuring.template!r} is for tasks of ours: lm-eval:{theirs[0]} words "
            "its own prompts; drop one of the two"
        )
    return tuple(replace(task, template=template) for task in tasks)


def template_named(name: str) -> Template:
    """Return the prompt template of that name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in TEMPLATES:
        raise ConfigError(
            unknown("template", name, TEMPLATES, f"templates are {', '.join(TEMPLATES)}")
        )
    return TEMPLATES[name]


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

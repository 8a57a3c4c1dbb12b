"""Walk the path between two models: measure many lambdas, pick one and write it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from keepshot.assets import AssetStore
from keepshot.blending.card import RECORD_NAME
from keepshot.blending.parts import parts_of
from keepshot.blending.pick import check_rule, next_lambdas, parse_rule, pick, with_interval
from keepshot.blending.planning import BlendPlan
from keepshot.blending.rules import LambdaRule, as_rule, by_part, check_lambda, restoring, shares
from keepshot.blending.sweep import sweep
from keepshot.blending.write import Watch, check_apart, check_inputs, write
from keepshot.errors import ConfigError, ModelError
from keepshot.jobs.along import resample_following, with_following, with_recall
from keepshot.jobs.check import loads_and_generates
from keepshot.jobs.following import Follower
from keepshot.jobs.ledger import Ledger, model_record
from keepshot.jobs.loading import load_as
from keepshot.jobs.measure import plan_for, read_tasks
from keepshot.jobs.rules import rule_for
from keepshot.jobs.separation import check_target_apart
from keepshot.jobs.specs import BlendSpec, Measuring
from keepshot.jobs.target import load_target
from keepshot.jobs.workspace import Workspace
from keepshot.jobs.write import Locate, find_both, writing
from keepshot.models.bases import check_base, is_adapter
from keepshot.models.checkpoint import TensorReader
from keepshot.models.identity import directory_sha256
from keepshot.models.loading import LanguageModel, locate, outline
from keepshot.models.reference import (
    Embedded,
    GGUFFile,
    HubModel,
    LocalDirectory,
    parse_reference,
)
from keepshot.progress import Progress
from keepshot.records import ItemResult, PathPoint, RestoredPart, ResultDocument, Split
from keepshot.scoring.evaluate import Plan, check_prompts
from keepshot.scoring.summary import path_points, resample_path, scores, summarise
from keepshot.tasks.task import Task

_Ask = Callable[[float], list[ItemResult]]
_Rule = Callable[[float], LambdaRule]
_Walk = Callable[
    [LanguageModel, Sequence[float], _Ask, _Rule], list[tuple[float, list[ItemResult]]]
]


@dataclass(frozen=True)
class Questions:
    """What is asked at every point of a path: the target at zero shots, and other tasks."""

    target: Task | None
    others: tuple[Task, ...]
    measuring: Measuring
    first_seed: int

    def plans(self, split: Split) -> list[Plan]:
        """Return what the evaluator runs on one split."""
        labels = self.target.labels if self.target else frozenset[str]()
        others = plan_for(
            self.measuring,
            self.others,
            split=split,
            first_seed=self.first_seed,
            tuned_labels=labels,
        )
        if self.target is None:
            return [others]
        return [plan_for(Measuring(shots=(0,), seeds=1), [self.target], split=split), others]

    @property
    def versions(self) -> dict[str, int]:
        """Version of every task that is asked."""
        asked = [*self.others, self.target] if self.target else self.others
        return {task.name: task.version for task in asked}


def blend(
    spec: BlendSpec, store: AssetStore, workspace: Workspace, progress: Progress
) -> ResultDocument:
    """Sweep the path on validation items, pick a lambda, and write its blend.

    Raises:
        UserError: before any model is loaded, wherever the fault can be seen by then.
    """
    for reference in (spec.base, spec.tuned):
        parse_reference(reference)
    assert spec.sweep is not None, "one lambda is written by `jobs.write`"
    check_rule(
        parse_rule(spec.pick), spec.sweep, spec.target is not None, spec.following is not None,
        by_factors=spec.rule is not None,
    )  # fmt: skip
    questions = _questions(spec, store, progress)
    follower = Follower(spec.following, store, workspace, progress)
    base, tuned = _load_both(spec, store, workspace, progress)
    for split in ("validation", "test"):
        for plan in questions.plans(split):
            check_prompts(base, plan)
    # A base often has no chat template, and a path must be asked in the same words all along.
    follower.chat = tuned
    follower.check(base, "validation", "test")
    ask = _Asking(questions, base, Ledger(workspace, progress), follower)
    return _sweep_and_pick(spec, store, ask, (base, tuned), (workspace, progress))


def _questions(spec: BlendSpec, store: AssetStore, progress: Progress) -> Questions:
    progress.stage("reading tasks")
    target = load_target(spec.target, store) if spec.target else None
    measuring = Measuring(tasks=spec.tasks, shots=spec.shots, seeds=spec.seeds, limit=spec.limit)
    others = read_tasks(measuring, store, validation=True)
    if target and target.name in {task.name for task in others}:
        raise ConfigError(f"task {target.name!r} is the target; leave it out of --tasks")
    if target:
        check_target_apart(others, target)
    return Questions(target, others, measuring, spec.seed)


@dataclass(frozen=True)
class _Asking:
    """Puts tasks and instructions to the one live model, whatever its weights are just now."""

    questions: Questions
    model: LanguageModel
    ledger: Ledger
    follower: Follower

    def ask(self, part: str, arm: str, lam: float, split: Split) -> list[ItemResult]:
        plans, engine = self.questions.plans(split), self.ledger.engine
        rows = self.ledger.measured(part, self.model, plans, arm=arm, lam=lam)
        self.follower.follow(
            f"{part}-instructions", self.model, arm=arm, lam=lam, split=split, engine=engine
        )
        return rows


def _sweep_and_pick(
    spec: BlendSpec,
    store: AssetStore,
    asking: _Asking,
    pair: tuple[LanguageModel, LanguageModel],
    where: tuple[Workspace, Progress],
) -> ResultDocument:
    base, tuned = pair
    walk = _walker(spec, tuned)
    questions, follower = asking.questions, asking.follower
    lams = sorted({0.0, *(spec.sweep or ()), *((1.0,) if spec.restore else ())})
    for note in [note for lam in (lams[0], lams[-1]) if (note := check_lambda(lam))]:
        where[1].note(note)
    at = _lambda_rule(spec, base)
    target = questions.target.name if questions.target else None
    rule = parse_rule(spec.pick)
    rows: dict[float, list[ItemResult]] = {}

    def measure_path(wanted: Sequence[float]) -> list[PathPoint]:
        found = walk(
            base,
            wanted,
            lambda lam: asking.ask(f"path-{lam:.10g}", "path", lam, "validation"),
            at,
        )
        rows.update(dict(found))
        points = path_points(rows, rows[0.0], target=target, split="validation")
        return with_following(with_recall(points, rows, questions.others), follower.rows)

    path = measure_path(lams)
    picked = pick(path, rule)
    while more := next_lambdas(list(rows), picked.lam, spec.resolution or math.inf):
        path = measure_path(more)
        picked = pick(path, rule)
    resampled = resample_path(rows, target=target)
    followed = resample_following(follower.rows, resampled.lams)
    picked = with_interval(picked, path, replace(resampled, following=followed), rule)
    follower.rows.sort(key=lambda row: row.lam or 0.0)
    items: list[ItemResult] = []
    ends = {spec.base: 0.0, spec.tuned: 1.0}
    arms = ends if picked.lam is None else {**ends, "blended": picked.lam}
    for arm, lam in arms.items():
        whole = arm in ends or spec.rule is None
        part = f"test-{lam:.10g}" if whole else f"test-ruled-{lam:.10g}"

        def ask(lam: float, arm: str = arm, part: str = part) -> list[ItemResult]:
            return asking.ask(part, arm, lam, "test")

        # The ends are the two models themselves, whatever the rule.
        [(_, found)] = walk(base, [lam], ask, as_rule if arm in ends else at)
        items += found
    restored = _restored(spec, asking, walk, rows[0.0])
    if picked.lam is not None:
        _write(base, tuned, picked.lam, (spec, store), where)
    document = ResultDocument(
        models=[model_record(base), model_record(tuned)],
        scores=scores(items, questions.versions), summary=summarise(items, target=target),
        cost=asking.ledger.cost, target_task=target, path=path, pick=picked, restored=restored,
        instructions=follower.scores(),
    )  # fmt: skip
    # The path's own rows lie beside them, so that the page can show what flips where.
    along = [row for lam in sorted(rows) for row in rows[lam]]
    return where[0].finish(document, [*items, *along], follower.rows)


def _restored(
    spec: BlendSpec, asking: _Asking, walk: _Walk, before: Sequence[ItemResult]
) -> list[RestoredPart]:
    """Measure the tuned model with one block, or one kind of weight, at a time put back."""
    questions, base = asking.questions, asking.model
    target = questions.target.name if questions.target else None
    found: list[RestoredPart] = []
    parts = parts_of(base.module) if spec.restore else {}
    for share in [share for by in spec.restore for share in shares(parts, by)]:
        rule = restoring(share, parts)

        def ask(lam: float, label: str = share.label) -> list[ItemResult]:
            part = f"restored-{label.replace(' ', '-')}"
            plans = questions.plans("validation")
            return asking.ledger.measured(part, base, plans, arm=f"{label} restored", lam=lam)

        [(_, rows)] = walk(base, [1.0], ask, lambda _, rule=rule: rule)
        [point] = path_points({1.0: rows}, before, target=target, split="validation")
        found.append(RestoredPart(part=share.label, **point.model_dump()))
    return found


def _walker(spec: BlendSpec, tuned: LanguageModel) -> _Walk:
    """Return the sweep towards the tuned model: held in memory, or read with its base from disk."""
    if not spec.stream:
        state = tuned.module.state_dict()
        return lambda base, lams, measure, rule: sweep(base, state, lams, measure, rule)

    def walk(
        base: LanguageModel, lams: Sequence[float], measure: _Ask, rule: _Rule
    ) -> list[tuple[float, list[ItemResult]]]:
        with TensorReader(base.path) as origin, TensorReader(tuned.path) as end:
            return sweep(base, end, lams, measure, rule, origin)

    return walk


def _lambda_rule(spec: BlendSpec, base: LanguageModel) -> Callable[[float], LambdaRule]:
    """Return what each tensor gets at a lambda: all the same, or by the spec's rule."""
    rule = spec.rule
    if rule is None:
        return as_rule
    parts = parts_of(base.module)
    return lambda lam: by_part(rule, lam, parts)


def _load_both(
    spec: BlendSpec, store: AssetStore, workspace: Workspace, progress: Progress
) -> tuple[LanguageModel, LanguageModel]:
    """Check by the files that the two fit, then load them, an adapter on the base given."""
    progress.stage("checking that the two fit")
    find_model = _locate(spec, store)
    base_path, tuned_path = find_both(spec, find_model)
    check_apart(workspace.out_dir, (base_path, tuned_path))
    if is_adapter(tuned_path):
        if spec.rule is not None:
            raise ConfigError("an adapter takes one lambda; merge it into its base for a `rule`")
        check_base(tuned_path, directory_sha256(base_path, store), spec.base)
    if is_adapter(tuned_path) and spec.stream:
        raise ConfigError("an adapter is small beside its base; leave `stream` out")
    _check_sizes(check_inputs(base_path, tuned_path, writing(spec, find_model)))
    ends = {spec.base: base_path, spec.tuned: tuned_path}
    workspace.begin({name: directory_sha256(path, store) for name, path in ends.items()})
    if spec.stream:
        progress.stage(f"loading {spec.base}")
        model = load_as(spec, spec.base, store)
        light = outline(spec.tuned, store, trust_remote_code=spec.trust_remote_code)
        return model, replace(light, dtype=model.dtype)
    loaded: list[LanguageModel] = []
    on_base = f"{spec.base}+{tuned_path}" if is_adapter(tuned_path) else spec.tuned
    for name, reference in ((spec.base, spec.base), (spec.tuned, on_base)):
        progress.stage(f"loading {name}")
        model = load_as(spec, reference, store)
        loaded.append(replace(model, reference=name))
    return loaded[0], loaded[1]


def _check_sizes(plan: BlendPlan) -> None:
    """Check that the base's tensors, which are changed in place, have the tuned model's sizes."""
    for name, tensor in plan.tensors.items():
        if tensor.base is not None and tensor.base.shape != tensor.shape:
            raise ModelError(
                f"tensor {name!r}: base has {tensor.base.shape[0]} rows, tuned {tensor.shape[0]}; "
                "a --sweep needs vocabularies of one size\n(--lambda writes points of such a pair: "
                "write some, and `keepshot measure` them)"
            )


def _write(
    base: LanguageModel,
    tuned: LanguageModel,
    lam: float,
    how: tuple[BlendSpec, AssetStore],
    where: tuple[Workspace, Progress],
) -> None:
    spec, store = how
    workspace, progress = where
    # An adapter stays one: scaling it is exact, and it stays small.
    kind = "adapter" if is_adapter(tuned.path) else "model"
    out_dir = workspace.path / kind
    if (out_dir / RECORD_NAME).exists():
        return
    progress.stage(f"writing lambda {lam:g}")
    trust = spec.trust_remote_code
    check = None
    if spec.generates:
        check = loads_and_generates(spec.base, store, trust_remote_code=trust)
    find_model = _locate(spec, store)
    rule = rule_for(spec.model_copy(update={"lam": lam}), find_model) if spec.rule else lam
    options = writing(spec, find_model)
    for note in write(base.path, tuned.path, rule, out_dir, options, Watch(check, progress)).notes:
        progress.note(note)


def _locate(spec: BlendSpec, store: AssetStore) -> Locate:
    def find_model(reference: Embedded | HubModel | LocalDirectory | GGUFFile) -> Path:
        return locate(reference, store, trust_remote_code=spec.trust_remote_code)

    return find_model

"""The main job: tune one model several ways and show what each way keeps.

    before -> plain, gentle, kept (tuned) -> blended (lambda picked on plain's path)

Each arm is measured on the target without demonstrations and on other tasks with and without.
Lambda is chosen on validation items; every figure of the summary comes from test items.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from keepshot import records
from keepshot.assets import AssetStore
from keepshot.blending.pick import check_rule, parse_rule, pick, with_interval
from keepshot.blending.planning import Writing
from keepshot.blending.sweep import sweep
from keepshot.blending.write import write
from keepshot.errors import ConfigError
from keepshot.jobs.blend import Questions
from keepshot.jobs.following import Follower
from keepshot.jobs.ledger import Ledger, model_record
from keepshot.jobs.loading import load_as
from keepshot.jobs.measure import Measured, read_tasks
from keepshot.jobs.separation import check_apart, check_rules_apart, check_target_apart
from keepshot.jobs.specs import ARMS, BlendArm, Measuring, RunSpec, TunedArm
from keepshot.jobs.target import load_target
from keepshot.jobs.tune import anchor_tasks, general_rows, naming_what_is_kept
from keepshot.jobs.workspace import Workspace
from keepshot.models.identity import directory_sha256
from keepshot.models.loading import LanguageModel, identify
from keepshot.models.reference import parse_reference
from keepshot.progress import Progress
from keepshot.records import (
    ItemResult,
    ModelRecord,
    PathPoint,
    PickRecord,
    ResultDocument,
    TrainingRecord,
)
from keepshot.scoring.evaluate import Plan, check_prompts
from keepshot.scoring.summary import path_points, resample_path, scores, summarise
from keepshot.tasks.catalog import SUITES
from keepshot.tasks.source import Row
from keepshot.tuning.anchors import examples_of
from keepshot.tuning.tokenised import Extra, tokenise
from keepshot.tuning.train import train


def run(spec: RunSpec, store: AssetStore, workspace: Workspace, progress: Progress) -> Measured:
    """Tune, blend and measure every arm of `spec`, and write the run directory.

    Args:
        spec: the recipe.
        store: where assets are cached.
        workspace: the run directory; finished arms found in it are not repeated.
        progress: told of stages.

    Raises:
        UserError: before any model is loaded, wherever the fault can be seen by then.
    """
    job = _Run(spec, store, workspace, progress)
    workspace.begin({spec.model: identify(spec.model, store)})
    job.measure_before()
    for arm in ARMS:
        if arm in spec.arms:
            job.tune(arm)
    if spec.blended:
        job.blend(spec.blended)
    return job.finish()


class _Run:
    """The state of one run: what is asked, and what has been found so far."""

    def __init__(
        self, spec: RunSpec, store: AssetStore, workspace: Workspace, progress: Progress
    ) -> None:
        self.spec, self.store, self.workspace, self.progress = spec, store, workspace, progress
        parse_reference(spec.model)
        if spec.blended:
            check_rule(parse_rule(spec.blended.pick), (0.0, *spec.blended.lambdas), True)
        progress.stage("reading tasks")
        self.target = load_target(spec.data, store)
        self.tasks = read_tasks(spec.measure, store, validation=spec.blended is not None)
        self._check_separation()
        check_target_apart(self.tasks, self.target)
        self.anchors = {arm: anchor_tasks(recipe, store) for arm, recipe in spec.arms.items()}
        self.extra = {
            arm: Extra(template=self.target.template, general=general_rows(recipe, store))
            for arm, recipe in spec.arms.items()
        }
        check_apart(self.tasks, self._trained())
        check_rules_apart(self.tasks, itertools.chain.from_iterable(self.anchors.values()))
        self.items: list[ItemResult] = []
        self.models: list[ModelRecord] = []
        self.training: list[TrainingRecord] = []
        self.path: list[PathPoint] = []
        self.picked: PickRecord | None = None
        self.ledger = Ledger(workspace, progress)
        self.follower = Follower(spec.measure.following, store, workspace, progress)

    def _trained(self) -> dict[str, Sequence[Row]]:
        """Return what trains besides the target, by name."""
        found: dict[str, Sequence[Row]] = {}
        for arm in self.spec.arms:
            for task in self.anchors[arm]:
                found[f"anchor task {task.name!r}"] = examples_of(task)
            found[f"arm {arm!r}: general data"] = self.extra[arm].general
        return found

    def _check_separation(self) -> None:
        for task in self.tasks:
            if task.name in SUITES["anchors"]:
                raise ConfigError(
                    f"task {task.name!r} is an anchor, from which `kept` draws its prompts, so it "
                    "cannot show what is kept; leave it out of `measure.tasks`"
                )
            if task.name == self.target.name:
                raise ConfigError(
                    f"task {task.name!r} is the target; few-shot ability is measured on others: "
                    "leave it out of `measure.tasks`"
                )

    # -- arms ------------------------------------------------------------------------------

    def measure_before(self) -> None:
        """Measure the model as it is, on test items."""

        def checked() -> LanguageModel:
            model = self._load("before", self.spec.model)
            self._check_lengths(model)
            return model

        self._measure("before", checked)

    def tune(self, arm: TunedArm) -> None:
        """Train one arm from the untouched model, write it, and measure it on test items."""
        recipe = self.spec.arms[arm]
        record_path = self.workspace.part(f"{arm}.json")
        trained_dir = self.workspace.part(arm)

        def trained() -> LanguageModel:
            if record_path.exists():
                return self._load(arm, str(trained_dir))
            model = self._load(arm, self.spec.model)
            self.progress.stage(f"{arm}: tuning")
            with naming_what_is_kept(arm, trained_dir):
                record = train(
                    recipe,
                    model,
                    self.target.train,
                    trained_dir,
                    anchors=self.anchors[arm],
                    validation=self.target.validation if recipe.auto else (),
                    progress=self.progress,
                    extra=self.extra[arm],
                )
            records.write_text(record.training_record(arm).model_dump_json(), record_path)
            return replace(model, path=trained_dir)

        self._measure(arm, trained)
        self.training.append(TrainingRecord.model_validate_json(record_path.read_text("utf-8")))

    def blend(self, arm: BlendArm) -> None:
        """Measure plain's path on validation items, pick lambda, write and measure the blend."""
        base = self._load("blended", self.spec.model)
        plain = self._load("blended", str(self.workspace.part("plain")))
        plans = self._path_questions(arm).plans("validation")
        rows = dict(
            sweep(
                base,
                plain.module.state_dict(),
                sorted({0.0, *arm.lambdas}),
                lambda lam: self._point(base, plans, lam),
            )
        )
        self.path = path_points(rows, rows[0.0], target=self.target.name, split="validation")
        rule = parse_rule(arm.pick)
        self.picked = with_interval(
            pick(self.path, rule), self.path, resample_path(rows, target=self.target.name), rule
        )
        lam = self.picked.lam
        if lam is None:
            self.progress.note(f"blended: {self.picked.reason}")
            return
        blended_dir = self.workspace.path / "model"
        if not (blended_dir / "keepshot.json").exists():
            self.progress.stage(f"blended: writing lambda {lam:g}")
            how = Writing(names=(self.spec.model, self._name("plain")))
            write(base.path, plain.path, lam, blended_dir, how)
        self._measure("blended", lambda: self._load("blended", str(blended_dir)), lam=lam)

    # -- parts -----------------------------------------------------------------------------

    def _load(self, arm: str, reference: str) -> LanguageModel:
        gc.collect()
        self.progress.stage(f"{arm}: loading")
        return load_as(self.spec, reference, self.store)

    def _check_lengths(self, model: LanguageModel) -> None:
        """Check every prompt and row of the whole run, before the first hour is spent on it."""
        self.progress.stage("checking lengths")
        plans = self._questions(self.spec.measure).plans("test")
        if self.spec.blended:
            plans += self._path_questions(self.spec.blended).plans("validation")
        for plan in plans:
            check_prompts(model, plan)
        self.follower.check(model, "validation", "test")
        for arm, recipe in self.spec.arms.items():
            tokenise(
                recipe,
                model,
                self.target.train,
                anchors=self.anchors[arm],
                extra=self.extra[arm],
            )

    def _path_questions(self, arm: BlendArm) -> Questions:
        measuring = Measuring(
            tasks=self.spec.measure.tasks,
            shots=(max(self.spec.measure.shots),),
            seeds=arm.seeds,
            limit=arm.limit,
        )
        return self._questions(measuring)

    def _questions(self, measuring: Measuring) -> Questions:
        return Questions(self.target, self.tasks, measuring, self.spec.seed)

    def _measure(
        self, arm: str, live: Callable[[], LanguageModel], lam: float | None = None
    ) -> None:
        """Measure an arm on test items, unless its rows are there from an earlier start."""
        model_path = self.workspace.part(f"{arm}-model.json")

        loaded: list[LanguageModel] = []

        def recorded() -> LanguageModel:
            if not loaded:
                model = live()
                loaded.append(model if arm == "before" else self._labelled(model, arm))
                records.write_text(model_record(loaded[0]).model_dump_json(), model_path)
            return loaded[0]

        plans = self._questions(self.spec.measure).plans("test")
        self.items += self.ledger.measured(arm, recorded, plans, arm=arm, lam=lam)
        self.follower.follow(
            f"{arm}-instructions",
            recorded,
            arm=arm,
            lam=lam,
            split="test",
            engine=self.ledger.engine,
        )
        self.models.append(ModelRecord.model_validate_json(model_path.read_text("utf-8")))
        self._say(arm)

    def _point(self, model: LanguageModel, plans: Sequence[Plan], lam: float) -> list[ItemResult]:
        """Measure one lambda of plain's path on validation items."""
        rows = self.ledger.measured(f"path-{lam:g}", model, plans, arm="path", lam=lam)
        self.follower.follow(
            f"path-{lam:g}-instructions",
            model,
            arm="path",
            lam=lam,
            split="validation",
            engine=self.ledger.engine,
        )
        return rows

    def _labelled(self, model: LanguageModel, arm: str) -> LanguageModel:
        """Name a model that this run made, and identify it by the weights that were written."""
        inner = [model.path / kind for kind in ("adapter", "model")]
        written = next((path for path in inner if path.exists()), model.path)
        return replace(
            model,
            reference=self._name(arm),
            sha256=directory_sha256(written, self.store),
        )

    def _name(self, arm: str) -> str:
        return f"{self.spec.model}, {arm}"

    def _say(self, arm: str) -> None:
        rows = summarise(self.items, target=self.target.name)
        row = [row for row in rows if row.arm == arm][-1]
        kept = "" if row.retention is None else f", retention {row.retention:.2f}"
        self.progress.note(
            f"{arm}: target {row.target or 0:.2f} at 0 shots, "
            f"other tasks {row.icl:.2f} at {row.shots} shots{kept}"
        )

    def finish(self) -> Measured:
        """Write the run directory: kept's adapter, the blend, and the records."""
        _move_adapter(self.workspace)
        versions: dict[str, int] = {t.name: t.version for t in [self.target, *self.tasks]}
        document = ResultDocument(
            models=self.models,
            scores=scores(self.items, versions),
            summary=summarise(self.items, target=self.target.name),
            cost=self.ledger.cost,
            target_task=self.target.name,
            path=self.path,
            pick=self.picked,
            training=self.training,
            instructions=self.follower.scores(),
        )
        done = self.workspace.finish(document, self.items, self.follower.rows)
        return Measured(done, self.items)


def _move_adapter(workspace: Workspace) -> None:
    trained: Path = workspace.part("kept")
    if (trained / "adapter").exists():
        # With the soft prompts that it was trained under, if there are any.
        for kind in ("prompts", "adapter"):
            if (trained / kind).exists():
                (trained / kind).replace(workspace.path / kind)

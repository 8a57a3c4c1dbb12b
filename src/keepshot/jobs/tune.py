"""Tune one model on one examples file, and write the adapter or the model."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from keepshot import records
from keepshot.assets import AssetStore
from keepshot.errors import TrainingError
from keepshot.jobs.ledger import model_record
from keepshot.jobs.specs import TuneSpec
from keepshot.jobs.target import load_target
from keepshot.jobs.workspace import Workspace
from keepshot.models.loading import load
from keepshot.models.reference import parse_reference
from keepshot.progress import Progress
from keepshot.prompts import Template
from keepshot.records import ResultDocument
from keepshot.tasks.catalog import is_path, resolve_tasks
from keepshot.tasks.source import Row, read_rows
from keepshot.tasks.task import Task
from keepshot.tuning.data import hold_out
from keepshot.tuning.recipe import Mix, Recipe, find_term
from keepshot.tuning.train import Extra, TuneRecord, train

VALIDATION_SHARE = 0.1


def tune(
    spec: TuneSpec, store: AssetStore, workspace: Workspace, progress: Progress
) -> ResultDocument:
    """Tune by `spec.recipe` and write `adapter/` or `model/` with what was done.

    Raises:
        UserError: before the model is loaded, wherever the fault can be seen by then.
    """
    recipe = spec.recipe
    parse_reference(recipe.model)
    progress.stage("reading data")
    rows, validation, template = _rows(recipe, store)
    anchors = anchor_tasks(recipe, store)
    workspace.begin()
    extra = Extra(
        template=template, general=general_rows(recipe), state_dir=workspace.part("state")
    )
    progress.stage(f"loading {recipe.model}")
    model = load(
        recipe.model,
        store,
        device=spec.device,
        dtype=spec.dtype,
        trust_remote_code=spec.trust_remote_code,
    )
    untuned = model_record(model)
    progress.stage("tuning")
    with naming_what_is_kept(None, workspace.path):
        record = train(
            recipe,
            model,
            rows,
            workspace.path,
            anchors=anchors,
            validation=validation,
            progress=progress,
            extra=extra,
        )
    document = ResultDocument(
        models=[untuned],
        scores=[],
        summary=[],
        cost=records.Cost(seconds=record.seconds),
        training=[record.training_record("tuned")],
        notes=[_words(record)],
    )
    return workspace.finish(document, [])


@contextmanager
def naming_what_is_kept(arm: str | None, out_dir: Path) -> Generator[None]:
    """Add to a TrainingError which arm it is of, and where the last good state was written."""
    try:
        yield
    except TrainingError as error:
        written = [out_dir / kind for kind in ("adapter", "model") if (out_dir / kind).exists()]
        place = f"\nthe last good state lies in {written[0]}" if written else ""
        raise TrainingError(f"{f'{arm}: ' if arm else ''}{error}{place}") from error


def anchor_tasks(recipe: Recipe, store: AssetStore) -> list[Task]:
    """Return the tasks from which the recipe's keep terms draw their few-shot prompts."""
    return resolve_tasks([recipe.keep[0].tasks], store) if recipe.keep else []


def general_rows(recipe: Recipe) -> list[Row]:
    """Return the rows of the recipe's general data, if it mixes any in."""
    mix = find_term(recipe.keep, Mix)
    return read_rows(Path(mix.general_data)) if mix and mix.general_data else []


def _rows(recipe: Recipe, store: AssetStore) -> tuple[Sequence[Row], Sequence[Row], Template]:
    """Return rows to train on, rows held out, and the template of `{input, output}` rows."""
    if is_path(recipe.data):
        path = Path(recipe.data)
        rows = read_rows(path)
        held = hold_out(rows, share=VALIDATION_SHARE, seed=recipe.seed)
        return *held, Template()
    target = load_target(recipe.data, store)
    return target.train, target.validation, target.template


def _words(record: TuneRecord) -> str:
    last = record.losses[-1]["loss"]
    held_out = (
        ""
        if record.validation_loss is None
        else f", {record.validation_loss:.3f} on {record.num_validation} held-out rows"
    )
    return (
        f"{record.method} on {record.num_rows} rows, {record.steps} steps at "
        f"{record.learning_rate:g}, {record.num_trainable:,} parameters trained: "
        f"loss {last:.3f}{held_out}"
    )

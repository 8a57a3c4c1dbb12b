"""Tune one model on one examples file, and write the adapter or the model."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from keepshot import records
from keepshot.assets import AssetStore
from keepshot.errors import ConfigError, TrainingError
from keepshot.jobs.hub import HUB, read_hub
from keepshot.jobs.ledger import model_record
from keepshot.jobs.loading import load_as
from keepshot.jobs.separation import check_apart, check_rules_apart
from keepshot.jobs.specs import TuneSpec
from keepshot.jobs.target import load_target
from keepshot.jobs.workspace import Workspace
from keepshot.models.loading import LanguageModel, identify, save
from keepshot.models.reference import parse_reference
from keepshot.progress import Progress
from keepshot.prompts import Template
from keepshot.records import ResultDocument
from keepshot.scoring.processes import ALONE, Processes
from keepshot.tasks.catalog import is_file, is_path, resolve_tasks
from keepshot.tasks.source import Row, read_rows
from keepshot.tasks.task import Task
from keepshot.tuning.adapters import detach_
from keepshot.tuning.anchors import examples_of
from keepshot.tuning.card import decided, write_card
from keepshot.tuning.data import hold_out
from keepshot.tuning.keep import OWN, Mix, anchor_names, find_term
from keepshot.tuning.live import named_tasks
from keepshot.tuning.mixture import check_shares, lines
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.record import TuneRecord
from keepshot.tuning.sharding import sharded
from keepshot.tuning.tokenised import Extra, learned_rows
from keepshot.tuning.train import train

VALIDATION_SHARE = 0.1


def tune(
    spec: TuneSpec,
    store: AssetStore,
    workspace: Workspace | None,
    progress: Progress,
    processes: Processes = ALONE,
) -> ResultDocument:
    """Tune by `spec.recipe` and write `adapter/` or `model/` with what was done.

    An adapter that is to be merged goes into the weights when all else is done.

    Args:
        spec: what is asked.
        store: where assets are cached.
        workspace: the run directory; None in all processes but the first.
        progress: told of stages.
        processes: those that share each batch.

    Raises:
        UserError: before the model is loaded, wherever the fault can be seen by then.
    """
    recipe = spec.recipe
    parse_reference(recipe.model)
    # Before the model is loaded; what it returns is for the Trainer, which asks again.
    sharded(recipe, on_cpu=False, processes=processes.size)
    progress.stage("reading data")
    data, template = _read(recipe, store)
    rows = [row for part in data for row in part.rows]
    validation = [row for part in data for row in part.validation]
    check_shares(recipe, [part.name for part in data])
    learned_rows(recipe, rows, rows, template, recipe.data)  # shows its faults now
    anchors = anchor_tasks(recipe, store)
    if workspace is not None:
        workspace.begin({recipe.model: identify(recipe.model, store)})
    state_dir = processes.of_first(workspace.part("state") if workspace else Path())
    extra = Extra(
        template=template,
        general=general_rows(recipe, store),
        origins=[(part.name, len(part.rows)) for part in data],
        held_out_origins=[(part.name, len(part.validation)) for part in data],
        learn_held_out=True,
        state_dir=state_dir,
    )
    progress.stage(f"loading {recipe.model}")
    local = processes.size > 1 and spec.device == "cuda"
    device = f"cuda:{processes.local_rank}" if local else None
    model = load_as(spec, recipe.model, store, device=device)
    untuned = model_record(model)
    progress.stage("tuning")
    out_dir = workspace.path if workspace else None
    with naming_what_is_kept(None, out_dir or Path()):
        record = train(
            recipe,
            model,
            rows,
            out_dir,
            anchors=anchors,
            validation=validation,
            progress=progress,
            extra=extra,
        )
    if spec.merged and out_dir is not None:
        _merge(record, model, out_dir)
    document = ResultDocument(
        models=[untuned],
        scores=[],
        summary=[],
        cost=records.Cost(seconds=record.seconds, processes=processes.size),
        training=[record.training_record("tuned")],
        notes=["\n".join((_words(record), *decided(record))), "\n".join(lines(record.sources))],
    )
    return workspace.finish(document, []) if workspace else document


def _merge(record: TuneRecord, model: LanguageModel, out_dir: Path) -> None:
    """Put a whole model in place of the adapter in `out_dir`."""
    detach_(model.module, merge=True)
    save(model, out_dir / "model", overwrite=True)
    shutil.rmtree(out_dir / "adapter")
    write_card(record, out_dir)


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
    """Return the tasks from which the recipe's keep terms draw their few-shot prompts.

    Raises:
        ConfigError: if these prompts hold questions of the tasks that the guard of `auto` asks.
        TaskError, AssetError: if a task of either is unknown or cannot be had.
    """
    names = anchor_names(recipe.keep)
    anchors = resolve_tasks([names], store) if names and names != OWN else []
    if recipe.auto is not None:
        guard = named_tasks(recipe.auto.guard_tasks)
        check_apart(guard, {f"anchor task {task.name!r}": examples_of(task) for task in anchors})
        check_rules_apart(guard, anchors)
    return anchors


def general_rows(recipe: Recipe, store: AssetStore) -> Sequence[Row]:
    """Return the rows of the recipe's general data, if it mixes any in.

    Raises:
        TaskError: if there is no such file or task, or the task has nothing to tune on.
    """
    mix = find_term(recipe.keep, Mix)
    if mix is None or mix.general_data is None:
        return ()
    if mix.general_data.startswith(HUB):
        return read_hub(mix.general_data.removeprefix(HUB))
    if is_path(mix.general_data):
        return read_rows(Path(mix.general_data))
    return load_target(mix.general_data, store).train


@dataclass(frozen=True)
class _Data:
    """What is tuned on, and what is held out, of one data set."""

    name: str
    rows: Sequence[Row]
    validation: Sequence[Row]
    template: Template


def _read(recipe: Recipe, store: AssetStore) -> tuple[list[_Data], Template]:
    """Return the data sets that are tuned on, and the template of all of them."""
    several = "," in recipe.data and not is_file(recipe.data)
    names = [part.strip() for part in recipe.data.split(",")] if several else [recipe.data]
    data = [_data(name, recipe.seed, store) for name in names if name]
    templates = {part.template for part in data}
    if len(templates) > 1:
        raise ConfigError(f"--data {recipe.data!r}: data sets of different templates cannot be one")
    return data, data[0].template


def _data(name: str, seed: int, store: AssetStore) -> _Data:
    if is_path(name):
        rows = read_rows(Path(name))
        held = hold_out(rows, share=VALIDATION_SHARE, seed=seed, source=name)
        return _Data(name, *held, Template())
    target = load_target(name, store)
    return _Data(name, target.train, target.validation, target.template)


def _words(record: TuneRecord) -> str:
    last = record.losses[-1]["loss"]
    held_out = ""
    if record.validation_loss is not None:
        held_out = f", {record.validation_loss:.3f} on {record.num_validation} held-out rows"
    elif record.num_validation:
        held_out = f"; {record.num_validation} of the rows judged the short runs first"
    return (
        f"{record.method} on {record.num_rows} rows, {record.steps} steps at "
        f"{record.learning_rate:g}, {record.num_trainable:,} parameters trained: "
        f"loss {last:.3f}{held_out}"
    )

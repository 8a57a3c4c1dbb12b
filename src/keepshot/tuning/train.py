"""A recipe and a live model become a tuned model, on one subclass of transformers' Trainer.

The loss is next-token cross-entropy plus the keep terms; methods, data and terms are prepared
elsewhere, so nothing here asks which method or which term it is.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from keepshot.errors import ConfigError
from keepshot.models.loading import LanguageModel
from keepshot.progress import Progress, Silent
from keepshot.prompts import Template
from keepshot.records import TrainingRecord, write_text
from keepshot.tasks.catalog import is_path
from keepshot.tasks.source import Row
from keepshot.tasks.task import Task
from keepshot.tuning.anchors import AnchorKL, cache_teacher, draw_prompts, few_shot_samples
from keepshot.tuning.batch import Sample, Source, fingerprint, group, pad, read_logits
from keepshot.tuning.data import Encoded, encode_rows
from keepshot.tuning.loop import StepTerm
from keepshot.tuning.method_specs import prompt_tokens
from keepshot.tuning.methods import export
from keepshot.tuning.recipe import KL, Mix, Recipe, find_term
from keepshot.tuning.stages import Work, attach_prompts, run_stages, under_prompt
from keepshot.tuning.terms import next_token


@dataclass(frozen=True)
class TuneRecord:
    """What was trained, on what, for how long, and how the loss went."""

    recipe: dict[str, Any]
    recipe_fingerprint: str
    model: str
    model_sha256: str
    method: str
    keep: list[str]
    learning_rate: float
    steps: int
    batch_size: int
    seed: int
    num_trainable: int
    num_rows: int
    num_dropped: int
    num_validation: int
    data_fingerprint: str
    tokens: int
    """Tokens of the training samples that went through the model, the KL term's not counted."""
    seconds: float
    losses: list[dict[str, float]] = field(default_factory=list)
    """One row a step: `step`, `loss`, and each of its parts before weighting."""
    validation_loss: float | None = None
    """Next-token loss on the held-out rows after tuning; None if there are none."""

    def training_record(self, arm: str) -> TrainingRecord:
        """Return the part that goes into a results document."""
        return TrainingRecord(
            arm=arm,
            method=self.method,
            keep=self.keep,
            learning_rate=self.learning_rate,
            steps=self.steps,
            seconds=self.seconds,
            num_trainable=self.num_trainable,
            losses=self.losses,
        )


@dataclass(frozen=True)
class Extra:
    """What only some runs need."""

    template: Template = field(default_factory=Template)
    """How `{input, output}` rows are written."""
    general: Sequence[Row] = ()
    """The rows behind a `mix` term's `general_data`."""
    state_dir: Path | None = None
    """Where resume states are kept while training and looked for at the start; deleted at the end.
    None keeps none."""


@dataclass(frozen=True)
class Tokenised:
    """What a recipe trains on, in tokens of one model."""

    encoded: Encoded
    held_out: Encoded | None
    sources: Sequence[Source]
    prompts: Sequence[Sample]
    """A KL term's; empty without one."""


def train(
    recipe: Recipe,
    model: LanguageModel,
    examples: Sequence[Row],
    out_dir: Path | None,
    *,
    anchors: Sequence[Task] = (),
    validation: Sequence[Row] = (),
    progress: Progress | None = None,
    extra: Extra | None = None,
) -> TuneRecord:
    """Tune `model` in place by a recipe; afterwards it is ready to be measured.

    Args:
        recipe: what to do.
        model: the untuned model. Its module is changed; LoRA layers are put into it, and
            `methods.detach_` takes them out again.
        examples: what to learn.
        out_dir: where `model/` or `adapter/` and `tuning.json` are written; None writes nothing.
        anchors: tasks behind the keep terms' few-shot prompts.
        validation: held-out rows on which the loss is measured after training.
        progress: told of every step.
        extra: what only some runs need.

    Raises:
        ConfigError: if the recipe asks for anchors or general data that were not given.
        TaskError: if a row cannot be used.
        TrainingError: if the loss is not a number: the last good weights are in the module then,
            and in `out_dir` if given.
        ModelError: if the model's structure is not known well enough for the method.
        OutputError: if `out_dir` cannot be written.
    """
    extra = extra or Extra()
    began = time.perf_counter()
    attach_prompts(recipe, model.module, [task_name(name) for name in recipe.data.split(",")])
    data = tokenise(recipe, model, examples, anchors=anchors, validation=validation, extra=extra)
    encoded, held_out = data.encoded, data.held_out
    recipe = recipe.resolved(len(encoded.samples))
    head: Any = model.module.get_output_embeddings()
    terms = _terms(recipe, model, data.prompts, head)
    # Gradients pass through a head that does not train, so its freezing by a method is harmless.
    work = Work(recipe, model.module, data.sources, 1, lambda _: terms, head, extra.state_dir)
    done = run_stages(work, progress or Silent())
    prepared, losses = done.prepared, done.losses
    record = TuneRecord(
        recipe=recipe.model_dump(mode="json"),
        recipe_fingerprint=recipe.fingerprint(),
        model=model.reference,
        model_sha256=model.sha256,
        method=recipe.method.name,
        keep=[term.name for term in recipe.keep],
        learning_rate=recipe.learning_rate or 0.0,
        steps=len(losses),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        num_trainable=prepared.num_trainable,
        num_rows=len(encoded.samples),
        num_dropped=encoded.num_dropped,
        num_validation=len(held_out.samples) if held_out else 0,
        data_fingerprint=fingerprint(encoded.samples),
        tokens=done.tokens,
        seconds=time.perf_counter() - began,
        losses=losses,
        validation_loss=mean_loss(model, _prompted(model, held_out, recipe.data))
        if held_out
        else None,
    )
    if out_dir is not None and losses:
        export(prepared, model, out_dir)
        write_text(json.dumps(dataclasses.asdict(record), indent=1) + "\n", out_dir / "tuning.json")
    if done.failure is not None:
        raise done.failure
    return record


def tokenise(
    recipe: Recipe,
    model: LanguageModel,
    examples: Sequence[Row],
    *,
    anchors: Sequence[Task],
    validation: Sequence[Row] = (),
    extra: Extra,
) -> Tokenised:
    """Tokenise all that `train` would train on, and so check it against the model's context.

    Args: as `train` takes them.

    Raises:
        ConfigError, TaskError: as `train` does.
    """
    encoded = _encode(recipe, model, examples, extra.template, recipe.data)
    held_out = (
        _encode(recipe, model, validation, extra.template, recipe.data) if validation else None
    )
    kl = find_term(recipe.keep, KL)
    prompts: list[Sample] = []
    if kl is not None:
        limit = _limit(recipe, model)
        prompts = draw_prompts(model, anchors, kl, max_length=limit, seed=recipe.seed)
    return Tokenised(
        encoded, held_out, _sources(recipe, model, encoded, anchors, extra), tuple(prompts)
    )


def task_name(data: str) -> str:
    """Return the name that a recipe's data have as a task: a file's is its own name."""
    return Path(data.strip()).name if is_path(data.strip()) else data.strip()


def mean_loss(model: LanguageModel, samples: Sequence[Sample], batch_size: int = 16) -> float:
    """Return the mean next-token loss over all positions read, in nats."""
    head: Any = model.module.get_output_embeddings()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(samples), batch_size):
            for part in group(samples[start : start + batch_size]):
                padded = pad(part)
                ids_BT, read_N = padded.ids_BT.to(model.device), padded.read_N.to(model.device)
                logits_NV = read_logits(model.module, ids_BT, read_N, head)
                loss = next_token(logits_NV, padded.targets_N.to(model.device))
                total += float(loss) * len(read_N)
                count += len(read_N)
    return total / count


def _limit(recipe: Recipe, model: LanguageModel) -> int:
    """Return the longest sample allowed, in tokens."""
    soft = prompt_tokens(recipe.method)
    context = model.context_length - soft
    if recipe.max_length is not None and recipe.max_length > context:
        raise ConfigError(
            f"max_length {recipe.max_length} is more than the context of {model.reference!r}, "
            f"{context} tokens{' after the soft prompt' if soft else ''}; lower it or leave it out"
        )
    return recipe.max_length or context


def _encode(
    recipe: Recipe, model: LanguageModel, rows: Sequence[Row], template: Template, source: str
) -> Encoded:
    return encode_rows(
        model,
        rows,
        template=template,
        max_length=_limit(recipe, model),
        long_rows=recipe.long_rows,
        source=source,
    )


def _sources(
    recipe: Recipe,
    model: LanguageModel,
    encoded: Encoded,
    anchors: Sequence[Task],
    extra: Extra,
) -> list[Source]:
    """Divide each batch among the target's samples and those that a mix term adds."""
    mix = find_term(recipe.keep, Mix)
    target = _prompted(model, encoded, recipe.data)
    if mix is None:
        return [Source(target, recipe.batch_size)]
    added: list[Source] = []
    if mix.icl_share > 0.0:
        samples = few_shot_samples(
            model, anchors, mix, max_length=_limit(recipe, model), seed=recipe.seed
        )
        added.append(Source(tuple(samples), _count(mix.icl_share, recipe)))
    if mix.general_share > 0.0:
        if not extra.general:
            raise ConfigError(f"mix: general_data {mix.general_data!r} holds no rows")
        general = _encode(recipe, model, extra.general, extra.template, str(mix.general_data))
        added.append(Source(general.samples, _count(mix.general_share, recipe)))
    left = recipe.batch_size - sum(source.count for source in added)
    if left < 1:
        raise ConfigError(
            f"batch_size {recipe.batch_size} leaves no room for the target beside the mix term; "
            "raise it or lower the shares"
        )
    return [Source(target, left), *added]


def _prompted(model: LanguageModel, encoded: Encoded, data: str) -> tuple[Sample, ...]:
    """Return the samples under the soft prompt that their task has, if it has one."""
    return under_prompt(encoded.samples, model.soft_prompt(task_name(data)))


def _count(share: float, recipe: Recipe) -> int:
    return max(1, round(share * recipe.batch_size))


def _terms(
    recipe: Recipe, model: LanguageModel, prompts: Sequence[Sample], head: Any
) -> list[StepTerm]:
    kl = find_term(recipe.keep, KL)
    if kl is None:
        return []
    pool = cache_teacher(model, prompts, kl, head=head)
    return [AnchorKL(kl.name, kl.weight, pool, kl.direction, recipe.seed)]

"""A recipe and a live model become a tuned model, on one subclass of transformers' Trainer.

The loss is next-token cross-entropy plus the keep terms; methods, data and terms are prepared
elsewhere, so nothing here asks which method or which term it is.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, assert_never

import torch

from keepshot.errors import ConfigError
from keepshot.models.loading import LanguageModel
from keepshot.progress import Progress, Silent
from keepshot.prompts import Template
from keepshot.records import TrainingRecord, write_text
from keepshot.tasks.catalog import is_path
from keepshot.tasks.source import Row
from keepshot.tasks.task import Task
from keepshot.tuning.anchors import AnchorKL, cache_teacher, draw_prompts
from keepshot.tuning.batch import Sample, fingerprint, group, pad, read_logits
from keepshot.tuning.data import Encoded, encode_rows
from keepshot.tuning.distil import Rewritten, rewrite
from keepshot.tuning.keep import EWC, KL, L2SP, FewShot, Mix, SelfDistil, TokenMask, find_term
from keepshot.tuning.loop import StepTerm
from keepshot.tuning.masking import Masked, mask_tokens
from keepshot.tuning.method_specs import prompt_tokens
from keepshot.tuning.methods import Prepared, export
from keepshot.tuning.mixture import (
    Branch,
    Mixture,
    auxiliary_samples,
    branch,
    few_shot_samples,
    given_tasks,
    mix,
)
from keepshot.tuning.penalties import diagonal_fisher, few_shot_loss, pull_from_here
from keepshot.tuning.recipe import Recipe
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
    num_masked_tokens: int = 0
    """Answer tokens that an `stm` term left out of the loss, among different samples."""
    num_masked_samples: int = 0
    """Samples of which it left nothing."""
    num_rewritten: int = 0
    """Rows whose answer is the model's own wording, by a `self-distil` term."""
    sources: tuple[Branch, ...] = ()
    """What each step reads: a tree of sources with sizes and fingerprints."""
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
    origins: Sequence[tuple[str, int]] = ()
    """Names of the data sets that the rows are from, and how many in turn; empty: one."""
    state_dir: Path | None = None
    """Where resume states are kept while training and looked for at the start; deleted at the end.
    None keeps none."""


@dataclass(frozen=True)
class Tokenised:
    """What a recipe trains on, in tokens of one model."""

    encoded: Encoded
    held_out: Encoded | None
    mixture: Mixture
    prompts: Mapping[str, Sequence[Sample]]
    """Those of the terms that have their own, by the term's name."""


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
    rewriting = find_term(recipe.keep, SelfDistil)
    own = rewrite(model, examples, rewriting) if rewriting else Rewritten(list(examples), 0)
    data = tokenise(recipe, model, own.rows, anchors=anchors, validation=validation, extra=extra)
    encoded, held_out = data.encoded, data.held_out
    recipe = recipe.resolved(len(encoded.samples))
    head: Any = model.module.get_output_embeddings()
    masked = _masked(recipe, model, data, head)
    terms = _before(recipe, model, data, head)
    # Gradients pass through a head that does not train, so its freezing by a method is harmless.
    work = Work(
        recipe,
        model.module,
        masked.sources,
        data.mixture.num_target,
        lambda prepared: [*terms, *_after(recipe, prepared, data, head)],
        head,
        extra.state_dir,
    )
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
        num_masked_tokens=masked.num_tokens,
        num_masked_samples=masked.num_samples,
        num_rewritten=own.num_rewritten,
        sources=_tree(recipe, data),
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
    template, limit = extra.template, _limit(recipe, model)
    parts = [
        (name, _encode(recipe, model, rows, template, name))
        for name, rows in _by_origin(recipe, examples, extra)
    ]
    encoded = Encoded(
        tuple(sample for _, part in parts for sample in part.samples),
        sum(part.num_dropped for _, part in parts),
    )
    held_out = _encode(recipe, model, validation, template, recipe.data) if validation else None
    added = find_term(recipe.keep, Mix)
    few_shot: list[tuple[str, list[Sample]]] = []
    general: Sequence[Sample] = ()
    if added is not None and added.icl_share > 0.0:
        given = given_tasks(added, anchors, examples, template, recipe.data)
        few_shot = few_shot_samples(model, added, given, max_length=limit, seed=recipe.seed)
    if added is not None and added.general_share > 0.0:
        if not extra.general:
            raise ConfigError(f"mix: general_data {added.general_data!r} holds no rows")
        source = str(added.general_data)
        general = _encode(recipe, model, extra.general, template, source).samples
    named = [(name, _prompted(model, part, name)) for name, part in parts]
    prompts: dict[str, list[Sample]] = {}
    for term in recipe.keep:
        if isinstance(term, KL | EWC):
            prompts[term.name] = draw_prompts(
                model, anchors, term, max_length=limit, seed=recipe.seed
            )
        elif isinstance(term, FewShot):
            prompts[term.name] = auxiliary_samples(
                model, term, examples, template, max_length=limit, seed=recipe.seed
            )
    return Tokenised(encoded, held_out, mix(recipe, named, few_shot, general), prompts)


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


def _prompted(model: LanguageModel, encoded: Encoded, data: str) -> tuple[Sample, ...]:
    """Return the samples under the soft prompt that their task has, if it has one."""
    return under_prompt(encoded.samples, model.soft_prompt(task_name(data)))


def _by_origin(
    recipe: Recipe, examples: Sequence[Row], extra: Extra
) -> list[tuple[str, Sequence[Row]]]:
    """Return the rows of each data set that they are from."""
    origins = extra.origins or ((recipe.data, len(examples)),)
    assert sum(count for _, count in origins) == len(examples), "every row has an origin"
    ends = list(itertools.accumulate(count for _, count in origins))
    return [
        (name, examples[end - count : end])
        for (name, count), end in zip(origins, ends, strict=True)
    ]  # fmt: skip


def _masked(recipe: Recipe, model: LanguageModel, data: Tokenised, head: Any) -> Masked:
    """Return the sources of all batches, the target's masked if a term asks for it."""
    term = find_term(recipe.keep, TokenMask)
    sources, count = data.mixture.sources, data.mixture.num_target
    if term is None:
        return Masked(sources, 0, 0)
    target = mask_tokens(model, sources[:count], term.threshold, head=head)
    return dataclasses.replace(target, sources=(*target.sources, *sources[count:]))


def _before(recipe: Recipe, model: LanguageModel, data: Tokenised, head: Any) -> list[StepTerm]:
    """Return the terms that are made while the model is untouched."""
    assert recipe.steps is not None
    terms: list[StepTerm] = []
    for term in recipe.keep:
        match term:
            case KL():
                pool = cache_teacher(model, data.prompts[term.name], term, head=head)
                terms.append(AnchorKL(term.name, term.weight, pool, term.direction, recipe.seed))
            case FewShot():
                prompts = data.prompts[term.name]
                terms.append(few_shot_loss(term, prompts, recipe.steps, recipe.seed))
            case Mix() | L2SP() | EWC() | TokenMask() | SelfDistil():
                pass
            case _:
                assert_never(term)
    return terms


def _after(recipe: Recipe, prepared: Prepared, data: Tokenised, head: Any) -> list[StepTerm]:
    """Return the terms that hold what trains to where it starts."""
    terms: list[StepTerm] = []
    for term in recipe.keep:
        if isinstance(term, L2SP):
            terms.append(pull_from_here(term.name, term.weight, prepared))
        elif isinstance(term, EWC):
            prompts = data.prompts[term.name]
            importances = diagonal_fisher(prepared, prompts, head=head, seed=recipe.seed)
            terms.append(pull_from_here(term.name, term.weight, prepared, importances))
    return terms


def _tree(recipe: Recipe, data: Tokenised) -> tuple[Branch, ...]:
    """Return the tree of all that is read, the terms' prompts included."""
    beside: list[Branch] = []
    for term in recipe.keep:
        if isinstance(term, KL | FewShot):
            prompts = data.prompts[term.name]
            name = f"{term.name} prompts (beside the batch)"
            beside.append(branch(name, prompts, term.prompts_per_step))
        elif isinstance(term, EWC):
            beside.append(branch("ewc prompts (before the first step)", data.prompts["ewc"], 0))
    return (*data.mixture.tree, *beside)

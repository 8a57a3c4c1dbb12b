"""A recipe and a live model become a tuned model, on one subclass of transformers' Trainer.

The loss is next-token cross-entropy plus the keep terms; methods, data and terms are prepared
elsewhere, so nothing here asks which method or which term it is.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, assert_never

import torch

from keepshot.models.loading import LanguageModel
from keepshot.outputs import write_text
from keepshot.progress import Progress, Silent
from keepshot.tasks.source import Row
from keepshot.tasks.task import Task
from keepshot.tuning.anchors import AnchorKL, cache_teacher, fitting
from keepshot.tuning.auto import run_auto
from keepshot.tuning.batch import fingerprint, mean_loss
from keepshot.tuning.card import write_card
from keepshot.tuning.distil import Rewritten, rewrite
from keepshot.tuning.keep import EWC, KL, L2SP, FewShot, Mix, SelfDistil, TokenMask, find_term
from keepshot.tuning.loop import StepTerm, check_trackers
from keepshot.tuning.masking import Masked, mask_tokens
from keepshot.tuning.methods import Prepared, export
from keepshot.tuning.mixture import Mixture
from keepshot.tuning.penalties import diagonal_fisher, few_shot_loss, pull_from_here
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.record import TuneRecord
from keepshot.tuning.stages import Work, attach_prompts, run_stages
from keepshot.tuning.tokenised import (
    Extra,
    Tokenised,
    source_tree,
    task_names,
    tokenise,
)


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
        validation: held-out rows on which `auto` chooses, and on which the loss is measured after
            training, unless they are learned too.
        progress: told of every step.
        extra: what only some runs need.

    Raises:
        ConfigError: if the recipe asks for anchors, general data or held-out rows that were not
            given.
        TaskError: if a row cannot be used.
        TrainingError: if the loss is not a number: the last good weights are in the module then,
            and in `out_dir` if given.
        ModelError: if the model's structure is not known well enough for the method.
        OutputError: if `out_dir` cannot be written.
    """
    extra = extra or Extra()
    began = time.perf_counter()
    check_trackers(recipe)
    attach_prompts(recipe, model.module, task_names(recipe, extra))
    rewriting = find_term(recipe.keep, SelfDistil)
    own = rewrite(model, examples, rewriting) if rewriting else Rewritten(list(examples), 0)
    data = tokenise(recipe, model, own.rows, anchors=anchors, validation=validation, extra=extra)
    encoded, held_out = data.encoded, data.held_out
    asked, recipe = recipe, recipe.resolved(len(encoded.samples))
    head: Any = model.module.get_output_embeddings()
    data = _fitting(recipe, data, head)
    masked = _masked(recipe, model, data.mixture, head)
    apart = data.searched is not data.mixture
    searches = apart and asked.learning_rate is None
    searched = _masked(recipe, model, data.searched, head).sources if searches else None
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
        tokenizer=model.tokenizer,
        searched=searched,
    )
    if recipe.auto is None:
        done, decisions = run_stages(work, progress or Silent()), None
    else:
        done, decisions = run_auto(asked, work, model, held_out, progress or Silent())
    prepared, losses = done.prepared, done.losses
    record = TuneRecord(
        recipe=recipe.model_dump(mode="json"),
        recipe_fingerprint=recipe.fingerprint(),
        model=model.reference,
        model_sha256=model.sha256,
        method=recipe.method.name,
        keep=[term.name for term in recipe.keep],
        learning_rate=decisions.learning_rate if decisions else recipe.learning_rate or 0.0,
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
        num_cut=encoded.num_cut,
        num_unanswered=encoded.num_unanswered,
        num_masked_tokens=masked.num_tokens,
        num_masked_samples=masked.num_samples,
        num_rewritten=own.num_rewritten,
        sources=source_tree(recipe, data),
        auto=decisions,
        losses=losses,
        validation_loss=mean_loss(model, held_out.samples) if held_out and not apart else None,
    )
    if out_dir is not None and losses:
        export(prepared, model, out_dir)
        write_text(json.dumps(dataclasses.asdict(record), indent=1) + "\n", out_dir / "tuning.json")
        write_card(record, out_dir)
    if done.failure is not None:
        raise done.failure
    return record


def _fitting(recipe: Recipe, data: Tokenised, head: Any) -> Tokenised:
    """Leave out the prompts whose cached probabilities would not fit, which no step would read."""
    term = find_term(recipe.keep, KL)
    if term is None:
        return data
    kept = fitting(data.prompts[term.name], term, head)
    return dataclasses.replace(data, prompts={**data.prompts, term.name: kept})


def _masked(recipe: Recipe, model: LanguageModel, mixture: Mixture, head: Any) -> Masked:
    """Return the sources of all batches, the target's masked if a term asks for it."""
    term = find_term(recipe.keep, TokenMask)
    sources, count = mixture.sources, mixture.num_target
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
                # In the precision of training, so that both read the same at the start.
                with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.bf16):
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

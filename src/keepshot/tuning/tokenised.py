"""What a recipe trains on, in tokens of one model, checked against its context.

Knows nothing of methods but the length of their soft prompts, and nothing of losses.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from keepshot.errors import ConfigError
from keepshot.models.loading import LanguageModel
from keepshot.prompts import Template
from keepshot.tasks.catalog import is_path
from keepshot.tasks.source import Row
from keepshot.tasks.task import Task
from keepshot.tuning.anchors import draw_prompts
from keepshot.tuning.batch import Sample
from keepshot.tuning.data import Encoded, encode_rows, encode_usable
from keepshot.tuning.keep import EWC, KL, OWN, FewShot, Mix, SelfDistil, anchor_names, find_term
from keepshot.tuning.method_specs import prompt_tokens
from keepshot.tuning.mixture import (
    Branch,
    Mixture,
    auxiliary_samples,
    branch,
    few_shot_samples,
    given_tasks,
    mix,
)
from keepshot.tuning.own_anchors import write_tasks
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.samplegen import form_of, is_plain, samplegen_rows
from keepshot.tuning.stages import under_prompt


@dataclass(frozen=True)
class Extra:
    """What only some runs need."""

    template: Template = field(default_factory=Template)
    """How `{input, output}` rows are written."""
    general: Sequence[Row] = ()
    """The rows behind a `mix` term's `general_data`."""
    origins: Sequence[tuple[str, int]] = ()
    """Names of the data sets that the rows are from, and how many in turn; empty: one."""
    held_out_origins: Sequence[tuple[str, int]] = ()
    """The same of the held-out rows."""
    learn_held_out: bool = False
    """Learn the held-out rows too, once `auto` has chosen a rate on them; not where the untuned
    model rewrites the answers that are learned."""
    state_dir: Path | None = None
    """Where resume states are kept while training and looked for at the start; deleted at the end.
    None keeps none."""


@dataclass(frozen=True)
class Tokenised:
    """What a recipe trains on, in tokens of one model."""

    encoded: Encoded
    held_out: Encoded | None
    """Under the soft prompts of their tasks, if these have any."""
    mixture: Mixture
    searched: Mixture
    """The same without the held-out rows, where the mixture has them."""
    prompts: Mapping[str, Sequence[Sample]]
    """Those of the terms that have their own, by the term's name."""


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
    if anchor_names(recipe.keep) == OWN:
        anchors = write_tasks(model, recipe.seed)
    _check_writable(recipe, model, template)
    searched = _by_origin(recipe, examples, extra.origins)
    named = _with_held_out(recipe, searched, validation, extra)
    general = _general(recipe, model, extra)
    held = _held_out(recipe, model, examples, validation, extra)
    encoded, without = _mixed(recipe, model, searched, held, anchors, general, template)
    mixture = without
    if named is not searched:
        encoded, mixture = _mixed(recipe, model, named, (), anchors, general, template)
    held_out = _joined([replace(part, samples=_prompted(model, part, name)) for name, part in held])
    if recipe.auto and validation and not held_out.samples:
        raise ConfigError(
            f"auto: none of the {len(validation)} held-out rows can be used within max_length "
            f"{limit}, so nothing can be chosen on them; raise it, or give another `seed`, by "
            "which others are held out"
        )
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
    return Tokenised(encoded, held_out if held_out.samples else None, mixture, without, prompts)


def _held_out(
    recipe: Recipe,
    model: LanguageModel,
    examples: Sequence[Row],
    validation: Sequence[Row],
    extra: Extra,
) -> list[tuple[str, Encoded]]:
    """Return what can be used of the held-out rows, by data set; nothing if there are none."""
    if not validation:
        return []
    template, limit = extra.template, _limit(recipe, model)
    rows = learned_rows(recipe, validation, examples, template, recipe.data)
    named = _by_origin(recipe, rows, extra.held_out_origins)

    def usable(name: str, part: Sequence[Row]) -> Encoded:
        return encode_usable(
            model,
            part,
            template=template,
            max_length=limit,
            long_rows=recipe.long_rows,
            source=name,
        )

    return [(name, usable(name, part)) for name, part in named]


def _with_held_out(
    recipe: Recipe, named: list[tuple[str, Sequence[Row]]], validation: Sequence[Row], extra: Extra
) -> list[tuple[str, Sequence[Row]]]:
    """Return the rows of each data set, with those held out of it behind if they are learned."""
    rewritten = find_term(recipe.keep, SelfDistil) is not None
    if not (extra.learn_held_out and recipe.auto and validation) or rewritten:
        return named
    held = _by_origin(recipe, validation, extra.held_out_origins)
    return [(name, [*rows, *own]) for (name, rows), (_, own) in zip(named, held, strict=True)]


def _mixed(
    recipe: Recipe,
    model: LanguageModel,
    named: Sequence[tuple[str, Sequence[Row]]],
    held: Sequence[tuple[str, Encoded]],
    anchors: Sequence[Task],
    general: Sequence[Sample],
    template: Template,
) -> tuple[Encoded, Mixture]:
    """Return the data sets' samples, and the sources of batches that are made of them.

    What is left of a data set is judged together with what was held out of it.
    """
    parts: list[tuple[str, Encoded]] = []
    beside = dict(held)
    for name, rows in named:
        learned = learned_rows(recipe, rows, rows, template, name)
        parts.append((name, _encode(recipe, model, learned, template, name, beside.get(name))))
    added = find_term(recipe.keep, Mix)
    few_shot: list[tuple[str, list[Sample]]] = []
    if added is not None and added.icl_share > 0.0:
        examples = [row for _, rows in named for row in rows]
        given = given_tasks(added, anchors, examples, template, recipe.data)
        limit = _limit(recipe, model)
        few_shot = few_shot_samples(model, added, given, max_length=limit, seed=recipe.seed)
    target = [(name, _prompted(model, part, name)) for name, part in parts]
    return _joined([part for _, part in parts]), mix(recipe, target, few_shot, general)


def _general(recipe: Recipe, model: LanguageModel, extra: Extra) -> Sequence[Sample]:
    """Return the general data that a mix term adds; none without such a term."""
    added = find_term(recipe.keep, Mix)
    if added is None or added.general_share == 0.0:
        return ()
    if not extra.general:
        raise ConfigError(f"mix: general_data {added.general_data!r} holds no rows")
    return _encode(recipe, model, extra.general, extra.template, str(added.general_data)).samples


def task_name(data: str) -> str:
    """Return the name that a recipe's data have as a task: a file's is its own name."""
    return Path(data.strip()).name if is_path(data.strip()) else data.strip()


def task_names(recipe: Recipe, extra: Extra) -> list[str]:
    """Return the names that the data sets of a recipe have as tasks, in their order."""
    return [task_name(name) for name, _ in extra.origins or ((recipe.data, 0),)]


def source_tree(recipe: Recipe, data: Tokenised) -> tuple[Branch, ...]:
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
    recipe: Recipe,
    model: LanguageModel,
    rows: Sequence[Row],
    template: Template,
    source: str,
    held_out: Encoded | None = None,
) -> Encoded:
    return encode_rows(
        model,
        rows,
        template=template,
        max_length=_limit(recipe, model),
        long_rows=recipe.long_rows,
        most_unanswered=recipe.most_unanswered,
        source=source,
        held_out=held_out,
    )


def _check_writable(recipe: Recipe, model: LanguageModel, template: Template) -> None:
    """See that the model's vocabulary holds what tells where an answer begins."""
    if is_plain(recipe.samples):
        return
    cue = form_of(recipe.samples, template).cue
    if cue.strip() not in model.decode(model.encode_plain(cue)):
        raise ConfigError(
            f"samples: {recipe.samples}: the vocabulary of {model.reference!r} cannot write "
            f"{cue.strip()!r}, after which its answers would be looked for; "
            "take samples: samplegen-template"
        )


def learned_rows(
    recipe: Recipe, rows: Sequence[Row], pool: Sequence[Row], template: Template, source: str
) -> Sequence[Row]:
    """Return rows as they are, or with demonstrations from `pool` before their answers.

    Raises:
        ConfigError: as `samplegen_rows` and `form_of` do; no model is needed to see it.
    """
    if is_plain(recipe.samples):
        return rows
    generator = np.random.default_rng([recipe.seed, 21])
    return samplegen_rows(
        rows, form_of(recipe.samples, template), generator, source=source, pool=pool
    )


def _prompted(model: LanguageModel, encoded: Encoded, data: str) -> tuple[Sample, ...]:
    return under_prompt(encoded.samples, model.soft_prompt(task_name(data)))


def _joined(parts: Sequence[Encoded]) -> Encoded:
    return Encoded(
        tuple(sample for part in parts for sample in part.samples),
        sum(part.num_dropped for part in parts),
        sum(part.num_cut for part in parts),
        sum(part.num_unanswered for part in parts),
    )


def _by_origin(
    recipe: Recipe, examples: Sequence[Row], given: Sequence[tuple[str, int]]
) -> list[tuple[str, Sequence[Row]]]:
    """Return the rows of each data set that they are from."""
    origins = given or ((recipe.data, len(examples)),)
    assert sum(count for _, count in origins) == len(examples), "every row has an origin"
    ends = list(itertools.accumulate(count for _, count in origins))
    return [
        (name, examples[end - count : end])
        for (name, count), end in zip(origins, ends, strict=True)
    ]  # fmt: skip

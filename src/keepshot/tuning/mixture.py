"""What each batch is made of: the target's samples and those that a `mix` term adds, as a tree.

Every source is named with its share of a batch, its size and a fingerprint, so that two runs can be
told to have seen the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keepshot.errors import ConfigError
from keepshot.models.loading import LanguageModel
from keepshot.prompts import Example, Template
from keepshot.tasks.source import Row
from keepshot.tasks.task import Task
from keepshot.tuning.anchors import examples_of
from keepshot.tuning.batch import Sample, Source, fingerprint
from keepshot.tuning.data import encode_window, slide_few_shot
from keepshot.tuning.keep import FewShot, Mix, find_term
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.symbols import symbol_windows


@dataclass(frozen=True)
class Branch:
    """One source in the tree, with what it is made of."""

    name: str
    per_step: float
    """Samples in each step, on average where a parent deals its parts out together."""
    samples: int
    tokens: int
    fingerprint: str
    parts: tuple[Branch, ...] = ()


def branch(
    name: str, samples: Sequence[Sample], per_step: float, parts: Sequence[Branch] = ()
) -> Branch:
    """Return the branch of `samples`."""
    tokens = sum(len(sample) for sample in samples)
    return Branch(name, per_step, len(samples), tokens, fingerprint(samples), tuple(parts))


def lines(tree: Sequence[Branch], depth: int = 0) -> list[str]:
    """Return the tree as lines of text: name, share of a step, samples, tokens, fingerprint."""
    drawn: list[str] = []
    for item in tree:
        label = f"{'  ' * depth}{item.name}"
        drawn.append(
            f"{label:<34} {item.per_step:>5.3g} a step  {item.samples:>6,} samples "
            f"{item.tokens:>9,} tokens  {item.fingerprint}"
        )
        drawn += lines(item.parts, depth + 1)
    return drawn


@dataclass(frozen=True)
class Mixture:
    """The sources of every batch, and the same as a tree."""

    sources: tuple[Source, ...]
    """The target's first."""
    num_target: int
    tree: tuple[Branch, ...]


def mix(
    recipe: Recipe,
    target: Sequence[tuple[str, Sequence[Sample]]],
    few_shot: Sequence[tuple[str, Sequence[Sample]]],
    general: Sequence[Sample],
) -> Mixture:
    """Divide each batch among the target's samples and those that a mix term adds.

    Args:
        recipe: its batch size and shares.
        target: the data sets to tune on, by name.
        few_shot: ICL-format samples, by task.
        general: general data.

    Raises:
        ConfigError: if `data_shares` are not as many as the data sets.
    """
    term = find_term(recipe.keep, Mix)
    num_few_shot, num_general = term.counts(recipe.batch_size) if term else (0, 0)
    sources: list[Source] = []
    tree: list[Branch] = []
    if term is not None and few_shot:
        merged = tuple(sample for _, samples in few_shot for sample in samples)
        sources.append(Source(merged, num_few_shot))
        parts = _parts(few_shot, num_few_shot)
        name = f"few-shot prompts ({term.shots} shots)"
        tree.append(branch(name, merged, num_few_shot, parts))
    if term is not None and general:
        sources.append(Source(tuple(general), num_general))
        tree.append(branch(f"general: {term.general_data}", general, num_general))
    left = recipe.batch_size - sum(source.count for source in sources)
    whole = tuple(sample for _, samples in target for sample in samples)
    dealt = _dealt(recipe, target, whole, left)
    parts = _parts(target, left)
    if recipe.data_shares is not None:
        parts = [
            branch(name, samples, source.count)
            for (name, samples), source in zip(target, dealt, strict=True)
        ]
    root = branch(f"target: {recipe.data}", whole, left, parts)
    return Mixture((*dealt, *sources), len(dealt), (root, *tree))


def check_shares(recipe: Recipe, names: Sequence[str]) -> None:
    """See that there is a share for each data set, if there are any shares.

    Raises:
        ConfigError: if not.
    """
    shares = recipe.data_shares
    if shares is not None and len(shares) != len(names):
        raise ConfigError(
            f"data_shares has {len(shares)} shares for {len(names)} data sets "
            f"({', '.join(names)}); give one for each"
        )


def _dealt(
    recipe: Recipe,
    target: Sequence[tuple[str, Sequence[Sample]]],
    whole: tuple[Sample, ...],
    left: int,
) -> list[Source]:
    """Return the target's sources: one for all data sets, or one each if shares are stated."""
    if recipe.data_shares is None:
        return [Source(whole, left)]
    check_shares(recipe, [name for name, _ in target])
    counts = _divided(left, recipe.data_shares)
    return [
        Source(tuple(samples), count)
        for (_, samples), count in zip(target, counts, strict=True)
    ]  # fmt: skip


def _divided(total: int, shares: Sequence[float]) -> list[int]:
    """Divide by largest remainder, at least one to each."""
    exact = [share * total for share in shares]
    counts = [max(1, int(value)) for value in exact]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        gaps = [step * (value - count) for value, count in zip(exact, counts, strict=True)]
        open_to = [n for n, count in enumerate(counts) if step > 0 or count > 1]
        counts[max(open_to, key=lambda n: gaps[n])] += step
    return counts


def _parts(named: Sequence[tuple[str, Sequence[Sample]]], count: float) -> list[Branch]:
    """Return the parts of a source that is dealt out as one; none if it has only one."""
    if len(named) < 2:
        return []
    total = sum(len(samples) for _, samples in named)
    return [branch(name, samples, count * len(samples) / total) for name, samples in named]


def few_shot_samples(
    model: LanguageModel,
    term: Mix,
    given: Sequence[tuple[str, Template, Sequence[Example]]],
    *,
    max_length: int,
    seed: int,
) -> list[tuple[str, list[Sample]]]:
    """Build the ICL-format samples of a `mix` term, by task.

    Args:
        model: whose tokenizer is used.
        term: shots, labels and what is learned.
        given: name, template and examples of each task.
        max_length: in tokens; longer samples are left out.
        seed: of the draws.

    Raises:
        ConfigError: if there is no task, none of the samples is within `max_length` tokens, or a
            task has no labels that symbols could stand for.
        TaskError: if a task has too few examples.
    """
    if not given:
        raise ConfigError("the mix term has no anchor tasks; name some under `tasks`")
    generator = np.random.default_rng([seed, 18])
    built: list[tuple[str, list[Sample]]] = []
    for name, template, examples in given:
        if term.labels == "symbols":
            windows = symbol_windows(examples, term.shots, generator, name=name)
            samples = [encode_window(model, template, shown, term.learned) for shown in windows]
        else:
            samples = slide_few_shot(
                model, template, examples, term.shots, generator, term.learned
            )  # fmt: skip
        built.append((name, [sample for sample in samples if len(sample.ids) <= max_length]))
    if not any(samples for _, samples in built):
        raise ConfigError(
            f"mix: no sample of {term.shots} shots is within {max_length} tokens; lower `shots`"
        )
    return [(name, samples) for name, samples in built if samples]


def auxiliary_samples(
    model: LanguageModel,
    term: FewShot,
    rows: Sequence[Row],
    template: Template,
    *,
    max_length: int,
    seed: int,
) -> list[Sample]:
    """Build the prompts of a `few-shot` term: a window that slides over the target's examples.

    Raises:
        ConfigError: if no prompt is within `max_length` tokens.
        TaskError: if there are too few questions with answers.
    """
    generator = np.random.default_rng([seed, 19])
    examples = own_examples(rows, "few-shot")
    samples = slide_few_shot(model, template, examples, term.shots, generator, term.learned)
    kept = [sample for sample in samples if len(sample.ids) <= max_length]
    if not kept:
        raise ConfigError(
            f"few-shot: no prompt of {term.shots} shots is within {max_length} tokens; "
            "lower `shots`"
        )
    return kept


def own_examples(rows: Sequence[Row], term: str) -> list[Example]:
    """Return the target's rows that are a question and an answer.

    Raises:
        ConfigError: if there is none.
    """
    examples = [row for row in rows if isinstance(row, Example)]
    if not examples:
        raise ConfigError(
            f"the {term} term makes few-shot prompts of the target's rows, which takes "
            '"input" and "output"; the data has none: give such rows, or drop the term'
        )
    return examples


def given_tasks(
    term: Mix, anchors: Sequence[Task], rows: Sequence[Row], template: Template, data: str
) -> list[tuple[str, Template, Sequence[Example]]]:
    """Return what a `mix` term's few-shot samples are made of: anchor tasks or the target's rows.

    Raises:
        ConfigError: if the target's rows are asked for and none is a question and an answer.
    """
    if term.icl_from == "data":
        return [(data, template, own_examples(rows, "mix"))]
    return [(task.name, task.template, examples_of(task)) for task in anchors]

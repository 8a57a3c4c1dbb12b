"""The training runs that a method consists of, one after the other on the same module.

Most methods are one run. ProMoT (arXiv 2211.00635) is two: a soft prompt on the frozen model, then
the model under the frozen prompt, so that the format of the task is learned by the prompt, which is
dropped for all else. Knows nothing of how data and keep terms are made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from keepshot.errors import ConfigError, TrainingError
from keepshot.models.soft_prompts import SoftPrompts, attach_, sample_vectors
from keepshot.progress import Progress
from keepshot.tuning.adapters import detach_
from keepshot.tuning.batch import Sample, Source, schedule
from keepshot.tuning.guard import ICLGuard
from keepshot.tuning.loop import Loop, StepTerm, num_processes, run
from keepshot.tuning.method_specs import ProMoT, PromptTuning, prompt_tokens
from keepshot.tuning.methods import Prepared, prepare, seeded, with_prompt
from keepshot.tuning.recipe import Recipe

PROMPT_FILE = "prompt.safetensors"
"""In the directory of resume states: the prompt that a finished first stage left."""


@dataclass(frozen=True)
class Work:
    """What all stages share."""

    recipe: Recipe
    """With learning rate and steps filled in."""
    module: Any
    sources: Sequence[Source]
    """The target's first, under their soft prompts if they have any; then what a term adds."""
    num_target: int
    """How many of the sources are the target's."""
    terms: Callable[[Prepared], Sequence[StepTerm]]
    """Makes the keep terms of a stage that changes the model, just before its first step."""
    head: Any
    state_dir: Path | None
    guard: ICLGuard | None = None
    """Watches the model while it trains in one stage."""
    tokenizer: Any = None
    searched: Sequence[Source] | None = None
    """What the short runs that look for a rate train on, where the sources hold rows that judge
    them; None: the sources."""


@dataclass(frozen=True)
class Done:
    """What the stages left."""

    prepared: Prepared
    """Of the last stage that ran."""
    losses: list[dict[str, float]]
    """One row a step, numbered through all stages."""
    tokens: int
    failure: TrainingError | None


def attach_prompts(recipe: Recipe, module: Any, tasks: Sequence[str]) -> SoftPrompts | None:
    """Put the soft prompts that the recipe's method trains, untrained, into `module`.

    Args:
        recipe: names the method, and the seed of the vectors drawn.
        module: the causal language model; its weights stay as they are.
        tasks: what gets a prompt each.

    Returns:
        The prompts; None if the method has none.

    Raises:
        ConfigError: if two data sets have the same name, by which a prompt is found later.
    """
    length = prompt_tokens(recipe.method)
    if length == 0:
        return None
    repeated = sorted({name for name in tasks if list(tasks).count(name) > 1})
    if repeated:
        raise ConfigError(
            f"two data sets are named {repeated[0]!r}, and a soft prompt is found by the name of "
            "its task; rename one, or put all rows into one file"
        )
    generator = torch.Generator().manual_seed(recipe.seed)
    return attach_(module, tasks, sample_vectors(module, length * len(tasks), generator))


def under_prompt(samples: Sequence[Sample], ids: tuple[int, ...]) -> tuple[Sample, ...]:
    """Return the samples with a soft prompt in front, which nothing is learned to predict of."""
    moved = len(ids)
    return tuple(
        Sample((*ids, *sample.ids), tuple(position + moved for position in sample.read))
        for sample in samples
    )


def run_stages(work: Work, progress: Progress) -> Done:
    """Train through all stages of the recipe's method, in place.

    A run that stops on a loss that is not a number ends there; what it left is returned.

    Raises:
        ModelError, ConfigError, TrainingError: as `methods.prepare` does.
    """
    recipe, method = work.recipe, work.recipe.method
    if not isinstance(method, ProMoT):
        prepared = prepare(method, work.module, recipe.seed)
        return _run(_loop(work, recipe, prepared, work.sources, work.state_dir), progress)
    first: list[dict[str, float]] = []
    tokens = 0
    if method.prompt == "trained":
        # What the second stage cannot train must show before the first has run.
        prepare(method.then, work.module, recipe.seed)
        detach_(work.module, merge=False)
        done = _train_prompt(work, method, progress)
        if done.failure is not None:
            return done
        first, tokens = done.losses, done.tokens
    prepared = prepare(method.then, work.module, recipe.seed)
    if method.prompt == "joint":
        prepared = with_prompt(prepared, work.module, method.prompt_learning_rate)
    place = work.state_dir / "model" if work.state_dir else None
    done = _run(_loop(work, recipe, prepared, work.sources, place), progress)
    if work.state_dir is not None:
        shutil.rmtree(work.state_dir, ignore_errors=True)
    rows = [{**row, "step": row["step"] + len(first)} for row in done.losses]
    return replace(done, losses=[*first, *rows], tokens=tokens + done.tokens)


def _loop(
    work: Work,
    recipe: Recipe,
    prepared: Prepared,
    sources: Sequence[Source],
    state_dir: Path | None,
) -> Loop:
    assert recipe.steps is not None
    samples = schedule(sources, recipe.steps, recipe.seed)
    # A term has no gradient where the model is frozen and its own prompts come without ours.
    terms = () if prepared.export == "prompt" else work.terms(prepared)
    return Loop(
        recipe, prepared, samples, terms, work.head, state_dir, work.guard, work.tokenizer
    )  # fmt: skip


def _run(loop: Loop, progress: Progress) -> Done:
    losses: list[dict[str, float]] = []
    failure: TrainingError | None = None
    with seeded(loop.recipe.seed):
        try:
            run(loop, losses, progress)
        except TrainingError as error:
            failure = error
    prepared = replace(loop.prepared, whole=loop.whole)
    return Done(prepared, losses, sum(len(sample) for sample in loop.samples), failure)


def _train_prompt(work: Work, method: ProMoT, progress: Progress) -> Done:
    """Run the first stage, or take what it left in an earlier start of the same run."""
    # Each batch is of the target alone: nothing else is read under a prompt.
    target = work.sources[: work.num_target]
    batch_size = sum(source.count for source in target)
    recipe = work.recipe.model_copy(
        update={
            "steps": method.prompt_steps,
            "learning_rate": method.prompt_learning_rate,
            "batch_size": batch_size,
            "accumulate": _parts(batch_size, work.recipe.accumulate),
        }
    )
    prepared = prepare(PromptTuning(tokens=method.tokens), work.module, recipe.seed)
    place = work.state_dir / "prompt" if work.state_dir else None
    loop = _loop(work, recipe, prepared, target, place)
    kept = _take_kept(work, prepared)
    if kept is not None:
        return Done(prepared, kept, sum(len(sample) for sample in loop.samples), None)
    done = _run(loop, progress)
    if done.failure is not None:
        words = f"method.prompt_learning_rate ({method.prompt_learning_rate:g}): {done.failure}"
        return replace(done, failure=TrainingError(f"the soft prompt's stage, {words}"))
    _keep(work, done)
    return done


def _parts(batch_size: int, wanted: int) -> int:
    """Return in how many equal parts a batch goes through the model: as many as wanted, or more.

    Raises:
        ConfigError: if the batch cannot be divided among the processes.
    """
    own, left = divmod(batch_size, num_processes())
    if left:
        raise ConfigError(
            f"promot: the soft prompt's stage learns the target alone, {batch_size} samples of "
            f"each batch, which cannot be divided among {num_processes()} processes; change "
            "batch_size or the shares of the mix term, so that they can"
        )
    return next(count for count in range(min(wanted, own), own + 1) if own % count == 0)


def _keep(work: Work, done: Done) -> None:
    if work.state_dir is None:
        return
    work.state_dir.mkdir(parents=True, exist_ok=True)
    place = work.state_dir / PROMPT_FILE
    unfinished = place.with_suffix(".unfinished")
    about = {"recipe": work.recipe.fingerprint(), "losses": json.dumps(done.losses)}
    tensors = {name: p.detach().contiguous() for name, p in done.prepared.parameters.items()}
    save_file(tensors, unfinished, metadata=about)
    unfinished.replace(place)


def _take_kept(work: Work, prepared: Prepared) -> list[dict[str, float]] | None:
    """Put the prompt of a finished first stage in place and return its losses, if it is kept."""
    place = work.state_dir / PROMPT_FILE if work.state_dir else None
    if place is None or not place.is_file():
        return None
    with safe_open(place, framework="pt") as stored:
        about: dict[str, str] = stored.metadata()
        if about.get("recipe") != work.recipe.fingerprint():
            return None
        with torch.no_grad():
            for name, parameter in prepared.parameters.items():
                parameter.copy_(stored.get_tensor(name))
                parameter.requires_grad_(False)
    return json.loads(about["losses"])

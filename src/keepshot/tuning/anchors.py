"""Few-shot prompts of anchor tasks, and what the untuned model says to them, computed once.

The list of worked examples is what protects few-shot ability, not what is in it, so a few simple
tasks serve. Caching the untuned model's probabilities means that no second model is held in memory
and that a step of the KL term costs one forward and backward pass of a few short prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from keepshot.errors import ConfigError
from keepshot.models.loading import LanguageModel
from keepshot.prompts import Example
from keepshot.tasks.task import Task
from keepshot.tuning.batch import Sample, pad, read_logits, turn
from keepshot.tuning.data import encode_demonstrations
from keepshot.tuning.keep import EWC, KL
from keepshot.tuning.terms import Direction, coarse_log_probs, k3, kl_divergence, token_log_probs


@dataclass(frozen=True)
class AnchorPool:
    """Prompts in batches of similar length, with the untuned model's log-probabilities."""

    batches: tuple[tuple[Sample, ...], ...]
    log_probs: tuple[Tensor, ...]
    """For each batch, (N, V) in float16, in the order of its samples' read positions; for k3 those
    of the prompts' own tokens alone, (N) in float32; with `kept` (N, K + 1) in float32."""
    kept: tuple[Tensor, ...] = ()
    """For each batch, the K tokens (N, K) of each position that are kept apart; empty: all."""


@dataclass(frozen=True)
class AnchorKL:
    """The KL term of one training run: call it with the model and the step."""

    name: str
    weight: float
    pool: AnchorPool
    direction: Direction | Literal["k3"]
    seed: int

    def weight_at(self, step: int) -> float:
        """Return the term's factor in the loss, the same at every step."""
        return self.weight

    def __call__(self, module: Any, step: int, head: Any) -> Tensor:
        """Return the divergence from the untuned model on this step's prompts, a scalar."""
        return self.read(module, turn(len(self.pool.batches), step, self.seed), head)

    def read(self, module: Any, number: int, head: Any) -> Tensor:
        """Return the divergence from the untuned model on one batch of prompts, a scalar."""
        padded = pad(self.pool.batches[number])
        device = head.weight.device
        logits_NV = read_logits(module, padded.ids_BT.to(device), padded.read_N.to(device), head)
        teacher = self.pool.log_probs[number].to(device)
        if self.direction == "k3":
            return k3(token_log_probs(logits_NV, padded.targets_N.to(device)), teacher)
        mask_N = torch.ones(len(logits_NV), dtype=torch.bool, device=device)
        if self.pool.kept:
            logits_NV = coarse_log_probs(logits_NV, self.pool.kept[number].to(device))
        return kl_divergence(logits_NV, teacher, mask_N, self.direction)


def draw_prompts(
    model: LanguageModel, tasks: Sequence[Task], term: KL | EWC, *, max_length: int, seed: int
) -> list[Sample]:
    """Draw `term.prompts` lists of worked examples, the tasks in turn, with varied shot counts.

    A prompt of k shots is k demonstrations and one more example. Where a task has too few examples,
    or a prompt would be longer than `max_length` tokens, it gets fewer shots.

    Raises:
        ConfigError: if there is no task, or one of them cannot give a prompt of the fewest shots.
    """
    if not tasks:
        raise ConfigError(f"the {term.name} term has no anchor tasks; name some under `tasks`")
    generator = np.random.default_rng([seed, 17])
    positions = term.positions if isinstance(term, KL) else "answers"
    fewest, most = term.shots
    samples: list[Sample] = []
    for number in range(term.prompts):
        task = tasks[number % len(tasks)]
        examples = examples_of(task)
        shots = min(int(generator.integers(fewest, most + 1)), len(examples) - 1)
        order = generator.permutation(len(examples))
        sample, length = None, 0
        while shots >= fewest:
            shown = [examples[int(index)] for index in order[: shots + 1]]
            sample = encode_demonstrations(model, task.template, shown, positions)
            length = len(sample)
            if length <= max_length:
                break
            sample, shots = None, shots - 1
        if sample is None:
            raise ConfigError(
                f"anchor task {task.name!r} gives no prompt of {fewest} demonstrations within "
                f"{max_length} tokens{f' (one has {length})' if length else ''}; lower `shots`, or "
                "take another task"
            )
        samples.append(sample)
    return samples


def cache_teacher(
    model: LanguageModel, samples: Sequence[Sample], term: KL, *, head: Any
) -> AnchorPool:
    """Batch the prompts by length and compute the untuned model's log-probabilities on them.

    As many prompts are kept as fit `term.cache_mb`, at least one batch.
    """
    top, size = _top(term, head), term.prompts_per_step
    ordered = sorted(fitting(samples, term, head), key=len)
    batches = tuple(tuple(ordered[i : i + size]) for i in range(0, len(ordered), size))
    log_probs: list[Tensor] = []
    tokens: list[Tensor] = []
    with torch.no_grad():
        for batch in batches:
            padded = pad(batch)
            device = head.weight.device
            logits_NV = read_logits(
                model.module, padded.ids_BT.to(device), padded.read_N.to(device), head
            )
            if term.direction == "k3":
                log_probs.append(token_log_probs(logits_NV.cpu(), padded.targets_N))
            elif top is not None:
                kept_NK = logits_NV.topk(top, dim=1).indices
                log_probs.append(coarse_log_probs(logits_NV, kept_NK).cpu())
                tokens.append(kept_NK.cpu())
            else:
                log_probs.append(functional.log_softmax(logits_NV.float(), dim=-1).half().cpu())
    return AnchorPool(batches, tuple(log_probs), tuple(tokens))


def fitting(samples: Sequence[Sample], term: KL, head: Any) -> list[Sample]:
    """Return the first prompts, in whole batches, whose cached probabilities fit `term.cache_mb`.

    Args:
        samples: prompts.
        term: how much is cached of each position, and how many prompts are a batch.
        head: the output head.
    """
    top = _top(term, head)
    # A token kept apart has its id in eight bytes and its log-probability in four.
    each = 4 if term.direction == "k3" else 2 * _vocabulary(head) if top is None else 12 * top + 4
    kept = _within(samples, budget=term.cache_mb * 2**20, bytes_each=each)
    size = term.prompts_per_step
    return kept[: max(size, len(kept) // size * size)]


def examples_of(task: Task) -> tuple[Example, ...]:
    """Return what prompts are drawn from: never what is measured."""
    return task.train + task.demonstrations


def _top(term: KL, head: Any) -> int | None:
    return None if term.top_k is None else min(term.top_k, _vocabulary(head) - 1)


def _vocabulary(head: Any) -> int:
    return int(head.weight.shape[0])


def _within(samples: Sequence[Sample], *, budget: int, bytes_each: int) -> list[Sample]:
    totals = np.cumsum([len(sample.read) * bytes_each for sample in samples])
    return list(samples[: max(1, int(np.searchsorted(totals, budget, side="right")))])

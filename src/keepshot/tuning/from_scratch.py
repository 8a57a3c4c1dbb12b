"""A small model learns to learn from examples: trained on lists of worked examples, from scratch.

Each list is of one composed task, rendered as it is when measured. Only the answers from the
second on are learned, so that nothing teaches the model to answer without an example. The tasks
that are measured are never among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from keepshot.models.blank import blank_model
from keepshot.models.loading import LanguageModel
from keepshot.models.made import FromScratch
from keepshot.progress import Progress
from keepshot.prompts import Template
from keepshot.tasks.composed import Family, Rule, trained_rules, vocabulary
from keepshot.tuning.batch import Sample, pad, read_logits
from keepshot.tuning.terms import next_token

if TYPE_CHECKING:
    from numpy.random import Generator

SHARES: dict[Family, float] = {"words": 0.65, "numbers": 0.2, "labels": 0.15}
"""How often a list is of a family's tasks: labels are learned soonest."""
WARMUP_STEPS = 100
"""At most, and a fifth of the steps."""
SHOW_EVERY = 10


def train_from_scratch(asked: FromScratch, progress: Progress) -> tuple[LanguageModel, int]:
    """Return a model trained from nothing, and the number of tokens that it read.

    The same on one machine with the same number of threads.

    Args:
        asked: structure, length and seed.
        progress: told of the steps.
    """
    model = untrained(asked)
    generator = np.random.default_rng([asked.seed, 1])
    module: Any = model.module
    head = module.get_output_embeddings()
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=asked.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    module.train()
    tokens = 0
    for step in range(asked.steps):
        for group in optimiser.param_groups:
            group["lr"] = asked.learning_rate * _rate_at(step, asked.steps)
        batch = lists_of_examples(model, asked, generator)
        tokens += sum(map(len, batch))
        padded = pad(batch)
        logits_NV = read_logits(module, padded.ids_BT, padded.read_N, head)
        loss = next_token(logits_NV, padded.targets_N)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        if step % SHOW_EVERY == 0:
            progress.update(step, asked.steps, f"loss {loss.item():.3f}")
    module.eval()
    return model, tokens


def untrained(asked: FromScratch) -> LanguageModel:
    """Return the model as it is before the first step."""
    return blank_model(asked.architecture, asked.width, asked.depth, vocabulary(), asked.seed)


def lists_of_examples(
    model: LanguageModel, asked: FromScratch, generator: Generator
) -> list[Sample]:
    """Return a batch: lists of `shots` examples each, their answers but the first to be learned."""
    return [
        _list_of_examples(model, _drawn(generator), asked, generator)
        for _ in range(asked.batch_size)
    ]


def _drawn(generator: Generator) -> Rule:
    family = list(SHARES)[int(generator.choice(len(SHARES), p=list(SHARES.values())))]
    rules = [rule for rule in trained_rules() if rule.family == family]
    return rules[int(generator.integers(len(rules)))]


def _list_of_examples(
    model: LanguageModel, rule: Rule, asked: FromScratch, generator: Generator
) -> Sample:
    template = Template()
    instructed = bool(generator.random() < asked.instructed)
    examples = [rule.example(generator, instructed=instructed) for _ in range(asked.shots)]
    text = template.shared_prefix(examples).removesuffix(template.separator) + "\n"
    ids = model.encode_plain(text)
    return Sample(tuple(ids), tuple(_answers(ids, *_marks(model))))


def _marks(model: LanguageModel) -> tuple[int, int]:
    """Return the tokens with which answers and questions begin."""
    (answer,), (question,) = model.encode_plain("\nA:"), model.encode_plain("\n\nQ:")
    return answer, question


def _answers(ids: Sequence[int], answer: int, question: int) -> list[int]:
    """Return the positions before the tokens of each answer but the first, and before its end."""
    read: list[int] = []
    seen, inside = 0, False
    for position, token in enumerate(ids[:-1]):
        if token == answer:
            seen, inside = seen + 1, True
        elif token == question:
            inside = False
        if inside and seen > 1:
            read.append(position)
    return read


def _rate_at(step: int, steps: int) -> float:
    """Rise over the first steps, then a cosine down to 0."""
    warmup = max(1, min(WARMUP_STEPS, steps // 5))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

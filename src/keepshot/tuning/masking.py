"""Selective token masking: what the untuned model finds unlikely is not learned (arXiv 2501.14315).

A change of data made once, before training: the weights it asks are the untuned model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from keepshot.errors import ConfigError
from keepshot.models.loading import LanguageModel
from keepshot.tuning.batch import Sample, Source, pad, read_logits
from keepshot.tuning.terms import likely, token_log_probs

BATCH = 16


@dataclass(frozen=True)
class Masked:
    """Sources without the tokens, and what that took away from their different samples."""

    sources: tuple[Source, ...]
    num_tokens: int
    num_samples: int
    """Samples of which nothing was left."""


def mask_tokens(
    model: LanguageModel, sources: Sequence[Source], threshold: float, *, head: Any
) -> Masked:
    """Leave tokens above a perplexity out of what is learned; samples with none left go.

    Args:
        model: the untuned model.
        sources: what is learned.
        threshold: highest perplexity of a token that is learned.
        head: the output head.

    Raises:
        ConfigError: if nothing is left of a source.
    """
    distinct = list(dict.fromkeys(sample for source in sources for sample in source.samples))
    kept = dict(zip(distinct, _masked(model, distinct, threshold, head), strict=True))
    made: list[Source] = []
    for source in sources:
        found = [kept[sample] for sample in source.samples]
        left = tuple(sample for sample in found if sample is not None)
        if not left:
            raise ConfigError(
                f"stm: the untuned model finds every answer token of {len(found)} samples less "
                f"likely than perplexity {threshold:g} allows; raise `threshold`, or drop the term"
            )
        made.append(replace(source, samples=left))
    before = sum(len(sample.read) for sample in distinct)
    after = sum(len(sample.read) for sample in kept.values() if sample is not None)
    return Masked(tuple(made), before - after, sum(sample is None for sample in kept.values()))


def _masked(
    model: LanguageModel, samples: Sequence[Sample], threshold: float, head: Any
) -> list[Sample | None]:
    order = sorted(range(len(samples)), key=lambda number: len(samples[number]))
    made: list[Sample | None] = [None] * len(samples)
    device = head.weight.device
    for start in range(0, len(order), BATCH):
        numbers = order[start : start + BATCH]
        padded = pad([samples[number] for number in numbers])
        with torch.no_grad():
            logits_NV = read_logits(
                model.module, padded.ids_BT.to(device), padded.read_N.to(device), head
            )
        flags = likely(token_log_probs(logits_NV, padded.targets_N.to(device)), threshold).tolist()
        for number in numbers:
            sample = samples[number]
            mine, flags = flags[: len(sample.read)], flags[len(sample.read) :]
            read = tuple(p for p, keep in zip(sample.read, mine, strict=True) if keep)
            made[number] = replace(sample, read=read) if read else None
    return made

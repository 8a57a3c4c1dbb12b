"""Tokenised samples in, logits out, computed only where they are read.

Axes: B samples, T tokens, N read positions of all samples together, D width, V vocabulary.
Samples are padded on the right and no attention mask is given: in a causal model no token sees
what follows it, so the padding changes nothing that is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keepshot.models.loading import LanguageModel
from keepshot.tuning.terms import next_token

CALL_TOKENS = 96
"""What one more forward call costs, in padded tokens that would take as long."""


@dataclass(frozen=True)
class Sample:
    """Token ids, and the positions (ascending) whose next token is in the loss."""

    ids: tuple[int, ...]
    read: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that every position read has a next token."""
        assert self.read, "nothing to learn in this sample"
        assert 0 <= self.read[0] <= self.read[-1] < len(self.ids) - 1

    @property
    def targets(self) -> tuple[int, ...]:
        """The token after each position read."""
        return tuple(self.ids[position + 1] for position in self.read)

    def __len__(self) -> int:
        """Number of tokens that go through the model: nothing is read after the last position."""
        return self.read[-1] + 1


@dataclass(frozen=True)
class Padded:
    """Samples of similar length in one rectangle."""

    ids_BT: Tensor
    read_N: Tensor
    """Positions in `ids_BT` flattened."""
    targets_N: Tensor
    positions_BT: Tensor | None = None
    """Each token's place in its sample, where several samples stand in one row."""


def pad(samples: Sequence[Sample]) -> Padded:
    """Pad samples on the right to the longest one; positions and targets follow their order."""
    width = max(len(sample) for sample in samples)
    # The padding is never looked at, so any id will do.
    ids_BT = torch.zeros((len(samples), width), dtype=torch.long)
    for row, sample in enumerate(samples):
        ids_BT[row, : len(sample)] = torch.tensor(sample.ids[: len(sample)])
    read = [row * width + position for row, s in enumerate(samples) for position in s.read]
    targets = [token for sample in samples for token in sample.targets]
    return Padded(ids_BT, torch.tensor(read), torch.tensor(targets))


def group(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Split samples by length where the padding saved is worth another forward call."""
    ordered = sorted(samples, key=len)
    lengths = np.array([len(sample) for sample in ordered])
    if len(ordered) < 2:
        return [ordered]
    # Cutting before `cut` spares each shorter sample the difference of the two widths.
    cuts = np.arange(1, len(ordered))
    saved = cuts * (lengths[-1] - lengths[cuts - 1])
    best = int(np.argmax(saved))
    if saved[best] <= CALL_TOKENS:
        return [ordered]
    return group(ordered[: best + 1]) + group(ordered[best + 1 :])


def read_logits(
    module: Any, ids_BT: Tensor, read_N: Tensor, head: Any, positions_BT: Tensor | None = None
) -> Tensor:
    """Return the logits (N, V) at flattened positions; the output head is applied only there.

    What the model does to its logits after the head (scaling, capping) still happens, since only
    the head's input is narrowed.

    Args:
        module: the causal language model, however wrapped.
        ids_BT: token ids, padded on the right.
        read_N: positions in `ids_BT` flattened.
        head: the module that maps hidden states to logits.
        positions_BT: positions of packed samples; None counts each row from its beginning.
    """
    narrowed = False
    packed = {} if positions_BT is None else {"position_ids": positions_BT}

    def narrow(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal narrowed
        narrowed = True
        hidden_BTD = arguments[0]
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[read_N]
        return (hidden_ND.unsqueeze(0), *arguments[1:])

    handle = head.register_forward_pre_hook(narrow)
    try:
        logits = module(input_ids=ids_BT, use_cache=False, **packed).logits
    finally:
        handle.remove()
    return logits[0] if narrowed else logits.reshape(-1, logits.shape[-1])[read_N]


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


def fingerprint(samples: Sequence[Sample]) -> str:
    """Return 16 hexadecimal digits that change whenever a token or a position read does."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.ids}{sample.read}".encode())
    return digest.hexdigest()[:16]


def turn(count: int, step: int, seed: int) -> int:
    """Return which of `count` batches a step takes: all of them in turn, shuffled each time."""
    number, place = divmod(step, count)
    return int(np.random.default_rng([seed, number]).permutation(count)[place])


@dataclass(frozen=True)
class Source:
    """Samples that make up a share of each batch."""

    samples: tuple[Sample, ...]
    count: int
    """How many of each batch."""


def schedule(sources: Sequence[Source], steps: int, seed: int) -> list[Sample]:
    """Return the samples of all batches, in order, `sum(count)` for each of `steps`.

    Each source is gone through in a new random order again and again, its samples dealt to batches
    with others of similar length.
    """
    streams = [
        _stream(source, np.random.default_rng([seed, number]))
        for number, source in enumerate(sources)
    ]
    return [sample for _ in range(steps) for stream in streams for sample in next(stream)]


def _stream(source: Source, generator: np.random.Generator) -> Iterator[list[Sample]]:
    """Deal each pass out in batches; a window of eight is sorted by length, then shuffled."""
    count = source.count
    waiting: list[Sample] = []
    while True:
        order = generator.permutation(len(source.samples))
        waiting += [source.samples[index] for index in order]
        while len(waiting) >= count:
            window = min(8, len(waiting) // count)
            taken, waiting = waiting[: window * count], waiting[window * count :]
            taken.sort(key=len)
            for number in generator.permutation(window):
                yield taken[number * count : (number + 1) * count]

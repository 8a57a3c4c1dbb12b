"""The next token: the likeliest, or one drawn from the distribution at a temperature.

A draw depends on the request and its position alone, so that an answer is the same whatever else
is answered beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from keepshot.scoring.request import Generate, Request


def next_tokens(logits: Tensor, asked: Sequence[tuple[Request, int]]) -> list[int]:
    """Return one token for each row.

    Args:
        logits: float32 [N, V].
        asked: N requests, each with the number of tokens it has got so far.
    """
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for row, (request, position) in enumerate(asked):
        if is_sampled(request):
            assert isinstance(request, Generate)
            tokens[row] = _draw(logits[row], request, position)
    return tokens


def is_sampled(request: Request) -> bool:
    """Say whether this request's answer is drawn at random."""
    return isinstance(request, Generate) and request.temperature > 0


def _draw(logits: Tensor, request: Generate, position: int) -> int:
    """Draw by inverting the cumulative distribution at one seeded uniform number."""
    context = hashlib.sha256(repr(request.context).encode()).digest()[:8]
    seed = (request.seed, position, int.from_bytes(context))
    uniform = float(np.random.default_rng(seed).random())
    shares = torch.softmax(logits.double() / request.temperature, dim=-1)
    place = torch.searchsorted(shares.cumsum(dim=-1), uniform)
    return min(int(place), len(logits) - 1)

"""From hidden states and logits to log-probabilities and next tokens, never holding all logits.

The head is applied to the positions that are read, a slice of the vocabulary at a time, so that a
slice of logits stays in the processor's cache: N positions, V vocabulary, D width. A draw depends
on the request and its position alone: an answer is the same whatever is answered beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from keepshot.scoring.request import Generate, Request

Finish = Callable[[Tensor], Tensor]
CPU_LOGITS = 2**21
"""A slice holds at most so many logits (8 MiB in float32)."""
GPU_LOGITS = 2**26
NARROWEST = 1024
"""Narrower slices of the vocabulary waste the matrix product: positions are sliced instead."""


def read_logits(logits: Tensor, pairs: Sequence[tuple[int, int]]) -> tuple[list[int], list[float]]:
    """Return the likeliest token of each row, and the log-probability of each (row, token).

    Args:
        logits: float32 [N, V].
        pairs: places to read.
    """
    likeliest: list[int] = logits.argmax(dim=-1).tolist()
    if not pairs:
        return likeliest, []
    rows, tokens = torch.tensor(pairs, device=logits.device).unbind(dim=1)
    log_probs = logits[rows, tokens] - torch.logsumexp(logits, dim=-1)[rows]
    return likeliest, log_probs.tolist()


def read_hidden(
    head: Any, finish: Finish, hidden: Tensor, pairs: Sequence[tuple[int, int]]
) -> tuple[list[int], list[float]]:
    """Return what `read_logits` would for the logits of `hidden`.

    Args:
        head: gives logits; sliced along the vocabulary if it is an ordinary linear layer.
        finish: what the family does to logits after the head, each by itself.
        hidden: [N, D].
        pairs: (row, token) places to read.
    """
    most = CPU_LOGITS if hidden.device.type == "cpu" else GPU_LOGITS
    likeliest: list[int] = []
    log_probs: dict[int, float] = {}
    rows = _rows(head, most)
    for start in range(0, len(hidden), rows):
        part = hidden[start : start + rows]
        wanted = [i for i, (row, _) in enumerate(pairs) if start <= row < start + rows]
        inside = [(pairs[i][0] - start, pairs[i][1]) for i in wanted]
        if type(head) is nn.Linear:
            found, values = _read_in_slices(head, finish, part, inside, most)
        else:
            found, values = read_logits(finish(head(part)).float(), inside)
        likeliest += found
        log_probs |= zip(wanted, values, strict=True)
    return likeliest, [log_probs[i] for i in range(len(pairs))]


def _rows(head: Any, most: int) -> int:
    """Return how many positions to read at once."""
    if type(head) is nn.Linear:
        return max(1, most // min(NARROWEST, head.out_features))
    return max(1, 8 * most // int(head.weight.shape[0]))


def _read_in_slices(
    head: nn.Linear, finish: Finish, hidden: Tensor, pairs: Sequence[tuple[int, int]], most: int
) -> tuple[list[int], list[float]]:
    """Go through the vocabulary, keeping each row's best, its sum of exponentials, and `pairs`."""
    device, num_rows = hidden.device, len(hidden)
    width = max(NARROWEST, most // num_rows)
    best = torch.full((num_rows,), -torch.inf, device=device)
    token = torch.zeros(num_rows, dtype=torch.long, device=device)
    total = torch.zeros(num_rows, device=device)
    places = torch.tensor(pairs, dtype=torch.long, device=device).reshape(-1, 2)
    read = torch.zeros(len(pairs), device=device)
    offset: Any = head.bias
    for start in range(0, head.out_features, width):
        stop = min(start + width, head.out_features)
        bias = None if offset is None else offset[start:stop]
        logits = finish(nn.functional.linear(hidden, head.weight[start:stop], bias)).float()
        inside = (places[:, 1] >= start) & (places[:, 1] < stop)
        rows, tokens = places[inside].unbind(dim=1)
        read[inside] = logits[rows, tokens - start]
        highest, at = logits.max(dim=-1)
        # Strictly above: of equal logits the first counts, as in an argmax over all of them.
        token = torch.where(highest > best, at + start, token)
        above = torch.maximum(best, highest)
        total *= torch.exp(best - above)
        total += logits.sub_(above[:, None]).exp_().sum(dim=-1)
        best = above
    log_probs = read - (best + total.log())[places[:, 0]]
    return token.tolist(), log_probs.tolist()


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

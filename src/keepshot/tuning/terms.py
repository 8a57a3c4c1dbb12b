"""Losses as pure functions of logits or weights; they know nothing of models, data or training.

Axes: N marked positions, V vocabulary. Those of logits return nats averaged over N, in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Direction = Literal["forward", "reverse"]


def next_token(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return the mean cross-entropy of the target tokens, a scalar.

    Args:
        logits_NV: logits at the positions that predict the targets.
        targets_N: token ids.
    """
    return functional.cross_entropy(logits_NV.float(), targets_N)


def kl_divergence(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, mask_N: Tensor, direction: Direction
) -> Tensor:
    """Return the mean divergence between two next-token distributions, a scalar >= 0.

    Exactly 0 where both logits are equal. Logits are defined up to a constant per position, so
    log-probabilities serve as well.

    Args:
        student_logits_NV: logits of the model in training.
        teacher_logits_NV: logits of the untuned model; no gradient flows into them.
        mask_N: True at the positions that count.
        direction: `forward` is KL(teacher || student), `reverse` is KL(student || teacher).
    """
    student_NV = functional.log_softmax(student_logits_NV[mask_N].float(), dim=-1)
    teacher_NV = functional.log_softmax(teacher_logits_NV[mask_N].float().detach(), dim=-1)
    if student_NV.shape[0] == 0:
        return student_logits_NV.sum() * 0.0
    leading_NV, other_NV = (
        (teacher_NV, student_NV) if direction == "forward" else (student_NV, teacher_NV)
    )
    # sum p (log p - log q) is 0 term by term when p == q, unlike cross-entropy minus entropy.
    return torch.sum(leading_NV.exp() * (leading_NV - other_NV), dim=-1).mean()


def coarse_log_probs(logits_NV: Tensor, kept_NK: Tensor) -> Tensor:
    """Return log-probabilities (N, K + 1) of K tokens and of all others together, in float32.

    Two models' `kl_divergence` over these is at most that over the vocabulary, and as much where
    K is all tokens but one.

    Args:
        logits_NV: logits.
        kept_NK: the tokens of each position that stay apart, each once, fewer than V.
    """
    logits_NV = logits_NV.float()
    rest_NV = logits_NV.scatter(1, kept_NK, -torch.inf)
    parts_N1 = torch.logsumexp(rest_NV, dim=1, keepdim=True)
    return functional.log_softmax(torch.cat([logits_NV.gather(1, kept_NK), parts_N1], 1), dim=1)


def token_log_probs(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return the log-probability (N) of each target token, in float32."""
    return -functional.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def k3(student_log_probs_N: Tensor, teacher_log_probs_N: Tensor) -> Tensor:
    """Return the k3 estimate of KL(student || teacher), a scalar >= 0, from single tokens.

    It is `r - 1 - log r` with `r` the teacher's probability of a token over the student's: exactly
    0 where both agree, and unbiased where the tokens are drawn from the student. On given tokens,
    as here, it is a penalty of the same shape, not an estimate of that divergence.

    Args:
        student_log_probs_N: of the tokens, under the model in training.
        teacher_log_probs_N: of the same tokens, under the untuned model; no gradient flows in.
    """
    log_ratio_N = teacher_log_probs_N.detach().float() - student_log_probs_N.float()
    return (torch.expm1(log_ratio_N) - log_ratio_N).mean()


def pull(pairs: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
    """Return half the weighted squared distance of weights from where they started, a scalar.

    Without importances this is L2-SP (arXiv 1802.01483, eq. 2), with a diagonal Fisher EWC
    (arXiv 1612.00796, eq. 3).

    Args:
        pairs: each weight with its starting point and its importance (None: 1), of one shape.
    """
    parts = [
        ((now - start).float().square() * (1.0 if importance is None else importance)).sum()
        for now, start, importance in pairs
    ]
    return 0.5 * torch.stack(parts).sum()


def likely(log_probs_N: Tensor, threshold: float) -> Tensor:
    """Return True (N) where a token's perplexity is at most `threshold` (arXiv 2501.14315)."""
    return (-log_probs_N).exp() <= threshold


def annealed(first: float, last: float, step: int, steps: int) -> float:
    """Return a weight that goes from `first` at step 0 to `last` at step `steps - 1`, linearly."""
    if steps < 2:
        return first
    return first + (last - first) * min(step, steps - 1) / (steps - 1)

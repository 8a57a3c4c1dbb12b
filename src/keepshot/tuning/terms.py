"""Losses as pure functions of logits; they know nothing of models, data or training.

Axes: N marked positions, V vocabulary. All return nats averaged over N, in float32.
"""

from __future__ import annotations

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

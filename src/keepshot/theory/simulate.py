"""Monte Carlo of prompts, with standard errors: what every closed form is checked against.

A demonstration's token is a linear map of d + 1 standard normals, so the weights of a head are
pulled back through that map once and the normals are read twice; nothing is copied. Per-prompt
squared errors use the noiseless label, and the query's own noise adds exactly s2 to their mean.
`linear_attention.attend` is the same model written down literally; the tests hold both together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keepshot.theory.linear_attention import Attention, World

CHUNK_NUMBERS = 1 << 17
"""Normals per chunk: 1 MB, which stays in the cache of one core."""


@dataclass(frozen=True)
class Estimate:
    """Means over prompts, with their standard errors."""

    mean: Tensor
    se: Tensor
    num_prompts: int


@dataclass(frozen=True)
class RandomTasks:
    """An unseen task per prompt: a random direction with |theta| = norm, |.| weighted by S."""

    norm: float


def stack(heads: Sequence[Attention]) -> Attention:
    """Put several heads side by side, as a batch [L]."""
    return Attention(
        torch.stack([head.v for head in heads]), torch.stack([head.q for head in heads])
    )


def sampled_errors(
    heads: Attention,
    world: World,
    task: Tensor | RandomTasks,
    shots: int,
    num_prompts: int,
    generator: torch.Generator,
) -> Estimate:
    """Estimate E(y_q - f)^2 of several heads on the same prompts.

    Args:
        heads: v [L, D] and Q [L, D, D].
        world: without batch dimensions.
        task: theta [d], or a random task per prompt.
        shots: demonstrations n per prompt.
        num_prompts: prompts drawn.
        generator: source of the draws, on the world's device.

    Returns:
        Mean and standard error per head, [L].
    """
    residuals = _Residuals(heads, world, task, shots)
    chunk = max(1, min(num_prompts, CHUNK_NUMBERS // residuals.numbers_per_prompt))
    buffer = torch.empty(
        chunk * residuals.numbers_per_prompt, dtype=torch.float64, device=heads.v.device
    )
    sums, squares, left = heads.v.new_zeros(len(heads.v)), heads.v.new_zeros(len(heads.v)), 0
    left = num_prompts
    while left > 0:
        size = min(chunk, left)
        normals = buffer[: size * residuals.numbers_per_prompt].normal_(generator=generator)
        squared_LB = residuals.of(normals, size).square()
        sums += squared_LB.sum(1)
        squares += squared_LB.square().sum(1)
        left -= size
    mean = sums / num_prompts
    spread = (squares / num_prompts - mean**2).clamp(min=0.0) * (
        num_prompts / max(num_prompts - 1, 1)
    )
    return Estimate(mean + world.noise, (spread / num_prompts).sqrt(), num_prompts)


class _Residuals:
    """theta . x_q - f for prompts made of given normals; shapes: L heads, B prompts, E = d + 1.

    `white` inputs are standard normal; x is the covariance's root times them. Prompts are the last
    dimension everywhere, so that every product runs over contiguous numbers: a matrix product per
    prompt, tiny as it is, costs more in calls than in arithmetic.
    """

    def __init__(
        self, heads: Attention, world: World, task: Tensor | RandomTasks, shots: int
    ) -> None:
        d, c = world.dimension, world.constant
        self.world, self.task, self.shots, self.num_heads = world, task, shots, len(heads.v)
        root, noise = torch.linalg.cholesky(world.covariance), world.noise.sqrt()
        self.task_d1 = None if isinstance(task, RandomTasks) else (task @ root)[:, None]
        self.white_v = heads.v[:, :-2] @ root
        self.label_v, self.constant_v = heads.v[:, -2], c * heads.v[:, -1]
        own_task = 0.0 if self.task_d1 is None else torch.outer(self.label_v, self.task_d1[:, 0])
        self.values_LE = torch.cat([self.white_v + own_task, noise * self.label_v[:, None]], dim=1)
        """Values of a demonstration's normals; without the label's, where tasks are random."""
        reads = torch.cat([heads.q[..., :-2] @ root, c * heads.q[..., -1:]], dim=-1)
        label = reads[:, d : d + 1]
        self.white_q = torch.cat(
            [root.mT @ reads[:, :d], noise * label, label, c * reads[:, d + 1 :]], dim=1
        )
        """Rows: the key's weight on white inputs, on white noise, on the label, on the constant;
        columns: from white inputs and from the constant. [L, d + 3, d + 1]"""
        self.numbers_per_prompt = shots * (d + 1) + (d if self.task_d1 is not None else 2 * d)

    def of(self, normals: Tensor, size: int) -> Tensor:
        """Return the residuals [L, B] of prompts built from a flat vector of normals."""
        d, n = self.world.dimension, self.shots
        white_dB = normals[: size * d].view(d, size)
        rest = normals[size * d :]
        task_dB = self._white_tasks(rest[size * n * (d + 1) :])
        rows = self.white_q.flatten(0, 1)
        keys = torch.addmm(rows[:, d:], rows[:, :d], white_dB).view(self.num_heads, d + 3, size)
        own_LB = torch.addmm(self.constant_v[:, None], self.white_v, white_dB)
        output_LB = own_LB.mul_((keys[:, :d] * white_dB).sum(1).add_(keys[:, -1]))
        if n:
            demos_EnB = rest[: size * n * (d + 1)].view(d + 1, n, size)
            output_LB += self._read(demos_EnB, keys, task_dB)
        return (white_dB * task_dB).sum(0) - output_LB.div_(n + 1)

    def _white_tasks(self, normals: Tensor) -> Tensor:
        """Return root' theta, [d, B or 1], so that theta . x is its product with white inputs."""
        if not isinstance(self.task, RandomTasks):
            assert self.task_d1 is not None
            return self.task_d1
        directions = normals.view(self.world.dimension, -1)
        return directions * (self.task.norm / directions.square().sum(0).sqrt_())

    def _read(self, demos_EnB: Tensor, keys: Tensor, task_dB: Tensor) -> Tensor:
        """Return sum_i (v . z_i)(k . z_i), [L, B]; changes `keys`."""
        d = self.world.dimension
        value_LnB = (self.values_LE @ demos_EnB.flatten(1)).unflatten(1, demos_EnB.shape[1:])
        if self.task_d1 is None:
            signal_1nB = _contracted(task_dB[None], demos_EnB[:d])
            value_LnB.addcmul_(self.label_v[:, None, None], signal_1nB)
        keys[:, :d].addcmul_(keys[:, -2:-1], task_dB)
        key_LnB = _contracted(keys[:, : d + 1], demos_EnB)
        if self.world.constant:
            value_LnB += self.constant_v[:, None, None]
            key_LnB += keys[:, -1:]
        return value_LnB.mul_(key_LnB).sum(1)


def _contracted(weights_LEB: Tensor, demos_EnB: Tensor) -> Tensor:
    """Return each prompt's weights times its demonstrations, [L, n, B]."""
    found = weights_LEB[:, 0, None] * demos_EnB[0]
    for row in range(1, len(demos_EnB)):
        found.addcmul_(weights_LEB[:, row, None], demos_EnB[row])
    return found

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
        squared_BL = residuals.of(normals, size) ** 2
        sums += squared_BL.sum(0)
        squares += (squared_BL**2).sum(0)
        left -= size
    mean = sums / num_prompts
    spread = (squares / num_prompts - mean**2).clamp(min=0.0) * (
        num_prompts / max(num_prompts - 1, 1)
    )
    return Estimate(mean + world.noise, (spread / num_prompts).sqrt(), num_prompts)


class _Residuals:
    """theta . x_q - f for prompts made of given normals; shapes: B prompts, L heads.

    `white` inputs are standard normal; x is the covariance's root times them.
    """

    def __init__(
        self, heads: Attention, world: World, task: Tensor | RandomTasks, shots: int
    ) -> None:
        d, c = world.dimension, world.constant
        self.world, self.task, self.shots, self.num_heads = world, task, shots, len(heads.v)
        self.root = torch.linalg.cholesky(world.covariance)
        self.white_v = heads.v[:, :-2] @ self.root
        self.label_v, self.constant_v = heads.v[:, -2], c * heads.v[:, -1]
        reads = torch.cat([heads.q[..., :-2], c * heads.q[..., -1:]], dim=-1)  # of (x, c)
        scale = torch.eye(d + 1, dtype=torch.float64, device=heads.v.device)
        scale[:d, :d] = self.root
        keys = reads @ scale
        self.white_q = torch.cat(
            [self.root.mT @ keys[:, :d], keys[:, d : d + 1], c * keys[:, d + 1 :]], dim=1
        )
        """Rows: the key's weight on white inputs, on the label, on the constant. [L, d+2, d+1]"""
        self.numbers_per_prompt = shots * (d + 1) + (2 * d if self.random_tasks else d)

    @property
    def random_tasks(self) -> bool:
        return isinstance(self.task, RandomTasks)

    def of(self, normals: Tensor, size: int) -> Tensor:
        """Return the residuals [B, L] of prompts built from a flat vector of normals."""
        d, n = self.world.dimension, self.shots
        white_Bd = normals[: size * d].view(size, d)
        rest = normals[size * d :]
        task_Bd = self._white_tasks(rest[size * n * (d + 1) :], size)
        rows = self.white_q.flatten(0, 1)
        keys_BLD = torch.addmm(rows[:, d], white_Bd, rows[:, :d].mT).view(size, self.num_heads, -1)
        own_BL = torch.addmm(self.constant_v, white_Bd, self.white_v.mT)
        match_BL = (keys_BLD[..., :d] @ white_Bd[..., None])[..., 0] + keys_BLD[..., -1]
        output_BL = own_BL * match_BL
        if n:
            demos_BnE = rest[: size * n * (d + 1)].view(size, n, d + 1)
            output_BL = output_BL + self._read(demos_BnE, keys_BLD, task_Bd)
        one = len(task_Bd) == 1
        truth_B = white_Bd @ task_Bd[0] if one else (white_Bd * task_Bd).sum(-1)
        return truth_B[:, None] - output_BL / (n + 1)

    def _white_tasks(self, normals: Tensor, size: int) -> Tensor:
        """Return root' theta, [B or 1, d], so that theta . x is its product with white inputs."""
        if not isinstance(self.task, RandomTasks):
            return (self.task @ self.root)[None]
        directions = normals.view(size, self.world.dimension)
        return self.task.norm * directions / directions.norm(dim=1, keepdim=True)

    def _read(self, demos_BnE: Tensor, keys_BLD: Tensor, task_Bd: Tensor) -> Tensor:
        """Return sum_i (v . z_i)(k . z_i), [B, L], for demonstrations made of white normals."""
        label_BL1 = keys_BLD[..., -2:-1]
        keys_BLE = torch.cat(
            [
                keys_BLD[..., :-2] + label_BL1 * task_Bd[:, None],
                self.world.noise.sqrt() * label_BL1,
            ],
            dim=-1,
        )
        noise_L1 = (self.world.noise.sqrt() * self.label_v)[:, None]
        values_BLd = self.white_v + self.label_v[:, None] * task_Bd[:, None]
        values_BLE = torch.cat([values_BLd, noise_L1.expand(len(task_Bd), -1, 1)], dim=-1)
        if len(values_BLE) == 1:
            value_BnL = demos_BnE @ values_BLE[0].mT
        else:
            value_BnL = torch.bmm(demos_BnE, values_BLE.mT)
        if self.world.constant:
            value_BnL += self.constant_v
        read_BLE = torch.bmm(value_BnL.mT, demos_BnE)
        read_BL = (read_BLE * keys_BLE).sum(-1)
        if self.world.constant:
            read_BL = read_BL + value_BnL.sum(1) * keys_BLD[..., -1]
        return read_BL

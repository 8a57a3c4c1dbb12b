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
    """theta . x_q - f for prompts made of given normals; shapes: B prompts, L heads."""

    def __init__(
        self, heads: Attention, world: World, task: Tensor | RandomTasks, shots: int
    ) -> None:
        self.heads, self.world, self.task, self.shots = heads, world, task, shots
        d = world.dimension
        self.root = torch.linalg.cholesky(world.covariance)
        self.numbers_per_prompt = shots * (d + 1) + (2 * d if self.random_tasks else d)

    @property
    def random_tasks(self) -> bool:
        return isinstance(self.task, RandomTasks)

    def of(self, normals: Tensor, size: int) -> Tensor:
        """Return the residuals [B, L] of prompts built from a flat vector of normals."""
        d, n, c = self.world.dimension, self.shots, self.world.constant
        demos_BnE, rest = normals.split([size * n * (d + 1), len(normals) - size * n * (d + 1)])
        white_Bd = rest[: size * d].view(size, d)  # the query before the covariance's root
        query_BD = torch.cat(
            [white_Bd @ self.root.mT, white_Bd.new_zeros(size, 1), white_Bd.new_full((size, 1), c)],
            dim=1,
        )
        keys_BLD = torch.einsum("lde,be->bld", self.heads.q, query_BD)
        own_BL = (query_BD @ self.heads.v.mT) * torch.einsum("bld,bd->bl", keys_BLD, query_BD)
        task_Bd = self._white_tasks(rest[size * d :], size)
        if n:
            own_BL = own_BL + self._read(demos_BnE.view(size, n, d + 1), keys_BLD, task_Bd)
        truth_B = (white_Bd * task_Bd).sum(-1)
        return truth_B[:, None] - own_BL / (n + 1)

    def _white_tasks(self, normals: Tensor, size: int) -> Tensor:
        """Return root' theta, [B or 1, d], so that theta . x is its product with white inputs."""
        if not isinstance(self.task, RandomTasks):
            return (self.task @ self.root)[None]
        directions = normals.view(size, self.world.dimension)
        return self.task.norm * directions / directions.norm(dim=1, keepdim=True)

    def _read(self, demos_BnE: Tensor, keys_BLD: Tensor, task_Bd: Tensor) -> Tensor:
        """Return sum_i (v . z_i)(k . z_i), [B, L], for demonstrations made of white normals."""
        values_BLE, value_BL = self._pull_back(self.heads.v[None], task_Bd)
        keys_BLE, key_BL = self._pull_back(keys_BLD, task_Bd)
        if len(values_BLE) == 1:
            value_BnL = demos_BnE @ values_BLE[0].mT
        else:
            value_BnL = torch.bmm(demos_BnE, values_BLE.mT)
        value_BnL = value_BnL + value_BL[:, None]
        read_BLE = torch.bmm(value_BnL.mT, demos_BnE)
        return (read_BLE * keys_BLE).sum(-1) + value_BnL.sum(1) * key_BL

    def _pull_back(self, weights_BLD: Tensor, task_Bd: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights on (white input, white noise), [B, L, d + 1], and the constant's share."""
        label_BL1 = weights_BLD[..., -2:-1]
        inputs = weights_BLD[..., :-2] @ self.root + label_BL1 * task_Bd[:, None]
        noise = label_BL1 * self.world.noise.sqrt()
        noise = noise.expand(*inputs.shape[:-1], 1)
        return torch.cat([inputs, noise], dim=-1), self.world.constant * weights_BLD[..., -1]


def z_score(measured: float, predicted: float, se: float) -> float:
    """Return (measured - predicted) / se; 0 if both agree exactly and nothing was random."""
    gap = measured - predicted
    if se > 0:
        return gap / se
    return 0.0 if abs(gap) <= 1e-9 * max(1.0, abs(predicted)) else float("inf")

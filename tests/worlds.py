"""Random worlds and heads of the theory lab, by seed."""

from __future__ import annotations

import torch
from torch import Tensor

from keepshot.theory.linear_attention import Attention, World, make_world, pretrained


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def random_world(d: int, seed: int, noise: float = 0.3, constant: float = 1.0) -> World:
    root = normal(d, d, seed=seed)
    scale = 0.7 / d
    return make_world(
        scale * root @ root.T + 0.4 * torch.eye(d, dtype=torch.float64), noise, constant=constant
    )


def random_head(world: World, seed: int, size: float = 0.2) -> Attention:
    """Any values and any Q, no entry left out, not far from where pretraining ends."""
    base = pretrained(world)
    d = world.dimension
    return Attention(
        base.v + size * normal(d + 2, seed=seed),
        base.q + size * normal(d + 2, d + 2, seed=seed + 1),
    )

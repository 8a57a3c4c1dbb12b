"""Linear attention on in-context linear regression: the model, its prompts, its parameters.

Everything is a float64 tensor, on whichever device it was made, with any leading batch dimensions.

    world     x ~ N(0, S),  y = theta . x + e,  e ~ N(0, s2)
    token     z = (x, y, c), width D = d + 2; the query's is (x_q, 0, c)
    output    f(Z) = v' Z Z' Q z_q / N,  Z = [z_1 .. z_n z_q],  N = n + 1

`c` is the constant channel: 1, or 0 to be without it. Source of the model: arXiv 2602.23197; the
constant channel is ours (docs/theory.md says why it is needed).

Shape suffixes: B prompts, T = n + 1 tokens, D token width, d inputs; `...` is any batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from keepshot.errors import ConfigError

INFINITY = math.inf


@dataclass(frozen=True)
class World:
    """Where inputs and labels come from."""

    covariance: Tensor
    """S, [..., d, d], positive definite."""
    noise: Tensor
    """s2, the variance of a label's error, [...], at least 0."""
    constant: float = 1.0
    """c, the constant channel: 1 with it, 0 without."""

    @property
    def dimension(self) -> int:
        """Number of inputs, d."""
        return self.covariance.shape[-1]

    @property
    def width(self) -> int:
        """Width of a token, D = d + 2."""
        return self.dimension + 2

    def squared(self, theta: Tensor) -> Tensor:
        """Return |theta|^2 = theta' S theta, the variance that a task gives its labels."""
        return torch.einsum("...i,...ij,...j->...", theta, self.covariance, theta)


@dataclass(frozen=True)
class Attention:
    """One head: `v` is the last row of the value matrix, `q` the product W_K' W_Q."""

    v: Tensor
    """[..., D]: v1 (d), w, and the constant channel's share."""
    q: Tensor
    """[..., D, D]; the block of the inputs is Q11."""

    @property
    def v1(self) -> Tensor:
        """The value of an input, [..., d]."""
        return self.v[..., :-2]

    @property
    def w(self) -> Tensor:
        """The value of a label, [...]."""
        return self.v[..., -2]

    @property
    def q11(self) -> Tensor:
        """How inputs match inputs, [..., d, d]."""
        return self.q[..., :-2, :-2]

    def with_values(self, v1: Tensor, w: Tensor | None = None) -> Attention:
        """Return the same head with other values of inputs and, if given, of labels."""
        v = torch.cat([v1, self.v[..., -2:].expand(*v1.shape[:-1], 2)], dim=-1)
        if w is not None:
            v[..., -2] = w
        return replace(self, v=v)


def make_world(
    covariance: Sequence[Sequence[float]] | Tensor,
    noise: float | Tensor,
    *,
    constant: float = 1.0,
    device: str | torch.device = "cpu",
) -> World:
    """Check and build a world.

    Raises:
        ConfigError: if the covariance is not symmetric positive definite, or the noise negative.
    """
    matrix = torch.as_tensor(covariance, dtype=torch.float64, device=device)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] < 1:
        raise ConfigError(f"covariance: expected a square matrix, found {list(matrix.shape)}")
    if not torch.allclose(matrix, matrix.mT, rtol=1e-9, atol=0.0):
        raise ConfigError("covariance: not symmetric; give (A + A') / 2")
    smallest = float(torch.linalg.eigvalsh(matrix).min())
    if not smallest > 0:
        raise ConfigError(
            f"covariance: not positive definite, its smallest eigenvalue is {smallest:.3g}; "
            "every eigenvalue must be above 0"
        )
    variance = torch.as_tensor(noise, dtype=torch.float64, device=device)
    if not bool((variance >= 0).all()) or not bool(torch.isfinite(variance).all()):
        raise ConfigError(f"sigma2 {noise!r}: a variance is finite and at least 0")
    return World(matrix, variance, constant)


def embed(v1: Tensor, w: Tensor | float, q11: Tensor) -> Attention:
    """Build a head that reads inputs and labels and ignores the constant channel."""
    d = q11.shape[-1]
    batch = torch.broadcast_shapes(v1.shape[:-1], q11.shape[:-2], torch.as_tensor(w).shape)
    v, q = q11.new_zeros(*batch, d + 2), q11.new_zeros(*batch, d + 2, d + 2)
    v[..., :d], v[..., d], q[..., :d, :d] = v1, w, q11
    return Attention(v, q)


def pretrained(
    world: World, prior: Tensor | None = None, shots: float | Tensor = INFINITY
) -> Attention:
    """Return the pretrained optimum: v1 = 0, w = 1 and Q11 by `exact.preconditioner`'s formula.

    Args:
        world: where prompts come from.
        prior: covariance P of the pretraining tasks, theta ~ N(0, P), [..., d, d]; I / d if None.
        shots: demonstrations m per pretraining prompt; with infinitely many, Q11 = S^-1.
    """
    d = world.dimension
    count = torch.as_tensor(shots, dtype=torch.float64, device=world.covariance.device)
    spread = torch.eye(d, dtype=torch.float64, device=count.device) / d if prior is None else prior
    label_variance = (spread @ world.covariance).diagonal(dim1=-2, dim2=-1).sum(-1) + world.noise
    shrinkage = (label_variance / (count + 1.0))[..., None, None]
    q11 = torch.linalg.inv(world.covariance + shrinkage * torch.linalg.inv(spread))
    return embed(q11.new_zeros(d), 1.0, q11)


def draw_prompts(
    world: World, theta: Tensor, shots: int, num_prompts: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw prompts literally: tokens and what the query's label would be.

    Args:
        world: without batch dimensions.
        theta: one task [d], or one per prompt [B, d].
        shots: demonstrations n per prompt.
        num_prompts: B.
        generator: source of the draws.

    Returns:
        Tokens [B, n + 1, D], the query last with label 0, and its label with noise [B].
    """
    d, device = world.dimension, world.covariance.device
    root = torch.linalg.cholesky(world.covariance)
    normal = torch.empty(num_prompts, shots + 1, d + 1, dtype=torch.float64, device=device)
    normal.normal_(generator=generator)
    x_BTd = normal[..., :d] @ root.mT
    y_BT = torch.einsum("bti,bi->bt", x_BTd, theta.expand(num_prompts, d))
    y_BT = y_BT + world.noise.sqrt() * normal[..., d]
    tokens_BTD = torch.cat(
        [x_BTd, y_BT[..., None], torch.full_like(y_BT, world.constant)[..., None]], dim=-1
    )
    tokens_BTD[:, -1, d] = 0.0
    return tokens_BTD, y_BT[:, -1]


def attend(head: Attention, tokens_BTD: Tensor) -> Tensor:
    """Return f(Z) for every prompt, [B], exactly as the model is written down."""
    query_BD = tokens_BTD[:, -1]
    gram_BDD = tokens_BTD.mT @ tokens_BTD / tokens_BTD.shape[1]
    return torch.einsum("d,bde,ef,bf->b", head.v, gram_BDD, head.q, query_BD)


def attend_heads(heads: Sequence[Attention], tokens_BTD: Tensor) -> Tensor:
    """Return the sum of several heads' outputs, [B]."""
    return torch.stack([attend(head, tokens_BTD) for head in heads]).sum(0)


def attend_layers(layers: Sequence[tuple[Tensor, Tensor]], tokens_BTD: Tensor) -> Tensor:
    """Return the query's label after several layers with residual streams, [B].

    Args:
        layers: (value matrix [D, D], Q [D, D]) each; a layer adds P Z Z'_demos Q Z / N to Z, the
            query being masked as a key, as in arXiv 2306.00297.
        tokens_BTD: prompts; the query's label slot is read at the end, with its sign turned.
    """
    state_BTD, num_tokens = tokens_BTD, tokens_BTD.shape[1]
    for value, q in layers:
        demos_BTD = state_BTD[:, :-1]
        gram_BDD = demos_BTD.mT @ demos_BTD / num_tokens
        state_BTD = state_BTD + state_BTD @ (value @ gram_BDD @ q).mT
    return -state_BTD[:, -1, -2]

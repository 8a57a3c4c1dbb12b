"""Where tuning ends: optima of every method, and the special case Q11 = S^-1 in plain numbers.

Inner products <a, b> = a' S b and norms are weighted by the covariance S, unless a name says
`euclidean`. Sources: arXiv 2602.23197 for the value-only optimum and the limits in n; the finite-n
expressions, the flow's end and everything about the constant channel are derived in docs/theory.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keepshot.theory.exact import Count, Quadratic, Tasks, difference_form, error_form
from keepshot.theory.linear_attention import Attention, World


def value_only(head: Attention, world: World, theta: Tensor) -> Attention:
    """Return what value-only tuning on zero-shot prompts of one task reaches.

    With Q11 = S^-1 it is v1 = theta / (d + 4). Labels never appear at zero shots, so w stays.
    """
    return Attention(error_form(head.q, world, theta, 0.0).minimum(head.v), head.q)


def value_only_aux(head: Attention, world: World, theta: Tensor, shots: Count) -> Attention:
    """Return value-only tuning whose auxiliary few-shot loss on the target then chooses w.

    v1 is the zero-shot optimum; w minimises the target's error at `shots` given that v1. At zero
    shots w plays no part and stays.
    """
    start = value_only(head, world, theta)
    form = error_form(head.q, world, theta, shots)
    return Attention(form.minimum(start.v, free=[world.dimension]), head.q)


def value_only_joint(
    head: Attention, world: World, theta: Tensor, shots: Count, weight: float | Tensor
) -> Attention:
    """Return the joint optimum of v under L_ZS + weight * L_FS(shots), both on the target."""
    loss = error_form(head.q, world, theta, 0.0).plus(
        error_form(head.q, world, theta, shots), weight
    )
    return Attention(loss.minimum(head.v), head.q)


def value_only_kl(
    head: Attention, world: World, theta: Tensor, anchors: Tasks, shots: float, weight: float
) -> Attention:
    """Return the optimum of v under L_ZS + weight * E (f - f_pretrained)^2 on few-shot prompts.

    For Gaussian predictions of equal variance the second term is the KL divergence between tuned
    and untuned model, up to a factor. It is averaged over `anchors`.
    """
    term = anchors.mean(difference_form(head.q[None], head, world, anchors.thetas, shots))
    loss = error_form(head.q, world, theta, 0.0).plus(term, weight)
    return Attention(loss.minimum(head.v), head.q)


def full_limit(head: Attention, world: World, theta: Tensor) -> Attention:
    """Return where gradient flow on the zero-shot loss of one task takes all of (v, Q).

    From a head with v1 = 0 and symmetric positive definite Q11. Flow conserves
    |v1|^2 - |Q11|^2 - q^2 (euclidean), q being Q's entry for the constant channel.

    - With the channel: Q11 -> 0, v1 -> theta / (c^2 q), and q solves the conservation law,
      q^4 - k q^2 - |theta|^2 / c^4 = 0 with k = |Q11(0)|^2. The error reaches the noise floor.
    - Without: v1 = s theta / (d + 4) and Q11 = S^-1 / s, where s solves
      (|theta| / (d + 4))^2 s^4 + k s^2 = |S^-1|^2. The error ends where value-only tuning ends.
    """
    start = (head.q11**2).sum(dim=(-2, -1))
    euclidean = (theta**2).sum(-1)
    d, c = world.dimension, world.constant
    v, q = head.v.clone(), torch.zeros_like(head.q)
    if c:
        squared = (start + (start**2 + 4.0 * euclidean / c**4).sqrt()) / 2.0
        q[..., -1, -1] = squared.sqrt()
        v[..., :d] = theta / (c**2 * squared.sqrt()[..., None])
        return Attention(v, q)
    inverse = torch.linalg.inv(world.covariance)
    target, norm = euclidean / (d + 4.0) ** 2, (inverse**2).sum(dim=(-2, -1))
    squared = 2.0 * norm / (start + (start**2 + 4.0 * target * norm).sqrt())
    scale = squared.sqrt()
    v[..., :d] = scale[..., None] * theta / (d + 4.0)
    q[..., :d, :d] = inverse / scale[..., None, None]
    return Attention(v, q)


def zero_shot_floor(world: World, theta: Tensor) -> Tensor:
    """Return s2 + 2 |theta|^2 / (d + 4), the least zero-shot error of any homogeneous cubic."""
    return world.noise + 2.0 * world.squared(theta) / (world.dimension + 4.0)


# -- Q11 = S^-1, in inner products alone -------------------------------------------------------


@dataclass(frozen=True)
class Products:
    """What the error depends on when Q11 = S^-1: inner products of theta, v1 and u = v1 + w theta.

    All fields broadcast; none holds a vector, so ten thousand settings are ten thousand numbers.
    """

    dimension: Tensor
    noise: Tensor
    theta_theta: Tensor
    theta_v1: Tensor
    v1_v1: Tensor
    w: Tensor

    def error(self, shots: Count) -> Tensor:
        """Return Err(n, theta) of (v1, w, S^-1).

        s2 + |theta|^2 - (2n/N) <theta,u> + n (n+d+1)/N^2 |u|^2 + w^2 s2 n d/N^2
        - (2 (d+2)/N) (<theta,v1> - (n/N) <u,v1>) + (d+2)(d+4)/N^2 |v1|^2,   N = n + 1.
        """
        n = torch.as_tensor(shots, dtype=torch.float64, device=self.noise.device)
        d, total = self.dimension, n + 1.0
        theta_u = self.theta_v1 + self.w * self.theta_theta
        v1_u = self.v1_v1 + self.w * self.theta_v1
        u_u = v1_u + self.w * theta_u
        return (
            self.noise
            + self.theta_theta
            - 2.0 * n / total * theta_u
            + n / total**2 * ((n + d + 1.0) * u_u + self.w**2 * self.noise * d)
            - 2.0 * (d + 2.0) / total * (self.theta_v1 - n / total * v1_u)
            + (d + 2.0) * (d + 4.0) / total**2 * self.v1_v1
        )

    def limit(self) -> Tensor:
        """Return the error as shots grow: s2 + |(1 - w) theta - v1|^2."""
        left = 1.0 - self.w
        return self.noise + left**2 * self.theta_theta - 2.0 * left * self.theta_v1 + self.v1_v1

    def best_w(self, shots: Count) -> Tensor:
        """Return the w that minimises the error at `shots` >= 1, v1 being what it is.

        [(n+1)|theta|^2 - (n+2d+3) <v1,theta>] / [(n+d+1)|theta|^2 + s2 d]; `w` is not read.
        """
        n = torch.as_tensor(shots, dtype=torch.float64, device=self.noise.device)
        d = self.dimension
        above = (n + 1.0) * self.theta_theta - (n + 2.0 * d + 3.0) * self.theta_v1
        return above / ((n + d + 1.0) * self.theta_theta + self.noise * d)


def products(world: World, theta: Tensor, v1: Tensor, w: Tensor | float) -> Products:
    """Take the inner products of a task and a head whose Q11 is S^-1."""
    across = torch.einsum("...ij,...j->...i", world.covariance, v1)
    return Products(
        dimension=world.noise.new_tensor(float(world.dimension)),
        noise=world.noise,
        theta_theta=world.squared(theta),
        theta_v1=(theta * across).sum(-1),
        v1_v1=(v1 * across).sum(-1),
        w=torch.as_tensor(w, dtype=torch.float64, device=across.device),
    )


def shrinkage(dimension: Count, noise: Count, tau2: Count, shots: Count) -> Tensor:
    """Return c_m = (m+1) tau2 / ((m+d+1) tau2 + s2), by which m shots shrink S^-1.

    For tasks theta ~ N(0, tau2 S^-1), such as N(0, tau2 I) with S = I; 1 as m grows.
    """
    m = torch.as_tensor(shots, dtype=torch.float64)
    spread = torch.as_tensor(tau2, dtype=torch.float64)
    ratio = torch.as_tensor(noise, dtype=torch.float64) / spread
    return 1.0 / (1.0 + (torch.as_tensor(dimension, dtype=torch.float64) + ratio) / (m + 1.0))


def quadratic_in_w(form: Quadratic, v: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """Return curvature and minimiser of a loss along w, the other values being those of `v`."""
    curvature = form.matrix[..., dimension, dimension]
    return curvature, form.minimum(v, free=[dimension])[..., dimension]

"""Exact errors and optima of linear attention, for any values, any Q, any covariance and shots.

For fixed Q the output is linear in v, so every expected squared error is a quadratic form in v,

    Err(v) = offset - 2 linear . v + v' matrix v,

whose coefficients are Gaussian moments. With the query's token z = (x, 0, c), b = z' Q z and
B_j = E[b^j z z'], and with demonstrations' second moment M = E[z_i z_i'] and mean m = (0, 0, c):

    N   linear = (n M Q B_0 + B_1) theta
    N^2 matrix = n^2 M K M + n (M Q B_1 + B_1 Q' M) + B_2
                 + n (tr(M K) M + M K' M - 2 (m' K m) m m'),      K = Q B_0 Q'

docs/theory.md derives both, line by line; the tests check each moment symbolically and each
function against Monte Carlo. The general form, the averages over tasks and everything that uses the
constant channel are ours; the special case Q11 = S^-1 is that of arXiv 2602.23197.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keepshot.theory.linear_attention import Attention, World

Count = float | Tensor
"""A number of demonstrations, or a batch of them."""


@dataclass(frozen=True)
class Quadratic:
    """A loss as a function of v: offset - 2 linear . v + v' matrix v, with any batch."""

    offset: Tensor
    linear: Tensor
    matrix: Tensor

    def at(self, v: Tensor) -> Tensor:
        """Return the loss at `v` [..., D]."""
        curved = torch.einsum("...i,...ij,...j->...", v, self.matrix, v)
        return self.offset - 2.0 * (self.linear * v).sum(-1) + curved

    def plus(self, other: Quadratic, weight: float | Tensor = 1.0) -> Quadratic:
        """Return this loss plus `weight` times another."""
        factor = torch.as_tensor(weight, dtype=torch.float64, device=self.offset.device)
        return Quadratic(
            self.offset + factor * other.offset,
            self.linear + factor[..., None] * other.linear,
            self.matrix + factor[..., None, None] * other.matrix,
        )

    def minimum(self, start: Tensor, free: Sequence[int] | None = None) -> Tensor:
        """Return the minimiser that gradient descent from `start` reaches.

        Directions in which the loss is flat keep their start: the minimal update.

        Args:
            start: [..., D].
            free: the entries of v that are trained; all if None.
        """
        index = torch.tensor(
            list(range(start.shape[-1])) if free is None else list(free), device=start.device
        )
        slope = self.linear - torch.einsum("...ij,...j->...i", self.matrix, start)
        block = self.matrix[..., index[:, None], index]
        step = torch.linalg.pinv(block, hermitian=True, rtol=1e-12) @ slope[..., index, None]
        moved = start.expand(*step.shape[:-2], start.shape[-1]).clone()
        moved[..., index] += step[..., 0]
        return moved


# -- Gaussian moments of the query -------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """b(x) = x' s x + r . x + t as a polynomial of the query's input."""

    s: Tensor
    r: Tensor
    t: Tensor


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _form(q: Tensor, world: World) -> _Form:
    """Write b = z' Q z for z = (x, 0, c) as a polynomial in x."""
    c = world.constant
    q11 = q[..., :-2, :-2]
    return _Form(
        s=(q11 + q11.mT) / 2.0,
        r=c * (q[..., :-2, -1] + q[..., -1, :-2]),
        t=c**2 * q[..., -1, -1],
    )


def _padded(xx: Tensor, x1: Tensor, one: Tensor, world: World) -> Tensor:
    """Put E[p xx'], E[p x] and E[p] together as E[p z z'], [..., D, D]."""
    c = world.constant
    batch = torch.broadcast_shapes(xx.shape[:-2], x1.shape[:-1], one.shape)
    d = world.dimension
    full = xx.new_zeros(*batch, d + 2, d + 2)
    full[..., :d, :d] = xx
    if c:
        full[..., :d, -1] = full[..., -1, :d] = c * x1
        full[..., -1, -1] = c**2 * one
    return full


@dataclass(frozen=True)
class QueryMoments:
    """E[p z z'] over the query's token z for p = 1, b, b' and b b'; b = z' Q z, b' = z' Q' z."""

    plain: Tensor
    first: Tensor
    second: Tensor
    both: Tensor


def _first_moment(form: _Form, world: World) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rho = E[b], S s S, S r and E[b x x'] of one form."""
    cov = world.covariance
    sandwich = cov @ form.s @ cov
    mean = _trace(form.s @ cov) + form.t
    slope = (cov @ form.r[..., None])[..., 0]
    return mean, sandwich, slope, mean[..., None, None] * cov + 2.0 * sandwich


def query_moments(q: Tensor, other: Tensor, world: World) -> QueryMoments:
    """Return the moments of the query for two matrices Q, Q', by Isserlis' theorem.

    Args:
        q: [..., D, D].
        other: the same object as `q` saves half of the work.
        world: covariance and constant channel.
    """
    cov = world.covariance
    one = _form(q, world)
    two = one if other is q else _form(other, world)
    mean_1, sandwich_1, slope_1, xx_1 = _first_moment(one, world)
    first = _padded(xx_1, slope_1, mean_1, world)
    if other is q:
        mean_2, sandwich_2, slope_2, xx_2, second = mean_1, sandwich_1, slope_1, xx_1, first
    else:
        mean_2, sandwich_2, slope_2, xx_2 = _first_moment(two, world)
        second = _padded(xx_2, slope_2, mean_2, world)
    cross = one.s @ sandwich_2  # tr(s S s' S) is the trace of this
    both = mean_1 * mean_2 + 2.0 * _trace(cross) + (one.r * slope_2).sum(-1)
    x1 = (xx_1 @ two.r[..., None] + xx_2 @ one.r[..., None])[..., 0]
    half = 4.0 * (cov @ cross) + slope_1[..., :, None] * slope_2[..., None, :]
    half = half + mean_1[..., None, None] * sandwich_2 + mean_2[..., None, None] * sandwich_1
    xx = both[..., None, None] * cov + half + half.mT
    return QueryMoments(
        plain=_padded(cov, torch.zeros_like(one.r), torch.ones_like(mean_1), world),
        first=first,
        second=second,
        both=_padded(xx, x1, both, world),
    )


def demonstration_moments(world: World, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return M = E[z z'] of a demonstration's token, [..., D, D], and its mean (0, 0, c)."""
    c, d = world.constant, world.dimension
    across = torch.einsum("...ij,...j->...i", world.covariance, theta)
    label = (across * theta).sum(-1) + world.noise
    batch = torch.broadcast_shapes(across.shape[:-1], world.covariance.shape[:-2], label.shape)
    second = theta.new_zeros(*batch, d + 2, d + 2)
    second[..., :d, :d] = world.covariance
    second[..., :d, d] = second[..., d, :d] = across
    second[..., d, d] = label
    second[..., -1, -1] = c**2
    mean = theta.new_zeros(d + 2)
    mean[-1] = c
    return second, mean


# -- Errors ------------------------------------------------------------------------------------


def _per_prompt(shots: Count, like: Tensor) -> tuple[Tensor, Tensor]:
    count = torch.as_tensor(shots, dtype=torch.float64, device=like.device)
    count = count[..., None, None]
    return count, count + 1.0


def output_moment(q: Tensor, other: Tensor, world: World, theta: Tensor, shots: Count) -> Tensor:
    """Return G with E[f f'] = v' G v' for two heads (v, Q), (v', Q') on the same prompts."""
    return _output_moment((q, other), query_moments(q, other, world), world, theta, shots)


def _output_moment(
    pair: tuple[Tensor, Tensor], query: QueryMoments, world: World, theta: Tensor, shots: Count
) -> Tensor:
    if isinstance(shots, int | float) and shots == 0:  # no demonstration, so any task
        batch = torch.broadcast_shapes(query.both.shape[:-2], theta.shape[:-1])
        return query.both.expand(*batch, *query.both.shape[-2:])
    q, other = pair
    n, total = _per_prompt(shots, q)
    demos, mean = demonstration_moments(world, theta)
    keys = q @ query.plain @ other.mT
    spread = demos @ keys @ demos
    centre = 2.0 * world.constant**2 * keys[..., -1, -1]
    scatter = (
        _trace(demos @ keys)[..., None, None] * demos
        + spread.mT
        - centre[..., None, None] * mean[:, None] * mean[None, :]
    )
    crossed = demos @ q @ query.second + query.first @ other.mT @ demos
    return (n**2 * spread + n * (crossed + scatter) + query.both) / total**2


def error_form(q: Tensor, world: World, theta: Tensor, shots: Count) -> Quadratic:
    """Return the expected squared error on a task as a quadratic form in v.

    Args:
        q: [..., D, D].
        world: covariance, noise and constant channel, with any batch.
        theta: the task [..., d].
        shots: demonstrations n per prompt, at least 0, with any batch.
    """
    query = query_moments(q, q, world)
    task = torch.cat([theta, theta.new_zeros(*theta.shape[:-1], 2)], dim=-1)
    read = query.first
    if not (isinstance(shots, int | float) and shots == 0):
        n, total = _per_prompt(shots, q)
        demos, _ = demonstration_moments(world, theta)
        read = (n * demos @ q @ query.plain + query.first) / total
    return Quadratic(
        offset=world.noise + world.squared(theta),
        linear=(read @ task[..., None])[..., 0],
        matrix=_output_moment((q, q), query, world, theta, shots),
    )


def error(head: Attention, world: World, theta: Tensor, shots: Count) -> Tensor:
    """Return E(y_q - f)^2 of a head on a task at a number of shots, exactly."""
    return error_form(head.q, world, theta, shots).at(head.v)


def zero_shot_error(head: Attention, world: World, theta: Tensor) -> Tensor:
    """Return `error` at zero shots by contractions alone, for the flows that need it often.

    E (theta.x - (v1.x + p) b)^2 with p = c v_c and b = x' s x + r.x + t, by the same moments.
    """
    cov, form = world.covariance, _form(head.q, world)
    constant = world.constant * head.v[..., -1]
    a = (cov @ head.v1[..., None])[..., 0]
    matched = (form.s @ a[..., None])[..., 0]
    weighted = form.s @ cov
    slope = (cov @ form.r[..., None])[..., 0]
    rho = _trace(weighted) + form.t
    both = rho**2 + 2.0 * (weighted * weighted.mT).sum(dim=(-2, -1)) + (form.r * slope).sum(-1)
    label = (cov @ theta[..., None])[..., 0]
    across = rho * (a * theta).sum(-1) + 2.0 * (matched * label).sum(-1)
    across = across + constant * (slope * theta).sum(-1)
    tilt = (a * form.r).sum(-1)
    passed = (cov @ matched[..., None])[..., 0]
    curved = (
        both * ((head.v1 * a).sum(-1) + constant**2)
        + 8.0 * (matched * passed).sum(-1)
        + 2.0 * tilt**2
        + 4.0 * rho * (matched * a).sum(-1)
        + 4.0 * constant * (rho * tilt + 2.0 * (matched * slope).sum(-1))
    )
    return world.noise + (label * theta).sum(-1) - 2.0 * across + curved


def difference_form(
    q: Tensor, base: Attention, world: World, theta: Tensor, shots: Count
) -> Quadratic:
    """Return E(f - f_base)^2 as a quadratic form in v: the KL term, up to 1 / (2 variance)."""
    across = output_moment(q, base.q, world, theta, shots)
    same = output_moment(base.q, base.q, world, theta, shots)
    return Quadratic(
        offset=torch.einsum("...i,...ij,...j->...", base.v, same, base.v),
        linear=torch.einsum("...ij,...j->...i", across, base.v),
        matrix=output_moment(q, q, world, theta, shots),
    )


# -- Averages over tasks -----------------------------------------------------------------------


@dataclass(frozen=True)
class Tasks:
    """Finitely many tasks whose weighted mean equals the mean over a whole distribution."""

    thetas: Tensor
    """[K, d]."""
    weights: Tensor
    """[K], summing to 1."""

    def mean(self, form: Quadratic) -> Quadratic:
        """Average a quadratic form whose first dimension runs over the tasks."""
        return Quadratic(
            torch.tensordot(self.weights, form.offset, dims=1),
            torch.tensordot(self.weights, form.linear, dims=1),
            torch.tensordot(self.weights, form.matrix, dims=1),
        )


def sphere_design(dimension: int, degree: int, device: torch.device | str = "cpu") -> Tasks:
    """Return points that average polynomials over the unit sphere exactly up to `degree`.

    Degree 3: the 2 d points +-e_i. Degree 5: those and (+-e_i +-e_j) / sqrt 2, with the weights
    (4 - d) / (2 d (d + 2)) and 1 / (d (d + 2)) (Stroud 1971, U_n 5-1).
    """
    eye = torch.eye(dimension, dtype=torch.float64, device=device)
    axes = torch.cat([eye, -eye])
    if degree <= 3 or dimension == 1:
        return Tasks(axes, axes.new_full((len(axes),), 1.0 / len(axes)))
    pairs = [
        (sign_i * eye[i] + sign_j * eye[j]) / math.sqrt(2.0)
        for i, j in itertools.combinations(range(dimension), 2)
        for sign_i, sign_j in itertools.product((1.0, -1.0), repeat=2)
    ]
    d = dimension
    weights = torch.cat(
        [
            axes.new_full((2 * d,), (4.0 - d) / (2.0 * d * (d + 2.0))),
            axes.new_full((len(pairs),), 1.0 / (d * (d + 2.0))),
        ]
    )
    return Tasks(torch.cat([axes, torch.stack(pairs)]), weights)


def unseen_tasks(world: World, norm: float | Tensor = 1.0, degree: int = 3) -> Tasks:
    """Return tasks that stand for random directions with |theta| = norm, |.| weighted by S.

    The error is of degree 2 in theta while no key reads labels (row y of Q is 0), else of
    degree 4: ask for degree 5 then.
    """
    sphere = sphere_design(world.dimension, degree, world.covariance.device)
    inverse_root = torch.linalg.inv(torch.linalg.cholesky(world.covariance))
    return Tasks(norm * sphere.thetas @ inverse_root, sphere.weights)


def prior_tasks(prior: Tensor, degree: int = 3) -> Tasks:
    """Return tasks that stand for theta ~ N(0, prior), exactly for polynomials up to `degree`."""
    d = prior.shape[-1]
    sphere = sphere_design(d, degree, prior.device)
    root = torch.linalg.cholesky(prior)
    if degree <= 3:
        return Tasks(math.sqrt(d) * sphere.thetas @ root.mT, sphere.weights)
    # Radii 0 and sqrt(d + 2) have the Gaussian's second and fourth moments (Stroud, E_n^r2 5).
    scaled = math.sqrt(d + 2.0) * sphere.thetas @ root.mT
    thetas = torch.cat([scaled.new_zeros(1, d), scaled])
    weights = torch.cat([scaled.new_full((1,), 2.0 / (d + 2.0)), sphere.weights * d / (d + 2.0)])
    return Tasks(thetas, weights)


def mean_error_form(q: Tensor, world: World, tasks: Tasks, shots: Count) -> Quadratic:
    """Return the error averaged over tasks as a quadratic form in v; `q` is one matrix [D, D]."""
    return tasks.mean(error_form(q[None], world, tasks.thetas, shots))


def mean_error(head: Attention, world: World, tasks: Tasks, shots: Count) -> Tensor:
    """Return the error of one head averaged over tasks."""
    return mean_error_form(head.q, world, tasks, shots).at(head.v)

"""Training: gradient flow on exact expected losses, gradient descent, and descent on samples.

A state is one tensor of parameters [R, P], R runs side by side; a loss maps it to [R]. Which
parameters move, and how they make a head, is the loss's business (`head_of` and `state_of` for
all of v and Q).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keepshot.errors import ConfigError
from keepshot.theory.exact import Quadratic, error_form
from keepshot.theory.linear_attention import Attention, World

Loss = Callable[[Tensor], Tensor]
MAX_FLOW_STEPS = 5_000
MAX_STAGES = 60
MAX_DESCENT_STEPS = 50_000


def state_of(head: Attention) -> Tensor:
    """Flatten a head into a state [..., D + D * D]."""
    return torch.cat([head.v, head.q.flatten(-2)], dim=-1)


def head_of(state: Tensor, width: int) -> Attention:
    """Read a state [..., D + D * D] as a head."""
    return Attention(state[..., :width], state[..., width:].unflatten(-1, (width, width)))


def gradient(loss: Loss, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses [R] and gradients [R, P]."""
    leaf = state.detach().requires_grad_(True)
    values = loss(leaf)
    (slope,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), slope


@dataclass(frozen=True)
class FlowEnd:
    """Where gradient flow stands when it stops."""

    state: Tensor
    loss: Tensor
    time: float
    num_steps: int
    slope: float
    """Largest entry of the gradient left: 0 at an optimum."""


def flow(
    loss: Loss, start: Tensor, duration: float, *, tolerance: float = 1e-5, settled: float = 1e-6
) -> FlowEnd:
    """Follow d state / dt = -gradient with Runge-Kutta-Chebyshev steps of order 2.

    These stay stable over steps far longer than an explicit scheme's, for few gradients
    (Sommeijer, Shampine and Verwer 1998): near an optimum the slowest directions set the pace.

    Args:
        loss: [R, P] -> [R].
        start: [R, P].
        duration: time at which to stop.
        tolerance: largest error per step, absolute and relative.
        settled: stop before that once no entry of the gradient is larger.
    """
    state, time, step = start.detach(), 0.0, 1e-3
    values, slope = gradient(loss, state)
    direction = slope
    for index in range(MAX_FLOW_STEPS):
        if time >= duration or float(slope.abs().max()) < settled:
            return FlowEnd(state, values, time, index, float(slope.abs().max()))
        radius, direction = _spectral_radius(loss, state, slope, direction)
        step = min(step, duration - time, (0.65 * MAX_STAGES**2) / radius)
        moved = _chebyshev_step(loss, state, slope, step, radius)
        new_values, new_slope = gradient(loss, moved)
        gap = 0.8 * (state - moved) - 0.4 * step * (slope + new_slope)
        ratio = float((gap.abs() / (tolerance * (1.0 + state.abs()))).max())
        if ratio <= 1.0:
            time, state, values, slope = time + step, moved, new_values, new_slope
        step *= min(4.0, max(0.2, 0.8 * max(ratio, 1e-9) ** (-1.0 / 3.0)))
    return FlowEnd(state, values, time, MAX_FLOW_STEPS, float(slope.abs().max()))


def _spectral_radius(
    loss: Loss, state: Tensor, slope: Tensor, direction: Tensor
) -> tuple[float, Tensor]:
    """Estimate the Hessian's largest eigenvalue over all runs, warm-started, with a margin."""
    radius, size = 0.0, 1e-5
    for _ in range(2):
        norm = direction.norm(dim=1, keepdim=True).clamp(min=1e-300)
        unit = direction / norm
        _, nearby = gradient(loss, state + size * unit)
        direction = (nearby - slope) / size
        radius = float(direction.norm(dim=1).max())
    return 1.2 * radius + 1e-6, direction


def _chebyshev_step(loss: Loss, state: Tensor, slope: Tensor, step: float, radius: float) -> Tensor:
    """Take one step with as many stages as its length needs for stability."""
    stages = max(2, math.ceil(math.sqrt(1.0 + 1.54 * step * radius)) + 1)
    w0 = 1.0 + 2.0 / (13.0 * stages**2)
    value, first, second = [1.0, w0], [0.0, 1.0], [0.0, 0.0]  # T_j(w0) and its derivatives
    for _ in range(2, stages + 1):
        value.append(2.0 * w0 * value[-1] - value[-2])
        first.append(2.0 * (value[-2] + w0 * first[-1]) - first[-2])
        second.append(2.0 * (2.0 * first[-2] + w0 * second[-1]) - second[-2])
    w1 = first[stages] / second[stages]
    b = [second[2] / first[2] ** 2] * 2 + [second[j] / first[j] ** 2 for j in range(2, stages + 1)]
    older, newer = state, state - b[1] * w1 * step * slope
    for j in range(2, stages + 1):
        mu, nu = 2.0 * b[j] * w0 / b[j - 1], -b[j] / b[j - 2]
        scaled = 2.0 * b[j] * w1 / b[j - 1] * step
        _, inner = gradient(loss, newer)
        kept = 1.0 - b[j - 1] * value[j - 1]
        newest = (1.0 - mu - nu) * state + mu * newer + nu * older
        newest = newest - scaled * (inner - kept * slope)
        older, newer = newer, newest
    return newer


def descend(loss: Loss, start: Tensor, step_size: float, num_steps: int) -> Tensor:
    """Run gradient descent on an exact loss, [R, P].

    Raises:
        ConfigError: if the loss grows without bound; the message gives the largest stable step.
    """
    end = _descended(loss, start, step_size, num_steps)
    if end is None:
        stable = largest_stable_step(loss, start, num_steps, below=step_size)
        raise ConfigError(
            f"step_size {step_size:g}: gradient descent diverges; the largest stable one for this "
            f"loss and start is {stable:.3g}"
        )
    return end


def largest_stable_step(
    loss: Loss, start: Tensor, num_steps: int, *, below: float, precision: float = 0.01
) -> float:
    """Return the largest step size under `below` that does not diverge, to 1 %, by bisection."""
    low, high = below, below
    while _descended(loss, start, low, num_steps) is None:
        low, high = low / 2.0, low
    while high / low > 1.0 + precision:
        middle = (low * high) ** 0.5
        if _descended(loss, start, middle, num_steps) is None:
            high = middle
        else:
            low = middle
    return low


def _descended(loss: Loss, start: Tensor, step_size: float, num_steps: int) -> Tensor | None:
    """Run gradient descent; None once a loss is ten times what it was, or no number."""
    state = start.detach()
    first, slope = gradient(loss, state)
    ceiling = 10.0 * first.clamp(min=1e-12)
    for _ in range(num_steps):
        state = state - step_size * slope
        values, slope = gradient(loss, state)
        if not bool((values <= ceiling).all()):
            return None
    return state


def descend_values(
    form: Quadratic, start: Tensor, free: Sequence[int] | None = None, *, settled: float = 1e-10
) -> Tensor:
    """Run gradient descent on a loss that is quadratic in v, over v [D] or some of its entries.

    The step is the inverse of the largest curvature; it stops once no entry of the gradient is
    above `settled`. Unlike `Quadratic.minimum` it solves no equation.
    """
    mask = torch.ones_like(start)
    if free is not None:
        mask = torch.zeros_like(start)
        mask[list(free)] = 1.0
    block = mask[:, None] * form.matrix * mask
    step, v = 1.0 / float(torch.linalg.eigvalsh(block).max()), start
    for _ in range(MAX_DESCENT_STEPS):
        slope = mask * (form.matrix @ v - form.linear)
        if float(slope.abs().max()) < settled:
            break
        v = v - step * slope
    return v


@dataclass(frozen=True)
class Sampled:
    """Values found by stochastic descent, one run per seed."""

    mean: Tensor
    """[D], over seeds."""
    se: Tensor
    """[D], of that mean."""
    path: Tensor
    """Mean over seeds at every recorded step, [steps, D]."""


def train_values(
    head: Attention,
    world: World,
    theta: Tensor,
    generator: torch.Generator,
    *,
    step_size: float | None = None,
    num_seeds: int = 32,
    batch_size: int = 64,
    num_steps: int = 600,
) -> Sampled:
    """Tune v alone on sampled zero-shot prompts of one task, many seeds at once.

    Every step draws new prompts. The output is linear in v, so the mean over seeds follows
    gradient descent on the exact loss, and its second half's average is unbiased once that has
    settled.

    Args:
        head: where tuning starts; its Q stays.
        world: without batch dimensions.
        theta: the target [d].
        generator: source of prompts.
        step_size: of the gradient of the squared error; a tenth of the largest stable one if None.
        num_seeds: runs side by side.
        batch_size: prompts per step and run.
        num_steps: steps.

    Raises:
        ConfigError: if the step size diverges, with the largest stable one.
    """
    d, c = world.dimension, world.constant
    curvature = torch.linalg.eigvalsh(error_form(head.q, world, theta, 0).matrix).max()
    stable = 1.0 / float(curvature)
    step = 0.1 * stable if step_size is None else step_size
    if step >= stable:
        raise ConfigError(
            f"step_size {step:g}: gradient descent diverges; the largest stable one is {stable:.3g}"
        )
    root = torch.linalg.cholesky(world.covariance)
    v = head.v.expand(num_seeds, d + 2).clone()
    total, path = torch.zeros_like(v), [v.mean(0)]
    for index in range(num_steps):
        normals = torch.empty(num_seeds, batch_size, d + 1, dtype=torch.float64, device=v.device)
        normals.normal_(generator=generator)
        x = normals[..., :d] @ root.mT
        label = x @ theta + world.noise.sqrt() * normals[..., d]
        token = torch.cat([x, torch.zeros_like(x[..., :1]), torch.full_like(x[..., :1], c)], -1)
        feature = token * ((token @ head.q) * token).sum(-1, keepdim=True)
        residual = label - torch.einsum("rbd,rd->rb", feature, v)
        v = v + 2.0 * step * torch.einsum("rb,rbd->rd", residual, feature) / batch_size
        if not bool(torch.isfinite(v).all()) or float(v.abs().max()) > 1e6:
            raise ConfigError(
                f"step_size {step:g}: descent on samples diverges at step {index + 1}; try a tenth "
                f"of the largest stable one, {0.1 * stable:.3g}"
            )
        path.append(v.mean(0))
        if index >= num_steps // 2:
            total = total + v
    averaged = total / (num_steps - num_steps // 2)
    return Sampled(averaged.mean(0), averaged.std(0) / num_seeds**0.5, torch.stack(path))

"""One softmax attention head on the same prompts, for simulation alone: there is no closed form.

    f(Z) = sum_i a_i (v . z_i) over all n + 1 tokens,  a = softmax(z_i' Q z_q)

At zero shots the only token attends to itself with weight 1, so the output is v . z_q whatever Q
is: Q has no gradient, full tuning *is* value-only tuning, and v1 = theta reaches the noise floor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from keepshot.theory.linear_attention import Attention, World, draw_prompts


def attend_softmax(head: Attention, tokens_BTD: Tensor) -> Tensor:
    """Return f(Z) for every prompt, [B]."""
    scores_BT = torch.einsum("btd,de,be->bt", tokens_BTD, head.q, tokens_BTD[:, -1])
    return (torch.softmax(scores_BT, dim=-1) * (tokens_BTD @ head.v)).sum(-1)


def pretrain_softmax(
    world: World,
    norm: float,
    shots: int,
    generator: torch.Generator,
    *,
    num_steps: int = 400,
    batch_size: int = 512,
) -> Attention:
    """Train (v, Q) by Adam on few-shot prompts of random tasks with |theta| = norm.

    Args:
        world: without batch dimensions.
        norm: of every task, weighted by the covariance.
        shots: demonstrations per prompt.
        generator: source of prompts.
        num_steps: steps, the step size falling linearly from .03 to 0.
        batch_size: prompts per step, each of another task.
    """
    d = world.dimension
    v = torch.zeros(d + 2, dtype=torch.float64, device=world.covariance.device)
    v[d] = 1.0
    q = torch.zeros(d + 2, d + 2, dtype=torch.float64, device=v.device)
    q[:d, :d] = torch.linalg.inv(world.covariance)
    v, q = v.requires_grad_(True), q.requires_grad_(True)
    optimiser = torch.optim.Adam([v, q], lr=0.03)
    for step in range(num_steps):
        optimiser.param_groups[0]["lr"] = 0.03 * (1.0 - step / num_steps)
        thetas = random_tasks(world, norm, batch_size, generator)
        tokens, labels = draw_prompts(world, thetas, shots, batch_size, generator)
        loss = (labels - attend_softmax(Attention(v, q), tokens)).square().mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return Attention(v.detach(), q.detach())


def random_tasks(world: World, norm: float, num_tasks: int, generator: torch.Generator) -> Tensor:
    """Draw tasks in random directions with |theta| = norm, [num_tasks, d]."""
    white = torch.empty(
        num_tasks, world.dimension, dtype=torch.float64, device=world.covariance.device
    ).normal_(generator=generator)
    white = norm * white / white.norm(dim=1, keepdim=True)
    return white @ torch.linalg.inv(torch.linalg.cholesky(world.covariance))


def softmax_error(
    head: Attention,
    world: World,
    task: Tensor | float,
    shots: int,
    num_prompts: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Estimate the squared error: its mean and standard error.

    Args:
        head: the model.
        world: without batch dimensions.
        task: theta [d], or the norm of a random task per prompt.
        shots: demonstrations per prompt.
        num_prompts: prompts drawn.
        generator: source of the draws.
    """
    fixed = isinstance(task, Tensor)
    thetas = task if fixed else random_tasks(world, task, num_prompts, generator)
    tokens, labels = draw_prompts(world, thetas, shots, num_prompts, generator)
    squared = (labels - attend_softmax(head, tokens)).square()
    return float(squared.mean()), float(squared.std()) / num_prompts**0.5

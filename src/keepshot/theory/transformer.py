"""A small softmax transformer for in-context regression, pretrained and tuned here, in float32.

Every prompt is one sequence: a start token, then for each pair a query token (x_i, 0) and a
demonstration token (x_i, y_i). Demonstrations attend to earlier demonstrations, queries to those
and to themselves, nobody to another's query: one pass answers at 0, 1, 2 ... shots.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from keepshot.theory.linear_attention import World
from keepshot.theory.softmax import random_tasks


class Block(nn.Module):
    """Pre-norm attention with separate q, k, v, o, then an MLP."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_BTW: Tensor, mask_TT: Tensor) -> Tensor:
        """Return the next residual stream."""
        normed = self.norm_1(x_BTW)
        q, k, v = (
            part(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        read = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT)
        x_BTW = x_BTW + self.o(read.transpose(1, 2).flatten(2))
        return x_BTW + self.mlp(self.norm_2(x_BTW))


class Regressor(nn.Module):
    """Predicts the label at every query of a sequence."""

    def __init__(
        self, dimension: int, width: int = 48, num_layers: int = 2, num_heads: int = 4
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(dimension + 2, width)
        self.start = nn.Parameter(torch.randn(width) / width**0.5)
        self.blocks = nn.ModuleList([Block(width, num_heads) for _ in range(num_layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x_BPd: Tensor, y_BP: Tensor) -> Tensor:
        """Return predictions [B, P]: the i-th from i demonstrations.

        Args:
            x_BPd: inputs.
            y_BP: labels; the i-th is seen by later queries alone.
        """
        batch, pairs = y_BP.shape
        query = torch.cat([x_BPd, x_BPd.new_zeros(batch, pairs, 2)], dim=-1)
        demo = torch.cat([x_BPd, y_BP[..., None], x_BPd.new_ones(batch, pairs, 1)], dim=-1)
        tokens = torch.stack([query, demo], dim=2).flatten(1, 2)
        stream = torch.cat([self.start.expand(batch, 1, -1), self.embed(tokens)], dim=1)
        mask = attention_mask(pairs, stream.device)
        for block in self.blocks:
            stream = block(stream, mask)
        return self.head(self.norm(stream[:, 1::2]))[..., 0]


def attention_mask(pairs: int, device: torch.device) -> Tensor:
    """Return who may attend to whom, [1 + 2 P, 1 + 2 P], True where allowed."""
    place = torch.arange(1 + 2 * pairs, device=device)
    earlier = place[:, None] > place
    is_query = place % 2 == 1
    return (earlier & ~is_query) | torch.eye(len(place), dtype=torch.bool, device=device)


def draw(
    world: World, theta: Tensor | float, pairs: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw inputs [B, P, d] and labels [B, P] of one task, or of a random one per sequence."""
    d, device = world.dimension, world.covariance.device
    thetas = theta if isinstance(theta, Tensor) else random_tasks(world, theta, size, generator)
    normal = torch.empty(size, pairs, d + 1, dtype=torch.float64, device=device)
    normal.normal_(generator=generator)
    x = normal[..., :d] @ torch.linalg.cholesky(world.covariance).mT
    y = (x * thetas.expand(size, d)[:, None]).sum(-1) + world.noise.sqrt() * normal[..., d]
    return x.float(), y.float()


def pretrain(
    world: World, norm: float, pairs: int, generator: torch.Generator, num_steps: int
) -> Regressor:
    """Train on random tasks, at every number of shots below `pairs` at once."""
    seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):  # layers draw their start from the global generator
        torch.manual_seed(seed)
        model = Regressor(world.dimension).to(world.covariance.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=num_steps)
    for _ in range(num_steps):
        x, y = draw(world, norm, pairs, 128, generator)
        loss = (model(x, y) - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model


def value_parameters(model: Regressor) -> list[nn.Parameter]:
    """Return the value matrices: what value-only tuning moves."""
    return [p for block in model.blocks for p in block.v.parameters()]  # type: ignore[union-attr]


def tune(
    before: Regressor,
    world: World,
    theta: Tensor,
    trained: str,
    generator: torch.Generator,
    *,
    num_steps: int = 300,
    hold: float = 0.0,
    pairs: int = 13,
) -> Regressor:
    """Tune a copy on zero-shot prompts of one task.

    Args:
        before: the pretrained model.
        world: where prompts come from.
        theta: the target.
        trained: `full` or `value_only`.
        generator: source of prompts.
        num_steps: steps of Adam, 256 prompts each.
        hold: weight of the squared distance to `before` on few-shot prompts of random tasks.
        pairs: length of those prompts.
    """
    model = copy.deepcopy(before)
    moved: Iterable[nn.Parameter] = model.parameters()
    if trained == "value_only":
        moved = value_parameters(model)
    optimiser = torch.optim.Adam(list(moved), lr=1e-3)
    norm = float(world.squared(theta).sqrt())
    for _ in range(num_steps):
        x, y = draw(world, theta, 1, 256, generator)
        loss = (model(x, y) - y).square().mean()
        if hold:
            x, y = draw(world, norm, pairs, 32, generator)
            with torch.no_grad():
                wanted = before(x, y)
            loss = loss + hold * (model(x, y) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


@torch.no_grad()
def blended(before: Regressor, after: Regressor, lam: float) -> Regressor:
    """Return the transformer at `lam` on the straight path from `before` to `after`."""
    model = copy.deepcopy(before)
    for moved, end in zip(model.parameters(), after.parameters(), strict=True):
        moved.lerp_(end, lam)
    return model


@torch.no_grad()
def error(
    model: Regressor,
    world: World,
    theta: Tensor | float,
    shots: int,
    generator: torch.Generator,
    num_prompts: int = 8192,
) -> tuple[float, float]:
    """Estimate the squared error at a number of shots: its mean and standard error."""
    x, y = draw(world, theta, shots + 1, num_prompts, generator)
    squared = (model(x, y)[:, -1] - y[:, -1]).double().square()
    return float(squared.mean()), float(squared.std()) / num_prompts**0.5

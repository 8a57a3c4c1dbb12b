"""Simulation of the theory lab: the fast sampler, gradient flow, descent and its step size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from keepshot.errors import ConfigError
from keepshot.theory import descent, exact, optima, simulate, softmax, transformer
from keepshot.theory.linear_attention import (
    Attention,
    attend,
    attend_heads,
    attend_layers,
    draw_prompts,
    make_world,
    pretrained,
)
from worlds import generator, normal, random_head, random_world


@pytest.mark.parametrize("shots", [0, 1, 6])
@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_fast_sampler_is_the_literal_model(shots: int, constant: float) -> None:
    """The same normals through Z Z' Q z_q and through the pulled-back weights."""
    d, size = 3, 50
    world, theta = random_world(d, 1, 0.5, constant), normal(d, seed=2)
    head = random_head(world, 3)
    residuals = simulate._Residuals(simulate.stack([head]), world, theta, shots)
    normals = normal(size * residuals.numbers_per_prompt, seed=4)
    found = residuals.of(normals, size)[0]
    demos = normals[size * d :].view(d + 1, shots, size).permute(2, 1, 0)
    query = normals[: size * d].view(d, 1, size).permute(2, 1, 0)
    root = torch.linalg.cholesky(world.covariance)
    x = torch.cat([demos[..., :d], query], dim=1) @ root.T
    y = x @ theta
    y[:, :shots] += math.sqrt(0.5) * demos[..., d]
    tokens = torch.cat([x, y[..., None], torch.full_like(y, constant)[..., None]], dim=-1)
    truth = tokens[:, -1, d].clone()
    tokens[:, -1, d] = 0.0
    torch.testing.assert_close(found, truth - attend(head, tokens))


def test_literal_prompts_agree_with_the_closed_form() -> None:
    world, theta = random_world(2, 5, 0.2), normal(2, seed=6)
    head = random_head(world, 7)
    tokens, labels = draw_prompts(world, theta, 3, 200_000, generator(8))
    squared = (labels - attend(head, tokens)) ** 2
    se = float(squared.std()) / math.sqrt(len(squared))
    assert abs(float(squared.mean() - exact.error(head, world, theta, 3))) < 5 * se


def test_sampler_repeats_with_its_seed_and_depends_on_it() -> None:
    world, theta = random_world(2, 5), normal(2, seed=6)
    heads = simulate.stack([random_head(world, 7), random_head(world, 9)])
    runs = [
        simulate.sampled_errors(heads, world, theta, 2, 5000, generator(seed)).mean
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_several_heads_and_layers() -> None:
    """Two half heads are one; one layer of preconditioned descent is the pretrained head."""
    d = 3
    world, theta = random_world(d, 1, 0.3, 0.0), normal(d, seed=2)
    head = pretrained(world)
    tokens, _ = draw_prompts(world, theta, 4, 20, generator(3))
    half = Attention(head.v / 2, head.q)
    torch.testing.assert_close(attend_heads([half, half], tokens), attend(head, tokens))
    value = torch.zeros(d + 2, d + 2, dtype=torch.float64)
    value[d, d] = -1.0
    torch.testing.assert_close(attend_layers([(value, head.q)], tokens), attend(head, tokens))


def test_two_layers_of_descent_beat_one() -> None:
    """With the demonstrations' labels updated between layers, each layer is one more step."""
    d, shots = 2, 40
    world = make_world(torch.eye(d, dtype=torch.float64), 0.0)
    theta = torch.ones(d, dtype=torch.float64)
    tokens, labels = draw_prompts(world, theta, shots, 4000, generator(4))
    value = torch.zeros(d + 2, d + 2, dtype=torch.float64)
    value[d, d] = -0.9
    layer = (value, pretrained(world).q)
    errors = [float((labels - attend_layers([layer] * k, tokens)).square().mean()) for k in (1, 2)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("constant", [1.0, 0.0])
def test_flow_ends_where_the_conservation_law_says(constant: float) -> None:
    d = 2
    world, theta = random_world(d, 3, 0.2, constant), normal(d, seed=4)
    head = pretrained(world)
    end = descent.flow(
        lambda state: exact.error(descent.head_of(state, d + 2), world, theta, 0),
        descent.state_of(head)[None],
        400.0,
    )
    found, wanted = descent.head_of(end.state[0], d + 2), optima.full_limit(head, world, theta)
    torch.testing.assert_close(found.v, wanted.v, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.q, wanted.q, rtol=1e-3, atol=1e-3)


def test_flow_follows_a_linear_problem_to_its_tolerance() -> None:
    """Rates from .5 to 400: e^-at, stiff and slow directions at once."""
    rates = torch.tensor([[0.5, 3.0, 400.0]], dtype=torch.float64)
    start = torch.ones(1, 3, dtype=torch.float64)
    end = descent.flow(lambda x: (rates * x**2).sum(-1) / 2, start, 8.0)
    torch.testing.assert_close(end.state, torch.exp(-8.0 * rates), rtol=0.0, atol=1e-4)
    assert end.num_steps < 300  # an explicit scheme needs 8 * 400 / 2.5 of them to stay stable


def test_sampled_tuning_of_values_finds_the_optimum_without_touching_w() -> None:
    d = 4
    world, theta = random_world(d, 3, 0.2), normal(d, seed=4)
    head = pretrained(world)
    found = descent.train_values(head, world, theta, generator(5))
    wanted = optima.value_only(head, world, theta).v
    assert float(found.se[:d].max()) < 0.05 * float(theta.norm()) / (d + 4)
    assert bool(((found.mean - wanted).abs()[:d] < 5 * found.se[:d]).all())
    assert float(found.mean[d]) == 1.0


def test_step_size_that_diverges_is_refused_with_the_largest_stable_one() -> None:
    d = 3
    world, theta = make_world(torch.eye(d, dtype=torch.float64), 0.1), normal(d, seed=4)
    head = pretrained(world)
    stable = 1.0 / ((d + 2) * (d + 4))  # 2 / (2 * curvature of the values)
    with pytest.raises(ConfigError, match=f"largest stable one is {stable:.3g}"):
        descent.train_values(head, world, theta, generator(1), step_size=1.01 * stable)

    def loss(v: Tensor) -> Tensor:
        return exact.error_form(head.q, world, theta, 0).at(v)

    descent.descend(loss, head.v[None], 0.99 * stable, 300)
    with pytest.raises(ConfigError, match=r"largest stable one for this loss and start is 0\.02"):
        descent.descend(loss, head.v[None], 1.2 * stable, 300)


def test_transformer_answers_each_query_from_earlier_demonstrations_alone() -> None:
    """Later pairs, and the query's own label, change nothing; an earlier label does."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformer.Regressor(2)
    x, y = normal(3, 6, 2, seed=1).float(), normal(3, 6, seed=2).float()
    found = model(x, y)
    later = y.clone()
    later[:, 3:] += 1.0
    torch.testing.assert_close(model(x, later)[:, :4], found[:, :4])
    assert not torch.allclose(model(x, later)[:, 4:], found[:, 4:])
    torch.testing.assert_close(model(x[:, :1], y[:, :1]), found[:, :1])


def test_transformer_tuning_of_values_moves_values_alone() -> None:
    world, theta = make_world(torch.eye(2, dtype=torch.float64), 0.1), normal(2, seed=3)
    base = transformer.pretrain(world, 1.0, 3, generator(4), num_steps=2)
    tuned = transformer.tune(base, world, theta, "value_only", generator(5), num_steps=2)
    changed = {
        name
        for (name, one), other in zip(base.named_parameters(), tuned.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert changed == {f"blocks.{i}.v.{kind}" for i in (0, 1) for kind in ("weight", "bias")}


def test_softmax_head_has_no_gradient_in_q_at_zero_shots() -> None:
    world, theta = random_world(3, 1), normal(3, seed=2)
    head = random_head(world, 3)
    q = head.q.clone().requires_grad_(True)
    tokens, labels = draw_prompts(world, theta, 0, 100, generator(4))
    output = softmax.attend_softmax(Attention(head.v, q), tokens)
    torch.testing.assert_close(output, tokens[:, 0] @ head.v)
    (labels - output).square().mean().backward()
    assert float(q.grad.abs().max()) < 1e-12  # type: ignore[union-attr]

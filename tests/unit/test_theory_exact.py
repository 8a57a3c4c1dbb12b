"""Closed forms of the theory lab: moments symbolically, errors against Monte Carlo."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keepshot.errors import ConfigError
from keepshot.theory import exact, optima
from keepshot.theory.linear_attention import (
    Attention,
    World,
    attend,
    draw_prompts,
    embed,
    make_world,
    pretrained,
)
from keepshot.theory.simulate import RandomTasks, _Residuals, stack
from worlds import generator, normal, random_head, random_world

SETTINGS = settings(max_examples=200, deadline=None, derandomize=True, database=None)


# -- moments -----------------------------------------------------------------------------------


def gaussian_mean(polynomial: Any, variables: list[Any]) -> Any:
    """Expectation under independent standard normals: E z^2k = (2k - 1)!!, odd powers vanish."""
    total = sympy.Integer(0)
    for powers, coefficient in sympy.Poly(sympy.expand(polynomial), *variables).terms():
        if any(power % 2 for power in powers):
            continue
        total += coefficient * math.prod(int(sympy.factorial2(p - 1)) for p in powers if p)
    return total


def test_moments_of_the_query_symbolically() -> None:
    """All of E[z z'], E[b z z'], E[b' z z'], E[b b' z z'] for d = 2, rational entries, exactly."""
    z = sympy.symbols("z1 z2")
    root = sympy.Matrix([[1, 0], [sympy.Rational(1, 2), 2]])
    x = root * sympy.Matrix(z)
    token = sympy.Matrix([x[0], x[1], 0, 1])
    q = sympy.Matrix(4, 4, lambda i, j: sympy.Rational((3 * i + 2 * j) % 5 - 2, 2))
    other = sympy.Matrix(4, 4, lambda i, j: sympy.Rational((2 * i - 3 * j) % 7 - 3, 3))
    b, b_other = (token.T * q * token)[0], (token.T * other * token)[0]
    covariance = root * root.T
    world = World(as_tensor(covariance), torch.tensor(0.0, dtype=torch.float64), 1.0)
    found = exact.query_moments(as_tensor(q), as_tensor(other), world)
    factors = {"plain": 1, "first": b, "second": b_other, "both": b * b_other}
    for name, factor in factors.items():
        wanted = sympy.Matrix(
            4, 4, lambda i, j, f=factor: gaussian_mean(f * token[i] * token[j], list(z))
        )
        torch.testing.assert_close(getattr(found, name), as_tensor(wanted), rtol=1e-13, atol=1e-12)


def as_tensor(matrix: Any) -> Tensor:
    return torch.tensor([[float(e) for e in row] for row in matrix.tolist()], dtype=torch.float64)


def test_pairing_rule_for_gaussians_with_a_mean_symbolically() -> None:
    """E[abcd] = E[ab]E[cd] + E[ac]E[bd] + E[ad]E[bc] - 2 m_a m_b m_c m_d."""
    z = sympy.symbols("z1 z2 z3")
    rows = [sympy.symbols(f"p{i}_0:4") for i in range(4)]
    factors = [row[3] + sum(c * v for c, v in zip(row, z, strict=False)) for row in rows]

    def mean(*indices: int) -> Any:
        return gaussian_mean(sympy.prod([factors[i] for i in indices]), list(z))

    left = mean(0, 1, 2, 3)
    pairs = mean(0, 1) * mean(2, 3) + mean(0, 2) * mean(1, 3) + mean(0, 3) * mean(1, 2)
    assert sympy.expand(left - pairs + 2 * sympy.prod([row[3] for row in rows])) == 0


@pytest.mark.parametrize("d", [1, 2, 3, 5, 7])
def test_designs_average_polynomials_exactly(d: int) -> None:
    """Every monomial up to degree 5 against the Gaussian's moments and the sphere's."""
    sphere = exact.sphere_design(d, 5)
    prior = exact.prior_tasks(torch.eye(d, dtype=torch.float64), 5)
    for degree in range(6):
        for indices in itertools.combinations_with_replacement(range(d), degree):
            powers = Counter(indices).values()
            odd = any(p % 2 for p in powers)
            gaussian = 0.0 if odd else math.prod(math.prod(range(1, p, 2)) for p in powers)
            radial = math.prod(d + 2 * k for k in range(degree // 2))  # E |z|^degree
            for design, wanted in ((prior, gaussian), (sphere, gaussian / radial)):
                monomials = design.thetas[:, list(indices)].prod(-1)
                assert float(design.weights @ monomials) == pytest.approx(wanted, abs=1e-12)


# -- errors against Monte Carlo ----------------------------------------------------------------

KINDS = st.fixed_dictionaries(
    {
        "d": st.integers(1, 3),
        "shots": st.integers(0, 4),
        "constant": st.sampled_from([0.0, 1.0]),
        "noise": st.floats(0.0, 2.0),
        "unseen": st.booleans(),
        "seed": st.integers(0, 10**6),
    }
)


@settings(SETTINGS, max_examples=60)
@given(KINDS)
def test_every_closed_form_is_what_sampling_finds(kind: dict[str, Any]) -> None:
    check_closed_forms(kind)


@pytest.mark.slow
@SETTINGS
@given(KINDS)
def test_every_closed_form_in_200_settings(kind: dict[str, Any]) -> None:
    check_closed_forms(kind)


def check_closed_forms(kind: dict[str, Any]) -> None:
    """Within 5 standard errors, each at a standard error under 0.5 % of the value.

    On the same prompts: the general form at any (v, Q), the special case Q11 = S^-1, both with the
    auxiliary loss's w*, full tuning's end, and the squared difference of two heads' outputs.
    """
    d, shots, seed = kind["d"], kind["shots"], kind["seed"]
    world = random_world(d, seed, kind["noise"], kind["constant"])
    head, theta = random_head(world, seed + 10, size=0.1), normal(d, seed=seed + 20)
    target = 0.5 * normal(d, seed=seed + 40)
    tasks = exact.unseen_tasks(world, 1.2, 5)
    if not kind["unseen"]:
        tasks = exact.Tasks(theta[None], torch.ones(1, dtype=torch.float64))
    inverse = torch.linalg.inv(world.covariance)
    special = optima.products(world, tasks.thetas, 0.3 * target, 0.7)
    v1 = target / (d + 4.0)
    w = optima.products(world, target, v1, 1.0).best_w(shots) if shots else torch.tensor(1.0)
    other = embed(0.3 * target, 0.7, inverse)
    heads = stack([head, other, optima.value_only_aux(pretrained(world), world, target, shots),
                   optima.full_limit(pretrained(world), world, target)])  # fmt: skip
    gap = tasks.mean(exact.difference_form(head.q[None], other, world, tasks.thetas, shots))
    predicted = torch.stack([
        exact.mean_error(head, world, tasks, shots),
        tasks.weights @ special.error(shots),
        tasks.weights @ optima.products(world, tasks.thetas, v1, w).error(shots),
        tasks.weights @ full_error(world, tasks.thetas, target, shots),
        gap.at(head.v),
    ])  # fmt: skip
    mean, se = sampled(heads, world, RandomTasks(1.2) if kind["unseen"] else theta, shots, seed)
    noise = world.noise * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    exactly = torch.isclose(predicted - noise, torch.zeros_like(mean), atol=1e-12)
    assert bool((((mean + noise - predicted).abs() < 5.0 * se) | exactly).all()), (mean, se)


def full_error(world: World, thetas: Tensor, target: Tensor, shots: int) -> Tensor:
    """Return the error after full tuning on `target`, as docs/theory.md section 5 writes it."""
    start = pretrained(world)
    if not world.constant:
        end = optima.full_limit(start, world, target)
        scale = float(torch.linalg.inv(world.covariance)[0, 0] / end.q11[0, 0])
        return optima.products(world, thetas, end.v1 / scale, 1.0 / scale).error(shots)
    k, total = float((start.q11**2).sum()), shots + 1.0
    q = math.sqrt((k + math.sqrt(k**2 + 4.0 * float(target @ target))) / 2.0)
    return (
        world.noise
        + world.squared(thetas - target / total)
        + shots / total**2 * (world.squared(target + q * thetas) + q**2 * world.noise)
    )


def sampled(
    heads: Attention, world: World, task: Tensor | RandomTasks, shots: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return each head's squared error without noise, and the difference of the first two outputs.

    With standard errors; draws until each is under 0.5 % of its error, noise included.
    """
    residuals, draws, size = _Residuals(heads, world, task, shots), generator(seed + 30), 10_000
    sums, num_prompts = torch.zeros(2, 5, dtype=torch.float64), 0
    noise = world.noise * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    while True:
        buffer = torch.empty(size * residuals.numbers_per_prompt, dtype=torch.float64)
        found = residuals.of(buffer.normal_(generator=draws), size)
        squared = torch.cat([found, found[:1] - found[1:2]]).square()
        sums += torch.stack([squared.sum(1), squared.square().sum(1)])
        num_prompts += size
        mean, second = sums / num_prompts
        se = ((second - mean**2).clamp(min=0.0) / num_prompts).sqrt()
        if num_prompts >= 30_000 and bool((se <= 0.0045 * (mean + noise)).all()):
            return mean, se


def test_mean_over_gaussian_tasks_is_what_sampling_finds() -> None:
    """`prior_tasks` at degree 5, on literal prompts, for heads whose keys read labels too."""
    for seed in range(2):
        world = random_world(2, seed, 0.4)
        head, root = random_head(world, seed + 1, size=0.05), 0.5 * normal(2, 2, seed=seed + 2)
        prior = root @ root.T + 0.1 * torch.eye(2, dtype=torch.float64)
        predicted = exact.mean_error(head, world, exact.prior_tasks(prior, 5), 2)
        size, draws = 1_200_000, generator(seed + 3)
        white = torch.randn(size, 2, dtype=torch.float64, generator=draws)
        tokens, labels = draw_prompts(world, white @ torch.linalg.cholesky(prior).T, 2, size, draws)
        squared = (labels - attend(head, tokens)) ** 2
        se = float(squared.std()) / math.sqrt(size)
        assert se < 0.006 * float(predicted)
        assert abs(float(squared.mean() - predicted)) < 5.0 * se


def test_ten_thousand_settings_take_less_than_a_second() -> None:
    """General and special form, d = 5: processor time, so that other programs do not count."""
    count, d = 10_000, 5
    roots = normal(count, d, d, seed=1)
    eye = torch.eye(d, dtype=torch.float64)
    world = World(roots @ roots.mT / d + 0.1 * eye, normal(count, seed=2) ** 2)
    head = Attention(normal(count, d + 2, seed=3), normal(count, d + 2, d + 2, seed=4))
    theta, shots = normal(count, d, seed=5), torch.arange(count) % 101
    for call in (
        lambda: exact.error(head, world, theta, shots),
        lambda: optima.products(world, theta, head.v1, head.w).error(shots),
    ):
        began = time.process_time()
        assert call().shape == (count,)
        assert time.process_time() - began < 1.0


# -- optima --------------------------------------------------------------------------------------


def test_value_only_optimum_is_theta_over_d_plus_4_and_leaves_w_alone() -> None:
    for d in (1, 2, 5, 9):
        world, theta = random_world(d, d), normal(d, seed=d)
        tuned = optima.value_only(pretrained(world), world, theta)
        torch.testing.assert_close(tuned.v1, theta / (d + 4.0), rtol=1e-9, atol=1e-12)
        assert float(tuned.w) == 1.0
        found = exact.error(tuned, world, theta, 0)
        torch.testing.assert_close(found, optima.zero_shot_floor(world, theta))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 6), st.integers(0, 60), st.floats(0.0, 2.0), st.integers(0, 10**6))
def test_special_case_agrees_with_the_general_form(
    d: int, shots: int, noise: float, seed: int
) -> None:
    world = random_world(d, seed, noise)
    theta, v1, w = normal(d, seed=seed + 1), normal(d, seed=seed + 2), 0.7
    head = embed(v1, w, torch.linalg.inv(world.covariance))
    special = optima.products(world, theta, v1, w)
    torch.testing.assert_close(special.error(shots), exact.error(head, world, theta, shots))
    far = exact.error(head, world, theta, 1e9)
    torch.testing.assert_close(special.limit(), far, rtol=1e-6, atol=1e-6)
    if shots:
        form = exact.error_form(head.q, world, theta, shots)
        curvature, best = optima.quadratic_in_w(form, head.v, d)
        assert float(curvature) > 0
        torch.testing.assert_close(special.best_w(shots), best)


def test_zero_shot_error_by_contractions_is_the_general_error() -> None:
    for seed in range(20):
        world, theta = random_world(4, seed), normal(4, seed=seed + 1)
        head = random_head(world, seed, size=1.0)
        head = Attention(torch.stack([head.v, 2 * head.v]), torch.stack([head.q, -head.q]))
        torch.testing.assert_close(
            exact.zero_shot_error(head, world, theta), exact.error(head, world, theta, 0)
        )


def test_w_star_in_the_limit_is_the_papers() -> None:
    """1 - <theta_0, theta> / ((d + 4) |theta|^2), so (d+3)/(d+4) on the target itself."""
    d = 5
    world, theta = random_world(d, 3), normal(d, seed=4)
    for sign in (1.0, -1.0):
        special = optima.products(world, sign * theta, theta / (d + 4.0), 1.0)
        assert float(special.best_w(1e12)) == pytest.approx(1.0 - sign / (d + 4.0), abs=1e-9)


@pytest.mark.parametrize("shots", [1.0, 7.0, 40.0])
def test_pretraining_optimum_has_no_slope_and_no_better_neighbour(shots: float) -> None:
    """Over all of (v, Q) at once, with the constant channel: a minimum, not only of v."""
    d = 3
    world = random_world(d, 11, 0.4)
    root = normal(d, d, seed=5)
    prior = root @ root.T / 3.0 + 0.2 * torch.eye(d, dtype=torch.float64)
    head = pretrained(world, prior, shots)
    tasks = exact.prior_tasks(prior, 5)

    def loss(flat: Tensor) -> Tensor:
        v, q = flat[: d + 2], flat[d + 2 :].view(d + 2, d + 2)
        return exact.mean_error(Attention(v, q), world, tasks, shots)

    flat = torch.cat([head.v, head.q.flatten()])
    slope = torch.autograd.functional.jacobian(loss, flat)
    assert float(slope.abs().max()) < 1e-12
    curvature = torch.autograd.functional.hessian(loss, flat)
    assert float(torch.linalg.eigvalsh(curvature).min()) > -1e-12


def test_finite_pretraining_shrinks_by_c_m() -> None:
    world = make_world(torch.eye(4, dtype=torch.float64), 0.3)
    prior = 0.5 * torch.eye(4, dtype=torch.float64)
    for shots in (1.0, 6.0, 50.0):
        found = pretrained(world, prior, shots).q11
        wanted = (shots + 1) * 0.5 / ((shots + 4 + 1) * 0.5 + 0.3)
        torch.testing.assert_close(found, wanted * torch.eye(4, dtype=torch.float64))
        assert float(optima.shrinkage(4, 0.3, 0.5, shots)) == pytest.approx(wanted)


def test_auxiliary_w_trades_unseen_for_target_at_matched_pretraining() -> None:
    """At m = n the pretrained w is best on average over unseen tasks, so any other is worse."""
    d, shots = 5, 9.0
    world = make_world(torch.eye(d, dtype=torch.float64), 0.1)
    theta = torch.full((d,), d**-0.5, dtype=torch.float64)
    unseen = exact.unseen_tasks(world, 1.0)
    head = pretrained(world, shots=shots)
    plain = optima.value_only(head, world, theta)
    aux = optima.value_only_aux(head, world, theta, shots)
    form = exact.mean_error_form(head.q, world, unseen, shots)
    assert float(form.minimum(plain.v, free=[d])[d]) == pytest.approx(1.0, abs=1e-12)
    on_target = [float(exact.error(h, world, theta, shots)) for h in (plain, aux)]
    on_unseen = [float(exact.mean_error(h, world, unseen, shots)) for h in (plain, aux)]
    assert on_target[1] < on_target[0]
    assert on_unseen[1] > on_unseen[0]
    c_m = optima.shrinkage(d, 0.1, 1 / d, shots)
    fall = (shots + 2 * d + 3) / ((d + 4) * (shots + d + 1 + 0.1 * d))
    assert float(aux.w * c_m) == pytest.approx(float(c_m) - fall, abs=1e-12)


def test_full_limit_is_the_noise_floor_and_ruins_few_shots() -> None:
    world = make_world(torch.eye(5, dtype=torch.float64), 0.1)
    theta = torch.full((5,), 5**-0.5, dtype=torch.float64)
    head = optima.full_limit(pretrained(world), world, theta)
    squared = (5 + math.sqrt(29)) / 2
    assert float(head.q[-1, -1]) == pytest.approx(math.sqrt(squared))
    errors = [float(exact.error(head, world, theta, n)) for n in (0, 1, 5, 100, 1e9)]
    by_hand = [
        0.1
        + (n / (n + 1)) ** 2
        + n / (n + 1) ** 2 * ((1 + math.sqrt(squared)) ** 2 + squared * 0.1)
        for n in (0, 1, 5, 100, 1e9)
    ]
    assert errors == pytest.approx(by_hand, rel=1e-9)
    assert errors[0] == pytest.approx(0.1)
    assert errors[-1] == pytest.approx(1.1, abs=1e-6)


def test_without_the_constant_channel_no_head_beats_value_only() -> None:
    """2 / (d + 4) is the best that any (v, Q) does, so full tuning has nothing to win there."""
    d = 4
    world = random_world(d, 2, 0.2, constant=0.0)
    theta = normal(d, seed=8)
    floor = float(optima.zero_shot_floor(world, theta))
    end = optima.full_limit(pretrained(world), world, theta)
    assert float(exact.error(end, world, theta, 0)) == pytest.approx(floor)
    for seed in range(200):
        head = random_head(world, 100 + seed, size=1.0)
        best = optima.value_only(head, world, theta)
        assert float(exact.error(best, world, theta, 0)) > floor


def test_kl_term_draws_value_only_back_to_the_pretrained_head() -> None:
    world, theta = random_world(3, 6), normal(3, seed=9)
    head, anchors = pretrained(world), exact.unseen_tasks(world, 1.0)
    tuned = optima.value_only(head, world, theta)
    none = optima.value_only_kl(head, world, theta, anchors, 8, 0.0)
    much = optima.value_only_kl(head, world, theta, anchors, 8, 1e9)
    torch.testing.assert_close(none.v, tuned.v)
    torch.testing.assert_close(much.v, head.v, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("covariance", "noise", "message"),
    [
        ([[1.0, 0.0], [0.0, 0.0]], 0.1, "not positive definite, its smallest eigenvalue is 0"),
        ([[1.0, 2.0], [2.0, 1.0]], 0.1, "not positive definite, its smallest eigenvalue is -1"),
        ([[1.0, 0.5], [0.0, 1.0]], 0.1, "not symmetric"),
        ([[1.0, 0.0]], 0.1, "expected a square matrix"),
        ([[1.0]], -0.1, "sigma2 -0.1"),
        ([[1.0]], math.nan, "sigma2 nan"),
    ],
)
def test_bad_worlds_are_refused(covariance: Any, noise: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_world(covariance, noise)

"""The losses against numpy and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from keepshot.tuning.terms import Direction, kl_divergence, next_token


def draw(seed: int, positions: int = 5, vocabulary: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3.0 * torch.randn(positions, vocabulary, generator=generator, dtype=torch.float64)


def numpy_log_softmax(logits: torch.Tensor) -> np.ndarray:
    values = logits.numpy()
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def numpy_kl(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    p, q = numpy_log_softmax(first), numpy_log_softmax(second)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def everywhere(logits: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(logits), dtype=torch.bool)


def test_next_token_is_the_mean_negative_log_probability():
    logits, targets = draw(0), torch.tensor([3, 0, 6, 6, 1])
    expected = -numpy_log_softmax(logits)[np.arange(5), targets.numpy()].mean()
    assert next_token(logits, targets).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_agrees_with_numpy(direction: Direction):
    student, teacher = draw(1), draw(2)
    pair = (teacher, student) if direction == "forward" else (student, teacher)
    value = kl_divergence(student, teacher, everywhere(student), direction)
    assert value.item() == pytest.approx(numpy_kl(*pair).mean(), rel=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_to_itself_is_exactly_zero_with_no_gradient_to_speak_of(direction: Direction):
    student = draw(3).float().requires_grad_()
    value = kl_divergence(student, student.detach().clone(), everywhere(student), direction)
    assert value.item() == 0.0
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.abs().max().item() < 1e-7


def test_only_masked_positions_count():
    student, teacher = draw(4), draw(5)
    mask = torch.tensor([True, False, True, False, False])
    value = kl_divergence(student, teacher, mask, "forward")
    expected = numpy_kl(teacher, student)[[0, 2]].mean()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(student, teacher, ~everywhere(student), "forward").item() == 0.0


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_gradient_agrees_with_finite_differences(direction: Direction):
    student, teacher = draw(6, 2, 4).requires_grad_(), draw(7, 2, 4)
    mask = everywhere(student)
    (gradient,) = torch.autograd.grad(kl_divergence(student, teacher, mask, direction), student)
    pair = lambda s: (teacher, s) if direction == "forward" else (s, teacher)  # noqa: E731
    for index in np.ndindex(2, 4):
        step = torch.zeros(2, 4, dtype=torch.float64)
        step[index] = 1e-5
        up = numpy_kl(*pair(student.detach() + step)).mean()
        down = numpy_kl(*pair(student.detach() - step)).mean()
        assert gradient[index].item() == pytest.approx((up - down) / 2e-5, abs=1e-5)


def test_no_gradient_flows_into_the_teacher():
    student, teacher = draw(8).requires_grad_(), draw(9).requires_grad_()
    kl_divergence(student, teacher, everywhere(student), "forward").backward()
    assert student.grad is not None
    assert teacher.grad is None

"""The losses against numpy and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from keepshot.tuning.terms import (
    Direction,
    annealed,
    coarse_log_probs,
    k3,
    kl_divergence,
    next_token,
    pull,
    token_log_probs,
)


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


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_divergence_of_top_tokens_and_tail_agrees_with_numpy(k: int, direction: Direction):
    student, teacher = draw(1), draw(2)
    kept = teacher.topk(k, dim=1).indices

    def parts(logits: torch.Tensor) -> np.ndarray:
        p = np.exp(numpy_log_softmax(logits))
        own = np.take_along_axis(p, kept.numpy(), axis=1)
        return np.concatenate([own, 1.0 - own.sum(axis=1, keepdims=True)], axis=1)

    p, q = parts(teacher), parts(student)
    p, q = (p, q) if direction == "forward" else (q, p)
    expected = (p * np.log(p / q)).sum(axis=1).mean()
    value = kl_divergence(
        coarse_log_probs(student, kept), coarse_log_probs(teacher, kept), everywhere(student),
        direction,
    )  # fmt: skip
    assert value.item() == pytest.approx(expected, rel=1e-5)
    # Merging tokens never adds to a divergence; with all but one apart nothing is merged.
    whole = kl_divergence(student, teacher, everywhere(student), direction).item()
    assert value.item() <= whole + 1e-6
    if k == 6:
        assert value.item() == pytest.approx(whole, rel=1e-5)


def test_a_likely_tail_does_not_cancel_and_its_gradient_agrees_with_finite_differences():
    student = draw(3)
    student[:, 0] += 40.0
    kept = torch.zeros((len(student), 1), dtype=torch.long)
    assert bool(torch.isfinite(coarse_log_probs(student, kept)).all())
    moved, teacher = draw(4).requires_grad_(), coarse_log_probs(draw(5), kept + 2)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return kl_divergence(
            coarse_log_probs(logits, kept + 2), teacher, everywhere(logits), "forward"
        )

    loss(moved).backward()
    assert moved.grad is not None
    step = torch.zeros_like(moved)
    step[1, 3] = 0.05
    with torch.no_grad():
        slope = (loss(moved + step) - loss(moved - step)).item() / 0.1
    assert moved.grad[1, 3].item() == pytest.approx(slope, rel=1e-2)


def test_token_log_probs_agree_with_numpy():
    logits, targets = draw(10), torch.tensor([3, 0, 6, 6, 1])
    expected = numpy_log_softmax(logits)[np.arange(5), targets.numpy()]
    assert token_log_probs(logits, targets).numpy() == pytest.approx(expected, abs=1e-6)


def test_k3_is_zero_where_both_agree_and_never_negative():
    teacher = -torch.rand(64, generator=torch.Generator().manual_seed(0))
    assert k3(teacher.clone(), teacher).item() == 0.0
    for seed in range(5):
        student = -3 * torch.rand(64, generator=torch.Generator().manual_seed(seed))
        ratio = np.exp(teacher.numpy() - student.numpy())
        expected = (ratio - 1 - np.log(ratio)).mean()
        assert k3(student, teacher).item() == pytest.approx(expected, rel=1e-5)
        assert expected >= 0.0


def test_k3_averaged_over_the_students_tokens_is_the_reverse_divergence():
    student, teacher = draw(11, 3), draw(12, 3)
    log_p, log_q = numpy_log_softmax(student), numpy_log_softmax(teacher)
    expected = 0.0
    for token in range(7):
        targets = torch.full((3,), token)
        each = [
            k3(token_log_probs(student[[n]], targets[[n]]), torch.tensor(log_q[n, [token]]))
            for n in range(3)
        ]
        expected += sum(np.exp(log_p[n, token]) * each[n].item() for n in range(3)) / 3
    assert expected == pytest.approx(numpy_kl(student, teacher).mean(), rel=1e-4)


def test_the_k3_gradient_agrees_with_finite_differences():
    student, teacher = draw(13, 3).requires_grad_(), draw(14, 3)
    targets = torch.tensor([1, 5, 2])
    kept = token_log_probs(teacher, targets)
    (gradient,) = torch.autograd.grad(k3(token_log_probs(student, targets), kept), student)

    def numpy_k3(logits: torch.Tensor) -> float:
        chosen = [numpy_log_softmax(t)[np.arange(3), targets.numpy()] for t in (teacher, logits)]
        log_ratio = chosen[0] - chosen[1]
        return float((np.exp(log_ratio) - 1 - log_ratio).mean())

    for index in np.ndindex(3, 7):
        step = torch.zeros(3, 7, dtype=torch.float64)
        step[index] = 1e-5
        up, down = numpy_k3(student.detach() + step), numpy_k3(student.detach() - step)
        assert gradient[index].item() == pytest.approx((up - down) / 2e-5, abs=1e-4)


@pytest.mark.parametrize("weighted", [False, True], ids=["l2-sp", "ewc"])
def test_the_pull_and_its_gradient_agree_with_numpy(weighted: bool):
    now = [draw(15).float().requires_grad_(), draw(16, 2, 3).float().requires_grad_()]
    starts = [draw(17).float(), draw(18, 2, 3).float()]
    importances = [draw(19).float().abs(), draw(20, 2, 3).float().abs()]
    value = pull(
        (w, start, importance if weighted else None)
        for w, start, importance in zip(now, starts, importances, strict=True)
    )
    gaps = [w.detach().numpy() - start.numpy() for w, start in zip(now, starts, strict=True)]
    factors = [f.numpy() if weighted else np.ones_like(f.numpy()) for f in importances]
    expected = 0.5 * sum((f * gap**2).sum() for f, gap in zip(factors, gaps, strict=True))
    assert value.item() == pytest.approx(expected, rel=1e-5)
    for gradient, f, gap in zip(torch.autograd.grad(value, now), factors, gaps, strict=True):
        assert gradient.numpy() == pytest.approx(f * gap, rel=1e-5)
    assert pull((w, w.detach().clone(), None) for w in now).item() == 0.0


def test_a_weight_is_annealed_in_equal_steps():
    assert [annealed(1.0, 0.2, step, 5) for step in range(5)] == pytest.approx(
        [1.0, 0.8, 0.6, 0.4, 0.2]
    )
    assert annealed(0.7, 0.0, 0, 1) == 0.7
    assert annealed(1.0, 0.0, 9, 5) == 0.0

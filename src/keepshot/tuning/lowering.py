"""Lambda after training: the change made smaller in memory until the guard is content.

Exact for full-rank methods and for LoRA; nothing is written or read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keepshot.tuning.guard import ICLGuard, Reading
from keepshot.tuning.methods import Prepared

SPARE = 0.1
"""Nats of target loss that may be given up for a guard whom no lambda contents."""


@dataclass(frozen=True)
class Point:
    """One lambda on the path from untuned to tuned: retention on the guard's tasks, target loss.

    The loss is on the rows that judged the short runs, which training may have learned since.
    """

    lam: float
    retention: float
    ci95: tuple[float, float]
    target_loss: float


def find_lambda(
    prepared: Prepared,
    start: Mapping[str, Tensor] | None,
    guard: ICLGuard,
    lambdas: Sequence[float],
    ask: Callable[[], Reading],
    target_loss: Callable[[], float],
) -> tuple[float, str, tuple[Point, ...]]:
    """Lower lambda in place until the guard is content, if it is not; else leave every bit.

    Where no lambda contents the guard, the one that it finds best is taken, of those whose target
    loss is within `SPARE` of the least.

    Args:
        prepared: what was trained, in the module.
        start: what it was before; None for adapters, which start where they change nothing.
        guard: has watched the training.
        lambdas: what is tried, in turn.
        ask: puts the guard's questions to the module as it is.
        target_loss: reads the loss on the rows that judged the short runs, of the module as it is.
    """
    last = guard.readings[-1]
    if not guard.minds(last):
        return 1.0, f"the guard found {_words(last)} at the end", ()
    places = _places(prepared, start)
    if not places:
        return 1.0, f"the guard found {_words(last)}, and this adapter has no lambda in memory", ()
    path: list[Point] = [Point(1.0, last.retention, last.ci95, target_loss())]
    for lam in lambdas:
        _move_(places, lam)
        reading = ask()
        path.append(Point(lam, reading.retention, reading.ci95, target_loss()))
        if not guard.minds(reading):
            why = f"the guard found {_words(last)} at lambda 1, and {_words(reading)} here"
            return lam, why, tuple(path)
    lam = _best(path)
    _move_(places, lam)
    why = (
        f"the guard found {_words(last)} at lambda 1 and is content with no lambda tried; of those "
        f"whose target loss is within {SPARE:g} of the least, this one keeps most"
    )
    return lam, why, tuple(path)


def _best(path: Sequence[Point]) -> float:
    least = min(point.target_loss for point in path)
    return max((p for p in path if p.target_loss <= least + SPARE), key=lambda p: p.retention).lam


def _words(reading: Reading) -> str:
    low, high = reading.ci95
    return f"retention {reading.retention:.2f} [{low:.2f}, {high:.2f}] of {reading.num_items} items"


def _places(
    prepared: Prepared, start: Mapping[str, Tensor] | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return what moves with lambda: the live tensor, and its values at 0 and at 1.

    Of LoRA that is B alone, of which the update is a multiple; DoRA has none so simple.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    if start is not None:
        return [(p, start[name], p.detach().clone()) for name, p in prepared.parameters.items()]
    for name, parameter in prepared.parameters.items():
        if "lora_magnitude_vector" in name:
            return []
        if ".lora_B." in name:
            found.append((parameter, torch.zeros_like(parameter), parameter.detach().clone()))
    return found


def _move_(places: Sequence[tuple[Tensor, Tensor, Tensor]], lam: float) -> None:
    with torch.no_grad():
        for live, at_zero, at_one in places:
            live.copy_(at_one if lam == 1.0 else at_zero + lam * (at_one - at_zero))

"""Which lambda each tensor gets: one number, or a rule by name. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable

from keepshot.blending.arithmetic import Lambda, RowLambda
from keepshot.errors import ConfigError

LambdaRule = Callable[[str], Lambda]
"""A pure function from a tensor's name to its lambda."""


def as_rule(lam: float | LambdaRule) -> LambdaRule:
    """Return `lam` as a function of the tensor's name; a number means the same for every tensor."""
    return lam if callable(lam) else lambda _name: lam


def check_lambda(lam: object) -> str | None:
    """Check one lambda, and return a note for the user if it lies outside [0, 1].

    Raises:
        ConfigError: if `lam` is not a finite number.
    """
    if isinstance(lam, RowLambda):
        notes = (check_lambda(value) for value in (min(lam.values), max(lam.values)))
        return next((note for note in notes if note), None)
    # Booleans are integers to Python, but `lambda: true` in a file is a slip.
    if isinstance(lam, bool) or not isinstance(lam, (int, float)) or not math.isfinite(lam):
        raise ConfigError(f"lambda {lam!r} is not a number; give one such as 0.4")
    if 0.0 <= lam <= 1.0:
        return None
    side = "beyond the tuned model" if lam > 1.0 else "away from the tuned model"
    return f"lambda {lam:g} lies outside 0..1: this extrapolates {side}; measure before you use it"

"""The arithmetic of partial adaptation: base + lambda * (tuned - base), one tensor at a time.

Pure: knows neither files nor models. Everything that blends (a sweep in memory, a stream to
disk) goes through `blend_`, so that all of them give the same bits.
Source: arXiv 2504.11626 (one scalar for all tensors); arXiv 2109.01903 (WiSE-FT).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from keepshot.errors import ConfigError, ModelError

LambdaRule = Callable[[str], float]
"""A pure function from a tensor's name to its lambda."""

CHUNK_ELEMENTS = 1 << 17
"""Elements worked on at a time where a wider copy is needed: bounds memory, stays in cache."""

_BLENDABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_rule(lam: float | LambdaRule) -> LambdaRule:
    """Return `lam` as a function of the tensor's name; a number means the same for every tensor."""
    return lam if callable(lam) else lambda _name: lam


def check_lambda(lam: object) -> str | None:
    """Check one lambda, and return a note for the user if it lies outside [0, 1].

    Raises:
        ConfigError: if `lam` is not a finite number.
    """
    # Booleans are integers to Python, but `lambda: true` in a file is a slip.
    if isinstance(lam, bool) or not isinstance(lam, (int, float)) or not math.isfinite(lam):
        raise ConfigError(f"lambda {lam!r} is not a number; give one such as 0.4")
    if 0.0 <= lam <= 1.0:
        return None
    side = "beyond the tuned model" if lam > 1.0 else "away from the tuned model"
    return f"lambda {lam:g} lies outside 0..1: this extrapolates {side}; measure before you use it"


def check_pair(name: str, base: Tensor, tuned: Tensor) -> None:
    """Check that two tensors can be blended.

    Raises:
        ModelError: naming the tensor, if shapes differ, a value is NaN or infinite, the kind of
            number cannot be blended, or integers are not the same in both.
    """
    if base.shape != tuned.shape:
        raise ModelError(
            f"tensor {name!r}: base has shape {tuple(base.shape)}, tuned {tuple(tuned.shape)}; "
            "only two models of one architecture and vocabulary can be blended"
        )
    if base.is_floating_point() != tuned.is_floating_point():
        raise ModelError(f"tensor {name!r}: base is {base.dtype}, tuned is {tuned.dtype}")
    if not base.is_floating_point():
        if not torch.equal(base, tuned):
            raise ModelError(
                f"tensor {name!r} ({base.dtype}) differs between base and tuned, and integers "
                "cannot be blended; quantised models must be dequantised first"
            )
        return
    for side, tensor in (("base", base), ("tuned", tuned)):
        if tensor.dtype not in _BLENDABLE:
            raise ModelError(
                f"tensor {name!r}: {side} is {tensor.dtype}, which cannot be blended; "
                "convert it to bfloat16 or float32 first"
            )
        check_finite(f"{side} tensor {name!r}", tensor)


def check_finite(what: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        ModelError: beginning with `what`.
    """
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return
    # Both ends are NaN if any value is; no temporary of the tensor's size, unlike `isfinite`.
    low, high = torch.aminmax(tensor)
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        kind = "NaN" if math.isnan(low.item()) else "infinity"
        raise ModelError(f"{what} holds {kind}; this checkpoint is damaged or its tuning diverged")


def blend(base: Tensor, tuned: Tensor, lam: float, *, name: str = "weight") -> Tensor:
    """Return base + lam * (tuned - base) as a new tensor (arXiv 2504.11626).

    The sum is done in float32 (float64 for float64 inputs) and rounded once. `lam` 0 and 1
    copy base and tuned, bit for bit and in their own dtypes; in between, the wider of both dtypes.

    Args:
        base: any shape.
        tuned: the shape of `base`.
        lam: 0 is base, 1 is tuned; outside [0, 1] extrapolates.
        name: what error messages call the tensor.

    Raises:
        ConfigError: if `lam` is not a finite number.
        ModelError: see `check_pair`; also if the result overflows its dtype.
    """
    check_lambda(lam)
    check_pair(name, base, tuned)
    out = torch.empty_like(base, dtype=blended_dtype(base.dtype, tuned.dtype, lam))
    blend_(out, base, tuned, lam)
    check_finite(f"blend at lambda {lam:g} of tensor {name!r}", out)
    return out


def blended_dtype(base: torch.dtype, tuned: torch.dtype, lam: float) -> torch.dtype:
    """Return the dtype of a blend: base's at 0, tuned's at 1, the wider of both in between."""
    if lam in (0.0, 1.0):
        return base if lam == 0.0 else tuned
    return torch.promote_types(base, tuned)


def blend_(out: Tensor, base: Tensor, tuned: Tensor, lam: float) -> None:
    """Write base + lam * (tuned - base) into `out`, rounding once to its dtype.

    Checks nothing: call `check_pair` first. `out` must not share memory with `tuned`.
    """
    # Copies, not arithmetic: `lerp` at 0 turns -0.0 into 0.0, and at 1 relies on rounding luck.
    if lam == 0.0:
        out.copy_(base)
    elif lam == 1.0 or not base.is_floating_point():
        out.copy_(tuned)
    elif out.dtype == base.dtype == tuned.dtype and out.dtype in (torch.float32, torch.float64):
        torch.lerp(base, tuned, lam, out=out)
    else:
        _blend_widened_(out, base, tuned, lam)


def _blend_widened_(out: Tensor, base: Tensor, tuned: Tensor, lam: float) -> None:
    wide = _accumulator(base, tuned)
    if not (out.is_contiguous() and base.is_contiguous() and tuned.is_contiguous()):
        out.copy_(torch.lerp(base.to(wide), tuned.to(wide), lam))
        return
    pieces = zip(_chunks(out), _chunks(base), _chunks(tuned), strict=True)
    for out_piece, base_piece, tuned_piece in pieces:
        out_piece.copy_(torch.lerp(base_piece.to(wide), tuned_piece.to(wide), lam))


def _accumulator(base: Tensor, tuned: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.view(-1).split(CHUNK_ELEMENTS) if tensor.numel() else ()


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors agree in dtype, shape and every bit (so 0.0 is not -0.0)."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    integer = _SAME_SIZE_INTEGER[first.element_size()]
    return torch.equal(first.contiguous().view(integer), second.contiguous().view(integer))


def delta_products(out: Tensor, base: Tensor, tuned: Tensor) -> tuple[float, float]:
    """Return <out - base, tuned - base> and |tuned - base|^2, in float32, chunks in float64.

    Their quotient is the realised lambda; the parts can be added over the tensors of a model.
    """
    along = norm = 0.0
    wide = _accumulator(base, tuned)
    flat = (tensor.reshape(-1) for tensor in (out, base, tuned))
    pieces = zip(*(tensor.split(CHUNK_ELEMENTS) for tensor in flat), strict=True)
    for out_piece, base_piece, tuned_piece in pieces:
        origin = base_piece.to(wide)
        delta = tuned_piece.to(wide) - origin
        along += torch.dot(out_piece.to(wide) - origin, delta).item()
        norm += torch.dot(delta, delta).item()
    return along, norm


def realised_lambda(out: Tensor, base: Tensor, tuned: Tensor) -> float | None:
    """Return the least-squares slope of (out - base) on (tuned - base).

    Rounding to bfloat16 can leave a light fine-tune's blend far from the lambda that was asked
    for; this says where it landed. None if tuned equals base.
    """
    along, norm = delta_products(out, base, tuned)
    return along / norm if norm > 0.0 else None

"""The arithmetic of partial adaptation: base + lambda * (tuned - base), one tensor at a time.

Pure: knows neither files nor models. The operations and their order are those of
`keepshot.blending.arithmetic`, so that a sweep in memory and a stream to disk give the same bits.
Source: arXiv 2504.11626 (one scalar for all tensors); arXiv 2109.01903 (WiSE-FT).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from keepshot.blending.arithmetic import RowLambda
from keepshot.blending.rules import check_lambda
from keepshot.errors import ModelError

CHUNK_ELEMENTS = 1 << 17
"""Elements worked on at a time where a wider copy is needed: bounds memory, stays in cache."""

_BLENDABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def blend_(out: Tensor, base: Tensor, tuned: Tensor, lam: float | RowLambda) -> None:
    """Write base + lam * (tuned - base) into `out`, rounding once to its dtype.

    Checks nothing: call `check_pair` first. `out` must not share memory with `base` or `tuned`.
    """
    # Copies, not arithmetic: a sum with 0 turns -0.0 into 0.0, and at 1 relies on rounding luck.
    if lam == 0.0:
        out.copy_(base)
    elif lam == 1.0 or not base.is_floating_point():
        out.copy_(tuned)
    elif isinstance(lam, RowLambda):
        _blend_rows_(out, base, tuned, lam)
    elif not (out.is_contiguous() and base.is_contiguous() and tuned.is_contiguous()):
        wide = _accumulator(base, tuned)
        out.copy_(_sum(base.to(wide), tuned.to(wide), lam))
    else:
        wide = _accumulator(base, tuned)
        pieces = zip(_chunks(out), _chunks(base), _chunks(tuned), strict=True)
        for out_piece, base_piece, tuned_piece in pieces:
            out_piece.copy_(_sum(base_piece.to(wide), tuned_piece.to(wide), lam))


def _sum(base: Tensor, tuned: Tensor, lam: float) -> Tensor:
    # Not `lerp`: it fuses the product with the sum on some processors and not on others.
    delta = tuned - base
    near_base = abs(lam) < 0.5
    delta *= lam if near_base else lam - 1.0
    delta += base if near_base else tuned
    return delta


def _blend_rows_(out: Tensor, base: Tensor, tuned: Tensor, lam: RowLambda) -> None:
    wide = _accumulator(base, tuned)
    for value in sorted(set(lam.values)):
        places = [place for place, other in enumerate(lam.values) if other == value]
        rows = torch.tensor(places, device=base.device)
        dim = 0 if lam.axis == 0 else base.ndim - 1
        ends = (side.index_select(dim, rows).to(wide) for side in (base, tuned))
        origin, end = ends
        part = origin if value == 0.0 else end if value == 1.0 else _sum(origin, end, value)
        out.index_copy_(dim, rows, part.to(out.dtype))


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

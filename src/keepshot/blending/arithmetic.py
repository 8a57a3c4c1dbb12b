"""The sum base + lambda * (tuned - base) on numpy arrays, and rounding it to 16 bits.

Does without torch, whose import takes longer than blending a small model. The operations are
those of `keepshot.blending.blend`, in the same order, so that both give the same bits: delta =
tuned - base, times lambda, plus base (nearer the tuned end: times lambda - 1, plus tuned), in
float32 or float64, rounded once at the end.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Rounding = Literal["nearest", "stochastic"]

FLOATS = ("F64", "F32", "F16", "BF16")
_PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
_BF16_LARGEST = 0x7F7F
_PRODUCT_ROW = 1024


@dataclass(frozen=True, eq=False)
class RowLambda:
    """One lambda per row (`axis` 0) or per column (`axis` -1) of a tensor.

    For projections that hold queries, keys and values in one matrix.
    """

    axis: Literal[0, -1]
    values: tuple[float, ...]

    def at(self, start: int, stop: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Return lambda of the flat elements `start` to `stop` of a tensor of this shape."""
        flat = np.arange(start, stop)
        # For a vector both axes are the same.
        row = shape[-1] if len(shape) > 1 else 1
        places = flat // row if self.axis == 0 or len(shape) == 1 else flat % row
        return np.asarray(self.values)[places]


Lambda = float | RowLambda


def widen(raw: Array, dtype: str, wide: type[np.floating[Any]], out: Array) -> Array:
    """Return stored values as float32 or float64: `raw` itself if it has that type, else `out`.

    Args:
        raw: the stored bytes (uint8).
        dtype: the format's name of their type.
        wide: the type of the sum.
        out: where converted values go; of type `wide`, as long as `raw` has elements.
    """
    if dtype == "BF16":
        bits = out if out.dtype == np.float32 else np.empty(out.shape, np.float32)
        words = bits.view(np.uint32)
        np.copyto(words, raw.view(np.uint16))
        np.left_shift(words, 16, out=words)
        if bits is not out:
            np.copyto(out, bits)
        return out
    values = raw.view(_PLAIN[dtype])
    if values.dtype == wide:
        return values
    np.copyto(out, values, casting="same_kind")
    return out


def mix(base: Array, tuned: Array, delta: Array, lam: float | NDArray[np.float64]) -> Array:
    """Return base + lam * delta as a new array; exactly `base` at 0 and `tuned` at 1.

    Args:
        base: float32 or float64.
        tuned: the same type and length.
        delta: tuned - base, rounded to that type.
        lam: a number, or one per element.
    """
    if isinstance(lam, (float, int)):
        if lam in (0.0, 1.0):
            return base if lam == 0.0 else tuned
        near_base = abs(lam) < 0.5
        out: Array = np.multiply(delta, lam if near_base else lam - 1.0)
        return np.add(out, base if near_base else tuned, out=out)
    low = np.abs(lam) < 0.5
    factor = np.where(low, lam, lam - 1.0).astype(delta.dtype)
    out = np.multiply(delta, factor)
    np.add(out, np.where(low, base, tuned), out=out)
    np.copyto(out, base, where=lam == 0.0)
    np.copyto(out, tuned, where=lam == 1.0)
    return out


def narrow(values: Array, dtype: str, dice: np.random.BitGenerator | None = None) -> Array:
    """Round float32 or float64 values to a stored type; returns them as that type's raw array.

    Args:
        values: what is to be rounded.
        dtype: the format's name of the type.
        dice: random bits for stochastic rounding, up or down with the probability that makes the
            mean exact; None rounds to nearest, ties to even.
    """
    plain = _PLAIN.get(dtype)
    if plain is not None and values.dtype == plain:
        return values
    if dtype == "F16" and dice is not None:
        return _float16_by_dice(values, dice)
    if plain is not None:
        # Overflow is found afterwards, where the tensor's name is known.
        with np.errstate(over="ignore"):
            return values.astype(plain)
    words = values.astype(np.float32, copy=False).view(np.uint32)
    if dice is not None:
        return _bfloat16_by_dice(words, dice)
    odd = np.right_shift(words, 16)
    np.bitwise_and(odd, 1, out=odd)
    np.add(odd, words, out=odd)
    np.add(odd, 0x7FFF, out=odd)
    return np.right_shift(odd, 16, out=odd).astype(np.uint16)


def dice_for(seed: int, name: str, start: int) -> np.random.BitGenerator:
    """Return the random bits for one tensor from element `start` on.

    A pure function of its arguments, so that rounding does not depend on shards, threads or
    where a write was interrupted.
    """
    digest = hashlib.sha256(f"{seed} {start} {name}".encode()).digest()
    return np.random.SFC64(np.random.SeedSequence(int.from_bytes(digest[:16], "little")))


def product(first: Array, second: Array) -> float:
    """Return the inner product: float32 over short rows, float64 over their sums."""
    whole = first.size - first.size % _PRODUCT_ROW
    rows = (first[:whole].reshape(-1, _PRODUCT_ROW), second[:whole].reshape(-1, _PRODUCT_ROW))
    total = float(np.einsum("ij,ij->i", *rows).sum(dtype=np.float64)) if whole else 0.0
    return total + float(np.einsum("i,i->", first[whole:], second[whole:]))


def fault(values: Array) -> str | None:
    """Return "NaN" or "infinity" if the values hold one, else None."""
    if np.isnan(values).any():
        return "NaN"
    return "infinity" if np.isinf(values).any() else None


def _bits(dice: np.random.BitGenerator, count: int, kind: type[np.unsignedinteger[Any]]) -> Array:
    # The raw stream is the only one that numpy promises to keep from version to version.
    per_word = 8 // np.dtype(kind).itemsize
    raw: Any = dice.random_raw(-(-count // per_word))
    return raw.view(kind)[:count]


def _bfloat16_by_dice(words: Array, dice: np.random.BitGenerator) -> Array:
    """Add 16 random bits to the 16 that are dropped; the carry rounds up in proportion."""
    magnitude = np.bitwise_and(words, 0x7FFFFFFF)
    magnitude += _bits(dice, words.size, np.uint16)
    magnitude >>= 16
    np.minimum(magnitude, _BF16_LARGEST, out=magnitude)
    sign = np.right_shift(words, 16)
    sign &= 0x8000
    return (magnitude | sign).astype(np.uint16)


def _float16_by_dice(values: Array, dice: np.random.BitGenerator) -> Array:
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float16)
    error = values - nearest.astype(values.dtype)
    towards = np.where(error > 0, np.float16(np.inf), np.float16(-np.inf))
    other = np.nextafter(nearest, towards.astype(np.float16))
    gap = np.abs(other.astype(values.dtype) - nearest.astype(values.dtype))
    chance = _bits(dice, values.size, np.uint32) * 2.0**-32
    switch = (chance * gap < np.abs(error)) & np.isfinite(other) & np.isfinite(nearest)
    return np.where(switch, other, nearest)

"""A written blend read again without torch: is everything there, and is it the blend?

Headers and index of the finished directory against the plan; of every tensor a few stretches,
recomputed in float64 straight from the inputs. By the plan, names, shapes and config are those of
the tuned model, so that what loads that one loads this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keepshot.blending.arithmetic import FLOATS, Array, Lambda, RowLambda, widen
from keepshot.blending.stream import Files, TensorPlan
from keepshot.errors import ModelError
from keepshot.models.shards import ITEM_SIZE, StoredTensor, open_checkpoint

_STRETCH = 256
_STEP = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
"""Between neighbouring numbers, relative: stochastic rounding may take either."""
_LEAST = {"F64": 2.0**-1074, "F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}
"""The smallest positive number."""


def reread(folder: Path, plans: Mapping[str, TensorPlan]) -> str:
    """Check a finished directory against what was to be written; return what was done, in words.

    Args:
        folder: the directory.
        plans: how each of its tensors comes about.

    Raises:
        ModelError: naming the tensor that is missing or is not the blend.
    """
    found = open_checkpoint(folder).tensors
    for name, plan in plans.items():
        stored = found.get(name)
        if stored is None or (stored.dtype, stored.shape) != (plan.dtype, plan.shape):
            raise ModelError(f"{folder}: tensor {name!r} is not as it was written; write it again")
    if odd := sorted(found.keys() - plans.keys()):
        raise ModelError(f"{folder}: tensor {odd[0]!r} was never written; write it again")
    count = 0
    with Files() as files:
        for name, plan in plans.items():
            for start in _places(plan):
                stop = min(start + _STRETCH, plan.num_elements)
                _compare(files, plan, found[name], start, stop)
                count += stop - start
    return f"{len(plans)} tensors read again, {count} of their weights recomputed"


def _places(plan: TensorPlan) -> list[int]:
    """Return where to look: the beginning, the end, and a place between that the name decides."""
    last = max(0, plan.num_elements - _STRETCH)
    between = int.from_bytes(hashlib.sha256(plan.name.encode()).digest()[:8], "little")
    return sorted({0, between % (last + 1), last}) if plan.num_elements else []


def _compare(files: Files, plan: TensorPlan, stored: StoredTensor, start: int, stop: int) -> None:
    written = _values(files, stored, start, stop)
    expected, size = _oracle(files, plan, start, stop)
    if plan.dtype not in FLOATS:
        wrong = written != expected
    else:
        arithmetic = 0.0 if plan.wide is np.float64 else 2.0**-22
        room = _STEP[plan.dtype] * np.abs(expected) + _LEAST[plan.dtype] + arithmetic * size
        wrong = ~(np.abs(written - expected) <= room)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise ModelError(
            f"{stored.file}: element {start + place} of tensor {plan.name!r} is {written[place]}, "
            f"where the inputs give {expected[place]}; memory or disk may be faulty, write it again"
        )


def _oracle(files: Files, plan: TensorPlan, start: int, stop: int) -> tuple[Array, Array]:
    """Return the sum in float64, and how large the numbers are that it is made of."""
    tuned = _values(files, plan.sides[0].tensor, start, stop)
    if plan.dtype not in FLOATS:
        return tuned, tuned
    base = np.full(stop - start, plan.origin)
    blended = max(0, min(stop, plan.num_blended) - start)
    if plan.base is not None:
        base[:blended] = _values(files, plan.base, start, start + blended)
        base[blended:] = tuned[blended:]  # rows that the base does not have
    total, size = base.copy(), np.abs(base)
    for side in plan.sides:
        end = tuned
        if side is not plan.sides[0]:  # of the base's shape, without rows that tuned alone has
            end = base.copy()
            end[:blended] = _values(files, side.tensor, start, start + blended)
        part = _factor(side.lam, start, stop, plan.shape) * (end - base)
        part[blended:] = 0.0
        total += part
        size += np.abs(end) + 2.0 * np.abs(part)
    return total, size


def _factor(lam: Lambda, start: int, stop: int, shape: tuple[int, ...]) -> Any:
    return lam.at(start, stop, shape) if isinstance(lam, RowLambda) else lam


def _values(files: Files, tensor: StoredTensor, start: int, stop: int) -> Array:
    count = stop - start
    raw = files.read(tensor, start, np.empty(count * ITEM_SIZE[tensor.dtype], np.uint8))
    if tensor.dtype in FLOATS:
        return widen(raw, tensor.dtype, np.float64, np.empty(count))
    return raw.reshape(count, -1).astype(np.int64) @ (256 ** np.arange(raw.size // max(count, 1)))

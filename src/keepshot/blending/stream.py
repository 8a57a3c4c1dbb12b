"""Blending files into files: chunks read by offset into reused buffers, written by offset.

Memory does not grow with the model, nor with one tensor, whatever the shard layouts of the inputs;
no file is mapped. Every shard is resumable: it gets its name when it is whole and on disk, with a
note beside it of what was measured on the way. Knows nothing of configs, tokenizers or rules.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keepshot.assets import sha256_of
from keepshot.blending.arithmetic import (
    FLOATS,
    Array,
    Lambda,
    Rounding,
    RowLambda,
    dice_for,
    fault,
    mix,
    narrow,
    product,
    widen,
)
from keepshot.errors import ModelError
from keepshot.models.shards import ITEM_SIZE, PlannedShard, StoredTensor, read_header

CHUNK = 1 << 17
"""Elements worked on at a time. Stochastic rounding draws anew at each chunk, so that another
number here gives other bytes."""
_MAX_THREADS = 4


@dataclass(frozen=True)
class Side:
    """One of the models that are added to the base, and how much of it."""

    tensor: StoredTensor
    lam: Lambda


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor of the output comes about.

    `base` None stands for `origin` everywhere (the adapter that changes nothing). Elements
    beyond those of `base` (added vocabulary rows) are taken from the first side as they are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: StoredTensor | None
    sides: tuple[Side, ...]
    origin: float = 0.0
    on_path: bool = True
    """Whether it moves with lambda, so that the realised lambda can be read off it."""

    @property
    def wide(self) -> type[np.floating[Any]]:
        """The type of the sum."""
        kinds = {self.base.dtype if self.base else "", *(side.tensor.dtype for side in self.sides)}
        return np.float64 if "F64" in kinds else np.float32

    @property
    def num_elements(self) -> int:
        """Number of elements of the output."""
        return math.prod(self.shape)

    @property
    def num_blended(self) -> int:
        """How many of them, from the first on, have a counterpart in the base."""
        if self.base is None:
            return self.num_elements
        return min(self.num_elements, self.base.num_elements)


Sums = tuple[float, float]
"""<out - base, delta> and |delta|^2 of a tensor; their quotient is the lambda realised."""


@dataclass(frozen=True)
class How:
    """How shards are written."""

    rounding: Rounding = "nearest"
    """To types of 16 bits."""
    seed: int = 0
    """Of stochastic rounding."""
    hashed: bool = False
    """Return the sha256 of every shard as it lies on the disk, too."""
    told: Callable[[int, int], None] = lambda _done, _total: None
    """Called with the bytes written so far, and in all."""
    naming: Callable[[PlannedShard], None] = lambda _shard: None
    """Called when a shard is whole, before it gets its name."""


@dataclass(frozen=True)
class Written:
    """What was measured on the way."""

    sums: dict[str, Sums] = field(default_factory=dict)
    """What the realised lambda is computed from, by tensor."""
    sha256: dict[str, str] = field(default_factory=dict)
    """By file."""


class Files:
    """Files opened once, read and written by offset from any thread."""

    def __init__(self) -> None:
        """Open nothing yet."""
        self._open: dict[Path, int] = {}
        self._stack = ExitStack()
        self._lock = threading.Lock()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._open.clear()

    def read(self, tensor: StoredTensor, start: int, out: Array) -> Array:
        """Fill `out` (uint8) with the tensor's data from element `start` on."""
        offset = tensor.offset + start * ITEM_SIZE[tensor.dtype]
        if not _read_all(self._descriptor(tensor.file), out.data, offset):
            raise ModelError(f"{tensor.file}: became shorter while it was read; get it again")
        return out

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._open:
                try:
                    descriptor = os.open(file, os.O_RDONLY)
                except OSError as error:
                    raise ModelError(f"{file}: cannot be read: {error.strerror}") from None
                self._stack.callback(os.close, descriptor)
                self._open[file] = descriptor
            return self._open[file]


def write_shards(
    shards: Sequence[PlannedShard],
    plans: Mapping[str, TensorPlan],
    folder: Path,
    how: How | None = None,
) -> Written:
    """Write all shards that are not whole in `folder` yet; the same bytes however often stopped.

    Args:
        shards: from `plan_shards`.
        plans: one for each tensor in them.
        folder: where they go; it exists.
        how: see `How`.

    Raises:
        ModelError: naming a tensor that holds NaN or infinity, integers that differ, or a file
            that cannot be read.
        OSError: if the disk is full.
    """
    how = how or How()
    written = Written()
    total = sum(shard.num_bytes for shard in shards)
    done = 0
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with Files() as files, ThreadPoolExecutor(threads) as pool:
        work = _Work(files, plans, how)
        try:
            for shard in shards:
                known = _finished(shard, folder)
                if known is not None and how.hashed:
                    # Its header is whole; its data need not be, after a power cut.
                    digest = sha256_of(folder / shard.name)
                    known = (known[0], digest) if known[1] in (None, digest) else None
                sums, digest = known or _write_shard(shard, folder, work, pool)
                written.sums.update(sums)
                if digest is not None:
                    written.sha256[shard.name] = digest
                done += shard.num_bytes
                how.told(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return written


def drop_notes(shards: Sequence[PlannedShard], folder: Path) -> None:
    """Remove what was noted beside the shards, once all are whole."""
    for shard in shards:
        _note(shard, folder).unlink(missing_ok=True)


def num_whole(shards: Sequence[PlannedShard], folder: Path) -> int:
    """Count the shards that are whole, with their notes."""
    return sum(_finished(shard, folder) is not None for shard in shards)


def same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    """Tell whether two stored tensors agree in type, shape and every bit."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    size = ITEM_SIZE[first.dtype]
    with Files() as files:
        for start, stop in _spans(first.num_elements):
            pieces = [np.empty((stop - start) * size, np.uint8) for _ in range(2)]
            files.read(first, start, pieces[0])
            files.read(second, start, pieces[1])
            if not np.array_equal(pieces[0], pieces[1]):
                return False
    return True


def _write_shard(
    shard: PlannedShard, folder: Path, work: _Work, pool: ThreadPoolExecutor
) -> tuple[dict[str, Sums], str | None]:
    partial = folder / f".{shard.name}.partial"
    pieces = [(t, span) for t in shard.tensors.values() for span in _spans(t.num_elements)]
    digest = hashlib.sha256(shard.header) if work.how.hashed else None
    held = np.empty(CHUNK * 8, np.uint8)
    with _writing(partial, shard) as descriptor:
        parts = pool.map(lambda piece: work.blend(descriptor, piece[0], *piece[1]), pieces)
        sums: dict[str, Sums] = {}
        # Added up in the order of the data, whichever thread was first.
        for (tensor, span), part in zip(pieces, parts, strict=True):
            if part is not None:
                along, norm = sums.get(tensor.name, (0.0, 0.0))
                sums[tensor.name] = (along + part[0], norm + part[1])
            if digest is not None:
                digest.update(_read_back(descriptor, tensor, *span, held))
    work.how.naming(shard)
    partial.replace(folder / shard.name)
    note = _note(shard, folder)
    temporary = note.with_name(f"{note.name}.partial")
    sha256 = digest.hexdigest() if digest is not None else None
    temporary.write_text(json.dumps({"sums": sums, "sha256": sha256}), encoding="utf-8")
    temporary.replace(note)
    return sums, sha256


def _read_back(
    descriptor: int, tensor: StoredTensor, start: int, stop: int, held: Array
) -> memoryview:
    """Return what a reader will find, which is not taken on trust from the memory it came from."""
    size = ITEM_SIZE[tensor.dtype]
    view = held.data[: (stop - start) * size]
    _read_all(descriptor, view, tensor.offset + start * size)
    return view


@contextmanager
def _writing(partial: Path, shard: PlannedShard) -> Generator[int]:
    """Open a file of the shard's size with its header; on disk when the block ends well."""
    descriptor = os.open(partial, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o666)
    try:
        # A full disk shows here, not in the middle.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, shard.num_bytes)
        else:
            os.ftruncate(descriptor, shard.num_bytes)
        _write_all(descriptor, memoryview(shard.header), 0)
        yield descriptor
        os.fsync(descriptor)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _finished(shard: PlannedShard, folder: Path) -> tuple[dict[str, Sums], str | None] | None:
    file, note = folder / shard.name, _note(shard, folder)
    if not (file.is_file() and note.is_file()):
        return None
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        sums, digest = noted["sums"], noted["sha256"]
        found = read_header(file)
    except (ValueError, KeyError, TypeError, ModelError):
        return None
    planned = {(t.name, t.dtype, t.shape, t.offset) for t in shard.tensors.values()}
    if {(t.name, t.dtype, t.shape, t.offset) for t in found} != planned:
        return None
    return {name: (float(along), float(norm)) for name, (along, norm) in sums.items()}, digest


def _note(shard: PlannedShard, folder: Path) -> Path:
    return folder / f".{shard.name}.sums"


def _spans(count: int) -> list[tuple[int, int]]:
    return [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def _read_all(descriptor: int, view: memoryview, offset: int) -> bool:
    """Fill a buffer; return whether there was enough."""
    while len(view):
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            return False
        view, offset = view[count:], offset + count
    return True


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while len(view):
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


class _Work:
    """What every thread needs to blend one chunk; buffers are each thread's own."""

    def __init__(self, files: Files, plans: Mapping[str, TensorPlan], how: How) -> None:
        self.how = how
        self._files = files
        self._plans = plans
        self._own = threading.local()

    def blend(self, descriptor: int, target: StoredTensor, start: int, stop: int) -> Sums | None:
        """Blend elements `start` to `stop` into the file; integers have no sums."""
        plan = self._plans[target.name]
        sums: Sums | None = None
        middle = max(start, min(stop, plan.num_blended))
        if middle > start:
            if plan.dtype in FLOATS:
                out, sums = self._sum(plan, start, middle)
            else:
                out = self._equal_integers(plan, start, middle)
            self._put(descriptor, target, start, out)
        if stop > middle:
            self._put(descriptor, target, middle, self._taken(plan, middle, stop))
        return sums

    def _sum(self, plan: TensorPlan, start: int, stop: int) -> tuple[Array, Sums | None]:
        count = stop - start
        wide = plan.wide
        base_raw: Array | None = None
        if plan.base is None:
            base = self._buffer("base wide", count, wide)
            base.fill(plan.origin)
        else:
            base_raw = self._read("base", plan.base, start, count)
            base = widen(base_raw, plan.base.dtype, wide, self._buffer("base wide", count, wide))
        side = plan.sides[0]
        tuned_raw, tuned = self._end("tuned", side, wide, start, count)
        found = {"base": base, "tuned": tuned}
        # What is wrong with an input shows in the sums below, and is named then.
        with np.errstate(invalid="ignore", over="ignore"):
            delta = np.subtract(tuned, base, out=self._buffer("delta", count, wide))
            if len(plan.sides) > 1:
                _, found["second"] = self._end("second", plan.sides[1], wide, start, count)
                values = _add_second(plan, base, delta, found["second"], start)
            else:
                values = mix(base, tuned, delta, _lambda_at(side.lam, start, stop, plan.shape))
            out = self._rounded(plan, values, start, (base, base_raw), (tuned, tuned_raw))
            landed = widen(
                out.view(np.uint8), plan.dtype, wide, self._buffer("landed", count, wide)
            )
            shift = np.subtract(landed, base, out=self._buffer("shift", count, wide))
            sums = product(shift, delta), product(delta, delta)
        if not (math.isfinite(sums[0]) and math.isfinite(sums[1])):
            self._name_fault(plan, {**found, "blend": landed})
            # All is finite: the squares alone were too large for float32.
            far, step = shift.astype(np.float64), delta.astype(np.float64)
            sums = product(far, step), product(step, step)
        return out, sums if plan.on_path else None

    def _end(
        self, use: str, side: Side, wide: type[np.floating[Any]], start: int, count: int
    ) -> tuple[Array, Array]:
        """Return elements of one side, as they are stored and in the type of the sum."""
        raw = self._read(use, side.tensor, start, count)
        return raw, widen(raw, side.tensor.dtype, wide, self._buffer(f"{use} wide", count, wide))

    def _rounded(
        self,
        plan: TensorPlan,
        values: Array,
        start: int,
        base: tuple[Array, Array | None],
        tuned: tuple[Array, Array],
    ) -> Array:
        """Return `values` in the output's type; at lambda 0 and 1 the very bytes of the input."""
        side = plan.sides[0].tensor
        if values is tuned[0] and side.dtype == plan.dtype:
            return tuned[1]
        if values is base[0] and plan.base is not None and plan.base.dtype == plan.dtype:
            assert base[1] is not None
            return base[1]
        by_dice = self.how.rounding == "stochastic" and plan.dtype in ("F16", "BF16")
        dice = dice_for(self.how.seed, plan.name, start) if by_dice else None
        return narrow(values, plan.dtype, dice)

    def _name_fault(self, plan: TensorPlan, found: Mapping[str, Array]) -> None:
        for what, values in found.items():
            kind = fault(values)
            if kind and what != "blend":
                raise ModelError(
                    f"{what} tensor {plan.name!r} holds {kind}; "
                    "this checkpoint is damaged or its tuning diverged"
                )
            if kind:
                lam = plan.sides[0].lam
                shown = f"{lam:g}" if not isinstance(lam, RowLambda) else "by row"
                raise ModelError(
                    f"blend at lambda {shown} of tensor {plan.name!r} holds {kind}: it overflows "
                    f"{plan.dtype}; take a lambda nearer 0..1, or a wider dtype"
                )

    def _equal_integers(self, plan: TensorPlan, start: int, stop: int) -> Array:
        tuned = self._read("tuned", plan.sides[0].tensor, start, stop - start)
        if plan.base is not None:
            base = self._read("base", plan.base, start, stop - start)
            if not np.array_equal(base, tuned):
                raise ModelError(
                    f"tensor {plan.name!r} ({plan.dtype}) differs between base and tuned, and "
                    "integers cannot be blended; quantised models must be dequantised first"
                )
        return tuned

    def _taken(self, plan: TensorPlan, start: int, stop: int) -> Array:
        """Return elements that only the tuned side has."""
        tensor = plan.sides[0].tensor
        raw = self._read("tuned", tensor, start, stop - start)
        if tensor.dtype not in FLOATS:
            return raw
        values = widen(raw, tensor.dtype, plan.wide, np.empty(stop - start, plan.wide))
        if fault(values):
            self._name_fault(plan, {"tuned": values})
        return raw if tensor.dtype == plan.dtype else narrow(values, plan.dtype)

    def _put(self, descriptor: int, target: StoredTensor, start: int, out: Array) -> None:
        offset = target.offset + start * ITEM_SIZE[target.dtype]
        _write_all(descriptor, out.view(np.uint8).data, offset)

    def _read(self, use: str, tensor: StoredTensor, start: int, count: int) -> Array:
        out = self._buffer(use, count * ITEM_SIZE[tensor.dtype], np.uint8)
        return self._files.read(tensor, start, out)

    def _buffer(self, use: str, count: int, kind: Any) -> Array:
        """Return this thread's memory for one use, made once and used again."""
        memory: dict[str, Array] = self._own.__dict__.setdefault("memory", {})
        held = memory.get(use)
        if held is None:
            held = memory[use] = np.empty(CHUNK * 8, np.uint8)
        return held[: count * np.dtype(kind).itemsize].view(kind)


def _add_second(plan: TensorPlan, base: Array, delta: Array, other: Array, start: int) -> Array:
    """Turn `delta` into the sum of both sides' lambda * delta, and return base plus it."""
    first, second = plan.sides
    further = np.subtract(other, base)
    stop = start + base.size
    np.multiply(delta, _lambda_at(first.lam, start, stop, plan.shape), out=delta)
    np.multiply(further, _lambda_at(second.lam, start, stop, plan.shape), out=further)
    np.add(delta, further, out=delta)
    return np.add(base, delta)


def _lambda_at(lam: Lambda, start: int, stop: int, shape: tuple[int, ...]) -> Any:
    return lam.at(start, stop, shape) if isinstance(lam, RowLambda) else lam

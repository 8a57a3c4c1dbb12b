"""Safetensors directories as streams of tensors: a lazy reader and a streaming writer.

Neither ever holds more than the tensor asked for. The reader checks every header against the size
of its file, so that a truncated or corrupted shard is named before any work is done. Knows nothing
of models: names, shapes and dtypes only.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from keepshot.errors import ModelError
from keepshot.models.reference import read_json, refuse_pickles

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format."""

INDEX = "model.safetensors.index.json"
SINGLE = ("model.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor; `num_bytes` is its size on disk."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the data in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class TensorReader:
    """Lazy reader of the weights in a directory (single file, shards with an index, adapter)."""

    def __init__(self, directory: Path) -> None:
        """Read the headers of all shards and check them.

        Raises:
            ModelError: no safetensors there, pickles only, or a broken shard (named).
        """
        self.directory = directory
        self.files: tuple[Path, ...] = _find_files(directory)
        self._file_of: dict[str, Path] = {}
        self._info: dict[str, TensorInfo] = {}
        for file in self.files:
            for info in read_header(file):
                if info.name in self._info:
                    raise ModelError(
                        f"{file}: tensor {info.name!r} is in {self._file_of[info.name].name} too"
                    )
                self._info[info.name] = info
                self._file_of[info.name] = file
        self._check_index()
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, in the order of their files and of the data within."""
        return tuple(self._info)

    @property
    def layout(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of all tensors, in the same order; `TensorWriter` takes it."""
        return tuple(self._info.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor as stored."""
        return self._find(name).dtype

    def file(self, name: str) -> Path:
        """Return the shard that holds a tensor."""
        self._find(name)
        return self._file_of[name]

    def read(self, name: str) -> Tensor:
        """Return one tensor; its memory is its own, so that it outlives the reader."""
        file = self.file(name)
        if file not in self._open:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file}: cannot be read: {error}; get it again") from None
            self._open[file] = self._stack.enter_context(handle)
        return self._open[file].get_tensor(name)

    def close(self) -> None:
        """Close all shards."""
        self._stack.close()
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self, name: str) -> TensorInfo:
        if name not in self._info:
            raise ModelError(f"{self.directory}: holds no tensor {name!r}")
        return self._info[name]

    def _check_index(self) -> None:
        index = self.directory / INDEX
        if self.directory.is_file() or not index.is_file() or self.files[0].name in SINGLE:
            return
        for name, shard in _weight_map(index).items():
            if name not in self._info or self._file_of[name].name != shard:
                raise ModelError(f"{index}: tensor {name!r} is not in {shard}; get the model again")


def read_header(file: Path) -> list[TensorInfo]:
    """Read the header of one safetensors file and check it against the size of the file.

    Raises:
        ModelError: if the file is truncated or corrupted.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header, start = _parse_header(stream, size)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, struct.error) as error:
        raise ModelError(
            f"{file}: truncated or corrupted safetensors ({error}); get it again"
        ) from None
    header.pop("__metadata__", None)
    try:
        found = [
            (entry["data_offsets"], TensorInfo(name, tuple(entry["shape"]), DTYPES[entry["dtype"]]))
            for name, entry in header.items()
        ]
    except (KeyError, TypeError) as error:
        raise ModelError(f"{file}: corrupted safetensors header ({error}); get it again") from None
    found.sort(key=lambda pair: pair[0])
    position = 0
    for (begin, end), info in found:
        if begin != position or end - begin != info.num_bytes:
            raise ModelError(f"{file}: corrupted safetensors: {info.name!r} has a wrong place")
        position = end
    if start + position != size:
        problem = "truncated" if size < start + position else "corrupted"
        raise ModelError(
            f"{file}: {problem} safetensors: {size} bytes where its header promises "
            f"{start + position}; get it again"
        )
    return [info for _, info in found]


class TensorWriter:
    """Writes tensors one by one into preallocated shards; nothing is visible until it is whole.

    Each shard is written under a temporary name and renamed when its last tensor is there; the
    index comes last, in `finish`. Used as a context manager it finishes on success; on an error
    the shards that are whole stay (`resume=True` keeps them) and the rest is removed.
    """

    def __init__(
        self,
        directory: Path,
        layout: Sequence[TensorInfo],
        *,
        shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
        resume: bool = False,
    ) -> None:
        """Plan the shards.

        Args:
            directory: Where the shards go; it exists.
            layout: All tensors that will be written, tied ones once.
            shard_bytes: A shard is closed before it would exceed this.
            metadata: String pairs for the headers; `{"format": "pt"}` is always there.
            resume: Keep whole shards of the same layout that already lie there.
        """
        assert layout, "nothing to write"
        self.directory = directory
        self._metadata = {"format": "pt", **(metadata or {})}
        self._shards = [
            _Shard(directory / name, infos, self._metadata)
            for name, infos in _plan(layout, shard_bytes)
        ]
        self._shard_of = {info.name: shard for shard in self._shards for info in shard.infos}
        assert len(self._shard_of) == len(layout), "a tensor name is in the layout twice"
        if resume:
            for shard in self._shards:
                shard.keep_if_whole()

    @property
    def pending(self) -> tuple[str, ...]:
        """Names that are still to be written, shard by shard."""
        return tuple(name for shard in self._shards for name in shard.pending)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor at its place; order is free, one shard after the other is fastest."""
        self._shard_of[name].write(name, tensor)

    def finish(self) -> tuple[Path, ...]:
        """Write the index if there are several shards; return the weight files."""
        assert not self.pending, f"tensors were never written: {self.pending[:3]}"
        files = tuple(shard.path for shard in self._shards)
        if len(files) > 1:
            content = {
                "metadata": {"total_size": sum(i.num_bytes for s in self._shards for i in s.infos)},
                "weight_map": {info.name: s.path.name for s in self._shards for info in s.infos},
            }
            temporary = self.directory / f".{INDEX}.partial"
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.directory / INDEX)
        return files

    def abandon(self) -> None:
        """Close and remove what is not whole."""
        for shard in self._shards:
            shard.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()


def without_tied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop names that share all their memory with an earlier name; a checkpoint holds them once."""
    seen: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen[key] = name
        kept[name] = tensor
    return kept


def layout_of(tensors: Mapping[str, Tensor]) -> tuple[TensorInfo, ...]:
    """Return the layout of tensors in memory."""
    return tuple(TensorInfo(n, tuple(t.shape), t.dtype) for n, t in tensors.items())


class _Shard:
    """One file of a `TensorWriter`: header first, then each tensor at its offset."""

    def __init__(self, path: Path, infos: list[TensorInfo], metadata: dict[str, str]) -> None:
        self.path = path
        self.infos = infos
        self.pending = {info.name: None for info in infos}
        self._metadata = metadata
        self._partial = path.with_name(f".{path.name}.partial")
        self._stream: BinaryIO | None = None
        self._offsets: dict[str, int] = {}

    def keep_if_whole(self) -> None:
        if self.path.is_file() and read_header(self.path) == self.infos:
            self.pending.clear()

    def write(self, name: str, tensor: Tensor) -> None:
        info = next(info for info in self.infos if info.name == name)
        assert name in self.pending, f"{name} was written already"
        assert tuple(tensor.shape) == info.shape, f"{name}: {tuple(tensor.shape)}, {info.shape}"
        assert tensor.dtype == info.dtype, f"{name}: {tensor.dtype}, planned {info.dtype}"
        stream = self._stream or self._begin()
        stream.seek(self._offsets[name])
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            stream.write(flat.view(torch.uint8).numpy().data)
        del self.pending[name]
        if not self.pending:
            self._end(stream)

    def abandon(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._partial.unlink(missing_ok=True)

    def _begin(self) -> BinaryIO:
        header: dict[str, Any] = {"__metadata__": self._metadata}
        position = 0
        for info in self.infos:
            end = position + info.num_bytes
            header[info.name] = {
                "dtype": _NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [position, end],
            }
            self._offsets[info.name] = position
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self._offsets = {name: start + offset for name, offset in self._offsets.items()}
        self._stream = self._partial.open("wb")
        self._stream.write(struct.pack("<Q", len(text)) + text)
        self._stream.truncate(start + position)
        return self._stream

    def _end(self, stream: BinaryIO) -> None:
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()
        self._stream = None
        self._partial.replace(self.path)


def _plan(layout: Sequence[TensorInfo], shard_bytes: int) -> list[tuple[str, list[TensorInfo]]]:
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for info in layout:
        if groups[-1] and size + info.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(info)
        size += info.num_bytes
    if len(groups) == 1:
        return [(SINGLE[0], groups[0])]
    count = len(groups)
    return [(f"model-{n:05d}-of-{count:05d}.safetensors", g) for n, g in enumerate(groups, start=1)]


def _find_files(directory: Path) -> tuple[Path, ...]:
    if directory.is_file() and directory.suffix == ".safetensors":
        return (directory,)
    if not directory.is_dir():
        raise ModelError(f"model {str(directory)!r} is no directory with safetensors")
    for name in SINGLE:
        if (directory / name).is_file():
            return (directory / name,)
    index = directory / INDEX
    if index.is_file():
        shards = sorted(set(_weight_map(index).values()))
        for shard in shards:
            if "/" in shard or not (directory / shard).is_file():
                raise ModelError(f"{index}: shard {shard!r} is missing; get the model again")
        return tuple(directory / shard for shard in shards)
    refuse_pickles(directory)
    raise ModelError(
        f"model {str(directory)!r} holds neither {SINGLE[0]} nor {INDEX}, so it has no weights"
    )


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index).get("weight_map")
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{index}: `weight_map` is missing or empty")
    return {str(name): str(shard) for name, shard in content.items()}


def _parse_header(stream: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > min(_MAX_HEADER, size - 8):
        raise ValueError(f"its header would have {length} bytes, the file has {size}")
    header = json.loads(stream.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, 8 + length

"""What safetensors files say of themselves: names, types, shapes and places, without reading data.

Every header is checked against the size of its file, so that a truncated or corrupted shard is
named before any work is done. Plans the shards of a checkpoint to be written, too. Knows nothing
of torch, numpy or models, so that a blend can be written without waiting for them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from keepshot.errors import ModelError
from keepshot.models.reference import read_json, refuse_pickles

ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element of every type of the format that is read here."""

INDEX = "model.safetensors.index.json"
SINGLE = ("model.safetensors", "adapter_model.safetensors")
_MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file; `dtype` is the format's own name, `offset` counts from byte 0."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the data in bytes."""
        return self.num_elements * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one directory: single file, shards with an index, or an adapter."""

    directory: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]


@dataclass(frozen=True)
class PlannedShard:
    """A file to be written: its header, and where each tensor goes."""

    name: str
    header: bytes
    tensors: Mapping[str, StoredTensor] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors.values())


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read and check the headers of all weight files in a directory.

    Raises:
        ModelError: no safetensors there, pickles only, or a broken shard (named).
    """
    files = _find_files(directory)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_header(file):
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise ModelError(f"{file}: tensor {tensor.name!r} is in {other} too")
            tensors[tensor.name] = tensor
    index = directory / INDEX
    if not directory.is_file() and index.is_file() and files[0].name not in SINGLE:
        for name, shard in _weight_map(index).items():
            if name not in tensors or tensors[name].file.name != shard:
                raise ModelError(f"{index}: tensor {name!r} is not in {shard}; get the model again")
    return Checkpoint(directory, files, tensors)


def read_header(file: Path) -> list[StoredTensor]:
    """Read the header of one safetensors file, in the order of its data.

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
            (end, StoredTensor(name, str(entry["dtype"]), tuple(entry["shape"]), file, begin))
            for name, entry in header.items()
            for begin, end in [entry["data_offsets"]]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{file}: corrupted safetensors header ({error}); get it again") from None
    for _, tensor in found:
        if tensor.dtype not in ITEM_SIZE:
            raise ModelError(
                f"{file}: tensor {tensor.name!r} is of type {tensor.dtype!r}, which is not read "
                "here; a quantised model must be dequantised first"
            )
    found.sort(key=lambda pair: (pair[1].offset, pair[0]))
    position = 0
    for end, tensor in found:
        if tensor.offset != position or end - tensor.offset != tensor.num_bytes:
            raise ModelError(f"{file}: corrupted safetensors: {tensor.name!r} has a wrong place")
        position = end
    if start + position != size:
        problem = "truncated" if size < start + position else "corrupted"
        raise ModelError(
            f"{file}: {problem} safetensors: {size} bytes where its header promises "
            f"{start + position}; get it again"
        )
    return [
        StoredTensor(tensor.name, tensor.dtype, tensor.shape, file, start + tensor.offset)
        for _, tensor in found
    ]


def plan_shards(
    layout: Iterable[tuple[str, str, tuple[int, ...]]],
    shard_bytes: int,
    folder: Path,
    *,
    single: str = SINGLE[0],
) -> list[PlannedShard]:
    """Lay tensors out in files, in the order given; a file is closed before it would grow too big.

    Args:
        layout: name, dtype and shape of every tensor.
        shard_bytes: size of the data of a file at most, unless one tensor is larger.
        folder: where the files will lie.
        single: name of the file where there is only one.
    """
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    size = 0
    for entry in layout:
        num_bytes = prod(entry[2]) * ITEM_SIZE[entry[1]]
        if groups[-1] and size + num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += num_bytes
    assert groups[0], "nothing to write"
    count = len(groups)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    return [
        _plan_file(folder / name, group)
        for name, group in zip(names if count > 1 else [single], groups, strict=True)
    ]


def index_text(shards: Sequence[PlannedShard]) -> str:
    """Return the content of the index of several shards."""
    total = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors.values())
    places = {name: shard.name for shard in shards for name in shard.tensors}
    content = {"metadata": {"total_size": total}, "weight_map": places}
    return json.dumps(content, indent=1) + "\n"


def _plan_file(file: Path, group: Sequence[tuple[str, str, tuple[int, ...]]]) -> PlannedShard:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: list[tuple[str, str, tuple[int, ...], int]] = []
    position = 0
    for name, dtype, shape in group:
        end = position + prod(shape) * ITEM_SIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        places.append((name, dtype, shape, position))
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    encoded = struct.pack("<Q", len(text)) + text
    tensors = {
        name: StoredTensor(name, dtype, shape, file, len(encoded) + begin)
        for name, dtype, shape, begin in places
    }
    return PlannedShard(file.name, encoded, tensors)


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

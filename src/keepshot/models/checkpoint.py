"""A safetensors directory as a lazy stream of torch tensors.

Never holds more than the tensor asked for. Knows nothing of models: names, shapes and dtypes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from keepshot.errors import ModelError
from keepshot.models.shards import StoredTensor, open_checkpoint

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


class TensorReader:
    """Lazy reader of the weights in a directory (single file, shards with an index, adapter)."""

    def __init__(self, directory: Path) -> None:
        """Read the headers of all shards and check them.

        Raises:
            ModelError: no safetensors there, pickles only, or a broken shard (named).
        """
        self.directory = directory
        self._checkpoint = open_checkpoint(directory)
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files."""
        return self._checkpoint.files

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, in the order of their files and of the data within."""
        return tuple(self._checkpoint.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor as stored."""
        return DTYPES[self._find(name).dtype]

    def read(self, name: str) -> Tensor:
        """Return one tensor; its memory is its own, so that it outlives the reader."""
        file = self._find(name).file
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

    def _find(self, name: str) -> StoredTensor:
        if name not in self._checkpoint.tensors:
            raise ModelError(f"{self.directory}: holds no tensor {name!r}")
        return self._checkpoint.tensors[name]


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

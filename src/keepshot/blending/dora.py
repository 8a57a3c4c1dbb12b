"""A DoRA adapter at lambda: again a DoRA adapter, exactly (see `keepshot.blending.adapter`).

Works on numpy arrays, a module at a time. Source: arXiv 2402.09353.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keepshot.blending.adapter import dora_triples
from keepshot.blending.arithmetic import Array, narrow, widen
from keepshot.blending.stream import Files
from keepshot.errors import ModelError
from keepshot.models.shards import Checkpoint, StoredTensor, plan_shards

_SMALLEST = 1e-6


def dora_at(
    weight: Array, update: Array, magnitude: Array, lam: float
) -> tuple[Array, Array] | None:
    """Return the factor on each row of B, and the new magnitude.

    Args:
        weight: out x in, float32 or wider.
        update: s B A, out x in.
        magnitude: m, one per output feature.
        lam: 0 is the base, 1 the adapter as it is.

    Returns:
        None if some row of the blend is along the update alone, which no DoRA adapter can say.
    """
    norm = np.linalg.norm(weight + update, axis=1)
    ratio = magnitude / norm
    share = 1.0 - lam + lam * ratio
    if np.abs(share).min(initial=1.0) < _SMALLEST:
        return None
    factor = lam * ratio / share
    size = np.linalg.norm(weight + factor[:, None] * update, axis=1)
    return factor, share * size


def scale_dora(
    adapter: Checkpoint, base: Checkpoint, config: Mapping[str, Any], lam: float, file: Path
) -> None:
    """Write the weights of a DoRA adapter at lambda to `file`.

    Raises:
        ModelError: if the adapter is not on linear layers alone, or lambda has no such form.
    """
    new: dict[str, Array] = {}
    with Files() as files:
        for module, (weight, a, b, m) in dora_triples(adapter, base).items():
            stored = _read(files, weight)
            down, up = _read(files, a), _read(files, b)
            rank = down.shape[0]
            root = np.sqrt(rank) if config.get("use_rslora") else rank
            update = (float(config["lora_alpha"]) / root) * (up @ down)
            if config.get("fan_in_fan_out"):
                stored = stored.T
            if stored.shape != update.shape:
                raise ModelError(
                    f"{adapter.directory}: {module!r} is of shape {update.shape}, the base's "
                    f"{stored.shape}; this adapter was trained on another base"
                )
            found = dora_at(stored, update, _read(files, m).reshape(-1), lam)
            if found is None:
                raise ModelError(
                    f"lambda {lam:g} of {module!r} is no DoRA adapter; "
                    "merge the adapter into its base and blend the two directories"
                )
            new[b.name], new[m.name] = up * found[0][:, None], found[1].reshape(m.shape)
        layout = [(t.name, t.dtype, t.shape) for t in adapter.tensors.values()]
        (shard,) = plan_shards(layout, 1 << 62, file.parent, single=file.name)
        with file.open("wb") as stream:
            stream.write(shard.header)
            for name, tensor in adapter.tensors.items():
                if name in new:
                    raw = narrow(np.ascontiguousarray(new[name]).reshape(-1), tensor.dtype)
                    stream.write(raw.tobytes())
                else:
                    stream.write(files.read(tensor, 0, np.empty(tensor.num_bytes, np.uint8)).data)


def _read(files: Files, tensor: StoredTensor) -> Array:
    """Return a whole tensor in float64."""
    raw = files.read(tensor, 0, np.empty(tensor.num_bytes, np.uint8))
    out = np.empty(tensor.num_elements, np.float64)
    return widen(raw, tensor.dtype, np.float64, out).reshape(tensor.shape)

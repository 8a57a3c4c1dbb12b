"""Lambda for PEFT adapters, exactly: an adapter at lambda is again an adapter of its kind.

- LoRA, rsLoRA: base + lambda * s B A, so lambda is a factor on B; no weight of the base is read.
- IA3: W scaled by l becomes W scaled by 1 + lambda * (l - 1).
- DoRA: W' = (m / c) (W + s B A) with c the row norms of W + s B A. At lambda every row is
  d W + (lambda m / c) s B A with d = 1 - lambda + lambda m / c, which is the DoRA adapter of
  B' = (lambda m / (c d)) B and m' = d * the row norms of W + s B' A.

What is none of these (other kinds, trained copies of whole modules, initialisations that change
the base) is refused by name. Reads saved adapters; does not load peft.
Source: huggingface/peft issue 1940; arXiv 2106.09685 (LoRA), 2312.03732 (rsLoRA), 2205.05638
(IA3), 2402.09353 (DoRA, eq. 5; its form at lambda is ours).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keepshot.blending.arithmetic import Array, widen
from keepshot.blending.companions import may_be_tied
from keepshot.blending.stream import Files, same_bytes
from keepshot.errors import ModelError
from keepshot.models.shards import Checkpoint, StoredTensor, plan_shards

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# B starts at zero (or BA at least leaves the base weights alone), so lambda 0 is the base.
_BASE_KEEPING_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

# Whatever of these is set makes the adapter more, or other, than a factor times B @ A.
_NOT_LINEAR = {
    "use_qalora": "QALoRA pools its input",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples its weights",
    "velora_config": "VeLoRA compresses activations",
    "alora_invocation_tokens": "activated LoRA applies to part of a prompt",
    "layer_replication": "layers are replicated",
    "modules_to_save": "whole modules were trained beside the adapter",
    "trainable_token_indices": "embedding rows were trained beside the adapter",
    "target_parameters": "parameters outside linear layers are adapted",
}


# How a saved adapter's tensor names end, and what lambda makes of each.
_ROLES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".base_layer.weight": "copy",
    ".ia3_l": "L",
    ".lora_magnitude_vector": "M",
}
# The value of a moving tensor at which the adapter changes nothing.
_ORIGINS = {"B": 0.0, "bias": 0.0, "L": 1.0}
# Below this a row of DoRA keeps next to nothing of its weight.
_SMALLEST_SHARE = 1e-6


def check_exact(config: Mapping[str, Any], *, where: str) -> None:
    """Check that lambda can be put into this adapter exactly.

    Args:
        config: the content of `adapter_config.json`, or `PeftConfig.to_dict()`.
        where: what error messages name as the adapter's place.

    Raises:
        ModelError: naming what is not exact.
    """
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind not in ("LORA", "IA3"):
        raise ModelError(
            f"{where}: an adapter of type {kind!r} cannot be scaled by lambda; only LoRA, rsLoRA, "
            "DoRA and IA3 can. If its kind can be merged into its base, merge it and blend the two "
            "directories"
        )
    reason = next((text for key, text in _NOT_LINEAR.items() if config.get(key)), None)
    if reason is None and config.get("bias", "none") != "none":
        reason = f"biases were trained beside the adapter (bias={config['bias']!r})"
    start = config.get("init_lora_weights", True)
    if reason is None and config.get("use_dora") and config.get("alpha_pattern"):
        reason = "DoRA with a scale per module (alpha_pattern)"
    if reason is None and start not in _BASE_KEEPING_STARTS:
        reason = f"it started from changed base weights (init_lora_weights={start!r})"
    if reason is not None:
        raise ModelError(
            f"{where}: lambda as a factor on this adapter is not exact: {reason}. "
            "Merge it into its base and blend the two directories"
        )


def check_adapts(adapter: Checkpoint, base: Checkpoint) -> dict[str, float | None]:
    """Check that every tensor of a saved adapter fits a weight of `base`.

    Returns:
        By tensor, the value at which it would change nothing (0 for B), from which lambda counts;
        None for tensors that lambda leaves as they are.

    Raises:
        ModelError: naming the tensor that does not fit.
    """
    origins: dict[str, float | None] = {}
    _check_modules(adapter, base)
    for name, tensor in adapter.tensors.items():
        module, role = _split(name)
        origins[name] = _ORIGINS.get(role or "")
        if role is None:
            raise ModelError(
                f"{adapter.directory}: tensor {name!r} is no LoRA matrix or IA3 vector, so "
                "lambda is not exact. Merge the adapter into its base and blend the two directories"
            )
        weight = _base_weight(module, base)
        assert weight is not None
        if role == "copy":
            # peft keeps a copy of an adapted embedding; one that was resized is no copy any more.
            if not same_bytes(tensor, base.tensors[weight]):
                raise ModelError(
                    f"{adapter.directory}: tensor {name!r} is not the base's {weight!r}, so lambda "
                    "as a factor is not exact. Merge the adapter into its base and blend the two"
                )
            continue
        shape = base.tensors[weight].shape
        side = tensor.shape[0 if role == "B" else -1]
        if role == "L":  # a row or a column
            side = max(tensor.shape)
        if role != "bias" and side not in shape:
            raise ModelError(
                f"{adapter.directory}: tensor {name!r} has shape {tensor.shape}, the base's "
                f"{weight!r} {shape}; this adapter was trained on another base"
            )
    return origins


def _check_modules(adapter: Checkpoint, base: Checkpoint) -> None:
    """Check that the base has a weight of every adapted module."""
    split = [_split(name) for name in adapter.tensors]
    lacking = sorted({m for m, role in split if role and _base_weight(m, base) is None})
    if not lacking:
        return
    # A tied weight is stored under one name, and there is one such pair.
    if len(lacking) == 1 and may_be_tied(base.directory):
        raise ModelError(
            f"{adapter.directory}: adapts {lacking[0]!r}, which {base.directory} does not store "
            "by itself; if it is tied to another weight, untie the base first\n"
            "(load it, give its head a clone of the embeddings, set `tie_word_embeddings` in its "
            "config to false, save it), then merge the adapter into it and blend the two"
        )
    raise ModelError(
        f"{adapter.directory}: adapts {lacking[0]!r}, which {base.directory} does not have; "
        "this adapter was trained on another base"
    )


def _split(name: str) -> tuple[str, str | None]:
    for ending, role in _ROLES.items():
        if name.endswith(ending):
            return name.removesuffix(ending).removeprefix("base_model.model."), role
    return name, None


def _base_weight(module: str, base: Checkpoint) -> str | None:
    """Find the adapted weight; a checkpoint may leave out the name of the outermost module."""
    candidates = (f"{module}.weight", f"{module.partition('.')[2]}.weight")
    return next((name for name in candidates if name in base.tensors), None)


def _dora_triples(
    adapter: Checkpoint, base: Checkpoint
) -> dict[str, tuple[StoredTensor, StoredTensor, StoredTensor, StoredTensor]]:
    """Return weight, A, B and magnitude of every module of a DoRA adapter, by module.

    Raises:
        ModelError: if a module has other tensors (embeddings, biases).
    """
    roles: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in adapter.tensors.items():
        module, role = _split(name)
        roles.setdefault(module, {})[role or name] = tensor
    found: dict[str, tuple[StoredTensor, StoredTensor, StoredTensor, StoredTensor]] = {}
    for module, parts in roles.items():
        weight = _base_weight(module, base)
        if parts.keys() != {"A", "B", "M"} or weight is None:
            raise ModelError(
                f"{adapter.directory}: {module!r} is no linear layer with DoRA, so lambda is not "
                "exact. Merge the adapter into its base and blend the two directories"
            )
        found[module] = (base.tensors[weight], parts["A"], parts["B"], parts["M"])
    return found


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
    if np.abs(share).min(initial=1.0) < _SMALLEST_SHARE:
        return None
    factor = lam * ratio / share
    size = np.linalg.norm(weight + factor[:, None] * update, axis=1)
    return factor, share * size


def scale_dora(
    adapter: Checkpoint, base: Checkpoint, config: Mapping[str, Any], lam: float, file: Path
) -> None:
    """Write the weights of a DoRA adapter at lambda to `file`: what lambda changes in float64.

    Raises:
        ModelError: if the adapter is not on linear layers alone, or lambda has no such form.
    """
    new: dict[str, Array] = {}
    with Files() as files:
        for module, (weight, a, b, m) in _dora_triples(adapter, base).items():
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
        layout = [
            (t.name, "F64" if t.name in new else t.dtype, t.shape) for t in adapter.tensors.values()
        ]
        (shard,) = plan_shards(layout, 1 << 62, file.parent, single=file.name)
        with file.open("wb") as stream:
            stream.write(shard.header)
            for name, tensor in adapter.tensors.items():
                if name in new:
                    stream.write(np.ascontiguousarray(new[name]).tobytes())
                else:
                    stream.write(files.read(tensor, 0, np.empty(tensor.num_bytes, np.uint8)).data)


def _read(files: Files, tensor: StoredTensor) -> Array:
    """Return a whole tensor in float64."""
    raw = files.read(tensor, 0, np.empty(tensor.num_bytes, np.uint8))
    out = np.empty(tensor.num_elements, np.float64)
    return widen(raw, tensor.dtype, np.float64, out).reshape(tensor.shape)

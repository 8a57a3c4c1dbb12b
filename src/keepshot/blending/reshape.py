"""Differences between two models made smaller: truncated, pruned, or freed of intruders.

Pure functions on one weight matrix at a time, and the tuned model they make, written as a model
or as a LoRA adapter with one tensor at a time in memory. Which tensors are embeddings, the head or
matrices of linear layers is read off the model's structure, not its names.
Sources: LoRE, arXiv 2405.15007 (RE-Adapt); FAPM, arXiv 2509.08255; intruder dimensions,
arXiv 2410.21228.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from keepshot.blending.blend import check_pair
from keepshot.blending.companions import compare_configs, copy_companions, may_be_tied
from keepshot.blending.planning import is_copy
from keepshot.errors import ConfigError, ModelError
from keepshot.models.checkpoint import DTYPES, TensorReader
from keepshot.models.shards import index_text, open_checkpoint, plan_shards
from keepshot.outputs import building_directory

Change = Callable[[Tensor, Tensor], Tensor]
"""From one matrix of the base and of the tuned model to a new one of the tuned model."""

_KINDS = {dtype: name for name, dtype in DTYPES.items()}
_SHARD_BYTES = 5_000_000_000
_SMALL = 1e-12


@dataclass(frozen=True)
class ChangeReport:
    """What a change of matrices left as the tuned model has it."""

    left_out: tuple[str, ...]
    """Tensors that tuning changed and that are no matrices: embeddings, head, norms, biases."""
    share: float
    """How much of the squared difference over all tensors these hold."""


@dataclass(frozen=True)
class LoreReport:
    """What a LoRE adapter holds: the rank by module, and what it leaves out."""

    ranks: Mapping[str, int]
    explained: float
    """Share of the squared difference over all tensors that the adapter reproduces."""
    left_out: tuple[str, ...]
    """Tensors that tuning changed and that belong to no linear layer: norms, embeddings, experts
    that are held together."""


def write_changed(base_dir: Path, tuned_dir: Path, change: Change, out_dir: Path) -> ChangeReport:
    """Write the tuned model with `change` applied to every matrix but embeddings and head.

    These, norms and biases are the tuned model's. Blend the result as any other.

    Raises:
        ModelError: if the two do not fit.
        OutputError: if `out_dir` holds something or cannot be written.
    """
    compare_configs(base_dir, tuned_dir)
    module = _outline(tuned_dir)
    spared = {stored for name in _token_weights(module) for stored in _spellings(module, name)}
    left_out: dict[str, float] = {}
    total = 0.0
    with (
        TensorReader(base_dir) as base,
        TensorReader(tuned_dir) as tuned,
        building_directory(out_dir) as folder,
    ):
        layout = [(n, _KINDS[tuned.dtype(n)], tuned.shape(n)) for n in tuned.names]
        shards = plan_shards(layout, _SHARD_BYTES, folder)
        for shard in shards:
            with (folder / shard.name).open("wb") as stream:
                stream.write(shard.header)
                for name in shard.tensors:
                    now = tuned.read(name)
                    before = base.read(name) if name in base.names else None
                    moved = 0.0 if before is None else _squared(before, now)
                    total += moved
                    # Experts are matrices in the file, whatever the live model makes of them.
                    if before is not None and now.ndim == 2 and name not in spared:
                        check_pair(name, before, now)
                        now = change(before, now).to(now.dtype)
                    elif moved:
                        left_out[name] = moved
                    raw = now.contiguous().reshape(-1).view(torch.uint8)
                    stream.write(raw.numpy().data)
        if len(shards) > 1:
            (folder / "model.safetensors.index.json").write_text(
                index_text(shards), encoding="utf-8"
            )
        copy_companions(base_dir, tuned_dir, folder, None)
    return ChangeReport(tuple(left_out), sum(left_out.values()) / total if total else 0.0)


def write_lore(base_dir: Path, tuned_dir: Path, share: float, out_dir: Path) -> LoreReport:
    """Write tuned - base as a LoRA adapter that explains `share` of each matrix's variance.

    The adapter's alpha is its rank, module by module, so that its scale is 1.

    Raises:
        ConfigError: if the share is out of range.
        ModelError: if the two do not fit, or no matrix differs.
        OutputError: if `out_dir` holds something or cannot be written.
    """
    compare_configs(base_dir, tuned_dir)
    module = _outline(tuned_dir)
    layers = {
        stored: (name.removesuffix(".weight"), transposed)
        for name, transposed in _linear_weights(module).items()
        for stored in _spellings(module, name)
    }
    tied, files = may_be_tied(tuned_dir), open_checkpoint(tuned_dir).tensors
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    left_out: list[str] = []
    kept = total = 0.0
    with TensorReader(base_dir) as base, TensorReader(tuned_dir) as tuned:
        for name in tuned.names:
            if name not in base.names:
                if tied and is_copy(files, name, files.keys() & set(base.names)):
                    continue
                raise ModelError(f"tensor {name!r} is in tuned and not in base")
            before, now = base.read(name), tuned.read(name)
            check_pair(name, before, now)
            if not now.is_floating_point():
                continue
            delta = now.float() - before.float()
            norm = float(delta.double().square().sum())
            total += norm
            if norm == 0.0:
                continue
            if name not in layers:
                left_out.append(name)
                continue
            # A Conv1D holds its weight as in x out; LoRA's factors are always out x in.
            layer, transposed = layers[name]
            found = truncate(delta.T if transposed else delta, share)
            ranks[layer] = found.up.shape[1]
            kept += norm * found.explained
            for role, matrix in (("A", found.down), ("B", found.up)):
                key = f"base_model.model.{layer}.lora_{role}.weight"
                tensors[key] = matrix.to(now.dtype).contiguous()
    if not ranks:
        raise ModelError(f"{tuned_dir}: no linear layer differs from {base_dir}, so no adapter")
    with building_directory(out_dir) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        by_column = any(transposed for _, transposed in layers.values())
        config = _adapter_config(base_dir, ranks, by_column)
        text = json.dumps(config, indent=2)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    return LoreReport(ranks, kept / total, tuple(left_out))


def _outline(directory: Path) -> Any:
    """Return a model of the directory's configuration, without numbers."""
    try:
        config: Any = AutoConfig.from_pretrained(directory, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{directory}: {str(error).splitlines()[0]}") from None


def _spellings(module: Any, name: str) -> tuple[str, str]:
    """Return the names that a file may have for a weight; it may leave the outermost module out."""
    return name, name.removeprefix(f"{module.base_model_prefix}.")


def _token_weights(module: Any) -> set[str]:
    """Return the weights of embeddings of tokens or places, and of the output head."""
    head = module.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Embedding) or layer is head
    }


def _squared(before: Tensor, now: Tensor) -> float:
    """Return the squared difference, over the rows that both have."""
    if not now.is_floating_point() or before.shape[1:] != now.shape[1:]:
        return 0.0
    rows = slice(min(len(before), len(now))) if now.ndim else ...
    return float((now[rows].float() - before[rows].float()).double().square().sum())


def _linear_weights(module: Any) -> dict[str, bool]:
    """Return the weights of linear layers but the output head; True where stored as in x out."""
    head = module.get_output_embeddings()
    return {
        f"{name}.weight": isinstance(layer, Conv1D)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head
    }


def _adapter_config(base_dir: Path, ranks: Mapping[str, int], transposed: bool) -> dict[str, Any]:
    rank = max(ranks.values())
    other = {module: size for module, size in ranks.items() if size != rank}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_dir),
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(ranks), "rank_pattern": other, "alpha_pattern": dict(other),
        "fan_in_fan_out": transposed, "inference_mode": True, "init_lora_weights": True,
    }  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """A matrix as `up` (out x rank) times `down` (rank x in), and how much of it that explains."""

    up: Tensor
    down: Tensor
    explained: float


def truncate(delta: Tensor, share: float) -> LowRank:
    """Return the smallest truncated SVD that explains at least `share` of the variance.

    The variance explained by rank r is the sum of the first r squared singular values over that
    of all (arXiv 2405.15007; a share of 0.5 worked best there). The root of the singular values
    goes to both factors, so that neither overflows 16 bits.

    Args:
        delta: out x in.
        share: above 0, at most 1.

    Raises:
        ConfigError: if the share is out of range.
    """
    _check_share("explained variance", share)
    left, sizes, right = torch.linalg.svd(delta.double(), full_matrices=False)
    total = sizes.square().sum()
    if total == 0:
        empty = delta.new_zeros
        return LowRank(empty(delta.shape[0], 0), empty(0, delta.shape[1]), 1.0)
    explained = sizes.square().cumsum(0) / total
    # Rounding must not cost a rank: a share of 1 is reached at the last one that is not 0.
    rank = int((explained < share - 1e-12).sum()) + 1
    root = sizes[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    return LowRank(up.to(delta.dtype), down.to(delta.dtype), float(explained[rank - 1]))


def prune(base: Tensor, tuned: Tensor, share: float) -> Tensor:
    """Return the base with only the most important changes of the tuned weights (FAPM).

    The score of a change is |dW| - mean|W| * |dW| / |W|, with W the base: large changes count,
    changes that are large beside the weight they change count against it (arXiv 2509.08255).

    Args:
        base: any shape.
        tuned: the shape of `base`.
        share: of the elements, how many keep their change; 0.1 is a sparsity of 90 %.

    Raises:
        ConfigError: if the share is out of range.
    """
    _check_share("kept share", share)
    origin, end = base.double(), tuned.double()
    change = (end - origin).abs()
    size = origin.abs()
    relative = torch.where(size > 0, change / size, torch.where(change > 0, torch.inf, 0.0))
    score = change - size.mean() * relative
    count = round(share * base.numel())
    if count == 0:
        return base.clone()
    kept = torch.zeros_like(score, dtype=torch.bool).view(-1)
    kept[score.reshape(-1).topk(count).indices] = True
    return torch.where(kept.view(base.shape), tuned, base)


def intruders(base: Tensor, tuned: Tensor, *, top: int = 10, similarity: float = 0.5) -> list[int]:
    """Return which of the tuned matrix's first singular directions resemble none of the base's.

    Args:
        base: out x in.
        tuned: the shape of `base`.
        top: how many singular vectors of the tuned matrix are looked at.
        similarity: greatest cosine to any singular vector of the base that still counts as none.
    """
    found = torch.linalg.svd(tuned.double(), full_matrices=False)[0][:, :top]
    known = torch.linalg.svd(base.double(), full_matrices=False)[0]
    closest = (known.T @ found).abs().max(dim=0).values
    return [int(place) for place in (closest < similarity).nonzero().flatten()]


def shrink_intruders(
    base: Tensor, tuned: Tensor, factor: float, *, top: int = 10, similarity: float = 0.5
) -> Tensor:
    """Return the tuned matrix with the singular values of its intruders times `factor`.

    arXiv 2410.21228: W + (factor - 1) * sum over intruders of s_i u_i v_i^T.

    Raises:
        ConfigError: if the factor is not between 0 and 1.
    """
    if not 0.0 <= factor <= 1.0:
        raise ConfigError(f"factor on intruders {factor!r}: expected a number from 0 to 1")
    places = intruders(base, tuned, top=top, similarity=similarity)
    if not places or factor == 1.0:
        return tuned.clone()
    left, sizes, right = torch.linalg.svd(tuned.double(), full_matrices=False)
    part = (left[:, places] * sizes[places]) @ right[places]
    return (tuned.double() + (factor - 1.0) * part).to(tuned.dtype)


def _check_share(what: str, share: float) -> None:
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"{what} {share!r}: expected a number above 0 and at most 1")

"""What each tensor of a model is for, by `keepshot.models.anatomy`, as plain data for the rules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from keepshot.blending.rules import Kind, Part
from keepshot.errors import ModelError
from keepshot.models.anatomy import WeightSlice, anatomy


def parts_of(module: nn.Module) -> dict[str, tuple[Part, ...]]:
    """Say of every parameter what it is for; fused projections come in parts.

    Raises:
        ModelError: if the structure is not known (see `keepshot.models.anatomy.anatomy`).
    """
    body = anatomy(module)
    found: defaultdict[str, list[Part]] = defaultdict(list)
    for number, block in enumerate(body.blocks):
        slices: dict[Kind, WeightSlice] = {
            "query": block.query, "key": block.key, "value": block.value, "output": block.output,
        }  # fmt: skip
        for kind, piece in slices.items():
            rows = _rows(piece, module.get_parameter(piece.parameter))
            found[piece.parameter].append(Part(kind, number, rows, piece.transposed))
            if piece.bias is not None:
                found[piece.bias].append(Part(kind, number, rows))
        for name in block.mlp:
            found[name].append(Part("mlp", number))
        for name in block.norms:
            found[name].append(Part("norms", number))
    for name in body.final_norm:
        found[name].append(Part("norms", None))
    found[body.embeddings].append(Part("embeddings", None))
    if not body.tied:
        found[body.head].append(Part("head", None))
    for name, _ in module.named_parameters():
        if name not in found:  # positions, norms of embeddings
            found[name].append(Part("embeddings", None))
    return {name: tuple(parts) for name, parts in found.items()}


def parts_of_directory(directory: Path) -> dict[str, tuple[Part, ...]]:
    """Say the same of a checkpoint, from a model of its configuration with random weights.

    Needs the memory of the model in bfloat16; the checkpoint's weights are not read.

    Raises:
        ModelError: if the configuration or the structure is not known.
    """
    try:
        config: Any = AutoConfig.from_pretrained(directory, local_files_only=True)
        module: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{directory}: {str(error).splitlines()[0]}") from None
    parts = parts_of(module)
    stored = stored_names(module).items()
    parts |= {name: parts[live] for name, live in stored if live in parts}
    # A tied copy may be stored too, under the name that the live module knows it by.
    state: dict[str, torch.Tensor] = module.state_dict()
    shared = {_place(state[name]): found for name, found in parts.items() if name in state}
    tied = {n: shared[_place(t)] for n, t in state.items() if _place(t) in shared}
    return tied | parts


def check_covers(parts: Mapping[str, tuple[Part, ...]], names: Iterable[str], where: Path) -> None:
    """Raise ModelError if a weight of a checkpoint has no part, so that a rule would miss it."""
    odd = [n for n in names if n not in parts and n.endswith((".weight", ".bias"))]
    if odd:
        raise ModelError(
            f"{where}: tensor {odd[0]!r} is none of the model's parameters by that name, so a rule "
            "by block or kind cannot place it; use one lambda for all"
        )


def stored_names(module: Any) -> dict[str, str]:
    """Return, by the name under which transformers stores a tensor, its name in the live module.

    Tensors that are stored otherwise than whole (fused here, apart there) are left out.
    """
    state: dict[str, torch.Tensor] = module.state_dict()
    names = {_place(t): name for name, t in reversed(state.items())}
    stored: dict[str, torch.Tensor] = revert_weight_conversion(module, state)
    found = {name: names.get(_place(t)) for name, t in stored.items()}
    return {name: name if name in state else live for name, live in found.items() if live}


def _place(tensor: torch.Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def _rows(piece: WeightSlice, weight: torch.Tensor) -> tuple[int, ...] | None:
    if piece.rows is None:
        return None
    count = weight.shape[1 if piece.transposed else 0]
    if isinstance(piece.rows, slice):
        return tuple(range(count)[piece.rows])
    return tuple(int(row) for row in piece.rows)

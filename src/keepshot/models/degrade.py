"""Harm to a model in graded doses: blocks dropped, weights pruned, rounded, or noised.

Touches the matrices inside the blocks alone, so that embeddings and output head, which in a small
model with a large vocabulary are most of it, are left as they are. Pure but for the module given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, assert_never

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from keepshot.errors import ModelError
from keepshot.models.anatomy import find_blocks, linear_layers
from keepshot.models.made import Degradation

KEPT_AT_THE_TOP = 2


def degraded(module: Any, degradation: Degradation) -> Any:
    """Return the module degraded; but for dropped blocks it is the same one, changed in place.

    Raises:
        ModelError: if there are not enough blocks to drop, or its blocks cannot be told apart.
    """
    dose = degradation.dose
    match degradation.kind:
        case "layers-dropped":
            return without_blocks(module, int(dose))
        case "pruned":
            return _each_matrix(module, lambda weight_OI: pruned(weight_OI, dose))
        case "quantised":
            return _each_matrix(module, lambda weight_OI: quantised(weight_OI, int(dose)))
        case "noised":
            generator = torch.Generator().manual_seed(degradation.seed)
            return _each_matrix(module, lambda weight_OI: noised(weight_OI, dose, generator))
        case _:
            assert_never(degradation.kind)


def pruned(weight: Tensor, share: float) -> Tensor:
    """Return a matrix whose smallest weights, by absolute value, are 0: round(share * number)."""
    count = round(share * weight.numel())
    smallest = weight.abs().flatten().argsort(stable=True)[:count]
    kept = weight.clone()
    kept.view(-1)[smallest] = 0.0
    return kept


def quantised(weight_OI: Tensor, bits: int) -> Tensor:
    """Return a matrix with each row rounded to 2^bits - 1 levels, symmetric about 0.

    The largest weight of a row stays as it is.
    """
    levels = 2 ** (bits - 1) - 1
    step_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / levels
    step_O1 = torch.where(step_O1 > 0.0, step_O1, torch.ones_like(step_O1))
    return torch.round(weight_OI / step_O1) * step_O1


def noised(weight: Tensor, dose: float, generator: torch.Generator) -> Tensor:
    """Return a matrix with noise whose standard deviation is `dose` times its root mean square."""
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    return weight + dose * weight.float().square().mean().sqrt().to(weight.dtype) * noise


def without_blocks(module: Any, count: int) -> Any:
    """Return a new module without `count` blocks: those before the last two.

    Upper blocks change the least, but for the last (arXiv 2403.17887).

    Raises:
        ModelError: if no more than the last two would be left of the blocks.
    """
    prefix, blocks = find_blocks(module)
    last = len(blocks) - KEPT_AT_THE_TOP
    if count >= last:
        raise ModelError(
            f"{type(module).__name__} has {len(blocks)} blocks, of which {count} cannot be "
            f"dropped; drop at most {max(0, last - 1)}"
        )
    kept = [n for n in range(len(blocks)) if not last - count <= n < last]
    config = _shortened(module.config, len(blocks), kept)
    short: Any = AutoModelForCausalLM.from_config(config, dtype=module.dtype)
    renamed = {f"{prefix}.{old}.": f"{prefix}.{new}." for new, old in enumerate(kept)}
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        if not name.startswith(f"{prefix}."):
            state[name] = tensor
            continue
        own = name[: name.index(".", len(prefix) + 1) + 1]
        if own in renamed:
            state[renamed[own] + name[len(own) :]] = tensor
    short.load_state_dict(state)
    short.tie_weights()
    short.generation_config = module.generation_config
    return short.eval()


def _shortened(config: Any, num_blocks: int, kept: list[int]) -> Any:
    """Return the configuration of the kept blocks: their number, and every list of one for each."""
    found = copy.deepcopy(config)
    found.num_hidden_layers = len(kept)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == num_blocks:
            setattr(found, name, [value[place] for place in kept])
    return found


def _each_matrix(module: Any, change: Callable[[Tensor], Tensor]) -> Any:
    prefix, blocks = find_blocks(module)
    with torch.no_grad():
        for number, block in enumerate(blocks):
            for layer in linear_layers(block, f"{prefix}.{number}").values():
                weight: Any = layer.weight
                # Conv1D stores what it reads by rows.
                by_output = weight.T if isinstance(layer, Conv1D) else weight
                by_output.copy_(change(by_output.contiguous()))
    return module

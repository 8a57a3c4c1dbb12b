"""LoRA, DoRA and rsLoRA layers of peft, put into a module and taken out again.

In a fused projection only the rows that are asked for may change: gradients of B (and of DoRA's
row lengths) are masked, and B starts at zero. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, assert_never

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from keepshot.errors import ConfigError, TrainingError
from keepshot.models.adapter import wrapping_quietly
from keepshot.models.anatomy import Role, WeightSlice, anatomy
from keepshot.tuning.method_specs import LoRA

PEFT_PREFIX = "base_model.model."


def adapt_(method: LoRA, module: Any) -> tuple[PeftModel, dict[str, Tensor]]:
    """Put adapters into `module`, in place, where they change nothing until trained (B = 0).

    Draws initial weights from torch's global generator.

    Returns:
        peft's wrapper, and masks for those of its parameters that train in part.

    Raises:
        ConfigError: if the module carries an adapter, or a matrix has less than the rank.
        TrainingError: if no layer is of the kind that is asked for.
        ModelError: if the module's structure is not known well enough for the targets.
    """
    if any(isinstance(part, BaseTunerLayer) for part in module.modules()):
        raise ConfigError("the model carries an adapter already; merge it first, or name its base")
    rows = _rows(method, module)
    layers = dict(module.named_modules())
    matched = list(layers.values()) if rows is None else [layers[name] for name in rows]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules="all-linear" if rows is None else sorted(rows),
        use_dora=method.name == "dora",
        use_rslora=method.name == "rslora",
        # peft would set this by itself for transposed weights, but with a warning.
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in matched),
    )
    module.requires_grad_(False)
    try:
        with wrapping_quietly():
            wrapper = get_peft_model(module, config)
    except ValueError as error:
        raise _nothing_matched(method, module) from error
    _check_rank(method, module)
    return wrapper, {} if rows is None else _masks(wrapper, rows)


def detach_(module: Any, *, merge: bool) -> None:
    """Take LoRA layers out of a module, in place.

    Args:
        module: what `prepare` was given.
        merge: add the adapters to the weights first; otherwise the untuned model is back, bit for
            bit.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                if merge:
                    child.merge()
                setattr(parent, name, child.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config


def mark_rows(rows: slice | Tensor, like: Tensor, axis: int) -> Tensor:
    """Return 1 at `rows` of one axis of `like` and 0 elsewhere, to be broadcast over the others."""
    shape = [1] * like.ndim
    shape[axis] = like.shape[axis]
    marked = torch.zeros(like.shape[axis], device=like.device, dtype=like.dtype)
    marked[rows] = 1.0
    return marked.reshape(shape)


def _rows(method: LoRA, module: Any) -> dict[str, list[slice | Tensor] | None] | None:
    """Return the layers to adapt, each with the rows that may change (None: all of them).

    None stands for all linear layers.
    """
    roles: tuple[Role | Literal["output"], ...]
    match method.targets:
        case "all-linear":
            return None
        case "query-value":
            roles = ("query", "value")
        case "value":
            roles = ("value",)
        case "attention":
            roles = ("query", "key", "value", "output")
        case _:
            assert_never(method.targets)
    found: dict[str, list[slice | Tensor] | None] = {}
    for block in anatomy(module).blocks:
        parts: dict[Role | Literal["output"], WeightSlice] = {
            "query": block.query, "key": block.key, "value": block.value, "output": block.output
        }  # fmt: skip
        for role in roles:
            rows = parts[role].rows
            if rows is None:
                found[parts[role].module] = None
            else:
                known = found.setdefault(parts[role].module, [])
                assert known is not None
                known.append(rows)
    return found


def _masks(
    wrapper: PeftModel, layers: Mapping[str, list[slice | Tensor] | None]
) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    for name, parameter in wrapper.named_parameters():
        module, _, part = name.removeprefix(PEFT_PREFIX).partition(".lora_")
        rows = layers.get(module)
        if rows is not None and part.startswith(("B.", "magnitude_vector.")):
            marked = [mark_rows(some, parameter, 0) for some in rows]
            masks[name] = torch.stack(marked).amax(dim=0)
    return masks


def _check_rank(method: LoRA, module: Any) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            sides = [side for side in (layer.in_features, layer.out_features) if side is not None]
            if sides and method.rank > min(sides):
                detach_(module, merge=False)
                raise ConfigError(
                    f"{method.name}: rank {method.rank} is above that of the matrix of {name} "
                    f"({' x '.join(str(side) for side in sides)}); give at most {min(sides)}, "
                    "or a narrower `targets`"
                )


def _nothing_matched(method: LoRA, module: Any) -> TrainingError:
    kinds = sorted({type(m).__name__ for m in module.modules() if not list(m.children())})
    looked = ", ".join(sorted({nn.Linear.__name__, Conv1D.__name__}))
    return TrainingError(
        f"method {method.name!r} finds nothing to adapt: it looked for layers of type {looked}\n"
        f"besides the output head; {type(module).__name__} has {', '.join(kinds)}"
    )

"""Which parameters of a live model train, and how the result is written.

Methods change the module in place: full and value-only through `requires_grad` and gradient masks,
LoRA by putting peft's layers into it. Knows nothing of data, losses or schedules.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from keepshot.errors import ConfigError, TrainingError
from keepshot.models.anatomy import WeightSlice, anatomy
from keepshot.models.bases import record_base
from keepshot.models.loading import LanguageModel, save
from keepshot.records import building_directory
from keepshot.tuning.recipe import Full, LoRA, ValueOnly


@dataclass(frozen=True)
class Prepared:
    """A module that is ready to train."""

    module: Any
    """What the trainer runs: the module itself, or peft's wrapper around it."""
    parameters: Mapping[str, Tensor]
    """What trains, by its name in `module`."""
    masks: Mapping[str, Tensor]
    """For parameters that train in part: 1 where they do, broadcast over the parameter."""
    export: Literal["model", "adapter"]
    """The kind, and the name, of the directory that `export` writes."""

    @property
    def num_trainable(self) -> int:
        """Number of single weights that train."""
        return sum(
            int(self.masks[name].expand_as(parameter).sum())
            if name in self.masks
            else parameter.numel()
            for name, parameter in self.parameters.items()
        )


def prepare(method: Full | LoRA | ValueOnly, module: Any, seed: int) -> Prepared:
    """Make `module` ready to train by a method, in place.

    Args:
        method: which parameters train.
        module: the causal language model; if LoRA is asked for, its layers are put into it, where
            they change nothing until trained (B = 0).
        seed: fixes the adapter's initial weights.

    Raises:
        ModelError: if the module's structure is not known well enough for the method.
        TrainingError: if nothing would be trained, or in a precision too low to train in.
    """
    match method:
        case Full():
            module.requires_grad_(True)
            prepared = _gather(module, {}, "model")
        case ValueOnly():
            prepared = _prepare_values(module)
        case LoRA():
            prepared = _prepare_lora(method, module, seed)
        case _:
            assert_never(method)
    if not prepared.parameters:
        raise TrainingError(f"method {method.name!r} finds nothing to train in this model")
    coarse = sorted({str(p.dtype) for p in prepared.parameters.values()} - {"torch.float32"})
    if coarse:
        raise TrainingError(
            f"weights in {coarse[0].removeprefix('torch.')} are too coarse for small updates; "
            "load the model with dtype float32, or train with method 'lora'"
        )
    return prepared


@contextlib.contextmanager
def training(prepared: Prepared) -> Generator[None]:
    """Hold gradients to the masks while training; afterwards nothing in the module trains."""
    hooks = [
        prepared.parameters[name].register_hook(lambda gradient, mask=mask: gradient * mask)
        for name, mask in prepared.masks.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in prepared.module.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        prepared.module.eval()


def export(prepared: Prepared, model: LanguageModel, out_dir: Path) -> Path:
    """Write what was trained to `out_dir/model` or `out_dir/adapter`, in safetensors.

    What an earlier start of the same run left there is replaced.

    Returns:
        The directory written.

    Raises:
        OutputError: if it cannot be written.
    """
    place = out_dir / prepared.export
    match prepared.export:
        case "model":
            save(model, place, overwrite=True)
        case "adapter":
            wrapper: PeftModel = prepared.module
            with building_directory(place, overwrite=True) as folder:
                wrapper.save_pretrained(str(folder), save_embedding_layers=False)
                # peft's model card says nothing that its adapter_config.json does not.
                (folder / "README.md").unlink(missing_ok=True)
                record_base(folder, model.reference, model.sha256)
        case _:
            assert_never(prepared.export)
    return place


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


@contextlib.contextmanager
def seeded(seed: int) -> Generator[None]:
    """Seed the global generators that libraries draw from, and put them back afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _gather(
    module: Any, masks: Mapping[str, Tensor], kind: Literal["model", "adapter"]
) -> Prepared:
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return Prepared(module, parameters, masks, kind)


def _prepare_values(module: Any) -> Prepared:
    values = [block.value for block in anatomy(module).blocks]
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    module.requires_grad_(False)
    masks: dict[str, Tensor] = {}
    for value in values:
        for name in filter(None, (value.parameter, value.bias)):
            parameters[name].requires_grad_(True)
            if value.rows is not None:
                masks[name] = _mask(value, parameters[name])
    return _gather(module, masks, "model")


def _mask(value: WeightSlice, parameter: Tensor) -> Tensor:
    """Mark the output features of a weight or bias that belong to the values."""
    axis = 1 if value.transposed and parameter.ndim == 2 else 0
    shape = [1] * parameter.ndim
    shape[axis] = parameter.shape[axis]
    marked = torch.zeros(parameter.shape[axis], device=parameter.device, dtype=parameter.dtype)
    marked[value.rows] = 1.0
    return marked.reshape(shape)


def _prepare_lora(method: LoRA, module: Any, seed: int) -> Prepared:
    if any(isinstance(part, BaseTunerLayer) for part in module.modules()):
        raise ConfigError("the model carries an adapter already; merge it first, or name its base")
    targets = _lora_targets(method, module)
    layers = dict(module.named_modules())
    matched = layers.values() if isinstance(targets, str) else [layers[name] for name in targets]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=targets,
        # peft would set this by itself for transposed weights, but with a warning.
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in matched),
    )
    module.requires_grad_(False)
    with seeded(seed), warnings.catch_warnings():
        # peft 0.21 asks for a property that transformers 5.23 renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        wrapper = get_peft_model(module, config)
    return _gather(wrapper, {}, "adapter")


def _lora_targets(method: LoRA, module: Any) -> str | list[str]:
    match method.targets:
        case "all-linear":
            return "all-linear"
        case "query-value":
            blocks = anatomy(module).blocks
            slices = [part for block in blocks for part in (block.query, block.value)]
            return sorted({part.module for part in slices})
        case _:
            assert_never(method.targets)

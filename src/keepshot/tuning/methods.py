"""Which parameters of a live model train, and how the result is written.

Methods change the module in place: most through `requires_grad` and gradient masks, LoRA by putting
peft's layers into it, prompts by a lookup in the embedding layer. What is frozen at the bottom of
a model gets no backward pass, because autograd stops where nothing below trains. Knows nothing of
data, losses or schedules.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from keepshot.errors import TrainingError
from keepshot.models.anatomy import Role, WeightSlice, anatomy
from keepshot.models.bases import record_base
from keepshot.models.loading import LanguageModel, save
from keepshot.models.soft_prompts import PROMPTS_DIR, attached, save_prompt
from keepshot.records import building_directory
from keepshot.tuning.adapters import adapt_, mark_rows
from keepshot.tuning.method_specs import (
    AttentionOnly,
    BiasOnly,
    BottomFrozen,
    Full,
    LoRA,
    PromptTuning,
    SingleStage,
    ValueOnly,
)

Kind = Literal["model", "adapter", "prompt"]


@dataclass(frozen=True)
class Prepared:
    """A module that is ready to train."""

    module: Any
    """What the trainer runs: the module itself, or peft's wrapper around it."""
    parameters: Mapping[str, Tensor]
    """What trains, by its name in `module`."""
    masks: Mapping[str, Tensor]
    """For parameters that train in part: 1 where they do, broadcast over the parameter."""
    export: Kind
    """What `export` writes: `model/`, `adapter/`, or a prompt as `adapter/`."""
    rates: Mapping[str, float] = field(default_factory=dict[str, float])
    """Peak learning rates of parameters that have one of their own."""
    whole: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Weights by name, where the module itself holds parts of them only (FSDP)."""

    @property
    def num_trainable(self) -> int:
        """Number of single weights that train."""
        return sum(
            int(self.masks[name].expand_as(parameter).sum())
            if name in self.masks
            else parameter.numel()
            for name, parameter in self.parameters.items()
        )


def prepare(method: SingleStage, module: Any, seed: int) -> Prepared:
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
        case LoRA():
            with seeded(seed):
                wrapper, masks = adapt_(method, module)
            prepared = _gather(wrapper, masks, "adapter")
        case ValueOnly():
            prepared = _prepare_slices(module, ("value",))
        case AttentionOnly(name="query-key-only"):
            prepared = _prepare_slices(module, ("query", "key"))
        case AttentionOnly():
            prepared = _prepare_slices(module, ("query", "key", "value", "output"))
        case BottomFrozen():
            prepared = _prepare_top(method, module)
        case BiasOnly():
            prepared = _prepare_biases(module)
        case PromptTuning():
            prepared = _prepare_prompt(module)
        case _:
            assert_never(method)
    if not prepared.parameters:
        raise _nothing_found(method, module)
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

    A soft prompt that it was trained under lies beside it, in `out_dir/prompts/`.

    What an earlier start of the same run left there is replaced.

    Returns:
        The directory written.

    Raises:
        OutputError: if it cannot be written.
    """
    prompts = attached(model.module)
    whole: dict[str, Any] = {"state_dict": dict(prepared.whole)} if prepared.whole else {}
    match prepared.export:
        case "model":
            place = out_dir / "model"
            save(model, place, overwrite=True, **whole)
        case "adapter":
            place = out_dir / "adapter"
            within = prepared.module
            wrapper: PeftModel = within.model if isinstance(within, _Prompted) else within
            with building_directory(place, overwrite=True) as folder:
                wrapper.save_pretrained(str(folder), save_embedding_layers=False, **whole)
                # peft's model card says nothing that its adapter_config.json does not.
                (folder / "README.md").unlink(missing_ok=True)
                record_base(folder, model.reference, model.sha256)
        case "prompt":
            assert prompts is not None
            place = out_dir / "adapter"
            with building_directory(place, overwrite=True) as folder:
                save_prompt(prompts, prompts.tasks[0], folder, model.reference)
                record_base(folder, model.reference, model.sha256)
            if len(prompts.tasks) == 1:
                return place
        case _:
            assert_never(prepared.export)
    if prompts is not None:
        with building_directory(out_dir / PROMPTS_DIR, overwrite=True) as folder:
            for number, task in enumerate(prompts.tasks):
                (folder / str(number)).mkdir()
                save_prompt(prompts, task, folder / str(number), None)
    return place


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


def _gather(module: Any, masks: Mapping[str, Tensor], kind: Kind) -> Prepared:
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return Prepared(module, parameters, masks, kind)


def _prepare_slices(module: Any, roles: Sequence[Role | Literal["output"]]) -> Prepared:
    """Let some of the attention's projections train, and in a fused one only their rows."""
    parts: list[WeightSlice] = [
        getattr(block, role) for block in anatomy(module).blocks for role in roles
    ]
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    module.requires_grad_(False)
    masks: dict[str, Tensor] = {}
    for part in parts:
        for name in filter(None, (part.parameter, part.bias)):
            parameter = parameters[name]
            parameter.requires_grad_(True)
            if part.rows is not None:
                axis = 1 if part.transposed and parameter.ndim == 2 else 0
                mask = mark_rows(part.rows, parameter, axis)
                masks[name] = torch.maximum(mask, masks[name]) if name in masks else mask
    return _gather(module, {name: m for name, m in masks.items() if not bool(m.all())}, "model")


def _prepare_top(method: BottomFrozen, module: Any) -> Prepared:
    """Let what lies above the lowest blocks train; a head tied to the embeddings lies below."""
    known = anatomy(module)
    num_frozen = method.num_frozen(len(known.blocks))
    above = tuple(f"{block.name}." for block in known.blocks[num_frozen:])
    after = {*known.final_norm, *(() if known.tied else _of_layer(known.head))}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(above) or name in after)
    return _gather(module, {}, "model")


def _of_layer(weight: str) -> tuple[str, str]:
    return weight, f"{weight.rpartition('.')[0]}.bias"


def _prepare_biases(module: Any) -> Prepared:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] == "bias")
    return _gather(module, {}, "model")


def _nothing_found(method: SingleStage, module: Any) -> TrainingError:
    """Say what was looked for, and what there is."""
    names = Counter(name.rpartition(".")[2] for name, _ in module.named_parameters())
    there = ", ".join(f"{count} named `{name}`" for name, count in names.most_common(6))
    looked = "parameters named `bias`" if isinstance(method, BiasOnly) else "parameters"
    return TrainingError(
        f"method {method.name!r} finds nothing to train: it looked for {looked},\n"
        f"and {type(module).__name__} has {there or 'none'}; take another method"
    )


class _Prompted(nn.Module):
    """A model with its soft prompts as one more parameter, for the optimiser to find."""

    def __init__(self, module: Any, table: nn.Parameter) -> None:
        super().__init__()
        self.model = module
        self.prompt = table
        self.config = module.config

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        # The Trainer asks what it is given, which for other methods is the model itself.
        newer = getattr(self.model, "activation_checkpointing_enable", None)
        (newer or self.model.gradient_checkpointing_enable)(*args, **kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable


def _prepare_prompt(module: Any) -> Prepared:
    prompts = attached(module)
    assert prompts is not None, "prompts are attached before they are trained"
    module.requires_grad_(False)
    prompts.table.requires_grad_(True)
    return _gather(_Prompted(module, prompts.table), {}, "prompt")


def with_prompt(prepared: Prepared, module: Any, rate: float) -> Prepared:
    """Let the module's soft prompts train beside what was prepared, at a rate of their own."""
    prompts = attached(module)
    assert prompts is not None, "prompts are attached before they are trained"
    prompts.table.requires_grad_(True)
    wrapper = _Prompted(prepared.module, prompts.table)
    renamed = {f"model.{name}": mask for name, mask in prepared.masks.items()}
    joint = _gather(wrapper, renamed, prepared.export)
    return replace(joint, rates={"prompt": rate})

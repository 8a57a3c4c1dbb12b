"""FSDP: what its configuration file says, as arguments of transformers' Trainer.

The file is one that `accelerate config` writes, or its `fsdp_config` block alone. Knows nothing of
models; torch shards them (FSDP2), through accelerate.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt

from keepshot.errors import ConfigError
from keepshot.specs import Spec, read_yaml
from keepshot.tuning.recipe import Recipe

logger = logging.getLogger(__name__)
BLOCK = "fsdp_config"
PREFIX = "fsdp_"
ALONE_IN_FILE = {
    "compute_environment", "debug", "distributed_type", "downcast_bf16", "enable_cpu_affinity",
    "machine_rank", "main_training_function", "mixed_precision", "num_machines", "num_processes",
    "rdzv_backend", "same_network", "tpu_env", "tpu_use_cluster", "tpu_use_sudo", "use_cpu",
}  # fmt: skip
"""What else accelerate writes: how processes are started, which `torchrun` says here."""
LOADING = "cpu_ram_efficient_loading"
"""Passed over: each process has loaded the model before it is divided."""


class Sharding(Spec):
    """How a model is divided among processes: accelerate's keys, without `fsdp_` in front."""

    version: Literal[2] = 2
    """FSDP2; transformers gives the first version up."""
    auto_wrap_policy: Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"] = (
        "TRANSFORMER_BASED_WRAP"
    )
    """What is gathered at a time: a block, parts of `min_num_params`, or the whole model."""
    transformer_layer_cls_to_wrap: str | None = None
    """Class of a block, several joined by commas; left out, what the model says of itself."""
    min_num_params: PositiveInt | None = None
    """For `SIZE_BASED_WRAP`."""
    reshard_after_forward: bool = True
    """Give a block's weights up again after the forward pass: less memory, more to send."""
    offload_params: bool = False
    """Keep what is sharded in the processor's memory."""
    activation_checkpointing: bool = False
    """FSDP's own, instead of the recipe's `checkpointing`."""
    state_dict_type: Literal["FULL_STATE_DICT"] = "FULL_STATE_DICT"
    """Weights are written whole."""


def read_sharding(path: Path, *, bf16: bool, checkpointing: bool) -> Sharding:
    """Read an FSDP configuration file.

    Args:
        path: the file.
        bf16: what the recipe says, which the file must not contradict.
        checkpointing: likewise.

    Raises:
        ConfigError: if it cannot be read, has unknown keys, or asks for what the recipe does not.
    """
    content = read_yaml(path)
    if BLOCK in content:
        odd = sorted(content.keys() - ALONE_IN_FILE - {BLOCK})
        if odd:
            raise ConfigError(f"{path}: key `{odd[0]}` has no effect here; take it out")
        coarse = content.get("mixed_precision", "bf16" if bf16 else "no")
        if coarse != ("bf16" if bf16 else "no"):
            raise ConfigError(
                f"{path}: mixed_precision is {coarse}, and the recipe's bf16 is {str(bf16).lower()}"
                "; make them one (bf16: true goes with mixed_precision: bf16)"
            )
        content = content[BLOCK] or {}
    plain = {str(key).removeprefix(PREFIX): value for key, value in content.items()}
    plain.pop(LOADING, None)
    sharding = Sharding.from_mapping(plain, source=str(path))
    if sharding.activation_checkpointing and checkpointing:
        raise ConfigError(
            f"{path}: activation_checkpointing beside the recipe's checkpointing computes "
            "activations twice; leave one out"
        )
    return sharding


def trainer_arguments(sharding: Sharding) -> dict[str, Any]:
    """Return `fsdp` and `fsdp_config` for transformers' TrainingArguments."""
    config = sharding.model_dump(exclude_none=True, exclude={"offload_params"})
    if sharding.transformer_layer_cls_to_wrap is not None:
        names = sharding.transformer_layer_cls_to_wrap.split(",")
        config["transformer_layer_cls_to_wrap"] = [name.strip() for name in names]
    return {"fsdp": True, "fsdp_config": {**config, "cpu_offload": sharding.offload_params}}


def sharded(recipe: Recipe, *, on_cpu: bool, processes: int) -> dict[str, Any]:
    """Return what a recipe's `fsdp` file asks of the Trainer; nothing if there is none.

    Raises:
        ConfigError: if the file cannot be used, or there is one process.
    """
    if recipe.fsdp is None:
        return {}
    checkpointing = recipe.checkpointing
    sharding = read_sharding(Path(recipe.fsdp), bf16=recipe.bf16, checkpointing=checkpointing)
    if processes == 1:
        raise ConfigError(
            f"fsdp {recipe.fsdp!r} divides a model among processes, and there is one; start with "
            "`torchrun --nproc_per_node N -m keepshot tune ...`, or leave fsdp out"
        )
    if on_cpu and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return {}
    if on_cpu:
        logger.warning(
            "fsdp: nothing is divided on the CPU: each of the %d processes holds the whole model, "
            "and only batches are shared (plain data parallelism)",
            processes,
        )
        return {}
    return trainer_arguments(sharding)

"""FSDP's configuration file: read whole, handed on to transformers, refused where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainingArguments

from keepshot.errors import ConfigError
from keepshot.models.loading import LanguageModel, save
from keepshot.prompts import Example
from keepshot.tuning.method_specs import AnyMethod, Full, LoRA
from keepshot.tuning.methods import export, prepare
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.sharding import read_sharding, sharded, trainer_arguments
from keepshot.tuning.train import train

SHIPPED = Path(__file__).parents[2] / "recipes" / "launch" / "fsdp.yaml"
ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: bf16
num_processes: 8
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_reshard_after_forward: false
  fsdp_offload_params: true
  fsdp_cpu_ram_efficient_loading: true
"""


def recipe(**settings: Any) -> Recipe:
    return Recipe(**{"data": "x", "steps": 1, "fsdp": str(SHIPPED), **settings})


def plugin(arguments: dict[str, Any], place: Path) -> dict[str, Any]:
    """What transformers makes of it for accelerate."""
    made: Any = TrainingArguments(
        output_dir=str(place), use_cpu=True, report_to=[], **arguments
    )  # fmt: skip
    assert made.fsdp is True
    return made.fsdp_plugin_args


def test_the_shipped_file_reaches_transformers(tmp_path: Path):
    made = plugin(sharded(recipe(), on_cpu=False, processes=8), tmp_path)
    assert made["fsdp_version"] == 2
    assert made["reshard_after_forward"] is True
    assert made["auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert made["state_dict_type"] == "FULL_STATE_DICT"
    assert "cpu_offload" not in made


def test_a_file_of_accelerates_is_read(tmp_path: Path):
    file = tmp_path / "accelerate.yaml"
    file.write_text(ACCELERATE, encoding="utf-8")
    made = plugin(trainer_arguments(read_sharding(file, bf16=True, checkpointing=False)), tmp_path)
    assert made["cpu_offload"] is True
    assert made["reshard_after_forward"] is False
    assert made["transformer_cls_names_to_wrap"] == "LlamaDecoderLayer"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ACCELERATE.replace("bf16", "fp16"), "mixed_precision is fp16, and the recipe's bf16 is t"),
        (ACCELERATE + "deepspeed_config: {}\n", "key `deepspeed_config` has no effect here"),
        ("fsdp_version: 1\n", r"`version` = 1: Input should be 2"),
        ("fsdp_reshard_after_foward: true\n", "nearest is 'reshard_after_forward'"),
        ("fsdp_activation_checkpointing: true\n", "computes activations twice"),
    ],
)
def test_what_cannot_be_heeded_is_refused(text: str, message: str, tmp_path: Path):
    file = tmp_path / "fsdp.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_sharding(file, bf16=True, checkpointing=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto": {}}, "fsdp does not go with auto"),
        ({"keep": [{"name": "ewc"}]}, "fsdp does not go with term ewc"),
        ({"method": {"name": "value-only"}}, "fsdp does not go with method 'value-only'"),
        ({"method": {"name": "lora", "targets": "value"}}, "'lora' with these targets"),
        ({"method": {"name": "promot"}}, "fsdp does not go with method 'promot'"),
    ],
)
def test_what_reads_single_weights_does_not_go_with_it(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Recipe.from_mapping({"data": "x", "fsdp": "f.yaml", **settings}, source="test")


def test_one_process_has_nobody_to_share_with(fresh_pico: Callable[..., LanguageModel]):
    rows = [Example(word, "A") for word in ("one", "two", "three")]
    with pytest.raises(ConfigError, match="there is one; start with `torchrun"):
        train(recipe(batch_size=2), fresh_pico("llama"), rows, None)


@pytest.mark.parametrize("method", [Full(), LoRA(rank=2)], ids=lambda method: method.name)
def test_gathered_weights_are_written_instead_of_the_modules_own(
    method: AnyMethod, fresh_pico: Callable[..., LanguageModel], tmp_path: Path
):
    model = fresh_pico("llama")
    save(model, tmp_path / "base")
    prepared = prepare(method, model.module, 0)  # type: ignore[arg-type]
    whole = {name: value.clone() for name, value in prepared.module.state_dict().items()}
    for name in prepared.parameters:
        whole[name] = torch.full_like(whole[name], 0.25)
    # What is in the module is of no account then.
    written = export(type(prepared)(**{**vars(prepared), "whole": whole}), model, tmp_path)
    where = written if method.name == "full" else tmp_path / "base"
    loaded: Any = AutoModelForCausalLM.from_pretrained(where)
    if method.name == "lora":
        loaded = PeftModel.from_pretrained(loaded, str(written))
    found = [p for n, p in loaded.named_parameters() if method.name == "full" or "lora_" in n]
    assert len(found) == len(prepared.parameters)
    assert all(bool((parameter == 0.25).all()) for parameter in found)

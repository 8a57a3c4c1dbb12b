"""Each method trains exactly what it says, bit for bit, on every pico family."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PretrainedConfig

from cases import FAMILIES
from keepshot.errors import ConfigError, ModelError, TrainingError
from keepshot.models.anatomy import anatomy
from keepshot.models.bases import check_base
from keepshot.models.checkpoint import TensorReader
from keepshot.models.loading import LanguageModel
from keepshot.prompts import Example
from keepshot.tuning.adapters import detach_
from keepshot.tuning.method_specs import BiasOnly, BottomFrozen, Full, LoRA, ValueOnly
from keepshot.tuning.methods import export, prepare, seeded
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.train import train

EXAMPLES = [Example(word, word[0].upper()) for word in ("apple", "berry", "cherry", "date")]
IDS = torch.arange(3, 40).reshape(1, -1)
Build = Callable[..., LanguageModel]


def copied(model: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


def logits(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        return model.module(input_ids=IDS).logits


def tune(model: LanguageModel, method: Full | LoRA | ValueOnly, **settings: float) -> None:
    recipe = Recipe(data="x", method=method, steps=3, batch_size=4, learning_rate=1e-2, **settings)
    train(recipe, model, EXAMPLES, None)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_value_only_changes_values_and_nothing_else(
    family: str, weight_decay: float, fresh_pico: Build
):
    model = fresh_pico(family)
    values = [block.value for block in anatomy(model.module).blocks]
    before = copied(model)
    tune(model, ValueOnly(), weight_decay=weight_decay)
    after = copied(model)
    expected: dict[str, Tensor] = {}
    for value in values:
        for name in filter(None, (value.parameter, value.bias)):
            changes = torch.zeros_like(before[name], dtype=torch.bool)
            transposed = value.transposed and changes.ndim == 2
            by_output = changes.T if transposed else changes
            by_output[slice(None) if value.rows is None else value.rows] = True
            expected[name] = changes
    for name, weight in before.items():
        changed = after[name] != weight
        allowed = expected.get(name, torch.zeros_like(changed))
        assert not (changed & ~allowed).any(), name
        # Some values get no gradient in three steps over a few letters.
        assert changed.sum() >= 0.9 * allowed.sum(), name


def test_weight_decay_is_of_matrices_alone_in_a_fused_layer_too(fresh_pico: Build):
    """Of a fused qkv layer the biases shrank as well."""
    model = fresh_pico("gpt2")
    value = anatomy(model.module).blocks[0].value
    assert value.bias is not None
    with torch.no_grad():
        model.module.get_parameter(value.bias).fill_(1.0)
    before = copied(model)
    recipe = Recipe(
        data="x", method=ValueOnly(), steps=2, batch_size=4, learning_rate=1e-6, weight_decay=1e4,
        scheduler="constant", warmup=0.0,
    )  # fmt: skip
    train(recipe, model, EXAMPLES, None)
    after = copied(model)
    assert torch.allclose(after[value.bias], before[value.bias], atol=1e-4)
    shrunk = after[value.parameter][:, value.rows] / before[value.parameter][:, value.rows]
    assert shrunk.median().item() == pytest.approx(0.98, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_value_only_counts_its_parameters(family: str, fresh_pico: Build):
    module = fresh_pico(family).module
    values = [block.value for block in anatomy(module).blocks]
    weights = dict(module.named_parameters())
    expected = sum(value.of(weights[value.parameter]).numel() for value in values)
    expected += sum(value.of(weights[value.parameter]).shape[0] for value in values if value.bias)
    assert prepare(ValueOnly(), module, 0).num_trainable == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_full_trains_everything(family: str, fresh_pico: Build):
    model = fresh_pico(family)
    before = copied(model)
    prepared = prepare(Full(), model.module, 0)
    assert set(prepared.parameters) == set(before)
    assert prepared.num_trainable == model.num_parameters
    tune(model, Full())
    assert all((after != before[name]).any() for name, after in copied(model).items())


@pytest.mark.parametrize("targets", ["all-linear", "query-value"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_the_identity_until_trained_and_comes_off_bit_for_bit(
    family: str, targets: str, fresh_pico: Build
):
    model = fresh_pico(family)
    before, untuned = copied(model), logits(model)
    method = LoRA.model_validate({"rank": 2, "targets": targets})
    prepared = prepare(method, model.module, 0)
    assert torch.equal(logits(model), untuned)
    assert all("lora_" in name for name in prepared.parameters)
    detach_(model.module, merge=False)
    assert list(before) == list(copied(model))
    tune(model, method)
    tuned = logits(model)
    assert not torch.allclose(tuned, untuned, atol=1e-3)
    detach_(model.module, merge=False)
    assert torch.equal(logits(model), untuned)
    assert all(torch.equal(weight, before[name]) for name, weight in copied(model).items())


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_lora_is_the_tuned_model(family: str, fresh_pico: Build):
    model = fresh_pico(family)
    names = list(copied(model))
    tune(model, LoRA(rank=2))
    tuned = logits(model)
    detach_(model.module, merge=True)
    assert list(copied(model)) == names
    assert torch.allclose(logits(model), tuned, atol=1e-4)


def test_lora_targets_are_what_was_asked_for(fresh_pico: Build):
    def adapted(targets: str, family: str = "llama") -> set[str]:
        method = LoRA.model_validate({"rank": 2, "targets": targets})
        prepared = prepare(method, fresh_pico(family).module, 0)
        return {name.split(".lora_")[0].rpartition(".")[2] for name in prepared.parameters}

    assert adapted("query-value") == {"q_proj", "v_proj"}
    assert adapted("attention") == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert adapted("attention", "gpt_neox") == {"query_key_value", "dense"}
    assert adapted("all-linear") == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


def test_lora_counts_its_parameters_and_is_seeded(fresh_pico: Build):
    first = prepare(LoRA(rank=4, targets="query-value"), fresh_pico("llama").module, 5)
    # q is 32 x 32 and v 32 -> 16, in each of three blocks.
    assert first.num_trainable == 3 * 4 * ((32 + 32) + (32 + 16))
    torch.rand(3)
    again = prepare(LoRA(rank=4, targets="query-value"), fresh_pico("llama").module, 5)
    other = prepare(LoRA(rank=4, targets="query-value"), fresh_pico("llama").module, 6)
    same = [torch.equal(p, again.parameters[name]) for name, p in first.parameters.items()]
    assert all(same)
    assert not all(torch.equal(p, other.parameters[n]) for n, p in first.parameters.items())


def test_an_adapter_is_saved_for_its_own_base_only(fresh_pico: Build, tmp_path: Path):
    model = fresh_pico("llama")
    prepared = prepare(LoRA(rank=2), model.module, 0)
    place = export(prepared, model, tmp_path)
    assert place == tmp_path / "adapter"
    assert not [path for path in place.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    with TensorReader(place) as reader:
        assert len(reader.names) == len(prepared.parameters)
    check_base(place, model.sha256, model.reference)
    with pytest.raises(ModelError, match="was trained on 'pico-llama'"):
        check_base(place, "1" * 64, "other")


def test_a_full_model_is_saved_whole(fresh_pico: Build, tmp_path: Path):
    model = fresh_pico("qwen2")
    place = export(prepare(Full(), model.module, 0), model, tmp_path)
    assert place == tmp_path / "model"
    weights = copied(model)
    with TensorReader(place) as reader:
        assert set(reader.names) == set(weights)
        assert all(torch.equal(reader.read(name), weights[name]) for name in reader.names)
    assert (place / "tokenizer.json").exists()


def test_a_second_adapter_is_refused(fresh_pico: Build):
    module = fresh_pico("llama").module
    prepare(LoRA(rank=2), module, 0)
    with pytest.raises(ConfigError, match="carries an adapter already"):
        prepare(LoRA(rank=2), module, 0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_no_bias_to_train_says_what_there_is(family: str, fresh_pico: Build):
    with pytest.raises(TrainingError) as error:
        prepare(BiasOnly(), fresh_pico(family).module, 0)
    lines = str(error.value).splitlines()
    assert lines[0] == (
        "method 'bias-only' finds nothing to train: it looked for parameters named `bias`,"
    )
    assert re.fullmatch(r"and \w+ForCausalLM has \d+ named `weight`; take another method", lines[1])


def test_no_linear_layer_to_adapt_says_what_there_is():
    class Bare(torch.nn.Module):
        config = PretrainedConfig()

        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(4)

        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(TrainingError) as error:
        prepare(LoRA(rank=2), Bare(), 0)
    assert "looked for layers of type Conv1D, Linear" in str(error.value)
    assert "Bare has LayerNorm" in str(error.value)


@pytest.mark.parametrize("name", ["lora", "dora", "rslora"])
def test_a_rank_above_the_matrix_is_refused_and_leaves_no_layers(name: str, fresh_pico: Build):
    model = fresh_pico("llama")
    names, untuned = list(copied(model)), logits(model)
    message = rf"{name}: rank 33 is above that of the matrix of model.layers.0.*; give at most 32"
    with pytest.raises(ConfigError, match=message):
        prepare(LoRA.model_validate({"name": name, "rank": 33}), model.module, 0)
    assert list(copied(model)) == names
    assert torch.equal(logits(model), untuned)
    # The value matrix, 32 -> 16, has rank 16.
    method = LoRA.model_validate({"name": name, "rank": 16, "targets": "value"})
    assert prepare(method, model.module, 0).num_trainable >= 3 * 16 * (32 + 16)


def test_the_scale_is_that_of_the_paper(fresh_pico: Build):
    for name, scale in (("lora", 2.0), ("dora", 2.0), ("rslora", 4.0)):
        method = LoRA.model_validate({"name": name, "rank": 4})
        module = fresh_pico("llama").module
        prepare(method, module, 0)
        layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
        assert {layer.scaling["default"] for layer in layers} == {scale}
        assert method.scale == scale


def test_bottom_frozen_counts_blocks_or_takes_a_share(fresh_pico: Build):
    assert BottomFrozen().num_frozen(30) == 15
    assert BottomFrozen(share=0.9).num_frozen(4) == 3
    assert BottomFrozen(share=0.1).num_frozen(3) == 1
    assert BottomFrozen(blocks=2).num_frozen(3) == 2
    with pytest.raises(ConfigError, match="3 blocks are to be frozen and the model has 3"):
        prepare(BottomFrozen(blocks=3), fresh_pico("llama").module, 0)
    with pytest.raises(ValueError, match="`blocks` and `share` say the same thing"):
        BottomFrozen(blocks=1, share=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_blocks_take_no_part_in_the_backward_pass(family: str, fresh_pico: Build):
    model = fresh_pico(family)
    known = anatomy(model.module)
    prepare(BottomFrozen(blocks=1), model.module, 0)
    tracked: dict[str, bool] = {}
    for block in known.blocks:
        layer = model.module.get_submodule(block.name)
        layer.register_forward_hook(
            lambda _, args, out, name=block.name: tracked.update(
                {name: (out[0] if isinstance(out, tuple) else out).requires_grad}
            )
        )
    model.module(input_ids=IDS)
    assert list(tracked.values()) == [False] + [True] * (len(known.blocks) - 1)


def test_half_precision_weights_are_too_coarse_to_train(fresh_pico: Build):
    module = fresh_pico("llama").module.to(torch.bfloat16)
    with pytest.raises(TrainingError, match="bfloat16 are too coarse"):
        prepare(Full(), module, 0)
    # Adapters are kept in float32 beside such weights.
    assert prepare(LoRA(rank=2), module, 0).num_trainable > 0


def test_seeding_leaves_the_callers_randomness_alone():
    torch.manual_seed(1)
    expected = torch.rand(2), torch.rand(2)
    torch.manual_seed(1)
    first = torch.rand(2)
    with seeded(7):
        torch.rand(5)
    assert torch.equal(first, expected[0])
    assert torch.equal(torch.rand(2), expected[1])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
@pytest.mark.parametrize("method", [Full(), LoRA(rank=2)], ids=lambda method: method.name)
def test_what_is_written_follows_the_umask(
    method: Full | LoRA, umask: int, mode: int, fresh_pico: Build, tmp_path: Path
):
    """The weights used to be 0600, as safetensors creates them, beside files of 0644."""
    model = fresh_pico("llama")
    before = os.umask(umask)
    try:
        place = export(prepare(method, model.module, 0), model, tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in place.iterdir()} == {mode}
    assert stat.S_IMODE(place.stat().st_mode) == mode | (mode & 0o444) >> 2

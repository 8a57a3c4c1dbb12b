"""Roles of weights, against the layouts that the families' own code documents."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

from keepshot.errors import ModelError
from keepshot.models.anatomy import WeightSlice, anatomy

HIDDEN, HEADS, HEAD = 32, 4, 8
COMMON = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, **COMMON}


def rows(*spans: tuple[int, int]) -> list[int]:
    return [n for first, last in spans for n in range(first, last)]


def per_head(position: int, order: int = 3) -> list[int]:
    """Rows of one part where each head holds its own `order` parts one after the other."""
    starts = [(head * order + position) * HEAD for head in range(HEADS)]
    return rows(*[(start, start + HEAD) for start in starts])


FAMILIES: dict[str, tuple[PretrainedConfig, tuple[list[int], list[int], list[int]]]] = {
    "gpt2": (
        GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=HEADS, **COMMON),
        (rows((0, 32)), rows((32, 64)), rows((64, 96))),
    ),
    "gpt_neox": (
        GPTNeoXConfig(intermediate_size=64, **SIZES),
        (per_head(0), per_head(1), per_head(2)),
    ),
    "bloom": (
        BloomConfig(hidden_size=HIDDEN, n_layer=2, n_head=HEADS, **COMMON),
        (per_head(0), per_head(1), per_head(2)),
    ),
    "falcon-multi-query": (
        FalconConfig(multi_query=True, alibi=False, **SIZES),
        (rows((0, 32)), rows((32, 40)), rows((40, 48))),
    ),
    "falcon-per-head": (
        FalconConfig(multi_query=False, alibi=True, **SIZES),
        (per_head(0), per_head(1), per_head(2)),
    ),
    "falcon-grouped": (
        FalconConfig(new_decoder_architecture=True, num_kv_heads=2, alibi=False, **SIZES),
        (rows((0, 16), (32, 48)), rows((16, 24), (48, 56)), rows((24, 32), (56, 64))),
    ),
    "mpt": (
        MptConfig(d_model=HIDDEN, n_heads=HEADS, n_layers=2, vocab_size=50),
        (rows((0, 32)), rows((32, 64)), rows((64, 96))),
    ),
    "phi3": (
        Phi3Config(intermediate_size=48, num_key_value_heads=2, **SIZES),
        (rows((0, 32)), rows((32, 48)), rows((48, 64))),
    ),
    # The order of its fused rows is query, value, key in four groups.
    "codegen": (
        CodeGenConfig(n_embd=HIDDEN, n_layer=2, n_head=HEADS, rotary_dim=4, **COMMON),
        (per_head(0), per_head(2), per_head(1)),
    ),
}


def indices(part: WeightSlice, module: torch.nn.Module) -> list[int]:
    weight = dict(module.named_parameters())[part.parameter]
    number = torch.arange(weight.shape[1 if part.transposed else 0])
    return (number if part.rows is None else number[part.rows]).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_projections(family: str, dtype: torch.dtype):
    config, expected = FAMILIES[family]
    module = AutoModelForCausalLM.from_config(config).to(dtype)
    for block in anatomy(module).blocks:
        parts = (block.query, block.key, block.value)
        assert tuple(indices(part, module) for part in parts) == expected
        assert len({part.parameter for part in parts}) == 1
        assert block.output.parameter != block.query.parameter


def test_separate_projections(pico_models):
    for family in ("llama", "qwen2", "gemma3"):
        module = pico_models[family].module
        found = anatomy(module)
        assert len(found.blocks) == module.config.num_hidden_layers
        for number, block in enumerate(found.blocks):
            prefix = f"model.layers.{number}.self_attn"
            for part, name in zip((block.query, block.key, block.value), "qkv", strict=True):
                assert part.parameter == f"{prefix}.{name}_proj.weight"
                assert part.rows is None
                assert part.bias == (f"{prefix}.{name}_proj.bias" if family == "qwen2" else None)
            assert block.output.parameter == f"{prefix}.o_proj.weight"


def test_every_parameter_has_one_place(pico_models):
    for family, model in pico_models.items():
        found = anatomy(model.module)
        listed = [found.embeddings, *found.final_norm, *([] if found.tied else [found.head])]
        for block in found.blocks:
            parts = (block.query, block.key, block.value, block.output)
            attention = {name for part in parts for name in (part.parameter, part.bias) if name}
            listed += [*attention, *block.mlp, *block.norms]
        assert len(listed) == len(set(listed)), family
        missing = {name for name, _ in model.module.named_parameters()} - set(listed)
        assert missing <= {"transformer.wpe.weight"}, family  # learned positions have no role


def test_values_are_all_that_attention_passes_on():
    """With its value rows at zero, attention gives zero, whatever queries and keys are."""
    for config, _ in FAMILIES.values():
        module = AutoModelForCausalLM.from_config(config)
        block = anatomy(module).blocks[0]
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            weight = parameters[block.value.parameter]
            by_output = weight.T if block.value.transposed else weight
            by_output[slice(None) if block.value.rows is None else block.value.rows] = 0.0
            if block.value.bias:
                parameters[block.value.bias][block.value.rows] = 0.0
        seen: list[torch.Tensor] = []
        module.get_submodule(block.output.module).register_forward_hook(
            lambda _, args, out, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            module(input_ids=torch.tensor([[3, 4, 5, 6]]))
        assert seen[0].abs().max() == 0.0


def test_slices_select_as_out_by_in():
    module = AutoModelForCausalLM.from_config(FAMILIES["gpt2"][0])
    value = anatomy(module).blocks[1].value
    weight = dict(module.named_parameters())[value.parameter]
    assert value.transposed
    assert torch.equal(value.of(weight), weight[:, 64:96].T)


def test_the_module_is_left_as_it_was(fresh_pico):
    module = fresh_pico("llama").module.train()
    before = {name: p.clone() for name, p in module.named_parameters()}
    anatomy(module)
    assert module.training
    assert all(m.training for m in module.modules())
    assert not any(m._forward_hooks for m in module.modules())
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad


def test_saturated_attention_is_understood():
    """Weights so large that every softmax is one-hot once hid queries whose gradient was 0."""
    config = Qwen2Config(intermediate_size=48, num_key_value_heads=2, **SIZES)
    module = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(200.0)
    assert len(anatomy(module.to(torch.bfloat16)).blocks) == 2


def test_tied_heads():
    tied = AutoModelForCausalLM.from_config(OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **SIZES))
    found = anatomy(tied)
    assert (found.tied, found.head) == (True, "model.decoder.embed_tokens.weight")
    free = AutoModelForCausalLM.from_config(LlamaConfig(intermediate_size=48, **SIZES))
    assert anatomy(free).head == "lm_head.weight"


def test_the_unknown_is_refused():
    module = AutoModelForCausalLM.from_config(
        MambaConfig(hidden_size=HIDDEN, num_hidden_layers=2, vocab_size=50)
    )
    with pytest.raises(ModelError, match="MambaForCausalLM is not known"):
        anatomy(module)
    with pytest.raises(ModelError, match="no list of blocks"):
        anatomy(torch.nn.Linear(2, 2))

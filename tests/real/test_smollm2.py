"""The embedded models themselves: conversion, tokenizer and speed of loading."""

from __future__ import annotations

import time

import gguf
import numpy as np
import pytest
import torch

from keepshot.assets import AssetStore
from keepshot.models.anatomy import anatomy
from keepshot.models.checkpoint import TensorReader
from keepshot.models.loading import LanguageModel, fetch_model, load
from keepshot.models.reference import EMBEDDED, list_models

SMOLLM2 = "smollm2-135m-instruct"
GEMMA = "gemma-3-270m"
TEXT = "Q: cat 12\n\nA:  3  le \u00e9t\u00e9\n"

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smollm2(store: AssetStore) -> LanguageModel:
    return load(SMOLLM2, store)


@pytest.fixture(scope="module")
def gemma(store: AssetStore) -> LanguageModel:
    return load(GEMMA, store)


def next_tokens(model: LanguageModel, prompt: str, count: int = 3) -> list[str]:
    with torch.no_grad():
        logits = model.module(torch.tensor([model.encode(prompt)])).logits[0, -1]
    return [model.decode([token]) for token in logits.topk(count).indices.tolist()]


def test_it_is_what_it_says(smollm2, store):
    embedded = EMBEDDED[SMOLLM2]
    assert smollm2.num_parameters == embedded.num_parameters
    assert smollm2.context_length == 8192
    assert (SMOLLM2, str(smollm2.path)) in {(r["name"], r["path"]) for r in list_models(store)}
    assert not hasattr(smollm2.module.config, "quantization_config")
    assert smollm2.module.name_or_path == SMOLLM2


def test_weights_are_those_of_the_gguf(smollm2, store):
    """Embeddings and one value matrix, against gguf's own de-quantisation."""
    path = store.fetch(EMBEDDED[SMOLLM2].asset) / EMBEDDED[SMOLLM2].member
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.7.self_attn.v_proj.weight": "blk.7.attn_v.weight",
        "model.layers.29.mlp.down_proj.weight": "blk.29.ffn_down.weight",
    }
    with TensorReader(smollm2.path) as reader:
        for ours, theirs in names.items():
            tensor = tensors[theirs]
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(reader.read(ours).numpy(), expected)


def test_tokenizer(smollm2):
    assert smollm2.bos_ids == ()
    assert smollm2.decode(smollm2.encode(TEXT)) == TEXT
    assert smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert smollm2.eos_ids == {2}
    # Digits are split off first, so that two spaces before one are a single token.
    pieces = [smollm2.decode([token]) for token in smollm2.encode("a  12")]
    assert pieces == ["a", "  ", "1", "2"]
    assert [smollm2.ends_answer(token) for token in smollm2.encode("\n a\n\n<|im_end|>")] == [
        *(True, False, True, True)
    ]


def test_chat_template(smollm2):
    text = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_few_shots_are_followed(smollm2):
    prompt = "Q: Chile\nA: Santiago\n\nQ: Japan\nA: Tokyo\n\nQ: Italy\nA: Rome\n\nQ: France\nA:"
    assert next_tokens(smollm2, prompt, 1) == [" Paris"]


def test_anatomy(smollm2):
    found = anatomy(smollm2.module)
    assert len(found.blocks) == 30
    assert found.tied
    value = dict(smollm2.module.named_parameters())[found.blocks[0].value.parameter]
    assert value.shape == (192, 576)


def test_a_converted_model_loads_quickly(store):
    fetch_model(SMOLLM2, store)
    started = time.process_time()
    load(SMOLLM2, store)
    assert time.process_time() - started < 3.0


@pytest.mark.slow
def test_gemma(gemma, store):
    assert gemma.num_parameters == EMBEDDED[GEMMA].num_parameters
    assert gemma.bos_ids == (2,)
    assert gemma.encode("Hello")[0] == 2
    assert gemma.decode(gemma.encode(TEXT)) == TEXT
    assert gemma.eos_ids == {1}
    assert [gemma.decode([t]) for t in gemma.encode("a\n\nb")[1:]] == ["a", "\n\n", "b"]
    assert gemma.ends_answer(gemma.encode("a\n\n")[-1])
    prompt = "Q: Chile\nA: Santiago\n\nQ: Japan\nA: Tokyo\n\nQ: Italy\nA: Rome\n\nQ: France\nA:"
    assert next_tokens(gemma, prompt, 1) == [" Paris"]
    assert len(anatomy(gemma.module).blocks) == 18
    started = time.process_time()
    load(GEMMA, store)
    assert time.process_time() - started < 3.0

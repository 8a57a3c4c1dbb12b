"""Tiny random models of several families with a character tokenizer, built in a moment."""

from __future__ import annotations

import copy
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from keepshot.models.loading import LanguageModel

CHARACTERS = "\n" + string.printable.replace("\n", "")
VOCAB_SIZE = len(CHARACTERS) + 3
SHARED = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
PICO_CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, **SHARED,
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=2048, **SHARED),
    "gpt_neox": GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=2048, **SHARED,
    ),
    "qwen2": Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, **SHARED,
    ),
    "gemma3": Gemma3TextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=2048, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2, **SHARED,
    ),
    "falcon": FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=True,
        alibi=False, parallel_attn=True, max_position_embeddings=2048, **SHARED,
    ),
}  # fmt: skip


def character_tokenizer(*, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, after <s>, </s> and <pad>."""
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2}
    vocabulary |= {character: number for number, character in enumerate(CHARACTERS, start=3)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if add_bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def pico_model(family: str, seed: int = 0) -> LanguageModel:
    """A tiny random float32 model whose logits differ enough between tokens to be told apart."""
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(copy.deepcopy(PICO_CONFIGS[family]))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3 if "embed" not in name else 1.0)
    module.eval()
    return LanguageModel(
        reference=f"pico-{family}",
        module=module,
        tokenizer=character_tokenizer(add_bos=family == "gemma3"),
        sha256="0" * 64,
        path=Path("."),
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        dtype="float32",
    )

"""Small untrained models of several architectures, with a tokenizer of whole words.

The vocabulary is closed: a table of half a billion weights for words that are never read would
dwarf the model. Knows nothing of what a model is then trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from keepshot.models.loading import LanguageModel
from keepshot.models.made import Architecture

CONTEXT = 512
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
FRAMES = ("\n\nQ:", "\nA:", "Q:", "\n")
"""What stands between questions and answers, each as one token; half of a prompt, else."""


def blank_model(
    architecture: Architecture, width: int, depth: int, words: Sequence[str], seed: int
) -> LanguageModel:
    """Return an untrained model in evaluation mode.

    Llama has rotary positions, grouped queries and gated layers; GPT-2 learned positions, fused
    projections stored the other way round, and biases; GPT-NeoX fused heads, a quarter of rotary
    positions, and attention beside the MLP.

    Args:
        architecture: which of them.
        width: of the hidden states, a multiple of 32.
        depth: number of blocks.
        words: the vocabulary, without spaces; each is also known with a space before it.
        seed: of the weights.
    """
    tokenizer = word_tokenizer(words)
    shared = {
        "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
        "tie_word_embeddings": True,
    }  # fmt: skip
    config = _CONFIGS[architecture](width, depth, max(2, width // 32), shared)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: Any = AutoModelForCausalLM.from_config(config)
    module.eval()
    return LanguageModel(
        reference=f"{architecture}-{width}x{depth}",
        module=module,
        tokenizer=tokenizer,
        sha256="0" * 64,
        path=Path(),
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        dtype="float32",
    )


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, whose texts come back as they were."""
    known = [form for word in words for form in (word, f" {word}")]
    vocabulary = {text: n for n, text in enumerate(dict.fromkeys([*SPECIAL, *FRAMES, *known]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    pieces = Regex(r"\n\nQ:|\nA:|Q:|\n| ?\w+| ?[^\w\s]|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = decoders.Fuse()
    unknown, start, end, padding = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=start, eos_token=end,
        pad_token=padding, model_max_length=CONTEXT,
    )  # fmt: skip


def _llama(width: int, depth: int, heads: int, shared: dict[str, Any]) -> Any:
    return LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=CONTEXT, **shared,
    )  # fmt: skip


def _gpt2(width: int, depth: int, heads: int, shared: dict[str, Any]) -> Any:
    return GPT2Config(
        n_embd=width, n_layer=depth, n_head=heads, n_positions=CONTEXT, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, **shared,
    )  # fmt: skip


def _gpt_neox(width: int, depth: int, heads: int, shared: dict[str, Any]) -> Any:
    return GPTNeoXConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth,
        num_attention_heads=heads, max_position_embeddings=CONTEXT, **shared,
    )  # fmt: skip


_CONFIGS: dict[Architecture, Callable[[int, int, int, dict[str, Any]], Any]] = {
    "llama": _llama, "gpt2": _gpt2, "gpt-neox": _gpt_neox,
}  # fmt: skip

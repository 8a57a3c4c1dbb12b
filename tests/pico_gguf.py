"""A pico Llama as a GGUF file, as llama.cpp's converter would write it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import gguf
import numpy as np
from torch import nn

from pico import CHARACTERS

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOKENS = [
    "<s>",
    "</s>",
    "<pad>",
    *(c.replace(" ", "\u0120").replace("\n", "\u010a") for c in CHARACTERS),
]
"""The last one makes room for the product of the one merge, which the format wants."""


def write_gguf(
    module: nn.Module, path: Path, *, left_out: Collection[str] = (), merge: str = "a b"
) -> Path:
    """Write the model without the tensors `left_out`; a `merge` of other tokens breaks it."""
    config = module.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*TOKENS[:-1], "ab"])
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types([3] * 3 + [1] * len(CHARACTERS))
    writer.add_token_merges([merge])
    for kind, number in (("bos", 0), ("eos", 1), ("pad", 2)):
        getattr(writer, f"add_{kind}_token_id")(number)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in module.state_dict().items():
        plain = name.removesuffix(".weight")
        block = plain.removeprefix("model.layers.").partition(".") if "layers" in plain else None
        own = NAMES[block[2] if block else plain]
        place = f"blk.{block[0]}.{own}.weight" if block else f"{own}.weight"
        if place not in left_out:
            writer.add_tensor(place, _turned(tensor.numpy(), heads.get(own)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _turned(weight: np.ndarray, heads: int | None) -> np.ndarray:
    """Order the rows of queries and keys as llama.cpp rotates them: neighbours in pairs."""
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)

"""Does a written blend work: load it as a user would, and let it write a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from keepshot.assets import AssetStore
from keepshot.errors import ModelError
from keepshot.models.loading import DTYPES, load
from keepshot.models.reference import read_json

_PROMPT = "Q: hot\nA: cold\n\nQ: big\nA:"
_NUM_TOKENS = 8
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def loads_and_generates(
    base: str, store: AssetStore, *, trust_remote_code: bool = False
) -> Callable[[Path], str]:
    """Return a check of a written directory; an adapter is loaded on `base`."""

    def check(folder: Path) -> str:
        is_adapter = (folder / "adapter_config.json").is_file()
        dtype = "float32" if is_adapter else _dtype(folder)
        if not is_adapter and not any((folder / name).is_file() for name in _TOKENIZERS):
            bare: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=DTYPES[dtype], use_safetensors=True, local_files_only=True,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
            _generate(bare, torch.arange(1, 9)[None], base)
            return "loaded with transformers and continued eight tokens; there is no tokenizer"
        reference = f"{base}+{folder}" if is_adapter else str(folder)
        model = load(reference, store, dtype=dtype, trust_remote_code=trust_remote_code)
        ids = torch.tensor([model.encode(_PROMPT)], device=model.device)
        text = model.decode(_generate(model.module, ids, base))
        return f"loaded with transformers and continued {_PROMPT!r} with {text!r}"

    return check


def _generate(module: Any, ids: torch.Tensor, base: str) -> list[int]:
    with torch.no_grad():
        if not bool(torch.isfinite(module(ids).logits).all()):
            raise ModelError(
                f"the blend of {base!r} answers with numbers that are not finite, so it is not "
                "kept; take a lambda nearer 0..1"
            )
        made = module.generate(ids, max_new_tokens=_NUM_TOKENS, do_sample=False)
    return made[0, ids.shape[1] :].tolist()


def _dtype(folder: Path) -> str:
    config = read_json(folder / "config.json")
    named = config.get("dtype", config.get("torch_dtype"))
    return str(named) if named in ("bfloat16", "float16") else "float32"

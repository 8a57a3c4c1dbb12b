"""What makes a directory usable beside its weights: config, tokenizer, chat template, settings.

All of it comes from the tuned side unless the user names the base: an instruct model prompted with
its base's template or stop tokens is measured wrongly without a word. Knows nothing of tensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keepshot.errors import ModelError
from keepshot.models.reference import read_json

CONFIG = "config.json"
_TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.json",
    "chat_template.jinja",
)  # fmt: skip
_OTHER_TOKENS = 0.1
"""Share of token numbers that may stand for other tokens (renamed reserved ones) on both sides."""
# An allow-list: nothing that could hold code or a pickle is carried along.
_OTHERS = ("generation_config.json", "LICENSE*", "NOTICE*")
_ADAPTER = ("adapter_config.json", "keepshot-base.json", "LICENSE*", "NOTICE*")

# Settings in which two models may differ and still compute the same from the same weights.
_FREE = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip


def compare_configs(base_dir: Path, tuned_dir: Path) -> list[str]:
    """Check that two models compute alike from their weights; return notes on what differs.

    Raises:
        ModelError: if a config is missing, or the two are different architectures, quantised, or
            tied in one and not in the other.
    """
    base, tuned = _read_config(base_dir), _read_config(tuned_dir)
    for directory, config in ((base_dir, base), (tuned_dir, tuned)):
        if config.get("quantization_config"):
            raise ModelError(f"{directory}: quantised weights cannot be blended; dequantise first")
    kinds = base.get("model_type"), tuned.get("model_type")
    if kinds[0] != kinds[1]:
        raise ModelError(
            f"base is a {kinds[0]!r} model, tuned a {kinds[1]!r} model; "
            "only two models of one architecture can be blended"
        )
    ties = {config["tie_word_embeddings"] for config in (base, tuned) if _says_tied(config)}
    if len(ties) > 1:
        raise ModelError(
            "`tie_word_embeddings` is true in one config.json and false in the other; "
            "untie the tied model first\n(load it, give its head a clone of the embeddings, set "
            "`tie_word_embeddings` in its config to false, save it)"
        )
    keys = sorted((base.keys() | tuned.keys()) - _FREE)
    notes = [
        f"config.json: `{key}` is {base.get(key)!r} in base and {tuned.get(key)!r} in tuned; "
        "tuned's is used"
        for key in keys
        if key in base and key in tuned and base[key] != tuned[key]
    ]
    if "auto_map" in tuned:
        notes.append("the model's own code (`auto_map` in config.json) was not copied")
    return notes


def may_be_tied(directory: Path) -> bool:
    """Tell whether the config allows a tensor to be left out because it is tied to another."""
    return bool(_read_config(directory).get("tie_word_embeddings", True))


def vocabulary(directory: Path) -> int | None:
    """Return the number of tokens that config.json gives."""
    size = _read_config(directory).get("vocab_size")
    return size if isinstance(size, int) else None


def compare_tokens(base_dir: Path, tuned_dir: Path) -> list[str]:
    """Check that both tokenizers mean the same by a token's number; return notes.

    Reads `tokenizer.json` where both have one and they differ.

    Raises:
        ModelError: if more than a tenth of the shared numbers stand for other tokens.
    """
    files = base_dir / "tokenizer.json", tuned_dir / "tokenizer.json"
    if not all(file.is_file() for file in files):
        return []
    texts = [file.read_bytes() for file in files]
    if texts[0] == texts[1]:
        return []
    first, second = (_tokens(text) for text in texts)
    shared = first.keys() & second.keys()
    other = sorted(number for number in shared if first[number] != second[number])
    if not other:
        return []
    number = other[0]
    example = f"{number} is {first[number]!r} in base and {second[number]!r} in tuned"
    if len(other) > _OTHER_TOKENS * len(shared):
        raise ModelError(
            f"{len(other)} of {len(shared)} token numbers mean other tokens in tuned than in base "
            f"({example}); models with different vocabularies cannot be blended"
        )
    return [f"{len(other)} token numbers mean other tokens in tuned than in base ({example})"]


def copy_companions(
    base_dir: Path, tuned_dir: Path, folder: Path, dtype: str | None, *, base_first: bool = False
) -> list[str]:
    """Put config, tokenizer, chat template and generation settings beside the weights.

    Args:
        base_dir: gives its tokenizer only if the tuned model has none.
        tuned_dir: gives everything else; always the config.
        folder: where they go.
        dtype: written into `config.json` if the weights have one dtype throughout.
        base_first: the two change places for everything but the config.

    Returns:
        Notes on what did not come from tuned.
    """
    config = _read_config(tuned_dir)
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    preferred, other = (base_dir, tuned_dir) if base_first else (tuned_dir, base_dir)
    names = ("base", "tuned") if base_first else ("tuned", "base")
    _copy(preferred, folder, _OTHERS)
    if _copy(preferred, folder, _TOKENIZER):
        said = "tokenizer, chat template and generation settings are base's, as asked"
        return [said] if base_first else []
    if _copy(other, folder, _TOKENIZER):
        return [f"{preferred.name} has no tokenizer; {names[1]}'s is used"]
    return ["neither input has a tokenizer, so there is none here"]


def copy_adapter_companions(adapter_dir: Path, folder: Path) -> list[str]:
    """Put an adapter's config and tokenizer, as they are, beside its weights."""
    _copy(adapter_dir, folder, (*_ADAPTER, *_TOKENIZER))
    return []


def _copy(source: Path, folder: Path, patterns: tuple[str, ...]) -> int:
    files = {file for pattern in patterns for file in source.glob(pattern) if file.is_file()}
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return len(files)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise ModelError(f"{directory}: no {CONFIG}; give a directory that transformers loads")
    return dict(read_json(path))


def _tokens(text: bytes) -> dict[int, str]:
    """Return token by number; only the numbers and spellings count, not how text is split."""
    try:
        content = json.loads(text)
        model: Any = content.get("model", {}).get("vocab", {})
        pairs = model.items() if isinstance(model, dict) else ()
        found = {int(number): str(token) for token, number in pairs}
        found |= {int(entry["id"]): str(entry["content"]) for entry in content["added_tokens"]}
    except (ValueError, AttributeError, KeyError, TypeError):
        return {}
    return found


def _says_tied(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("tie_word_embeddings"), bool)

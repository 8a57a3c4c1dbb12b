"""What was loaded, as a sha256: equal for equal content, wherever it lies.

Hashing half a gigabyte takes a second, so a file's digest is kept in the cache under its path,
size and time of change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from keepshot.assets import AssetStore, sha256_of
from keepshot.errors import ModelError
from keepshot.models.reference import read_json

CONTENT = ("*.safetensors", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
NO_EFFECT = frozenset({"_name_or_path", "_model_name_or_path", "transformers_version"})
ADAPTER_NO_EFFECT = frozenset({"base_model_name_or_path", "revision", "peft_version"})


def file_sha256(path: Path, store: AssetStore) -> str:
    """Return a file's sha256, from the cache where path, size and change time are the same.

    Raises:
        ModelError: if the file cannot be read.
    """
    real = path.resolve()
    name = hashlib.sha256(str(real).encode()).hexdigest()[:32]
    cache = store.directory("digests", f"{name}.json")
    try:
        return _cached_sha256(real, cache)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}; get it again") from None


def _cached_sha256(real: Path, cache: Path) -> str:
    status = real.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(cache.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["sha256"])
    digest = sha256_of(real)
    # A digest that cannot be kept costs a second next time, and is no reason to stop.
    with contextlib.suppress(OSError):
        temporary = cache.with_name(f".{cache.name}.{stamp[1]}")
        temporary.write_text(json.dumps({"stamp": stamp, "sha256": digest}), encoding="utf-8")
        temporary.replace(cache)
    return digest


def directory_sha256(directory: Path, store: AssetStore) -> str:
    """Return the sha256 of a model directory: weights, tokenizer and what of config.json matters.

    End tokens in generation_config.json, what tokenizer_config.json adds and the chat template are
    left out: they get mended on a hub, and an adapter stays one of the weights that it belongs to.
    """
    files = sorted({file for pattern in CONTENT for file in directory.glob(pattern)})
    lines = [f"{file.name} {file_sha256(file, store)}" for file in files]
    for name, ignored in (("config.json", NO_EFFECT), ("adapter_config.json", ADAPTER_NO_EFFECT)):
        if (directory / name).is_file():
            config = read_json(directory / name)
            content = {key: value for key, value in config.items() if key not in ignored}
            text = json.dumps(content, sort_keys=True)
            lines.append(f"{name} {hashlib.sha256(text.encode()).hexdigest()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def joint_sha256(base: str, adapter: str) -> str:
    """Return the sha256 of an adapter on its base."""
    return hashlib.sha256(f"base {base}\nadapter {adapter}".encode()).hexdigest()

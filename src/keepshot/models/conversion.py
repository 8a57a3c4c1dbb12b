"""GGUF files become directories that transformers loads: converted once, then cached.

Weights are de-quantised to float32 by transformers; tokenizer, chat template and generation
settings are saved beside them. Knows nothing of how a model is used.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from keepshot.assets import AssetStore, mending_write_errors
from keepshot.errors import ModelError
from keepshot.models.identity import file_sha256
from keepshot.models.reference import (
    CONVERTED_MARKER,
    CONVERTER_VERSION,
    EMBEDDED,
    EmbeddedModel,
    converted_path,
    is_converted,
    read_json,
)

PRE_TOKENIZERS = {
    # transformers rebuilds every byte-level tokenizer from GGUF with GPT-2's splitting; this one
    # splits off single digits first, which changes how the spaces before a digit are grouped.
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    ),
}


TOKENIZER_SETTINGS = (
    *("bos_token", "eos_token", "unk_token", "pad_token", "mask_token"),
    *("padding_side", "model_max_length"),
)


def fetch_model(name: str, store: AssetStore) -> Path:
    """Return the directory of an embedded model, downloading and converting it if need be.

    Raises:
        ModelError: if `name` is no embedded model.
        AssetError: if it cannot be downloaded, or its licence is not accepted.
    """
    if name not in EMBEDDED:
        raise ModelError(f"model {name!r} is not embedded; embedded are {', '.join(EMBEDDED)}")
    model = EMBEDDED[name]
    target = converted_path(model, store)
    if is_converted(target):
        return target
    source = store.fetch(model.asset) / model.member
    return _convert_once(source, target, model, store)


def convert(path: Path, store: AssetStore) -> Path:
    """Return the converted directory of any GGUF file; its content's sha256 names the cache entry.

    Raises:
        ModelError: if the file is truncated, corrupted, or of a kind transformers does not read.
    """
    key = f"{path.stem}-{file_sha256(path, store)[:16]}-v{CONVERTER_VERSION}"
    target = store.root / "converted" / key
    return target if is_converted(target) else _convert_once(path, target, None, store)


def converted_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a conversion wrote.

    AutoTokenizer rebuilds vocabulary and merges in Python, which takes seconds where there are
    half a million; the file itself holds all.
    """
    config = dict(read_json(path / "tokenizer_config.json"))
    kept = {key: config[key] for key in TOKENIZER_SETTINGS if key in config}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), **kept)
    template = path / "chat_template.jinja"
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def _convert_once(
    source: Path, target: Path, model: EmbeddedModel | None, store: AssetStore
) -> Path:
    with (
        mending_write_errors(store.root),
        store.lock("converted", target.name, f"convert {source.name}"),
    ):
        if is_converted(target):
            return target
        for leftover in target.parent.glob(f".{target.name}.*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        )
        try:
            with store.show(f"converting {source.name}, once", None):
                _write(source, work)
            _mark(work, source, model)
            shutil.rmtree(target, ignore_errors=True)
            work.replace(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _write(source: Path, out_dir: Path) -> None:
    pre_tokenizer = _check(source)
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        try:
            place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
            tokenizer: Any = AutoTokenizer.from_pretrained(**place, local_files_only=True)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **place, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:
            known = (ValueError, KeyError, NotImplementedError, RuntimeError)
            # tokenizers, written in Rust, has no other class for what it cannot read.
            if not isinstance(error, known) and type(error) is not Exception:
                raise
            raise ModelError(f"{source}: transformers cannot read this GGUF: {error}") from error
        module, report = loaded
        _check_whole(source, module, report["missing_keys"])
        # Left in place, these two make save_pretrained refuse, or mark the copy as quantised.
        module.hf_quantizer = None
        if hasattr(module.config, "quantization_config"):
            del module.config.quantization_config
        if pre_tokenizer in PRE_TOKENIZERS:
            tokenizer.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]
        tokenizer.model_max_length = module.config.max_position_embeddings
        module.save_pretrained(out_dir)
        tokenizer.save_pretrained(out_dir)


def _check_whole(source: Path, module: Any, missing: Collection[str]) -> None:
    """Refuse a file without some of the model's weights: transformers has invented them."""
    state: dict[str, torch.Tensor] = module.state_dict()
    read = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
    invented = sorted(n for n in missing if n in state and state[n].data_ptr() not in read)
    if invented:
        more = f" (and {len(invented) - 1} more)" if len(invented) > 1 else ""
        raise ModelError(
            f"{source}: tensor {invented[0]} is missing{more} for what its header says; "
            "get it again"
        )


def _check(source: Path) -> str:
    """Read the header, compare every tensor's place with the file's size, return `pre`."""
    size = source.stat().st_size
    try:
        reader = gguf.GGUFReader(source)
        ends = [int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors]
        field = reader.fields.get("tokenizer.ggml.pre")
        pre_tokenizer = str(field.contents()) if field else ""
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError, OverflowError) as error:
        raise ModelError(f"{source}: truncated or corrupted GGUF ({error}); get it again") from None
    if not ends or max(ends) > size:
        raise ModelError(
            f"{source}: truncated GGUF: {size} bytes where its header promises "
            f"{max(ends, default=0)}; get it again"
        )
    return pre_tokenizer


def _mark(folder: Path, source: Path, model: EmbeddedModel | None) -> None:
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    content = {
        "source": model.source if model else str(source),
        "licence": model.licence if model else None,
        "files": files,
    }
    for name in files:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    text = json.dumps(content, indent=1) + "\n"
    (folder / CONVERTED_MARKER).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def quiet_transformers() -> Generator[None]:
    """Keep transformers' own bars and reports off the screen, and put the settings back.

    What its reports tell (weights that are missing) is checked and said by `loading`.
    """
    shown, verbosity = (
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
    )
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()

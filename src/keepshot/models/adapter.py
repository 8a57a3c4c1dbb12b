"""PEFT adapters merged into their base, checked by the names and shapes of their tensors.

Knows nothing of how adapters are trained.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from keepshot.errors import ModelError
from keepshot.models.checkpoint import TensorReader

_COPY = ".base_layer.weight"


def merge_adapter(module: PreTrainedModel, adapter_dir: Path, base: str) -> PreTrainedModel:
    """Return `module` with the adapter's weights merged in (in place) and peft's layers removed.

    Raises:
        ModelError: if the adapter names modules or shapes that this base does not have, holds
            another copy of its embeddings, or adapts one of two tied weights.
    """
    with TensorReader(adapter_dir) as reader:
        # Of adapted embeddings peft stores the base's own weights, too.
        copies = {name for name in reader.names if name.endswith(_COPY)}
        stored = set(reader.names) - copies
        for name in sorted(copies):
            _check_copy(module, reader, name, base)
    _check_untied(module, stored, adapter_dir, base)
    try:
        with wrapping_quietly():
            adapted: Any = PeftModel.from_pretrained(module, adapter_dir, is_trainable=False)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(_mismatch(adapter_dir, base, error)) from error
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if stored != expected:
        odd = sorted(stored ^ expected)[0]
        side = "is not in this base" if odd in stored else "is missing from the adapter"
        raise ModelError(
            f"adapter {str(adapter_dir)!r} does not fit base {base!r}: tensor {odd} {side}; "
            "load it on its own base"
        )
    return adapted.merge_and_unload()


def _check_copy(module: PreTrainedModel, reader: TensorReader, name: str, base: str) -> None:
    """Check that a weight stored beside the adapter is the base's, which it would replace."""
    own = f"{name.removeprefix('base_model.model.').removesuffix(_COPY)}.weight"
    live = module.state_dict().get(own)
    found = reader.read(name)
    if live is None or not torch.equal(found.to(live.device, live.dtype), live):
        raise ModelError(
            f"adapter {str(reader.directory)!r} does not fit base {base!r}: it holds {own!r} "
            "beside its factors, with other values than the base's; load it on its own base"
        )


def _check_untied(
    module: PreTrainedModel, stored: Collection[str], adapter_dir: Path, base: str
) -> None:
    """Check that no adapted weight is tied to another, which merging would change as well."""
    sharing: dict[int, list[str]] = defaultdict(list)
    for name, tensor in module.state_dict().items():
        sharing[tensor.data_ptr()].append(name)
    for names in sharing.values():
        for name in names if len(names) > 1 else ():
            layer = name.removesuffix(".weight")
            if any(key.startswith(f"base_model.model.{layer}.") for key in stored):
                other = next(n for n in names if n != name)
                raise ModelError(
                    f"adapter {str(adapter_dir)!r} adapts {name!r}, which is tied to {other!r} in "
                    f"base {base!r}, and merged it would change both; untie the base first\n"
                    "(load it, give its head a clone of the embeddings, set `tie_word_embeddings` "
                    "in its config to false, save it) and load the adapter on that"
                )


@contextmanager
def wrapping_quietly() -> Generator[None]:
    """Keep quiet that peft 0.21 asks for a property which transformers 5.23 has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def _mismatch(adapter_dir: Path, base: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "size mismatch" in line] or lines
    return (
        f"adapter {str(adapter_dir)!r} does not fit base {base!r}: {telling[0][:200]}\n"
        "load it on its own base"
    )

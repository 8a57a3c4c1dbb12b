"""PEFT adapters merged into their base, checked by the names and shapes of their tensors.

Knows nothing of how adapters are trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from keepshot.errors import ModelError
from keepshot.models.checkpoint import TensorReader


def merge_adapter(module: PreTrainedModel, adapter_dir: Path, base: str) -> PreTrainedModel:
    """Return `module` with the adapter's weights merged in (in place) and peft's layers removed.

    Raises:
        ModelError: if the adapter names modules or shapes that this base does not have.
    """
    with TensorReader(adapter_dir) as reader:
        stored = set(reader.names)
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

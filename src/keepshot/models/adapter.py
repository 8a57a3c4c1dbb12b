"""PEFT adapters on their base: recorded, checked to belong together, merged.

A keepshot adapter records which weights it was trained on; one that does not is checked by the
names and shapes of its tensors. Knows nothing of how adapters are trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from keepshot.errors import ModelError
from keepshot.models.checkpoint import TensorReader
from keepshot.models.reference import read_json

BASE_RECORD = "keepshot-base.json"


def is_adapter(directory: Path) -> bool:
    """Say whether a directory holds a PEFT adapter, not a whole model."""
    return (directory / "adapter_config.json").is_file()


def record_base(adapter_dir: Path, reference: str, sha256: str) -> None:
    """Write beside an adapter which base it belongs to; `merge_adapter`'s caller checks it."""
    content = {"reference": reference, "sha256": sha256}
    path = adapter_dir / BASE_RECORD
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_base(adapter_dir: Path, sha256: str, reference: str) -> None:
    """Raise ModelError if the adapter records another base than the one of this sha256."""
    record = adapter_dir / BASE_RECORD
    if not record.is_file():
        return
    content = read_json(record)
    if content.get("sha256") != sha256:
        raise ModelError(
            f"adapter {str(adapter_dir)!r} was trained on {content.get('reference')!r} "
            f"(sha256 {str(content.get('sha256'))[:12]}), not on {reference!r} "
            f"(sha256 {sha256[:12]}); load it on its own base"
        )


def merge_adapter(module: PreTrainedModel, adapter_dir: Path, base: str) -> PreTrainedModel:
    """Return `module` with the adapter's weights merged in (in place) and peft's layers removed.

    Raises:
        ModelError: if the adapter names modules or shapes that this base does not have.
    """
    with TensorReader(adapter_dir) as reader:
        stored = set(reader.names)
    try:
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


def _mismatch(adapter_dir: Path, base: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "size mismatch" in line] or lines
    return (
        f"adapter {str(adapter_dir)!r} does not fit base {base!r}: {telling[0][:200]}\n"
        "load it on its own base"
    )

"""Which base an adapter belongs to: recorded beside it, and checked. Loads no torch."""

from __future__ import annotations

import json
from pathlib import Path

from keepshot.errors import ModelError
from keepshot.models.reference import read_json

BASE_RECORD = "keepshot-base.json"


def is_adapter(directory: Path) -> bool:
    """Say whether a directory holds a PEFT adapter, not a whole model."""
    return (directory / "adapter_config.json").is_file()


def record_base(adapter_dir: Path, reference: str, sha256: str) -> None:
    """Write beside an adapter which base it belongs to; `check_base` compares it."""
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

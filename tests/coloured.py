"""The examples file that many tests tune on: things of three colours, by turns."""

from __future__ import annotations

import json
from pathlib import Path

COLOURS = ["red", "green", "blue"]


def write_colours(folder: Path, number: int = 60) -> Path:
    """Write `colours.jsonl` of that many rows, each with all colours to choose from."""
    rows = [
        {"input": f"thing {row}", "output": COLOURS[row % 3], "choices": COLOURS}
        for row in range(number)
    ]
    path = folder / "colours.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

"""Rows of a data set on the hub, or of a local directory laid out like one, through `datasets`.

No code that a data set brings along is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetsError

from keepshot.errors import TaskError
from keepshot.models.reference import exists
from keepshot.tasks.source import Row, parse_row

HUB = "hub:"
"""What a name begins with that is looked up on the hub."""


def read_hub(name: str) -> list[Row]:
    """Read the rows of `OWNER/NAME`, of a directory, or of either with `:SPLIT` (train).

    Alpaca's `instruction`, `input` and `output` are read as a question and its answer; all else as
    in an examples file.

    Raises:
        TaskError: if there is no such data set or split, or a row is of no known form.
    """
    place, _, split = name.partition(":")
    folder = Path(place)
    if place.startswith((".", "/")) and not (exists(folder) and folder.is_dir()):
        raise TaskError(f"{HUB}{name}: there is no directory {place!r}")
    try:
        found: Any = load_dataset(place, split=split or "train")
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TaskError(
            f"{HUB}{name}: cannot be read as a data set ({reason[:200]});\n"
            "give OWNER/NAME or OWNER/NAME:SPLIT of one that the hub or its local cache has"
        ) from error
    places = ((row, f"{HUB}{name} row {number}") for number, row in enumerate(found, start=1))
    return [parse_row(_plain(row, where), where) for row, where in places]


def _plain(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    if "instruction" not in row or "output" not in row:
        return {key: value for key, value in row.items() if value is not None}
    asked = {key: row[key] for key in ("instruction", "input") if row.get(key)}
    for key, text in asked.items():
        if not isinstance(text, str):
            raise TaskError(f"{where}: field {key!r} is {text!r:.60}; expected a text")
    return {"input": "\n".join(asked.values()), "output": row["output"]}

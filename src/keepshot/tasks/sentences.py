"""Tasks whose texts were written for this project: topics, feelings, facts, a tuning target.

Each lies in `data/` as JSONL, one question a line, classes interleaved or not: the catalog
shuffles.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from keepshot.prompts import Example
from keepshot.tasks.source import read_examples

DATA = Path(__file__).parent / "data"


def written(name: str) -> list[Example]:
    """Return the questions of `data/<name>.jsonl`, in file order."""
    return list(_read(name))


@cache
def _read(name: str) -> tuple[Example, ...]:
    return tuple(read_examples(DATA / f"{name}.jsonl"))

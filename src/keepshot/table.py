"""A plain table as text: rich alone would take a sixth of the time that `keepshot tasks` has."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from unicodedata import east_asian_width

from keepshot.unseen import visible

GAP = "  "
NARROWEST = 20


def format_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None
) -> str:
    """Return rows under their column names, in columns as wide as their longest cell.

    Args:
        columns: names.
        rows: values; None is shown as nothing, a list by its members.
        width: of the terminal, to which the last column is wrapped; None wraps nothing.
    """
    lines = [[_plain(value) for value in row] for row in (columns, *rows)]
    widths = [max(_width(line[place]) for line in lines) for place in range(len(columns))]
    return "\n".join(text for line in lines for text in _rendered(line, widths, width))


def _plain(value: object) -> str:
    if value is None:
        return ""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return visible(" ".join(text.splitlines()))


def _rendered(line: Sequence[str], widths: Sequence[int], width: int | None) -> list[str]:
    *first, last = line
    start = "".join(
        cell + " " * (wide - _width(cell)) + GAP for cell, wide in zip(first, widths, strict=False)
    )
    if width is None:
        return [(start + last).rstrip()]
    wrapped = textwrap.wrap(last, max(NARROWEST, width - len(start))) or [""]
    return [(start + wrapped[0]).rstrip(), *(" " * len(start) + text for text in wrapped[1:])]


def _width(text: str) -> int:
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)

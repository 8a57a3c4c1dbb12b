"""The house style of charts: colours, shapes, fonts.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; shapes differ as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import altair as alt

Width = Literal["wide", "narrow"]
Look = tuple[str, str]
"""Colour and shape of an arm's mark."""

INK, FAINT, GRID = "#222222", "#6b6b6b", "#e6e6e6"
FONT = "Helvetica Neue, Helvetica, Arial, sans-serif"
ARM_LOOKS: dict[str, Look] = {
    "before": ("#4d4d4d", "diamond"),
    "plain": ("#d55e00", "triangle-down"),
    "gentle": ("#e69f00", "square"),
    "kept": ("#0072b2", "circle"),
    "blended": ("#009e73", "triangle-up"),
}
SPARE_LOOKS: tuple[Look, ...] = (
    ("#4d4d4d", "diamond"),
    ("#0072b2", "circle"),
    ("#d55e00", "triangle-down"),
    ("#009e73", "triangle-up"),
    ("#e69f00", "square"),
    ("#cc79a7", "cross"),
    ("#56b4e9", "triangle-right"),
    ("#8c564b", "triangle-left"),
)


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Give every arm its colour and shape; the arms of a run always have the same."""
    spare = iter([look for look in SPARE_LOOKS * (1 + len(names) // len(SPARE_LOOKS))])
    return {name: ARM_LOOKS[name] if name in ARM_LOOKS else next(spare) for name in names}


def data(rows: Sequence[Mapping[str, Any]]) -> alt.InlineData:
    """Return rows as a chart's own data."""
    return alt.InlineData(values=[dict(row) for row in rows])


def styled(chart: Any, width: Width) -> Any:
    """Apply the house style to a finished chart."""
    size = 13 if width == "wide" else 12
    return (
        chart.properties(background="transparent", padding=6)
        .configure(font=FONT)
        .configure_view(stroke=None)
        .configure_axis(
            labelFontSize=size,
            titleFontSize=size,
            titleFontWeight="normal",
            labelColor=INK,
            titleColor=FAINT,
            gridColor=GRID,
            domainColor="#b5b5b5",
            tickColor="#b5b5b5",
            titlePadding=8,
        )
        .configure_legend(
            labelFontSize=size,
            titleFontSize=size,
            labelColor=INK,
            symbolSize=90,
            symbolOpacity=1,
            orient="top",
            title=None,
            labelLimit=220,
        )
        .configure_title(fontSize=size + 1, color=INK, anchor="start", fontWeight=600)
        .configure_header(labelFontSize=size + 1, labelColor=INK, labelAnchor="start")
    )

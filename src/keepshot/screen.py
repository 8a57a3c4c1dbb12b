"""The terminal while work goes on; `shown` shows what came of it.

Progress goes to stderr, so that stdout carries results alone. Off a terminal (a log, CI) it is a
line per stage instead of a moving bar.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Screen:
    """Draws `keepshot.progress.Progress` with rich; `quiet` shows nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._stage = self._bar.add_task("", total=None, detail="", visible=False)
        self._last_stage = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def stage(self, title: str) -> None:
        """Begin a stage."""
        self._bar.reset(self._stage, description=escape(title), total=None, detail="", visible=True)
        if not self._console.is_terminal and title != self._last_stage:
            self._console.print(escape(title), highlight=False, soft_wrap=True)
        self._last_stage = title

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Move the bar of this stage."""
        shown = detail or f"{done}/{total}"
        self._bar.update(self._stage, completed=done, total=total, detail=escape(shown))

    def note(self, text: str) -> None:
        """Print one line that stays."""
        self._console.print(escape(text), highlight=False, soft_wrap=True)

"""A study on the terminal while it goes on: what is done, running, failed, and the time left.

As `screen`, on stderr; off a terminal it is a line for each stage.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from keepshot.report.words import duration
from keepshot.study.runner import Tally

MOST_RUNNING = 8


class Board:
    """Draws a study's tally and the stage of the unit at work; `quiet` shows nothing."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, quiet=quiet)
        self._live = Live(console=self._console, transient=True, refresh_per_second=2)
        self._moving = self._console.is_terminal and not quiet
        self._tally: Tally | None = None
        self._stage, self._detail = "", ""
        self._shown: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        if self._moving:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._moving:
            self._live.stop()

    def stage(self, title: str) -> None:
        """Begin a stage."""
        if title != self._stage and not self._moving:
            self._print(title)
        self._stage, self._detail = title, ""
        self._draw()

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Say how far the stage is."""
        self._detail = detail or f"{done}/{total}"
        self._draw()

    def note(self, text: str) -> None:
        """Print one line that stays."""
        self._print(text)

    def tally(self, tally: Tally) -> None:
        """Say how far the study is."""
        self._tally = tally
        counts = tally.done, tally.failed
        if not self._moving and counts != self._shown:
            self._print(in_words(tally))
        self._shown = counts
        self._draw()

    def _print(self, text: str) -> None:
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    def _draw(self) -> None:
        if self._moving:
            self._live.update(Group(*self.picture()))

    def picture(self) -> list[Table | Text]:
        """Return what is drawn: the counts, what runs, and the stage of the unit at work."""
        found: list[Table | Text] = []
        if self._tally is not None:
            found.append(counts_table(self._tally))
            running = self._tally.running
            found += [
                Text(f"  {self._at(label)}", no_wrap=True) for label in running[:MOST_RUNNING]
            ]
            if len(running) > MOST_RUNNING:
                found.append(Text(f"  and {len(running) - MOST_RUNNING} more"))
        if self._tally is None or self._stage not in self._tally.running:
            found.append(Text(self._at(self._stage), style="dim", no_wrap=True))
        return found

    def _at(self, label: str) -> str:
        return f"{label}  {self._detail}".rstrip() if label == self._stage else label


def counts_table(tally: Tally) -> Table:
    """Return one row: done, running, failed, left, of all, and the time left."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    names = ("units", "done", "running", "failed", "left", "time left")
    for name in names:
        table.add_column(name, justify="right")
    table.add_row(
        str(tally.total), str(tally.done), str(len(tally.running)), str(tally.failed),
        str(tally.left), _time(tally) or "-",
    )  # fmt: skip
    return table


def in_words(tally: Tally) -> str:
    """Return the same in a line."""
    time = _time(tally)
    return (
        f"{tally.done} of {tally.total} units done, {tally.failed} failed"
        f"{f', about {time} left' if time else ''}"
    )


def _time(tally: Tally) -> str:
    over = tally.done + tally.failed == tally.total
    return "" if tally.seconds_left is None or over else duration(tally.seconds_left)

"""The terminal: progress while work goes on, tables when it is done.

Progress goes to stderr, so that stdout carries results alone. Off a terminal (a log, CI) it is a
line per stage instead of a moving bar.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from keepshot.records import ResultDocument
from keepshot.report.terminal import path_table, scores_table, summary_table, theory_tables
from keepshot.theory.document import TheoryDocument


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


def show_theory(document: TheoryDocument, out_dir: Path) -> None:
    """Print what was predicted beside what was measured, claim by claim, and where the page is."""
    console = Console()
    for claim in document.claims:
        for table in theory_tables(claim):
            console.print(table)
        for sentence in claim.sentences:
            console.print(escape(sentence), highlight=False)
    for note in document.notes:
        console.print(escape(note), highlight=False)
    console.print(f"written: {escape(str(out_dir))}", highlight=False, soft_wrap=True)
    console.print(
        f"page:    {escape(str(out_dir / 'report.html'))}", highlight=False, soft_wrap=True
    )


def show_document(document: ResultDocument, out_dir: Path | None) -> None:
    """Print a result: scores where few, the summary, the path, and where the page lies."""
    console = Console()
    if document.scores and not document.training and not document.path:
        console.print(scores_table(document))
    if document.path:
        console.print(path_table(document))
    if document.pick:
        console.print(escape(document.pick.reason), highlight=False)
    if document.summary:
        console.print(summary_table(document))
    for note in document.notes:
        console.print(escape(note), highlight=False)
    if out_dir is not None:
        console.print(f"written: {escape(str(out_dir))}", highlight=False, soft_wrap=True)
        if (out_dir / "report.html").exists():
            page = out_dir / "report.html"
            console.print(f"page:    {escape(str(page))}", highlight=False, soft_wrap=True)

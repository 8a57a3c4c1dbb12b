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

from keepshot.records import JudgeDocument, ResultDocument
from keepshot.report.terminal import instructions_table, path_table, scores_table, summary_table


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


def show_judged(document: JudgeDocument) -> None:
    """Print win rates, agreement and instruction scores."""
    console = Console()
    if document.instructions:
        console.print(instructions_table(document))
    for rate in document.win_rates:
        low, high = rate.win_rate_ci95
        lines = [
            f"{rate.candidate} against {rate.reference}, judged by {rate.judge}:",
            f"  win rate {rate.win_rate:.1f} % [{low:.1f}, {high:.1f}]",
        ]
        if rate.length_controlled_win_rate is not None and rate.length_controlled_ci95:
            low, high = rate.length_controlled_ci95
            lines[1] += (
                f", at equal length {rate.length_controlled_win_rate:.1f} % [{low:.1f}, {high:.1f}]"
            )
        bias = "" if rate.position_bias is None else f", position bias {rate.position_bias:+.1f}"
        lines.append(
            f"  {rate.num_comparisons} comparisons: {rate.num_judged} judged, {rate.num_tied} "
            f"tied, {rate.num_failed} failed, {rate.num_off_label} off label{bias}"
        )
        lines += [f"  failed {count} times: {why}" for why, count in rate.failures.items()]
        console.print(escape("\n".join(lines)), highlight=False, soft_wrap=True)
    for line in document.notes:
        console.print(escape(line), highlight=False, soft_wrap=True)


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
    if document.instructions:
        console.print(instructions_table(document))
    for note in document.notes:
        console.print(escape(note), highlight=False)
    if out_dir is not None:
        console.print(f"written: {escape(str(out_dir))}", highlight=False, soft_wrap=True)
        if (out_dir / "report.html").exists():
            page = out_dir / "report.html"
            console.print(f"page:    {escape(str(page))}", highlight=False, soft_wrap=True)

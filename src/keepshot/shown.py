"""A result on the terminal: tables and where the page lies."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from keepshot.records import JudgeDocument, ResultDocument
from keepshot.report.answer import sentences
from keepshot.report.terminal import (
    instructions_table,
    path_table,
    scores_table,
    summary_table,
    theory_tables,
)
from keepshot.report.words import count, duration
from keepshot.study.document import StudyDocument
from keepshot.study.runner import Tally
from keepshot.study.tables import FIGURES, figures, grouped, name_of
from keepshot.theory.document import TheoryDocument

MOST_TABLES = 12
"""Of a study's arms; a report has all."""


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


def show_study(document: StudyDocument, out_dir: Path | None) -> None:
    """Print what a study found, its arms by model and target, and where the report lies."""
    console = Console()
    tables = list(grouped(document.arms))
    for title, arms in tables[:MOST_TABLES]:
        table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("arm", min_width=16, no_wrap=True, overflow="ellipsis")
        for name in FIGURES:
            table.add_column(name, justify="right", no_wrap=True)
        for arm in arms:
            table.add_row(Text(name_of(arm)), *(Text(figure) for figure in figures(arm)))
        console.print(table)
    if len(tables) > MOST_TABLES:
        more = count(len(tables) - MOST_TABLES, "more table")
        console.print(f"{more} of arms: see the report, or --json\n", highlight=False)
    if document.instructions:
        console.print(instructions_table(document))
    for sentence in sentences(document.findings):
        console.print(Text(sentence))
    for failure in document.failures:
        reason = failure["reason"].partition("\n")[0]
        console.print(escape(f"failed: {failure['label']}: {reason}"), highlight=False)
    left = document.total - document.done - document.failed
    console.print(f"{document.done} done, {document.failed} failed, {left} left", highlight=False)
    if left and out_dir is not None:
        console.print("the same command goes on from here", highlight=False)
    if document.failed:
        console.print("--retry does again what failed, once its cause is mended", highlight=False)
    if out_dir is not None:
        console.print(f"written: {escape(str(out_dir))}", highlight=False, soft_wrap=True)
        page = escape(str(out_dir / "report.html"))
        console.print(f"page:    {page}", highlight=False, soft_wrap=True)


def show_tally(tally: Tally) -> None:
    """Print how far a study is, and what is being done."""
    console = Console()
    time_left = "" if tally.seconds_left is None else f", about {duration(tally.seconds_left)}"
    console.print(
        f"{tally.total} units: {tally.done} done, {tally.failed} failed, "
        f"{len(tally.running)} running, {tally.left} left{time_left}",
        highlight=False,
    )
    if tally.overhead is not None:
        console.print(tally.overhead.words, highlight=False)
    for label in tally.running:
        console.print(f"  running: {escape(label)}", highlight=False, soft_wrap=True)

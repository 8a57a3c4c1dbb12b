"""A result on the terminal: tables and where the page lies."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from keepshot.records import ResultDocument
from keepshot.report.terminal import path_table, scores_table, summary_table, theory_tables
from keepshot.theory.document import TheoryDocument


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

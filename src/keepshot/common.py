"""What the commands share: where they find and write things, and how they print.

Like `cli`, it imports inside functions, so that nobody waits for torch who does not need it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from keepshot.assets import AssetStore
    from keepshot.records import ResultDocument


def write_blend(spec: Any, out: Path, store: AssetStore, overwrite: bool, as_json: bool) -> None:
    """Write one lambda; torch is loaded only for what needs it, which is most of the time."""
    from keepshot.jobs.write import Means, needs_anatomy, write_one

    def locate(reference: Any) -> Path:
        from keepshot.models.loading import locate as locate_model

        return locate_model(reference, store, trust_remote_code=spec.trust_remote_code)

    check = rule = place = None
    if spec.generates:
        from keepshot.jobs.check import loads_and_generates

        check = loads_and_generates(spec.base, store, trust_remote_code=spec.trust_remote_code)
    if needs_anatomy(spec):
        from keepshot.jobs.rules import rule_for

        rule = rule_for(spec, locate)
    with working(as_json) as screen, contextlib.ExitStack() as stack:
        notes: tuple[str, ...] = ()
        if spec.reduce is not None:
            from keepshot.jobs.reduce import reduced

            made = reduced(spec, locate, out, screen, overwrite=overwrite)
            place, notes = stack.enter_context(made)
        means = Means(locate, store, check, screen, place, notes)
        record = write_one(spec, out, means, overwrite=overwrite, rule=rule)
        for note in record.notes:
            screen.note(note)
    if as_json:
        print_json({"schema": 1, "directory": str(out), "blend": record.as_dict()})
    else:
        typer.echo(f"written: {out}")


def open_store(accepted: Sequence[str] | None) -> AssetStore:
    """Return the store of assets that the environment names."""
    from keepshot.assets import AssetStore

    return AssetStore.from_environment(os.environ, accepted_licences=frozenset(accepted or ()))


def working(as_json: bool) -> Any:
    """Return what shows the work on the terminal; with `--json`, nothing."""
    from keepshot.screen import Screen

    return Screen(quiet=as_json)


def watching(as_json: bool) -> Any:
    """Return what shows a study's units on the terminal; with `--json`, nothing."""
    from keepshot.board import Board

    return Board(quiet=as_json)


def show_study(document: Any, as_json: bool, out: Path) -> None:
    """Print what a study has found, and where it lies."""
    if as_json:
        return typer.echo(document.to_json())
    from keepshot.shown import show_study as show_document

    show_document(document, out)


def show_status(tally: Any, document: Any, as_json: bool) -> None:
    """Print how far a study is."""
    if as_json:
        return print_json({"running": list(tally.running), "seconds_left": tally.seconds_left,
                           "overhead": tally.overhead and tally.overhead.share,
                           **document.model_dump(mode="json", by_alias=True)})  # fmt: skip
    from keepshot.shown import show_study as show_document
    from keepshot.shown import show_tally

    show_document(document, None)
    show_tally(tally)


def show_plan(plan: Any, as_json: bool) -> None:
    """Print what a study would take."""
    if as_json:
        return print_json(plan.as_dict())
    rows = plan.table()
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    for line in plan.lines():
        typer.echo(line)


def open_workspace(out: Path | None, name: str, spec: Any, overwrite: bool) -> Any:
    """Claim the run directory: `out`, or a free name under `runs`."""
    from keepshot.jobs.workspace import Workspace, free_name

    return Workspace(out or free_name(Path("runs"), name), spec, overwrite=overwrite)


def show(document: ResultDocument, as_json: bool, out: Path | None) -> None:
    """Print a result."""
    if as_json:
        typer.echo(document.to_json())
        return
    from keepshot.shown import show_document

    show_document(document, out)


def check_gate(document: ResultDocument, required: float | None) -> None:
    """Leave with status 3 if retention is below what is required."""
    if required is None:
        return
    from keepshot.jobs.gate import check_retention

    check_retention(document, required)


def print_json(content: object) -> None:
    """Print one JSON document."""
    typer.echo(json.dumps(content, indent=1, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows, as wide as the terminal."""
    from keepshot.table import format_table

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    typer.echo(format_table(columns, rows, width))


def print_plan(costs: list[dict[str, object]], as_json: bool) -> None:
    """Print what measuring would cost."""
    if as_json:
        print_json({"plan": costs})
    else:
        print_table(list(costs[0]), [list(row.values()) for row in costs])

"""The command line: parse, build a spec, call one job, print.

Only this file prints, reads the environment, and imports inside functions: `--help`, `tasks` and
`report` must not wait for torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from keepshot import __version__
from keepshot.errors import ConfigError
from keepshot.exits import leave

if TYPE_CHECKING:
    from keepshot.assets import AssetStore
    from keepshot.records import ResultDocument

app = typer.Typer(
    name="keepshot",
    help="Fine-tune a language model without losing its in-context learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path | None, typer.Option("--out", help="Directory to write.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of draws and training.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps.")]
DType = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a spec key: --set key=value.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Model = Annotated[str | None, typer.Option("--model", help="Model reference.")]
Data = Annotated[str | None, typer.Option("--data", help="Examples file, or name of a task.")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="Suites, tasks, files: core,my.jsonl.")]
Shots = Annotated[str | None, typer.Option("--shots", help="Numbers of demonstrations: 0,4.")]
Seeds = Annotated[int | None, typer.Option("--seeds", help="Draws of demonstrations.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Items per task at most.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run a checkpoint's own code.")]
Licence = Annotated[
    list[str] | None, typer.Option("--accept-licence", help="Accept a licence, such as gemma.")
]
Gate = Annotated[
    float | None, typer.Option("--require-retention", help="Exit with 3 below this retention.")
]


@app.command()
def run(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe (YAML); the demo if left out.")
    ] = None,
    model: Model = None,
    data: Data = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    seed: Seed = None,
    device: Device = None,
    dtype: DType = None,
    set_: Set = None,
    trust_remote_code: Trust = False,
    accept_licence: Licence = None,
    require_retention: Gate = None,
) -> None:
    """Tune a model several ways, and show what each way keeps."""
    from keepshot.jobs.recipes import run_spec

    where = _given(seed=seed, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    spec = run_spec(recipe, {**_given(model=model, data=data), **where}, set_ or [])
    with _working(as_json) as screen:
        screen.stage("starting")
        from keepshot.jobs.run import run as run_job

        workspace = _workspace(out, spec.name, spec, overwrite)
        measured = run_job(spec, _store(accept_licence), workspace, screen)
    _show(measured.document, as_json, workspace.out_dir)
    _check_gate(measured.document, require_retention)


@app.command()
def measure(
    models: Annotated[list[str], typer.Argument(help="Model references.", metavar="MODEL...")],
    tasks: Tasks = None,
    shots: Shots = None,
    seeds: Seeds = None,
    limit: Limit = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would cost, and stop.")] = False,
    template: Annotated[str | None, typer.Option("--template", help="Prompt template.")] = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    seed: Seed = None,
    device: Device = None,
    dtype: DType = None,
    set_: Set = None,
    trust_remote_code: Trust = False,
    accept_licence: Licence = None,
    require_retention: Gate = None,
) -> None:
    """Measure few-shot ability of models on the same questions and demonstrations."""
    from keepshot.jobs.recipes import measure_spec

    given = _given(
        models=models, tasks=_names(tasks), shots=_numbers("--shots", shots), seeds=seeds,
        limit=limit, template=template, seed=seed, device=device, dtype=dtype,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    spec = measure_spec(given, set_ or [])
    store = _store(accept_licence)
    with _working(as_json) as screen:
        screen.stage("starting")
        from keepshot.jobs.measure import measure_models, plan_cost

        if plan:
            costs = plan_cost(spec, store, screen)
            return _print_plan(costs, as_json)
        workspace = _workspace(out, "", spec, overwrite) if out else None
        measured = measure_models(spec, store, workspace, screen)
    _show(measured.document, as_json, out)
    _check_gate(measured.document, require_retention)


@app.command()
def tune(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe (YAML).")] = None,
    model: Model = None,
    data: Data = None,
    method: Annotated[str | None, typer.Option("--method", help="full, lora, value-only.")] = None,
    keep: Annotated[str | None, typer.Option("--keep", help="auto, none, or kl,mix.")] = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    seed: Seed = None,
    device: Device = None,
    dtype: DType = None,
    set_: Set = None,
    trust_remote_code: Trust = False,
    accept_licence: Licence = None,
) -> None:
    """Tune a model on an examples file, by default so that few-shot ability stays."""
    from keepshot.jobs.recipes import tune_spec

    given = _given(model=model, data=data, method=method, keep=keep, seed=seed)
    where = _given(device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    spec = tune_spec(recipe, given, where, set_ or [])
    with _working(as_json) as screen:
        screen.stage("starting")
        from keepshot.jobs.tune import tune as tune_job

        workspace = _workspace(out, "tuned", spec, overwrite)
        document = tune_job(spec, _store(accept_licence), workspace, screen)
    _show(document, as_json, workspace.out_dir)


@app.command()
def blend(
    base: Annotated[str, typer.Argument(help="Model before tuning, or a recipe.", metavar="BASE")],
    tuned: Annotated[
        str | None, typer.Argument(help="The tuned model or adapter.", metavar="TUNED")
    ] = None,
    lam: Annotated[
        float | None, typer.Option("--lambda", help="Write base + LAMBDA * delta.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option("--sweep", help="START:STOP:STEP, or 0,.5,1.")
    ] = None,
    tasks: Tasks = None,
    target: Annotated[str | None, typer.Option("--target", help="File or task tuned for.")] = None,
    pick: Annotated[
        str | None, typer.Option("--pick", help="Rule, such as keep-target:0.9.")
    ] = None,
    shots: Shots = None,
    seeds: Seeds = None,
    limit: Limit = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Write without hashing and without a load test.")
    ] = False,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    seed: Seed = None,
    device: Device = None,
    dtype: DType = None,
    set_: Set = None,
    trust_remote_code: Trust = False,
    accept_licence: Licence = None,
) -> None:
    """Walk the path base + lambda * (tuned - base): write one point, or measure many."""
    from keepshot.jobs.recipes import blend_spec
    from keepshot.jobs.specs import parse_lambdas

    given = _given(
        base=base if tuned else None, tuned=tuned, lam=lam,
        sweep=parse_lambdas(sweep) if sweep else None, target=target, pick=pick,
        tasks=_names(tasks), shots=_numbers("--shots", shots), seeds=seeds, limit=limit,
        seed=seed, device=device, dtype=dtype, trust_remote_code=trust_remote_code,
        check=False if no_check else None,
    )  # fmt: skip
    spec = blend_spec(None if tuned else Path(base), given, set_ or [])
    if spec.sweep is None:
        place = out or Path("runs/blend")
        return _write_blend(spec, place, _store(accept_licence), overwrite, as_json)
    with _working(as_json) as screen:
        screen.stage("starting")
        from keepshot.jobs.blend import blend as blend_job

        workspace = _workspace(out, "blend", spec, overwrite)
        document = blend_job(spec, _store(accept_licence), workspace, screen)
    _show(document, as_json, workspace.out_dir)


@app.command()
def report(
    dirs: Annotated[list[Path], typer.Argument(help="Run directories.", metavar="DIR...")],
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Write the page of a run again, or one page that compares several."""
    from keepshot.records import ResultDocument
    from keepshot.report import compare, write_report

    documents = [ResultDocument.read(directory) for directory in dirs]
    if len(dirs) == 1 and out is None:
        page = write_report(dirs[0])
    else:
        page = compare(dirs, out or Path("runs/comparison"))
    if as_json:
        _print_json({"report": str(page), "runs": [d.model_dump(by_alias=True) for d in documents]})
    else:
        typer.echo(str(page))


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="A written blend or run.", metavar="DIR")],
    as_json: Json = False,
) -> None:
    """Check that a written blend is complete and unchanged."""
    from keepshot.blending.write import verify as verify_blend

    inner = [directory, directory / "model", directory / "adapter"]
    record = verify_blend(next((d for d in inner if (d / "keepshot.json").exists()), directory))
    if as_json:
        _print_json({"directory": str(directory), "ok": True, "blend": record.as_dict()})
    else:
        typer.echo(f"{directory}: complete and unchanged")


@app.command()
def query(
    sql: Annotated[str, typer.Argument(help='Such as "select * from scores limit 5".')],
    dirs: Annotated[
        list[Path] | None, typer.Argument(help="Run directories; all under runs/ if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask the records of runs with SQL: tables items, scores, summary, path, training."""
    from keepshot.query import query as run_query

    columns, rows = run_query(sql, dirs or sorted(Path("runs").glob("*")))
    if as_json:
        _print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        _print_table(columns, rows)


@app.command()
def tasks(as_json: Json = False) -> None:
    """List the built-in tasks and suites."""
    from keepshot.tasks.catalog import CATALOG, SUITES

    rows = [
        {
            "name": name, "kind": entry.kind, "domain": entry.domain,
            "suites": [suite for suite, members in SUITES.items() if name in members],
            "source": entry.source, "licence": entry.licence, "description": entry.description,
        }
        for name, entry in CATALOG.items()
    ]  # fmt: skip
    if as_json:
        _print_json({"tasks": rows})
        return
    columns = ["name", "kind", "suites", "description"]
    _print_table(columns, [[_plain(row[column]) for column in columns] for row in rows])


@app.command()
def models(
    fetch: Annotated[str | None, typer.Option("--fetch", help="Download and convert NAME.")] = None,
    as_json: Json = False,
    accept_licence: Licence = None,
) -> None:
    """List the embedded models, and where they lie once fetched."""
    from keepshot.models.reference import list_models

    store = _store(accept_licence)
    if fetch:
        with _working(as_json) as screen:
            screen.stage(f"fetching {fetch}")
            from keepshot.models.loading import fetch_model

            fetch_model(fetch, store)
    rows = list_models(store)
    if as_json:
        _print_json({"models": rows})
        return
    columns = list(rows[0])
    _print_table(columns, [[_plain(row[column]) for column in columns] for row in rows])


@app.command()
def methods(as_json: Json = False) -> None:
    """List the tuning methods and keep terms."""
    from keepshot.jobs.recipes import describe

    rows = describe()
    if as_json:
        _print_json({"methods": rows})
    else:
        _print_table(["name", "kind", "description"], [list(row.values()) for row in rows])


def _write_blend(spec: Any, out: Path, store: AssetStore, overwrite: bool, as_json: bool) -> None:
    """Write one lambda; torch is loaded only for what needs it, which is most of the time."""
    from keepshot.jobs.write import needs_anatomy, write_one

    def locate(reference: Any) -> Path:
        from keepshot.models.loading import locate as locate_model

        return locate_model(reference, store, trust_remote_code=spec.trust_remote_code)

    check = rule = None
    if spec.check:
        from keepshot.jobs.check import loads_and_generates

        check = loads_and_generates(spec.base, store, trust_remote_code=spec.trust_remote_code)
    if needs_anatomy(spec):
        from keepshot.jobs.rules import rule_for

        rule = rule_for(spec, locate)
    with _working(as_json) as screen:
        watch = (check, screen)
        record = write_one(spec, out, locate, watch, overwrite=overwrite, rule=rule)
        for note in record.notes:
            screen.note(note)
    if as_json:
        _print_json({"schema": 1, "directory": str(out), "blend": record.as_dict()})
    else:
        typer.echo(f"written: {out}")


# -- what the commands share -------------------------------------------------------------------


def _store(accepted: Sequence[str] | None) -> AssetStore:
    from keepshot.assets import AssetStore

    return AssetStore.from_environment(os.environ, accepted_licences=frozenset(accepted or ()))


def _working(as_json: bool) -> Any:
    from keepshot.screen import Screen

    return Screen(quiet=as_json)


def _workspace(out: Path | None, name: str, spec: Any, overwrite: bool) -> Any:
    from keepshot.jobs.workspace import Workspace, free_name

    return Workspace(out or free_name(Path("runs"), name), spec, overwrite=overwrite)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _names(text: str | None) -> list[str] | None:
    return [part.strip() for part in text.split(",") if part.strip()] if text else None


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected whole numbers, such as 0,4") from None


def _show(document: ResultDocument, as_json: bool, out: Path | None) -> None:
    if as_json:
        typer.echo(document.to_json())
        return
    from keepshot.shown import show_document

    show_document(document, out)


def _check_gate(document: ResultDocument, required: float | None) -> None:
    if required is None:
        return
    from keepshot.jobs.gate import check_retention

    check_retention(document, required)


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=1, ensure_ascii=False, default=str))


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from keepshot.table import show_table

    show_table(columns, rows)


def _print_plan(costs: list[dict[str, object]], as_json: bool) -> None:
    if as_json:
        _print_json({"plan": costs})
    else:
        _print_table(list(costs[0]), [list(row.values()) for row in costs])


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"keepshot {__version__}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the command line and leave with its exit status."""
    leave(lambda: app(standalone_mode=False))

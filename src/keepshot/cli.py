"""The command line: parse, build a spec, call one job, print.

Only this file prints, reads the environment, and imports inside functions: `--help`, `tasks` and
`report` must not wait for torch.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from keepshot import __version__
from keepshot import options as option
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


@app.command()
def run(
    recipe: option.RunRecipe = None,
    model: option.Model = None,
    data: option.Data = None,
    out: option.Out = None,
    overwrite: option.Overwrite = False,
    as_json: option.Json = False,
    seed: option.Seed = None,
    device: option.Device = None,
    dtype: option.DType = None,
    set_: option.Set = None,
    trust_remote_code: option.Trust = False,
    accept_licence: option.Licence = None,
    require_retention: option.Gate = None,
) -> None:
    """Tune a model several ways, and show what each way keeps."""
    from keepshot.jobs.recipes import run_spec

    where = option.given(seed=seed, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    spec = run_spec(recipe, {**option.given(model=model, data=data), **where}, set_ or [])
    with _working(as_json) as screen:
        screen.stage("starting")
        from keepshot.jobs.run import run as run_job

        with _workspace(out, spec.name, spec, overwrite) as workspace:
            measured = run_job(spec, _store(accept_licence), workspace, screen)
    _show(measured.document, as_json, workspace.out_dir)
    _check_gate(measured.document, require_retention)


@app.command()
def measure(
    models: option.Models,
    tasks: option.Tasks = None,
    shots: option.Shots = None,
    seeds: option.Seeds = None,
    limit: option.Limit = None,
    plan: option.Plan = False,
    template: option.Template = None,
    lm_eval_out: option.LmEvalOut = None,
    no_share: option.NoShare = False,
    server: option.Server = None,
    server_model: option.ServerModel = None,
    out: option.Out = None,
    overwrite: option.Overwrite = False,
    as_json: option.Json = False,
    seed: option.Seed = None,
    device: option.Device = None,
    dtype: option.DType = None,
    set_: option.Set = None,
    trust_remote_code: option.Trust = False,
    accept_licence: option.Licence = None,
    require_retention: option.Gate = None,
) -> None:
    """Measure few-shot ability of models on the same questions and demonstrations."""
    from keepshot.jobs.recipes import measure_spec

    given = option.given(
        models=models, tasks=option.names(tasks), shots=option.whole_numbers("--shots", shots),
        seeds=seeds, limit=limit, template=template, server=server, server_model=server_model,
        seed=seed, device=device, dtype=dtype, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    spec = measure_spec(given, set_ or [])
    store = _store(accept_licence)
    first = os.environ.get("RANK", "0") == "0"
    with _working(as_json or not first) as screen:
        screen.stage("starting")
        from keepshot.jobs.measure import measure_models, plan_cost
        from keepshot.scoring.processes import join_processes

        if plan:
            costs = plan_cost(spec, store, screen)
            return _print_plan(costs, as_json)
        processes = join_processes(os.environ)
        place = _workspace(out, "", spec, overwrite) if out and first else nullcontext()
        with place as workspace:
            measured = measure_models(
                spec, store, workspace, screen, processes=processes, share=not no_share
            )
    if not first:
        return
    if lm_eval_out:
        from keepshot.harness.results import write_results

        write_results(measured.document, lm_eval_out)
    _show(measured.document, as_json, out)
    _check_gate(measured.document, require_retention)


@app.command()
def tune(
    recipe: option.TuneRecipe = None,
    model: option.Model = None,
    data: option.Data = None,
    method: option.Method = None,
    keep: option.Keep = None,
    out: option.Out = None,
    overwrite: option.Overwrite = False,
    as_json: option.Json = False,
    seed: option.Seed = None,
    device: option.Device = None,
    dtype: option.DType = None,
    set_: option.Set = None,
    trust_remote_code: option.Trust = False,
    accept_licence: option.Licence = None,
) -> None:
    """Tune a model on an examples file, by default so that few-shot ability stays."""
    from keepshot.jobs.recipes import tune_spec

    given = option.given(model=model, data=data, method=method, keep=keep, seed=seed)
    where = option.given(device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    spec = tune_spec(recipe, given, where, set_ or [])
    with _working(as_json) as screen:
        screen.stage("starting")
        from keepshot.jobs.tune import tune as tune_job

        with _workspace(out, "tuned", spec, overwrite) as workspace:
            document = tune_job(spec, _store(accept_licence), workspace, screen)
    _show(document, as_json, workspace.out_dir)


@app.command()
def blend(
    base: option.Base,
    tuned: option.Tuned = None,
    lam: option.Lambda = None,
    sweep: option.Sweep = None,
    tasks: option.Tasks = None,
    target: option.Target = None,
    pick: option.Pick = None,
    shots: option.Shots = None,
    seeds: option.Seeds = None,
    limit: option.Limit = None,
    no_check: option.NoCheck = False,
    out: option.Out = None,
    overwrite: option.Overwrite = False,
    as_json: option.Json = False,
    seed: option.Seed = None,
    device: option.Device = None,
    dtype: option.DType = None,
    set_: option.Set = None,
    trust_remote_code: option.Trust = False,
    accept_licence: option.Licence = None,
) -> None:
    """Walk the path base + lambda * (tuned - base): write one point, or measure many."""
    from keepshot.jobs.recipes import blend_spec
    from keepshot.jobs.specs import parse_lambdas

    given = option.given(
        base=base if tuned else None, tuned=tuned, lam=lam,
        sweep=parse_lambdas(sweep) if sweep else None, target=target, pick=pick,
        tasks=option.names(tasks), shots=option.whole_numbers("--shots", shots), seeds=seeds,
        limit=limit, seed=seed, device=device, dtype=dtype, trust_remote_code=trust_remote_code,
        check=False if no_check else None,
    )  # fmt: skip
    spec = blend_spec(None if tuned else Path(base), given, set_ or [])
    if spec.sweep is None:
        place = out or Path("runs/blend")
        return _write_blend(spec, place, _store(accept_licence), overwrite, as_json)
    with _working(as_json) as screen:
        screen.stage("starting")
        from keepshot.jobs.blend import blend as blend_job

        with _workspace(out, "blend", spec, overwrite) as workspace:
            document = blend_job(spec, _store(accept_licence), workspace, screen)
    _show(document, as_json, workspace.out_dir)


@app.command()
def theory(
    claim: option.Claim = None,
    d: option.Dimension = None,
    sigma2: option.Sigma2 = None,
    spectrum: option.Spectrum = None,
    shots: option.Shots = None,
    pretrain_shots: option.PretrainShots = None,
    out: option.Out = None,
    overwrite: option.Overwrite = False,
    as_json: option.Json = False,
    seed: option.Seed = None,
    device: option.Device = None,
    dtype: option.DType = None,
    set_: option.Set = None,
) -> None:
    """Check, in closed form and in simulation, why value-only tuning keeps few-shot ability."""
    from keepshot.jobs.recipes import theory_spec

    given = option.given(
        claims=claim, d=d, sigma2=sigma2, spectrum=option.decimals("--spectrum", spectrum),
        shots=option.whole_numbers("--shots", shots), pretrain_shots=pretrain_shots, seed=seed,
        device=device, dtype=dtype,
    )  # fmt: skip
    spec = theory_spec(given, set_ or [])
    with _working(as_json) as screen:
        screen.stage("starting")
        from keepshot.jobs.theory import theory as theory_job

        document, out_dir = theory_job(spec, out, screen, overwrite=overwrite)
    if as_json:
        return typer.echo(document.to_json())
    from keepshot.shown import show_theory

    show_theory(document, out_dir)


@app.command()
def report(
    dirs: option.RunDirs,
    out: option.Out = None,
    as_json: option.Json = False,
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
    directory: option.Written,
    as_json: option.Json = False,
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
    sql: option.Sql,
    dirs: option.QueryDirs = None,
    as_json: option.Json = False,
) -> None:
    """Ask the records of runs with SQL: tables items, scores, summary, path, training."""
    from keepshot.query import query as run_query

    columns, rows = run_query(sql, dirs or sorted(Path("runs").glob("*")))
    if as_json:
        _print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        _print_table(columns, rows)


@app.command()
def tasks(as_json: option.Json = False) -> None:
    """List the built-in tasks and suites."""
    from keepshot.tasks.catalog import list_tasks

    rows = list_tasks()
    if as_json:
        return _print_json({"tasks": rows})
    columns = ["name", "kind", "suites", "description"]
    _print_table(columns, [[row[column] for column in columns] for row in rows])


@app.command()
def models(
    fetch: option.Fetch = None,
    as_json: option.Json = False,
    accept_licence: option.Licence = None,
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
        return _print_json({"models": rows})
    _print_table(list(rows[0]), [list(row.values()) for row in rows])


@app.command()
def methods(as_json: option.Json = False) -> None:
    """List the tuning methods and keep terms."""
    from keepshot.jobs.recipes import describe

    rows = describe()
    if as_json:
        return _print_json({"methods": rows})
    _print_table(list(rows[0]), [list(row.values()) for row in rows])


@app.command(
    name="lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness; its `--model keepshot` is our engine, all else is its own."""
    from keepshot.harness.launch import run_harness

    run_harness(context.args)


# -- what the commands share -------------------------------------------------------------------


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
        models, watch = (locate, store), (check, screen)
        record = write_one(spec, out, models, watch, overwrite=overwrite, rule=rule)
        for note in record.notes:
            screen.note(note)
    if as_json:
        _print_json({"schema": 1, "directory": str(out), "blend": record.as_dict()})
    else:
        typer.echo(f"written: {out}")


def _store(accepted: Sequence[str] | None) -> AssetStore:
    from keepshot.assets import AssetStore

    return AssetStore.from_environment(os.environ, accepted_licences=frozenset(accepted or ()))


def _working(as_json: bool) -> Any:
    from keepshot.screen import Screen

    return Screen(quiet=as_json)


def _workspace(out: Path | None, name: str, spec: Any, overwrite: bool) -> Any:
    from keepshot.jobs.workspace import Workspace, free_name

    return Workspace(out or free_name(Path("runs"), name), spec, overwrite=overwrite)


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
    from keepshot.table import format_table

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    typer.echo(format_table(columns, rows, width))


def _print_plan(costs: list[dict[str, object]], as_json: bool) -> None:
    if as_json:
        _print_json({"plan": costs})
    else:
        _print_table(list(costs[0]), [list(row.values()) for row in costs])


@app.callback(invoke_without_command=True)
def _root(
    version: option.Version = False,
) -> None:
    if version:
        typer.echo(f"keepshot {__version__}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the command line and leave with its exit status."""
    leave(lambda: app(standalone_mode=False))

"""The command line: parse, build a spec, call one job, print.

Only this file and `common` print, read the environment, and import inside functions: `--help`,
`tasks` and `report` must not wait for torch.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import typer

from keepshot import __version__
from keepshot import options as option
from keepshot.common import (
    check_gate,
    open_store,
    open_workspace,
    print_json,
    print_plan,
    print_table,
    show,
    show_plan,
    show_status,
    show_study,
    watching,
    working,
    write_blend,
)
from keepshot.errors import ConfigError
from keepshot.exits import leave

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
    with working(as_json) as screen:
        screen.stage("starting")
        from keepshot.jobs.run import run as run_job

        with open_workspace(out, spec.name, spec, overwrite) as workspace:
            measured = run_job(spec, open_store(accept_licence), workspace, screen)
    show(measured.document, as_json, workspace.out_dir)
    check_gate(measured.document, require_retention)


@app.command()
def measure(
    models: option.Models,
    tasks: option.Tasks = None,
    shots: option.Shots = None,
    seeds: option.Seeds = None,
    limit: option.Limit = None,
    plan: option.Plan = False,
    template: option.Template = None,
    follow: option.Follow = None,
    lm_eval_out: option.LmEvalOut = None,
    no_share: option.NoShare = False,
    server: option.Server = None,
    server_model: option.ServerModel = None,
    engine: option.Engine = None,
    workers: option.Workers = None,
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
        following=option.following(follow), engine=engine, workers=workers,
    )  # fmt: skip
    spec = measure_spec(given, set_ or [])
    store = open_store(accept_licence)
    first = os.environ.get("RANK", "0") == "0"
    with working(as_json or not first) as screen:
        screen.stage("starting")
        from keepshot.jobs.measure import measure_models, plan_cost
        from keepshot.scoring.processes import join_processes

        if plan:
            costs = plan_cost(spec, store, screen)
            return print_plan(costs, as_json)
        processes = join_processes(os.environ)
        place = open_workspace(out, "", spec, overwrite) if out and first else nullcontext()
        with place as workspace:
            measured = measure_models(
                spec, store, workspace, screen, processes=processes, share=not no_share
            )
    if not first:
        return
    if lm_eval_out:
        from keepshot.harness.results import write_results

        write_results(measured.document, lm_eval_out)
    show(measured.document, as_json, out)
    check_gate(measured.document, require_retention)


@app.command()
def tune(
    recipe: option.TuneRecipe = None,
    model: option.Model = None,
    data: option.Data = None,
    method: option.Method = None,
    keep: option.Keep = None,
    merged: option.Merged = False,
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
    where = option.given(
        device=device, dtype=dtype, trust_remote_code=trust_remote_code, merged=merged
    )
    spec = tune_spec(recipe, given, where, set_ or [])
    first = os.environ.get("RANK", "0") == "0"
    with working(as_json or not first) as screen:
        screen.stage("starting")
        from keepshot.jobs.tune import tune as tune_job
        from keepshot.scoring.processes import join_processes

        processes = join_processes(os.environ)
        place = open_workspace(out, "tuned", spec, overwrite) if first else nullcontext()
        with place as workspace:
            document = tune_job(spec, open_store(accept_licence), workspace, screen, processes)
    if workspace is not None:
        show(document, as_json, workspace.out_dir)


@app.command()
def blend(
    base: option.Base,
    tuned: option.Tuned = None,
    lam: option.Lambda = None,
    sweep: option.Sweep = None,
    tasks: option.Tasks = None,
    target: option.Target = None,
    pick: option.Pick = None,
    follow: option.Follow = None,
    restore: option.Restore = None,
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
        check="none" if no_check else None, following=option.following(follow),
        restore=option.names(restore),
    )  # fmt: skip
    spec = blend_spec(None if tuned else Path(base), given, set_ or [])
    if spec.sweep is None:
        place = out or Path("runs/blend")
        return write_blend(spec, place, open_store(accept_licence), overwrite, as_json)
    with working(as_json) as screen:
        screen.stage("starting")
        from keepshot.jobs.blend import blend as blend_job

        with open_workspace(out, "blend", spec, overwrite) as workspace:
            document = blend_job(spec, open_store(accept_licence), workspace, screen)
    show(document, as_json, workspace.out_dir)


@app.command()
def judge(
    candidate: option.Candidate = None,
    reference: option.Reference = None,
    by: option.JudgedBy = None,
    prompts: option.Prompts = None,
    ifeval: option.IFEval = None,
    limit: option.Limit = None,
    no_sanity: option.NoSanity = False,
    out: option.Out = None,
    as_json: option.Json = False,
    seed: option.Seed = None,
    device: option.Device = None,
    dtype: option.DType = None,
    set_: option.Set = None,
    trust_remote_code: option.Trust = False,
    accept_licence: option.Licence = None,
) -> None:
    """Compare two models' answers, or see how many verifiable instructions one follows."""
    from keepshot.jobs.recipes import judge_spec

    given = option.given(
        candidate=candidate, reference=reference, judges=by, prompts=prompts, ifeval=ifeval,
        limit=limit, sanity=False if no_sanity else None, seed=seed, device=device, dtype=dtype,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    spec = judge_spec(given, set_ or [])
    with working(as_json) as screen:
        screen.stage("starting")
        from keepshot.jobs.judge import judge as judge_job

        key = os.environ.get("KEEPSHOT_JUDGE_KEY")
        document = judge_job(spec, open_store(accept_licence), out, screen, key=key)
    if as_json:
        return print_json(document.model_dump(mode="json", by_alias=True))
    from keepshot.shown import show_judged

    show_judged(document)


@app.command()
def study(
    file: option.StudyFile,
    engine: option.StudyEngine = "local",
    workers: option.StudyWorkers = None,
    plan: option.Plan = False,
    status: option.Status = False,
    limit_minutes: option.LimitMinutes = None,
    yes: option.Yes = False,
    retry: option.Retry = False,
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
    """Run a study of many models, stopped and gone on with at will."""
    from keepshot.jobs.recipes import study_spec

    if status and plan:
        raise ConfigError("--status says how far it is, --plan what it would take; give one")
    where = option.given(
        seed=seed, device=device, dtype=dtype, trust_remote_code=trust_remote_code or None
    )
    spec, usual = study_spec(file, where, set_ or [])
    place, store = out or usual, open_store(accept_licence)
    if status:
        from keepshot.jobs.study import status_of

        return show_status(*status_of(spec, store, place, analysed=as_json), as_json)
    with watching(as_json) as watch:
        watch.stage("starting")
        from keepshot.jobs.study import Running
        from keepshot.jobs.study import study as study_job

        running = Running(engine, workers, limit_minutes, yes, retry, overwrite)
        if plan:
            from keepshot.jobs.study_plan import plan_study

            return show_plan(plan_study(spec, store, place, watch, running), as_json)
        document = study_job(spec, store, place, watch, running)
    show_study(document, as_json, place)


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
    with working(as_json) as screen:
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
    """Write the page of a run or a study again, or one page that compares several."""
    from keepshot.records import ResultDocument
    from keepshot.report import compare, write_report
    from keepshot.report.study import is_study, read_study, write_study_report

    if len(dirs) == 1 and out is None and is_study(dirs[0]):
        page = write_study_report(dirs[0])
        if not as_json:
            return typer.echo(page)
        found = read_study(dirs[0]).model_dump(by_alias=True)
        return print_json({"report": str(page), "study": found})
    documents = [ResultDocument.read(directory) for directory in dirs]
    if len(dirs) == 1 and out is None:
        page = write_report(dirs[0])
    else:
        page = compare(dirs, out or Path("runs/comparison"))
    if as_json:
        print_json({"report": str(page), "runs": [d.model_dump(by_alias=True) for d in documents]})
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
        print_json({"directory": str(directory), "ok": True, "blend": record.as_dict()})
    else:
        typer.echo(f"{directory}: complete and unchanged")


@app.command()
def query(
    sql: option.Sql,
    dirs: option.QueryDirs = None,
    as_json: option.Json = False,
) -> None:
    """Ask the records with SQL: items, scores, summary, path, training, instructions, study."""
    from keepshot.query import query as run_query

    columns, rows = run_query(sql, dirs or sorted(Path("runs").glob("*")))
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        print_table(columns, rows)


@app.command()
def tasks(as_json: option.Json = False) -> None:
    """List the built-in tasks and suites."""
    from keepshot.tasks.catalog import list_tasks

    rows = list_tasks()
    if as_json:
        return print_json({"tasks": rows})
    columns = ["name", "kind", "suites", "description"]
    print_table(columns, [[row[column] for column in columns] for row in rows])


@app.command()
def models(
    fetch: option.Fetch = None,
    as_json: option.Json = False,
    accept_licence: option.Licence = None,
) -> None:
    """List the embedded models, and where they lie once fetched."""
    from keepshot.models.reference import list_models

    store = open_store(accept_licence)
    if fetch:
        with working(as_json) as screen:
            screen.stage(f"fetching {fetch}")
            from keepshot.models.loading import fetch_model

            fetch_model(fetch, store)
    rows = list_models(store)
    if as_json:
        return print_json({"models": rows})
    print_table(list(rows[0]), [list(row.values()) for row in rows])


@app.command()
def methods(as_json: option.Json = False) -> None:
    """List the tuning methods and keep terms."""
    from keepshot.jobs.recipes import describe

    rows = describe()
    if as_json:
        return print_json({"methods": rows})
    print_table(list(rows[0]), [list(row.values()) for row in rows])


@app.command(
    name="lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness; its `--model keepshot` is our engine, all else is its own."""
    from keepshot.harness.launch import run_harness

    run_harness(context.args)


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

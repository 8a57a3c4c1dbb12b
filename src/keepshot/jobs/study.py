"""Run a study, in this process or in workers of Ray, and write down what came of it."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from keepshot.assets import AssetStore, sha256_of
from keepshot.errors import ConfigError, ModelError, StudyError
from keepshot.jobs.cluster import Cluster, processors, shared_out
from keepshot.jobs.loading import freeing_fast
from keepshot.jobs.study_apart import Unwatched, apart
from keepshot.jobs.study_following import rows_of, set_contents
from keepshot.jobs.study_worker import Worker
from keepshot.jobs.workspace import environment
from keepshot.judging.follow import instruction_scores
from keepshot.models.identity import file_sha256
from keepshot.models.loading import identify
from keepshot.models.reference import Embedded, GGUFFile, HubModel, converted_path, parse_reference
from keepshot.outputs import write_text
from keepshot.records import InstructionRow, write_instructions
from keepshot.report.study import write_study_report
from keepshot.study.arms import arms
from keepshot.study.costs import overhead_of
from keepshot.study.directory import MARK, STUDY, StudyDirectory
from keepshot.study.document import RECORD, StudyDocument
from keepshot.study.findings import findings
from keepshot.study.frame import Frame, check_tags, item_frame, score_frame, write_frames
from keepshot.study.grid import Grid, check_names, check_size, expand, names_in
from keepshot.study.runner import Tally, Terms, Watch, failures, tally, work
from keepshot.study.spec import StudySpec, check_patterns
from keepshot.study.tables import markdown
from keepshot.tasks.catalog import CATALOG, is_path

TIMES_AGAIN = 20
"""How often a worker of Ray that died is replaced."""


@dataclass(frozen=True)
class Running:
    """How a study is run; nothing here changes a result."""

    engine: str = "local"
    """`local`, `ray`, or HOST:PORT of a Ray cluster that reaches the same directory."""
    workers: int | None = None
    """Workers of Ray; left out, one for each processor."""
    limit_minutes: float | None = None
    """No unit is begun after this time."""
    meant: bool = False
    """A large grid is meant."""
    retry: bool = False
    """Do again what failed."""
    overwrite: bool = False
    """Go on in a directory that holds another study."""


def study(
    spec: StudySpec, store: AssetStore, out_dir: Path, watch: Watch, running: Running
) -> StudyDocument:
    """Do what is left of a study, and write its frames, document and report.

    Args:
        spec: the study.
        store: where assets are cached.
        out_dir: the study's directory; what is recorded there is not repeated.
        watch: told of stages and units.
        running: where it runs, and for how long.

    Raises:
        UserError: before any model is loaded, wherever the fault can be seen by then. What a unit
            meets later becomes its record.
    """
    check_running(running)
    watch.stage("reading tasks")
    grid = grid_of(spec, store)
    check_size(grid, meant=running.meant)
    worker = Worker(spec, store, StudyDirectory(out_dir), watch)
    worker.check(grid)
    directory = worker.directory
    directory.open(spec_text(spec), spec.fingerprint(), overwrite=running.overwrite)
    if running.retry:
        directory.forget(record.unit for record in failures(grid, directory))
    write_text(json.dumps(environment(), indent=1), directory.path / "environment.json")
    limit = None if running.limit_minutes is None else 60.0 * running.limit_minutes
    if running.engine == "local":
        with freeing_fast():
            work(grid, directory, worker.perform, watch, _terms(worker, limit))
    else:
        _work_apart(worker, grid, running, limit)
    watch.stage("writing the frame and the report")
    return finish(spec, grid, directory)


def grid_of(spec: StudySpec, store: AssetStore) -> Grid:
    """Expand a study, its units identified by the content of what they read.

    Raises:
        ConfigError: if it is empty, a pattern matches nothing, or two files have one name.
        StudyError: if a tag cannot be a column.
        TaskError: if a file is missing.
    """
    check_patterns(spec)
    check_names(spec)
    check_tags(spec)
    contents = set_contents(spec)
    embedders = [ask.similarity for ask in spec.asks.values()]
    for reference in {*(model.reference for model in spec.models), *embedders}:
        found = _model_content(reference, store) if reference else None
        if reference and found is not None:
            contents[reference] = found
    for name in {name for names in names_in(spec) for name in names}:
        if name in CATALOG:
            contents[name] = f"version {CATALOG[name].version}"
        elif is_path(name) and Path(name).is_file():
            contents[name] = sha256_of(Path(name))
    return expand(spec, contents)


def spec_text(spec: StudySpec) -> str:
    """Return the study as YAML that reads back as the same study."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def opened(spec: StudySpec, out_dir: Path) -> StudyDirectory:
    """Return a study's directory without changing it.

    Raises:
        StudyError: if none lies there, or one of another study.
    """
    mark = out_dir / MARK
    if not mark.exists():
        raise StudyError(f"{out_dir}: no study lies here yet; start it, or name another with --out")
    if mark.read_text("utf-8").strip() != spec.fingerprint():
        raise StudyError(
            f"{out_dir}: holds another study; compare with {out_dir / STUDY}, or name "
            "another with --out"
        )
    return StudyDirectory(out_dir)


def status_of(
    spec: StudySpec, store: AssetStore, out_dir: Path, *, analysed: bool
) -> tuple[Tally, StudyDocument]:
    """Return how far the study in a directory is, and its results so far.

    Args:
        spec: the study.
        store: of the models.
        out_dir: where it lies.
        analysed: with what its tuned models and bases have in common, which takes a while.

    Raises:
        StudyError: if none lies there, one of another study, or a record of another version.
    """
    directory = opened(spec, out_dir)
    grid = grid_of(spec, store)
    overhead = overhead_of(directory.records(grid.units).values())
    far = replace(tally(grid, directory), overhead=overhead)
    found = _measured(spec, grid, directory)
    return far, document_of(spec, grid, directory, found, analysed=analysed)


def finish(spec: StudySpec, grid: Grid, directory: StudyDirectory) -> StudyDocument:
    """Write frames and instructions, `report.md`, `study.json` and `report.html`."""
    found = _measured(spec, grid, directory)
    # What was measured comes first: it is there whatever becomes of its analysis.
    write_frames(found.items, score_frame(found.items), directory.path)
    instructions = directory.path / "instructions.parquet"
    if found.followed:
        write_instructions(found.followed, instructions)
    else:
        instructions.unlink(missing_ok=True)  # of an ask that was dropped
    document = document_of(spec, grid, directory, found)
    write_text(markdown(document), directory.path / "report.md")
    write_text(document.to_json(), directory.path / RECORD)
    write_study_report(directory.path)
    return document


@dataclass(frozen=True)
class Measured:
    """What a study has measured so far."""

    items: Frame
    followed: list[InstructionRow]


def _measured(spec: StudySpec, grid: Grid, directory: StudyDirectory) -> Measured:
    items = item_frame(spec, grid, directory.records(grid.units), directory.rows)
    return Measured(items, rows_of(spec, grid, directory))


def document_of(
    spec: StudySpec,
    grid: Grid,
    directory: StudyDirectory,
    found: Measured,
    *,
    analysed: bool = True,
) -> StudyDocument:
    """Return a study's results so far, of what it has measured."""
    records, items = directory.records(grid.units), found.items
    failed = failures(grid, directory)
    domains = {name: entry.domain for name, entry in CATALOG.items()}
    versions = sorted({record.keepshot for record in records.values()})
    notes = [f"Units were done by keepshot {' and '.join(versions)}."] if len(versions) > 1 else []
    return StudyDocument(
        name=spec.name,
        question=spec.question,
        total=len(grid.units),
        done=len(records) - len(failed),
        failed=len(failed),
        arms=arms(spec, grid, items, records),
        findings=findings(items, domains) if analysed else None,
        failures=[
            {"unit": r.unit, "label": r.label, "reason": r.reason or "", "trace": r.trace or ""}
            for r in failed
        ],
        instructions=instruction_scores(found.followed),
        notes=notes,
    )


# -- Ray ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Share:
    """What a worker of Ray needs to join in."""

    spec: StudySpec
    store: AssetStore
    out_dir: Path
    deadline: float | None
    """Seconds since the epoch, so that a worker that takes another's place has no more time."""


def _work_in_worker(share: _Share) -> None:
    """Be one more runner on the study's directory; its claims keep the others away."""
    worker = Worker(share.spec, share.store, StudyDirectory(share.out_dir), Unwatched())
    grid = grid_of(share.spec, share.store)
    limit = None if share.deadline is None else share.deadline - time.time()
    with freeing_fast():
        work(grid, worker.directory, worker.perform, Unwatched(), _terms(worker, limit))


def _terms(worker: Worker, limit_seconds: float | None) -> Terms:
    return Terms(limit_seconds, worker.spec.keep_models, apart(worker))


def _work_apart(worker: Worker, grid: Grid, running: Running, limit: float | None) -> None:
    spec, directory, watch = worker.spec, worker.directory, worker.watch
    workers = min(running.workers or processors(), len(grid.units))
    deadline = None if limit is None else time.time() + limit
    share = _Share(spec, worker.store.silent(), directory.path, deadline)
    cluster = Cluster(
        workers,
        gpus=spec.device.startswith("cuda"),
        address=None if running.engine == "ray" else running.engine,
        times_again=TIMES_AGAIN,
        idle=lambda: watch.tally(tally(grid, directory)),
    )
    watch.stage(f"{workers} workers of Ray")
    # Ray prints of lost workers, and stdout is for the result alone.
    results = closing(shared_out(_work_in_worker, [share] * workers, cluster))
    with redirect_stdout(sys.stderr), results as found:
        for _ in found:
            watch.tally(tally(grid, directory))


def check_running(running: Running) -> None:
    """Check how a study is to be run.

    Raises:
        ConfigError: naming the option that cannot be used.
    """
    if running.engine not in ("local", "ray") and ":" not in running.engine:
        raise ConfigError(
            f"--engine {running.engine!r}: expected local, ray, or HOST:PORT of a Ray cluster"
        )
    if running.workers is not None and running.engine == "local":
        raise ConfigError(
            f"--workers {running.workers} needs --engine ray; add it, or drop --workers"
        )
    if running.limit_minutes is not None and not running.limit_minutes > 0.0:
        raise ConfigError(f"--limit-minutes {running.limit_minutes:g}: expected more than 0")


def _model_content(reference: str, store: AssetStore) -> str | None:
    """Return what identifies a model's content without fetching it; None where nothing does."""
    try:
        parsed = parse_reference(reference)
        match parsed:
            case Embedded():
                return converted_path(parsed.model, store).name
            case HubModel():
                return None
            case GGUFFile():
                return file_sha256(parsed.path, store)
            case _:
                return identify(reference, store)
    except ModelError:
        return None  # shown by the units that load it

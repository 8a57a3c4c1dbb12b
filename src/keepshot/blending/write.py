"""One lambda to disk: two checkpoints streamed chunk by chunk, whatever their shard layouts.

Memory does not grow with the model, and torch is not loaded. The directory appears under its name
only when it is complete; a write that was killed goes on from its whole shards, and ends in the
same bytes. Knows nothing of measuring. Source of the arithmetic: arXiv 2504.11626.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from keepshot import __version__
from keepshot.assets import sha256_of
from keepshot.blending.adapter import ADAPTER_WEIGHTS
from keepshot.blending.arithmetic import RowLambda
from keepshot.blending.card import CARD_NAME, RECORD_NAME, BlendRecord, RealisedLambda, model_card
from keepshot.blending.companions import copy_adapter_companions, copy_companions
from keepshot.blending.hashing import Hashing
from keepshot.blending.planning import BlendPlan, Writing, fingerprint_text, plan_blend
from keepshot.blending.reread import reread
from keepshot.blending.rules import LambdaRule, check_lambda
from keepshot.blending.stream import How, Sums, Written, drop_notes, num_whole, write_shards
from keepshot.blending.unfinished import Input, Unfinished, unfinished, unfinished_path
from keepshot.errors import ModelError, OutputError
from keepshot.models.shards import (
    INDEX,
    SINGLE,
    PlannedShard,
    index_text,
    open_checkpoint,
    plan_shards,
)
from keepshot.outputs import claim
from keepshot.progress import Progress, Silent

_SPARE_BYTES = 64_000_000
_ROUNDING_SLACK = 0.02
"""How far the realised lambda may lie from the one asked for before the user is told."""
_NUM_HASHERS = 2

Check = Callable[[Path], str]
"""Looks further at the finished directory before it gets its name; returns what it found."""


@dataclass(frozen=True)
class Watch:
    """What goes on beside the writing: a check of the result, and the telling of progress."""

    check: Check | None = None
    progress: Progress = Silent()


def write(
    base_dir: Path,
    tuned_dir: Path,
    lam: float | LambdaRule,
    out_dir: Path,
    options: Writing | None = None,
    watch: Watch | None = None,
) -> BlendRecord:
    """Write base + lam * (tuned - base) as a directory that transformers loads.

    If `tuned_dir` is a PEFT adapter (LoRA, rsLoRA, DoRA, IA3), what is written is that adapter at
    `lam`, which is the same function exactly.

    Args:
        base_dir: directory of safetensors, sharded or not.
        tuned_dir: the same architecture; its config, tokenizer, chat template and generation
            settings go into the output. Or an adapter of the base.
        lam: one number, or a function from a tensor's name to its lambda.
        out_dir: must not exist, or be empty.
        options: see `Writing`.
        watch: a check of the finished directory, and where progress is told.

    Returns:
        The record that also lies in `out_dir` as `keepshot.json`.

    Raises:
        ConfigError: if lambda is not a finite number, or an option is unknown.
        ModelError: if the two do not fit (which tensor), one holds NaN or infinity, or an input
            changed since an interrupted write was begun.
        OutputError: if `out_dir` holds something, lies inside an input or around one, or the disk
            is too full.
    """
    options, watch = options or Writing(), watch or Watch()
    note = None if callable(lam) else check_lambda(lam)
    number = None if callable(lam) else float(lam)
    second = [options.second[0]] if options.second else []
    check_apart(out_dir, (base_dir, tuned_dir, *second))
    claim(out_dir, overwrite=options.overwrite)
    names = options.names or tuple(map(str, (base_dir, tuned_dir, *second)))
    with TemporaryDirectory(prefix="keepshot-") as scratch:
        plan = plan_blend(base_dir, tuned_dir, lam, options, Path(scratch))
        record = BlendRecord(
            kind="adapter" if plan.is_adapter else "model",
            lam=number,
            base=names[0],
            tuned=names[1],
            dtype=plan.dtype_name or "mixed",
            num_tensors=len(plan.tensors),
            num_bytes=plan.num_bytes,
            realised=RealisedLambda(None, None, None, 0),
            base_sha256={},
            tuned_sha256={},
            output_sha256={},
            notes=tuple(
                dict.fromkeys(text for text in (*options.notes, note, *plan.notes) if text)
            ),
            rounding=options.rounding,
            seed=options.seed,
            second=(names[2], options.second[1]) if options.second else None,
        )
        return _write(plan, record, out_dir, options, watch)


def check_inputs(base_dir: Path, tuned_dir: Path, options: Writing | None = None) -> BlendPlan:
    """Check, by configs and headers alone, that two directories can be blended.

    Returns:
        What would be written at lambda 1; the files in it exist while the inputs do.

    Raises:
        ModelError: if they do not fit (which tensor).
    """
    with TemporaryDirectory(prefix="keepshot-") as scratch:
        return plan_blend(base_dir, tuned_dir, 1.0, options or Writing(), Path(scratch))


def check_apart(out_dir: Path, inputs: Sequence[Path]) -> None:
    """Check that writing, or replacing, `out_dir` leaves the inputs alone.

    Raises:
        OutputError: if it lies inside an input, or an input inside it.
    """
    out = out_dir.resolve()
    for directory in inputs:
        given = directory.resolve()
        if out.is_relative_to(given):
            raise OutputError(f"{out_dir}: lies inside the input {directory}; choose another --out")
        if given.is_relative_to(out):
            raise OutputError(f"{out_dir}: holds the input {directory}; choose another --out")


def verify(out_dir: Path) -> BlendRecord:
    """Check that a written blend is complete and unchanged, file by file.

    Raises:
        ModelError: naming the first file that is missing, changed or new, or the lack of a record.
    """
    record = BlendRecord.read(out_dir)
    if not record.output_sha256:
        raise ModelError(
            f"{out_dir}: was written without hashing (--no-check), so nothing can be verified; "
            "write the blend again without it"
        )
    for name in record.output_sha256:
        if not (out_dir / name).is_file():
            raise ModelError(f"{out_dir / name}: missing; write the blend again")
    added = {file.name for file in out_dir.glob("*.safetensors")} - record.output_sha256.keys()
    if added:
        raise ModelError(f"{out_dir / min(added)}: does not belong to this blend; remove it")
    for name, digest in _hashed([out_dir / name for name in record.output_sha256]).items():
        if digest != record.output_sha256[name]:
            raise ModelError(f"{out_dir / name}: changed since it was written; write it again")
    return record


def _write(
    plan: BlendPlan, record: BlendRecord, out_dir: Path, options: Writing, watch: Watch
) -> BlendRecord:
    single = ADAPTER_WEIGHTS if plan.is_adapter else SINGLE[0]
    layout = [(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.tensors.values()]
    shards = plan_shards(layout, options.max_shard_bytes, Path(), single=single)
    if plan.is_adapter and len(shards) > 1:
        shards = plan_shards(layout, plan.num_bytes + 1, Path(), single=single)
    inputs = [
        Input(f"{side}/{file.name}", file)
        for side, checkpoint in plan.inputs.items()
        for file in checkpoint.files
    ]
    text = f"keepshot {__version__} {fingerprint_text(plan, options)}"
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    whole = num_whole(shards, unfinished_path(out_dir))
    _check_space(out_dir, sum(shard.num_bytes for shard in shards[whole:]))
    files = {entry.name: entry.file for entry in _in_turns(inputs)}
    with (
        Hashing(files) if options.hash_files else nullcontext() as hashing,
        unfinished(
            out_dir,
            fingerprint,
            inputs,
            hashing,
            lambda folder: num_whole(shards, folder) > 0,
            overwrite=options.overwrite,
        ) as work,
    ):
        watch.progress.stage("blending")
        if hashing is not None:
            hashing.start()
        how = How(
            rounding=options.rounding,
            seed=options.seed,
            hashed=options.hash_files,
            told=lambda done, total: watch.progress.update(
                done, total, f"{done / 1e9:.1f}/{total / 1e9:.1f} GB"
            ),
            naming=lambda shard: _note_read(shard, plan, work, hashing),
        )
        written = write_shards(shards, plan.tensors, work.folder, how)
        if len(shards) > 1:
            (work.folder / INDEX).write_text(index_text(shards), encoding="utf-8")
        if hashing is not None:
            watch.progress.stage("hashing the inputs")
            record = _with_digests(record, hashing.digests())
            if options.made_from is not None:
                originals = open_checkpoint(options.made_from).files
                record = replace(record, tuned_sha256=_hashed(originals))
        record = _finish(plan, record, written, work.folder, (options, watch, shards))
    return record


def _finish(
    plan: BlendPlan,
    record: BlendRecord,
    written: Written,
    folder: Path,
    how: tuple[Writing, Watch, Sequence[PlannedShard]],
) -> BlendRecord:
    """Put beside the weights what belongs there, check the whole, and write the record last."""
    options, watch, shards = how
    realised = RealisedLambda.from_sums(written.sums)
    base_dir, tuned_dir = plan.folder("base"), plan.folder("tuned")
    if plan.is_adapter:
        copied = copy_adapter_companions(tuned_dir, folder)
    else:
        copied = copy_companions(
            base_dir,
            tuned_dir,
            folder,
            plan.dtype_name,
            base_first=options.settings_from == "base",
        )
    rounded = _rounding_note(plan, record, written.sums)
    notes = (*record.notes, *copied, *([rounded] if rounded else []))
    checks: list[str] = []
    if options.hash_files:
        watch.progress.stage("reading again")
        checks.append(reread(folder, plan.tensors))
    if watch.check is not None:
        watch.progress.stage("loading and generating")
        checks.append(watch.check(folder))
    record = replace(
        record, realised=realised, notes=notes, checked=tuple(checks), output_sha256=written.sha256
    )
    (folder / CARD_NAME).write_text(model_card(record), encoding="utf-8")
    if options.hash_files:
        files = [f for f in folder.iterdir() if f.is_file() and not f.name.startswith(".")]
        others = _hashed(sorted(f for f in files if f.name not in written.sha256))
        record = replace(record, output_sha256=dict(sorted((written.sha256 | others).items())))
    # Last, so that its presence means done.
    text = json.dumps(record.as_dict(), indent=1)
    (folder / RECORD_NAME).write_text(text + "\n", encoding="utf-8")
    drop_notes(shards, folder)
    return record


def _note_read(
    shard: PlannedShard, plan: BlendPlan, work: Unfinished, hashing: Hashing | None
) -> None:
    """Note, before a shard counts as whole, the sha256 of all the input it was made of."""
    if hashing is None:
        return
    tensors = [plan.tensors[name] for name in shard.tensors]
    sources = {side.tensor for tensor in tensors for side in tensor.sides}
    sources |= {tensor.base for tensor in tensors if tensor.base is not None}
    names = {
        file: f"{side}/{file.name}"
        for side, checkpoint in plan.inputs.items()
        for file in checkpoint.files
    }
    ends: dict[str, int] = {}
    for source in sources:
        if source.file in names:  # a DoRA adapter at lambda lies in a scratch file
            name = names[source.file]
            ends[name] = max(ends.get(name, 0), source.offset + source.num_bytes)
    work.note(hashing.reached(ends))


def _in_turns(inputs: Sequence[Input]) -> list[Input]:
    """Order files as they are read: the first of every side, then the second, and so on."""
    sides: dict[str, list[Input]] = {}
    for entry in inputs:
        sides.setdefault(entry.name.partition("/")[0], []).append(entry)
    ranked = [(place, entry) for side in sides.values() for place, entry in enumerate(side)]
    return [entry for _, entry in sorted(ranked, key=lambda pair: pair[0])]


def _with_digests(record: BlendRecord, digests: dict[str, str]) -> BlendRecord:
    by_side: dict[str, dict[str, str]] = {}
    for name, digest in digests.items():
        side, _, file = name.partition("/")
        by_side.setdefault(side, {})[file] = digest
    return replace(
        record,
        base_sha256=by_side["base"],
        tuned_sha256=by_side["tuned"],
        second_sha256=by_side.get("second", {}),
    )


def _hashed(files: Sequence[Path]) -> dict[str, str]:
    with ThreadPoolExecutor(_NUM_HASHERS) as pool:
        return dict(zip((f.name for f in files), pool.map(sha256_of, files), strict=True))


def _rounding_note(plan: BlendPlan, record: BlendRecord, sums: Mapping[str, Sums]) -> str | None:
    """Say where rounding let the weights land, if that is not where they were asked to be.

    Under a rule, of tensors that have one lambda each and do not stay the base's.
    """
    asked = found = size = 0.0
    for name, (along, norm) in sums.items():
        lam = 1.0 if record.second else plan.tensors[name].sides[0].lam
        if isinstance(lam, RowLambda) or (record.lam is None and lam == 0.0):
            continue
        asked, found, size = asked + lam * norm, found + along, size + norm
    if size == 0.0 or math.isclose(found / size, asked / size, abs_tol=_ROUNDING_SLACK):
        return None
    if record.second is not None:
        what = "1 x the sum of both differences"
    elif record.lam is None:
        what = f"lambda {asked / size:.3f} (the mean under the rule)"
    else:
        what = f"lambda {record.lam:g}"
    return (
        f"{what} was realised as {found / size:.3f}: the tuned model's changes are "
        "smaller than the steps between neighbouring numbers of this dtype; "
        "write float32, or round stochastically"
    )


def _check_space(out_dir: Path, num_bytes: int) -> None:
    existing = next(parent for parent in out_dir.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes + _SPARE_BYTES:
        raise OutputError(
            f"{out_dir}: needs {num_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
            "free some space or choose another --out"
        )

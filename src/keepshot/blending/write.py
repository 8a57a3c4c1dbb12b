"""One lambda to disk: two checkpoints streamed tensor by tensor, whatever their shard layouts.

Memory does not grow with the model: one tensor of each side at a time. The directory appears
under its name only when it is complete. Knows nothing of measuring.
Source of the arithmetic: arXiv 2504.11626; `keepshot.blending.blend` does it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from keepshot.assets import sha256_of
from keepshot.blending.adapter import check_adapts, check_exact, scales
from keepshot.blending.blend import (
    LambdaRule,
    as_rule,
    blend_,
    blended_dtype,
    check_finite,
    check_lambda,
    check_pair,
    delta_products,
    same_bits,
)
from keepshot.blending.card import CARD_NAME, RECORD_NAME, BlendRecord, RealisedLambda, model_card
from keepshot.blending.companions import (
    compare_configs,
    copy_adapter_companions,
    copy_companions,
    may_be_tied,
)
from keepshot.errors import ConfigError, ModelError, OutputError, unknown
from keepshot.models.checkpoint import TensorInfo, TensorReader, TensorWriter
from keepshot.models.reference import read_json
from keepshot.records import building_directory, claim

MAX_SHARD_BYTES = 5_000_000_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_SPARE_BYTES = 64_000_000
_MAPPED_BYTES = 64_000_000
"""Shards are mapped into memory as they are read; past this much they are closed and reopened."""
_ROUNDING_SLACK = 0.02
"""How far the realised lambda may lie from the one asked for before the user is told."""


@dataclass(frozen=True)
class _Plan:
    """Two checked inputs, and what will be written of them."""

    base: TensorReader
    tuned: TensorReader
    layout: tuple[TensorInfo, ...]
    rule: LambdaRule
    is_adapter: bool = False
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.layout)

    @property
    def dtype_name(self) -> str | None:
        """Name of the floating-point dtype, None if there are several."""
        names = {str(info.dtype) for info in self.layout if info.dtype.is_floating_point}
        return names.pop().removeprefix("torch.") if len(names) == 1 else None


@dataclass(frozen=True)
class Output:
    """How the files of a blend are written."""

    dtype: str | None = None
    """Of floating-point tensors (float32, bfloat16, float16); None keeps what the inputs have:
    base's at lambda 0, tuned's at 1, the wider of both in between."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """A shard is closed before it would exceed this."""


def write(
    base_dir: Path,
    tuned_dir: Path,
    lam: float | LambdaRule,
    out_dir: Path,
    *,
    output: Output | None = None,
    names: tuple[str, str] | None = None,
) -> BlendRecord:
    """Write base + lam * (tuned - base) as a directory that transformers loads.

    If `tuned_dir` is a PEFT LoRA adapter, what is written is that adapter with its B matrices
    scaled by `lam`, which is the same function exactly.

    Args:
        base_dir: directory of safetensors, sharded or not.
        tuned_dir: the same architecture and vocabulary; its config, tokenizer, chat template and
            generation settings go into the output. Or a LoRA adapter of the base.
        lam: one number, or a function from a tensor's name to its lambda.
        out_dir: must not exist, or be empty.
        output: dtype and size of the files.
        names: what the record calls base and tuned, if not by their directories.

    Returns:
        The record that also lies in `out_dir` as `blend.json`.

    Raises:
        ConfigError: if lambda is not a finite number, or `dtype` is unknown.
        ModelError: if the two do not fit (which tensor), or one holds NaN or infinity.
        OutputError: if `out_dir` holds something, lies inside an input, or the disk is too full.
    """
    number = None if callable(lam) else float(lam)
    note = None if callable(lam) else check_lambda(lam)
    output = output or Output()
    if output.dtype is not None and output.dtype not in DTYPES:
        raise ConfigError(unknown("dtype", output.dtype, DTYPES, f"known: {', '.join(DTYPES)}"))
    _check_apart(out_dir, (base_dir, tuned_dir))
    claim(out_dir)
    plan = _plan(base_dir, tuned_dir, lam, output.dtype)
    _check_space(out_dir, plan.num_bytes)
    with (
        plan.base,
        plan.tuned,
        _digests(plan.base.files) as base_digests,
        _digests(plan.tuned.files) as tuned_digests,
        building_directory(out_dir) as folder,
    ):
        realised = _stream(plan, folder, output.max_shard_bytes)
        if plan.is_adapter:
            copied = copy_adapter_companions(tuned_dir, folder)
        else:
            copied = copy_companions(base_dir, tuned_dir, folder, plan.dtype_name)
        notes = [note, *plan.notes, *copied, _rounding_note(realised, number)]
        record = BlendRecord(
            kind="adapter" if plan.is_adapter else "model",
            lam=number,
            base=names[0] if names else str(base_dir),
            tuned=names[1] if names else str(tuned_dir),
            dtype=plan.dtype_name or "mixed",
            num_tensors=len(plan.layout),
            num_bytes=plan.num_bytes,
            realised=realised,
            base_sha256=_results(base_digests),
            tuned_sha256=_results(tuned_digests),
            output_sha256={},
            notes=tuple(text for text in notes if text),
        )
        _finish(folder, record)
    return BlendRecord.read(out_dir)


def check_inputs(base_dir: Path, tuned_dir: Path) -> None:
    """Check, by configs and headers alone, that two directories can be blended.

    Raises:
        ModelError: if they do not fit (which tensor).
    """
    plan = _plan(base_dir, tuned_dir, 1.0, None)
    plan.base.close()
    plan.tuned.close()


def verify(out_dir: Path) -> BlendRecord:
    """Check that a written blend is complete and unchanged, file by file.

    Raises:
        ModelError: naming the first file that is missing, changed or new, or the lack of a record.
    """
    record = BlendRecord.read(out_dir)
    for name in record.output_sha256:
        if not (out_dir / name).is_file():
            raise ModelError(f"{out_dir / name}: missing; write the blend again")
    added = {file.name for file in out_dir.glob("*.safetensors")} - record.output_sha256.keys()
    if added:
        raise ModelError(f"{out_dir / min(added)}: does not belong to this blend; remove it")
    with _digests([out_dir / name for name in record.output_sha256]) as digests:
        for name, digest in _results(digests).items():
            if digest != record.output_sha256[name]:
                raise ModelError(f"{out_dir / name}: changed since it was written; write it again")
    return record


def _plan(base_dir: Path, tuned_dir: Path, lam: float | LambdaRule, dtype: str | None) -> _Plan:
    if (base_dir / _ADAPTER_CONFIG).exists():
        raise ModelError(f"{base_dir}: is an adapter; base must be a whole model")
    if not (tuned_dir / _ADAPTER_CONFIG).exists():
        return _plan_model(base_dir, tuned_dir, as_rule(lam), DTYPES.get(dtype or ""))
    if callable(lam) or dtype is not None:
        raise ConfigError(
            f"{tuned_dir}: an adapter takes one lambda and keeps its dtype; "
            "merge it into its base for anything else"
        )
    return _plan_adapter(base_dir, tuned_dir, lam)


def _plan_model(
    base_dir: Path, tuned_dir: Path, rule: LambdaRule, dtype: torch.dtype | None
) -> _Plan:
    notes = compare_configs(base_dir, tuned_dir)
    base, tuned = TensorReader(base_dir), TensorReader(tuned_dir)
    common = [name for name in tuned.names if name in set(base.names)]
    tie_allowed = may_be_tied(tuned_dir)
    for side, reader, other in (("base", base, "tuned"), ("tuned", tuned, "base")):
        for name in sorted(set(reader.names) - set(common)):
            if not (tie_allowed and _is_copy(reader, name, common)):
                raise ModelError(
                    f"tensor {name!r} ({reader.directory}) is in {side} and not in {other}; "
                    "only two models of one architecture can be blended"
                )
            notes.append(f"tensor {name!r} is stored by {side} alone, tied there: left out")
    layout: list[TensorInfo] = []
    for name in common:
        if base.shape(name) != tuned.shape(name):
            raise ModelError(
                f"tensor {name!r}: base has shape {base.shape(name)}, tuned {tuned.shape(name)}; "
                "only two models of one architecture and vocabulary can be blended"
            )
        lam = rule(name)
        check_lambda(lam)
        kept = blended_dtype(base.dtype(name), tuned.dtype(name), lam)
        wanted = dtype if dtype is not None and kept.is_floating_point else kept
        layout.append(TensorInfo(name, base.shape(name), wanted))
    return _Plan(base, tuned, tuple(layout), rule, notes=tuple(notes))


def _plan_adapter(base_dir: Path, adapter_dir: Path, lam: float) -> _Plan:
    check_exact(read_json(adapter_dir / _ADAPTER_CONFIG), where=str(adapter_dir))
    base, adapter = TensorReader(base_dir), TensorReader(adapter_dir / _ADAPTER_WEIGHTS)
    check_adapts(adapter, base)

    def rule(name: str) -> float:
        # The path goes from no adapter (B = 0) to this one; the matrices A stay as they are.
        return lam if scales(name) else 1.0

    return _Plan(base, adapter, adapter.layout, rule, is_adapter=True)


def _is_copy(reader: TensorReader, name: str, among: Sequence[str]) -> bool:
    """Tell whether a tensor is stored twice in a checkpoint, as tied weights can be."""
    alike = [other for other in among if reader.shape(other) == reader.shape(name)]
    return any(same_bits(reader.read(name), reader.read(other)) for other in alike)


def _stream(plan: _Plan, folder: Path, max_shard_bytes: int) -> RealisedLambda:
    """Blend and write one tensor after the other, in the order of the tuned side's files."""
    slopes: dict[str, float] = {}
    along_all = norm_all = 0.0
    mapped = 0
    with TensorWriter(folder, plan.layout, shard_bytes=max_shard_bytes) as writer:
        for info in plan.layout:
            mapped += info.num_bytes
            if mapped > _MAPPED_BYTES:
                plan.base.close()
                plan.tuned.close()
                mapped = info.num_bytes
            tuned = plan.tuned.read(info.name)
            base = torch.zeros_like(tuned) if plan.is_adapter else plan.base.read(info.name)
            check_pair(info.name, base, tuned)
            out = torch.empty(info.shape, dtype=info.dtype)
            lam = plan.rule(info.name)
            blend_(out, base, tuned, lam)
            check_finite(f"blend at lambda {lam:g} of tensor {info.name!r}", out)
            writer.write(info.name, out)
            if not info.dtype.is_floating_point or (plan.is_adapter and not scales(info.name)):
                continue
            along, norm = delta_products(out, base, tuned)
            if norm > 0.0:
                slopes[info.name] = along / norm
                along_all += along
                norm_all += norm
    if plan.is_adapter:
        (folder / "model.safetensors").rename(folder / _ADAPTER_WEIGHTS)
    if not slopes:
        return RealisedLambda(None, None, None, 0)
    ends = [choose(slopes, key=lambda name: slopes[name]) for choose in (min, max)]
    lowest, highest = ((name, slopes[name]) for name in ends)
    return RealisedLambda(along_all / norm_all, lowest, highest, len(slopes))


def _finish(folder: Path, record: BlendRecord) -> None:
    (folder / CARD_NAME).write_text(model_card(record), encoding="utf-8")
    with _digests(sorted(file for file in folder.iterdir() if file.is_file())) as digests:
        record = replace(record, output_sha256=_results(digests))
    # Last, so that its presence means done.
    text = json.dumps(record.as_dict(), indent=1)
    (folder / RECORD_NAME).write_text(text + "\n", encoding="utf-8")


def _rounding_note(realised: RealisedLambda, lam: float | None) -> str | None:
    if lam is None or realised.overall is None:
        return None
    if math.isclose(realised.overall, lam, abs_tol=_ROUNDING_SLACK):
        return None
    return (
        f"lambda {lam:g} was realised as {realised.overall:.3f}: the tuned model's changes are "
        "smaller than the steps between neighbouring numbers of this dtype; write float32"
    )


@contextmanager
def _digests(files: Sequence[Path]) -> Generator[Mapping[Path, Future[str]]]:
    """Hash files on another thread while the block does something else."""
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        yield {file: pool.submit(sha256_of, file) for file in files}
    finally:
        pool.shutdown(cancel_futures=True)


def _results(digests: Mapping[Path, Future[str]]) -> dict[str, str]:
    return {file.name: digest.result() for file, digest in digests.items()}


def _check_apart(out_dir: Path, inputs: Sequence[Path]) -> None:
    out = out_dir.resolve()
    for directory in inputs:
        given = directory.resolve()
        if out == given or given in out.parents:
            raise OutputError(f"{out_dir}: lies inside the input {directory}; choose another --out")


def _check_space(out_dir: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(out_dir.parent).free
    if free < num_bytes + _SPARE_BYTES:
        raise OutputError(
            f"{out_dir}: needs {num_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
            "free some space or choose another --out"
        )

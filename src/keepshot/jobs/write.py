"""Write one lambda: the output directory itself is the model. Loads no torch.

Where the models lie is found by the caller's `locate`, because a conversion from GGUF needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from keepshot.assets import AssetStore
from keepshot.blending.card import BlendRecord
from keepshot.blending.planning import Writing
from keepshot.blending.rules import LambdaRule
from keepshot.blending.write import Check, Watch, write
from keepshot.errors import ConfigError, ModelError
from keepshot.jobs.specs import BlendSpec
from keepshot.models.bases import check_base, is_adapter
from keepshot.models.identity import directory_sha256
from keepshot.models.reference import (
    AdapterDirectory,
    Embedded,
    GGUFFile,
    HubModel,
    LocalDirectory,
    RunDirectory,
    parse_reference,
)
from keepshot.progress import Progress

Locate = Callable[[Embedded | HubModel | LocalDirectory | GGUFFile], Path]


@dataclass(frozen=True)
class Means:
    """What a write is done with."""

    locate: Locate
    """Finds the directory of a reference."""
    store: AssetStore
    check: Check | None
    """Called on what was written."""
    progress: Progress
    reduced: Path | None = None
    """What takes the place of the tuned model's files, if its difference was made smaller."""
    notes: tuple[str, ...] = ()
    """What the record says of that."""


def needs_anatomy(spec: BlendSpec) -> bool:
    """Tell whether lambda differs by layer or kind of module, for which the model must be read."""
    return spec.rule is not None


def find(reference: str, locate: Locate) -> Path:
    """Return the directory with the weights of a model, or of an adapter.

    Raises:
        ModelError: if nothing of that name exists.
    """
    parsed = parse_reference(reference)
    if isinstance(parsed, RunDirectory):
        parsed = parsed.inner
    if isinstance(parsed, AdapterDirectory):
        return parsed.path
    return parsed.path if isinstance(parsed, LocalDirectory) else locate(parsed)


def find_both(spec: BlendSpec, locate: Locate) -> tuple[Path, Path]:
    """Return the directories of both models; an adapter's is its own.

    Raises:
        ConfigError: if the tuned one is written as an adapter on another base.
        ModelError: if nothing of a name exists.
    """
    tuned = parse_reference(spec.tuned)
    named = isinstance(tuned, AdapterDirectory) and not Path(spec.tuned).expanduser().is_dir()
    if isinstance(tuned, AdapterDirectory) and named and tuned.base != spec.base:
        raise ConfigError(
            f"tuned {spec.tuned!r} is an adapter on {tuned.base!r}, and the base given is "
            f"{spec.base!r}; give one base"
        )
    return find(spec.base, locate), find(spec.tuned, locate)


def writing(spec: BlendSpec, locate: Locate, *, overwrite: bool = False) -> Writing:
    """Return how the spec wants its blend written."""
    second = None
    if spec.second is not None:
        path = find(spec.second, locate)
        second = (path, spec.beta)
    return Writing(
        dtype=spec.write_dtype,
        rounding=spec.rounding,
        seed=spec.seed,
        settings_from=spec.settings_from,
        one_sided=spec.one_sided,
        second=second,
        hash_files=spec.checks_files,
        names=(
            spec.base,
            f"{spec.tuned}, {spec.reduce}" if spec.reduce else spec.tuned,
            *([spec.second] if spec.second else []),
        ),
        overwrite=overwrite,
    )


def write_one(
    spec: BlendSpec,
    out_dir: Path,
    means: Means,
    *,
    overwrite: bool = False,
    rule: LambdaRule | None = None,
) -> BlendRecord:
    """Write the blend at `spec.lam` (or by `rule`) to `out_dir`.

    Raises:
        UserError: before anything is written, wherever the fault can be seen by then.
    """
    assert spec.lam is not None
    base, original = find_both(spec, means.locate)
    tuned = means.reduced or original
    if is_adapter(base):
        raise ModelError(f"{base}: is an adapter; base must be a whole model")
    if is_adapter(tuned) and spec.checks_files and not means.reduced:
        check_base(tuned, directory_sha256(base, means.store), spec.base)
    options = writing(spec, means.locate, overwrite=overwrite)
    made_from = original if means.reduced else None
    return write(
        base,
        tuned,
        spec.lam if rule is None else rule,
        out_dir,
        replace(options, notes=means.notes, made_from=made_from),
        Watch(means.check, means.progress),
    )
